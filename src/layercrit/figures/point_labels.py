"""Where to put the labels of points such that they cover neither each other nor the points."""

import numpy as np
import numpy.typing as npt

__all__ = ["label_places"]

Array = npt.NDArray[np.float64]

_RINGS = (3.0, 9.0, 15.0, 23.0, 32.0, 44.0, 58.0)  # how far from its point a label may be
_WITHOUT_LINE = 1  # rings so near that a line to the point is not needed
_WAYS = np.array(
    [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1),
     (1, 0.5), (-1, 0.5), (1, -0.5), (-1, -0.5), (0.5, 1), (-0.5, 1), (0.5, -1), (-0.5, -1)]
)  # fmt: skip
_SWEEPS = 8
_STEPS = np.linspace(0.05, 1, 20)  # where lines are looked at
_CLEARANCE = 2.0  # around the points of others
# Costs, in units of covered area.
_OUTSIDE, _CROSSING, _FARTHER, _WORSE_WAY = 100.0, 20.0, 0.6, 0.02


def label_places(points: Array, boxes: Array, size: Array, marker: float) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return the middles of labels, ``(n_labels, 2)``, and which need a line to their point, ``(n_labels,)``.

    One label after the other takes the best place around its point, given the labels placed so far; then each may move
    again, given all others. The best of four orders counts: from each side to the opposite one. Nothing is random.

    Args:
        points: ``(n_labels, 2)``, all lengths in one unit such as points of 1/72 inch.
        boxes: widths and heights of the labels, ``(n_labels, 2)``.
        size: width and height of the area, ``(2,)``; its lower left corner is (0, 0).
        marker: width of a point.
    """
    middles, far = _candidates(points, boxes, marker)  # (n_labels, n_places, 2), (n_places,)
    lines = points[:, None, None] + _STEPS[:, None] * (middles - points[:, None])[:, :, None]
    own = np.abs(lines - middles[:, :, None]) < boxes[:, None, None] / 2
    lines[own.all(axis=-1) | ~far[:, None]] = np.nan  # (n_labels, n_places, n_steps, 2); NaN is in no box
    alone = _costs_alone(points, boxes, size, marker, middles, lines)
    best, least = [0] * len(points), np.inf
    for side in (-points[:, 1], points[:, 1], points[:, 0], -points[:, 0]):
        chosen: dict[int, int] = {}
        for _ in range(_SWEEPS):
            before, total = dict(chosen), 0.0
            for index in np.argsort(side, kind="stable").tolist():
                costs = alone[index] + _costs_of_others(index, chosen, middles, boxes, lines)
                chosen[index] = int(costs.argmin())
                total += float(costs.min())
            if chosen == before:
                break
        if total < least:
            best, least = [chosen[index] for index in range(len(points))], total
    return middles[np.arange(len(points)), best], far[best]


def _costs_alone(points: Array, boxes: Array, size: Array, marker: float, middles: Array, lines: Array) -> Array:
    """Return how bad each place of each label is, whatever the other labels do, ``(n_labels, n_places)``."""
    n_labels, n_places, _ = middles.shape
    half = boxes[:, None] / 2
    beyond = np.maximum(half - middles, 0) + np.maximum(middles + half - size, 0)
    ring, way = np.divmod(np.arange(n_places), len(_WAYS))
    costs = _FARTHER * ring + _WORSE_WAY * way + _OUTSIDE * beyond.sum(axis=-1)
    for index, point in enumerate(points):
        other = (np.arange(n_labels) != index)[:, None]
        costs += _covered(middles, half, point, marker / 2 + _CLEARANCE * other[..., None])
        costs += _CROSSING * other * _inside(lines, point, np.full(2, marker / 2 + _CLEARANCE))
    return np.asarray(costs)


def _costs_of_others(index: int, chosen: dict[int, int], middles: Array, boxes: Array, lines: Array) -> Array:
    """Return how bad each place of a label is, given the places that other labels have, ``(n_places,)``."""
    costs, half = np.zeros(middles.shape[1]), boxes[index] / 2
    for other, place in chosen.items():
        if other != index:
            label = middles[other, place], boxes[other] / 2
            costs += _covered(middles[index], half, *label) + _CROSSING * _inside(lines[index], *label)
            costs += _CROSSING * _inside(lines[other, place], middles[index][:, None], half)
    return costs


def _candidates(points: Array, boxes: Array, marker: float) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return middles of labels in all directions and distances, and which of them are far from the point."""
    lengths = np.maximum(np.hypot(*_WAYS.T), 1)[:, None]
    shifts = [_WAYS[None] * (boxes[:, None] / 2 + marker / 2) + _WAYS[None] / lengths * distance for distance in _RINGS]
    far = np.repeat(np.arange(len(_RINGS)) >= _WITHOUT_LINE, len(_WAYS))
    return points[:, None] + np.concatenate(shifts, axis=1), far


def _covered(middles: Array, half: Array, other: Array, other_half: Array) -> Array:
    """Return the area that each of several boxes shares with another one."""
    high = np.minimum(middles + half, other + other_half)
    low = np.maximum(middles - half, other - other_half)
    return np.asarray(np.maximum(high - low, 0).prod(axis=-1))


def _inside(line: Array, middle: Array, half: Array) -> Array:
    """Return 1 where a line ``(..., n_steps, 2)`` runs through a box, 0 elsewhere."""
    return np.asarray((np.abs(line - middle) < half).all(axis=-1).any(axis=-1), dtype=np.float64)
