"""How well proxies rank layers: rank correlations with exact values, intervals by resampling, and the best null."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.correlations import spearman
from layercrit.errors import LayercritError, ProtocolError
from layercrit.foreign_text import encodable, write_csv
from layercrit.proxies.formulas import PROXIES
from layercrit.seeds import seed_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Agreement", "Exact", "agreement", "kendall", "overlap", "verdict"]

Array = npt.NDArray[np.float64]

_FEWEST = 3  # layers that can be ranked to any purpose
_AT_ONCE = 2**24  # pairs of layers that are compared in one call


@dataclass(frozen=True, eq=False)
class Exact:
    """The criticality of layers that proxies are held against.

    Attributes:
        layers: their names.
        distances: ``(n_layers, n_draws, n_images)``, NaN where there is none.
        images: hash of the images.
        seeds: of the draws.
        random_trials: whether draws differ.
    """

    layers: tuple[str, ...]
    distances: npt.NDArray[np.float32]
    images: str
    seeds: tuple[int, ...]
    random_trials: bool

    @property
    def criticality(self) -> Array:
        """Mean over draws and images, ``(n_layers,)``; NaN where there is none."""
        means: Array = self.distances.mean(axis=2, dtype=np.float64)
        criticality: Array = self._over_draws(means, np.ones((1, self.distances.shape[1])))[0]
        return criticality

    def resampled(self, images: Array, draws: Array) -> Array:
        """Return the means of resamples, ``(n_resamples, n_layers)``.

        Args:
            images: how often each image is in each resample, ``(n_resamples, n_images)``.
            draws: likewise, ``(n_resamples, n_draws)``.
        """
        shares = images / images.sum(axis=1, keepdims=True)
        # (n_layers, n_draws, n_resamples)
        means = np.stack([layer.astype(np.float64) @ shares.T for layer in self.distances])
        return np.stack(
            [self._over_draws(means[..., one], draws[one : one + 1])[0] for one in range(len(shares))]
        ).reshape(len(shares), len(self.layers))

    @staticmethod
    def _over_draws(means: Array, draws: Array) -> Array:
        """Return the mean over the draws that a layer has, ``(n_resamples, n_layers)``; NaN where it has none."""
        known = np.isfinite(means)
        weights = draws @ known.T
        total = draws @ np.where(known, means, 0).T
        return np.divide(total, weights, out=np.full_like(total, np.nan), where=weights > 0)


@dataclass(frozen=True, eq=False, repr=False)
class Agreement:
    """Proxies set against the exact criticality of a model's layers.

    Attributes:
        table: one row per proxy, nulls among them, the highest Spearman first: ``proxy``, ``label``, ``null``,
            ``n_layers`` (that it applies to), ``spearman`` and ``kendall`` (tau-b) with the exact values and their
            intervals, ``lowest`` and ``highest`` (share of the k lowest or highest layers that it names; where it
            applies to some layers only, k is as large a share of these), and ``difference``: Spearman minus that of the
            best null on the same layers, with its interval. NaN: not known.
        by_layer: one row per layer: ``layer``, ``exact``, and a column per proxy.
        best_null: its name: of the nulls, the one whose Spearman is farthest from 0, its order reversed where negative.
        k: how many layers are lowest, and highest.
        level: confidence level.
        resampled: what the intervals are about, in words.
        title: the model.
    """

    table: pd.DataFrame
    by_layer: pd.DataFrame
    best_null: str | None
    k: int
    level: float
    resampled: str
    title: str

    @property
    def sentence(self) -> str:
        """Which proxies beat the best null, in words."""
        return verdict(self.table, self.best_null, self.level)

    def plot(self) -> "Figure":
        """Return the figure: exact criticality over each proxy, a panel each."""
        from layercrit.figures.proxies import proxy_scatter

        return proxy_scatter(self.by_layer, self.table, title=self.title)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the layers as plain data for JSON; None where a number is not known."""
        rows = json.loads(self.table.to_json(orient="records", double_precision=15))
        about = {"best_null": self.best_null, "k": self.k, "level": self.level, "resampled": self.resampled}
        return {"against": rows, **about, "sentence": self.sentence}

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``against.csv`` (the table), ``against.json`` (`to_dict`) and the figure into a folder.

        Raises:
            LayercritError: it cannot be written.
        """
        from layercrit.figures.style import save_figure

        folder = Path(folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_csv(self.table, folder / "against.csv")
            text = json.dumps(encodable(self.to_dict()), indent=2, ensure_ascii=False, allow_nan=False)
            (folder / "against.json").write_text(text + "\n", encoding="utf-8")
            figures = save_figure(self.plot(), folder / "proxies")
        except OSError as error:
            raise LayercritError(
                f"The comparison cannot be written to {folder} ({error.strerror or error}). Free some space or name "
                "another folder (--out), then save again."
            ) from error
        return [folder / "against.csv", folder / "against.json", *figures]

    def __repr__(self) -> str:
        return f"<Agreement of proxies with {self.title}: {self.sentence}>"


def agreement(
    samples: Mapping[str, Array],
    layers: Collection[str],
    exact: Exact,
    *,
    images: str,
    seeds: Collection[int],
    title: str,
    k: int | None = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Set proxies against exact values of the layers that both have.

    Intervals are percentiles of a bootstrap over images and draws, crossed: both are resampled, and every proxy that is
    a mean over images or draws with them. The same images or draws are resampled alike on both sides.

    Args:
        samples: proxy -> what it is the mean of, as `layercrit.proxies.formulas.Proxy.axes` says.
        layers: names of the layers of the samples.
        exact: the values to agree with.
        images: hash of the images of the samples.
        seeds: of their draws.
        title: the model.
        k: how many layers are lowest, and highest; None: a quarter of them.
        level: confidence level, between 0 and 1.
        n_resamples: how many resamples; 0: no intervals.
        seed: the seed that those of the resamples are hashed from.

    Raises:
        ProtocolError: there are fewer than three layers to compare, or k is not possible.
    """
    place = {name: number for number, name in enumerate(layers)}
    values = exact.criticality
    rows = [number for number, name in enumerate(exact.layers) if name in place and np.isfinite(values[number])]
    k = check_ranks(k, len(rows), exact.layers)
    names = [exact.layers[row] for row in rows]
    mine = [place[name] for name in names]
    samples = {name: found[mine] for name, found in samples.items()}
    own = {name: PROXIES[name].value(found) for name, found in samples.items()}
    if exact.distances.shape[2] < 2 or (exact.random_trials and exact.distances.shape[1] < 2):
        n_resamples = 0  # one image, or one draw, says nothing of others
    weights = _Weights(exact, images, tuple(seeds), n_resamples, seed)
    others = exact.resampled(weights.exact_images, weights.exact_draws)[:, rows] if n_resamples else None
    resamples = {
        name: np.broadcast_to(weights.values(name, found), (n_resamples, len(rows))) for name, found in samples.items()
    }
    compared = [_row(name, own[name], values[rows], resamples[name], others, k, level) for name in samples]
    table = pd.DataFrame(compared)
    best = best_null(table)
    if best is not None:
        sign = math.copysign(1, table.set_index("proxy")["spearman"][best])
        null = sign * own[best], sign * resamples[best]
        gaps = [
            _difference(own[name], values[rows], resamples[name], others, null, level) if name != best else _NOTHING
            for name in samples
        ]
        table = table.join(pd.DataFrame(gaps, columns=["difference", "difference_low", "difference_high"]))
    table = table.sort_values("spearman", ascending=False, kind="stable", na_position="last", ignore_index=True)
    shown = pd.DataFrame({"layer": names, "exact": values[rows], **own})
    return Agreement(table, shown, best, k, level, weights.in_words(), title)


def check_level(level: float) -> None:
    """Refuse what is no confidence level.

    Raises:
        ProtocolError: it is not between 0 and 1.
    """
    if not isinstance(level, Real) or not 0 < level < 1:
        raise ProtocolError(f"level must be between 0 and 1, such as 0.95; got {level!r}.")


def check_ranks(k: int | None, n_layers: int, exact: Sequence[str]) -> int:
    """Return how many of ``n_layers`` that are ranked are lowest and highest: a quarter by default, at least one.

    Args:
        k: how many were asked for.
        n_layers: how many layers proxies and exact values have in common.
        exact: the layers that have exact values.

    Raises:
        ProtocolError: there are fewer than three layers, or k is no number from 1 to ``n_layers``.
    """
    if n_layers < _FEWEST:
        named = f"{', '.join(map(repr, exact[:_FEWEST]))}{', ...' * (len(exact) > _FEWEST)}"
        raise ProtocolError(
            f"Proxies and exact values have {n_layers} layers in common; ranks need at least {_FEWEST}. The exact "
            f"values are of {named}; measure the same layers on both sides (--layers, --types, --group)."
        )
    if k is None:
        return max(1, round(n_layers / 4))
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n_layers:
        raise ProtocolError(
            f"k must be a whole number from 1 to the number of layers that are compared, {n_layers}; got {k!r}. Leave "
            "it out for a quarter of them."
        )
    return k


class _Weights:
    """How often images and draws are in each resample, of the exact values and of the proxies."""

    def __init__(self, exact: Exact, images: str, seeds: tuple[int, ...], n: int, seed: int) -> None:
        self._n, self._seed = n, seed
        _, n_draws, n_images = exact.distances.shape
        self._random = exact.random_trials
        self.exact_images = self._drawn("exact images", n_images)
        self.exact_draws = self._drawn("exact draws", n_draws) if exact.random_trials else np.ones((n, n_draws))
        self._same_images, self._same_draws = images == exact.images, tuple(seeds) == exact.seeds

    def values(self, name: str, samples: Array) -> Array:
        """Return the values of a proxy in each resample, ``(n_resamples, n_layers)``, or ``(n_layers,)``."""
        proxy = PROXIES[name]
        if proxy.axes == "layers" or not self._n:
            return proxy.value(samples)
        images = self._images(samples.shape[-1])
        return proxy.value(samples, images, self._draws(samples.shape[1]) if proxy.axes == "draws" else None)

    def in_words(self) -> str:
        """Say what is resampled."""
        if not self._n:
            return "nothing"
        what = "images and draws" if self._random else "images"
        fixed = "SNIP, relative gradient, worst case, distance and the nulls stay as they are"
        return (
            f"{what} of the exact values and of the proxies that are means over them ({self._n:,} resamples); {fixed}"
        )

    def _images(self, n: int) -> Array:
        same = self._same_images and n == self.exact_images.shape[1]
        return self.exact_images if same else self._drawn(f"{n} images of proxies", n)

    def _draws(self, n: int) -> Array:
        same = self._same_draws and n == self.exact_draws.shape[1]
        if same or not self._random:
            return self.exact_draws if same else np.ones((self._n, n))
        return self._drawn("draws of proxies", n)

    def _drawn(self, what: str, n: int) -> Array:
        generator = np.random.default_rng(seed_of(self._seed, "proxies", what))
        return generator.multinomial(n, np.full(n, 1 / n), size=self._n).astype(np.float64)


_NOTHING = (math.nan, math.nan, math.nan)


def _row(
    name: str, own: Array, exact: Array, resamples: Array, others: Array | None, k: int, level: float
) -> dict[str, Any]:
    """Return the row of a proxy in the table, without its difference from the best null."""
    known = np.isfinite(own)
    row: dict[str, Any] = {"proxy": name, "label": PROXIES[name].label, "null": PROXIES[name].null}
    row["n_layers"] = int(known.sum())
    few = known.sum() < _FEWEST
    for method, correlate in (("spearman", spearman), ("kendall", kendall)):
        row[method] = math.nan if few else float(correlate(own[None, known], exact[None, known])[0])
        row[f"{method}_low"], row[f"{method}_high"] = math.nan, math.nan
        if others is not None and not few:
            found = correlate(resamples[:, known], others[:, known])
            row[f"{method}_low"], row[f"{method}_high"] = _limits(found, level)
    k = max(1, round(k * int(known.sum()) / len(known)))  # as large a share of the layers that it applies to
    row["lowest"] = math.nan if few else overlap(own[known], exact[known], k)
    row["highest"] = math.nan if few else overlap(-own[known], -exact[known], k)
    return row


def _difference(
    own: Array, exact: Array, resamples: Array, others: Array | None, null: tuple[Array, Array], level: float
) -> tuple[float, float, float]:
    """Return how much higher Spearman is than that of a null on the layers that a proxy applies to, with limits."""
    known = np.isfinite(own)
    if known.sum() < _FEWEST:
        return _NOTHING
    gap = spearman(own[None, known], exact[None, known]) - spearman(null[0][None, known], exact[None, known])
    if others is None:
        return float(gap[0]), math.nan, math.nan
    gaps = spearman(resamples[:, known], others[:, known]) - spearman(null[1][:, known], others[:, known])
    return float(gap[0]), *_limits(gaps, level)


def _limits(found: Array, level: float) -> tuple[float, float]:
    known = found[np.isfinite(found)]
    if not known.size:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def best_null(table: pd.DataFrame) -> str | None:
    """Return the null whose Spearman is farthest from 0; None where none has one."""
    nulls = table[table["null"] & table["spearman"].notna()]
    return None if nulls.empty else str(nulls["proxy"].iloc[int(nulls["spearman"].abs().to_numpy().argmax())])


def verdict(table: pd.DataFrame, best: str | None, level: float) -> str:
    """Say which proxies beat the best null.

    Args:
        table: as of `Agreement`.
        best: the best null.
        level: confidence level of the intervals.
    """
    if best is None:
        return "No null can be ranked: all layers are alike in it, or none has an exact value."
    rho = float(table.set_index("proxy")["spearman"][best])
    reversed_ = ", its order reversed" if rho < 0 else ""
    null = f"the best null, {PROXIES[best].label}{reversed_} (Spearman {abs(rho):.2f})"
    proxies = table[~table["null"] & table["spearman"].notna()]
    if "difference_low" in table and proxies["difference_low"].notna().any():
        proxies = proxies[proxies["difference_low"].notna()]  # what cannot be compared does not count
    else:
        return f"Whether a proxy beats {null}, cannot be said: there are no intervals."
    better = proxies[proxies["difference_low"] > 0]
    interval = f"the {100 * level:g}% interval of its paired difference"
    if better.empty:
        top = proxies.to_dict("records")[0]
        return (
            f"None of {len(proxies)} proxies beats {null}, by {interval}; the highest is {top['label']} "
            f"({top['spearman']:.2f}; difference {_signed(top)})."
        )
    n_layers = int(table["n_layers"].max())
    listed = ", ".join(
        f"{row['label']} ({_signed(row)}"
        + (
            f"; on the {row['n_layers']} of {n_layers} layers that it applies to)"
            if row["n_layers"] < n_layers
            else ")"
        )
        for row in better.to_dict("records")
    )
    beat = "beats" if len(better) == 1 else "beat"
    return f"{len(better)} of {len(proxies)} proxies {beat} {null}, by {interval}: {listed}."


def _signed(row: Mapping[Any, Any]) -> str:
    return f"{row['difference']:+.2f}, {row['difference_low']:+.2f} to {row['difference_high']:+.2f}"


# --- ranks ------------------------------------------------------------------------------------------------------------


def kendall(x: Array, y: Array) -> Array:
    """Return Kendall's tau-b of each row, of two arrays ``(n_rows, n_values)``; NaN where one side is constant."""
    n_rows, n = x.shape
    first, second = np.triu_indices(n, 1)
    found = []
    for start in range(0, n_rows, max(1, _AT_ONCE // max(len(first), 1))):
        some = slice(start, start + max(1, _AT_ONCE // max(len(first), 1)))
        a, b = (np.sign(values[some][:, first] - values[some][:, second]) for values in (x, y))
        found.append(_ratio((a * b).sum(axis=1), np.sqrt(np.abs(a).sum(axis=1) * np.abs(b).sum(axis=1))))
    return np.concatenate(found)


def _ratio(over: Array, under: Array) -> Array:
    ratio: Array = np.divide(over, under, out=np.full_like(over, np.nan), where=under > 0)
    return ratio


def overlap(x: Array, y: Array, k: int) -> float:
    """Return the share of the k lowest by one side that are among the k lowest by the other, in [0, 1].

    Where values are tied at the border, it is what random choices among them give in the mean.
    """
    return float((_membership(x, k) * _membership(y, k)).sum() / k)


def _membership(values: Array, k: int) -> Array:
    """Return the probability that each value is among the k lowest, ties broken at random."""
    border = np.sort(values)[k - 1]
    below, at = values < border, values == border
    share: Array = below + at * (k - below.sum()) / at.sum()
    return share
