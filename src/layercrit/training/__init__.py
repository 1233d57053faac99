"""How models are made: one file per family of methods, and the loop that trains by any of them."""

from layercrit.training import adversarial, augmentation, baseline, contrastive, freezing, recipes
from layercrit.training.data import TrainingData, open_training_data
from layercrit.training.loop import TrainedModel, train
from layercrit.training.methods import METHODS, Method, get_method, method, setting
from layercrit.training.runs import Options

__all__ = [
    "METHODS",
    "Method",
    "Options",
    "TrainedModel",
    "TrainingData",
    "adversarial",
    "augmentation",
    "baseline",
    "contrastive",
    "freezing",
    "get_method",
    "method",
    "open_training_data",
    "recipes",
    "setting",
    "train",
]
