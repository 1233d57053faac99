"""Rank correlations of criticality with accuracy across models, and without each category of them."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pandas as pd

__all__ = ["rank_correlations"]

_EXACT = 8  # models up to which the p-value of Spearman's rho is taken over all their orders


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


def _exact_spearman(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Return the two-sided p-value of Spearman's rho over all orders of one side.

    The usual approximation by Student's t is far too confident for few models: it gives 0 for three in perfect order.
    """
    from scipy.stats import rankdata

    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (x, y)]
    orders = np.array(list(itertools.permutations(ranks[1])))  # (n!, n)
    sums = np.abs(orders @ ranks[0])
    return float((sums >= abs(ranks[0] @ ranks[1]) - 1e-9).mean())
