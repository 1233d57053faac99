"""What a tracker is: it shows a run in an experiment tracker such as W&B; their registry, and names of metrics."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from layercrit.errors import TrackingError, first_line
from layercrit.foreign_text import encodable
from layercrit.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TRACKERS", "Tracker", "metric_of", "need", "plain_name", "tracker"]

_USUAL_RESET = "rerandomize"


class Tracker(ABC):
    """Shows a run in an experiment tracker. All methods are called by one thread, `begin` first and `end` last.

    The constructor takes nothing, imports the library, and raises TrackingError where it is missing (see `need`). Any
    other exception, of any method, is said once, and the run goes on.
    """

    @abstractmethod
    def begin(self, name: str, config: Mapping[str, Any], folder: Path) -> str | None:
        """Begin a run, or go on with the one that was begun in the same folder before.

        Args:
            name: of the study or the model.
            config: plain data, nested: the protocol, the models, the versions.
            folder: where files go that have no other place; it exists.

        Returns:
            where to look at it, in words; None: nothing is said.
        """

    def config(self, values: Mapping[str, Any]) -> None:  # noqa: B027, one of the methods that need no own version
        """Add to the configuration what became known later, such as the hash of the images."""

    @abstractmethod
    def cell(self, row: Mapping[str, Any]) -> None:
        """Log a cell that was measured just now; `metric_of` names it, ``row["trial"]`` is its step."""

    def progress(self, n_done: int, n_planned: int) -> None:  # noqa: B027
        """Log how many cells are done, of how many; called after one or more cells."""

    def result(  # noqa: B027
        self, summary: Mapping[str, float], layers: "pd.DataFrame", figures: Mapping[str, Path]
    ) -> None:
        """Log what a finished run found.

        Args:
            summary: name of a metric, such as ``mean_criticality/MODEL`` -> value.
            layers: a row for each model and layer.
            figures: name -> PNG file.
        """

    @abstractmethod
    def end(self, ok: bool) -> None:
        """End the run and send what is left; ``ok`` is False where an exception or a signal ended it."""


TRACKERS = Registry[type[Tracker]]("tracker", TrackingError, "layercrit.trackers")
"""All trackers by name, filled by `tracker` and by installed plug-ins."""


def tracker(name: str) -> Callable[[type[Tracker]], type[Tracker]]:
    """Return a decorator that registers a `Tracker` under a name, for ``--track NAME``.

    Raises:
        TrackingError: the name is taken.

    Examples:
        >>> import layercrit
        >>> from layercrit.trackers import Tracker, metric_of
        >>> @layercrit.tracker("printed")
        ... class Printed(Tracker):
        ...     '''Prints each cell.'''
        ...     def begin(self, name, config, folder):
        ...         print(name)
        ...     def cell(self, row):
        ...         print(metric_of(row), row["trial"], row["cosine"])
        ...     def end(self, ok):
        ...         print("done" if ok else "stopped")
    """

    def register(made: type[Tracker]) -> type[Tracker]:
        TRACKERS[name] = made
        return made

    return register


def need(module: str, packages: str, name: str) -> ModuleType:
    """Import a module that a tracker needs.

    Args:
        module: its name.
        packages: what pip would install, such as ``wandb``.
        name: of the tracker.

    Raises:
        TrackingError: it cannot be imported; the message says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise TrackingError(
            f"The tracker {name!r} needs {module}, which cannot be imported ({first_line(error)}). Run "
            f"`pip install {packages}`, or leave out --track {name}."
        ) from error


def metric_of(row: Mapping[str, Any], quantity: str = "criticality") -> str:
    """Return the name of a metric: ``QUANTITY/MODEL/LAYER``, or ``QUANTITY/MODEL`` where the row has no layer.

    A reset other than rerandomize is named behind that.
    """
    reset = None if row["reset"] == _USUAL_RESET else row["reset"]
    return str(encodable("/".join(filter(None, [quantity, row["model"], row.get("layer"), reset]))))


def plain_name(name: str, longest: int = 250) -> str:
    """Return a name of letters, digits and ``_./ -`` only; if that changes it, with a hash that keeps it unlike others.

    Args:
        name: of a metric.
        longest: characters of the result, at most.
    """
    parts = re.sub(r"[^\w./ -]", "-", name).split("/")
    plain = "/".join(part if part.strip(".") else "-" for part in parts)  # no part that is empty, '.' or '..'
    if plain == name and len(name) <= longest:
        return name
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: longest - 9]}-{mark}"
