"""Adversarial feature criticality: how much more than the layer before a layer moves on perturbed images."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from layercrit.attacks import in_levels, split_attack, start_in_ball, stepped
from layercrit.counts import counted
from layercrit.engine.layer_outputs import LayerOutputs
from layercrit.engine.session import Session
from layercrit.errors import ModelError, ProtocolError, near
from layercrit.layers import Group, Layer, find_layers, select_layers
from layercrit.measuring import draw_images, opened_subject
from layercrit.models.model import Classifier, Model
from layercrit.models.sources import short_name
from layercrit.probes.labelling import LabelsGiven, are_wanted
from layercrit.progress_bar import Bar
from layercrit.protocol import DEFAULTS, Protocol
from layercrit.provenance import about_session, identity_of
from layercrit.result_files import KeptRows, write_result
from layercrit.seeds import seed_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["INPUT", "NORMS", "FeatureCriticality", "measure_feature_criticality"]

NORMS = ("linf", "l2")
INPUT = "input"
"""What stands for the layer before the first one."""

_FILE = "feature-criticality"
_NAMED = 5  # layers in a note


@dataclass(frozen=True, eq=False, repr=False)
class FeatureCriticality:
    """The adversarial feature criticality of each layer of a model, as projected gradient ascent finds it.

    Attributes:
        table: one row per layer; see `to_pandas`.
        record: how it was measured: settings, model, images, versions and notes.
    """

    table: pd.DataFrame
    record: Mapping[str, Any]

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per layer, in depth order.

        ``largest_change`` is W, the mean over images of the largest Euclidean norm that the change of the layer's
        output has on images perturbed within the ball, divided by ``n_elements``, the output's number of elements per
        image. It is a lower bound: the largest that any step of any restart found. ``smallest_restart`` is that of the
        restart that found least. ``feature_criticality`` is W divided by that of the layer ``before``, in depth order
        of all layers of the chosen types, or of the ``input`` as the network gets it: normalised. ``output`` names the
        module whose output is the layer's.

        ``status`` is ``ok``; ``other_paths``: the layer depends on the image also by other ways than the layer before,
        as behind a residual sum, so that the ratio is doubtful; ``same_output``: both have one module and one output,
        as the projections of an attention module. Else there is no ratio: ``no_gradient``: the image moves the output,
        but no gradient leads there; ``no_output``: no module returns what the layer computes; ``nothing_before``: there
        is no W of the layer before, or it is 0.
        """
        return self.table.copy()

    def summary(self) -> dict[str, Any]:
        """Return plain data for JSON: what was perturbed, by how much, and how."""
        names = ("model", "norm", "eps", "steps", "step_size", "restarts", "n_images", "largest_change_of_input",
                 "loss", "top1_accuracy", "seconds", "warnings", "notes")  # fmt: skip
        return {name: self.record[name] for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return the summary and the table as plain data for JSON."""
        return {**self.summary(), "layers": json.loads(self.table.to_json(orient="records", double_precision=15))}

    def plot(self) -> "Figure":
        """Return the feature criticality of each layer as a figure.

        Raises:
            ProtocolError: no layer has one.
        """
        from layercrit.figures.feature_criticality import feature_criticality_rows

        images, ball = counted(self.record["n_images"], "image"), _ball(self.record["norm"], self.record["eps"])
        return feature_criticality_rows(
            self.table,
            quantity=f"largest change relative to the layer before, {images}",
            title=f"{short_name(str(self.record['model']))}: feature criticality, {ball}",
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``feature-criticality.csv``, ``.json`` and the figure into a folder; return the files.

        Raises:
            LayercritError: the folder cannot be written.
        """
        about = {"measured": self.record, **self.to_dict()}
        plot = self.plot if self.table["feature_criticality"].notna().any() else None
        return write_result(folder, _FILE, "feature criticality", {".csv": self.table}, about, plot)

    def __repr__(self) -> str:
        ball = _ball(self.record["norm"], self.record["eps"])
        return f"<FeatureCriticality of {self.record['model']}: {counted(len(self.table), 'layer')}, {ball}>"


def measure_feature_criticality(
    model: str | Model | nn.Module,
    images: Any,
    *,
    norm: str = "linf",
    eps: float | str = "4/255",
    steps: int = 10,
    step_size: float | str | None = None,
    restarts: int = 1,
    n_images: int = 200,
    layers: str = DEFAULTS.layers,
    types: str = DEFAULTS.types,
    group: str = DEFAULTS.group,
    seed: int = DEFAULTS.seed,
    batch_size: int | str = DEFAULTS.batch_size,
    device: str = DEFAULTS.device,
    labels: LabelsGiven = "auto",
    classes: str | Path | Sequence[str] | None = None,
    keep_images: str | Path | None = None,
    keep_rows: str | Path | None = None,
    progress: bool = True,
) -> FeatureCriticality:
    """Measure how far small perturbations of the image move each layer's output, relative to the layer before.

    With F_i(x) the output of layer i on image x, and n_i its number of elements, the largest change is ``W_i``, the
    mean over images of ``max ||F_i(x + d) - F_i(x)|| / n_i`` over ``||d|| <= eps``, and the feature criticality
    ``C_i = W_i / W_(i-1)``, where F_0 is the normalised image (Gopal et al., ICML 2025, known to us second-hand). Each
    maximum is sought by projected gradient ascent on the image from a random start, also that of the input, from the
    same starts: a network that passes the image on has C = 1. No labels are needed. The model is left bit for bit as
    it was.

    Args:
        model: as for `layercrit.measure`.
        images: likewise; ``attack:pgd(norm=linf, eps=4/255):SOURCE`` perturbs images that are adversarial already.
        norm: of perturbations: ``linf``, the largest change of a value, or ``l2``, over all values of an image.
        eps: largest norm of a perturbation, for pixels in [0, 1]: a number, or text such as ``4/255``.
        steps: gradient steps of a restart.
        step_size: norm of the first step, likewise; by default ``2 eps``. Steps fall linearly, the last to 1/``steps``
            of it: long ones suit the first layers, which are nearly linear, and short ones the last.
        restarts: random starts for each image, drawn by ``seed``; the best of each image counts.
        n_images: how many of the images to use, drawn by ``seed``; all if there are fewer.
        layers: as for `layercrit.measure`. The layer before is that of all layers of these types, chosen or not.
        types: likewise.
        group: likewise; with ``block``, the layer before is all that feeds a block in most residual networks.
        seed: of the random starts and of the choice of images.
        batch_size: as for `layercrit.measure`.
        device: likewise.
        labels: likewise; they serve for loss and accuracy in the summary, and for an attack.
        classes: likewise.
        keep_images: likewise.
        keep_rows: a file for the rows of layers that are finished, with which an interrupted measurement of the same
            model, images and settings goes on. None: they are not kept.
        progress: whether to show a progress bar on a terminal.

    Raises:
        ProtocolError: a setting makes no sense.
        ModelError: no gradient can be computed, or an output is NaN or infinite.
        LayercritError: as `layercrit.measure`.

    Examples:
        >>> import layercrit
        >>> images = "layercrit-demo/fashion-mnist-test.npz"
        >>> found = layercrit.measure_feature_criticality("file:layercrit-demo/models/baseline", images, layers="conv1",
        ...                                               n_images=20)
        >>> found.to_pandas()[["layer", "before", "status"]].values.tolist()
        [['conv1', 'input', 'ok']]
    """
    started = time.perf_counter()
    radius, length = _checked(norm, eps, steps, step_size, restarts)
    protocol = Protocol(
        trials=1, n_images=n_images, types=types, group=group, reset="zero", seed=seed, batch_size=batch_size,
        dtype="reference", device=device,
    )  # fmt: skip
    attack, images = split_attack(images)
    with Bar(progress) as bar, opened_subject(model, images, labels, protocol) as subject:
        black = subject.normalise(subject.model.black_image)
        every = find_layers(subject.network, black, group)
        chosen = select_layers(every, types=types, patterns=layers, group=cast(Group, group))
        probe_set = draw_images(images, subject, n_images, seed, attack, labels, classes, keep_images, bar)
        session = Session(protocol, subject, probe_set, ["cosine"], are_wanted(labels), bar)
        first = subject.normalise(probe_set.batch(0, 1))
        outputs = LayerOutputs(subject, subject.layers, torch.cat([first, first.flip(-1)]))
        ascent = _Ascent(session, outputs, norm, radius, steps, length, restarts, seed)
        parts = {name for layer in chosen for name in layer.parameters}
        asked = {"norm": norm, "eps": radius, "steps": steps, "step_size": length, "restarts": restarts, "seed": seed}
        kept = KeptRows(keep_rows, {**identity_of(session), **asked})
        rows = _rows(subject.layers, parts, outputs, ascent, first, bar, kept)
        about = {
            "norm": norm,
            "eps": radius,
            "steps": steps,
            "step_size": length,
            "restarts": restarts,
            "largest_change_of_input": ascent.of(None).mean(),
            "seconds": round(time.perf_counter() - started, 3),
        }
        record = {**about_session(session), **about}
        record["notes"] = [*record["notes"], *_notes(rows, group)]
        return FeatureCriticality(pd.DataFrame(rows).astype({"n_elements": "Int64"}), record)


def _checked(
    norm: str, eps: float | str, steps: int, step_size: float | str | None, restarts: int
) -> tuple[float, float]:
    """Return eps and the length of a step as numbers."""
    if norm not in NORMS:
        raise ProtocolError(f"Unknown norm {norm!r}. {near(str(norm), NORMS)}")
    for name, value in (("steps", steps), ("restarts", restarts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ProtocolError(f"{name} must be a whole number of at least 1; got {value!r}.")
    radius = _number(eps)
    if not 0 < radius < math.inf:
        raise ProtocolError(
            f"eps must be a positive number, for pixels in [0, 1]; got {eps!r}. At 0 no image changes: give one such "
            "as 4/255."
        )
    if norm == "linf" and radius > 1:
        raise ProtocolError(
            f"eps is for pixels in [0, 1], so that {radius:g} in Linf would allow any image. For {radius:g} of 255 "
            f"levels, write {radius:g}/255."
        )
    length = 2 * radius if step_size is None else _number(step_size)
    if not 0 < length < math.inf:
        raise ProtocolError(
            f"step_size must be a positive number, for pixels in [0, 1]; got {step_size!r}. Leave it out for 2 eps."
        )
    return radius, length


def _number(given: float | str) -> float:
    """Return a number, or the value of a text such as ``4/255``; NaN for anything else."""
    try:
        return float(Fraction(given) if isinstance(given, str) else given)
    except (ValueError, TypeError, ArithmeticError):
        return math.nan


def _ball(norm: str, eps: float) -> str:
    return f"{ {'linf': 'Linf', 'l2': 'L2'}[norm] } {in_levels(eps)}"


# --- the ascent -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The largest changes of one layer's output.

    Attributes:
        changes: norms divided by the number of elements, ``(n_restarts, n_images)``.
        n_elements: of the output, for one image.
        is_reached: whether any gradient led there, or the output never moved.
    """

    changes: npt.NDArray[np.float64]
    n_elements: int
    is_reached: bool

    def mean(self) -> float:
        return float(self.changes.max(axis=0).mean())

    def smallest_restart(self) -> float:
        return float(self.changes.mean(axis=1).min())


class _Ascent:
    """Moves images within a ball so that a layer's output moves as far as it can."""

    def __init__(
        self,
        session: Session,
        outputs: LayerOutputs,
        norm: str,
        eps: float,
        steps: int,
        step_size: float,
        restarts: int,
        seed: int,
    ) -> None:
        self._session, self._outputs, self._norm, self._eps = session, outputs, norm, eps
        self._steps, self._step_size, self._restarts, self._seed = steps, step_size, restarts, seed
        model = session.subject.model
        self._input = Classifier(session.subject.network, model.mean, model.std)
        self._known: dict[str | None, _Found] = {}

    def of(self, layer: str | None) -> _Found:
        """Return the largest changes of a layer, or, for None, of the normalised image."""
        if layer not in self._known:
            self._known[layer] = self._session.holder.run(lambda _: self._of(layer))
        return self._known[layer]

    def _of(self, layer: str | None) -> _Found:
        def features(pixels: Tensor) -> Tensor:
            given = pixels.sub(self._input.mean).div(self._input.std)
            return given.flatten(1) if layer is None else self._outputs.of(layer, given)

        probe_set, size = self._session.probe_set, self._session.holder.batch_size
        found, n_elements, has_slope = [], 0, False
        for start in range(0, probe_set.n_images, size):
            images = probe_set.batch_on(self._session.subject.device, start, start + size).to(torch.float32) / 255
            names = probe_set.names[start : start + len(images)]
            with torch.no_grad():
                clean = features(images)
            n_elements = clean.shape[1]
            reached = []
            for restart in range(self._restarts):
                best, climbed = self._climb(features, images, clean, names, restart, layer)
                reached.append(best)
                has_slope |= climbed
            found.append(torch.stack(reached))
        changes = torch.cat(found, dim=1).double().cpu().numpy() / n_elements
        return _Found(changes, n_elements, has_slope or not changes.any())

    def _climb(
        self,
        features: Callable[[Tensor], Tensor],
        images: Tensor,
        clean: Tensor,
        names: Sequence[str],
        restart: int,
        layer: str | None,
    ) -> tuple[Tensor, bool]:
        """Return the largest change of each image ``(n_images,)``, and whether there was any gradient."""
        seeds = [seed_of(self._seed, "feature criticality", restart, name) for name in names]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        away = start_in_ball(images, self._norm, self._eps, generators)
        # A start beyond black or white would be cut off there, where a change of 0 has no gradient: to the other side.
        away = torch.where((images + away).clamp(0, 1) == images + away, away, -away)
        perturbed = (images + away).clamp(0, 1)
        best, has_slope = torch.zeros(len(images), device=images.device), False
        for step in range(self._steps + 1):
            with torch.enable_grad(), self._outputs.saving():
                perturbed.requires_grad_()
                changes = torch.linalg.vector_norm((features(perturbed) - clean).float(), dim=1)
                _check(changes, names, layer, step)
                best = torch.maximum(best, changes.detach())
                if step == self._steps or not changes.requires_grad:
                    break
                (gradient,) = torch.autograd.grad(changes.sum(), perturbed)
            has_slope |= bool((gradient != 0).any())
            length = self._step_size * (1 - step / self._steps)
            perturbed = stepped(perturbed.detach(), gradient, images, self._norm, self._eps, length)
        return best, has_slope


def _check(changes: Tensor, names: Sequence[str], layer: str | None, step: int) -> None:
    if bool(changes.isfinite().all()):
        return
    name = names[int((~changes.isfinite()).nonzero()[0])]
    raise ModelError(
        f"The output of {layer or INPUT!r} is NaN or infinite at step {step} from {name!r}, so that its change has no "
        "size. Leave that image out, measure other layers with --layers (layers=...), or take a smaller --eps "
        "(eps=...)."
    )


# --- the table --------------------------------------------------------------------------------------------------------


def _rows(
    layers: Sequence[Layer],
    parts: set[str],
    outputs: LayerOutputs,
    ascent: _Ascent,
    image: Tensor,
    bar: Bar,
    kept: KeptRows,
) -> list[dict[str, Any]]:
    """Return a row for each layer that has some of the parameters ``parts``; those that are kept are as they were."""
    wanted = [layer for layer in layers if not parts.isdisjoint(layer.parameters)]
    rows: list[dict[str, Any]] = []
    before: str | None = None
    for layer in layers:
        output = outputs.module_of(layer.name)
        if layer in wanted:
            if layer.name not in kept.known:
                kept.add(layer.name, _row(layer, output, before, outputs, ascent, image))
            rows.append(kept.known[layer.name])
            bar.measured(len(rows), len(wanted))
        if output is not None:
            before = layer.name
    return rows


def _row(
    layer: Layer, output: str | None, before: str | None, outputs: LayerOutputs, ascent: _Ascent, image: Tensor
) -> dict[str, Any]:
    found = None if output is None else ascent.of(layer.name)
    status, ratio = "no_output", math.nan
    if found is not None:
        earlier = ascent.of(before)
        if not found.is_reached:
            status = "no_gradient"
        elif not earlier.is_reached or not earlier.mean():
            status = "nothing_before"
        else:
            ratio = found.mean() / earlier.mean()
            status = "ok" if before is None else _kind_of_path(layer.name, before, outputs, image)
    is_known = found is not None and found.is_reached
    return {
        "layer": layer.name,
        "type": layer.type,
        "before": INPUT if before is None else before,
        "feature_criticality": ratio,
        "largest_change": found.mean() if found is not None and is_known else math.nan,
        "smallest_restart": found.smallest_restart() if found is not None and is_known else math.nan,
        "n_elements": None if found is None else found.n_elements,
        "output": output,
        "status": status,
    }


def _kind_of_path(layer: str, before: str, outputs: LayerOutputs, image: Tensor) -> str:
    if outputs.module_of(layer) == outputs.module_of(before):
        return "same_output"
    return "other_paths" if outputs.is_bypassed(layer, before, image) else "ok"


def _notes(rows: Sequence[Mapping[str, Any]], group: str) -> list[str]:
    doubtful = [row["layer"] for row in rows if row["status"] == "other_paths"]
    if not doubtful:
        return []
    few = ", ".join(doubtful[:_NAMED]) + " ..." * (len(doubtful) > _NAMED)
    blocks = "Whole blocks are mostly fed by the block before alone: --group block (group='block')"
    return [
        f"other_paths: {len(doubtful)} of {counted(len(rows), 'layer')} depend on the image not only by way of the "
        f"layer before, as behind a residual sum, so that their ratio to it is doubtful: {few}"
        + (f". {blocks}" if group not in ("block", "stage") else "")
    ]
