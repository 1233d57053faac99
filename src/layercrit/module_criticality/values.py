"""Module criticality of one model: each module's path to its initial values, searched for what the loss allows."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import nn

from layercrit.attacks import split_attack
from layercrit.counts import counted
from layercrit.donors import is_reference
from layercrit.engine.losses import Losses
from layercrit.engine.session import Session
from layercrit.engine.subject import Subject
from layercrit.errors import LayercritError, LayerError, ModelError, ProbeError, ProtocolError, near
from layercrit.foreign_files import open_regular, read_json
from layercrit.foreign_text import unguarded
from layercrit.measuring import draw_images, opened_subject
from layercrit.models.file_source import initial_of_run
from layercrit.models.model import Model
from layercrit.models.references import open_model
from layercrit.models.sources import short_name
from layercrit.module_criticality.kept_points import KeptPoints
from layercrit.module_paths import Allowed, Grid, ModulePaths
from layercrit.path_search import Excess, Point
from layercrit.probes.labelling import LabelsGiven, are_wanted
from layercrit.probes.probe_set import ProbeSet
from layercrit.progress_bar import Bar
from layercrit.protocol import DEFAULTS, Protocol
from layercrit.provenance import about_session
from layercrit.result_files import write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ModuleCriticality", "measure_module_criticality"]

ASKED = ("tolerance", "excess", "draws", "n_a", "n_s", "s_range", "layers", "types", "group", "seed", "dtype", "level")
"""The settings of a measurement that decide its numbers, beside model, initial weights and images."""

_FILE = "module-criticality"
_TEXTS = ("layer", "type", "edge", "status")
_WHOLE = ("n_parameters", "n_points")
_RECORDED = ("model", "sha256", "asked", "surface", "n_images", "a", "s")
_DTYPES = ("reference", "float32")
_WITHOUT_LABELS = (
    "Module criticality is about the loss, which needs labels, and {}. Give some with --labels (labels=...). Without "
    "labels: `layercrit worst-case` and `layercrit measure`, also with --reset rewind."
)


@dataclass(frozen=True, eq=False, repr=False)
class ModuleCriticality:
    """The module criticality of each layer of a model (Chatterji, Neyshabur & Sedghi 2020).

    Attributes:
        table: one row per module; see `to_pandas`.
        points: one row per point of the grid that was evaluated: ``layer``, ``a``, ``s`` in units of the module's root
            mean square, and ``excess``, the mean loss above that of the trained network in nats, with ``low`` and
            ``high``.
        record: how it was measured: settings, model, images, versions and notes.
    """

    table: pd.DataFrame
    points: pd.DataFrame
    record: Mapping[str, Any]

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per module, in depth order.

        ``module_criticality`` is the smallest ``(a / s)^2 * distance^2``; ``low`` and ``high`` are its limits at the
        measurement's level, for new draws and new images (NaN with a single draw or image; ``high`` is infinite where
        no point is surely allowed). ``a`` and ``s`` say where it is, ``s`` in units of ``rms``, the root mean square of
        the module's trained parameters; ``distance`` is the Euclidean norm of trained minus initial values. ``edge`` is
        ``largest s`` where the value is an upper bound, since more noise than the grid has may be allowed, and
        ``smallest s`` where there is no value, since even its smallest is too much. ``status`` is ``unchanged`` for a
        module that has its initial values still. ``n_points`` of the grid were evaluated.
        """
        return self.table.copy()

    def summary(self) -> dict[str, Any]:
        """Return plain data for JSON: the sum over modules, the losses, and what was evaluated."""
        known = self.table["module_criticality"].notna()
        return {
            "model": self.record["model"],
            "sum": float(self.table.loc[known, "module_criticality"].sum()) if known.any() else None,
            "n_modules_in_sum": int(known.sum()),
            "n_modules": len(self.table),
            **{name: self.record[name] for name in ("loss", "allowed_loss", "top1_accuracy", "n_draws", "n_images")},
            "n_evaluations": int(self.table["n_points"].sum()) * self.record["n_draws"],
            "n_evaluations_of_grid": int(self.record["n_points_of_grid"] * len(self.table) * self.record["n_draws"]),
            **{name: self.record[name] for name in ("level", "covers", "seconds", "warnings", "notes")},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the summary and the table as plain data for JSON: what is not finite is None."""
        rows = json.loads(self.table.to_json(orient="records", double_precision=15))
        return {**self.summary(), "modules": rows}

    def plot(self, layer: str | None = None) -> "Figure":
        """Return the excess loss of one module over path and noise as a figure.

        Args:
            layer: the module; by default the one whose whole grid was evaluated, or else the most critical one.

        Raises:
            ProtocolError: nothing was evaluated for such a layer.
        """
        from layercrit.figures.module_criticality import excess_map

        if layer is None:
            layer = self.record["surface"] or str(
                self.table.sort_values("module_criticality", na_position="first")["layer"].iloc[-1]
            )
        row = self.table[self.table["layer"] == layer].to_dict("records")
        points = self.points[self.points["layer"] == layer]
        if not row or points.empty:
            known = ", ".join(dict.fromkeys(self.points["layer"]))
            raise ProtocolError(f"No point of the grid was evaluated for {layer!r}. Modules with points: {known}.")
        title = f"{short_name(str(self.record['model']))}: {layer}"
        optimum = (float(row[0]["a"]), float(row[0]["s"]))
        grid = np.array(self.record["a"]), np.array(self.record["s"])
        return excess_map(points, grid, self.record["allowed_loss"] - self.record["loss"], optimum, title=title)

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``module-criticality.csv``, ``-points.csv``, ``.json`` and the figure into a folder; return the files.

        Raises:
            LayercritError: the folder cannot be written.
        """
        about = {"measured": self.record, **self.to_dict()}
        plot = self.plot if len(self.points) else None
        return write_result(
            folder, _FILE, "module criticality", {".csv": self.table, "-points.csv": self.points}, about, plot
        )

    @classmethod
    def load(cls, folder: str | Path) -> "ModuleCriticality":
        """Read a folder that `save` wrote.

        Raises:
            LayercritError: there is no module criticality in it, or a damaged one.
        """
        files = [Path(folder).expanduser() / f"{_FILE}{end}" for end in (".csv", "-points.csv", ".json")]
        try:
            record = read_json(files[2])["measured"]
            table, points = (_read_csv(path) for path in files[:2])
            if missing := {*_TEXTS, "module_criticality", "low", "high"} - set(table) | {"a", "s"} - set(points):
                raise ValueError(f"the tables lack {min(missing)}")
            found = cls(table, points, {name: record[name] for name in {*_RECORDED, *record}})
            found.summary()  # which fails where the record is of other types
            return found
        except OSError as error:
            raise LayercritError(
                f"There is no module criticality in {folder} ({error.strerror or error}). Give the folder that "
                "`layercrit module-criticality` wrote."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"the record lacks {error}" if isinstance(error, KeyError) else str(error)
            raise LayercritError(
                f"The module criticality in {folder} is damaged ({what}). Measure it again: `layercrit "
                "module-criticality` with --overwrite."
            ) from error

    def __repr__(self) -> str:
        return f"<ModuleCriticality of {self.record['model']}: {counted(len(self.table), 'module')}>"


def measure_module_criticality(
    model: str | Model | nn.Module,
    images: Any,
    *,
    initial: nn.Module | str | Path | None = None,
    tolerance: float = 1.01,
    excess: float | None = None,
    draws: int = 10,
    n_images: int = 1_000,
    n_a: int = 11,
    n_s: int = 21,
    s_range: tuple[float, float] = (1e-3, 10.0),
    surface: str | None = None,
    layers: str = DEFAULTS.layers,
    types: str = DEFAULTS.types,
    group: str = DEFAULTS.group,
    seed: int = DEFAULTS.seed,
    batch_size: int | str = DEFAULTS.batch_size,
    dtype: str = "float32",
    device: str = DEFAULTS.device,
    level: float = DEFAULTS.level,
    labels: LabelsGiven = "auto",
    classes: str | Path | Sequence[str] | None = None,
    keep_images: str | Path | None = None,
    keep_points: str | Path | None = None,
    progress: bool = True,
) -> ModuleCriticality:
    """Measure how far each module can go towards its initial values, and under how much noise, at the same loss.

    The module criticality of a layer l is the smallest ``(a / s)^2 ||theta_l - theta0_l||^2`` over ``0 <= a <= 1`` and
    ``s > 0`` for which the mean loss with ``(1 - a) theta0_l + a theta_l + u`` in its place, u normal with the standard
    deviation s, is at most what is allowed, and all other layers are trained (Chatterji, Neyshabur & Sedghi 2020,
    arXiv 1912.00528). 0: the initial values do as well. The model is left bit for bit as it was.

    Args:
        model: as for `layercrit.measure`.
        images: likewise. They need labels, for the loss is the cross-entropy with these.
        initial: weights before training: a weight file, ``DIR@epoch=0`` of a training run, a model reference or a
            module, of the very same architecture. By default those of the training run that the model is from.
        tolerance: what is allowed, as a factor of the trained network's loss on the images, as published.
        excess: what is allowed above the trained network's loss, in nats, in place of ``tolerance``.
        draws: draws of the noise. Each draws one normal number for each parameter, which is used all over the grid.
        n_images: how many of the images to use, drawn by ``seed``; all if there are fewer.
        n_a: places on the path, evenly from 0 to 1.
        n_s: standard deviations of the noise, evenly in their logarithm.
        s_range: the smallest and the largest of them, in units of the root mean square of the module's parameters.
        surface: a module for which the whole grid is evaluated, for its figure.
        layers: as for `layercrit.measure`.
        types: likewise.
        group: likewise; a module is then a whole block, say.
        seed: of the draws and of the choice of images.
        batch_size: as for `layercrit.measure`.
        dtype: ``float32`` (folded and fused) or ``reference`` (the network's own operators). bfloat16 would round the
            loss by more than what is allowed.
        device: as for `layercrit.measure`.
        level: confidence level of the limits, between 0 and 1.
        labels: as for `layercrit.measure`.
        classes: likewise.
        keep_images: likewise.
        keep_points: a file for the points of the grid that were evaluated, with which an interrupted measurement of
            the same model, images and settings goes on. None: they are not kept.
        progress: whether to show a progress bar on a terminal.

    Raises:
        ProtocolError: a setting makes no sense, or there are no initial weights.
        ProbeError: the images have no labels.
        ModelError: the initial weights are those of another architecture.
        LayercritError: as `layercrit.measure`.

    Notes:
        A constraint on the mean loss over draws and images; the limits of the criticality are those values that it has
        where the confidence limits of the excess loss take the place of its mean (two crossed random effects, see
        `layercrit.contrasts.crossed_contrasts`). The published code draws noise once and takes a grid of 11 x 11.

    Examples:
        >>> import layercrit
        >>> images = "layercrit-demo/fashion-mnist-test.npz"
        >>> found = layercrit.measure_module_criticality(
        ...     "file:layercrit-demo/models/baseline-epochs", images, layers="fc", n_images=50, draws=2, n_a=3, n_s=3
        ... )
        >>> found.to_pandas()["layer"].tolist()
        ['fc']
    """
    started = time.perf_counter()
    grid, allowed, protocol = check_settings(
        tolerance, excess, draws, n_a, n_s, s_range, dtype, n_images=n_images, layers=layers, types=types, group=group,
        seed=seed, batch_size=batch_size, device=device, level=level,
    )  # fmt: skip
    if not are_wanted(labels):
        raise ProbeError(_WITHOUT_LABELS.format("they were left out with labels='none'"))
    attack, images = split_attack(images)
    before = _initial(model, initial)
    with Bar(progress) as bar, opened_subject(model, images, labels, protocol, before) as subject:
        subject.join_shared()
        _check_names(before, subject)
        _check_surface(surface, subject)
        probe_set = draw_images(images, subject, n_images, seed, attack, labels, classes, keep_images, bar)
        session = Session(protocol, subject, probe_set, ["cosine"], True, bar)
        if session.labels is None:
            raise ProbeError(_WITHOUT_LABELS.format(f"{probe_set.source!r} has none that the model knows"))
        paths = ModulePaths(subject, Losses(session, session.labels), grid=grid, allowed=allowed, draws=draws,
                            seed=seed, level=level)  # fmt: skip
        asked = dict(zip(ASKED, (tolerance, excess, draws, n_a, n_s, list(s_range), layers, types, group, seed, dtype,
                                 level), strict=True))  # fmt: skip
        of = identity_of(subject.model, str(subject.donor_identity), probe_set, asked)
        # labels as the model takes them, which names of classes decide
        kept = None if keep_points is None else KeptPoints(keep_points, {**of, "labels": session.labels.tolist()})
        known, keep = ({}, _forget) if kept is None else (kept.known, kept.add)
        paths.search(bar, known, keep)
        if surface is not None:
            paths.complete(surface, bar, known, keep)
        about = {"surface": surface, "asked": asked, "seconds": round(time.perf_counter() - started, 3)}
        record = {**_record(session, grid, paths), **about}
        return ModuleCriticality(paths.table(), paths.points(), record)


def check_settings(
    tolerance: float, excess: float | None, draws: int, n_a: int, n_s: int, s_range: tuple[float, float], dtype: str,
    **others: Any,
) -> tuple[Grid, Allowed, Protocol]:  # fmt: skip
    """Return what settings mean.

    Raises:
        ProtocolError: one makes no sense.
    """
    return Grid.of(n_a, n_s, s_range), Allowed(tolerance, excess), _protocol(draws, dtype, **others)


def identity_of(model: Model, initial: str, probe_set: ProbeSet, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the numbers of a measurement depend on, as plain data: equal identities mean equal numbers.

    Args:
        model: the trained model.
        initial: hash of the initial weights.
        probe_set: the images, whose hash is of their labels, too.
        asked: the settings, of `ASKED`.
    """
    identity = {
        "weights": model.sha256,
        "initial weights": initial,
        "architecture": model.architecture,
        "output": model.output_in_words,
        "normalisation": [model.mean, model.std],
        "images": probe_set.sha256,
        "n_images": probe_set.n_images,
        **{name: asked[name] for name in ASKED},
    }
    return dict(json.loads(json.dumps(identity)))


def _forget(found: Iterable[tuple[str, Point, Excess]]) -> None:
    """Keep no points."""


def _protocol(draws: int, dtype: str, **settings: Any) -> Protocol:
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ProtocolError(f"draws must be a whole number of at least 1; got {draws!r}.")
    if dtype not in _DTYPES:
        raise ProtocolError(
            f"The dtype {dtype!r} is not for module criticality: expected one of {', '.join(_DTYPES)}. bfloat16 rounds "
            "the loss by more than what is allowed; leave it out for float32."
        )
    return Protocol(trials=1, dtype=dtype, reset="rewind", **settings)  # going back is no draw, and so one trial


def _initial(model: str | Model | nn.Module, initial: nn.Module | str | Path | None) -> nn.Module | str | Path:
    """Return where the initial weights come from; by default, the training run of the model.

    Raises:
        ProtocolError: none were given, and the model is of no run that kept them.
    """
    if initial is not None:
        is_model = not isinstance(initial, nn.Module) and is_reference(initial)
        return open_model(str(initial)).network if is_model else initial
    reference = model.reference if isinstance(model, Model) else str(model) if isinstance(model, str) else ""
    own = initial_of_run(reference)
    if own is None:
        of = f"{reference!r} is" if reference else "the model is"
        raise ProtocolError(
            f"Module criticality needs the weights before training, and {of} of no training run that kept its epoch 0. "
            "Give them with --initial (initial=...): a weight file, DIR@epoch=0 of a training run, or a model "
            "reference. Without them: `layercrit measure` and `layercrit worst-case`."
        )
    return own


def _check_names(initial: nn.Module | str | Path, subject: Subject) -> None:
    """Make sure that a network of initial weights has the names of the model's; files are checked as they are read."""
    if not isinstance(initial, nn.Module):
        return
    own, theirs = (dict(network.named_parameters()) for network in (subject.network, initial))
    if unlike := sorted(own.keys() ^ theirs.keys()):
        whose = "the model" if unlike[0] in own else "the initial network"
        raise ModelError(
            f"The initial weights are not of the architecture of {subject.model.reference!r}: {len(unlike)} parameters "
            f"are in one of the two only, such as {unlike[0]!r} in {whose}. Give the weights that this model was "
            "trained from."
        )


def _check_surface(surface: str | None, subject: Subject) -> None:
    names = [layer.name for layer in subject.layers]
    if surface is not None and surface not in names:
        raise LayerError(f"There is no module {surface!r} whose whole grid could be evaluated. {near(surface, names)}")


def _record(session: Session, grid: Grid, paths: ModulePaths) -> dict[str, Any]:
    """Return how it was measured, as plain data."""
    return {
        **about_session(session),
        "initial": session.subject.donor_in_words,
        "n_draws": paths.draws,
        "a": list(grid.a),
        "s": list(grid.s),
        "n_points_of_grid": len(grid.a) * len(grid.s),
        "loss": paths.loss,
        "allowed_loss": paths.allowed_loss,
        "level": paths.level,
        "covers": paths.covers,
    }


def _read_csv(path: Path) -> pd.DataFrame:
    """Return a table as `write_csv` wrote it, bit for bit; empty where a number is NaN."""
    with open_regular(path) as file:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    columns: dict[str, Any] = {}
    for name, cells in table.items():
        if name in _TEXTS:
            columns[str(name)] = [unguarded(cell) for cell in cells]
        else:
            columns[str(name)] = [int(cell) if name in _WHOLE else float(cell or "nan") for cell in cells]
    return pd.DataFrame(columns)
