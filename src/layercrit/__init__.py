"""Which layers of a trained vision model do its decisions depend on?"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from layercrit import _former

if TYPE_CHECKING:
    from layercrit.advice.advice import advise
    from layercrit.comparison import compare
    from layercrit.demo import copy_family, run_demo
    from layercrit.distances import distance
    from layercrit.epoch_map import measure_epochs
    from layercrit.errors import LayercritError
    from layercrit.feature_criticality import measure_feature_criticality
    from layercrit.measurement import Measurement
    from layercrit.measuring import list_layers, measure
    from layercrit.models.model import Model
    from layercrit.models.references import open_model
    from layercrit.models.sources import model_source
    from layercrit.module_criticality.values import measure_module_criticality
    from layercrit.probes.corruptions import corruption
    from layercrit.probes.kinds import image_source
    from layercrit.probes.probe_set import ProbeSet
    from layercrit.proxies.of_study import measure_study_proxies
    from layercrit.proxies.values import measure_proxies
    from layercrit.reporting.exports import export, export_format
    from layercrit.reporting.methods_section import methods_section
    from layercrit.reporting.reports import report
    from layercrit.reporting.study_figures import figure
    from layercrit.resets import reset
    from layercrit.study.executors import executor
    from layercrit.study.merging import merge_studies
    from layercrit.study.module_criticality import measure_study_module_criticality
    from layercrit.study.planning import plan_study
    from layercrit.study.running import run_study
    from layercrit.study.tables import Study, load_study
    from layercrit.trackers.tracker import tracker
    from layercrit.training.loop import train
    from layercrit.training.methods import method
    from layercrit.worst_case import measure_worst_case

__all__ = [
    "LayercritError",
    "Measurement",
    "Model",
    "ProbeSet",
    "Study",
    "advise",
    "compare",
    "copy_family",
    "corruption",
    "distance",
    "executor",
    "export",
    "export_format",
    "figure",
    "image_source",
    "list_layers",
    "load_study",
    "measure",
    "measure_epochs",
    "measure_feature_criticality",
    "measure_module_criticality",
    "measure_proxies",
    "measure_study_module_criticality",
    "measure_study_proxies",
    "measure_worst_case",
    "merge_studies",
    "method",
    "methods_section",
    "model_source",
    "open_model",
    "plan_study",
    "report",
    "reset",
    "run_demo",
    "run_study",
    "tracker",
    "train",
]

__version__ = metadata.version("layercrit")

_former.install()

_HOME = {
    "LayercritError": "errors",
    "Measurement": "measurement",
    "Model": "models.model",
    "ProbeSet": "probes.probe_set",
    "Study": "study.tables",
    "advise": "advice.advice",
    "compare": "comparison",
    "copy_family": "demo",
    "corruption": "probes.corruptions",
    "distance": "distances",
    "executor": "study.executors",
    "export": "reporting.exports",
    "export_format": "reporting.exports",
    "figure": "reporting.study_figures",
    "image_source": "probes.kinds",
    "list_layers": "measuring",
    "load_study": "study.tables",
    "measure": "measuring",
    "measure_epochs": "epoch_map",
    "measure_feature_criticality": "feature_criticality",
    "measure_module_criticality": "module_criticality.values",
    "measure_proxies": "proxies.values",
    "measure_study_module_criticality": "study.module_criticality",
    "measure_study_proxies": "proxies.of_study",
    "measure_worst_case": "worst_case",
    "merge_studies": "study.merging",
    "method": "training.methods",
    "methods_section": "reporting.methods_section",
    "model_source": "models.sources",
    "open_model": "models.references",
    "plan_study": "study.planning",
    "report": "reporting.reports",
    "reset": "resets",
    "run_demo": "demo",
    "run_study": "study.running",
    "tracker": "trackers.tracker",
    "train": "training.loop",
}


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> Any:
        # Names are fetched when first used, so that `layercrit --help` does not wait for torch.
        if name not in _HOME:
            raise AttributeError(f"module 'layercrit' has no attribute {name!r}")
        return getattr(import_module(f"layercrit.{_HOME[name]}"), name)
