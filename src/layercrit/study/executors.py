"""Run the tasks of a study on workers: the interface of executors, and what all of them do alike.

A worker is told once how to start and then runs one task after the other, sending messages as parts of a task are
finished, and asking for what only the process that runs the study knows. Every task ends in exactly one `Finished` or
`Failed`: an exception fails only its own task, and so do repeated deaths of its worker.
"""

import bisect
import contextlib
import pickle
import traceback
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from layercrit.errors import ProtocolError, StudyError
from layercrit.registry import Registry, plug_in_that_raised

if TYPE_CHECKING:
    from layercrit.study.file import StudyFile

__all__ = [
    "EXECUTORS",
    "Answer",
    "Asked",
    "Done",
    "Error",
    "Event",
    "Executor",
    "Failed",
    "Finished",
    "Message",
    "Note",
    "Part",
    "Place",
    "Question",
    "Queue",
    "Said",
    "Start",
    "Task",
    "TaskEvent",
    "Work",
    "check_attempts",
    "check_names",
    "check_workers",
    "error_text",
    "event_of",
    "executor",
    "executor_on",
    "no_answer",
    "steps",
]


@dataclass(frozen=True)
class Place:
    """Where a worker computes.

    Attributes:
        device: ``cpu``, ``cuda:0`` or any other name that torch knows.
        n_threads: how many processor cores it may use.
    """

    device: str
    n_threads: int


@dataclass(frozen=True)
class Task:
    """A unit of work for one worker.

    Attributes:
        name: unique in its run.
        affinity: tasks of the same affinity share what a worker has open, such as a model, so a worker stays with one
            affinity as long as it has tasks left.
        payload: what the work needs; picklable and small, since large data belongs in files.
    """

    name: str
    affinity: str
    payload: Any


@dataclass(frozen=True)
class Question:
    """What a worker asks: no message, but the value of its ``yield`` is the answer.

    Attributes:
        content: picklable.
    """

    content: Any


Work: TypeAlias = Callable[[Task], Generator[Any, Any, None]]
"""Does a task; yields picklable messages as parts are finished, and a `Question` where it needs an answer."""

Start: TypeAlias = Callable[[Place], Work]
"""Called once in each worker. Picklable: a function of a module, or a `functools.partial` of one."""

Answer: TypeAlias = Callable[[Task, Any], Any]
"""Answers the question that a task asks, in the process that runs the study; picklable."""


@dataclass(frozen=True)
class Message:
    """A part of a task is finished. A task that is run again because its worker died repeats its messages."""

    task: Task
    content: Any


@dataclass(frozen=True)
class Finished:
    """A task is finished."""

    task: Task


@dataclass(frozen=True)
class Failed:
    """A task failed.

    Attributes:
        task: the task.
        error: what went wrong, for readers: ``Type: text`` of an exception, or how the worker died.
        details: the traceback; empty where the worker died.
    """

    task: Task
    error: str
    details: str


@dataclass(frozen=True)
class Note:
    """What the user should know about the workers; it belongs to no task."""

    text: str


TaskEvent: TypeAlias = Message | Finished | Failed
"""What happens to a task."""

Event: TypeAlias = TaskEvent | Note


def no_answer(task: Task, content: Any) -> Any:
    """Be the `Answer` of tasks that ask nothing."""
    raise ProtocolError(f"{task.name} asks {content!r}, and nobody answers: give run(..., answer=).")


class Executor(ABC):
    """Runs tasks on workers.

    Attributes:
        is_remote: whether workers may be on machines that do not see the files of this one.
    """

    is_remote: ClassVar[bool] = False

    @abstractmethod
    def run(self, tasks: Sequence[Task], start: Start, answer: Answer = no_answer) -> Iterator[Event]:
        """Run tasks and yield what happens.

        Every task ends in exactly one `Finished` or `Failed`, and its messages come before it, in their order. A
        failed task does not stop the others. Closing the iterator ends the workers.

        Args:
            tasks: in the order in which those of one affinity are begun.
            start: prepares a worker.
            answer: answers what tasks ask, in this process. What it raises ends the run.

        Raises:
            ProtocolError: two tasks have the same name, or one asks and nobody answers.
        """


Maker: TypeAlias = "Callable[[str, StudyFile, Path, int | None], Executor]"
_Maker = TypeVar("_Maker", bound=Maker)

EXECUTORS = Registry[Maker]("executor", StudyError, "layercrit.executors")
"""All executors by name, filled by `executor` and by installed plug-ins."""


def executor(name: str) -> Callable[[_Maker], _Maker]:
    """Register what makes an executor, for ``layercrit study run --on NAME``: a function, or a class of `Executor`.

    It is called with what follows ``NAME:`` in ``--on`` (often an address, else an empty text), the study file, the
    study's folder, and the number of workers asked for, or None.

    Raises:
        StudyError: the name is taken or not valid.

    Examples:
        >>> import layercrit
        >>> from layercrit.study.local_processes import LocalProcesses, local_places
        >>> @layercrit.executor("two-processes")
        ... def two_processes(rest, study, folder, n_workers):
        ...     '''Two processes of this machine, without its GPUs.'''
        ...     return LocalProcesses(local_places(2, "cpu", n_gpus=0))
    """

    def register(maker: _Maker) -> _Maker:
        EXECUTORS[name] = maker
        return maker

    return register


def executor_on(where: str, study: "StudyFile", folder: Path, n_workers: int | None) -> Executor:
    """Return the executor that ``--on NAME`` or ``--on NAME:REST`` names.

    Raises:
        StudyError: no executor has this name, or it cannot be used.
    """
    name, _, rest = where.partition(":")
    made = EXECUTORS.find(name)(rest, study, folder, n_workers)
    if not isinstance(made, Executor):
        raise StudyError(f"The {EXECUTORS.in_words(name)} made {type(made).__name__}; expected an Executor.")
    return made


def check_names(tasks: Sequence[Task]) -> None:
    """Make sure that the names of tasks are unique.

    Raises:
        ProtocolError: two tasks have the same name.
    """
    repeated = [name for name, n in Counter(task.name for task in tasks).items() if n > 1]
    if repeated:
        raise ProtocolError(f"Two tasks are named {repeated[0]!r}; expected unique names.")


def check_attempts(attempts: int) -> None:
    """Make sure that a task may be run at all.

    Raises:
        ProtocolError: there are no attempts.
    """
    if attempts < 1:
        raise ProtocolError(f"The number of attempts is {attempts}; expected 1 or more.")


def check_workers(n_workers: int | None) -> None:
    """Make sure that there are workers, where their number is given.

    Raises:
        ProtocolError: the number is not a whole one of at least 1.
    """
    if n_workers is not None and (not isinstance(n_workers, int) or n_workers < 1):
        raise ProtocolError(f"The number of workers is {n_workers!r}; expected a whole number of at least 1.")


class Queue:
    """The tasks that wait for a worker, in their order, and how the workers died that had them before."""

    def __init__(self, tasks: Sequence[Task], attempts: int) -> None:
        self._waiting = list(tasks)
        self._position = {task.name: position for position, task in enumerate(tasks)}
        self._attempts = attempts
        self._deaths: defaultdict[str, list[str]] = defaultdict(list)  # name of a task -> how its workers died

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, affinity: str | None, others: set[str | None]) -> Task:
        """Return the task for a worker that was last on an affinity, while other workers are on others.

        It is the next task of its affinity, else of one that no other worker has, else the first.
        """
        of_its_own = (task for task in self._waiting if task.affinity == affinity)
        of_nobody = (task for task in self._waiting if task.affinity not in others)
        task = next(chain(of_its_own, of_nobody, self._waiting))
        self._waiting.remove(task)
        return task

    def put_back(self, task: Task, death: str) -> str | None:
        """Let a task wait again whose worker died, or say how its workers died if that were one attempt too many."""
        deaths = self._deaths[task.name]
        deaths.append(death)
        if len(deaths) < self._attempts:
            bisect.insort(self._waiting, task, key=lambda waiting: self._position[waiting.name])
            return None
        times = "once" if len(deaths) == 1 else f"{len(deaths)} times"
        return f"died {times} ({', '.join(deaths)})"


# What a worker says. Contents are pickled plainly, not by what carries them: `Connection.send` would send a tensor as a
# reference to shared memory, which is gone when the worker is.
@dataclass(frozen=True)
class Part:
    """A worker sends a message, pickled."""

    content: bytes


@dataclass(frozen=True)
class Asked:
    """A worker asks a question, pickled."""

    content: bytes


@dataclass(frozen=True)
class Done:
    """A worker finished its task."""


@dataclass(frozen=True)
class Error:
    """A worker's task failed, or the worker could not start."""

    error: str
    details: str
    is_last: bool = False  # it could not start, and ends


Said: TypeAlias = Part | Asked | Done | Error


def steps(
    work: Work, task: bytes, explain: "Callable[[Exception], str] | None" = None
) -> Generator[Said, bytes | None, None]:
    """Do a pickled task, in a worker: yield what it says; what `Asked` yields is the pickled answer.

    Args:
        work: what `Start` returned.
        task: the task.
        explain: text of what a task raises; None: `error_text`.
    """
    end: Done | Error = Done()
    try:
        said = work(pickle.loads(task))  # noqa: S301 - written by our own process
        answer = None
        with contextlib.suppress(StopIteration):
            while True:
                content = said.send(answer)
                answer = None
                if isinstance(content, Question):
                    reply = yield Asked(pickle.dumps(content.content))
                    answer = pickle.loads(reply or b"")  # noqa: S301 - written by our own process
                else:
                    yield Part(pickle.dumps(content))
    except Exception as error:
        end = Error((explain or error_text)(error), traceback.format_exc())
    yield end


def event_of(task: Task, said: Part | Done | Error) -> TaskEvent:
    """Return what it means that the worker of a task says something."""
    if isinstance(said, Part):
        return Message(task, pickle.loads(said.content))  # noqa: S301 - written by our own process
    return Finished(task) if isinstance(said, Done) else Failed(task, said.error, said.details)


def error_text(error: Exception) -> str:
    """Return type and text of an error, and the plug-in that raised it, if one did."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    plug_in = plug_in_that_raised(error)
    return text if plug_in is None else f"{text} (raised by the plug-in {plug_in})"
