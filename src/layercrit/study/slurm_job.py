"""What a job of SLURM does: it runs its shard of a study, and is succeeded by another job where time runs out.

submitit calls a `ShardJob` in each job, and hands it the signal that SLURM sends before the time limit. All that it
wants to tell, to its successor or to ``study status``, it writes into a file of its own in the folder of the study.
"""

import contextlib
import json
import os
import platform
import shlex
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercrit.errors import TRY_AGAIN, StudyError
from layercrit.foreign_files import read_json
from layercrit.locks import write_whole
from layercrit.study.shards import shard_folder
from layercrit.study.store import FILE

if TYPE_CHECKING:
    from submitit import SlurmExecutor
    from submitit.helpers import DelayedSubmission

__all__ = ["JOBS", "LOGS", "Resources", "ShardJob", "executor", "read_record", "record_file", "versions_here"]

JOBS = "jobs"  # folder in that of the study: what was submitted, and what each shard tells
LOGS = "logs"
_OVER = ("failed", "refused", "gave up", "stopped")
_WAITS = 100  # jobs in a row that ended since other shards had not run their share of the pilot
_IDLE = 2  # jobs in a row that time ended with nothing new
_PATIENCE = 45.0  # seconds for a run to end by itself once it is told to
_MOMENT = 0.2  # seconds
# of a job, which would confuse another one that is submitted from it; SLURM_CONF says where SLURM is
_OF_JOBS = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_")
_PLACE_OF_SLURM = "SLURM_CONF"


@dataclass(frozen=True)
class Resources:
    """What each job asks SLURM for.

    Attributes:
        minutes: the time limit; 0: none.
        gpus: how many GPUs.
        cpus: how many cores; None: what the cluster gives, usually one.
        memory: as SLURM writes it, such as ``16G``; None: what the cluster gives.
        partition: None: the cluster's default.
        account: None: the user's default.
    """

    minutes: int
    gpus: int = 0
    cpus: int | None = None
    memory: str | None = None
    partition: str | None = None
    account: str | None = None

    @property
    def notice(self) -> int:
        """How many seconds before the time limit a job is told to end; SLURM may be a minute earlier than that."""
        return 90 if self.minutes == 0 else max(15, min(90, 6 * self.minutes))

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of submitit's executor."""
        others = {"requeue": True, "ntasks": 1, "chdir": str(Path.cwd())} | (
            {"mem": self.memory} if self.memory else {}
        )
        return {
            "time": self.minutes,
            "nodes": 1,
            "gres": f"gpu:{self.gpus}" if self.gpus else None,  # which SLURM knows with every plug-in for resources
            "cpus_per_task": self.cpus,
            "srun_args": [f"--cpus-per-task={self.cpus}"] if self.cpus else None,  # which steps do not take over
            "partition": self.partition,
            "account": self.account,
            "signal_delay_s": self.notice,
            "stderr_to_stdout": True,
            "wckey": None,  # else one of submitit's, which clusters that check them refuse
            "additional_parameters": others,
        }


def executor(folder: Path, resources: Resources, **parameters: Any) -> "SlurmExecutor":
    """Return what submits jobs with these resources, and logs in the study's folder.

    Raises:
        RuntimeError: SLURM's programs are not here.
    """
    from submitit import SlurmExecutor

    found = SlurmExecutor(folder / LOGS, max_num_timeout=1_000_000)  # what ends them is counted here
    found.update_parameters(**resources.parameters(), **parameters)
    return found


@dataclass
class ShardJob:
    """One shard of a study, as a function that submitit runs in a job.

    Attributes:
        command: what runs it; run again, it goes on where it was stopped.
        folder: of the study.
        name: which shard it is, such as ``3/16``.
        token: of the submission, in a file on the machine that submitted.
        versions: of packages there.
        resources: for a successor.
        directory: where it is run.
        parameters: further ones of the executor, for a successor.
    """

    command: Sequence[str]
    folder: Path
    name: str
    token: str
    versions: Mapping[str, str]
    resources: Resources
    directory: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)
    _run: "subprocess.Popen[bytes] | None" = field(default=None, init=False, repr=False, compare=False)

    def __call__(self) -> str:
        """Run the shard to its end, and return what came of it, in words.

        Raises:
            StudyError: it cannot run here, ended in failures, or was ended from outside.
        """
        self._tell("running", node=platform.node(), started=_now())
        self._check_versions()
        try:
            code = self._wait()
        except (OSError, subprocess.SubprocessError) as error:
            if self._run is None:
                raise self._end("failed", f"it cannot be started: {error}") from error
            return self._hand_over(f"its time is over, and SLURM did not requeue it ({error})")
        if code == 0:
            self._tell("finished")
            return "finished"
        if code == TRY_AGAIN:  # other shards are to run before, whose jobs may be waiting for the place of this one
            return self._wait_in_line()
        if code < 0 or code > 128:
            name = signal.Signals(-code if code < 0 else code - 128).name
            raise self._end("stopped", f"ended from outside by {name}; `layercrit study submit` goes on")
        raise self._end("failed", f"`layercrit study run` ended with exit code {code}; its words are in the log")

    def checkpoint(self) -> "DelayedSubmission | None":
        """Stop before the time limit; submitit calls this, and requeues the job with what is returned.

        Returns:
            None where the shard is not to go on, since it does not get ahead.
        """
        from submitit.helpers import DelayedSubmission

        code = self._stop()
        if code in (0, 1):  # it was at its end
            self._tell("failed" if code else "finished")
            return None
        kept, before = self._kept(), self._told()
        idle = before["idle"] + (not self._waits_for_pilots()) if kept == before["kept"] else 0
        if idle >= _IDLE:
            self._tell(
                "gave up",
                f"{_IDLE} jobs in a row reached their time limit without anything new measured. See the log, raise "
                "--time, and submit again",
            )
            return None
        self._tell("goes on", kept=kept, idle=idle)
        return DelayedSubmission(replace(self))

    def _wait_in_line(self) -> str:
        """Submit another job in place of this one, unless the shards that it waits for will not be run."""
        over = {
            told["shard"]: told["state"]
            for path in sorted((self.folder / JOBS).glob("shard-*.json"))
            if (told := read_record(path)).get("token") == self.token and told.get("state") in _OVER
        }
        n_waits = int(self._told().get("waits", 0)) + 1
        if over or n_waits > _WAITS:
            words = ", ".join(f"shard {shard} {state}" for shard, state in over.items()) or f"{_WAITS} jobs waited"
            raise self._end("stopped", f"it waits for the pilot of other shards, but {words}; submit again")
        self._tell("goes on", waits=n_waits)
        return self._hand_over("it waits for the pilot of other shards")

    def _wait(self) -> int:
        def ignore() -> None:  # the signal is sent to all processes of a job, and this one is told in another way
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)

        print(f"$ {shlex.join(self.command)}", flush=True)
        self._run = subprocess.Popen(self.command, cwd=self.directory, preexec_fn=ignore)
        code = None
        while code is None:
            code = self._exit_code(_MOMENT)
        return code

    def _stop(self) -> int | None:
        """Let the run end, and return its exit code; None if it never ran."""
        if self._run is None:
            return None
        os.kill(self._run.pid, signal.SIGTERM)
        code = self._exit_code(_PATIENCE)
        if code is None:
            os.kill(self._run.pid, signal.SIGKILL)
        return self._exit_code(_PATIENCE)

    def _exit_code(self, seconds: float) -> int | None:
        """Return the exit code of the run, negative where a signal killed it; None if it runs on for so long.

        It is not reaped, and `Popen.wait` not used: that holds a lock while a signal's handler asks here as well.
        """
        assert self._run is not None  # noqa: S101 - it was started
        deadline = time.monotonic() + seconds
        while (found := os.waitid(os.P_PID, self._run.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)) is None:
            if time.monotonic() > deadline:
                return None
            time.sleep(_MOMENT)
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def _hand_over(self, why: str) -> str:
        """Submit another job in place of this one, and return that in words."""
        try:
            with _outside_of_jobs():
                job = executor(self.folder, self.resources, **self.parameters).submit(replace(self)).job_id
        except Exception as error:  # of submitit, or of SLURM by way of it
            raise self._end(
                "stopped",
                f"{why}, and SLURM takes no other job in its place ({error}); `layercrit study submit` goes on",
            ) from error
        self._tell("goes on", job=job)
        return f"goes on as job {job}"

    def _check_versions(self) -> None:
        here = versions_here()
        others = [
            f"{name} {self.versions.get(name, 'none')} there and {here.get(name, 'none')} here"
            for name in sorted({*here, *self.versions})
            if here.get(name) != self.versions.get(name)
        ]
        if others:
            raise self._end(
                "refused",
                f"the machine that submitted and the node {platform.node()} have other versions: {', '.join(others)}. "
                "Use one environment on a shared file system, or install the same versions",
            )

    # --- what it tells ------------------------------------------------------------------------------------------------

    def _told(self) -> dict[str, Any]:
        found = read_record(record_file(self.folder, self.name))
        if found.get("token") == self.token:
            return found
        return {"shard": self.name, "token": self.token, "kept": self._kept(), "idle": 0}

    def _tell(self, state: str, said: str = "", **facts: Any) -> None:
        about = {"job": _this_job(), "state": state, "said": said, "told": _now()}
        write_whole(record_file(self.folder, self.name), json.dumps(self._told() | about | facts, indent=1))

    def _end(self, state: str, said: str) -> StudyError:
        self._tell(state, said)
        return StudyError(f"Shard {self.name} of the study in {self.folder}: {said}.")

    def _kept(self) -> list[int]:
        """Return how many cells are kept, and how many batches of those under way; nothing before the first run.

        Module criticality comes last, and what is kept of it counts in bytes.
        """
        from layercrit.study.status import MODULES  # which imports what a job that starts need not wait for

        counted = self._counted("SELECT (SELECT count(*) FROM cells), (SELECT count(*) FROM parts)")
        n_bytes = sum(path.stat().st_size for path in (self.folder / MODULES).glob("*/*"))
        return [*counted, n_bytes] if n_bytes else counted

    def _waits_for_pilots(self) -> bool:
        """Return whether its share of the pilot is run, and nothing planned yet."""
        pilots, plans = "name = 'pilot'", "name = 'precision' AND value != '[]'"
        return self._counted(
            f"SELECT (SELECT count(*) FROM meta WHERE {pilots}), (SELECT count(*) FROM meta WHERE {plans})"  # noqa: S608
        ) == [1, 0]

    def _counted(self, query: str) -> list[int]:
        number, _, of = self.name.partition("/")
        store = shard_folder(self.folder, int(number) if int(of) > 1 else 0).absolute() / FILE
        try:
            with contextlib.closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as opened:
                (counted,) = opened.execute(query)
        except sqlite3.Error:
            return []
        return list(counted)


def versions_here() -> dict[str, str]:
    """Return the versions of what decides the numbers that a job measures."""
    found = {}
    for name in ("layercrit", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def record_file(folder: Path, shard: str) -> Path:
    """Return the file in which a shard tells how it is."""
    return folder / JOBS / f"shard-{shard.replace('/', '-of-')}.json"


def read_record(path: Path) -> dict[str, Any]:
    """Return what a file of the folder `JOBS` holds; nothing where it is missing or half written."""
    with contextlib.suppress(OSError, ValueError):
        found = read_json(path)
        if isinstance(found, dict):
            return found
    return {}


def _this_job() -> str:
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array else os.environ.get("SLURM_JOB_ID", "")


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Take what a job has in its environment away for a while; what the user set for sbatch stays."""
    taken = {
        name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_OF_JOBS) and name != _PLACE_OF_SLURM
    }
    try:
        yield
    finally:
        os.environ.update(taken)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
