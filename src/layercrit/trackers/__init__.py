"""Experiment trackers: show a run in W&B, MLflow, TensorBoard, Trackio or your own."""

from layercrit.trackers.callbacks import OnCell
from layercrit.trackers.libraries import Mlflow, TensorBoard, Trackio, WandB
from layercrit.trackers.tracker import TRACKERS, Tracker, metric_of, need, plain_name, tracker
from layercrit.trackers.tracking import Tracking

__all__ = [
    "TRACKERS",
    "Mlflow",
    "OnCell",
    "TensorBoard",
    "Tracker",
    "Tracking",
    "Trackio",
    "WandB",
    "metric_of",
    "need",
    "plain_name",
    "tracker",
]
