"""Module criticality: how far back to its initial values can a module go, and with how much noise, at the same loss?"""

from layercrit.module_criticality.of_study import (
    StudyModuleCriticality,
    load_study_module_criticality,
    measure_study_module_criticality,
)
from layercrit.module_criticality.values import ModuleCriticality, measure_module_criticality

__all__ = [
    "ModuleCriticality",
    "StudyModuleCriticality",
    "load_study_module_criticality",
    "measure_module_criticality",
    "measure_study_module_criticality",
]
