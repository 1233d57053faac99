"""Criticality by class, by image, and by whether the trained network is right, from distances of single images."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.errors import ProbeError, ProtocolError
from layercrit.intervals import betting, half_width, limits
from layercrit.shown_images import Groups, ShownImages

__all__ = ["by_correctness", "by_group", "by_image", "difference_of_groups", "estimate_groups", "extreme_images"]

Array = npt.NDArray[np.float64]
Layers = Iterable[tuple[str, npt.NDArray[Any]]]
"""Each layer with the distances of its trials that are ok, ``(n_trials, n_images)``; ``(0, n_images)`` without any."""


def by_group(layers: Layers, groups: Groups, *, level: float, random_trials: bool, interval: str) -> pd.DataFrame:
    """Return one row per layer and group of images: its criticality with its interval.

    Columns are ``layer``, ``class`` (the group's name), ``number`` (that of the class among the model's outputs,
    missing where groups are no classes), ``n_images``, ``n_trials``, ``criticality``, ``low``, ``high`` and ``covers``.

    Args:
        layers: as above.
        groups: of the images.
        level: confidence level of each interval.
        random_trials: as in `layercrit.statistics.estimate`, as is ``interval``.
        interval: one of `layercrit.protocol.INTERVALS`.

    Raises:
        ProbeError: the groups are not of the images that were measured.
    """
    counts = np.bincount(groups.codes, minlength=len(groups.names))
    parts = []
    for layer, values in layers:
        _check_number(values, groups)
        about = {
            "layer": layer,
            "class": groups.names,
            "number": pd.array(groups.numbers or [None] * len(counts), dtype="Int64"),
            "n_images": counts,
            "n_trials": len(values),
        }
        found = estimate_groups(values, groups.codes, level=level, random_trials=random_trials, interval=interval)
        parts.append(pd.DataFrame({**about, **found}))
    table = pd.concat(parts, ignore_index=True)
    return table.astype({"layer": "category", "class": "category", "covers": "category"})


def estimate_groups(
    distances: npt.NDArray[Any],
    codes: npt.NDArray[np.int64],
    *,
    level: float = 0.95,
    random_trials: bool = True,
    interval: str = "t",
    upper: float = 1.0,
) -> dict[str, Any]:
    """Estimate the mean distance of each group of images, all groups at once.

    Each estimate is that of `layercrit.statistics.estimate` for the images of the group. A group of one image has no
    interval of Student's, since one image does not tell how much images vary, and neither has a single random trial.

    Args:
        distances: ``(n_trials, n_images)``, in [0, ``upper``]; without a trial all is NaN.
        codes: the group of each image, each of 0 to n_groups - 1 at least once.
        level: as in `layercrit.statistics.estimate`, as are the others.
        random_trials: whether the reset draws at random.
        interval: ``t`` or ``betting``.
        upper: the largest possible distance.

    Returns:
        ``criticality``, ``low``, ``high`` (NaN where there is no interval) and ``covers``, ``(n_groups,)`` each.
    """
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes)
    starts = np.cumsum(counts) - counts
    if len(distances) == 0:
        nothing = np.full(len(counts), np.nan)
        return {"criticality": nothing, "low": nothing, "high": nothing, "covers": ["nothing"] * len(counts)}
    values = np.asarray(distances, np.float64).clip(0.0, upper)[:, order]
    # Differences from one of the group's values: equal distances then have a mean and a spread without any rounding.
    origins = values[0, starts]
    values = values - np.repeat(origins, counts)
    trials = np.add.reduceat(values, starts, axis=1) / counts  # (n_trials, n_groups)
    mean = (origins + trials.mean(axis=0)).clip(0.0, upper)
    if interval == "betting" and random_trials:
        low, high = betting(((origins + trials) / upper).clip(0.0, 1.0).T, level)
        low, high = np.minimum(upper * low, mean), np.maximum(upper * high, mean)
        return {"criticality": mean, "low": low, "high": high, "covers": ["trials"] * len(counts)}
    parts = _parts(values, trials, starts, counts, random_trials)
    low, high = limits(mean, np.where(counts > 1, half_width(parts, level), np.nan) if parts else np.nan, upper)
    words = ("trials and images" if random_trials else "images") if parts else "nothing"
    return {"criticality": mean, "low": low, "high": high, "covers": np.where(counts > 1, words, "nothing")}


def _parts(
    values: Array, trials: Array, starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], random_trials: bool
) -> list[tuple[Any, Any]]:
    """Return of each source of error its part of the variance of a group's mean, and its degrees of freedom.

    Args:
        values: distances without their group's origin, ``(n_trials, n_images)``, images of a group side by side.
        trials: their means over the images of each group, ``(n_trials, n_groups)``.
        starts: the first image of each group.
        counts: images of each group; where that is one, parts mean nothing.
        random_trials: whether trials are draws.

    Returns:
        None of them where a single draw does not tell how much draws vary.
    """
    n_trials = len(values)
    df_images = np.maximum(counts - 1, 1)
    grand = trials.mean(axis=0)  # (n_groups,)
    images = values.mean(axis=0) - np.repeat(grand, counts)  # effects of images, (n_images,)
    squares = np.add.reduceat(images**2, starts)
    if not random_trials:
        return [(squares / df_images / counts, df_images)]
    if n_trials == 1:
        return []
    effects = trials - grand
    rest = values - np.repeat(grand + effects, counts, axis=1) - images
    df_trials = n_trials - 1
    ms_trials = counts * (effects**2).sum(axis=0) / df_trials
    ms_images = n_trials * squares / df_images
    ms_rest = np.add.reduceat((rest**2).sum(axis=0), starts) / (df_trials * df_images)
    return [
        (np.maximum(ms_trials - ms_rest, 0.0) / counts / n_trials, df_trials),
        (np.maximum(ms_images - ms_rest, 0.0) / n_trials / counts, df_images),
        (ms_rest / (n_trials * counts), np.minimum(df_trials, df_images)),
    ]


# --- right and wrong --------------------------------------------------------------------------------------------------


def by_correctness(
    layers: Layers, correct: npt.NDArray[np.bool_], *, level: float, random_trials: bool
) -> pd.DataFrame:
    """Return one row per layer: the criticality of images that the trained network names right and wrong.

    Columns are ``layer``, ``n_correct``, ``n_wrong``, ``n_trials``, ``correct`` and ``wrong`` (criticality, NaN without
    such images), and ``difference`` (the former minus the latter) with ``low`` and ``high``, the limits of its interval
    for new trials and new images.

    Args:
        layers: as above.
        correct: whether each image's label is the trained network's most probable class, ``(n_images,)``.
        level: confidence level of each interval.
        random_trials: whether the reset draws at random.

    Raises:
        ProbeError: not as many images were measured.
    """
    rows = []
    for layer, values in layers:
        _check_number(values, Groups(correct.astype(np.int64), ("wrong", "correct"), None))
        rows.append(
            {
                "layer": layer,
                "n_correct": int(correct.sum()),
                "n_wrong": int((~correct).sum()),
                "n_trials": len(values),
                **difference_of_groups(
                    values[:, correct], values[:, ~correct], level=level, random_trials=random_trials
                ),
            }
        )
    return pd.DataFrame(rows).rename(columns={"first": "correct", "second": "wrong"})


def difference_of_groups(
    first: npt.NDArray[Any],
    second: npt.NDArray[Any],
    *,
    level: float = 0.95,
    random_trials: bool = True,
    upper: float = 1.0,
) -> dict[str, float]:
    """Estimate the difference between the mean distances of two groups of images, measured under the same draws.

    Args:
        first: distances of the one group, ``(n_trials, n_images)``.
        second: those of the other, of other images in the same trials.
        level: confidence level.
        random_trials: whether the reset draws at random.
        upper: the largest possible distance.

    Returns:
        the means ``first`` and ``second``, their ``difference`` and its limits ``low`` and ``high``; NaN where they
        cannot be known: a group of one image, or one trial of a random reset, has no interval.

    Notes:
        What a draw does to both groups alike cancels: the effect of trials is that on the difference of the groups'
        means, and the effects of images and the rest are those of two independent samples. Variances are estimated and
        their degrees of freedom counted as in `layercrit.statistics.estimate`.
    """
    groups = [np.asarray(values, np.float64) for values in (first, second)]
    means = [float(values.mean()) if values.size else np.nan for values in groups]
    found = {"first": means[0], "second": means[1], "difference": means[0] - means[1], "low": np.nan, "high": np.nan}
    n_trials, n_fewest = len(first), min(values.shape[1] for values in groups)
    if n_trials == 0 or n_fewest < 2 or (random_trials and n_trials == 1):
        return found
    parts, of_rest = [], 0.0
    for values in groups:
        n = values.shape[1]
        trials = values.mean(axis=1, keepdims=True)
        own = _parts(values, trials, np.array([0]), np.array([n]), random_trials)
        parts += own[1:] if random_trials else own
        of_rest += own[-1][0] * n_trials if random_trials else 0.0
    if random_trials:
        apart = groups[0].mean(axis=1) - groups[1].mean(axis=1)
        parts.append((max(float(apart.var(ddof=1)) - float(np.sum(of_rest)), 0.0) / n_trials, n_trials - 1))
    reach = float(np.sum(half_width(parts, level)))
    found["low"], found["high"] = max(found["difference"] - reach, -upper), min(found["difference"] + reach, upper)
    return found


# --- single images ----------------------------------------------------------------------------------------------------


def by_image(layers: Layers, images: ShownImages, *, random_trials: bool) -> pd.DataFrame:
    """Return one row per layer and image, in the order of the probe set.

    Columns are ``layer``, ``position`` (in the probe set, from 0), those of `ShownImages.to_pandas`, ``criticality``
    (the mean over trials) and ``sd_trials`` (the standard deviation over trials; NaN for a single draw).
    """
    about: pd.DataFrame | None = None
    parts = []
    for layer, values in layers:
        if about is None:
            about = images.to_pandas(values.shape[1])
        parts.append(about.assign(**_of_images(values, random_trials), layer=layer, position=np.arange(len(about))))
    table = pd.concat(parts, ignore_index=True).astype({"layer": "category", "image": "category"})
    return table[["layer", "position", "image", "label", "prediction", "correct", "criticality", "sd_trials"]]


def _of_images(values: npt.NDArray[Any], random_trials: bool) -> dict[str, Array]:
    """Return mean and standard deviation over trials of each image, ``(n_images,)``, of ``(n_trials, n_images)``."""
    exact = values.astype(np.float64)
    unknown = np.full(values.shape[1], np.nan)
    if len(exact) == 0:
        return {"criticality": unknown, "sd_trials": unknown}
    spread = exact.std(axis=0, ddof=1) if len(exact) > 1 else unknown
    return {"criticality": exact.mean(axis=0), "sd_trials": spread if random_trials else np.zeros_like(unknown)}


def extreme_images(table: pd.DataFrame, k: int) -> pd.DataFrame:
    """Return the images that the reset of a layer moves most, and those that it moves least.

    Args:
        table: the rows of `by_image` of one layer.
        k: how many of each; no image is both.

    Returns:
        these rows, the most moved first and the least moved last, with a column ``moved``: ``most`` or ``least``.

    Raises:
        ProtocolError: ``k`` is no positive number, or the layer has no trial that is ok.
    """
    if k < 1:
        raise ProtocolError(f"The number of images is {k}: expected 1 or more.")
    if table["criticality"].isna().all():
        raise ProtocolError(f"No trial of the layer {table['layer'].iloc[0]!r} is ok. Choose another layer.")
    ordered = table.sort_values("criticality", ascending=False, kind="stable")
    n_most = min(k, (len(ordered) + 1) // 2)
    most, least = ordered.iloc[:n_most], ordered.iloc[max(n_most, len(ordered) - k) :]
    return pd.concat([most.assign(moved="most"), least.assign(moved="least")], ignore_index=True)


def _check_number(values: npt.NDArray[Any], groups: Groups) -> None:
    if values.shape[1] != len(groups.codes):
        raise ProbeError(
            f"There are groups of {len(groups.codes)} images, and {values.shape[1]} images were measured. Pass one "
            "value for each image, in the order of the probe set."
        )
