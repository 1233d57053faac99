"""Submitted studies on a real SLURM, where one is installed; what needs none comes first."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from layercrit.cli.root import cli
from layercrit.errors import StudyError
from layercrit.study import slurm, slurm_states
from layercrit.study.ranks import rank_of
from layercrit.study.slurm import minutes_of, sbatch_script, submit_study
from layercrit.study.slurm_job import JOBS, LOGS, Resources, ShardJob, record_file
from layercrit.study.slurm_states import SUBMISSION, job_states
from layercrit.study.store import Store
from layercrit.study.tables import load_study
from running_jobs import assert_same_tables, forgotten, run, tables, write_small
from slurm_cluster import slurm_cluster  # noqa: F401 - a fixture

submitit = pytest.importorskip("submitit")

TESTS = Path(__file__).parents[1]
TEN_MINUTES = Resources(10, cpus=1)
PROTOCOL = {"resets": ["gated"], "trials": 5}
N_CELLS = 2 * 5 * 3


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current folder with a space in its name, a study in it, and the module that this imports."""
    place = tmp_path / "my studies"
    place.mkdir()
    shutil.copy(TESTS / "gated_resets.py", place / "gated.py")
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with forgotten("gated"):
        write_small("study", protocol=PROTOCOL, study={"imports": ["gated"], "baseline": "m0"})
        yield place


@pytest.fixture
def cluster(slurm_cluster, monkeypatch):  # noqa: F811
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm_cluster
    slurm_cluster.ask("scancel", "--user", str(os.getuid()), "--signal=KILL", "--full", check=False)
    slurm_cluster.ask("scancel", "--user", str(os.getuid()), check=False)
    slurm_cluster.wait_until(lambda: not slurm_cluster.ask("squeue", "-h"))


@pytest.fixture
def instead(monkeypatch):
    """Let jobs run a line of Python in place of their shard."""

    def set_line(line):
        monkeypatch.setattr(slurm, "command_of", lambda file, folder, shard: [sys.executable, "-c", line, shard])

    return set_line


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What a local run of the study gives."""
    folder = tmp_path_factory.mktemp("local")
    shutil.copy(TESTS / "gated_resets.py", folder / "gated.py")
    before = Path.cwd()
    os.chdir(folder)
    try:
        with forgotten("gated"):
            path = write_small(folder / "study", protocol=PROTOCOL, study={"imports": ["gated"], "baseline": "m0"})
            run(path, folder / "out")
            return tables(folder / "out")
    finally:
        os.chdir(before)


def n_cells(folder):
    try:
        with Store(folder) as store:
            return store.n_cells()
    except StudyError:
        return 0  # not yet


def ended(cluster, folder, seconds=100):
    """The states of jobs once none of them runs or waits any more."""
    return cluster.wait_until(lambda: _ended(job_states(folder)), seconds, every=0.5)


def _ended(states):
    return None if any(state.is_alive for state in states) else states


def log_of(state):
    return state.log.read_text()


# without SLURM


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("4:00:00", 240), ("90", 90), ("90:00", 90), ("0:30", 1), ("1:00:01", 61), ("2-12", 3600), ("1-0:30", 1470),
     ("1-00:00:01", 1441), ("0", 0), (" 5 ", 5)],
)  # fmt: skip
def test_minutes_of__reads_times_as_slurm_writes_them(text, minutes):
    assert minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "4h", "4:", ":30", "1-", "-1", "1.5", "1:2:3:4", "4:00:00x", "٣", "forever"])
def test_minutes_of__refuses_other_texts(text):
    with pytest.raises(StudyError, match="4:00:00"):
        minutes_of(text)


@pytest.mark.parametrize(("minutes", "notice"), [(1, 15), (5, 30), (15, 90), (240, 90), (0, 90)])
def test_resources__the_signal_leaves_most_of_the_time(minutes, notice):
    assert Resources(minutes).notice == notice


def test_sbatch_script__asks_for_what_was_asked_for(place):
    resources = Resources(240, 2, 8, "16G", "gpu", "lab")
    script = sbatch_script("study/study.toml", "out", 16, resources)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))
    assert {name: options.get(name) for name in (
        "array", "time", "gres", "cpus-per-task", "mem", "partition", "account", "requeue", "signal", "nodes", "ntasks",
        "chdir", "open-mode", "wckey",
    )} == {
        "array": "0-15%16", "time": "240", "gres": "gpu:2", "cpus-per-task": "8", "mem": "16G", "partition": "gpu",
        "account": "lab", "requeue": "", "signal": "USR2@90", "nodes": "1", "ntasks": "1", "chdir": f"'{place}'",
        "open-mode": "append", "wckey": None,
    }  # fmt: skip
    assert "--cpus-per-task=8" in script.split("srun")[1]  # which steps do not take over from their jobs
    assert f"study run '{place}/study/study.toml' --out '{place}/out' --shard I/16" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert not (place / "out").exists()


def test_sbatch_script__of_one_job_is_no_array(place):
    script = sbatch_script("study/study.toml", "out", 1, Resources(10))
    assert not re.search("array|gres|cpus-per-task|mem|partition|account", script)
    assert "--shard 1/1" in script


def test_submit__dry_run_needs_no_slurm(place, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    done = CliRunner().invoke(cli, ["study", "submit", "study/study.toml", "--time", "1-0", "--jobs", "3", "--dry-run"])
    assert done.exit_code == 0
    assert "#SBATCH --time=1440" in done.output
    assert "#SBATCH --array=0-2%3" in done.output
    assert (
        sorted(path.name for path in place.iterdir() if path.suffix != ".pyc") == ["gated.py", "study"]
        or (place / "__pycache__").exists()
    )
    assert not (place / "study" / JOBS).exists()


def test_submit__without_slurm_names_the_ways_out(place, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(StudyError, match=r"no SLURM.*--dry-run.*--shard 1/3`.* to 3/3") as raised:
        submit_study("study/study.toml", "out", 3, TEN_MINUTES)
    assert f"'{place}/study/study.toml'" in str(raised.value)
    assert not (place / "out").exists()


def test_submit__without_submitit_says_what_to_install(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    for of_submit in (submit_study, sbatch_script):
        with pytest.raises(StudyError, match=r"layercrit\[slurm\]"):
            of_submit("study/study.toml", "out", 3, TEN_MINUTES)


def test_submit__refuses_mistakes_before_anything_is_submitted(place):
    with pytest.raises(StudyError, match="number of jobs is 0"):
        submit_study("study/study.toml", "out", 0, TEN_MINUTES)
    (place / "study" / "study.toml").write_text("[models]\n")
    with pytest.raises(StudyError, match="mistake"):
        submit_study("study/study.toml", "out", 1, TEN_MINUTES)
    assert not (place / "out").exists()


def test_help__imports_neither_torch_nor_submitit():
    code = (
        "import sys; from click.testing import CliRunner; from layercrit.cli.root import cli\n"
        "done = CliRunner().invoke(cli, ['study', 'submit', '--help']); assert '--gpus-per-job' in done.output\n"
        "print(sorted({'torch', 'submitit', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Let SLURM's programs answer as a test says; each is a script of the shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def answer(**scripts):
        for name in ("squeue", "sacct"):
            (folder / name).write_text(f"#!/bin/sh\n{scripts.get(name, 'exit 1')}\n")
            (folder / name).chmod(0o755)

    return answer


def submitted(folder, n_jobs, told):
    """Write what a submission of some jobs, and shards of it, would have written."""
    (folder / JOBS).mkdir(parents=True)
    (folder / JOBS / SUBMISSION).write_text(json.dumps({"job": "7", "n_jobs": n_jobs, "token": "abc"}))
    for shard, about in told.items():
        record_file(folder, shard).write_text(json.dumps({"token": "abc", "shard": shard} | about))
    return folder


def test_job_states__are_none_where_nothing_was_submitted(tmp_path):
    assert job_states(tmp_path) == ()
    assert job_states(tmp_path / "missing") == ()


def test_job_states__bring_together_what_slurm_and_the_jobs_say(tmp_path, answers):
    told = {
        "1/7": {"job": "7_0", "state": "running", "node": "n1"},
        "3/7": {"job": "12", "state": "goes on", "node": "n1"},
        "4/7": {"job": "7_3", "state": "failed", "node": "n2", "said": "exit code 1"},
        "5/7": {"job": "7_4", "state": "running", "node": "n3"},
        "7/7": {"job": "7_6", "state": "finished", "node": "n4", "token": "of another submission"},
    }
    answers(
        squeue="printf '7_0|RUNNING|None|n1|1:02:03\\n7_1|PENDING|QOSMaxJobs|(null)|4:00:00\\n"
        "12|PENDING|BeginTime||4:00:00\\n7_3|FAILED|NonZeroExitCode|n2|1:00\\n'",
        sacct="printf '7_4|TIMEOUT|0:0|n3|04:00:02\\n7_5|COMPLETED|0:0|n4|00:00:03\\n"
        "7_6|CANCELLED by 0|0:0|n4|00:00:03\\n7_0|PENDING|0:0|x|0\\n'",
    )
    states = job_states(submitted(tmp_path / "out", 7, told))
    assert [(state.shard, state.job, state.state, state.node) for state in states] == [
        ("1/7", "7_0", "running", "n1"),
        ("2/7", "7_1", "waiting", ""),
        ("3/7", "12", "waiting", ""),
        ("4/7", "7_3", "failed", "n2"),
        ("5/7", "7_4", "ended", "n3"),
        ("6/7", "7_5", "ended", "n4"),
        ("7/7", "7_6", "ended", "n4"),
    ]
    said = [state.said for state in states]
    assert said[:4] == ["1:02:03 left", "QOSMaxJobs", "BeginTime", "exit code 1"]
    assert said[4].startswith("TIMEOUT: ")
    assert "not be shared with the node n4" in said[5]
    assert said[6].startswith("CANCELLED: submit again")
    assert states[2].log == tmp_path / "out" / LOGS / "12_0_log.out"


@pytest.mark.parametrize(
    ("squeue", "said"),
    [
        ("echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1", "Unable to contact slurm controller"),
        ("exit 1", "no reason given"),
        ("sleep 5", "took more than"),
    ],
)
def test_job_states__say_that_slurm_does_not_answer(tmp_path, answers, monkeypatch, squeue, said):
    monkeypatch.setattr(slurm_states, "_PATIENCE", 0.5)
    answers(squeue=squeue)
    folder = submitted(tmp_path / "out", 2, {"1/2": {"job": "7_0", "state": "finished"}})
    finished, unknown = job_states(folder)
    assert (finished.state, unknown.state) == ("finished", "unknown")
    assert unknown.said.startswith("SLURM does not answer")
    assert said in unknown.said


def test_job_states__without_slurm_know_what_was_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    folder = submitted(tmp_path / "out", 2, {"1/2": {"job": "7_0", "state": "finished"}})
    assert [state.state for state in job_states(folder)] == ["finished", "unknown"]


def test_job_states__jobs_that_slurm_forgot(tmp_path, answers):
    answers(squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    folder = submitted(tmp_path / "out", 2, {"1/2": {"job": "7_0", "state": "running"}})
    assert [state.state for state in job_states(folder)] == ["unknown", "unknown"]
    assert "last heard of: running" in job_states(folder)[0].said


# what SLURM sets where


@pytest.mark.slow
def test_rank_of__on_a_real_slurm(cluster, tmp_path):
    """In a batch script one process does everything; in a step, and in an array, each has its shard."""
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/sh\n"
        "env -0 > batch-$SLURM_JOB_ID\n"
        "srun sh -c 'env -0 > step-$SLURM_JOB_ID-$SLURM_PROCID'\n"
        "srun --mpi=pmi2 sh -c 'env -0 > pmi-$SLURM_JOB_ID-$SLURM_PROCID' || true\n"
    )

    def environments(pattern):
        return [
            dict(pair.partition("=")[::2] for pair in path.read_text().split("\0") if pair)
            for path in sorted(tmp_path.glob(pattern))
        ]

    def shards(pattern):
        return sorted((str(rank), rank.local_number, rank.n_local) for rank in map(rank_of, environments(pattern)))

    cluster.ask("sbatch", "--wait", "--ntasks=2", script, cwd=tmp_path)
    assert environments("batch-*")[0]["SLURM_NTASKS"] == "2"
    assert [rank_of(one) for one in environments("batch-*")] == [None]
    assert shards("step-*") == [("1/2", 0, 2), ("2/2", 1, 2)]
    assert shards("pmi-*") in ([], shards("step-*"))  # the plug-in may not be installed
    assert len({rank_of(one).start for one in environments("step-*")}) == 1
    for left in tmp_path.glob("*-*"):
        left.unlink()

    cluster.ask("sbatch", "--wait", "--ntasks=2", "--array=3-7:4", script, cwd=tmp_path)
    assert sorted(str(rank_of(one)) for one in environments("batch-*")) == ["1/2", "2/2"]
    assert [shard for shard, *_ in shards("step-*")] == ["1/4", "2/4", "3/4", "4/4"]
    assert len({rank_of(one).start for one in environments("step-*")}) == 1
    for left in tmp_path.glob("*-*"):
        left.unlink()

    cluster.ask("sbatch", "--wait", "--array=1,2,5", script, cwd=tmp_path)
    for one in environments("batch-*"):
        with pytest.raises(StudyError, match="gaps"):
            rank_of(one)


def test_rank_of__shells_and_scripts_in_jobs_on_a_real_slurm(cluster, tmp_path):
    """Neither an interactive shell nor a script that a step submitted, which inherits variables, has a shard."""
    shell = cluster.ask("salloc", "--ntasks=2", "env", cwd=tmp_path)
    assert "SLURM_NTASKS=2" in shell
    assert rank_of(dict(line.partition("=")[::2] for line in shell.splitlines())) is None
    (tmp_path / "inner.sh").write_text("#!/bin/sh\nenv > inner\n")
    cluster.ask("srun", "--ntasks=2", "sh", "-c", "[ $SLURM_PROCID = 1 ] || sbatch inner.sh", cwd=tmp_path)
    cluster.wait_until(lambda: (tmp_path / "inner").exists() and not cluster.ask("squeue", "-h"))
    inner = dict(line.partition("=")[::2] for line in (tmp_path / "inner").read_text().splitlines())
    assert inner["SLURM_STEP_NUM_TASKS"] == "2"  # which is not its own
    assert rank_of(inner) is None


# submitted studies


@pytest.mark.slow
def test_submit__runs_a_study_to_its_end(cluster, place, expected):
    done = CliRunner().invoke(
        cli,
        ["study", "submit", "study/study.toml", "--jobs", "2", "--time", "10",
         "--cpus-per-job", "1", "--out", "out"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert [state.state for state in ended(cluster, "out")] == ["finished", "finished"]
    assert sorted(path.name for path in (place / "out" / "shards").glob("[0-9]*")) == ["0001", "0002"]
    assert_same_tables(tables("out"), expected)


@pytest.mark.slow
def test_submit__goes_on_after_its_time_limit_and_after_scancel(cluster, place, expected):
    hold, folder = place / "hold", place / "out"
    hold.touch()
    (job,) = submit_study("study/study.toml", folder, 1, TEN_MINUTES)
    cluster.wait_until(lambda: n_cells(folder) >= 6)
    with pytest.raises(StudyError, match=rf"1 job at SLURM: {job.job} \(running on .*scancel {job.job}`"):
        submit_study("study/study.toml", folder, 1, TEN_MINUTES)
    assert cluster.job(job.job)["JobState"] == "RUNNING"

    cluster.ask("scontrol", "update", f"JobId={job.job}", "TimeLimit=1")
    cluster.wait_until(lambda: cluster.job(job.job)["Restarts"] == "1", 100)
    cluster.ask("scontrol", "update", f"JobId={job.job}", "TimeLimit=10")
    of_first = n_cells(folder)
    assert 6 <= of_first < N_CELLS
    assert "Ended by SIGTERM." in log_of(job)  # the run itself ended in order

    cluster.wait_until(lambda: n_cells(folder) >= of_first + 3, 100)
    cluster.ask("scancel", job.job)
    (state,) = ended(cluster, folder)
    assert (state.state, state.job) == ("stopped", job.job)
    assert "SIGTERM" in state.said
    of_both = n_cells(folder)
    assert of_both < N_CELLS

    hold.unlink()
    (again,) = submit_study("study/study.toml", folder, 1, TEN_MINUTES)
    assert again.job != job.job
    (state,) = ended(cluster, folder)
    assert (state.state, state.job) == ("finished", again.job)
    assert f"{N_CELLS - of_both} cells measured, {of_both} were already there" in log_of(state)
    assert len(load_study(folder).runs) == 3
    assert_same_tables(tables(folder), expected)


SLEEP = "import time; time.sleep(300)"


@pytest.mark.slow
def test_submit__shards_that_measure_nothing_new_give_up(cluster, place, instead):
    """The signal is sent by hand, as SLURM does near the time limit."""
    instead(SLEEP)
    (job,) = submit_study("study/study.toml", "out", 1, TEN_MINUTES)
    for n_restarts in range(2):
        began(cluster, "out", "1/1", n_restarts)
        cluster.ask("scancel", "--signal=USR2", job.job)
    (state,) = ended(cluster, "out")
    assert (state.state, state.job) == ("gave up", job.job)
    assert "--time" in state.said


@pytest.mark.slow
def test_submit__a_shard_that_slurm_does_not_requeue_gets_another_job(cluster, place, instead):
    instead("import os, time; os.path.exists('go on') or time.sleep(300)")
    first, second = submit_study("study/study.toml", "out", 2, TEN_MINUTES)
    cluster.ask("scontrol", "update", f"JobId={first.job}", "Requeue=0")
    began(cluster, "out", "1/2", 0)
    (place / "go on").touch()
    cluster.ask("scancel", "--signal=USR2", first.job)
    cluster.wait_until(lambda: job_states("out")[0].job != first.job)
    with pytest.raises(StudyError, match="at SLURM"):
        submit_study("study/study.toml", "out", 2, TEN_MINUTES)
    cluster.wait_until(lambda: job_states("out")[0].state == "finished")
    assert job_states("out")[1].job == second.job
    assert cluster.job(job_states("out")[0].job)["TimeLimit"] == cluster.job(second.job)["TimeLimit"]


def began(cluster, folder, shard, n_restarts):
    """Wait until a shard's command runs, after so many restarts of its job."""
    state = next(state for state in job_states(folder) if state.shard == shard)
    cluster.wait_until(
        lambda: state.log.exists() and log_of(state).count("\n$ ") == n_restarts + 1 and has_child(state.log), 60
    )


def has_child(log):
    """The command that a log names last runs."""
    line = [line for line in log.read_text().splitlines() if line.startswith("$ ")][-1]
    shard = line.rpartition(" ")[2]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if arguments[1:2] == [b"-c"] and shard.encode() in arguments[2:]:
            return True
    return False


@pytest.mark.slow
def test_submit__a_run_that_fails_is_not_repeated(cluster, place, instead):
    instead("raise SystemExit(1)")
    submit_study("study/study.toml", "out", 1, TEN_MINUTES)
    (state,) = ended(cluster, "out")
    assert state.state == "failed"
    assert (cluster.job(state.job)["JobState"], cluster.job(state.job)["Restarts"]) == ("FAILED", "0")


def test_submit__other_versions_on_the_node_are_refused(cluster, place, instead, monkeypatch):
    instead("open('ran', 'w')")
    monkeypatch.setattr(slurm, "versions_here", lambda: {"layercrit": "0.0.1", "torch": "1.13"})
    submit_study("study/study.toml", "out", 1, TEN_MINUTES)
    (state,) = ended(cluster, "out")
    assert state.state == "refused"
    assert "layercrit 0.0.1 there and" in state.said
    assert "torch 1.13 there and" in state.said
    assert state.said in log_of(state)
    assert not (place / "ran").exists()


@pytest.mark.parametrize("there", [False, True], ids=["no such folder", "another folder of that name"])
def test_submit__a_folder_that_the_node_does_not_see(cluster, place, instead, monkeypatch, there):
    """The node is this machine, so the folder is moved away until the job has ended."""
    monkeypatch.setattr(slurm, "_LOOKS", 1)
    instead("open('ran', 'w')")
    cluster.ask("scontrol", "update", "PartitionName=main", "State=DOWN")
    (job,) = submit_study("study/study.toml", "out", 1, TEN_MINUTES)
    Path("out").rename("away")
    if there:
        (place / "out" / LOGS).mkdir(parents=True)
    cluster.ask("scontrol", "update", "PartitionName=main", "State=UP")
    cluster.wait_until(lambda: cluster.job(job.job)["JobState"] == "FAILED")
    logs = [path.read_text() for path in place.glob("out/logs/*.out")]
    shutil.rmtree("out", ignore_errors=True)
    Path("away").rename("out")
    (state,) = job_states("out")
    assert state.state == "ended"
    assert f"may not be shared with the node {cluster.node}" in state.said
    assert [f"The node {cluster.node} does not see the file" in log for log in logs] == [True] * there
    assert not (place / "ran").exists()


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (Resources(10, partition="nowhere"), "Invalid partition name specified"),
        (Resources(10, gpus=3), "Requested node configuration is not available|Invalid generic resource"),
        (Resources(10, memory="much"), "--mem"),
    ],
    ids=["partition", "GPUs", "memory"],
)
def test_submit__shows_why_slurm_refuses(cluster, place, resources, words, capfd):
    with pytest.raises(StudyError, match=rf"SLURM refused the jobs: .*({words})"):
        submit_study("study/study.toml", "out", 2, resources)
    assert not (place / "out").exists()
    assert capfd.readouterr().err == ""


def test_shard_job__what_is_kept_of_module_criticality_is_something_new(tmp_path):
    """Else a job that measures it for longer than a time limit would be taken for one that does not get ahead."""
    job = ShardJob([], tmp_path, "1/1", "token", {}, Resources(minutes=1), tmp_path)
    before = job._kept()
    points = tmp_path / "module-criticality" / "m0-1234" / "kept-points.json"
    points.parent.mkdir(parents=True)
    points.write_text("[1]")
    first = job._kept()
    points.write_text("[1, 2]")
    assert before != first != job._kept()
