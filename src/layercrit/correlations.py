"""Rank correlations: of criticality with accuracy across models, and of two ways to reset layers across layers."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

__all__ = ["RankAgreement", "rank_agreement", "rank_correlations", "spearman"]

_EXACT = 8  # models up to which the p-value of Spearman's rho is taken over all their orders
_RESAMPLED = 4_000
_FEWEST = 5  # layers for an interval: resamples of fewer are too alike


@dataclass(frozen=True)
class RankAgreement:
    """How alike fresh draws and something else order the layers of a network.

    Attributes:
        rho: Spearman's rank correlation over layers, of the mean over draws with the other; NaN where either is
            constant.
        low: limit of its interval, for new layers and new draws; NaN for fewer than five layers.
        high: likewise.
        level: of the interval.
        one_draw: the same correlation of one draw with the mean of the others, mean over draws: what the other would
            have if it were a draw, too. NaN for a single draw.
        n_layers: how many layers are known both ways.
        n_trials: how many draws.
    """

    rho: float
    low: float
    high: float
    level: float
    one_draw: float
    n_layers: int
    n_trials: int

    def to_dict(self) -> dict[str, float | None]:
        """Return it as JSON can hold it: None for what is not known."""
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}


def rank_correlations(models: pd.DataFrame) -> pd.DataFrame:
    """Correlate the models' mean criticality with their accuracy, over all of them and without each category in turn.

    Args:
        models: rows of `layercrit.comparison.Comparison.models`; those without either number are ignored.

    Returns:
        one row per ``without`` (None or the category left out) and ``method`` (``spearman`` for rho, ``kendall`` for
        tau-b): ``statistic``, ``pvalue`` (two-sided; both NaN for fewer than three models) and ``n``, how many models.
    """
    from scipy.stats import kendalltau, spearmanr  # not above: it takes a second, which every worker would wait

    known = models.dropna(subset=["accuracy", "criticality"])
    rows = []
    for without in [None, *sorted(models["category"].dropna().unique())]:
        some = known if without is None else known[known["category"] != without]
        for method, function in (("spearman", spearmanr), ("kendall", kendalltau)):
            statistic, pvalue = math.nan, math.nan
            if len(some) > 2 and len(set(some["accuracy"])) > 1 and len(set(some["criticality"])) > 1:
                values = some["criticality"].to_numpy(), some["accuracy"].to_numpy()
                statistic, pvalue = function(*values)
                if method == "spearman" and len(some) <= _EXACT:
                    pvalue = _exact_spearman(*values)
            rows.append((without, method, float(statistic), float(pvalue), len(some)))
    table = pd.DataFrame(rows, columns=["without", "method", "statistic", "pvalue", "n"])
    return table.assign(without=pd.Series([row[0] for row in rows], dtype=object))  # keeps None


def rank_agreement(
    draws: npt.NDArray[np.float64], other: npt.NDArray[np.float64], level: float = 0.95
) -> RankAgreement:
    """Return the rank correlation over layers of the mean of some draws with something else, with an interval.

    The interval is that of the percentiles over resamples with replacement, of layers and, independently, of draws.

    Args:
        draws: criticality ``(n_trials, n_layers)``.
        other: criticality ``(n_layers,)``.
        level: of the interval.
    """
    n_trials, n_layers = draws.shape
    generator = np.random.default_rng(0)
    of_layers = generator.integers(n_layers, size=(_RESAMPLED, n_layers))
    of_trials = generator.multinomial(n_trials, np.full(n_trials, 1 / n_trials), size=_RESAMPLED) / n_trials
    means = np.take_along_axis(of_trials @ draws, of_layers, axis=1)  # (n_resamples, n_layers)
    resampled = spearman(means, other[of_layers])
    resampled = resampled[np.isfinite(resampled)]
    low, high = math.nan, math.nan
    if n_layers >= _FEWEST and len(resampled):
        low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    others = (draws.sum(axis=0) - draws) / max(n_trials - 1, 1)
    one_draw = float(spearman(draws, others).mean()) if n_trials > 1 else math.nan
    rho = float(spearman(draws.mean(axis=0), other))
    return RankAgreement(rho, float(low), float(high), level, one_draw, n_layers, n_trials)


def spearman(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return Spearman's rho over the last axis of two arrays ``(..., n_values)``; NaN where one side is constant."""
    from scipy.stats import rankdata

    x, y = (rankdata(values, axis=-1) - (values.shape[-1] + 1) / 2 for values in (x, y))
    with np.errstate(invalid="ignore"):
        rho: npt.NDArray[np.float64] = (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return rho


def _exact_spearman(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Return the two-sided p-value of Spearman's rho over all orders of one side.

    The usual approximation by Student's t is far too confident for few models: it gives 0 for three in perfect order.
    """
    from scipy.stats import rankdata

    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (x, y)]
    orders = np.array(list(itertools.permutations(ranks[1])))  # (n!, n)
    sums = np.abs(orders @ ranks[0])
    return float((sums >= abs(ranks[0] @ ranks[1]) - 1e-9).mean())
