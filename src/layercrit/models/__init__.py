"""Trained networks: references, the sources they open from, and safe reading of weights."""

from layercrit.models.model import Classifier, Model
from layercrit.models.outputs import logits_of
from layercrit.models.references import open_model, without_weights
from layercrit.models.sources import MODEL_SOURCES, ModelSource, model_source

__all__ = [
    "MODEL_SOURCES",
    "Classifier",
    "Model",
    "ModelSource",
    "logits_of",
    "model_source",
    "open_model",
    "without_weights",
]
