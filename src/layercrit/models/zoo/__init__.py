"""Published checkpoints: what is known about them, and how they are downloaded and read."""

from layercrit.categories import CATEGORIES
from layercrit.models.zoo.accuracy import AccuracyCheck, check_accuracy
from layercrit.models.zoo.entries import Citation, ZooEntry, ZooFile, read_zoo
from layercrit.models.zoo.fetching import ZOO, fetch_entry, find_entries, find_entry, is_fetched, open_zoo_file

__all__ = [
    "CATEGORIES",
    "ZOO",
    "AccuracyCheck",
    "Citation",
    "ZooEntry",
    "ZooFile",
    "check_accuracy",
    "fetch_entry",
    "find_entries",
    "find_entry",
    "is_fetched",
    "open_zoo_file",
    "read_zoo",
]
