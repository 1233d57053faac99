"""Models of the zoo by reference, ``zoo:ID``."""

from typing import Any

from layercrit.models.model import Model
from layercrit.models.sources import ModelSource, Progress, model_source, parse
from layercrit.models.zoo.fetching import fetch_entry, find_entry, is_fetched, open_entry


@model_source("zoo")
class _Zoo(ModelSource):
    """Published weights of the zoo, fetched before (`layercrit zoo fetch`)."""

    forms = ("zoo:ID",)

    def open(self, rest: str, options: dict[str, Any]) -> Model:
        return open_entry(find_entry(rest), options)

    def architecture(self, rest: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        source, rest, own = parse(find_entry(rest).architecture)
        return source.architecture(rest, own | options)

    def is_here(self, rest: str) -> bool:
        return is_fetched(find_entry(rest))

    def fetch(self, rest: str, progress: Progress | None = None) -> None:
        if not self.is_here(rest):
            fetch_entry(find_entry(rest), progress=progress)
