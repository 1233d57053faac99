"""The command that submits a study to a cluster."""

from pathlib import Path

import click

from layercrit.cli.model_options import NewPath
from layercrit.cli.printing import say
from layercrit.cli.study import _folder_of, _keep_own_file
from layercrit.counts import counted

__all__ = ["submit_command"]

# Everything that imports torch or submitit is imported inside the command, so that `layercrit --help` answers at once.


@click.command("submit", short_help="Submit a study to SLURM as an array of jobs.")
@click.argument("file", type=click.Path(path_type=Path), metavar="STUDY.toml")
@click.option("--jobs", "n_jobs", type=int, default=1, show_default=True, metavar="N", help="Shards of the study.")
@click.option("--time", required=True, metavar="TIME", help="Time limit of a job, such as 4:00:00; others follow it.")
@click.option("--gpus-per-job", type=int, default=0, show_default=True, metavar="N", help="GPUs of each job.")
@click.option("--cpus-per-job", type=int, metavar="N", help="Cores of each job. [default: what the cluster gives]")
@click.option("--memory", metavar="SIZE", help="Memory of each job, such as 16G. [default: what the cluster gives]")
@click.option("--partition", metavar="NAME", help="[default: the cluster's]")
@click.option("--account", metavar="NAME", help="[default: yours at the cluster]")
@click.option(
    "--out",
    type=NewPath(path_type=Path),
    metavar="DIR",
    help="The study's folder, which all nodes must see. [default: as for `study run`]",
)
@click.option("--dry-run", is_flag=True, help="Print the script that SLURM would get, and submit nothing.")
def submit_command(
    file: Path,
    n_jobs: int,
    time: str,
    gpus_per_job: int,
    cpus_per_job: int | None,
    memory: str | None,
    partition: str | None,
    account: str | None,
    out: Path | None,
    dry_run: bool,
) -> None:
    """Submit a study to SLURM as an array of jobs, each of which measures a shard of it.

    A job whose time limit comes near stops, keeps what it has measured, and is followed by another one until its shard
    is finished. Anything else that sbatch can be asked for is taken from its own variables, such as SBATCH_QOS.
    """
    from layercrit.study.file import read_study_file
    from layercrit.study.slurm import minutes_of, sbatch_script, submit_study
    from layercrit.study.slurm_job import Resources

    resources = Resources(minutes_of(time), gpus_per_job, cpus_per_job, memory, partition, account)
    folder = _folder_of(file, out)
    if dry_run:
        click.echo(sbatch_script(file, folder, n_jobs, resources))
        return
    _keep_own_file(folder)
    jobs = submit_study(file, folder, n_jobs, resources)
    number = jobs[0].job.partition("_")[0]
    say(f"Submitted as job {number}, of {counted(n_jobs, 'shard')}; logs are in {folder / 'logs'}.")
    say(f"Watch it with `layercrit study status {folder}`, end it with `scancel {number}`.")
    if n_jobs > 1 and read_study_file(file).module_criticality is not None:
        say(f"Module criticality, once all shards are finished: `layercrit module-criticality {folder}`.")
