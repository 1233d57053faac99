"""The table ``[module_criticality]`` of a study file, and which models it is about."""

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from layercrit.errors import StudyError, near
from layercrit.models.file_source import initial_of_run
from layercrit.probes.probe_set import ProbeSet
from layercrit.study.entries import ModelEntry
from layercrit.study.image_entries import Images
from layercrit.study.schema import ModuleCriticalityTable

__all__ = ["check_labels", "models_asked", "module_mistakes", "module_settings"]

_NO_LABELS = (
    "[module_criticality] is about the loss, which needs labels, and the images {} have none. Give some with the key "
    "labels of [images], or leave the section out"
)


def module_settings(table: ModuleCriticalityTable, initial: str | Path | None) -> dict[str, Any]:
    """Return what the table says, as arguments of `layercrit.measure_study_module_criticality`.

    Args:
        table: the table without mistakes.
        initial: as the table says, with an absolute path.
    """
    found = table.model_dump(exclude_none=True)
    if table.excess is not None:
        del found["tolerance"]  # whose place it takes
    return found | ({} if initial is None else {"initial": str(initial)})


def module_mistakes(
    table: ModuleCriticalityTable, models: Sequence[ModelEntry], images: Sequence[Images], pending: Set[str]
) -> Iterator[str]:
    """Yield what is wrong with the table beyond its single keys.

    Args:
        table: without values that are wrong by themselves.
        models: all of the study, without variants.
        images: all probe sets.
        pending: names of models whose training has not finished, which may keep its epoch 0.
    """
    if {"tolerance", "excess"} <= table.model_fields_set:
        yield "[module_criticality] excess takes the place of tolerance: leave one of them out"
    sets = [one.name for one in images]
    shown = next((one for one in images if table.probe_set in (None, one.name)), None)
    if shown is None:
        named = [name for name in sets if name is not None]
        listed = near(str(table.probe_set), named) if named else "There is only one, without a name: leave the key out"
        yield f"[module_criticality] probe_set: there is no probe set {table.probe_set!r}. {listed}"
    elif shown.labels is False:
        yield _NO_LABELS.format(shown.source)
    names = [model.name for model in models]
    unknown = [name for name in table.models or () if name not in names]
    for name in unknown:
        yield f"[module_criticality] models: there is no model {name!r}. {near(name, names)}"
    if table.initial is not None or unknown or not models:
        return
    asked = [model for model in models if table.models is None or model.name in table.models]
    without = [one.name for one in asked if one.name not in pending and initial_of_run(one.reference) is None]
    if without and (table.models is not None or len(without) == len(asked)):
        listed = ", ".join(map(repr, without[:5])) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        yield (
            f"[module_criticality] needs weights from before training, and no epoch 0 was kept of {listed}. Name a "
            "training run as the model (file:DIR, of `layercrit train`), give the weights that the models were trained "
            "from with the key initial, or name other models with the key models"
        )


def models_asked(models: Sequence[ModelEntry], settings: Mapping[str, Any]) -> list[ModelEntry]:
    """Return the models that the settings are about and that have initial weights.

    Args:
        models: all of a study, with variants.
        settings: as `module_settings` returns them.
    """
    if not models:
        return []
    first, wanted = models[0], settings.get("models")
    probe_set = settings.get("probe_set", first.probe_set)
    return [
        one
        for one in models
        if (one.probe_set, one.norm_statistics, one.epoch) == (probe_set, first.norm_statistics, None)
        and (wanted is None or {one.name, one.variant_of} & {*wanted})
        and ("initial" in settings or initial_of_run(one.reference) is not None)
    ]


def check_labels(settings: Mapping[str, Any] | None, probe_sets: Mapping[str | None, ProbeSet]) -> None:
    """Make sure that the images that module criticality is measured on have labels.

    Args:
        settings: as `module_settings` returns them; None where nothing is asked for.
        probe_sets: those of the study by name, the first one first.

    Raises:
        StudyError: they have none.
    """
    if settings is None:
        return
    images = probe_sets[settings.get("probe_set", next(iter(probe_sets)))]
    if images.labels is None:
        raise StudyError(_NO_LABELS.format(f"of {images.source!r}") + ".")
