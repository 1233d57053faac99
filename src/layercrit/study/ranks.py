"""Which shard of a study a process has: as it was told, or as launchers tell the processes that they start.

Open MPI, other MPIs, torchrun and SLURM set variables of their own. Each is read as its launcher means it: SLURM's, for
one, mean a shard only within a step of ``srun``, since in a batch script one process is to do everything.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from layercrit.errors import StudyError, shown

__all__ = ["Shard", "cores_here", "counts", "gpus_of", "n_cores", "rank_of"]

_WAY_OUT = "Unset what is wrong, or say which shard this process has, as with --shard 3/16; --shard 1/1 is everything."
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?(?:\(S:[\d,-]+\))?")
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # SLURM's numbers from here on are no steps of srun, but shells and batch scripts


@dataclass(frozen=True)
class Shard:
    """The shard of a study that one of several processes has.

    Attributes:
        number: which one, from 0.
        of: how many shards there are.
        local_number: which one it is of those on its node, from 0.
        n_local: how many shards there are on its node.
        origin: where this was found, such as ``SLURM_PROCID``.
        start: what all processes that were started together share and no others, such as the number of a job and its
            step; None where the launcher does not tell.
    """

    number: int
    of: int
    local_number: int = 0
    n_local: int = 1
    origin: str = ""
    start: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read a shard as the command line has it, counted from 1: ``3/16``.

        Raises:
            StudyError: it is not written so, or there is no such shard.
        """
        found = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text, re.ASCII)
        if found is None:
            raise StudyError(
                f"The shard {shown(text)} is not understood; expected I/N, such as 3/16: the third of 16 shards."
            )
        number, of = int(found[1]), int(found[2])
        if not 1 <= number <= of:
            raise StudyError(
                f"There is no shard {number}/{of}: expected I/N with I from 1 to N"
                + (f", so from 1/{of} to {of}/{of}." if of else " and N at least 1.")
            )
        return cls(number - 1, of, origin="--shard")

    def __str__(self) -> str:
        """Return the shard as the command line has it, counted from 1."""
        return f"{self.number + 1}/{self.of}"

    def in_words(self) -> str:
        """Return the shard and where it was found, for a message."""
        return f"shard {self.number + 1} of {self.of}" + (f", from {self.origin}" if self.origin else "")


def rank_of(environment: Mapping[str, str]) -> Shard | None:
    """Return the shard that a launcher gave this process; None where there is no launcher, or only one process.

    The innermost launcher decides, such as mpirun in a job of SLURM. A job array is around all of them, so that each of
    its jobs gets as many shards as it has processes. A launcher that started one process does not count.

    Args:
        environment: that of the process.

    Raises:
        StudyError: variables are missing, no numbers or contradictory, or an array's indices have gaps.
    """
    of_array = _array(environment)
    incomplete = []
    for launcher in (_torchrun, _open_mpi, _pmi, _slurm_step):
        try:
            found = launcher(environment)
        except _IncompleteError as error:
            incomplete.append(error)
            continue
        if found is not None and found.of > 1:
            return _within(of_array, found)
    if incomplete and of_array is None:
        raise incomplete[0]
    return of_array


class _IncompleteError(StudyError):
    """A launcher's variables are half set, which does no harm where another launcher tells all."""


# --- launchers --------------------------------------------------------------------------------------------------------


def _torchrun(environment: Mapping[str, str]) -> Shard | None:
    run = environment.get("TORCHELASTIC_RUN_ID")
    start = f"torchrun {run}" if run and run != "none" else None  # which is what it says of a start on one machine
    return _read(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", start)


def _open_mpi(environment: Mapping[str, str]) -> Shard | None:
    space = environment.get("PMIX_NAMESPACE")
    world = "OMPI_COMM_WORLD_"
    local = f"{world}LOCAL_RANK", f"{world}LOCAL_SIZE"
    return _read(environment, f"{world}RANK", f"{world}SIZE", *local, f"mpirun {space}" if space else None)


def _pmi(environment: Mapping[str, str]) -> Shard | None:
    """Read the variables of MPICH, Intel MPI and others, and those of SLURM's own PMI."""
    size = _number(environment, "PMI_SIZE")
    if size is not None and size == _step_size(environment):
        return _slurm_step(environment)  # srun started this process, and says more
    job = environment.get("PMI_JOBID")
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    return _read(environment, *names, f"mpirun {job}" if job else None)


def _slurm_step(environment: Mapping[str, str]) -> Shard | None:
    """Read the variables of a step of srun; elsewhere in a job SLURM_PROCID is 0 and means nothing."""
    if _step_size(environment) is None:
        return None
    job, step = environment.get("SLURM_JOB_ID"), environment.get("SLURM_STEP_ID")
    found = _read(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None, f"srun {job}.{step}")
    per_node, node = environment.get("SLURM_STEP_TASKS_PER_NODE"), _number(environment, "SLURM_NODEID")
    if found is None or per_node is None or node is None:
        return found
    on_nodes = counts(per_node)
    if node >= len(on_nodes) or found.local_number >= on_nodes[node]:
        raise _contradiction(
            environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"
        )
    if len(environment.get("SLURM_GTIDS", "").split(",")) != on_nodes[node] and "SLURM_GTIDS" in environment:
        return None  # a batch script that a process of a step submitted, whose variables it inherited
    return replace(found, n_local=on_nodes[node])


def _step_size(environment: Mapping[str, str]) -> int | None:
    """Return of how many processes the step of srun is that this is one of; None if it is of none."""
    step = _number(environment, "SLURM_STEP_ID")
    if step is None or step >= _FIRST_SPECIAL_STEP:
        return None
    return _number(environment, "SLURM_STEP_NUM_TASKS")


def _array(environment: Mapping[str, str]) -> Shard | None:
    """Read the variables of SLURM's job arrays."""
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT", "STEP")]
    if names[0] not in environment:
        return None
    index, lowest, highest, of, step = (_number(environment, name) for name in names)
    if index is None or lowest is None or highest is None or of is None:
        raise _missing(environment, *(name for name in names[:4]))
    if of <= 1:
        return None
    step = step or 1
    number, rest = divmod(index - lowest, step)
    if rest or (highest - lowest) // step + 1 != of or not 0 <= number < of:
        raise StudyError(
            f"The indices of this job array have gaps or contradict each other ({_quoted(environment, *names)}), so "
            "that nobody can tell which shard each of its jobs has. Expected an array such as --array=0-15. Submit "
            "such a one, or say which shard each job has, as with --shard 3/16; --shard 1/1 is everything."
        )
    job = environment.get("SLURM_ARRAY_JOB_ID")
    return Shard(number, of, origin=names[0], start=f"array {job}" if job else None)


def _within(outer: Shard | None, inner: Shard) -> Shard:
    """Return the shard of a process whose launcher ran in one of the jobs of an array."""
    if outer is None:
        return inner
    start = f"{outer.start}, {inner.start}" if outer.start and inner.start else None
    if inner.origin == "SLURM_PROCID" and inner.start:  # each job has its own number, but their steps the same
        start = f"{outer.start}, srun {inner.start.rpartition('.')[2]}"
    return replace(
        inner,
        number=outer.number * inner.of + inner.number,
        of=outer.of * inner.of,
        origin=f"{outer.origin} and {inner.origin}",
        start=start,
    )


# --- variables --------------------------------------------------------------------------------------------------------


def _read(
    environment: Mapping[str, str],
    number: str,
    size: str,
    local_number: str | None,
    n_local: str | None,
    start: str | None,
) -> Shard | None:
    """Return the shard that variables of these names tell; None where a launcher set none of the first two."""
    if number not in environment and size not in environment:
        return None
    rank, of = _number(environment, number), _number(environment, size)
    if rank is None or of is None:
        raise _missing(environment, number, size)
    if rank >= of:
        raise _contradiction(environment, number, size)
    local = _number(environment, local_number) if local_number else None
    on_node = _number(environment, n_local) if n_local else None
    if local is not None and on_node is not None and local >= on_node:
        raise _contradiction(environment, str(local_number), str(n_local))
    return Shard(rank, of, local or 0, on_node or 1, number, start)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """Return the value of a variable, None where it is not set."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII):
        raise StudyError(f"{name} is {shown(text)}; expected a number from 0 on. {_WAY_OUT}")
    return int(text)


def _missing(environment: Mapping[str, str], *names: str) -> _IncompleteError:
    missing = [name for name in names if not environment.get(name, "").strip()]
    there = [name for name in names if name not in missing]
    return _IncompleteError(
        f"{_quoted(environment, *there)}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, "
        f"so that nobody can tell how a study is shared. {_WAY_OUT}"
    )


def _contradiction(environment: Mapping[str, str], *names: str) -> StudyError:
    return StudyError(f"These variables contradict each other: {_quoted(environment, *names)}. {_WAY_OUT}")


def _quoted(environment: Mapping[str, str], *names: str) -> str:
    return ", ".join(f"{name}={shown(environment[name])}" for name in names if name in environment)


def counts(text: str) -> list[int]:
    """Return the numbers of a list in SLURM's short form, one for each node: ``2(x3),1`` is 2, 2, 2, 1.

    Args:
        text: may name sockets, which do not matter here: ``8(S:0-1)`` is 8.

    Raises:
        StudyError: it is no such list.
    """
    found = [_COUNT.fullmatch(part.strip()) for part in re.split(r",(?![^(]*\))", text)]
    if not all(found) or not text.isascii():
        raise StudyError(f"{shown(text)} is not understood; expected numbers as SLURM writes them, such as 2(x3),1.")
    return [int(part[1]) for part in found if part for _ in range(int(part[2] or 1))]


# --- what a shard may use ---------------------------------------------------------------------------------------------


def n_cores(shard: Shard | None, n_own: int, n_node: int, per_task: int | None = None) -> int:
    """Return how many cores a process may use, at least 1.

    Args:
        shard: the process', None: it is alone.
        n_own: on how many cores the system lets it run.
        n_node: how many there are for all processes on its node. Where ``n_own`` are too many for each of them to have
            its own, they share them.
        per_task: how many SLURM was asked for, for each process.
    """
    n_local = 1 if shard is None else shard.n_local
    n_own = min(n_own, n_node)
    if per_task is not None:
        return max(1, min(per_task, n_own))
    return max(1, n_own if n_own * n_local <= n_node else n_own // n_local)


def cores_here(shard: Shard | None, environment: Mapping[str, str]) -> int:
    """Return how many cores this process may use; see `n_cores`.

    Raises:
        StudyError: a variable of SLURM is no number.
    """
    n_own = n_node = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        n_own = len(os.sched_getaffinity(0))
        with contextlib.suppress(OSError):  # the first process has all that a container was given
            n_node = len(os.sched_getaffinity(1))
    n_node = max(n_own, _number(environment, "SLURM_CPUS_ON_NODE") or n_node)
    per_task = _number(environment, "SLURM_CPUS_PER_TASK")
    if shard is None and per_task is not None:  # this process does what all tasks of a job would
        per_task *= _number(environment, "SLURM_NTASKS") or 1
    return n_cores(shard, n_own, n_node, per_task)


def gpus_of(shard: Shard | None, n_visible: int, environment: Mapping[str, str]) -> list[int]:
    """Return which of the GPUs that a process sees it is to use, by their numbers from 0.

    Processes that see the same ones take them in turn. Where there are more than processes, each gets several; where
    there are fewer, some processes share one.

    Args:
        shard: the process', None: it is alone.
        n_visible: how many GPUs it sees.
        environment: that of the process, where SLURM says whether each process has GPUs of its own.
    """
    if shard is None or "SLURM_GPUS_PER_TASK" in environment:
        return list(range(n_visible))
    return list(range(shard.local_number % max(1, n_visible), n_visible, shard.n_local))
