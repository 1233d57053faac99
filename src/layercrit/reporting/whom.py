"""For whom a model's layers matter: by class, by right and wrong predictions and by image, as the report shows it."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from layercrit.comparison import Comparison, compared_rows
from layercrit.errors import ProbeError, StudyError
from layercrit.figures.class_maps import classes_by_similarity
from layercrit.study.image_tables import probe_set_of
from layercrit.study.tables import Study

__all__ = ["class_table", "whom_data"]

_EACH = 4  # images that a layer's reset moves most, and as many that it moves least
_MOST_PICTURES = 400  # in a page, of all models and layers
_PICTURE = 56  # pixels of the longer side, at most
_SMALL = 32  # pixels up to which a picture is kept without loss


def class_table(study: Study, comparison: Comparison, model: str) -> tuple[pd.DataFrame, str, dict[str, float]]:
    """Return the criticality of a model's layers by class, as a comparison names layers.

    Returns:
        the table; ``label``, or ``prediction`` where there are no labels; and of each label the share of its images
        that the trained network names right, empty where that is not known.

    Raises:
        StudyError: there are no distances of single images.
        ProbeError: neither labels nor predictions are known.
    """
    images = study.images_of(model)
    of = "prediction" if images.labels is None and images.predictions is not None else "label"
    table = compared_rows(study.by_class(model, of=of, reset=comparison.reset), comparison)
    return table, of, images.accuracy_by(of)


def whom_data(
    study: Study, comparison: Comparison, models: Sequence[str], places: Sequence[str], thumbnails: bool
) -> list[dict[str, Any]]:
    """Return what the page shows of some models; those of which nothing is known by class are left out.

    Args:
        study: finished or not.
        comparison: of its models.
        models: those to show.
        places: all models in the order of the page.
        thumbnails: whether to add small pictures of the images that each layer's reset moves most and least.
    """
    found = []
    layers = list(comparison.criticality.columns)
    for model in models:
        try:
            table, of, accuracy = class_table(study, comparison, model)
        except (StudyError, ProbeError):
            continue
        n_pictures = _MOST_PICTURES // len(models)
        found.append(
            {
                "model": places.index(model),
                "of": of,
                **_classes(table, layers, accuracy),
                "correctness": _correctness(study, comparison, model, layers),
                "moved": _moved(study, comparison, model, layers, n_pictures) if thumbnails else None,
            }
        )
    return found


def _classes(table: pd.DataFrame, layers: Sequence[str], accuracy: Mapping[str, float]) -> dict[str, Any]:
    """Return the classes that are shown, in their order, with criticality and limits, classes x layers."""
    shown = classes_by_similarity(table)
    rows = table.astype({"class": str, "layer": str}).set_index(["class", "layer"])
    counts = rows["n_images"].groupby(level="class").first()
    grids = {
        name: [[_rounded(rows[name].get((group, layer))) for layer in layers] for group in shown.index]
        for name in ("criticality", "low", "high")
    }
    return {
        "classes": [
            {"name": name, "n_images": int(counts[name]), "accuracy": _rounded(accuracy.get(name))}
            for name in shown.index
        ],
        "n_classes": len(counts),
        **grids,
    }


def _correctness(study: Study, comparison: Comparison, model: str, layers: Sequence[str]) -> dict[str, Any] | None:
    """Return criticality for images that the trained network names right and wrong; None where that is not known."""
    images = study.images_of(model)
    if images.labels is None or images.predictions is None or images.correct.all() or not images.correct.any():
        return None
    table = compared_rows(study.by_correctness(model, reset=comparison.reset), comparison)
    rows = table.astype({"layer": str}).set_index("layer").reindex(list(layers))
    return {
        "n_correct": int(images.correct.sum()),
        "n_wrong": int((~images.correct).sum()),
        **{
            name: [_rounded(value) for value in rows[name]]
            for name in ("correct", "wrong", "difference", "low", "high")
        },
    }


def _moved(
    study: Study, comparison: Comparison, model: str, layers: Sequence[str], n_pictures: int
) -> dict[str, Any] | None:
    """Return the pictures of images that resets move most and least; None where the images are not there any more.

    Each picture is there once, however many layers move it: ``most`` and ``least`` have for each layer places in
    ``pictures`` with criticality.
    """
    probe_set = probe_set_of(study.folder, study.models.set_index("model")["record"][model])
    if probe_set is None:
        return None
    each = max(1, min(_EACH, n_pictures // (2 * len(layers)), probe_set.n_images // 2))
    table = compared_rows(study.by_image(model, reset=comparison.reset), comparison)
    places: dict[int, int] = {}
    found: dict[str, list[list[list[float]]]] = {"most": [], "least": []}
    for layer in layers:
        own = table[table["layer"] == layer].dropna(subset="criticality").sort_values(
            "criticality", ascending=False, kind="stable"
        )  # fmt: skip
        for side, rows in (("most", own.iloc[:each]), ("least", own.iloc[::-1].iloc[:each])):
            wanted = [
                [places.setdefault(int(position), len(places)), round(float(value), 4)]
                for position, value in zip(rows["position"], rows["criticality"], strict=True)
                if int(position) in places or len(places) < n_pictures
            ]
            found[side].append(wanted)
    names = table.drop_duplicates("position").set_index("position")
    pictures = [
        {
            "picture": picture(probe_set.batch(position, position + 1).numpy()[0]),
            "label": _text(names["label"][position]),
            "prediction": _text(names["prediction"][position]),
        }
        for position in places
    ]
    return {**found, "pictures": pictures}


def picture(pixels: npt.NDArray[np.uint8]) -> str:
    """Return an image ``(channels, height, width)`` as a small data URI: PNG where it is tiny, else JPEG.

    Of other than one or three channels, the first three are red, green and blue, or the first is grey.
    """
    from PIL import Image

    channels = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    image = Image.fromarray(channels[0] if len(channels) == 1 else np.ascontiguousarray(channels.transpose(1, 2, 0)))
    form = "PNG" if max(image.size) <= _SMALL else "JPEG"
    image.thumbnail((_PICTURE, _PICTURE))
    file = io.BytesIO()
    image.save(file, form, **({"optimize": True} if form == "PNG" else {"quality": 75}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 4)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
