"""Run the tasks of a study on the nodes of a Ray cluster: workers are Ray actors, which do their tasks step by step."""

import contextlib
import pickle
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layercrit.errors import ProtocolError, StudyError
from layercrit.models.sources import parse
from layercrit.study.entries import ModelEntry
from layercrit.study.executors import (
    EXECUTORS,
    Answer,
    Asked,
    Error,
    Event,
    Executor,
    Failed,
    Note,
    Part,
    Place,
    Queue,
    Said,
    Start,
    Task,
    check_attempts,
    check_names,
    check_workers,
    error_text,
    event_of,
    executor,
    no_answer,
)
from layercrit.study.file import StudyFile
from layercrit.study.ray_cluster import (
    Inspection,
    Node,
    Share,
    cause_of,
    check_reachable,
    connected,
    import_ray,
    nodes_of,
    search_path,
    shares,
    token_in,
)

__all__ = ["EXECUTORS", "RayWorkers"]

_LOOK_AGAIN = 5.0  # seconds
_SAY_WAITING = 30.0  # seconds without a worker, after which the user is told what Ray may wait for
_ADVICE = (
    "If the memory of its node ran out, use fewer workers or a smaller batch size; Ray's logs there, in "
    "/tmp/ray/session_latest/logs, have its last output."
)


@executor("ray")
def _on_ray(rest: str, study: StudyFile, folder: Path, n_workers: int | None) -> "RayWorkers":
    """A Ray cluster that runs already: the one this machine belongs to, or ray://HOST:PORT from outside."""
    if rest and not rest.startswith("//"):
        raise StudyError(f"A study cannot be run on {f'ray:{rest}'!r}; expected ray, or ray://HOST:PORT.")
    return RayWorkers(
        f"ray:{rest}" if rest else None,
        n_workers=n_workers,
        device=study.protocol.device,
        folder=folder.expanduser().absolute(),
        in_files=[entry.name for entry in study.models if _is_in_file(entry)],
    )


def _is_in_file(entry: ModelEntry) -> bool:
    """Return whether a model is opened from a file of this machine."""
    _, rest, options = parse(entry.reference)
    named = [rest, *options.values(), entry.donor]
    return any(isinstance(path, str) and Path(path).is_absolute() for path in named)


class RayWorkers(Executor):
    """Actors on a Ray cluster that runs already, begun as Ray finds room for them, and ended with the run.

    They get tasks as local processes do. An actor that is lost, also with its node, is replaced, and its task is run
    again. Nothing of this machine is sent to the nodes but the tasks and what starts a worker: modules are looked for
    where this process has them, on file systems that both see, and among what is installed there.
    """

    is_remote = True

    def __init__(
        self,
        address: str | None = None,
        *,
        n_workers: int | None = None,
        device: str = "auto",
        attempts: int = 3,
        folder: Path | None = None,
        in_files: Sequence[str] = (),
    ) -> None:
        """Choose the workers, and make sure that there is a cluster.

        Args:
            address: ``ray://HOST:PORT`` of Ray Client, or ``HOST:PORT`` of the cluster itself; None: ``RAY_ADDRESS``,
                or the cluster that runs on this machine.
            n_workers: how many; those that find no room wait until the cluster grows. None: one for each GPU, or,
                where GPUs are not used, as many as fill all nodes when each has as many CPUs as the smallest node.
            device: ``auto``: GPUs if the cluster has any, else CPUs; ``cuda``: a GPU for each worker.
            attempts: how often a task is run at most if its worker is lost each time.
            folder: where nodes are to see the files of this machine; None: it does not matter whether they do.
            in_files: what of the study cannot be opened where they do not, for a warning.

        Raises:
            StudyError: ray is not installed, or there is no cluster.
            ProtocolError: fewer than one worker, no attempts, or a device that names a GPU of one machine.
        """
        check_workers(n_workers)
        check_attempts(attempts)
        if device.startswith("cuda:") and device != "cuda:0":
            raise ProtocolError(
                f"The device is {device!r}, a certain GPU of one machine, but Ray gives each worker a GPU of its own. "
                "Use 'cuda', or 'auto' for whatever there is."
            )
        self._ray = import_ray()
        self._address, self._n_workers, self._attempts = address, n_workers, attempts
        self._device = "cuda" if device == "cuda:0" else device
        self._folder, self._in_files = folder, in_files
        self._noted: set[str] = set()
        if not self._ray.is_initialized():
            check_reachable(address)

    def run(self, tasks: Sequence[Task], start: Start, answer: Answer = no_answer) -> Iterator[Event]:
        """Run tasks on the cluster; see `Executor.run`.

        Raises:
            StudyError: the cluster cannot be joined, or nodes have other versions of what numbers depend on.
        """
        check_names(tasks)
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(start, protocol=5, buffer_callback=buffers.append)
        return self._events(Queue(tasks, self._attempts), [data, *buffers], answer)

    def _events(self, waiting: Queue, start: list[Any], answer: Answer) -> Iterator[Event]:
        ray = self._ray
        if not waiting:
            return
        with connected(ray, self._address), token_in(self._folder) as token:
            nodes = nodes_of(ray)
            n_workers, share = shares(nodes, self._n_workers, self._device)
            inspection = Inspection(ray, token)
            yield from self._look(inspection, [node for node in nodes if _has_room(node, share)])
            # Arrays are put apart from the rest, so that the workers of a node share them as they lie in its store.
            shared = ray.put([start[0], *(np.frombuffer(buffer, np.uint8) for buffer in start[1:])])
            device = "cuda:0" if share.n_gpus else "cpu" if self._device == "auto" else self._device
            place = Place(device, max(1, share.n_cpus))
            run = _Run(ray, n_workers, share, waiting, answer, (search_path(), token and vars(token), shared, place))
            try:
                while run.is_going_on():
                    yield from run.begin_workers()
                    for said in run.collect():
                        yield from self._look(inspection, said) if isinstance(said, list) else [said]
            finally:
                run.end()

    def _look(self, inspection: Inspection, nodes: Sequence[Node]) -> list[Note]:
        """Make sure of the versions of nodes, and return what the user should know of them, once."""
        known = len(inspection.blind)
        notes = inspection.look_at(nodes)
        if blind := inspection.blind[known:]:
            models = f"{', '.join(self._in_files[:5])}{' and others' * (len(self._in_files) > 5)}"
            notes.append(
                f"{'warning' if self._in_files else 'note'}: these nodes do not see {self._folder}, so their file "
                f"system is another one: {', '.join(blind)}. "
                + (
                    f"Models that are files of this machine fail there: {models}. Put the study and its weights where "
                    "all nodes see them."
                    if self._in_files
                    else "No model of the study is a file of this machine, so nothing needs it."
                )
            )
        new = [text for text in notes if text not in self._noted]
        self._noted.update(new)
        return [Note(text) for text in new]


def _has_room(node: Node, share: Share) -> bool:
    return node.resources.get("CPU", 0) >= share.n_cpus and node.resources.get("GPU", 0) >= share.n_gpus


@dataclass(eq=False)
class _Worker:
    actor: Any
    pending: Any  # reference of what it says next; None if it is free
    node: str = ""  # Ray's name of its node; empty until it has started
    affinity: str | None = None  # of its last task
    task: Task | None = None  # what it works on


class _Run:
    """The tasks and workers of one run."""

    def __init__(self, ray: Any, n_workers: int, share: Share, waiting: Queue, answer: Answer, start: Any) -> None:
        self._ray, self._n_workers, self._share = ray, n_workers, share
        self._waiting, self._answer, self._start = waiting, answer, start
        self._workers: list[_Worker] = []
        self._actor = ray.remote(_actor_class()).options(
            num_cpus=share.n_cpus, num_gpus=share.n_gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )
        self._last_started = time.monotonic()

    def is_going_on(self) -> bool:
        return bool(self._waiting) or any(worker.task for worker in self._workers)

    def begin_workers(self) -> Iterator[Event]:
        """Give tasks that wait again to free workers, and ask for as many workers as there are tasks for.

        It is said if none starts.
        """
        for worker in self._workers:
            if worker.node and worker.task is None:
                yield from self._give_task(worker)
        n_at_work = sum(worker.task is not None for worker in self._workers)
        while len(self._workers) < min(self._n_workers, len(self._waiting) + n_at_work):
            actor = self._actor.remote()
            self._workers.append(_Worker(actor, actor.begin.remote(*self._start)))
        if any(worker.node for worker in self._workers):
            self._last_started = time.monotonic()
        elif time.monotonic() - self._last_started > _SAY_WAITING:
            self._last_started = float("inf")
            have = self._ray.available_resources()
            yield Note(
                f"No worker has started yet. Each takes {self._share.n_gpus} GPU and {self._share.n_cpus} CPU; free in "
                f"the whole cluster are {have.get('GPU', 0):g} and {have.get('CPU', 0):g}. Where that is too little, "
                "Ray waits for room, and the study goes on then."
            )

    def collect(self) -> Iterator[Event | list[Node]]:
        """Wait for words and losses, and say what happened, and on which nodes workers have started."""
        pending = {worker.pending: worker for worker in self._workers if worker.pending is not None}
        references = list(pending)
        self._ray.wait(references, num_returns=1, timeout=_LOOK_AGAIN)
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            worker = pending[reference]
            worker.pending = None
            try:
                said = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:  # nothing of a task's: it answers with its errors
                said = Error(error_text(error), "", is_last=True)
            except self._ray.exceptions.RayError as error:
                yield from self._bury(worker, cause_of(error))
                continue
            if isinstance(said, bytes):
                said = pickle.loads(said)  # noqa: S301 - written by our own actor
            if isinstance(said, str):
                yield [node for node in nodes_of(self._ray) if node.id == said]
                worker.node = said
                yield from self._give_task(worker)
            else:
                yield from self._heard(worker, said)

    def _heard(self, worker: _Worker, said: Said) -> Iterator[Event]:
        """Let a worker go on, and say what it said: it works while that is dealt with."""
        task = worker.task
        if task is None:  # it could not start, which fails the task that it would have got
            self._remove(worker)
            if self._waiting and isinstance(said, Error):
                unlucky = self._waiting.take(None, set())
                if self._waiting.put_back(unlucky, said.error.splitlines()[0]) is not None:
                    yield Failed(unlucky, said.error, said.details)
            return
        if isinstance(said, Asked):
            question = pickle.loads(said.content)  # noqa: S301 - written by our own actor
            worker.pending = worker.actor.step.remote(pickle.dumps(self._answer(task, question)))
            return
        event = event_of(task, said)
        if isinstance(said, Part):
            worker.pending = worker.actor.step.remote(None)
        else:
            worker.task = None
            if isinstance(said, Error) and said.is_last:
                self._remove(worker)
            else:
                yield from self._give_task(worker)
        yield event

    def _give_task(self, worker: _Worker) -> Iterator[Event]:
        while self._waiting:
            others = {other.affinity for other in self._workers if other is not worker}
            task = self._waiting.take(worker.affinity, others)
            try:
                data = pickle.dumps(task)
            except Exception as error:  # pickling runs the payload's own code
                yield Failed(task, error_text(error), traceback.format_exc())
                continue
            worker.task, worker.affinity = task, task.affinity
            worker.pending = worker.actor.do.remote(data)
            return

    def _bury(self, worker: _Worker, cause: str) -> Iterator[Event]:
        """Make room for another worker; the task of the lost one waits again, or has failed too often."""
        self._remove(worker)
        task = worker.task
        if task is None and self._waiting and cause != "its node was lost":  # as if it had had a task to start with
            task = self._waiting.take(None, set())
        died = None if task is None else self._waiting.put_back(task, cause)
        if task is not None and died is not None:
            yield Failed(task, f"Its worker on the Ray cluster {died}. {_ADVICE}", "")

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        with contextlib.suppress(Exception):  # it is lost, or the cluster is
            self._ray.kill(worker.actor)

    def end(self) -> None:
        for worker in list(self._workers):
            self._remove(worker)


def _actor_class() -> type:
    """Return the class of the actors, made here so that Ray sends its code: layercrit is found by what it is told."""

    class LayercritWorker:
        def begin(self, path: list[str], token: Any, start: list[Any], place: Any) -> Any:
            """Start; return the node's id, or what went wrong, pickled."""
            import importlib
            import sys
            from pathlib import Path

            sys.path.extend(entry for entry in path if entry not in sys.path and Path(entry).exists())
            served = importlib.import_module("layercrit.study.ray_actor").Served
            self.served = served(path[0], token)
            return self.served.begin(start, place)

        def do(self, task: bytes) -> Any:
            return self.served.do(task)

        def step(self, answer: bytes | None) -> Any:
            return self.served.step(answer)

    return LayercritWorker
