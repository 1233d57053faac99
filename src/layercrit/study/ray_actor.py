"""What an actor on a Ray cluster does: it starts as any worker, and answers each call with a step of its task."""

import contextlib
import importlib
import os
import pickle
import platform
import traceback
from typing import Any

from layercrit.study.executors import Error, Place, Work, error_text, steps
from layercrit.study.ray_cluster import sees

__all__ = ["Served"]


class Served:
    """What an actor does.

    Args:
        folder: the current directory of the process that runs the study, which is that of the actor if it is there.
        token: path and content of a file that the node should see, if it matters.
    """

    def __init__(self, folder: str, token: dict[str, str] | None) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._folder, self._is_blind = folder, not sees(token)
        self._node: str = importlib.import_module("ray").get_runtime_context().get_node_id()

    def begin(self, start: list[Any], place: Place) -> str | bytes:
        """Start; return the node's id, or what went wrong, pickled."""
        data, *buffers = start
        try:
            self._work: Work = pickle.loads(data, buffers=buffers)(place)  # noqa: S301 - written by our own process
        except Exception as error:
            return pickle.dumps(Error(self._explain(error), traceback.format_exc(), is_last=True))
        return self._node

    def do(self, task: bytes) -> bytes:
        """Begin a task; return what is said first, pickled."""
        self._steps = steps(self._work, task, self._explain)
        return self.step(None)

    def step(self, answer: bytes | None) -> bytes:
        """Go on with the task; return what is said next, pickled."""
        return pickle.dumps(self._steps.send(answer))

    def _explain(self, error: Exception) -> str:
        text = error_text(error)
        if self._is_blind:
            text += f" (This was on the node {platform.node()}, whose file system is not that of the study's folder.)"
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ModuleNotFoundError):
            cause = cause.__cause__
        if cause is not None:
            text += (
                f" (This was on the node {platform.node()} of a Ray cluster, where modules must be importable: put "
                f"{self._folder} on a file system that the nodes see, install the module there, start the nodes with "
                "PYTHONPATH, or start this run by `ray job submit --working-dir`.)"
            )
        return text
