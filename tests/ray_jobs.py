"""A Ray cluster of two nodes on this machine, for tests, and what processes outside of it do."""

import contextlib
import os
import socket
import tempfile
import time
from pathlib import Path

HOSTS = ("127.0.0.2", "127.0.0.3")  # Ray takes 127.0.0.1 for the machine's other address
STORE = 80_000_000  # bytes; the least that Ray allows is a little less


def free_port(host):
    """Return a port that is free, and not 52365, which Ray's dashboard claims although there is none."""
    with socket.socket() as one, socket.socket() as other:
        one.bind((host, 0))
        other.bind((host, 0))
        return next(port for _, port in (one.getsockname(), other.getsockname()) if port != 52365)


@contextlib.contextmanager
def two_nodes():
    """A cluster with a CPU on each of two nodes, and the address of Ray Client."""
    from ray.cluster_utils import Cluster

    Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray").mkdir(parents=True, exist_ok=True)  # Ray notes the address there
    port = free_port(HOSTS[0])
    folder = tempfile.mkdtemp(prefix="lr", dir="/tmp")  # paths of sockets must be short
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": STORE,
            "include_dashboard": False,
            "ray_client_server_port": port,
            "node_ip_address": HOSTS[0],
            "temp_dir": folder,
        },
    )
    try:
        add_node(cluster)
        cluster.wait_for_nodes()
        cluster.client_address = f"ray://{HOSTS[0]}:{port}"
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster, **settings):
    return cluster.add_node(num_cpus=1, object_store_memory=STORE, node_ip_address=HOSTS[1], **settings)


def run_aloud(address, n_workers=2):
    """Be a driver in a process of its own: print the workers' ids, which stay at work."""
    import executor_jobs as jobs
    from layercrit.study.executors import Message
    from layercrit.study.ray_workers import RayWorkers

    tasks = [jobs.task(f"{number}", jobs.say_pid_and_sleep) for number in range(n_workers)]
    for event in RayWorkers(address, n_workers=n_workers, device="cpu").run(tasks, jobs.start):
        if isinstance(event, Message):  # and no note that Ray waits for room
            print(event.content, flush=True)


# tasks


def start_with(pixels, place):
    """Say whose memory a large array is, and on which node the worker is."""

    def work(task):
        import ray

        base = pixels
        while getattr(base, "base", None) is not None:
            base = base.base
        yield {
            "owns": pixels.flags.owndata,
            "writeable": pixels.flags.writeable,
            "sum": int(pixels.sum()),
            "base": type(base).__name__,
            "rss_shared": shared_memory(),
            "place": place,
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
        }

    return work


def shared_memory():
    """Bytes of this process in memory: its own, and those that it shares with others."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShm"))}


def say_node(folder, seconds):
    """Say on which node this runs, wait until a task has begun on another one too, and work for a while."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    (folder / node).write_text("")
    yield node, os.getpid()
    deadline = time.monotonic() + 90
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError("no task has begun on another node")
        time.sleep(0.05)
    time.sleep(seconds)
    yield "end"
