"""A real SLURM for tests: munged, slurmctld and slurmd as processes of this test run, in a folder of their own.

One node with one partition, on loopback and on free ports, so that several test processes may each have one. Nothing of
a SLURM that this machine may belong to is read or touched.
"""

import contextlib
import os
import platform
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Debian has the daemons where the path of users does not lead
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")

_CONF = """\
ClusterName=tests
SlurmctldHost={node}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a job that is requeued waits until its credentials have expired; SLURM takes no less than 5 seconds
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
# what needs neither systemd nor control groups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=5
OverTimeLimit=0
InactiveLimit=0
MinJobAge=300
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
# at least two cores, also where there is one, so that two jobs of an array run at the same time
SlurmdParameters=config_overrides
NodeName={node} NodeAddr=127.0.0.1 CPUs={n_cores} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=120 DefaultTime=10 State=UP
"""


class Cluster:
    """A SLURM that is up.

    Attributes:
        folder: with its configuration, logs and state.
        environment: what a process needs in its environment to talk to it.
        node: the name of its node.
        n_cores: of the node.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node = platform.node().partition(".")[0]
        self.n_cores = max(2, os.cpu_count() or 1)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATH}
        self._daemons: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self) -> None:
        """Start the daemons, and wait until the node takes jobs."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        conf = _CONF.format(
            node=self.node,
            user=pwd.getpwuid(os.getuid()).pw_name,
            folder=self.folder,
            ports=_free_ports(2),
            n_cores=self.n_cores,
            memory=2000,
        )
        (self.folder / "slurm.conf").write_text(conf)
        munge = {"key-file": key, "socket": self.folder / "munge.socket", "pid-file": self.folder / "munge.pid",
                 "log-file": self.folder / "munge.log", "seed-file": self.folder / "munge.seed"}  # fmt: skip
        self._start("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in munge.items()))
        self._wait_for(munge["socket"].exists)
        self._start("slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf"))
        self._start("slurmd", "-D", "-f", str(self.folder / "slurm.conf"))
        self._wait_for(lambda: self.ask("sinfo", "-h", "-o", "%T", check=False) == "idle")

    def _start(self, *command: str) -> None:
        program = shutil.which(command[0], path=_PATH)
        assert program is not None
        with (self.folder / f"{command[0]}.out").open("wb") as out:
            process = subprocess.Popen(
                [program, *command[1:]], stdout=out, stderr=out, env=os.environ | self.environment
            )
        self._daemons.append((command[0], process))

    def _wait_for(self, is_so, seconds=60) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            for name, process in self._daemons:
                if process.poll() is not None:
                    pytest.skip(f"{name} ended with {process.returncode}: {self._end_of(name)}")
            if time.monotonic() > deadline:
                pytest.skip("SLURM does not come up here: " + "; ".join(self._end_of(n) for n, _ in self._daemons))
            time.sleep(0.1)

    def _end_of(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text(errors="replace")[-500:]

    def stop(self) -> None:
        """Cancel all jobs, and end the daemons that were started."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.ask("scancel", "--user", str(os.getuid()), check=False, timeout=10)
            self.wait_until(lambda: not self.ask("squeue", "-h", check=False, timeout=10), seconds=15)
        for _, process in reversed(self._daemons):
            process.terminate()
        for _, process in reversed(self._daemons):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, *command: str, check: bool = True, timeout: float = 60, **settings) -> str:
        """Run a command of SLURM, and return what it prints."""
        environment = os.environ | self.environment | settings.pop("env", {})
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, check=False, **settings
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return what SLURM knows of a job, by the names that ``scontrol show job`` gives; empty if nothing."""
        found = self.ask("scontrol", "-o", "show", "job", job, check=False)
        return dict(pair.partition("=")[::2] for pair in found.split() if "=" in pair)

    def wait_until(self, is_so, seconds=60.0, every=0.2):
        """Wait until something is so, and return it."""
        deadline = time.monotonic() + seconds
        while not (found := is_so()):
            assert time.monotonic() < deadline, f"not so after {seconds} s; {self.ask('squeue', check=False)}"
            time.sleep(every)
        return found


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start a SLURM, and stop it in the end; the test is skipped where it is not installed or does not come up."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        pytest.skip(f"no SLURM here: {', '.join(missing)} missing (Debian: apt install slurm-wlm munge)")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not pytest's, whose paths are too long for a socket
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def slurm_cluster() -> Iterator[Cluster]:
    """A SLURM for the tests of a module."""
    with running_cluster() as cluster:
        yield cluster
