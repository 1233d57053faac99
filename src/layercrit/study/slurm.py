"""Submit a study to SLURM: an array of jobs by submitit, each of which runs a shard of it until that is finished."""

import contextlib
import io
import json
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layercrit.counts import counted
from layercrit.errors import StudyError, shown
from layercrit.locks import hold, write_whole
from layercrit.study.file import read_study_file
from layercrit.study.slurm_job import JOBS, LOGS, Resources, ShardJob, executor, versions_here
from layercrit.study.slurm_states import SUBMISSION, JobState, job_states

__all__ = ["command_of", "minutes_of", "sbatch_script", "submit_study"]

_TOKEN = "token"  # noqa: S105 - the file that shows whether a node sees the study's folder
_LOOKS = 30  # times that a node looks for it; network file systems show new files after a while
_LISTED = 5
_DURATION = re.compile(r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<min>\d+)(?::(?P<sec>\d+))?)?"
                       r"|(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)|(?P<minutes>\d+))", re.ASCII)  # fmt: skip


def submit_study(file: str | Path, folder: str | Path, n_jobs: int, resources: Resources) -> tuple[JobState, ...]:
    """Submit jobs that run a study; each goes on in another job when its time is over, until its shard is finished.

    Args:
        file: the study file, or the folder of a study that was started before.
        folder: of the study, which the nodes of the cluster must see as well.
        n_jobs: into how many shards the study is divided.
        resources: of each job.

    Returns:
        The jobs.

    Raises:
        StudyError: the file has mistakes, models are not trained yet, jobs of the study run or wait, submitit or SLURM
            are not here, or SLURM refused.
    """
    file, folder = _checked(file, folder, n_jobs)
    if shutil.which("sbatch") is None:
        command = shlex.join(command_of(file, folder, f"1/{n_jobs}")[3:])
        raise StudyError(
            "There is no SLURM here: the program sbatch is not found. Submit from a machine that has it, look at what "
            "would be submitted with --dry-run, or start the shards yourself wherever you like: `layercrit "
            f"{command}`" + (f", and so on to {n_jobs}/{n_jobs}." if n_jobs > 1 else ".")
        )
    is_new = not folder.exists()
    with hold(folder / JOBS, "submission"):
        _refuse_second(folder)
        try:
            _submit(file, folder, n_jobs, resources)
        except StudyError:  # SLURM refused
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return job_states(folder)


def sbatch_script(file: str | Path, folder: str | Path, n_jobs: int, resources: Resources) -> str:
    """Return the script that `submit_study` would give to sbatch; needs no SLURM.

    Raises:
        StudyError: the file has mistakes, models are not trained yet, or submitit is not here.
    """
    file, folder = _checked(file, folder, n_jobs)
    from submitit.slurm.slurm import _make_sbatch_string

    command = shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(folder / LOGS)])
    parameters = resources.parameters() | _parameters(file, folder, n_jobs, "0" * 16)
    n_in_array = n_jobs if n_jobs > 1 else None
    return _make_sbatch_string(command=command, folder=folder / LOGS, map_count=n_in_array, **parameters)


def command_of(file: Path, folder: Path, shard: str) -> list[str]:
    """Return the command that runs a shard of a study, such as ``3/16``."""
    run = ["study", "run", str(file), "--out", str(folder), "--shard", shard]
    return [sys.executable, "-m", "layercrit", *run]


def minutes_of(duration: str) -> int:
    """Return a duration as SLURM writes it, such as ``4:00:00``, ``90`` or ``2-12``, in minutes, rounded up.

    Raises:
        StudyError: it is not written so.
    """
    found = _DURATION.fullmatch(duration.strip())
    if found is None:
        raise StudyError(
            f"The time {shown(duration)} is not understood; expected minutes or, as SLURM writes it, "
            "hours:minutes:seconds, days-hours or days-hours:minutes:seconds, such as 4:00:00."
        )
    parts = {name: int(value or 0) for name, value in found.groupdict().items()}
    minutes = 1440 * parts["days"] + 60 * (parts["hours"] + parts["h"]) + parts["min"] + parts["m"] + parts["minutes"]
    return minutes + -(-(parts["sec"] + parts["s"]) // 60)


def _checked(file: str | Path, folder: str | Path, n_jobs: int) -> tuple[Path, Path]:
    """Return the absolute paths of a study file without mistakes and of the folder."""
    if n_jobs < 1:
        raise StudyError(f"The number of jobs is {n_jobs}; expected 1 or more.")
    read_study_file(file).check_trained()
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise StudyError(
            'Submitting jobs needs submitit, which is not installed: `pip install "layercrit[slurm]"`.'
        ) from error
    return Path(file).expanduser().absolute(), Path(folder).expanduser().absolute()


def _refuse_second(folder: Path) -> None:
    alive = [job for job in job_states(folder) if job.is_alive]
    if alive:
        named = ", ".join(f"{job.job} ({job.state}{f' on {job.node}' if job.node else ''})" for job in alive[:_LISTED])
        more = f" and {len(alive) - _LISTED} more" if len(alive) > _LISTED else ""
        numbers = " ".join(dict.fromkeys(job.job.partition("_")[0] for job in alive))
        raise StudyError(
            f"The study in {folder} has {counted(len(alive), 'job')} at SLURM: {named}{more}. Watch them "
            f"with `layercrit study status {shlex.quote(str(folder))}`, or end them with `scancel {numbers}` and "
            "submit again."
        )


def _submit(file: Path, folder: Path, n_jobs: int, resources: Resources) -> None:
    token, jobs, logs = secrets.token_hex(8), folder / JOBS, folder / LOGS
    for left in jobs.glob("shard-*.json"):
        left.unlink()
    (jobs / _TOKEN).write_text(f"{token}\n", encoding="ascii")
    parameters = _parameters(file, folder, n_jobs, token)
    shards = [
        ShardJob(
            command_of(file, folder, name), folder, name, token, versions_here(), resources, Path.cwd(), parameters
        )
        for name in (f"{number}/{n_jobs}" for number in range(1, n_jobs + 1))
    ]
    before = set(logs.glob("*")) if logs.exists() else set()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what submitit prints of an error is in the error as well
            submitted = executor(folder, resources, **parameters).submit_array(shards)
    except Exception as error:  # submitit's own, with what sbatch said
        for left in set(logs.glob("*")) - before:
            left.unlink(missing_ok=True)
        raise StudyError(
            f"SLURM refused the jobs: {_words_of_slurm(str(error))}. Ask for what this cluster has: `sinfo` shows "
            "partitions and their time limits, `sacctmgr show associations user=$USER` accounts."
        ) from error
    job = submitted[0].job_id.partition("_")[0]
    about = {"job": job, "n_jobs": n_jobs, "token": token, "versions": versions_here()}
    write_whole(jobs / SUBMISSION, json.dumps(about, indent=1))


def _parameters(file: Path, folder: Path, n_jobs: int, token: str) -> dict[str, Any]:
    """Return the parameters of submitit's executor that are no resources."""
    return {
        "job_name": f"layercrit-{re.sub(r'[^A-Za-z0-9_.-]', '-', folder.name)}",
        "setup": _check_of_folder(file, folder, n_jobs, token),
        "array_parallelism": n_jobs,
    }


def _check_of_folder(file: Path, folder: Path, n_jobs: int, token: str) -> list[str]:
    """Return lines of a script that end it on a node that does not see the study's folder."""
    path = shlex.quote(str(folder / JOBS / _TOKEN))
    command = shlex.join(command_of(file, folder, f"{'I' if n_jobs > 1 else 1}/{n_jobs}"))
    return [
        f"# runs, by way of submitit: {command}",
        f"for look in $(seq {_LOOKS}); do",
        f'    if [ "$(cat {path} 2>/dev/null)" = {token} ]; then break; fi',
        f'    if [ "$look" = {_LOOKS} ]; then',
        f'        echo "The node $(hostname) does not see the file" {path} "as $SLURM_SUBMIT_HOST wrote it: the folder '
        'is not shared between the two. Submit with --out on a shared file system."',
        "        exit 66",
        "    fi",
        "    sleep 2",
        "done",
    ]


def _words_of_slurm(text: str) -> str:
    """Return what sbatch said of all that submitit reports."""
    said: Sequence[str] = [line.partition("error: ")[2] for line in text.splitlines() if "sbatch: error: " in line]
    with contextlib.suppress(StopIteration):
        said = said or [next(line for line in reversed(text.splitlines()) if line.strip())]
    return "; ".join(line.strip().rstrip(".") for line in said) or "without a word"
