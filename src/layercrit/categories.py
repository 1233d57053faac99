"""The categories of training methods that the paper compares, in the order of its tables and figures."""

__all__ = ["ADVERSARIAL", "CATEGORIES"]

ADVERSARIAL = "adversarial_training"
"""The category that correlations with accuracy are also computed without."""

CATEGORIES = ("baseline", "training_recipes", "augmentation", ADVERSARIAL, "contrastive", "freezing")
