"""Studies that trackers watch: the command in a process of its own, and trackers for tests."""

import os
import socket
import threading

from forked import layercrit
from layercrit.study import running
from layercrit.trackers import TRACKERS, Tracker, tracker
from running_jobs import Inline

_PREFIXES = ("WANDB_", "MLFLOW_", "TRACKIO_")


def measure_here():
    running.LocalProcesses = lambda places: Inline()


def track(path, out, *names, command=("study", "run"), options=(), **variables):
    """Run a study file with trackers as the command does, but measure in its own process; no variable of the user's."""
    home = out.parent / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIXES)}
    own = {"HOME": str(home), "NETRC": str(home / "netrc"), "MLFLOW_DISABLE_TELEMETRY": "true"}
    arguments = [*command, str(path), "--out", str(out), *options]
    arguments += [part for name in names for part in ("--track", name)]
    cwd = out.parent / "cwd"
    cwd.mkdir(exist_ok=True)
    return layercrit(*arguments, cwd=cwd, env=kept | own | variables, prepare=measure_here)


class Server:
    """A server on loopback that takes connections and never answers; counts them."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.connections = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                self.connections.append(self._socket.accept())
            except OSError:
                return

    def close(self):
        self._socket.close()
        for connection, _ in self.connections:
            connection.close()


class Recorded(Tracker):
    """Keeps its calls in a list of the class."""

    calls: list = []  # noqa: RUF012, emptied by the fixture

    def begin(self, name, config, folder):
        self.calls.append(("begin", name, config, folder))
        return "in a list"

    def config(self, values):
        self.calls.append(("config", values))

    def cell(self, row):
        self.calls.append(("cell", row))

    def progress(self, n_done, n_planned):
        self.calls.append(("progress", n_done, n_planned))

    def result(self, summary, layers, figures):
        self.calls.append(("result", summary, layers, figures))

    def end(self, ok):
        self.calls.append(("end", ok))


class Failing(Recorded):
    """Raises in every method but `begin`."""

    def _fail(self, *_):
        self.calls.append("failed")
        raise OSError(28, "No space left on device")

    config = cell = progress = result = end = _fail


class Gone(Failing):
    """Raises in every method."""

    begin = Failing._fail


class Minimal(Tracker):
    """Has nothing but what it must have."""

    def begin(self, name, config, folder):
        return None

    def cell(self, row):
        pass

    def end(self, ok):
        pass


def register():
    """Register the trackers above; return a function that takes them out again."""
    made = {"recorded": Recorded, "failing": Failing, "gone": Gone, "minimal": Minimal}
    for name, one in made.items():
        tracker(name)(one)
        one.calls = []

    def forget():
        for name in made:
            TRACKERS.pop(name)

    return forget
