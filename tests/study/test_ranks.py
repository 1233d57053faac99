import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercrit.errors import StudyError
from layercrit.study.ranks import Shard, cores_here, counts, gpus_of, n_cores, rank_of

# as SLURM 22.05 sets them, see test_slurm.py
STEP = {
    "SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x8)", "SLURM_GTIDS": "2,3",
    "SLURM_NTASKS": "16",
}  # fmt: skip
BATCH = {
    "SLURM_JOB_ID": "9", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_NPROCS": "16", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "2(x8)", "SLURM_GTIDS": "0",
}  # fmt: skip
ARRAY = {
    "SLURM_ARRAY_JOB_ID": "20", "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "9",
    "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_STEP": "2",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-host-77@1",
}  # fmt: skip
PMI = {"PMI_RANK": "2", "PMI_SIZE": "6", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "run7",
}  # fmt: skip


@pytest.mark.parametrize("text", ["1/1", "3/16", "16/16", " 3 / 16 ", "003/016"])
def test_parse__counts_from_1(text):
    number, of = map(int, text.split("/"))
    found = Shard.parse(text)
    assert (found.number, found.of) == (number - 1, of)
    assert str(found) == f"{number}/{of}"


@given(st.integers(1, 10_000).flatmap(lambda of: st.tuples(st.integers(1, of), st.just(of))))
def test_parse__reads_what_it_writes(shard):
    number, of = shard
    assert str(Shard.parse(f"{number}/{of}")) == f"{number}/{of}"


@pytest.mark.parametrize(
    "text",
    ["17/16", "0/16", "0/0", "1/0", "a/b", "3", "", "/", "3/", "/16", "-1/16", "3/-16", "1.5/2", "3/16/2", "3\\16",
     "³/16", "٣/16", "1" * 5000 + "/1", "3/16\nx", "3 16", "+3/16"],
)  # fmt: skip
def test_parse__refuses_what_is_no_shard(text):
    with pytest.raises(StudyError, match="I/N"):
        Shard.parse(text)


def test_parse__says_which_shards_there_are():
    with pytest.raises(StudyError, match=r"no shard 17/16.*from 1/16 to 16/16"):
        Shard.parse("17/16")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"HOME": "/root", "SLURM_CONF": "/etc/slurm.conf"}, None),
        (TORCHRUN, Shard(3, 4, 1, 2, "RANK", "torchrun run7")),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, Shard(3, 4, 1, 2, "RANK", None)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Shard(3, 4, 0, 1, "RANK", None)),
        (OPEN_MPI, Shard(5, 8, 1, 4, "OMPI_COMM_WORLD_RANK", "mpirun prterun-host-77@1")),
        (PMI, Shard(2, 6, 0, 2, "PMI_RANK", None)),
        ({"PMI_RANK": "2", "PMI_SIZE": "6"}, Shard(2, 6, 0, 1, "PMI_RANK", None)),
        (STEP, Shard(3, 16, 1, 2, "SLURM_PROCID", "srun 9.0")),
        (ARRAY, Shard(2, 4, 0, 1, "SLURM_ARRAY_TASK_ID", "array 20")),
    ],
    ids=["nothing", "other variables", "torchrun", "torchrun on one machine", "by hand", "Open MPI", "MPICH",
         "other MPI", "srun", "array"],
)  # fmt: skip
def test_rank_of__reads_launchers(environment, expected):
    assert rank_of(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        BATCH,
        {"SLURM_JOB_ID": "8", "SLURM_NTASKS": "16", "SLURM_NPROCS": "16", "SLURM_TASKS_PER_NODE": "16"},
        BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "16"},
        # what a batch script inherits that a process of a step submitted
        BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"},
        BATCH
        | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "PMI_RANK": "0",
           "PMI_SIZE": "2"},
    ],
    ids=["batch script", "salloc", "interactive step", "script of a step", "script of a step with PMI"],
)  # fmt: skip
def test_rank_of__is_nothing_where_one_process_does_everything(environment):
    assert rank_of(environment) is None


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GTIDS": "0"},
        {f"SLURM_ARRAY_TASK_{name}": "4" for name in ("ID", "MIN", "MAX")}
        | {"SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_STEP": "1"},
    ],
    ids=["torchrun", "Open MPI", "MPICH", "srun", "array"],
)  # fmt: skip
def test_rank_of__one_process_is_no_shard_and_leaves_those_around_it(environment):
    assert rank_of(environment) is None
    around = TORCHRUN if "RANK" not in environment else PMI
    assert rank_of(around | environment) == rank_of(around)
    if "SLURM_ARRAY_TASK_ID" not in environment:
        assert rank_of(ARRAY | environment) == rank_of(ARRAY)


@pytest.mark.parametrize("inner", [TORCHRUN, OPEN_MPI, PMI], ids=["torchrun", "Open MPI", "MPICH"])
@pytest.mark.parametrize("outer", [BATCH, STEP], ids=["batch script", "proxies that srun started"])
def test_rank_of__the_innermost_launcher_wins(inner, outer):
    assert rank_of(outer | inner) == rank_of(inner)


def test_rank_of__torchrun_started_by_mpirun_wins():
    assert rank_of(OPEN_MPI | TORCHRUN) == rank_of(TORCHRUN)


def test_rank_of__pmi_of_srun_is_a_step():
    assert rank_of(STEP | {"PMI_RANK": "3", "PMI_SIZE": "16", "PMI_JOBID": "9.0"}) == rank_of(STEP)


@pytest.mark.parametrize("inner", [STEP, OPEN_MPI, TORCHRUN], ids=["srun", "mpirun", "torchrun"])
def test_rank_of__an_array_is_around_every_launcher(inner):
    found, alone = rank_of(ARRAY | inner), rank_of(inner)
    assert (found.number, found.of) == (2 * alone.of + alone.number, 4 * alone.of)
    assert (found.local_number, found.n_local) == (alone.local_number, alone.n_local)
    assert found.origin == f"SLURM_ARRAY_TASK_ID and {alone.origin}"
    assert found.start.startswith("array 20, ")


def test_rank_of__the_steps_of_an_array_have_one_start():
    starts = {rank_of(ARRAY | STEP | {"SLURM_JOB_ID": job}).start for job in ("20", "21", "22")}
    assert starts == {"array 20, srun 0"}


@given(
    n_tasks=st.integers(1, 5),
    n_jobs=st.integers(1, 6),
    step=st.integers(1, 4),
    lowest=st.integers(0, 5),
    slack=st.integers(0, 3),
)
def test_rank_of__processes_of_an_array_have_every_shard_once(n_tasks, n_jobs, step, lowest, slack):
    highest = lowest + (n_jobs - 1) * step
    found = []
    for index in range(lowest, highest + 1, step):
        for task in range(n_tasks):
            environment = {
                "SLURM_ARRAY_TASK_ID": f"{index}", "SLURM_ARRAY_TASK_MIN": f"{lowest}",
                # as in --array=0-10:4, where SLURM says 8 or 10
                "SLURM_ARRAY_TASK_MAX": f"{highest + min(slack, step - 1)}", "SLURM_ARRAY_TASK_COUNT": f"{n_jobs}",
                "SLURM_ARRAY_TASK_STEP": f"{step}", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": f"{n_tasks}",
                "SLURM_PROCID": f"{task}", "SLURM_JOB_ID": "1",
            }  # fmt: skip
            found.append(rank_of(environment))
    if n_tasks * n_jobs == 1:
        assert found == [None]
    else:
        assert sorted(rank.number for rank in found) == list(range(n_tasks * n_jobs))
        assert {rank.of for rank in found} == {n_tasks * n_jobs}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0"}, ["RANK='0'", "WORLD_SIZE"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE='4'", "RANK"]),
        ({"RANK": "0", "WORLD_SIZE": " "}, ["RANK='0'", "WORLD_SIZE"]),
        ({"RANK": "4", "WORLD_SIZE": "4"}, ["RANK='4'", "WORLD_SIZE='4'"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["RANK='0'", "WORLD_SIZE='0'"]),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, ["RANK", "'-1'"]),
        ({"RANK": "one", "WORLD_SIZE": "4"}, ["RANK", "'one'"]),
        (TORCHRUN | {"LOCAL_RANK": "2"}, ["LOCAL_RANK='2'", "LOCAL_WORLD_SIZE='2'"]),
        ({"OMPI_COMM_WORLD_RANK": "1"}, ["OMPI_COMM_WORLD_RANK='1'", "OMPI_COMM_WORLD_SIZE"]),
        ({"PMI_RANK": "1"}, ["PMI_RANK='1'", "PMI_SIZE"]),
        ({k: v for k, v in STEP.items() if k != "SLURM_PROCID"}, ["SLURM_STEP_NUM_TASKS='16'", "SLURM_PROCID"]),
        (STEP | {"SLURM_PROCID": "16"}, ["SLURM_PROCID='16'", "SLURM_STEP_NUM_TASKS='16'"]),
        (STEP | {"SLURM_NODEID": "8"}, ["SLURM_NODEID='8'", "SLURM_STEP_TASKS_PER_NODE='2(x8)'"]),
        (STEP | {"SLURM_LOCALID": "2"}, ["SLURM_LOCALID='2'", "SLURM_STEP_TASKS_PER_NODE='2(x8)'"]),
        ({"SLURM_ARRAY_TASK_ID": "3"}, ["SLURM_ARRAY_TASK_ID='3'", "SLURM_ARRAY_TASK_COUNT"]),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "11"}, ["SLURM_ARRAY_TASK_ID='11'"]),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "1"}, ["SLURM_ARRAY_TASK_ID='1'"]),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "4"}, ["SLURM_ARRAY_TASK_ID='4'"]),
        # --array=1,2,5 and --array=1,3,5
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "5",
                  "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_STEP": "1"}, ["gaps", "SLURM_ARRAY_TASK_COUNT='3'"]),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "5",
                  "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_STEP": "1"}, ["gaps", "SLURM_ARRAY_TASK_STEP='1'"]),
    ],
)  # fmt: skip
def test_rank_of__names_variables_that_make_no_sense_and_the_way_out(environment, named):
    with pytest.raises(StudyError, match=r"--shard 1/1") as raised:
        rank_of(environment)
    assert all(name in str(raised.value) for name in named)


@pytest.mark.parametrize(
    ("given", "by"), [({"RANK": "3"}, STEP), ({"PMI_RANK": "3"}, OPEN_MPI), ({"RANK": "1"}, ARRAY)]
)
def test_rank_of__what_one_launcher_leaves_out_another_says(given, by):
    assert rank_of(given | by) == rank_of(by)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4", [4]), ("8(S:0-1)", [8]), ("2(x3),1", [2, 2, 2, 1]), ("72(x2)", [72, 72]), ("8(S:0,2-3),4(x2)", [8, 4, 4]),
     ("1, 2", [1, 2]), ("3(x2)(S:0-1)", [3, 3])],
)  # fmt: skip
def test_counts__reads_short_forms(text, expected):
    assert counts(text) == expected


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 9)), min_size=1, max_size=6))
def test_counts__reads_what_slurm_would_write(runs):
    text = ",".join(f"{n}(x{times})" if times > 1 else f"{n}" for n, times in runs)
    assert counts(text) == [n for n, times in runs for _ in range(times)]


@pytest.mark.parametrize("text", ["", ",", "2(x3", "2(x)", "x", "2,", "2(3)", "-2", "(x3)", "٣"])
def test_counts__refuses_other_texts(text):
    with pytest.raises(StudyError, match=r"2\(x3\),1"):
        counts(text)


@pytest.mark.parametrize(
    ("n_local", "n_own", "n_node", "per_task", "expected"),
    [
        (1, 8, 8, None, 8),
        (4, 8, 8, None, 2),  # not bound: they shard the node
        (4, 2, 8, None, 2),  # bound
        (3, 8, 8, None, 2),
        (16, 8, 8, None, 1),
        (1, 64, 4, None, 4),  # a job of 4 cores on a node of 64 that binds nothing
        (2, 64, 4, None, 2),
        (2, 64, 64, 4, 4),
        (2, 2, 64, 4, 2),  # told 4, but bound to 2
        (1, 8, 8, 0, 1),
    ],
)
def test_n_cores(n_local, n_own, n_node, per_task, expected):
    assert n_cores(Shard(0, 16, 0, n_local), n_own, n_node, per_task) == expected
    if n_local == 1:
        assert n_cores(None, n_own, n_node, per_task) == expected


@given(st.integers(1, 64), st.integers(1, 128), st.integers(1, 128))
def test_n_cores__processes_that_are_not_bound_never_use_more_than_there_are(n_local, n_own, n_node):
    found = n_cores(Shard(0, n_local, 0, n_local), n_own, n_node)
    assert 1 <= found <= max(1, n_own)
    assert found * n_local <= n_node or found == 1


def test_cores_here__is_what_the_system_and_slurm_allow():
    n_own = len(os.sched_getaffinity(0))
    assert cores_here(None, {}) == n_own
    assert cores_here(Shard(0, 2), {"SLURM_CPUS_PER_TASK": "1"}) == 1
    assert cores_here(Shard(0, 10_000, 0, 10_000), {}) == 1
    # a batch script of many tasks in which one process does everything
    assert cores_here(None, {"SLURM_CPUS_PER_TASK": "1", "SLURM_NTASKS": f"{n_own}"}) == n_own
    with pytest.raises(StudyError, match="SLURM_CPUS_PER_TASK"):
        cores_here(None, {"SLURM_CPUS_PER_TASK": "all"})


@pytest.mark.parametrize(
    ("n_local", "n_visible", "expected"),
    [
        (4, 4, [[0], [1], [2], [3]]),
        (4, 2, [[0], [1], [0], [1]]),
        (2, 4, [[0, 2], [1, 3]]),
        (3, 4, [[0, 3], [1], [2]]),
        (4, 1, [[0]] * 4),
        (4, 0, [[]] * 4),
        (1, 2, [[0, 1]]),
    ],
)
def test_gpus_of__each_process_takes_its_own_in_turn(n_local, n_visible, expected):
    assert [gpus_of(Shard(n, n_local, n, n_local), n_visible, {}) for n in range(n_local)] == expected


def test_gpus_of__takes_all_that_are_its_own():
    assert gpus_of(None, 4, {}) == [0, 1, 2, 3]
    assert gpus_of(Shard(1, 2, 1, 2), 2, {"SLURM_GPUS_PER_TASK": "2"}) == [0, 1]


@given(st.integers(1, 16), st.integers(1, 16))
def test_gpus_of__uses_every_gpu_nearly_as_often(n_local, n_visible):
    used = [gpu for n in range(n_local) for gpu in gpus_of(Shard(n, n_local, n, n_local), n_visible, {})]
    times = [used.count(gpu) for gpu in range(n_visible)]
    assert min(times) >= 1
    assert max(times) - min(times) <= 1
