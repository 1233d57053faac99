"""Module criticality: how far back to its initial values can a module go, and with how much noise, at the same loss?"""

from layercrit.module_criticality.values import ModuleCriticality, measure_module_criticality

__all__ = ["ModuleCriticality", "measure_module_criticality"]
