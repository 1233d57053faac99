"""The columns of the table of cells, each with its meaning."""

from layercrit.protocol import MATCHED

__all__ = ["CELL_COLUMNS", "NOT_REACHED", "PER_IMAGE", "WHOLE"]

NOT_REACHED = "not_reached"
"""Status of a layer all of whose cells are ok, but which has a larger half-width than was asked for."""

WHOLE = ("ok", NOT_REACHED)
"""Statuses of a layer all of whose cells are ok."""

PER_IMAGE = "_per_image"  # ends the columns of cells.parquet that hold a list of one distance per image

CELL_COLUMNS = {
    "model": "the model reference",
    "layer": "the layer's name",
    "type": "its type, or those of a group joined by '+'",
    "depth": "its position among the layers that are reset, in the order in which the network first uses them, from 0",
    "n_parameters": "how many parameters a reset replaces",
    "flops_after": "share of a forward pass's FLOPs recomputed after the reset, in [0, 1]; NaN where not known",
    "reset": "what replaced the parameters",
    "trial": "which draw, from 0",
    "seed": "of the trial's donor; the layer's other random numbers are drawn under a hash of it and the layer's name",
    "status": "ok; unchanged: the new values are the trained ones; not_finite: predictions became NaN or infinite; "
    "no_branch: the reset `skip` found no residual branch to leave out",
    "delta_norm": "Euclidean norm of the new minus the trained values",
    "n_images": "how many images the means below are over",
    MATCHED: "the distance cosine between predictions at the model's matched temperature",
    "loss": "mean cross-entropy after the reset, in nats",
    "top1_accuracy": "share of images whose label is the most probable class after the reset",
    "top5_accuracy": "share of images whose label is among the five most probable classes after the reset",
    "recovered_accuracy": "top1_accuracy divided by that of the trained network",
}
"""Columns of the table of cells. There is also one for the mean of each distance; ``cosine`` is criticality."""
