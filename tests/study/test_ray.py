"""Studies on a Ray cluster of two nodes on this machine; in a file of its own process, as starting one takes long."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock

import executor_jobs as jobs
import ray_jobs
from forked import forked_workers, layercrit
from layercrit.errors import LayercritError, ProtocolError, StudyError
from layercrit.study import ray_cluster
from layercrit.study.executors import Failed, Finished, Message, Note, Place, Task, executor_on
from layercrit.study.file import read_study_file
from layercrit.study.local_processes import LocalProcesses
from layercrit.study.ray_cluster import Node, Share, shares
from layercrit.study.ray_workers import RayWorkers
from layercrit.study.running import run_study
from running_jobs import assert_same_tables, is_running, tables, write_small

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so; else its workers wait beside other tests
pytest.importorskip("ray", reason="ray is not installed: pip install 'layercrit[ray]'")
pytestmark = pytest.mark.xdist_group("ray")
TESTS = Path(__file__).parents[1]
WITH_TESTS = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "30",  # not ours, which is short for a busy machine
}
needs_cluster = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    ray_cluster.import_ray()  # with our settings, before anything else does
    lock = FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock")  # other processes of pytest-xdist wait
    with lock, ray_jobs.two_nodes() as cluster:
        yield cluster


def workers(cluster, **settings):
    return RayWorkers(cluster.address, device="cpu", **settings)


def contents(events, name):
    return [event.content for event in events if isinstance(event, Message) and event.task.name == name]


def ends(events):
    return {event.task.name: event for event in events if isinstance(event, Finished | Failed)}


# without a cluster


@pytest.mark.parametrize(
    ("resources", "n_workers", "device", "expected"),
    [
        ([{"CPU": 8}, {"CPU": 8}], None, "cpu", (2, Share(0, 8))),
        ([{"CPU": 4}, {"CPU": 16}], None, "auto", (5, Share(0, 4))),
        ([{"CPU": 8}, {"CPU": 8}], 4, "cpu", (4, Share(0, 4))),
        ([{"CPU": 4}, {"CPU": 16}], 2, "cpu", (2, Share(0, 8))),
        ([{"CPU": 2}], 5, "cpu", (5, Share(0, 1))),
        ([{}, {"CPU": 6}], None, "cpu", (1, Share(0, 6))),
        ([], None, "cpu", (1, Share(0, 1))),
        ([{"CPU": 8, "GPU": 4}, {"CPU": 64}], None, "auto", (4, Share(1, 2))),
        ([{"CPU": 8, "GPU": 4}, {"CPU": 6, "GPU": 6}], None, "cuda", (10, Share(1, 1))),
        ([{"CPU": 8, "GPU": 4}], 2, "cpu", (2, Share(0, 4))),
        ([{"CPU": 8}], 3, "cuda", (3, Share(1, 1))),
    ],
)
def test_shares__divide_gpus_and_cpus(resources, n_workers, device, expected):
    nodes = [Node(f"{number}", f"{number}", have) for number, have in enumerate(resources)]
    assert shares(nodes, n_workers, device) == expected


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: shares([Node("a", "a", {"CPU": 4})], None, "cuda"), ProtocolError),
        (lambda: RayWorkers(n_workers=0), ProtocolError),
        (lambda: RayWorkers(attempts=0), ProtocolError),
        (lambda: RayWorkers(device="cuda:1"), ProtocolError),
        (lambda: executor_on("ray:x", None, Path(), None), StudyError),
        (lambda: RayWorkers("ray://"), StudyError),
        (lambda: RayWorkers("ray://127.0.0.1:99999"), StudyError),
    ],
    ids=["no gpu", "no worker", "no attempt", "gpu of one machine", "nowhere", "no host", "no port"],
)
def test_errors__are_raised_before_anything_is_begun(call, error):
    with pytest.raises(error):
        call()


@pytest.mark.parametrize("kind", ["ray://", ""])
def test_no_cluster__a_closed_port_is_refused_at_once(kind):
    began = time.monotonic()
    with pytest.raises(StudyError, match="ray start --head"):
        RayWorkers(f"{kind}127.0.0.1:{ray_jobs.free_port('127.0.0.1')}")
    assert time.monotonic() - began < 15


def test_no_cluster__another_service_is_refused_in_seconds():
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        with pytest.raises(StudyError, match="no Ray cluster"):
            RayWorkers(f"ray://127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - began < 15


def test_no_cluster__an_address_of_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{ray_jobs.free_port('127.0.0.1')}")
    with pytest.raises(StudyError, match="ray start --head"):
        RayWorkers()


def test_no_ray__its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StudyError, match=r"pip install 'layercrit\[ray\]'"):
        RayWorkers()


@pytest.mark.parametrize("n_failures", [1, 2])
def test_connected__a_server_of_ray_client_that_did_not_come_up(n_failures, monkeypatch):
    done = []

    def init(**settings):
        done.append(settings["address"])
        if done.count(settings["address"]) <= n_failures:
            raise ConnectionAbortedError("Initialization failure from server: Starting Ray client server failed.")

    monkeypatch.setattr(ray_cluster, "check_reachable", lambda address: None)
    ray = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: done.append("shutdown"))
    refused = pytest.raises(StudyError, match="cannot be joined: Initialization failure")
    with refused if n_failures == 2 else contextlib.nullcontext(), ray_cluster.connected(ray, "ray://here:1"):
        pass
    assert done == ["ray://here:1", "shutdown", "ray://here:1", "shutdown"]


@pytest.mark.parametrize(
    ("theirs", "refused"),
    [
        ({}, False),
        ({"torch": "1.0"}, True),
        ({"layercrit": "99"}, True),
        ({"python": "2.7.1"}, True),
        ({"torch": None}, True),
        ({"numpy": "1.0"}, False),
        ({"torch": "2.0+cpu"}, False),
        ({"python": "3.11.99"}, False),
    ],
)
def test_differences__of_versions_that_numbers_depend_on_are_refused(theirs, refused):
    ours = {"python": "3.11.7", "layercrit": "1", "torch": "2.0+cu128", "numpy": "2.0"}
    found = {name: version for name, version in (ours | theirs).items() if version is not None}
    assert bool(ray_cluster._differences(found, ours)[0]) == refused


# on the cluster


@needs_cluster
def test_run__as_local_processes_do(cluster, tmp_path):
    tasks = [
        jobs.task("say", jobs.say, 1, 2, 3),
        jobs.task("bad", jobs.raise_after, ValueError("three\nlines"), 1),
        jobs.task("unpicklable", jobs.Unpicklable()),
        jobs.task("unreadable", jobs.say, jobs.UnreadableInWorker()),
        jobs.task("lock", jobs.say_unpicklable),
        jobs.task("deadly", jobs.die, tmp_path / "log", signal.SIGKILL, "last words"),
        jobs.task("weak", jobs.die_at_first, tmp_path / "weak", 1, "one"),
        jobs.task("large", jobs.say, b"x" * 3_000_000, affinity="other"),
    ]
    happening = workers(cluster, attempts=2).run(tasks, jobs.start)
    events = [event for event in happening if not isinstance(event, Note)]
    assert sorted(e.task.name for e in events if not isinstance(e, Message)) == sorted(task.name for task in tasks)
    assert {name for name, end in ends(events).items() if isinstance(end, Finished)} == {"say", "weak", "large"}
    assert contents(events, "say") == [1, 2, 3]
    assert contents(events, "weak") == ["one", "one"]
    assert len(contents(events, "large")[0]) == 3_000_000
    assert ends(events)["bad"].error == "ValueError: three\nlines"
    assert "in raise_after" in ends(events)["bad"].details
    assert "died 2 times" in ends(events)["deadly"].error
    assert len(set((tmp_path / "log").read_text().split())) == 2, "not in two workers"


@needs_cluster
def test_run__workers_share_the_pixels_of_their_node(cluster):
    pixels = np.arange(20_000_000, dtype=np.uint8)
    tasks = [Task(f"{number}", f"{number}", None) for number in range(2)]
    events = list(workers(cluster).run(tasks, functools.partial(ray_jobs.start_with, pixels)))
    said = [event.content for event in events if isinstance(event, Message)]
    assert len(said) == 2
    for one in said:
        assert one["sum"] == int(pixels.sum())
        assert not one["owns"]
        assert not one["writeable"], "memory of its own"
        assert one["place"] == Place("cpu", 1)


@needs_cluster
def test_study__has_the_tables_of_local_processes(cluster, tmp_path):
    path = write_small(tmp_path)
    study = read_study_file(path)
    with forked_workers():
        run_study(study, tmp_path / "local", progress=False, executor=LocalProcesses([Place("cpu", 1)]))
    report = run_study(study, tmp_path / "ray", progress=False, executor=workers(cluster, folder=tmp_path / "ray"))
    settings = ["--out", tmp_path / "outside", "--workers", "2", "--on", cluster.client_address, "--json"]
    outside = layercrit("study", "run", path, *settings, cwd=tmp_path, env=WITH_TESTS)
    assert not report.failures
    assert outside.returncode == 0, outside.stderr
    expected = tables(tmp_path / "local")
    assert_same_tables(tables(tmp_path / "ray"), expected)
    assert_same_tables(tables(tmp_path / "outside"), expected)
    assert outside.stdout.startswith("{"), "Ray prints where results are"
    assert not list((tmp_path / "ray").glob(".seen*"))


@needs_cluster
def test_run__a_node_lost_in_the_middle(cluster, tmp_path):
    tasks = [jobs.task(f"{i}", ray_jobs.say_node, tmp_path, 0.5, affinity=f"{i % 2}") for i in range(8)]
    victim = cluster.list_all_nodes()[-1]
    events = []
    try:
        for event in workers(cluster).run(tasks, jobs.start):
            events.append(event)
            of_nodes = {e.content[0] for e in events if isinstance(e, Message) and e.content != "end"}
            if victim is not None and len(of_nodes) == 2:
                cluster.remove_node(victim, allow_graceful=False)
                victim = None
    finally:
        ray_jobs.add_node(cluster)
        cluster.wait_for_nodes()
    assert victim is None, "never two nodes at work"
    assert {name for name, end in ends(events).items() if isinstance(end, Finished)} == {task.name for task in tasks}


@needs_cluster
@pytest.mark.parametrize("how", ["close", "kill the driver"])
def test_run__no_actor_is_left(cluster, how):
    if how == "close":
        tasks = [jobs.task(f"{number}", jobs.say_pid_and_sleep) for number in range(2)]
        happening = workers(cluster).run(tasks, jobs.start)
        pids = [next(e.content for e in happening if isinstance(e, Message)) for _ in range(2)]
        happening.close()
    else:
        code = f"import ray_jobs; ray_jobs.run_aloud({cluster.address!r})"
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, env=WITH_TESTS, stdout=subprocess.PIPE, text=True) as driver:
            pids = [int(driver.stdout.readline()) for _ in range(2)]
            assert all(map(is_running, pids))
            driver.kill()
    deadline = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, pids))


@needs_cluster
def test_run__a_node_of_other_versions_is_refused(cluster, tmp_path):
    for name in ("torch", "layercrit"):
        (tmp_path / f"{name}-0.0.1.dist-info").mkdir()
        (tmp_path / f"{name}-0.0.1.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n"
        )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    node = ray_jobs.add_node(cluster, env_vars={"PYTHONPATH": path})
    try:
        cluster.wait_for_nodes()
        with pytest.raises(StudyError, match=r"127\.0\.0\.3.* has layercrit 0\.0\.1 .*, torch 0\.0\.1"):
            list(workers(cluster).run([jobs.task("a", jobs.say)], jobs.start))
    finally:
        cluster.remove_node(node)


@needs_cluster
def test_run__nodes_that_do_not_see_the_folder(cluster, tmp_path, monkeypatch):
    unseen = contextlib.contextmanager(lambda folder: iter([ray_cluster.Token("/nowhere/token", "x")]))
    monkeypatch.setattr("layercrit.study.ray_workers.token_in", unseen)
    executor = workers(cluster, folder=tmp_path, in_files=["m0"])
    tasks = [jobs.task("a", jobs.raise_after, FileNotFoundError("m0.safetensors"))]
    events = list(executor.run(tasks, jobs.start))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == 1
    assert notes[0].startswith("warning: ")
    assert "m0" in notes[0]
    assert "whose file system is not that" in ends(events)["a"].error


@needs_cluster
def test_no_cluster__the_port_of_the_cluster_is_not_that_of_the_client(cluster):
    with pytest.raises(LayercritError, match="not that of Ray Client"):
        RayWorkers(f"ray://{cluster.address}")
    with pytest.raises(LayercritError, match="port of Ray Client"):
        RayWorkers(cluster.client_address.removeprefix("ray://"))
