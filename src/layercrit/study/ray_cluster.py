"""A Ray cluster: connecting to it, what its nodes have, and whether they can do what this process would."""

import contextlib
import importlib
import os
import re
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from layercrit.errors import ProtocolError, StudyError, first_line
from layercrit.machine import versions

__all__ = [
    "Inspection",
    "Node",
    "Share",
    "Token",
    "cause_of",
    "check_reachable",
    "connected",
    "import_ray",
    "nodes_of",
    "search_path",
    "sees",
    "shares",
    "token_in",
]

_PATIENCE = 5.0  # seconds for a server to answer a first word
_NODE_PATIENCE = 120.0  # seconds for nodes to start a process, which a shared file system may make slow
_CLIENT_PORT = 10001
_MUST_AGREE = ("layercrit", "torch")
# Read when ray is imported. Ray would print words of its nodes on stdout, where results are; pack the working directory
# of a process begun by `uv run` and send it; and try a wrong address for most of a minute.
_SETTINGS = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "2",
}
_WAYS_OUT = (
    "Start one with `ray start --head`, name one with `--on ray://HOST:10001` (Ray Client's port on its head node), or "
    "leave out --on to use this machine."
)


@dataclass(frozen=True)
class Token:
    """A file written where the nodes of a cluster should see it.

    Attributes:
        path: the file.
        content: what is in it, different each time.
    """

    path: str
    content: str


@dataclass(frozen=True)
class Node:
    """A node of a cluster.

    Attributes:
        id: Ray's name of it.
        name: host and address, for readers.
        resources: name -> how much it has, such as ``CPU`` and ``GPU``.
    """

    id: str
    name: str
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Share:
    """What a worker gets of a node."""

    n_gpus: int
    n_cpus: int


def import_ray() -> Any:
    """Import ray, which stays quiet.

    Raises:
        StudyError: it is not installed.
    """
    given = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ |= {name: value for name, value in _SETTINGS.items() if given[name] is None}
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.util.client.worker")
    except ImportError as error:
        raise StudyError(
            f"Ray cannot be imported ({error}). Install it: pip install 'layercrit[ray]'. Or leave out --on to use "
            "this machine."
        ) from error
    finally:
        for name in (name for name in _SETTINGS if given[name] is None):
            os.environ.pop(name, None)
    return ray


def check_reachable(address: str | None) -> None:
    """Find out in seconds that there is no cluster, where Ray would try for minutes.

    Args:
        address: ``ray://HOST:PORT``, or ``HOST:PORT`` of the cluster itself; None: ``RAY_ADDRESS``, or the cluster
            that runs on this machine.

    Raises:
        StudyError: there is none.
    """
    address = address or _address_found_by_ray()
    if address is None:  # Ray will know
        return
    is_client = address.startswith("ray://")
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except OSError as error:
        raise StudyError(f"No Ray cluster answers at {address} ({error.strerror or error}). {_WAYS_OUT}") from error
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    found = _what_answers(host, port)
    if found == "nothing":
        raise StudyError(f"What listens at {address} is no Ray cluster. {_WAYS_OUT}")
    if is_client and found == "cluster":
        raise StudyError(
            f"{address} is the port at which nodes join the cluster, not that of Ray Client. Use ray://{host}:"
            f"{_CLIENT_PORT} (or what `ray start --ray-client-server-port` says); on a node of the cluster, --on ray."
        )
    if not is_client and found == "client":
        raise StudyError(f"{address} is the port of Ray Client: use --on ray://{host}:{port}.")


def _address_found_by_ray() -> str | None:
    try:
        services = importlib.import_module("ray._private.services")
        address: str = services.get_ray_address_from_environment("auto", None)
    except ConnectionError as error:
        raise StudyError(f"No Ray cluster runs on this machine, and RAY_ADDRESS names none. {_WAYS_OUT}") from error
    except (ImportError, AttributeError, TypeError):  # another version of Ray looks elsewhere
        return None
    return address


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or (port is None and not address.startswith("ray://")):
        raise StudyError(f"{address!r} is no address of a Ray cluster; expected ray://HOST:PORT. {_WAYS_OUT}")
    return host, port or _CLIENT_PORT


def _what_answers(host: str, port: int) -> str:
    """Return whether a cluster, its client server or nothing of Ray answers; "something" where that is not sure."""
    grpc = importlib.import_module("grpc")
    asked = {"client": "/ray.rpc.RayletDriver/ClusterInfo", "cluster": "/ray.rpc.NodeInfoGcsService/CheckAlive"}
    answers, codes = [], grpc.StatusCode
    no_such_client = (codes.NOT_FOUND, codes.FAILED_PRECONDITION, codes.UNKNOWN)
    with grpc.insecure_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") as channel:
        for name, method in asked.items():
            try:
                channel.unary_unary(method)(b"", timeout=_PATIENCE)
            except grpc.RpcError as error:
                if error.code() in no_such_client:  # it knows the question
                    return name
                answers.append(error.code())
            else:
                return name
    silent = (codes.UNAVAILABLE, codes.DEADLINE_EXCEEDED)
    return "nothing" if all(code in silent for code in answers) else "something"


@contextlib.contextmanager
def connected(ray: Any, address: str | None) -> Iterator[None]:
    """Be connected to a cluster; a connection that the program made itself is used, and left as it is.

    Raises:
        StudyError: there is none, or it has another version of Python or Ray.
    """
    if ray.is_initialized():
        yield
        return
    check_reachable(address)
    try:
        _join(ray, address)
    except Exception as error:  # ConnectionError, RuntimeError, errors of gRPC: they differ by what is wrong
        ray.shutdown()
        where = address or os.environ.get("RAY_ADDRESS") or "on this machine"
        text = " ".join(str(error).split())
        raise StudyError(f"The Ray cluster {where} cannot be joined: {text[:400]}. {_WAYS_OUT}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _join(ray: Any, address: str | None) -> None:
    """Connect, at the second attempt where the server that Ray Client forks for each client did not come up."""
    settings = {"address": address or "auto", "log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(**settings)
    except ConnectionAbortedError:
        ray.shutdown()
        ray.init(**settings)


def nodes_of(ray: Any) -> list[Node]:
    """Return the living nodes."""
    return [
        Node(node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def shares(nodes: Sequence[Node], n_workers: int | None, device: str) -> tuple[int, Share]:
    """Divide a cluster among workers of one kind.

    Args:
        nodes: its nodes.
        n_workers: how many; None: one for each GPU, or, where GPUs are not used, as many as fill all nodes when each
            has as many CPUs as the smallest node.
        device: ``cuda`` asks for GPUs, ``auto`` for GPUs if there are any; any other device for CPUs only.

    Returns:
        how many workers, which may be more than find room now, and what each gets.

    Raises:
        ProtocolError: the device is a GPU and no node has one.
    """
    cpus = [int(node.resources.get("CPU", 0)) for node in nodes]
    gpus = [int(node.resources.get("GPU", 0)) for node in nodes]
    if device == "cuda" or (device == "auto" and any(gpus)):
        if not any(gpus) and n_workers is None:
            raise ProtocolError(
                "The device is 'cuda', but no node of the Ray cluster has a GPU. Use 'cpu', or 'auto' for whatever "
                "there is, or say with --workers for how many GPUs to wait."
            )
        return n_workers or sum(gpus), Share(1, min((c // g for c, g in zip(cpus, gpus, strict=True) if g), default=1))
    with_cpus = [n for n in cpus if n] or [1]
    if n_workers is None:
        n_cpus = min(with_cpus)
        return sum(n // n_cpus for n in with_cpus), Share(0, n_cpus)
    fitting = (n for n in range(max(with_cpus), 0, -1) if sum(have // n for have in with_cpus) >= n_workers)
    return n_workers, Share(0, next(fitting, 1))


@contextlib.contextmanager
def token_in(folder: Path | None) -> Iterator[Token | None]:
    """Keep a file in a folder, for nodes to look whether they see it."""
    if folder is None:
        yield None
        return
    content = secrets.token_hex(16)
    token = Token(str(folder / f".seen_by_nodes-{content[:8]}"), content)
    path = Path(token.path)
    path.write_text(token.content, encoding="ascii")
    try:
        yield token
    finally:
        path.unlink(missing_ok=True)


def sees(token: Mapping[str, str] | None) -> bool:
    """Return whether the file of a `Token`, given as a mapping, is seen here."""
    if token is None:
        return True
    try:
        return Path(token["path"]).read_text(encoding="ascii") == token["content"]
    except (OSError, UnicodeDecodeError):
        return False


def search_path() -> list[str]:
    """Return where this process finds modules, the current directory first."""
    return list(dict.fromkeys([str(Path.cwd()), *(str(Path(entry).absolute()) for entry in sys.path)]))


class Inspection:
    """What nodes said of themselves.

    Attributes:
        blind: names of nodes that do not see the files of this machine.
    """

    def __init__(self, ray: Any, token: Token | None) -> None:
        self.blind: list[str] = []
        self._ray, self._token = ray, token
        self._seen: set[str] = set()

    def look_at(self, nodes: Sequence[Node]) -> list[str]:
        """Look at nodes that were not looked at before, and return what the user should know of them.

        Raises:
            StudyError: nodes have other versions of what numbers depend on; all are listed.
        """
        new = {node.id: node for node in nodes if node.id not in self._seen}
        wrong, notes = [], []
        for id_, said in self._ask(new).items():
            self._seen.add(id_)
            refused, other = _differences(said["versions"], versions())
            if refused:
                wrong.append(f"{new[id_].name} has {', '.join(refused)}")
            elif other:
                notes.append(f"{new[id_].name} has other versions than this machine: {', '.join(other)}")
            if not said["sees"]:
                self.blind.append(new[id_].name)
        if wrong:
            raise StudyError(
                f"Nodes of the Ray cluster differ from this machine, so their numbers could differ: {'; '.join(wrong)}."
                " Install the same versions there and here, then run the same command again."
            )
        return notes

    def _ask(self, nodes: Mapping[str, Node]) -> dict[str, dict[str, Any]]:
        """Return what each node answers; one that is lost meanwhile, or not free to answer, is looked at later."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        ask = self._ray.remote(_inquiry())
        names = [name for name in versions() if name != "python"]
        asked = {}
        for id_ in nodes:
            there = strategies.NodeAffinitySchedulingStrategy(id_, soft=False)
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
            asked[ask.options(**options).remote(names, search_path(), self._token and vars(self._token))] = id_
        if not asked:
            return {}
        answered, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=_NODE_PATIENCE)
        answers = {}
        for reference in answered:
            with contextlib.suppress(self._ray.exceptions.RayError):
                answers[asked[reference]] = self._ray.get(reference)
        return answers


def _inquiry() -> Callable[[list[str], list[str], dict[str, str] | None], dict[str, Any]]:
    """Return what is asked of a node: a function within one, so that Ray sends its code, not its name."""

    def ask(names: list[str], path: list[str], token: dict[str, str] | None) -> dict[str, Any]:
        import contextlib
        import platform
        import sys
        from importlib import metadata
        from pathlib import Path

        sys.path.extend(entry for entry in path if entry not in sys.path and Path(entry).exists())
        found = {"python": platform.python_version()}
        for name in names:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
        try:
            sees = token is None or Path(token["path"]).read_text(encoding="ascii") == token["content"]
        except (OSError, UnicodeDecodeError):
            sees = False
        return {"versions": found, "sees": sees}

    return ask


def _differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return differences of versions in words: those that are refused, and others."""
    refused: list[str] = []
    other: list[str] = []
    for name, version in ours.items():
        found = theirs.get(name)
        if name == "python":
            if (found or "").split(".")[:2] != version.split(".")[:2]:
                refused.append(f"python {found} (here {version})")
        elif found is None or _public(found) != _public(version):
            text = f"{name} {found} (here {version})" if found else f"no {name} (here {version})"
            (refused if name in _MUST_AGREE else other).append(text)
    return refused, other


def _public(version: str) -> str:
    """Return a version without what says for which device it was built."""
    return version.partition("+")[0]


def cause_of(error: Exception) -> str:
    """Return in a few words how a worker was lost, from Ray's own text."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if "NodeDied" in kind or "node has died" in text:
        return "its node was lost"
    if "OutOfMemory" in kind or "running low on memory" in text:
        return "out of memory"
    code = re.search(r"\bexit code (\d+)", text)
    if code:
        return f"exit code {code[1]}"
    return "killed or crashed" if "process has died" in text else first_line(error)
