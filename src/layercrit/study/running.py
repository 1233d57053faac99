"""Run a study: every cell is measured once, nothing is lost, and a failing model does not stop the others."""

import contextlib
import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch

from layercrit.errors import LayercritError, ProbeError
from layercrit.locks import hold
from layercrit.machine import versions
from layercrit.models.references import fetch
from layercrit.precision import PrecisionPlan, n_pilot_images, plan_half_width, run_together
from layercrit.probes.labelling import open_images
from layercrit.probes.parts import without_split
from layercrit.probes.probe_set import ProbeSet
from layercrit.progress_bar import Bar
from layercrit.resets import RESETS
from layercrit.seeds import probe_set_seed
from layercrit.statistics import needed_trials
from layercrit.study.entries import ModelEntry
from layercrit.study.executors import (
    Executor,
    Failed,
    Message,
    Note,
    Task,
    TaskEvent,
)
from layercrit.study.file import StudyFile
from layercrit.study.local_processes import LocalProcesses, local_places
from layercrit.study.pilots import pilots_of, plans_of
from layercrit.study.store import FailureRow, ModelRow, Store
from layercrit.study.worker import (
    Job,
    Left,
    Measured,
    Opening,
    Planned,
    Progressed,
    name_of_parts,
    start_worker,
)

__all__ = ["RunReport", "run_study"]

_PROBE_SET = "probe_set"
# settings that do not decide which cells a study has
_UNDECIDING = ("batch_size", "device", "level", "interval", "half_width", "minutes", "pilot", "max_trials")


@dataclass
class RunReport:
    """What a run did.

    Attributes:
        folder: the study's.
        n_measured: cells measured now.
        n_known: cells that were there already.
        n_retryable: failures of earlier runs that were not tried again.
        failures: everything that is not measured, and why.
        seconds: how long the run took.
    """

    folder: Path
    n_measured: int = 0
    n_known: int = 0
    n_retryable: int = 0
    failures: list[FailureRow] = field(default_factory=list)
    seconds: float = 0.0


def run_study(
    study: StudyFile,
    folder: str | Path,
    *,
    n_workers: int | None = None,
    retry: bool = False,
    progress: bool = True,
    executor: Executor | None = None,
) -> RunReport:
    """Measure what is missing from a study; run again to resume after an interruption.

    Every finished cell is committed to the folder's store under a hash of its content (weights, layer, reset, seed,
    images, settings), so that no cell is measured twice and none of another model, image or setting is mixed in.

    Args:
        study: what to measure, from `layercrit.study.file.read_study_file`.
        folder: where the results go; created if missing.
        n_workers: local processes; None: one for each GPU, else one.
        retry: whether to retry what failed in an earlier run.
        progress: whether to show a progress bar on a terminal.
        executor: runs the tasks in place of local processes.

    Raises:
        StudyError: models are not trained yet, another process runs this study, or the folder cannot be used.
        ProbeError: the images cannot be read.
    """
    study.check_trained()
    started = time.monotonic()
    folder = Path(folder).expanduser().absolute()
    executor = executor or LocalProcesses(local_places(n_workers, study.protocol.device, torch.cuda.device_count()))
    with hold(folder), Store(folder, create=True) as store, Bar(progress) as bar:
        run = _Run(study, folder, store, bar)
        run.begin(retry)
        run.fetch()
        run.work(executor)
        run.report.seconds = time.monotonic() - started
        return run.report


class _Run:
    """One run of a study under way."""

    def __init__(self, study: StudyFile, folder: Path, store: Store, bar: Bar) -> None:
        self.study, self.folder, self.store, self.bar = study, folder, store, bar
        self.report = RunReport(folder)
        self.number = 0
        self.expected: dict[str, float] = {}  # task name -> cells, as far as its model was opened
        self.opened: set[str] = set()  # tasks whose model was opened
        self.said: set[tuple[str, str]] = set()  # what was printed, once for each model, or with "" once for all
        self.done: dict[str, float] = {}  # task name -> cells, parts of them while under way

    def begin(self, retry: bool) -> None:
        """Write down what the study is about, and make sure of its images."""
        plans = plans_of(self.store.meta("precision"))
        probe_set = self._probe_set(next((plan.n_images for plan in plans.values()), self.n_first_images))
        about = _about(self.study, probe_set, self.n_first_images)
        with self.store.transaction():
            self.store.drop_damaged()
            changed = self.store.meta("study", {}).get("measured") != about["measured"]
            if changed:
                self.store.clear_plan()
                self.store.put_meta("precision", [])
            self.store.put_models([_model_row(entry) for entry in self.study.models])
            if changed or retry:  # what failed was asked for in another way, or may work now
                for entry in self.study.models:
                    self.store.drop_failures(entry.name)
            self.store.put_meta("study", about)
            self.number = self.store.put_run(_now(), {"versions": versions(), "machine": platform.node()})
        _write(self.folder / "study.toml", self.study.to_toml())
        for row in self.store.damaged:
            self.bar.say(f"damaged on the disk, so made anew: {row}")
        if changed and plans:
            self._take_images(self.n_first_images)

    @cached_property
    def n_available(self) -> int:
        """How many images there are, those of the file at most."""
        labels = self.study.labels if isinstance(self.study.labels, str) else "auto"
        return min(self.study.n_images, len(open_images(self.study.source, labels)))

    @cached_property
    def n_first_images(self) -> int:
        """How many images are shown at first: all, or those of the pilot."""
        protocol = self.study.protocol
        if not protocol.is_planned:
            return self.study.n_images
        return n_pilot_images(protocol.half_width, protocol.level, protocol.pilot, self.n_available)

    def _take_images(self, n_images: int) -> None:
        """Show so many images from now on."""
        about = _about(self.study, self._probe_set(n_images), self.n_first_images)
        with self.store.transaction():
            self.store.put_meta("study", about)

    def _probe_set(self, n_images: int) -> ProbeSet:
        """Return the images as an earlier run decoded them, or decode them now."""
        asked = {"source": self.study.source, "n_images": n_images, "labels": self.study.labels,
                 "seed": self.study.protocol.seed, "preprocessing": str(self.study.preprocessing)}  # fmt: skip
        labels = self.study.labels
        lists = [path for path in (labels, self.study.classes) if isinstance(path, str)]
        asked |= {"classes": self.study.classes} if self.study.classes is not None else {}
        kept = self.folder / _PROBE_SET
        files = _state_of(self.study.source, lists)
        known = self.store.meta("images", {})
        if known.get("asked") == asked and files in (None, known["files"]):
            with contextlib.suppress(ProbeError):  # gone or damaged: decoded anew
                probe_set = ProbeSet.load(kept)
                if probe_set.sha256 == known["sha256"]:
                    return probe_set
        probe_set = ProbeSet.from_source(
            self.study.source,
            self.study.preprocessing,
            n_images=n_images,
            seed=probe_set_seed(self.study.protocol.seed),
            labels=labels if isinstance(labels, str) else "auto" if labels else "none",
            classes=self.study.classes,
            progress=self.bar.decoded,
        )
        probe_set.save(kept)
        with self.store.transaction():
            self.store.put_meta("images", {"asked": asked, "files": files, "sha256": probe_set.sha256})
        return ProbeSet.load(kept, verify=False)

    def fetch(self) -> None:
        """Download what opening the models would lack; what cannot be had fails when it is opened."""
        for entry in self.study.models:
            with contextlib.suppress(LayercritError):
                fetch(entry.reference, self.bar.fetched)

    def work(self, executor: Executor) -> None:
        """Run all trials: those that were asked for, or those of the pilot and what is planned after it."""
        self._run_tasks(executor, self._first_tasks())
        if self.study.protocol.is_planned:
            n_images = self._n_images
            plans = self._make_plans()
            if self._n_images > n_images:  # the pilot's trials run again
                self._run_tasks(executor, self._first_tasks())
            self._run_tasks(executor, self._further_tasks(plans))
        self.report.failures = self.store.failures()

    def _run_tasks(self, executor: Executor, tasks: Sequence[Task]) -> None:
        """Run tasks, and keep what they give."""
        self.expected |= dict.fromkeys((task.name for task in tasks), 0.0)
        self.done |= dict.fromkeys((task.name for task in tasks), 0.0)
        self._show()
        probe_set = ProbeSet.load(self.folder / _PROBE_SET, verify=False)
        if executor.is_remote:
            probe_set = probe_set.in_memory()
        events = executor.run(tasks, partial(start_worker, self.study, probe_set), self._answer)
        with contextlib.closing(events):  # type: ignore[type-var]
            for event in events:
                if isinstance(event, Note):
                    self.bar.say(event.text)
                    continue
                with self.store.transaction():
                    self._keep(event)
                self._show()

    def _make_plans(self) -> dict[tuple[str, str], PrecisionPlan]:
        """Return the plan of each model and reset: as it was fixed before, or, where there is none, made now."""
        plans = plans_of(self.store.meta("precision"))
        pilots = pilots_of(self.store, self.study.protocol.pilot, plans)
        if not pilots:
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
        planned = max(plan.n_images for plan in plans.values())
        if planned > n_images:
            self._take_images(planned)
        return plans

    def _further_tasks(self, plans: Mapping[tuple[str, str], PrecisionPlan]) -> list[Task]:
        """Return the tasks after the pilot: trials that are run together, for the layers that get them."""
        failed = {(row.model, row.reset, row.trial) for row in self.store.failures()}
        sizes = {(row.model, row.layer): row.n_parameters or 0 for row in self.store.plan()}
        entries = {entry.name: entry for entry in self.study.models}
        tasks = []
        for (model, reset), plan in plans.items():
            if model not in entries or reset not in self.study.resets:
                continue
            trials = {}
            for trial, names in plan.trials().items():
                if (model, reset, trial) in failed:
                    self.report.n_retryable += 1
                else:
                    trials[trial] = names
            of_model = {layer: size for (name, layer), size in sizes.items() if name == model}
            tasks += [_task(entries[model], reset, together) for together in run_together(trials, of_model)]
        return tasks

    def _first_tasks(self) -> list[Task]:
        failed = {(row.model, row.reset, row.trial) for row in self.store.failures()}
        tasks = []
        for entry in self.study.models:
            for reset in self.study.resets:
                for trial in range(needed_trials(self.study.protocol.first_trials, RESETS[reset].random)):
                    if (entry.name, reset, trial) in failed:
                        self.report.n_retryable += 1
                        continue
                    tasks.append(_task(entry, reset, {trial: None}))
        return tasks

    def _answer(self, task: Task, asked: Opening | Planned) -> dict[str, Any] | Left:
        """Tell a worker what is known."""
        if isinstance(asked, Opening):
            return dict(self._known_record(asked.model))
        with self.store.transaction():
            return self._plan(task, asked)

    def _known_record(self, model: str) -> Mapping[str, Any]:
        return next(row.record for row in self.store.models() if row.model == model) or {}

    def _plan(self, task: Task, planned: Planned) -> Left:
        """Keep which cells a task has, and return which of them are left."""
        model, name = task.payload.model.name, task.name
        self._put_record(model, planned.record)
        self._say_about(model, planned.record)
        for where in _places(task.payload):
            self.store.clear_plan(*where)
        self.store.put_plan(planned.plan)
        keys = {row.key for row in planned.plan}
        known = self.store.known(keys)
        self.expected[name], self.done[name] = len(planned.plan), len(known)
        if name not in self.opened:  # else its worker died, and another one begins anew
            self.report.n_known += len(known)
        self.opened.add(name)
        parts = name_of_parts(keys - known)
        return Left(known, parts, self.store.parts(parts))

    def _keep(self, event: TaskEvent) -> None:
        job: Job = event.task.payload
        name = event.task.name
        places = _places(job)
        match event:
            case Failed(error=error, details=details):
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
                self._put_record(job.model.name, record)
                self._say_about(job.model.name, record)
                self.store.put_cells(cells, self.number)
                self.store.drop_parts(task)
                for where in places:
                    self.store.drop_failures(*where)
                self.report.n_measured += len(cells)
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
            for of_resets in ("content", "donor", "random_trials"):
                record = {**record, of_resets: {**known[of_resets], **record[of_resets]}}
            if known["probe_set"] == record["probe_set"]:  # another worker may have the same model open
                record = {**record, "notes": list(dict.fromkeys([*known["notes"], *record["notes"]]))}
        else:
            self.store.clear_plan(model)
        self.store.put_record(model, record)

    @property
    def _n_images(self) -> int:
        return int(self.store.meta("study")["probe_set"]["n_images"])

    def _show(self) -> None:
        """Show how far the study is; models that are not open yet are taken to have as many cells as the others."""
        opened = [n for n in self.expected.values() if n]
        typical = sum(opened) / len(opened) if opened else 1.0
        self.bar.measured(sum(self.done.values()), sum(n or typical for n in self.expected.values()))


def _task(entry: ModelEntry, reset: str, layers: Mapping[int, Sequence[str] | None]) -> Task:
    """Return the task of some trials of one reset of a model: trial -> the layers that get it; None: all of them."""
    first, last = min(layers), max(layers)
    numbers = f"trial {first}" if first == last else f"trials {first} to {last}"
    return Task(f"{entry.name}, {reset}, {numbers}", f"{entry.name}, {reset}", Job(entry, reset, layers))


def _places(job: Job) -> list[tuple[str, str, int]]:
    """Return model, reset and trial of each trial of a task."""
    return [(job.model.name, job.reset, trial) for trial in job.layers]


def _about(study: StudyFile, probe_set: ProbeSet, n_first_images: int) -> dict[str, Any]:
    """Return the facts about a study; those under ``measured`` decide which cells it has."""
    protocol = {**study.protocol.to_dict(), "resets": list(study.resets), "distances": list(study.distances),
                "n_images": study.n_images}  # fmt: skip
    del protocol["reset"]
    deciding = {k: v for k, v in protocol.items() if k not in _UNDECIDING}
    if study.protocol.is_planned:  # the level decides the plan
        deciding = {k: v for k, v in protocol.items() if k not in ("batch_size", "device", "trials")}
    return {
        "name": study.name,
        "baseline": study.baseline,
        "leave_out": list(study.leave_out),
        "protocol": protocol,
        "probe_set": {**probe_set.to_dict(), "labels": probe_set.labels is not None},
        "measured": {**deciding, "probe_set": probe_set.first(n_first_images).sha256},
    }


def _model_row(entry: ModelEntry) -> ModelRow:
    return ModelRow(
        entry.name,
        entry.reference,
        entry.category,
        entry.label,
        entry.accuracy,
        attack_norm=entry.attack_norm,
        eps=entry.eps,
    )


def _state_of(source: str, lists: Sequence[str]) -> str | None:
    """Return what changes when the files of an image source, or lists of labels do; None where it is no path here."""
    path = Path(without_split(source)[0])
    if not path.exists():
        return None
    digest = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in filter(Path.is_file, [*files, *(Path(one.partition("?column=")[0]) for one in lists)]):
        about = file.stat()
        name = file.relative_to(path) if file.is_relative_to(path) else file
        digest.update(f"{name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
