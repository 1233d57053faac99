"""Run a study: every cell is measured once, nothing is lost, and a failing model does not stop the others."""

import contextlib
import logging
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch

from layercrit.attacks import split_attack
from layercrit.errors import LayercritError, StudyError
from layercrit.locks import hold, write_whole
from layercrit.models.references import fetch
from layercrit.precision import PrecisionPlan, n_pilot_images, plan_half_width
from layercrit.probes.probe_set import ProbeSet
from layercrit.progress_bar import Bar
from layercrit.provenance import versions_with
from layercrit.study.entries import ModelEntry
from layercrit.study.executors import Executor, Failed, Message, Note, Task, TaskEvent
from layercrit.study.facts import facts_of, model_row
from layercrit.study.file import StudyFile, read_study_file
from layercrit.study.images import draw_images, drawn_images, n_available_images
from layercrit.study.local_processes import LocalProcesses, local_places
from layercrit.study.module_criticality import measure_of_file
from layercrit.study.module_entries import check_labels
from layercrit.study.peers import about_run, check_folder, check_peers, wait_for_pilots
from layercrit.study.pilots import pilots_of, plans_of
from layercrit.study.ranks import Shard
from layercrit.study.rows import FailureRow, PlanRow, as_plain_row
from layercrit.study.run_report import RunReport
from layercrit.study.shards import Elsewhere, is_other_format, is_study, open_study, shard_folder
from layercrit.study.store import Store
from layercrit.study.tasks import Trial, deal, first_tasks, further_tasks, places_of
from layercrit.study.worker import Job, Left, Measured, Opening, Planned, Progressed, name_of_parts, start_worker
from layercrit.trackers.callbacks import Caller, OnCell

__all__ = ["run_study"]

_LOG = logging.getLogger(__name__)


def run_study(
    study: StudyFile | str | Path,
    folder: str | Path,
    *,
    n_workers: int | None = None,
    retry: bool = False,
    progress: bool = True,
    executor: Executor | None = None,
    shard: Shard | None = None,
    on_cell: OnCell | None = None,
) -> RunReport:
    """Measure what is missing from a study; run again to resume after an interruption.

    Every finished cell is committed to the folder's store under a hash of its content (weights, layer, reset, seed,
    images, settings), so that no cell is measured twice and none of another model, image or setting is mixed in.

    Module criticality, where the file has a section for it, is measured after the cells, in this process. Shards leave
    it out: `layercrit.measure_study_module_criticality` measures it once all of them are finished.

    Args:
        study: what to measure: a study file, or what `layercrit.study.file.read_study_file` makes of one.
        folder: where the results go; created if missing.
        n_workers: local processes; None: one for each GPU, else one.
        retry: whether to retry what failed in an earlier run.
        progress: whether to show a progress bar on a terminal.
        executor: runs the tasks in place of local processes.
        shard: which share of the study this process has, of several that run it at the same time, on one machine or
            many: ``Shard.parse("3/16")``. Each has a store of its own in the folder, and whoever reads the study reads
            all of them. None: all of it.
        on_cell: called in this process with every cell that was measured now, once it is committed: a row as in
            `layercrit.study.tables.Study.cells`, without what the file alone knows (``run``, ``raw``), and with
            ``n_done`` and ``n_planned``, the cells of the study, or of its shard, that are done and that it has: of
            models that this run has not opened yet, none is done, and they count with the mean of the others. An
            exception is said once, as a RuntimeWarning, and the run goes on.

    Raises:
        StudyError: the file has mistakes, models are not trained yet, another process runs this study or shard, others
            run shards of another study file or under other versions, or the folder cannot be used or is not the same
            one on all machines.
        ProbeError: the images cannot be read.

    Examples:
        >>> import layercrit
        >>> layercrit.run_study("layercrit-demo/fashion.toml", "layercrit-demo/study").n_measured  # all is there
        0
    """
    if not isinstance(study, StudyFile):
        study = read_study_file(study)
    study.check_trained()
    started = time.monotonic()
    folder = Path(folder).expanduser().absolute()
    n_gpus = torch.cuda.device_count()
    executor = executor or LocalProcesses(local_places(n_workers, study.protocol.device, n_gpus, shard))
    number = 0 if shard is None else shard.number + 1
    own, about = shard_folder(folder, number), about_run(study, shard)
    with hold(own, about=about), Bar(progress) as bar:
        check_peers(folder, number, about)
        if shard is not None:
            check_folder(folder, shard)
            check_peers(folder, number, about)  # those that came meanwhile
        with Store(own, create=True, shared=number > 0) as store:
            run = _Run(study, folder, store, bar, shard, on_cell and Caller(on_cell))
            run.begin(retry)
            run.work(executor)
    if study.module_criticality is not None and shard is None:
        run.report.modules_failed = measure_of_file(folder, progress)
    run.report.seconds = time.monotonic() - started
    return run.report


class _Run:
    """One run of a study under way."""

    def __init__(
        self,
        study: StudyFile,
        folder: Path,
        store: Store,
        bar: Bar,
        shard: Shard | None,
        on_cell: OnCell | None = None,
    ) -> None:
        self.study, self.folder, self.store, self.bar, self.shard = study, folder, store, bar, shard
        self.on_cell = on_cell
        self.own_number = 0 if shard is None else shard.number + 1
        self.elsewhere = Elsewhere(folder)
        self.dealt: set[Trial] = set()  # that are this run's to measure
        self.retry = False  # whether to try again what failed before
        self.report = RunReport(folder)
        self.number = 0
        self.expected: dict[str, float] = {}  # task name -> cells, as far as its model was opened
        self.opened: set[str] = set()  # tasks whose model was opened
        self.said: set[tuple[str, str]] = set()  # what was printed, once for each model, or with "" once for all
        self.done: dict[str, float] = {}  # task name -> cells, parts of them while under way
        self.planned: dict[str, dict[str, PlanRow]] = {}  # task name -> key of a cell -> what it is
        self.whole: dict[str, int] = {}  # task name -> cells, without parts of them
        self.measured: set[str] = set()  # keys of the cells that this run measured

    def begin(self, retry: bool) -> None:
        """Write down what the study is about, and make sure of its images."""
        before, plans = self._before()
        probe_sets = self._probe_sets(next((plan.n_images for plan in plans.values()), self.n_first_images))
        check_labels(self.study.module_criticality, probe_sets)
        about = facts_of(self.study, probe_sets, self.n_first_images)
        self.elsewhere = Elsewhere.read(self.folder, self.own_number, about["measured"])
        self.retry = retry
        with self.store.transaction():
            self.store.drop_damaged()
            changed = self.store.meta("study", {}).get("measured") != about["measured"]
            if changed:
                self.store.clear_plan()
                self.store.put_meta("precision", [])
            self._forget_other_conditions(probe_sets)
            self.store.put_models([model_row(entry) for entry in self.study.models])
            if changed:  # what failed was asked for in another way
                for entry in self.study.models:
                    self.store.drop_failures(entry.name)
            self.store.put_meta("study", about)
            made_with = versions_with(
                resets=self.study.resets,
                distances=self.study.distances,
                models=[entry.reference for entry in self.study.models],
                images=[images.source for images in self.study.images],
            )
            about_run: dict[str, Any] = {"versions": made_with, "machine": platform.node()}
            about_run |= {"shard": str(self.shard)} if self.shard else {}
            self.number = self.store.put_run(_now(), about_run)
        write_whole(self.folder / "study.toml", self.study.to_toml())
        for row in self.store.damaged:
            self.bar.say(f"damaged on the disk, so made anew: {row}")
        if plans and before.get("measured") != about["measured"]:
            self._take_images(self.n_first_images)

    def _forget_other_conditions(self, probe_sets: Mapping[str | None, ProbeSet]) -> None:
        """Forget what was planned of models, and what failed, under a condition of the same name that was another."""
        sources = {images.name: images for images in self.study.images}
        now = {
            entry.name: [
                entry.norm_statistics,
                probe_sets[entry.probe_set].first(self.n_first_images).sha256,
                str(split_attack(sources[entry.probe_set].source)[0]),
            ]
            for entry in self.study.models
        }
        known = self.store.meta("conditions", {})
        for name in now:
            if known.get(name, now[name]) != now[name]:
                self.store.clear_plan(name)
                self.store.drop_failures(name)
                self._forget_precision(name)
        self.store.put_meta("conditions", now)

    def _forget_precision(self, model: str, reset: str | None = None) -> None:
        """Forget what was planned after the pilots of a model, or of one of its resets."""
        plans = self.store.meta("precision", [])
        kept = [plan for plan in plans if plan[0] != model or reset not in (None, plan[1])]
        if len(kept) < len(plans):
            self.store.put_meta("precision", kept)

    def _before(self) -> tuple[dict[str, Any], dict[tuple[str, str], PrecisionPlan]]:
        """Return what earlier runs, or other shards, were about, and what they planned."""
        if not is_study(self.folder):
            return {}, {}
        with open_study(self.folder) as stored:
            return stored.meta("study", {}), plans_of(stored.meta("precision"))

    def fetch(self, models: Iterable[ModelEntry]) -> None:
        """Download what opening models would lack; what cannot be had fails when it is opened."""
        for entry in models:
            with contextlib.suppress(LayercritError):
                fetch(entry.reference, self.bar.fetched)

    @cached_property
    def n_available(self) -> int:
        """How many images there are, those of the file at most."""
        return n_available_images(self.study.images[0])

    @cached_property
    def n_first_images(self) -> int:
        """How many images are shown at first: all, or those of the pilot."""
        protocol = self.study.protocol
        if not protocol.is_planned:
            return self.study.n_images
        return n_pilot_images(protocol.half_width, protocol.level, protocol.pilot, self.n_available)

    def _take_images(self, n_images: int) -> None:
        """Show so many images from now on."""
        about = facts_of(self.study, self._probe_sets(n_images), self.n_first_images)
        with self.store.transaction():
            self.store.put_meta("study", about)

    def _probe_sets(self, n_images: int) -> dict[str | None, ProbeSet]:
        """Return all probe sets, by name: with the images that the file names, or as many as a plan takes, at most."""
        shared = self.shard is not None
        most = n_images if self.study.protocol.is_planned else math.inf
        return {
            images.name: draw_images(
                self.study,
                images,
                self.folder,
                int(min(most, images.n_images)),
                self.store,
                shared=shared,
                progress=self.bar.decoded,
            )
            for images in self.study.images
        }

    def work(self, executor: Executor) -> None:
        """Run all trials, or the shard's: those that were asked for, or the pilot's and what is planned after it."""
        self._run_tasks(executor, first_tasks(self.study))
        if self.study.protocol.is_planned:
            n_images = self._n_images
            if self.shard is not None:
                self._wait_for_pilots(self.shard)
            plans = self._make_plans()
            if self._n_images > n_images:  # the pilot's trials run again
                self._run_tasks(executor, first_tasks(self.study))
            self._run_tasks(executor, self._further_tasks(plans))
        self.report.failures = [row for row in self._failures() if (row.model, row.reset, row.trial) in self.dealt]

    def _wait_for_pilots(self, shard: Shard) -> None:
        """Wait until the others have run their share of the pilot, unless everything is planned already."""
        wanted = {(entry.name, reset) for entry in self.study.models for reset in self.study.resets}
        if wanted <= self._before()[1].keys():
            return
        mark = {"of": shard.of, "models": [entry.name for entry in self.study.models], "n_images": self._n_images,
                "measured": self.store.meta("study")["measured"]}  # fmt: skip
        wait_for_pilots(self.folder, shard, mark, self.store, self.bar.say)

    def _failures(self) -> list[FailureRow]:
        """Return what failed, now or in an earlier run, here or in another shard."""
        own = {(row.model, row.reset, row.trial): row for row in self.store.failures()}
        others = [row for row in self.elsewhere.failures if (row.model, row.reset, row.trial) not in own]
        return [*own.values(), *others]

    def _run_tasks(self, executor: Executor, tasks: Sequence[Task]) -> None:
        """Run those tasks that are dealt to this shard, if there are several, and keep what they give."""
        dealt = deal(tasks, self.shard)
        places = {place for task in dealt for place in places_of(task)}
        if self.retry:
            self._forget_failures(places - self.dealt)
        self.dealt |= places
        failed = {(row.model, row.reset, row.trial) for row in self._failures()}
        left = [task for task in dealt if not failed.intersection(places_of(task))]
        self.report.n_retryable += len(dealt) - len(left)
        self.fetch({task.payload.model for task in left})
        self.expected |= dict.fromkeys((task.name for task in left), 0.0)
        self.done |= dict.fromkeys((task.name for task in left), 0.0)
        self._show()
        probe_sets = drawn_images(self.study, self.folder)
        if executor.is_remote:
            self._check_images()
            probe_sets = {name: probe_set.in_memory() for name, probe_set in probe_sets.items()}
        events = executor.run(left, partial(start_worker, self.study, probe_sets, self.folder), self._answer)
        with contextlib.closing(events):  # type: ignore[type-var]
            for event in events:
                if isinstance(event, Note):
                    self.bar.say(event.text)
                    continue
                with self.store.transaction():
                    self._keep(event)
                self._show()
                self._pass_on(event)

    def _check_images(self) -> None:
        """Make sure that workers elsewhere need not write to the study's folder.

        Raises:
            StudyError: they would, to keep adversarial images.
        """
        if any(split_attack(images.source)[0] for images in self.study.images):
            raise StudyError(
                "Adversarial images (attack:...) are made once on each model and kept in the study's folder, which "
                "workers elsewhere do not write. Run such a study here, in shards (--shard), or with `layercrit "
                "study submit`."
            )

    def _pass_on(self, event: TaskEvent) -> None:
        """Call the user's callback with the cells that were measured."""
        if self.on_cell is None:
            return
        name = event.task.name
        if isinstance(event, Message) and isinstance(event.content, Measured):
            cells = event.content.cells
            planned, n_planned = self.planned.pop(name), round(self._how_far()[1])
            for n_done, cell in enumerate(cells, 1 + sum(self.whole.values())):
                row = as_plain_row(planned[cell.key], cell)
                self.on_cell(row | {"n_done": n_done, "n_planned": n_planned})
            self.whole[name] += len(cells)

    def _make_plans(self) -> dict[tuple[str, str], PrecisionPlan]:
        """Return the plan of each model and reset: as it was fixed before, or, where there is none, made now."""
        with open_study(self.folder) as stored:
            plans = plans_of(stored.meta("precision"))
            pilots = pilots_of(stored, self.study.protocol.pilot, plans)
        if not pilots:
            self._take_planned_images(plans)
            return plans
        protocol, n_images = self.study.protocol, self._n_images
        made = plan_half_width(
            pilots,
            cast(float, protocol.half_width),
            level=protocol.level,
            n_pilot=protocol.pilot,
            n_pilot_images=n_images,
            n_available=n_images if plans else self.n_available,  # a model that came later gets those of the others
            max_trials=protocol.max_trials,
        )
        plans |= made
        with self.store.transaction():
            self.store.put_meta("precision", [[*key, plan.to_dict()] for key, plan in plans.items()])
        for (model, reset), plan in made.items():
            for line in plan.in_words():
                self.bar.say(f"{model}, {reset}: {line}" if not line.startswith(" ") else line)
        self._take_planned_images(plans)
        return plans

    def _take_planned_images(self, plans: Mapping[tuple[str, str], PrecisionPlan]) -> None:
        planned = max((plan.n_images for plan in plans.values()), default=0)
        if planned > self._n_images:
            self._take_images(planned)

    def _further_tasks(self, plans: Mapping[tuple[str, str], PrecisionPlan]) -> list[Task]:
        with open_study(self.folder) as stored:
            sizes = {(row.model, row.layer): row.n_parameters or 0 for row in stored.plan()}
        return further_tasks(self.study, plans, sizes)

    def _forget_failures(self, trials: Set[Trial]) -> None:
        """Let trials be tried again that failed here or elsewhere."""
        with self.store.transaction():
            for trial in trials:
                self.store.drop_failures(*trial)
            elsewhere = {(row.model, row.reset, row.trial) for row in self.elsewhere.failures} & trials
            if elsewhere:
                self.store.put_meta("retried", [*self.store.meta("retried", []), [_now(), sorted(elsewhere)]])
        left = tuple(row for row in self.elsewhere.failures if (row.model, row.reset, row.trial) not in trials)
        self.elsewhere = replace(self.elsewhere, failures=left)

    def _answer(self, task: Task, asked: Opening | Planned) -> dict[str, Any] | Left:
        """Tell a worker what is known."""
        if isinstance(asked, Opening):
            return dict(self._known_record(asked.model))
        with self.store.transaction():
            return self._plan(task, asked)

    def _known_record(self, model: str) -> Mapping[str, Any]:
        """Return what this store knows of a model, else what others do."""
        own = next(row for row in self.store.models() if row.model == model)
        first = self.elsewhere.first.get((own.model, own.reference))
        if own.record and first is not None and first[0] < self.own_number and is_other_format(own.record, first[1]):
            return first[1]  # where shards chose different ones, all take that of the first
        return own.record or self.elsewhere.records.get((own.model, own.reference), {})

    def _plan(self, task: Task, planned: Planned) -> Left:
        """Keep which cells a task has, and return which of them are left."""
        model, name = task.payload.model.name, task.name
        self._put_record(model, planned.record)
        self._say_about(model, planned.record)
        for where in places_of(task):
            self.store.clear_plan(*where)
        self.store.put_plan(planned.plan)
        keys = {row.key for row in planned.plan}
        known = self.store.known(keys)
        known |= self.elsewhere.known(keys - known)
        self.expected[name], self.done[name] = len(planned.plan), len(known)
        if self.on_cell is not None:
            self.planned[name], self.whole[name] = {row.key: row for row in planned.plan}, len(known)
        if name not in self.opened:  # else its worker died, and another one begins anew
            self.report.n_known += len(known)
            self.report.n_equal += len(known & self.measured)
        self.opened.add(name)
        parts = name_of_parts(keys - known)
        return Left(known, parts, self.store.parts(parts))

    def _keep(self, event: TaskEvent) -> None:
        job: Job = event.task.payload
        name = event.task.name
        places = places_of(event.task)
        match event:
            case Failed(error=error, details=details):
                _LOG.debug("%s failed:\n  %s", name, details.replace("\n", "\n  "))
                for where in places:
                    self.store.put_failure(FailureRow(*where, error, details, _now()))
                if (job.model.name, error) not in self.said:
                    self.said.add((job.model.name, error))
                    self.bar.say(f"{name} failed: {error.splitlines()[0][:160]}")
                self.expected[name] = self.done[name]
            case Message(content=Progressed(task, part, n_cells)):
                self.store.put_part(task, part)
                self.done[name] += n_cells * (part.stop - part.start) / self._n_images
            case Message(content=Measured(task, cells, record)):
                _LOG.info("%s: %d cells measured", name, len(cells))
                self._put_record(job.model.name, record)
                self._say_about(job.model.name, record)
                self.store.put_cells(cells, self.number)
                self.store.drop_parts(task)
                for where in places:
                    self.store.drop_failures(*where)
                self.report.n_measured += len(cells)
                self.measured |= {cell.key for cell in cells}
                self.done[name] = self.expected[name]

    def _say_about(self, model: str, record: Mapping[str, Any]) -> None:
        """Say what puts a model's numbers in doubt, and each note for the first model that has it."""
        about = [(model, f"warning: {text}") for text in record["warnings"]]
        about += [("", f"note: {text}") for text in record["notes"]]
        for said in about:
            if said not in self.said:
                self.said.add(said)
                self.bar.say(f"{model}: {said[1]}")

    def _put_record(self, model: str, record: dict[str, Any]) -> None:
        """Keep what is known of a model; where its weights or other content changed, its cells are others, too."""
        known = self._known_record(model)
        if known.get("sha256") == record["sha256"]:
            for reset, content in record["content"].items():
                if known["content"].get(reset) != content:
                    self.store.clear_plan(model, reset)
                    if reset in known["content"] and known["probe_set"] == record["probe_set"]:  # else a plan's images
                        self._forget_precision(model, reset)
            for of_resets in ("content", "donor", "random_trials"):
                record = {**record, of_resets: {**known[of_resets], **record[of_resets]}}
            if known["probe_set"] == record["probe_set"]:  # another worker may have the same model open
                record = {**record, "notes": list(dict.fromkeys([*known["notes"], *record["notes"]]))}
        else:
            self.store.clear_plan(model)
            if known:
                self._forget_precision(model)
        self.store.put_record(model, record)

    @property
    def _n_images(self) -> int:
        return int(self.store.meta("study")["probe_set"]["n_images"])

    def _how_far(self) -> tuple[float, float]:
        """Return how many cells are done, and there are; models not open yet are taken to have as many as others."""
        opened = [n for n in self.expected.values() if n]
        typical = sum(opened) / len(opened) if opened else 1.0
        return sum(self.done.values()), sum(n or typical for n in self.expected.values())

    def _show(self) -> None:
        self.bar.measured(*self._how_far())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
