"""Many models measured under one protocol: the study file, the plan, the run, and the tables."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layercrit.study.tables import Study, load_study

__all__ = ["Study", "load_study"]


def __getattr__(name: str) -> Any:
    # The tables need pandas and the statistics, which a process that runs tasks does not wait for.
    if name not in __all__:
        raise AttributeError(f"module 'layercrit.study' has no attribute {name!r}")
    return getattr(import_module("layercrit.study.tables"), name)
