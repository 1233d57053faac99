"""Run the tasks of a study on processes of this machine."""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging.handlers import QueueHandler
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.process import current_process
from typing import Any, cast

from layercrit.errors import ProtocolError, StudyError
from layercrit.study.executors import (
    Answer,
    Asked,
    Done,
    Error,
    Event,
    Executor,
    Failed,
    Part,
    Place,
    Queue,
    Said,
    Start,
    Task,
    Work,
    check_attempts,
    check_names,
    check_workers,
    error_text,
    event_of,
    no_answer,
    steps,
)
from layercrit.study.ranks import Shard, cores_here, gpus_of

__all__ = ["LocalProcesses", "local_places"]

_LOG = logging.getLogger("layercrit")  # all that is logged below it
_PATIENCE = 3.0  # seconds a worker is given to end by itself before it is killed
_LOOK_AGAIN = 1.0  # seconds; a process that a worker forked holds the worker's sentinel and pipe open

_ADVICE = {
    "SIGKILL": "Most often the system ran out of memory: use fewer workers or a smaller batch size.",
    "SIGTERM": "Something outside ended it, such as a job scheduler or a time limit.",
    "SIGSEGV": "Native code crashed: try another device, or other versions of the driver and of torch.",
}
_OTHER_ADVICE = "Its last output is on stderr."
_GUARD = (
    "Workers are new interpreters that import the running script, so a script that starts workers must do so below "
    "`if __name__ == '__main__':`."
)


class LocalProcesses(Executor):
    """Processes on this machine, started when there is a task for them and ended with the run.

    A free worker takes the next task of its current affinity, else of one that no other worker has, else the first
    in the queue. A worker that dies is replaced, and its task is run again.

    Workers start as new interpreters, which import the running script: its code must be below
    ``if __name__ == "__main__":``. They ignore Ctrl-C, which ends the run in this process, and exit when this process
    does. What they log is logged here.
    """

    def __init__(self, places: Sequence[Place], *, attempts: int = 3) -> None:
        """Choose the workers.

        Args:
            places: one for each worker.
            attempts: how often a task is run at most if its worker dies each time.

        Raises:
            ProtocolError: there are no places, or no attempts.
            StudyError: a worker is importing the script that began it, and the script is about to begin workers anew.
        """
        if getattr(current_process(), "_inheriting", False):  # what multiprocessing itself looks at
            raise StudyError(f"This process is a worker, and is not to begin others. {_GUARD}")
        if not places:
            raise ProtocolError(
                "There are no places for workers: expected at least one, such as `local_places` returns."
            )
        check_attempts(attempts)
        self._places = list(places)
        self._attempts = attempts

    def run(self, tasks: Sequence[Task], start: Start, answer: Answer = no_answer) -> Iterator[Event]:
        """Run tasks on the processes; see `Executor.run`.

        Raises:
            StudyError: the first worker raised when it imported the running script.
        """
        check_names(tasks)
        return _Run(self._places, tasks, pickle.dumps(start), answer, self._attempts).events()


def local_places(n_workers: int | None, device: str, n_gpus: int, shard: Shard | None = None) -> list[Place]:
    """Divide this machine, or what a shard has of it, among workers.

    Args:
        n_workers: how many; None: one for each GPU with the devices ``auto`` and ``cuda``, else one.
        device: ``auto``: the GPUs if there are any, else the CPU. Workers on ``auto`` or ``cuda`` take the GPUs in
            turn; any other device is used by all workers.
        n_gpus: how many GPUs there are, as ``torch.cuda.device_count()`` says.
        shard: which shard of the study this process runs; those on one machine divide its GPUs and cores.

    Returns:
        A place for each worker. The cores this process may use are divided among them, at least one each.

    Raises:
        ProtocolError: fewer than one worker, or ``cuda`` without a GPU.
    """
    check_workers(n_workers)
    if device == "cuda" and n_gpus == 0:
        raise ProtocolError(
            "The device is 'cuda', but torch sees no GPU here. Use 'cpu', or 'auto' for whatever there is."
        )
    gpus = [f"cuda:{number}" for number in gpus_of(shard, n_gpus, os.environ)] if device in ("auto", "cuda") else []
    devices = gpus or ["cpu" if device == "auto" else device]
    n_workers = n_workers or len(devices)
    n_threads = max(1, cores_here(shard, os.environ) // n_workers)
    return [Place(devices[number % len(devices)], n_threads) for number in range(n_workers)]


@dataclass
class _Worker:
    place: Place
    process: SpawnProcess
    connection: "Connection[bytes, bytes]"
    affinity: str | None = None  # of its last task
    task: Task | None = None  # what it works on

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # it is dead, which shows when it is next asked
            self.connection.send_bytes(data)

    def receive(self) -> "_Begun | Said | logging.LogRecord | None":
        """Return what it says or logs next, None if that will be nothing more."""
        try:
            data = self.connection.recv_bytes()
        except (EOFError, OSError):  # closed before a word, or within one
            return None
        said: _Begun | Said | logging.LogRecord = pickle.loads(data)  # noqa: S301 - written by our own process
        return said


class _Run:
    """The tasks and workers of one run."""

    def __init__(
        self, places: Sequence[Place], tasks: Sequence[Task], start: bytes, answer: Answer, attempts: int
    ) -> None:
        self._free_places = list(reversed(places))
        self._waiting = Queue(tasks, attempts)
        self._start = start
        self._answer = answer
        self._workers: list[_Worker] = []
        self._one_has_begun = False

    def events(self) -> Iterator[Event]:
        try:
            while self._waiting or any(worker.task for worker in self._workers):
                yield from self._hand_out()
                yield from self._collect()
        finally:
            _end(self._workers)

    def _hand_out(self) -> Iterator[Failed]:
        """Give a task to every free worker, and begin workers while there are tasks and places."""
        while self._waiting:
            worker = next((worker for worker in self._workers if worker.task is None), None)
            if worker is None and not self._free_places:
                return
            yield from self._give_task(worker or self._begin_worker(self._free_places.pop()))

    def _begin_worker(self, place: Place) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # A daemon, so that leaving Python while an iterator is still open ends the workers instead of waiting for them.
        process = context.Process(target=_serve, args=(theirs, place, _LOG.getEffectiveLevel()), daemon=True)
        worker = _Worker(place, process, ours)
        with theirs, _interrupts_held():
            process.start()
            self._workers.append(worker)
        worker.send(self._start)
        return worker

    def _give_task(self, worker: _Worker) -> Iterator[Failed]:
        others = {other.affinity for other in self._workers if other is not worker}
        task = self._waiting.take(worker.affinity, others)
        try:
            data = pickle.dumps(task)
        except Exception as error:  # pickling runs the payload's own code
            yield Failed(task, error_text(error), traceback.format_exc())
            return
        worker.task, worker.affinity = task, task.affinity
        worker.send(data)

    def _collect(self) -> Iterator[Event]:
        """Wait for words and deaths, and say what happened."""
        connections = [worker.connection for worker in self._workers]
        deaths = [worker.process.sentinel for worker in self._workers]
        wait([*connections, *deaths], _LOOK_AGAIN)
        for worker in list(self._workers):
            is_dead = not worker.process.is_alive()  # asked first: what a dead worker sent is then read to its end
            while wait([worker.connection], 0):
                said = worker.receive()
                if said is None:
                    is_dead = True
                    break
                if isinstance(said, logging.LogRecord):
                    logging.getLogger(said.name).handle(said)
                    continue
                if isinstance(said, _Begun):
                    self._one_has_begun = True
                elif isinstance(said, Asked):
                    self._tell(worker, said)
                else:
                    yield self._event(worker, said)
                is_dead = is_dead or (isinstance(said, Error) and said.is_last)
                if not is_dead:
                    break  # so that a worker of many words does not keep the others waiting
            if is_dead:
                yield from self._bury(worker)

    def _tell(self, worker: _Worker, asked: Asked) -> None:
        assert worker.task is not None  # noqa: S101 - a worker speaks of a task only
        question = pickle.loads(asked.content)  # noqa: S301 - written by our own process
        worker.send(pickle.dumps(self._answer(worker.task, question)))

    def _event(self, worker: _Worker, said: Part | Done | Error) -> Event:
        task = worker.task
        assert task is not None  # noqa: S101 - a worker speaks of a task only
        if not isinstance(said, Part):
            worker.task = None
        return event_of(task, said)

    def _bury(self, worker: _Worker) -> Iterator[Failed]:
        """Make room for another worker; the task of the dead one waits again, or has failed too often."""
        self._workers.remove(worker)
        self._free_places.append(worker.place)
        task = worker.task
        worker.task = None
        exit_code = _end([worker])[0]
        if exit_code > 0 and not self._one_has_begun:  # it raised when it imported the script, and so would all others
            raise StudyError(f"A worker ended with exit code {exit_code} before it began. {_OTHER_ADVICE} {_GUARD}")
        if task is None:
            return
        cause = _cause(exit_code)
        died = self._waiting.put_back(task, cause)
        if died is not None:
            advice = _ADVICE.get(cause, _OTHER_ADVICE)
            yield Failed(task, f"Its worker process on {worker.place.device} {died}. {advice}", "")


def _end(workers: Sequence[_Worker]) -> list[int]:
    """End workers, those at work at once, and return their exit codes."""
    for worker in workers:
        if worker.task is not None:
            worker.process.terminate()
        worker.connection.close()  # which tells a free worker to end
    deadline = time.monotonic() + _PATIENCE
    exit_codes = []
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        worker.process.kill()  # nothing, if it has ended
        worker.process.join()
        exit_codes.append(worker.process.exitcode or 0)
        worker.process.close()
    return exit_codes


def _cause(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:  # a real-time signal has no name
        return f"signal {-exit_code}"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C, also in processes begun meanwhile: they are to ignore it, and cannot yet."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # beginning it, as the first process would, lets Ctrl-C through again
    held: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    # Threads of numerical libraries do not block the signal, so one of them takes it and Python would raise here.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number)) if main else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if held:
            signal.raise_signal(signal.SIGINT)


class _Begun:
    """The first word of a worker: it has imported the running script."""


class _Speech:
    """What a worker sends: what it says and, from whichever thread, what it logs."""

    def __init__(self, connection: "Connection[bytes, bytes]") -> None:
        self._connection, self._lock = connection, threading.Lock()

    def put_nowait(self, said: _Begun | Said | logging.LogRecord) -> None:
        """Send it; the name is that which logging's handler calls."""
        data = pickle.dumps(said)
        with self._lock:
            self._connection.send_bytes(data)


def _serve(connection: "Connection[bytes, bytes]", place: Place, level: int) -> None:
    """Be a worker that logs from a level on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(ImportError):  # torch's use of tqdm would make a semaphore, which a killed worker leaves
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())
    with contextlib.suppress(EOFError, ConnectionError):  # no more tasks, or nobody left to answer
        speech = _Speech(connection)
        speech.put_nowait(_Begun())
        _LOG.handlers, _LOG.propagate = [QueueHandler(cast(Any, speech))], False  # which needs no more of a queue
        _LOG.setLevel(level)
        _serve_tasks(connection, speech, place)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - a worker is always begun by another process
    parent.join()
    os._exit(1)


def _serve_tasks(connection: "Connection[bytes, bytes]", speech: _Speech, place: Place) -> None:
    start = connection.recv_bytes()
    try:
        work: Work = pickle.loads(start)(place)  # noqa: S301 - written by our own process
    except Exception as error:
        speech.put_nowait(Error(error_text(error), traceback.format_exc(), is_last=True))
        return
    while True:
        doing = steps(work, connection.recv_bytes())
        said: Said | None = next(doing)
        while said is not None:
            speech.put_nowait(said)
            answer = connection.recv_bytes() if isinstance(said, Asked) else None
            said = None if isinstance(said, Done | Error) else doing.send(answer)
