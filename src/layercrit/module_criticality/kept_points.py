"""Points of the grid that a search has evaluated, in a file, so that an interrupted one goes on."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layercrit.errors import LayercritError
from layercrit.foreign_files import read_json
from layercrit.locks import write_whole
from layercrit.path_search import Excess, Point

__all__ = ["KeptPoints"]


class KeptPoints:
    """The points of one measurement; the file keeps those of others, such as ones with other settings, as they are.

    Attributes:
        known: module -> the points that were evaluated.

    Args:
        path: of the file; its folder is made.
        of: what identifies the measurement, as plain data.
    """

    def __init__(self, path: str | Path, of: Mapping[str, Any]) -> None:
        self._path, self._of = Path(path).expanduser(), json.loads(json.dumps(of))
        self.known: dict[str, dict[Point, Excess]] = {}
        self._others: list[Any] = []
        try:
            measurements = list(read_json(self._path)["measurements"])
            self._others = [one for one in measurements if one["of"] != self._of]
            for own in (one["points"] for one in measurements if one["of"] == self._of):
                self.known = {
                    str(name): {(int(a), int(s)): Excess(*map(float, excess)) for a, s, *excess in rows}
                    for name, rows in own.items()
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            self.known = {}  # none are kept, or the file is damaged: they are evaluated anew

    def add(self, found: Iterable[tuple[str, Point, Excess]]) -> None:
        """Keep further points.

        Raises:
            LayercritError: the file cannot be written.
        """
        for name, point, excess in found:
            self.known.setdefault(name, {})[point] = excess
        points = {
            name: [[*point, excess.mean, excess.low, excess.high] for point, excess in own.items()]
            for name, own in self.known.items()
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            measurements = [*self._others, {"of": self._of, "points": points}]
            write_whole(self._path, json.dumps({"measurements": measurements}))
        except OSError as error:
            raise LayercritError(
                f"What was evaluated of the grid cannot be kept in {self._path} ({error.strerror or error}). Free some "
                "space or name another folder (--out)."
            ) from error
