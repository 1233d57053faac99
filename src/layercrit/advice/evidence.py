"""What advice rests on: the criticality of a model's layers, from a measurement, a study, a table, or a folder."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from layercrit.advice.coupling import coupled_layers
from layercrit.errors import AdviceError, LayercritError, near, shown
from layercrit.layers import Shared
from layercrit.measurement import Measurement
from layercrit.models.references import open_model
from layercrit.study.of_measurement import load_result
from layercrit.study.tables import Study

__all__ = ["Evidence", "evidence_of"]

_REQUIRED = ("layer", "criticality", "low", "high", "n_parameters", "status")


@dataclass(frozen=True)
class Evidence:
    """The layers of one model, with their criticality under one reset.

    Attributes:
        layers: one row per layer, in depth order.
        model: its name.
        reference: of the model; None where it is not known.
        reset: which reset it was; None where it is not known.
        level: of the intervals; None where it is not known.
        parameters: layer -> names of its parameters, where they are known.
        shared: of layers that share parameters (tied weights) with an earlier one, what they share.
    """

    layers: pd.DataFrame
    model: str
    reference: str | None = None
    reset: str | None = None
    level: float | None = None
    parameters: dict[str, list[str]] | None = None
    shared: Mapping[str, Shared] = field(default_factory=dict)

    def each_once(self) -> "Evidence":
        """Return the same with every parameter once, at the first layer that has it."""
        n_parameters = [
            self.shared[layer].n_parameters if layer in self.shared else n
            for layer, n in zip(self.layers["layer"], self.layers["n_parameters"], strict=True)
        ]
        own = {layer: list(of.parameters) for layer, of in self.shared.items()}
        return replace(
            self,
            layers=self.layers.assign(n_parameters=n_parameters),
            parameters=None if self.parameters is None else self.parameters | own,
        )

    def together(self, knobs: Mapping[str, str]) -> dict[str, str]:
        """Return layer -> knob where layers that share parameters are one knob, too.

        Args:
            knobs: layer -> knob, of layers that can only be changed together for another reason.
        """
        found = {layer: layer for layer in self.layers["layer"]} | dict(knobs)
        for layer, of in self.shared.items():
            if layer in found:  # in a study that is not finished, some are not
                knob = found.get(of.first, of.first)
                found |= {one: knob for one, own in found.items() if own == found[layer]}
        return found

    def channels(self) -> tuple[dict[str, str], Collection[str]]:
        """Return layer -> knob of the layers that share channels in the network, and those whose channels are classes.

        Raises:
            AdviceError: the network cannot be opened or followed, or a layer has no channels.
        """
        if self.reference is None:
            raise AdviceError(
                "Which layers share their channels is found in the network, and a table does not say which one it is "
                "of. Give a measurement or a study, or the knobs of `coupled_layers`."
            )
        try:
            model = open_model(self.reference)
        except LayercritError as error:
            raise AdviceError(
                f"Which layers share their channels is found in the network, and {self.reference!r} cannot be opened "
                f"({error}). Ask for the weights of each layer by itself: --of weights (knobs=None)."
            ) from error
        knobs, fixed = coupled_layers(model)
        if unlike := [layer for layer in self.layers["layer"] if layer not in knobs and layer not in fixed]:
            raise AdviceError(
                f"{unlike[0]!r} is no convolution or linear layer whose channels could be removed. Measure these one "
                "by one (--group layer, --types conv,linear: the defaults), or ask for weights: --of weights "
                "(knobs=None)."
            )
        return knobs, fixed


def evidence_of(
    of: Measurement | Study | pd.DataFrame | str | Path, model: str | None = None, reset: str | None = None
) -> Evidence:
    """Return the layers that advice is asked about.

    Args:
        of: a measurement, a study, the folder of either, or a table of one row per layer.
        model: which of a study's models; None: its only one.
        reset: which of a study's resets; None: its first.

    Raises:
        AdviceError: there is nothing there, it is about sets of layers, or which model is meant is not clear.
        StudyError: the study has no such reset.
    """
    if isinstance(of, str | Path):
        of = _opened(of)
    if isinstance(of, Study):
        return _of_study(of, model, reset)
    if reset is not None:
        raise AdviceError(f"The reset {reset!r} chooses from a study, and this is none. Leave it out.")
    if isinstance(of, Measurement):
        if any("members" in about for about in of.record["layers"].values()):
            raise AdviceError(
                "Advice is about layers, or groups of them, one by one, and this measurement resets sets of layers "
                "together. Measure with --sets each (the default)."
            )
        reference, protocol = str(of.record["model"]["reference"]), of.record["protocol"]
        about = of.record["layers"]
        return Evidence(
            of.to_pandas(), model or of.name, reference, protocol["reset"], protocol["level"],
            {name: list(one["parameters"]) for name, one in about.items()},
            _shared({name: one["shared"] for name, one in about.items() if "shared" in one}),
        )  # fmt: skip
    if not isinstance(of, pd.DataFrame):
        raise AdviceError(
            f"Advice is given on a measurement, a study, the folder of either, or a table of layers; got {shown(of)}."
        )
    return Evidence(_checked(of), model or "model")


def _opened(folder: str | Path) -> Measurement | Study:
    found = load_result(folder)
    if found is None:
        raise AdviceError(
            f"There is no measurement or study in {folder}. Give the folder that `layercrit measure` or `layercrit "
            "study run` wrote; or, where it is a model, --images to measure it on."
        )
    return found


def _of_study(study: Study, model: str | None, reset: str | None) -> Evidence:
    names = list(study.models["model"])
    if model is None and len(names) > 1:
        raise AdviceError(
            f"Advice is for one model, and the study has {len(names)}: {', '.join(names[:10])}"
            f"{' ...' if len(names) > 10 else ''}. Name it with --model."
        )
    if study.record.get("protocol", {}).get("sets", "each") != "each":
        raise AdviceError(
            "Advice is about layers, or groups of them, one by one, and this study resets sets of layers together. Run "
            "a study without `sets`."
        )
    name = names[0] if model is None else model
    if name not in names:
        raise AdviceError(f"The study has no model {name!r}. {near(name, names)}")
    wanted = str(study.of_reset(reset)["reset"].iloc[0])
    table = study.to_pandas()
    own = _checked(table[(table["model"] == name) & (table["reset"] == wanted)])
    row = study.models.set_index("model").loc[name]
    shared = _shared(row["record"].get("shared", {}))
    return Evidence(own, name, str(row["reference"]), wanted, study.level, shared=shared)


def _shared(recorded: Mapping[str, Any]) -> dict[str, Shared]:
    return {
        layer: Shared(of["first"], tuple(of["parameters"]), int(of["n_parameters"])) for layer, of in recorded.items()
    }


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of layers that has what advice needs."""
    if missing := [name for name in _REQUIRED if name not in table]:
        raise AdviceError(f"The table lacks the columns {', '.join(missing)}. It needs {', '.join(_REQUIRED)}.")
    if table["layer"].duplicated().any():
        raise AdviceError(
            f"The table has the layer {table.loc[table['layer'].duplicated(), 'layer'].iloc[0]!r} twice. Give the "
            "rows of one model and one reset."
        )
    table = table.reset_index(drop=True)
    return table if "type" in table else table.assign(type="layer")
