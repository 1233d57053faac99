"""What a study's folder says of the study: its settings, its images and its models."""

from collections.abc import Mapping
from typing import Any

from layercrit.probes.probe_set import ProbeSet
from layercrit.protocol import DEFAULTS
from layercrit.study.entries import ModelEntry
from layercrit.study.file import StudyFile
from layercrit.study.rows import ModelRow

__all__ = ["facts_of", "model_row"]

# settings that do not decide which cells a study has
_UNDECIDING = ("batch_size", "device", "level", "interval", "half_width", "minutes", "pilot", "max_trials")


def facts_of(study: StudyFile, probe_sets: Mapping[str | None, ProbeSet], n_first_images: int) -> dict[str, Any]:
    """Return the facts about a study; those under ``measured`` decide which cells it has.

    Args:
        study: the study.
        probe_sets: its images by name, as they were drawn.
        n_first_images: how many of them are measured before anything is planned.
    """
    about_images = {name: one.to_dict() | {"labels": one.labels is not None} for name, one in probe_sets.items()}
    first = probe_sets[study.probe_set].first(n_first_images)
    protocol = {**study.protocol.to_dict(), "resets": list(study.resets), "distances": list(study.distances),
                "n_images": study.n_images}  # fmt: skip
    del protocol["reset"], protocol["norm_statistics"]
    undeciding: tuple[str, ...] = _UNDECIDING
    if study.protocol.is_planned:  # the level decides the plan
        undeciding = ("batch_size", "device", "trials")
    if study.protocol.sets == DEFAULTS.sets:  # as in studies from before there were sets
        undeciding = (*undeciding, "sets")
    deciding = {k: v for k, v in protocol.items() if k not in undeciding}
    return {
        "name": study.name,
        "baseline": study.baseline,
        "leave_out": list(study.leave_out),
        "protocol": protocol,
        "probe_set": about_images[study.probe_set],
        **({"probe_sets": about_images} if study.further_images else {}),
        **({} if study.module_criticality is None else {"module_criticality": dict(study.module_criticality)}),
        "measured": {**deciding, "probe_set": first.sha256},
    }


def model_row(entry: ModelEntry) -> ModelRow:
    """Return the row of a model before it is opened."""
    return ModelRow(
        entry.name,
        entry.reference,
        entry.category,
        entry.label,
        entry.accuracy,
        attack_norm=entry.attack_norm,
        eps=entry.eps,
        variant_of=entry.variant_of,
        epoch=entry.epoch,
        probe_set=entry.probe_set,
        norm_statistics=None if entry.norm_statistics == DEFAULTS.norm_statistics else entry.norm_statistics,
    )
