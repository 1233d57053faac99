"""How the jobs of a study are: what SLURM says of them, and what they wrote into the study's folder themselves."""

import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercrit.study.slurm_job import JOBS, LOGS, read_record, record_file

__all__ = ["SUBMISSION", "JobState", "job_states"]

SUBMISSION = "submission.json"  # in the folder JOBS
_PATIENCE = 20  # seconds for an answer; a busy SLURM takes some
_SEPARATOR = "|"
_ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
          "REVOKED", "TIMEOUT")  # fmt: skip
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_ADVICE = {
    "TIMEOUT": "its time limit ended it; submit again to go on, with more --time if nothing was measured",
    "OUT_OF_MEMORY": "ask for more with --memory, and submit again",
    "CANCELLED": "submit again to go on",
    "NODE_FAIL": "submit again to go on",
}


@dataclass(frozen=True)
class JobState:
    """How the job of one shard of a study is.

    Attributes:
        shard: which one, such as ``3/16``.
        job: its number at SLURM.
        state: ``running``, ``waiting``, ``finished``, ``failed``, ``stopped`` (to be submitted again), ``refused`` (by
            the node), ``gave up`` (no job of it got ahead), ``ended`` (nobody but SLURM knows how) or ``unknown``.
        node: where it runs or ran last; empty if nowhere.
        said: what there is to say about that, such as why it waits; may be empty.
        log: the file with what it printed.
    """

    shard: str
    job: str
    state: str
    node: str
    said: str
    log: Path

    @property
    def is_alive(self) -> bool:
        """Whether it runs, or will."""
        return self.state in ("running", "waiting")


def job_states(folder: str | Path) -> tuple[JobState, ...]:
    """Return how the jobs are that were submitted last for the study in a folder, one for each shard.

    Nothing where none were submitted. Where SLURM does not answer, what the jobs wrote themselves is all that is known,
    and ``said`` says so.
    """
    folder = Path(folder).expanduser().absolute()
    submission = read_record(folder / JOBS / SUBMISSION)
    if "job" not in submission:
        return ()
    shards = [f"{number}/{submission['n_jobs']}" for number in range(1, submission["n_jobs"] + 1)]
    told = [read_record(record_file(folder, shard)) for shard in shards]
    told = [one if one.get("token") == submission["token"] else {} for one in told]
    jobs = [
        one.get("job") or (f"{submission['job']}_{number}" if len(shards) > 1 else str(submission["job"]))
        for number, one in enumerate(told)
    ]
    found, problem = _ask(sorted({job.partition("_")[0] for job in jobs}))
    return tuple(
        _state(folder, shard, job, one, found.get(job) or found.get(job.partition("_")[0]), problem)
        for shard, job, one in zip(shards, jobs, told, strict=True)
    )


def _state(
    folder: Path, shard: str, job: str, told: Mapping[str, Any], found: Sequence[str] | None, problem: str
) -> JobState:
    """Bring together what a shard told and what SLURM says of its job: state, reason, node, time left."""
    log = folder / LOGS / f"{job}_0_log.out"
    name, reason, node, left = found or ("", "", "", "")
    node = node or told.get("node", "")
    own = told.get("state", "")
    if name in _WAITING:
        return JobState(shard, job, "waiting", "", reason.replace("None", ""), log)
    if name and name not in _ENDED:
        return JobState(shard, job, "running", node, f"{left} left", log)
    if own in ("finished", "failed", "refused", "gave up", "stopped"):
        return JobState(shard, job, own, node, told.get("said", ""), log)
    if problem:
        return JobState(shard, job, "unknown", node, f"{problem}; last heard of: {own or 'nothing'}", log)
    if not name:
        return JobState(shard, job, "unknown", node, f"SLURM does not know it any more; last heard of: {own}", log)
    how = f"{name}, {reason}" if reason not in ("", "None") else name
    advice = _unseen(folder, node) if not told and name != "CANCELLED" else _ADVICE.get(name, "see the log")
    return JobState(shard, job, "ended", node, f"{how}: {advice}", log)


def _unseen(folder: Path, node: str) -> str:
    return (
        f"it has written nothing into {folder}, so the folder may not be shared with the node {node or 'it ran on'}. "
        "Submit with --out on a shared file system"
    )


def _ask(jobs: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], str]:
    """Return what SLURM says of jobs and all in their arrays, and what is wrong where it says nothing."""
    if shutil.which("squeue") is None:
        return {}, "there is no SLURM here (no squeue)"
    listed = ",".join(jobs)
    done = _run(["squeue", "--noheader", "--array", "--states=all", f"--jobs={listed}", "--format=%i|%T|%r|%N|%L"])
    if isinstance(done, str):
        return {}, done
    found = dict(_rows(done.stdout.splitlines()))
    if done.returncode != 0 and "Invalid job id" not in done.stderr:  # as it calls jobs that ended long ago
        return {}, f"SLURM does not answer ({_last_line(done.stderr)})"
    past = _run(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={listed}",
                 "--format=JobID,State,ExitCode,NodeList,Elapsed"])  # fmt: skip
    if not isinstance(past, str) and past.returncode == 0:  # else no accounts are kept, or they do not answer
        of_past = {
            job: (state.partition(" ")[0], "", node, "") for job, (state, _, node, _) in _rows(past.stdout.splitlines())
        }
        found = of_past | found
    return found, ""


def _rows(lines: Iterable[str]) -> Iterable[tuple[str, tuple[str, ...]]]:
    for line in lines:
        job, *values = line.strip().split(_SEPARATOR)
        if len(values) == 4:
            yield job.partition("_[")[0], tuple(values)  # those of an array that never began are one


def _run(command: list[str]) -> "subprocess.CompletedProcess[str] | str":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return f"SLURM does not answer ({command[0]} took more than {_PATIENCE} s)"
    except OSError as error:
        return f"SLURM does not answer ({error})"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no reason given"
