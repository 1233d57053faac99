"""Which layers of a trained vision model do its decisions depend on?"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from layercrit import _former

if TYPE_CHECKING:
    from layercrit.comparison import compare
    from layercrit.distances import distance
    from layercrit.errors import LayercritError
    from layercrit.measurement import Measurement
    from layercrit.measuring import measure
    from layercrit.models.model import Model
    from layercrit.models.references import open_model
    from layercrit.probes.probe_set import ProbeSet
    from layercrit.reporting.reports import report
    from layercrit.resets import reset
    from layercrit.study.tables import Study, load_study

__all__ = [
    "LayercritError",
    "Measurement",
    "Model",
    "ProbeSet",
    "Study",
    "compare",
    "distance",
    "load_study",
    "measure",
    "open_model",
    "report",
    "reset",
]

__version__ = metadata.version("layercrit")

_former.install()

_HOME = {
    "LayercritError": "errors",
    "Measurement": "measurement",
    "Model": "models",
    "ProbeSet": "probes",
    "Study": "study",
    "compare": "comparison",
    "distance": "distances",
    "load_study": "study",
    "measure": "measuring",
    "open_model": "models",
    "report": "reporting",
    "reset": "resets",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Names are fetched when first used, so that `layercrit --help` does not wait for torch.
    if name not in _HOME:
        raise AttributeError(f"module 'layercrit' has no attribute {name!r}")
    return getattr(import_module(f"layercrit.{_HOME[name]}"), name)
