"""Models of the zoo by reference, ``zoo:ID``."""

from typing import Any

from layercrit.errors import ModelError, ZooError
from layercrit.models.model import Model
from layercrit.models.sources import ModelSource, Progress, model_source, parse
from layercrit.models.zoo.entries import ZooEntry
from layercrit.models.zoo.fetching import fetch_entry, find_entry, is_fetched, open_entry


@model_source("zoo")
class _Zoo(ModelSource):
    """Published weights of the zoo, downloaded beforehand (`layercrit zoo fetch`)."""

    forms = ("zoo:ID",)

    def open(self, rest: str, options: dict[str, Any]) -> Model:
        return open_entry(_entry(rest), options)

    def architecture(self, rest: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        source, rest, own = parse(_entry(rest).architecture)
        return source.architecture(rest, own | options)

    def is_here(self, rest: str) -> bool:
        return is_fetched(_entry(rest))

    def fetch(self, rest: str, progress: Progress | None = None) -> None:
        if not self.is_here(rest):
            fetch_entry(_entry(rest), progress=progress)


def _entry(name: str) -> ZooEntry:
    try:
        return find_entry(name)
    except ZooError as error:
        raise ModelError(str(error)) from error
