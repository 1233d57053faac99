"""Advice: which layers to freeze, fine-tune, prune or quantise, from how critical each of them is."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.advice.actions import Action, action_named
from layercrit.advice.budgets import bits_within, chosen_within, share_in_words
from layercrit.advice.evidence import evidence_of
from layercrit.advice.formats import FORMATS
from layercrit.advice.ranking import knobs_of, places_in_order, ranked
from layercrit.cell_columns import WHOLE
from layercrit.counts import counted
from layercrit.errors import AdviceError, near
from layercrit.measurement import Measurement
from layercrit.named_options import name_list
from layercrit.study.tables import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Advice", "advise", "check_advice"]

_BITS, _RATIO = (8, 4), 0.5


@dataclass(frozen=True, eq=False, repr=False)
class Advice:
    """Which layers to choose for an action, in order, with the reason for each.

    Attributes:
        action: what is to be done to them.
        layers: one row per layer, as `to_pandas` returns it.
        record: what the advice rests on, as plain data.
    """

    action: Action
    layers: pd.DataFrame
    record: Mapping[str, Any]

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per layer: those that come first in the ranking first, those not measured last.

        ``rank`` is the place of the layer's knob, ``rank_low`` and ``rank_high`` the places that its interval leaves
        it; ``knob`` names the layers that can only be changed together; ``chosen`` says whether the action is done to
        it; ``tie``, whether it would be on the other side were its criticality at the other end of its interval;
        ``ratio`` is the share of it that is pruned, ``bits`` are those of its parameters, where the action has them.
        ``reason`` says why, in words. Layers that were not measured have no rank and are never chosen.
        """
        return self.layers.copy()

    @property
    def chosen(self) -> list[str]:
        """The layers that the action is done to, in depth order."""
        order = {layer: place for place, layer in enumerate(self.record["layers"])}
        return sorted(self.layers.loc[self.layers["chosen"], "layer"], key=order.__getitem__)

    @property
    def kept(self) -> list[str]:
        """All other layers, in depth order."""
        chosen = set(self.chosen)
        return [layer for layer in self.record["layers"] if layer not in chosen]

    def in_words(self) -> list[str]:
        """Return how good a guide criticality is, what was chosen, and what that rests on, a sentence each."""
        record, n = self.record, len(self.chosen)
        budget = record["budget"]
        amount = f"{budget:g}" if self.action.name == "quantise" else share_in_words(budget)
        default = "" if record["budget_given"] else " (the default)"
        share = self.layers.loc[self.layers["chosen"], "n_parameters"].sum() / max(1, record["n_parameters"])
        lines = [
            f"measured: {self.action.evidence}",
            f"{n} of {len(self.layers)} layers to be {self.action.done}, {share_in_words(share)} of the parameters of "
            f"these layers; budget{default}: {self.action.budget_in_words.format(amount)}",
        ]
        if ties := int(self.layers["tie"].sum()):
            which = (
                "layer is a tie: within its interval it" if ties == 1 else "layers are ties: within its interval each"
            )
            lines.append(f"{ties} {which} would be on the other side too; more trials may tell")
        if left := record["not_measured"]:
            lines.append(f"not measured, so left as they are: {counted(len(left), 'layer')}: {', '.join(left[:5])}"
                         f"{' ...' if len(left) > 5 else ''}")  # fmt: skip
        return lines

    def to(self, name: str) -> str:
        """Return the advice as text for another program.

        Args:
            name: one of `layercrit.advice.FORMATS`.

        Raises:
            AdviceError: there is no such format, or it has no place for this advice.
        """
        if name not in FORMATS:
            raise AdviceError(f"There is no format {name!r} for advice. {near(name, FORMATS)}")
        return FORMATS[name](self)

    def plot(self) -> "Figure":
        """Return the profile of criticality in depth order, with the chosen layers marked."""
        from layercrit.figures.bars import criticality_bars

        order = {layer: place for place, layer in enumerate(self.record["layers"])}
        table = self.layers.sort_values("layer", key=lambda names: names.map(order))
        names, chosen, tie = table["layer"], table["chosen"], table["tie"]
        done = self.action.done
        marks = {
            f"to be {done}": list(names[chosen & ~tie]),
            f"to be {done}, a tie": list(names[chosen & tie]),
            f"not to be {done}, a tie": list(names[~chosen & tie]),
        }
        return criticality_bars(table, title=f"{self.record['model']}: {self.action.name}", marks=marks)


def check_advice(action: str, budget: float | None = None, bits: Sequence[int] = _BITS, ratio: float = _RATIO) -> None:
    """Check what is asked of `advise`, before anything is measured for it.

    Raises:
        AdviceError: the action is unknown, or the budget or an option makes no sense.
    """
    _checked_budget(action_named(action), budget, bits, ratio)


def advise(
    of: Measurement | Study | pd.DataFrame | str | Path,
    action: str,
    budget: float | None = None,
    *,
    knobs: Mapping[str, str] | Literal["channels"] | None = None,
    fixed: str | Collection[str] | None = None,
    bits: Sequence[int] = _BITS,
    ratio: float = _RATIO,
    model: str | None = None,
    reset: str | None = None,
) -> Advice:
    """Return which layers to choose for an action.

    Args:
        of: a measurement, a study, the folder of either, or a table of one row per layer with the columns ``layer``,
            ``criticality``, ``low``, ``high``, ``n_parameters`` and ``status``, in depth order.
        action: ``freeze`` or ``prune`` (the least criticality for each parameter first), ``finetune`` (the most
            critical first) or ``quantise`` (fewer bits first where criticality times the variance of rounding rises
            least).
        budget: share of the parameters of these layers, in (0, 1]: to be frozen or removed at least, or fine-tuned at
            most; for ``quantise`` the mean bits of a parameter. None: the action's default.
        knobs: layer -> name of its knob, such as those of `coupled_layers`, where layers can only be changed together;
            ``"channels"``: these, and ``fixed``, found in the network of the measurement or study. Layers that share
            parameters are one knob anyhow. A knob is chosen only if all its layers were measured. None: each layer by
            itself, which is the command's ``--of weights``; for ``prune``, its default is ``channels``.
        fixed: layers that are never chosen, such as those whose channels are the classes. None: none that is known of;
            channels are then not pruned by ``to("torch-pruning")``, which would cut classes out of the network.
        bits: the choices for ``quantise``.
        ratio: the share of a chosen layer that ``prune`` removes, in (0, 1).
        model: which model, where ``of`` is a study; else its name, for titles. None: the only one of the study, or the
            name in the measurement.
        reset: which of a study's resets; None: its first.

    Raises:
        AdviceError: the action is unknown, the budget or an option makes no sense or cannot be met, there is no layer
            of a name that is given, or nothing was measured.
        StudyError: the study has no such reset.

    Examples:
        >>> import layercrit
        >>> advice = layercrit.advise("layercrit-demo/study", "freeze", budget=0.3, model="baseline")
        >>> advice.action.done, len(advice.chosen) + len(advice.kept)
        ('frozen', 23)
    """
    found = action_named(action)
    evidence = evidence_of(of, model, reset).each_once()
    layers = evidence.layers.copy()
    fixed_given = fixed is not None or knobs == "channels"
    if isinstance(knobs, str) and knobs != "channels":
        raise AdviceError(
            f"The knobs are 'channels', or a mapping of layers to names, not {knobs!r}. {near(knobs, ['channels'])}"
        )
    left = set(name_list(fixed or ()))
    classes: Collection[str] = ()
    _check_layers("fixed", left, layers["layer"])
    if knobs == "channels":
        knobs, classes = evidence.channels()
    else:
        _check_layers("knobs", knobs or (), layers["layer"])
    left |= set(classes)
    knobs = evidence.together(knobs or {})
    asked = _checked_budget(found, budget, bits, ratio)
    if len(unknown := layers.loc[layers["n_parameters"].isna(), "layer"]):
        raise AdviceError(
            f"How many parameters layers have is not known, such as of {unknown.iloc[0]!r}, and budgets are shares of "
            "them. Imported results do not say it: measure the model, or give a table with n_parameters."
        )
    layers["measured"] = layers["status"].isin(WHOLE) & layers["criticality"].notna()
    not_measured = list(layers.loc[~layers["measured"], "layer"])
    if not layers["measured"].any():
        raise AdviceError(
            "There is no advice without criticality: none of these layers was measured whole. Look at the status of "
            "its layers, and measure again."
        )
    layers["measured"] &= ~layers["layer"].isin(left)
    total = int(layers["n_parameters"].sum())
    order = ranked(knobs_of(layers, knobs), highest_first=found.highest_first)
    order = _with_choice(order, found, asked, total, bits, ratio)
    record = {
        "model": evidence.model,
        "action": found.name,
        "budget": asked,
        "budget_given": budget is not None,
        "bits": sorted(bits, reverse=True) if action == "quantise" else None,
        "ratio": ratio if action == "prune" else None,
        "reset": evidence.reset,
        "level": evidence.level,
        "layers": list(layers["layer"]),
        "parameters": evidence.parameters,
        "n_parameters": total,
        "not_measured": not_measured,
        "fixed": [name for name in layers["layer"] if name in left],
        "fixed_given": fixed_given,
        "classes": [name for name in layers["layer"] if name in set(classes)],
    }
    return Advice(found, _table(layers, order, found, knobs, record), record)


def _checked_budget(action: Action, budget: float | None, bits: Sequence[int], ratio: float) -> float:
    try:
        asked = action.budget if budget is None else float(budget)
    except (TypeError, ValueError):
        raise AdviceError(f"The budget is a number, such as 0.1 for 10 %, not {budget!r}.") from None
    if not 0 < ratio < 1:
        raise AdviceError(f"The ratio is the share of a layer that is pruned, between 0 and 1, not {ratio:g}.")
    if action.name != "quantise":
        if not 0 < asked <= 1:
            raise AdviceError(
                f"The budget of {action.name!r} is a share of the parameters, above 0 and at most 1, not {asked:g}."
                + (f" For {asked:g} %, give {asked / 100:g}." if 1 < asked <= 100 else "")
            )
        return asked
    bits = [bits] if isinstance(bits, int) else list(bits)
    if len(set(bits)) < 2 or not all(isinstance(one, int) and 1 <= one <= 32 for one in bits):
        raise AdviceError(f"Bits to choose from are two or more whole numbers from 1 to 32, not {bits}.")
    if not min(bits) <= asked <= max(bits):
        raise AdviceError(
            f"The budget of 'quantise' is the mean bits of a parameter, from {min(bits)} to {max(bits)} with the bits "
            f"that may be chosen, not {asked:g}."
        )
    return asked


def _check_layers(argument: str, names: Iterable[str], layers: Iterable[str]) -> None:
    """Refuse names that are not of layers."""
    known = list(layers)
    if unknown := sorted(set(names).difference(known)):
        raise AdviceError(
            f"There is no layer {unknown[0]!r}, which {argument!r} names. {near(unknown[0], known)} Leave out layers "
            "that are not in the table or measurement."
        )


def _with_choice(
    order: pd.DataFrame, action: Action, budget: float, total: int, bits: Sequence[int], ratio: float
) -> pd.DataFrame:
    """Return the ranking with the columns ``chosen``, ``tie``, and what the action has beside them."""
    n_unmeasured = total - int(order["n_parameters"].sum())
    criticality, sizes = (order[name].to_numpy(np.float64) for name in ("criticality", "n_parameters"))

    def choice(criticality: npt.NDArray[np.float64]) -> npt.NDArray[np.int64] | npt.NDArray[np.bool_]:
        """The bits of each knob, or whether it is chosen, if their criticality were this, ``(n_knobs,)``."""
        if action.name == "quantise":
            return bits_within(criticality, sizes, bits, budget, n_unmeasured)
        places = places_in_order(criticality, sizes, highest_first=action.highest_first)
        counts = ratio if action.name == "prune" else 1.0
        chosen = np.zeros(len(places), np.bool_)
        chosen[places] = chosen_within(sizes[places], action, budget, total, counts)
        return chosen

    made = choice(criticality)
    ties = []
    for place, limits in enumerate(order[["low", "high"]].fillna({"low": 0.0, "high": 1.0}).to_numpy(np.float64)):
        others = []
        for limit in limits:
            moved = criticality.copy()
            moved[place] = limit
            others.append(choice(moved)[place])
        ties.append(any(other != made[place] for other in others))
    if action.name == "quantise":
        return order.assign(bits=made, chosen=made < max(bits), tie=ties)
    order = order.assign(chosen=made, tie=ties)
    return order.assign(ratio=np.where(order["chosen"], ratio, 0.0)) if action.name == "prune" else order


def _table(
    layers: pd.DataFrame, order: pd.DataFrame, action: Action, knobs: Mapping[str, str], record: Mapping[str, Any]
) -> pd.DataFrame:
    """Return one row per layer, in the order of the ranking."""
    knob = layers["layer"].map(lambda layer: knobs.get(layer, layer))
    of_knob = order.drop(columns=["layer", "criticality", "low", "high", "n_parameters", "measured"], errors="ignore")
    own = ["rank", "rank_low", "rank_high", "chosen", "tie", *(name for name in ("ratio", "bits") if name in of_knob)]
    columns = ["layer", "type", "criticality", "low", "high", "n_parameters", "status"]
    table = layers[[name for name in columns if name in layers]].assign(knob=knob)
    table = table.join(of_knob[own], on="knob")
    table["chosen"], table["tie"] = (table[name].eq(True) for name in ("chosen", "tie"))
    table[["rank", "rank_low", "rank_high"]] = table[["rank", "rank_low", "rank_high"]].astype("Int64")
    if "bits" in table:
        table["bits"] = table["bits"].fillna(max(record["bits"])).astype(np.int64)
    if "ratio" in table:
        table["ratio"] = table["ratio"].fillna(0.0)
    table = table.sort_values("rank", kind="stable", na_position="last").reset_index(drop=True)
    table["reason"] = [_reason(row, action, order, record) for row in table.to_dict("records")]
    return table


def _reason(row: Mapping[Any, Any], action: Action, order: pd.DataFrame, record: Mapping[str, Any]) -> str:
    """Return why a layer is chosen, or is not."""
    if row["layer"] in record["not_measured"]:
        return f"not measured ({row['status']}): left as it is"
    if row["layer"] in record["classes"]:
        return "its channels are the classes: left as it is"
    if row["layer"] in record["fixed"]:
        return "fixed: left as it is"
    if pd.isna(row["rank"]):
        return "changes only together with a layer that is left as it is"
    by = "most critical" if action.highest_first else "least critical for its size"
    words = [f"no. {row['rank']} of {len(order)} from the {by}"]
    if (decides := order.loc[row["knob"], "layer"]) != row["layer"]:
        words.append(f"together with {decides}")
    if row["tie"]:
        words.append("tie")
    return ", ".join(words)
