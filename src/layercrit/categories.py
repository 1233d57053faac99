"""The categories of training methods that the paper compares, in the order of its tables and figures."""

from typing import Literal, get_args

__all__ = ["ADVERSARIAL", "CATEGORIES", "Category"]

Category = Literal["baseline", "training_recipes", "augmentation", "adversarial_training", "contrastive", "freezing"]

CATEGORIES: tuple[Category, ...] = get_args(Category)
"""All of them."""

ADVERSARIAL: Category = "adversarial_training"
"""The category that correlations with accuracy are also computed without."""
