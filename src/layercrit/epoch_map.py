"""The map over epochs: how far predictions move when a layer goes back to an epoch, and which layers matter at each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd

from layercrit.correlations import RankAgreement, rank_agreement
from layercrit.errors import ProtocolError
from layercrit.foreign_text import write_csv
from layercrit.layers import layer_labels, stages_of
from layercrit.measurement import Measurement
from layercrit.measuring import measure
from layercrit.models.epoch_files import EpochFiles, as_epoch_of, epoch_files
from layercrit.models.file_source import epochs_of, training_run
from layercrit.models.references import open_model
from layercrit.models.sources import short_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["KINDS", "EpochMap", "Kind", "measure_epochs"]

Kind = Literal["rewound", "trained"]
KINDS: tuple[Kind, ...] = ("rewound", "trained")

_TITLES: Mapping[Kind, str] = {
    "rewound": "{}: its layers set back to an epoch",
    "trained": "{}: fresh draws in the network after each epoch",
}


@dataclass(frozen=True, eq=False, repr=False)
class EpochMap:
    """The criticality of each layer of a training run, over its epochs.

    Two maps have a row for each epoch. ``rewound``: a layer of the final network goes back to its values after the
    epoch (Zhang, Bengio & Singer 2022, section 3), below a row for fresh draws. ``trained``: fresh draws in the network
    as it was after the epoch, below a row for the final network.

    Attributes:
        model: reference of the final network.
        measurements: the map, and the epoch (None: fresh draws, or the final network) -> its measurement. Fresh draws
            in the final network stand in both maps.
    """

    model: str
    measurements: Mapping[tuple[Kind, int | None], Measurement]

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per map, epoch and layer.

        ``map`` is ``rewound`` or ``trained``; ``epoch`` is NaN in the row for fresh draws, or for the final network.
        ``criticality`` is 0 where the layer has the values of the epoch already: its ``status`` is then ``unchanged``.
        Other columns are those of `Measurement.to_pandas`.
        """
        rows = []
        for (kind, epoch), measurement in self.measurements.items():
            table = measurement.to_pandas()
            unchanged = measurement.cells["status"].eq("unchanged").groupby(measurement.cells["layer"]).all()
            is_unchanged = table["layer"].map(unchanged).to_numpy(bool)
            table.loc[is_unchanged, "criticality"] = 0.0
            table.loc[is_unchanged, "status"] = "unchanged"
            table.insert(0, "map", kind)
            table.insert(1, "epoch", np.nan if epoch is None else float(epoch))
            rows.append(table)
        return pd.concat(rows, ignore_index=True)

    def grid(self, kind: Kind = "rewound") -> pd.DataFrame:
        """Return criticality as rows x layers, in depth order; rows are named as in the figure."""
        table = self.to_pandas()
        table = table[table["map"] == kind]
        names = [self.row_name(kind, epoch) for (one, epoch) in self.measurements if one == kind]
        table = table.assign(row=[self.row_name(kind, None if np.isnan(one) else int(one)) for one in table["epoch"]])
        layers = list(dict.fromkeys(table["layer"]))
        rows = table.pivot_table(index="row", columns="layer", values="criticality", dropna=False)
        return rows.reindex(index=names, columns=layers)

    def agreement(self, epoch: int = 0, level: float = 0.95) -> RankAgreement:
        """Return how alike going back to an epoch and fresh draws order the layers.

        Args:
            epoch: 0 is the re-initialisation of Zhang et al.
            level: of the interval, which is for new layers of such a network and new draws.

        Raises:
            ProtocolError: the map has no row for this epoch.
        """
        if ("rewound", epoch) not in self.measurements:
            raise ProtocolError(
                f"The map has no row for going back to epoch {epoch}: {self!r}. Measure it with --epochs (epochs=...)."
            )
        cells = self.measurements["rewound", None].cells
        draws = cells[cells["status"] == "ok"].pivot_table(index="trial", columns="layer", values="cosine")
        draws = draws[[layer for layer in draws if draws[layer].notna().all()]]
        back = self.grid("rewound").loc[self.row_name("rewound", epoch)].reindex(draws.columns)
        both = back.dropna()
        return rank_agreement(draws[both.index].to_numpy(), both.to_numpy(), level)

    @property
    def name(self) -> str:
        """What the network is called: the name that it was given, or one made of its reference."""
        given = next(iter(self.measurements.values())).record.get("name") if self.measurements else None
        return given or short_name(self.model)

    @property
    def kinds(self) -> list[Kind]:
        """Which maps there are."""
        return list(dict.fromkeys(kind for kind, _ in self.measurements))

    @property
    def epochs(self) -> list[int]:
        """Which epochs there are."""
        return list(dict.fromkeys(epoch for _, epoch in self.measurements if epoch is not None))

    def plot(self, kind: Kind = "rewound") -> "Figure":
        """Return a map as a figure: a row per epoch, a square per layer."""
        from layercrit.figures.heat_maps import heat_map

        values = self.grid(kind)
        shapes = next(iter(self.measurements.values())).record["layers"]
        labels = layer_labels({name: "x".join(map(str, shapes[name]["shape"])) for name in values.columns})
        accuracies = [
            self.measurements[kind, epoch].record["predictions"].get("top1_accuracy") if kind == "trained" else None
            for (one, epoch) in self.measurements
            if one == kind
        ]
        rows = pd.DataFrame({"model": values.index, "label": None, "category": None,
                             "accuracy": np.array(accuracies, np.float64)})  # fmt: skip
        title = _TITLES[kind].format(self.name)
        return heat_map(
            values, rows, title=title, layer_labels=labels, stages=stages_of(list(values.columns)), rows="rows"
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``epochs.csv`` and the figures of all maps into a folder; return the files."""
        from layercrit.figures.style import save_figure

        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(self.to_pandas(), folder / "epochs.csv")
        figures = [path for kind in self.kinds for path in save_figure(self.plot(kind), folder / f"epochs-{kind}")]
        return [folder / "epochs.csv", *figures]

    def __repr__(self) -> str:
        return f"<EpochMap of {self.model}: epochs {', '.join(map(str, self.epochs))}>"

    @staticmethod
    def row_name(kind: Kind, epoch: int | None) -> str:
        """Return what a row of a map is called: ``epoch 5``, ``fresh draw``, ``final weights``."""
        if epoch is None:
            return "fresh draw" if kind == "rewound" else "final weights"
        return f"epoch {epoch}"


def measure_epochs(
    model: str,
    images: Any,
    *,
    epochs: Literal["all"] | Sequence[int] | EpochFiles = "all",
    maps: Sequence[Kind] = KINDS,
    folder: str | Path | None = None,
    **settings: Any,
) -> EpochMap:
    """Measure the map over epochs of a training run.

    The cost is that of one measurement for the final network and for each epoch, and of one trial for each epoch again:
    going back to an epoch is no draw.

    Args:
        model: the reference of a training run's final weights, such as ``file:runs/plain``.
        images: as for `layercrit.measure`.
        epochs: those to measure, or ``all`` that the run has kept (``layercrit train --keep-epochs``). Of any other
            training, its weight files, of the same architecture as the model: see
            `layercrit.models.epoch_files.epoch_files`.
        maps: which of the two maps to measure; ``rewound`` alone takes one trial for each epoch.
        folder: where every measurement is kept as soon as it is finished; what is there is gone on with.
        settings: all else that `layercrit.measure` takes, but ``reset`` and ``donor``.

    Raises:
        ProtocolError: the model is no training run, it has not kept an epoch, or a setting cannot be given.
        CheckpointError: a weight file is missing, its epoch is not known, it does not fit the architecture, or it is
            another one than the training run has kept.
        LayercritError: as `layercrit.measure`.

    Examples:
        >>> import layercrit
        >>> run, images = "file:layercrit-demo/models/baseline-epochs", "layercrit-demo/fashion-mnist-test.npz"
        >>> found = layercrit.measure_epochs(run, images, layers="fc", n_images=50)
        >>> found.epochs
        [0, 1, 2, 4, 6]
    """
    for name in ("reset", "donor", "resume"):
        if name in settings:
            raise ProtocolError(f"The map over epochs sets {name} itself. Leave it out.")
    wanted = [kind for kind in KINDS if kind in maps]
    if not maps or len(wanted) < len(set(maps)):
        raise ProtocolError(f"maps must be a list of {' and '.join(KINDS)}, or one of them; got {maps!r}.")
    chosen = _epochs(model, epochs)
    for one in chosen.values():
        open_model(one.model)  # before anything is measured, which takes long
    place = None if folder is None else Path(folder).expanduser()
    fresh = _measured(place, "final-weights", model, images, settings)
    found: dict[tuple[Kind, int | None], Measurement] = {}
    for kind in wanted:
        found[kind, None] = fresh
        for epoch, one in chosen.items():
            what, how = (model, one.rewind) if kind == "rewound" else (one.model, {})
            found[kind, epoch] = _measured(place, f"{kind}-{epoch:04d}", what, images, {**settings, **how})
    return EpochMap(model, found)


@dataclass(frozen=True)
class _Epoch:
    """The weights after an epoch.

    Attributes:
        model: reference of the network with all of them.
        rewind: settings of a measurement in which a layer goes back to them.
    """

    model: str
    rewind: Mapping[str, str]


def _epochs(model: str, epochs: Literal["all"] | Sequence[int] | EpochFiles) -> dict[int, _Epoch]:
    """Return the epochs that are asked for, in order."""
    if isinstance(epochs, int | np.integer):
        raise ProtocolError(f"epochs is one number, {epochs}; expected a list of epochs, such as [{epochs}].")
    given = epochs if isinstance(epochs, str | Path | Mapping) else list(epochs)
    if given == []:
        raise ProtocolError(
            f"epochs names none: got {epochs!r}. Give numbers of epochs that the run has kept, weight files, or 'all'."
        )
    numbers = isinstance(given, list) and all(isinstance(one, int | np.integer) for one in given)
    if not numbers and given != "all":
        files = epoch_files(cast(EpochFiles, given))
        references = {epoch: as_epoch_of(model, file) for epoch, file in files.items()}
        return {epoch: _Epoch(one, {"reset": "rewind", "donor": one}) for epoch, one in references.items()}
    run = training_run(model)
    if run is None:
        raise ProtocolError(
            f"{model!r} is no training run with epochs that it kept. Train it with `layercrit train --keep-epochs "
            "1,2,5`, and name its folder: file:DIR. Of another training, name the weight files with --epochs "
            "(epochs=...), such as --epochs 'ckpt/epoch_*.pt'."
        )
    kept = epochs_of(run)
    chosen = sorted(kept) if given == "all" else sorted({int(epoch) for epoch in cast(list[int], given)})
    if missing := [epoch for epoch in chosen if epoch not in kept]:
        raise ProtocolError(
            f"{run} did not keep the weights of epoch {missing[0]}. Epochs that it kept: "
            f"{', '.join(map(str, sorted(kept)))}."
        )
    _, mark, options = model.partition("?")
    return {
        epoch: _Epoch(f"file:{run}@epoch={epoch}{mark}{options}", {"reset": f"rewind(epoch={epoch})"})
        for epoch in chosen
    }


def _measured(folder: Path | None, name: str, model: str, images: Any, settings: Mapping[str, Any]) -> Measurement:
    """Return one measurement, gone on with where its folder has one."""
    own = None if folder is None else folder / name
    known = Measurement.load(own) if own is not None and (own / "measurement.json").exists() else None
    found = measure(model, images, resume=known, **settings)
    if own is not None:
        found.save(own)
    return found
