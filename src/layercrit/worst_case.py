"""The worst case of each module: the change of its parameters, of a given size, that moves the predictions farthest."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from torch import nn

from layercrit.ascent import Ascent, Found
from layercrit.attacks import split_attack
from layercrit.counts import counted
from layercrit.engine.session import Session
from layercrit.errors import ProbeError, ProtocolError, near
from layercrit.measuring import draw_images, opened_subject
from layercrit.models.model import Model
from layercrit.models.sources import short_name
from layercrit.probes.labelling import LabelsGiven, are_wanted
from layercrit.progress_bar import Bar
from layercrit.protocol import DEFAULTS, Protocol
from layercrit.provenance import about_session, identity_of
from layercrit.result_files import KeptRows, write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["OBJECTIVES", "WorstCase", "measure_worst_case"]

OBJECTIVES = ("auto", "loss", "cosine")
_FILE = "worst-case"


@dataclass(frozen=True, eq=False, repr=False)
class WorstCase:
    """The worst case of each module of a model, as projected gradient ascent finds it.

    Attributes:
        table: one row per module; see `to_pandas`.
        record: how it was measured: settings, model, images, versions and notes.
    """

    table: pd.DataFrame
    record: Mapping[str, Any]

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per module, in depth order.

        ``worst_case`` is the largest mean over images that any restart found: of the loss above the trained network's
        in nats, or of 1 - cosine. It is a lower bound of the true maximum, on these images. ``smallest_restart`` is the
        worst case of the restart that found least. ``first_order`` is what the gradient promises, ``radius`` times its
        norm; NaN for 1 - cosine, whose gradient is 0 at the trained values. ``radius`` is the Euclidean norm that the
        change may have, and ``norm`` that of the trained parameters.

        ``status`` is ``ok``, or there is no worst case: ``no_norm``: ``norm`` is 0, and so is the radius;
        ``no_gradient``: a change of the module moves the output, but no gradient leads there.
        """
        return self.table.copy()

    def summary(self) -> dict[str, Any]:
        """Return plain data for JSON: what was maximised, on what, and how."""
        names = ("model", "objective", "loss", "top1_accuracy", "relative_radius", "steps", "step_size", "restarts",
                 "n_images", "seconds", "warnings", "notes")  # fmt: skip
        return {name: self.record[name] for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return the summary and the table as plain data for JSON."""
        return {**self.summary(), "modules": json.loads(self.table.to_json(orient="records", double_precision=15))}

    def plot(self) -> "Figure":
        """Return the worst case of each module beside its first order as a figure.

        Raises:
            ProtocolError: no module has a worst case.
        """
        from layercrit.figures.worst_case import worst_case_rows

        images, radius = counted(self.record["n_images"], "image"), self.record["relative_radius"]
        raised = "rise of the loss, nats" if self.record["objective"] == "loss" else "1 - cosine"
        return worst_case_rows(
            self.table,
            quantity=f"{raised}, mean over {images}",
            title=f"{short_name(str(self.record['model']))}: worst case, radius {radius:g}",
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``worst-case.csv``, ``worst-case.json`` and the figure into a folder; return the files.

        Raises:
            LayercritError: the folder cannot be written.
        """
        about = {"measured": self.record, **self.to_dict()}
        plot = self.plot if self.table["worst_case"].notna().any() else None
        return write_result(folder, _FILE, "worst case", {".csv": self.table}, about, plot)

    def __repr__(self) -> str:
        return (
            f"<WorstCase of {self.record['model']}: {counted(len(self.table), 'module')}, {self.record['objective']}>"
        )


def measure_worst_case(
    model: str | Model | nn.Module,
    images: Any,
    *,
    radius: float = 0.1,
    objective: str = "auto",
    attack: str | None = None,
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 2,
    n_images: int = 500,
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
) -> WorstCase:
    """Find the change of each module, of a given relative size, that raises the loss most, the rest being trained.

    Projected gradient ascent over ``||D|| <= radius * ||theta_l||`` (Zhu et al., ICCV 2023, arXiv 2308.02533, there
    called module robust criticality, projected once an epoch; here in every step). All before the module is run once.
    The model is left bit for bit as it was.

    Args:
        model: as for `layercrit.measure`.
        images: likewise.
        radius: largest norm of the change, in units of the norm of the module's parameters.
        objective: what is raised: ``loss``, the mean cross-entropy with the labels, less that of the trained network;
            ``cosine``, the mean of 1 - cosine of the predictions before and after, which needs no labels; or ``auto``:
            the loss where there are labels.
        attack: adversarial images in place of the clean ones, such as ``pgd(norm=linf, eps=4/255)``; made against the
            trained network and kept in ``keep_images``.
        steps: gradient steps of a restart.
        step_size: length of a step in units of the radius; by default ``2.5 / steps``.
        restarts: the first one starts at the trained values where the loss is raised, all others at random points of
            the ball, drawn by ``seed``.
        n_images: how many of the images to use, drawn by ``seed``; all if there are fewer.
        layers: as for `layercrit.measure`.
        types: likewise.
        group: likewise; a module is then a whole block, say.
        seed: of the random starts and of the choice of images.
        batch_size: as for `layercrit.measure`.
        device: likewise.
        labels: likewise.
        classes: likewise.
        keep_images: likewise.
        keep_rows: a file for the rows of modules that are finished, with which an interrupted measurement of the same
            model, images and settings goes on. None: they are not kept.
        progress: whether to show a progress bar on a terminal.

    Raises:
        ProtocolError: a setting makes no sense.
        ProbeError: the loss is to be raised, and the images have no labels.
        ModelError: the ascent reaches NaN.
        LayercritError: as `layercrit.measure`.

    Examples:
        >>> import layercrit
        >>> images = "layercrit-demo/fashion-mnist-test.npz"
        >>> found = layercrit.measure_worst_case("file:layercrit-demo/models/baseline", images, layers="fc")
        >>> bool((found.to_pandas()["worst_case"] > 0).all())
        True
    """
    started = time.perf_counter()
    _check(radius, objective, steps, step_size, restarts)
    protocol = Protocol(
        trials=1, n_images=n_images, layers=layers, types=types, group=group, reset="zero", seed=seed,
        batch_size=batch_size, dtype="reference", device=device,
    )  # fmt: skip
    if objective == "loss" and not are_wanted(labels):
        raise ProbeError(_WITHOUT_LABELS.format("they were left out with labels='none'"))
    how, images = split_attack(images if attack is None else _attacked_source(attack, images))
    with Bar(progress) as bar, opened_subject(model, images, labels, protocol) as subject:
        subject.join_shared()
        probe_set = draw_images(images, subject, n_images, seed, how, labels, classes, keep_images, bar)
        session = Session(protocol, subject, probe_set, ["cosine"], are_wanted(labels), bar)
        if objective == "loss" and session.labels is None:
            raise ProbeError(_WITHOUT_LABELS.format(f"{probe_set.source!r} has none that the model knows"))
        raised: Literal["loss", "cosine"] = "cosine" if objective == "cosine" or session.labels is None else "loss"
        size = 2.5 / steps if step_size is None else step_size
        ascent = Ascent(session, raised, radius=radius, steps=steps, step_size=size, restarts=restarts, seed=seed)
        asked = {"objective": raised, "radius": radius, "steps": steps, "step_size": size, "restarts": restarts}
        kept = KeptRows(keep_rows, {**identity_of(session), **asked, "seed": seed})
        for number, layer in enumerate(subject.layers):
            if layer.name not in kept.known:
                kept.add(layer.name, _row(ascent.of(layer)))
            bar.measured(number + 1, len(subject.layers))
        rows = [kept.known[layer.name] for layer in subject.layers]
        about = {
            "objective": raised,
            "relative_radius": radius,
            "steps": steps,
            "step_size": size,
            "restarts": restarts,
            "seconds": round(time.perf_counter() - started, 3),
        }
        return WorstCase(pd.DataFrame(rows), {**about_session(session), **about})


_WITHOUT_LABELS = (
    "The loss needs labels, and {}. Give some with --labels (labels=...), or raise what needs none: --objective cosine "
    "(objective='cosine')."
)


def _check(radius: float, objective: str, steps: int, step_size: float | None, restarts: int) -> None:
    if not 0 < radius < math.inf:
        raise ProtocolError(
            f"radius must be a positive number, in units of the norm of a module's parameters; got {radius!r}. At 0 "
            "nothing changes: give one such as 0.1."
        )
    if objective not in OBJECTIVES:
        raise ProtocolError(f"Unknown objective {objective!r}. {near(str(objective), OBJECTIVES)}")
    for name, value in (("steps", steps), ("restarts", restarts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ProtocolError(f"{name} must be a whole number of at least 1; got {value!r}.")
    if step_size is not None and not 0 < step_size < math.inf:
        raise ProtocolError(
            f"step_size must be a positive number, in units of the radius; got {step_size!r}. Leave it out for "
            "2.5 / steps."
        )


def _attacked_source(attack: str, images: Any) -> str:
    if not isinstance(images, str | Path):
        raise ProtocolError(
            f"attack goes with the path of images; got {type(images).__name__}. Make adversarial images with "
            "layercrit.attacks.attacked, and give them as they are."
        )
    return f"attack:{attack}:{images}"


def _row(found: Found) -> dict[str, Any]:
    layer = found.layer
    return {
        "layer": layer.name,
        "type": layer.type,
        "n_parameters": layer.n_parameters,
        "worst_case": max(found.reached, default=math.nan),
        "smallest_restart": min(found.reached, default=math.nan),
        "first_order": found.first_order,
        "radius": found.radius,
        "norm": found.norm,
        "status": found.status,
    }
