"""Advice as other programs read it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pandas as pd

from layercrit.advice.actions import Action
from layercrit.computed_weights import owner_of
from layercrit.errors import AdviceError

__all__ = ["FORMATS", "Written"]


class Written(Protocol):
    """What is written: `layercrit.advice.Advice`."""

    @property
    def action(self) -> Action:
        """What is done to layers."""
        ...

    @property
    def layers(self) -> pd.DataFrame:
        """The table of layers."""
        ...

    @property
    def record(self) -> Mapping[str, Any]:
        """What it rests on."""
        ...

    @property
    def chosen(self) -> list[str]:
        """The layers that it is done to."""
        ...

    @property
    def kept(self) -> list[str]:
        """All others."""
        ...

    def in_words(self) -> list[str]:
        """Return it as sentences."""
        ...


_IN_BLOCK = re.compile(r"(?:(?P<outer>.+)\.)?(?P<pattern>[^.]+)\.(?P<index>\d+)\.(?P<inside>.+)")


def as_json(advice: Written) -> str:
    """Everything, as one JSON object."""
    rows = json.loads(advice.layers.to_json(orient="records", double_precision=15))
    about = {name: value for name, value in advice.record.items() if name != "parameters"}
    return _json({**about, "in_words": advice.in_words(), "chosen": advice.chosen, "table": rows})


def as_list(advice: Written) -> str:
    """The names of the chosen layers, one per line."""
    return "".join(f"{layer}\n" for layer in advice.chosen)


def as_regex(advice: Written) -> str:
    """A regular expression that matches the names of the chosen layers, whole, and no other."""
    return _regex(advice.chosen) + "\n"


def as_peft(advice: Written) -> str:
    """Arguments of a PEFT configuration such as LoraConfig: adapters in the chosen layers and in no other.

    ``layers_to_transform`` where the chosen layers are the same ones of some blocks, else a regular expression.
    """
    _check_single_modules(advice)
    return _json(_in_blocks(advice.chosen, advice.record["layers"]) or {"target_modules": _regex(advice.chosen)})


def as_torch_pruning(advice: Written) -> str:
    """Torch-Pruning's ``pruning_ratio_dict`` by the names of modules, beside ``pruning_ratio=0``."""
    if "ratio" not in advice.layers:
        raise AdviceError("Pruning ratios are for advice to prune. Ask with --for prune, or for another format.")
    _check_single_modules(advice)
    _check_plain_weights(advice)
    if not advice.record["fixed_given"]:
        raise AdviceError(
            "Torch-Pruning removes channels, and nothing says which layers are left as they are because their channels "
            'are the classes. Ask for channels (--of channels, which the command does; in Python knobs="channels"), '
            "or name these layers: fixed=[...], and fixed=[] if they are not among those measured."
        )
    ratios = advice.layers.set_index("layer")["ratio"].to_dict()
    return _json({layer: ratios[layer] for layer in advice.chosen})


def as_nncf(advice: Written) -> str:
    """Arguments of NNCF's IgnoredScope: patterns of the operations in all layers that are not chosen."""
    return _json({"patterns": [f"{re.escape(layer.replace('.', '/'))}/.*" for layer in advice.kept]})


def as_groups(advice: Written) -> str:
    """Names of parameters in two groups, for an optimizer: to train and to leave as they are.

    Of ``freeze`` the chosen layers are left; of all other actions they are what is trained. Parameters of layers that
    were not measured are in neither group: whoever builds the optimizer decides.
    """
    parameters = advice.record["parameters"]
    if parameters is None:
        raise AdviceError(
            "The names of parameters are known of a measurement of one model, and not of a study. Measure the model "
            "with `layercrit measure`, or take the format regex, whose names begin those of the parameters."
        )
    measured = [layer for layer in advice.record["layers"] if layer not in advice.record["not_measured"]]
    chosen = [name for layer in advice.chosen for name in parameters[layer]]
    others = [name for layer in measured if layer in set(advice.kept) for name in parameters[layer]]
    trained, left = (others, chosen) if advice.action.name == "freeze" else (chosen, others)
    return _json([{"params": trained, "lr_scale": 1.0}, {"params": left, "lr_scale": 0.0}])


FORMATS: dict[str, Callable[[Written], str]] = {
    "json": as_json,
    "list": as_list,
    "regex": as_regex,
    "peft": as_peft,
    "torch-pruning": as_torch_pruning,
    "nncf": as_nncf,
    "groups": as_groups,
}


def _check_single_modules(advice: Written) -> None:
    """Make sure that the chosen layers are modules, neither groups of them nor single parameters."""
    for layer in advice.chosen if advice.record["parameters"] else ():
        owners = {owner_of(name) for name in advice.record["parameters"][layer]}
        if owners <= {layer}:
            continue
        module = layer.rpartition(".")[0]
        if owners == {module}:
            raise AdviceError(
                f"{layer!r} is a parameter of {repr(module) if module else 'the network'}, and this format is about "
                "modules. Keep it from being chosen (fixed=[...] in Python), or take the format list or groups."
            )
        raise AdviceError(
            f"{layer!r} is a group of modules, and this format is about single ones. Take the format list, regex, nncf "
            "or groups, or measure with --group layer."
        )


def _check_plain_weights(advice: Written) -> None:
    """Make sure that Torch-Pruning, which replaces the weights of the chosen layers, can do so."""
    for layer in advice.chosen if advice.record["parameters"] else ():
        names = advice.record["parameters"][layer]
        if f"{layer}.weight" not in names:
            others = [name for name in names if not name.endswith(".bias")]
            raise AdviceError(
                f"{layer!r} has no parameter 'weight' for Torch-Pruning to prune, but {', '.join(others) or 'none'}: "
                "weight normalisation and the like compute it. Make it a parameter first (torch.nn.utils.parametrize."
                "remove_parametrizations, remove_weight_norm or remove_spectral_norm), and measure again."
            )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _regex(names: Sequence[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})" if names else r"(?!)"


def _in_blocks(chosen: Sequence[str], layers: Sequence[str]) -> dict[str, Any] | None:
    """Return the chosen layers as the same ones of some blocks; None where that would be others, too."""
    found = [_IN_BLOCK.fullmatch(name) for name in chosen]
    if not found or any(one is None for one in found):
        return None
    parts = [one.groupdict() for one in found if one is not None]
    if len({part["pattern"] for part in parts}) > 1:
        return None
    pattern, indices = parts[0]["pattern"], sorted({int(part["index"]) for part in parts})
    inside = list(dict.fromkeys(part["inside"] for part in parts))
    if set(chosen) != {name for name in layers if _is_adapted(name, pattern, indices, inside)}:
        return None
    return {"target_modules": inside, "layers_to_transform": indices, "layers_pattern": pattern}


def _is_adapted(name: str, pattern: str, indices: Sequence[int], inside: Sequence[str]) -> bool:
    """Return whether PEFT puts an adapter into a layer: where the name ends so, in a block of that number."""
    block = re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(\d+)\.", name)
    return block is not None and int(block[1]) in indices and any(name.endswith(f".{one}") for one in inside)
