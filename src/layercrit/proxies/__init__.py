"""Cheap proxies for criticality, and how well they rank layers by the exact value."""

from layercrit.proxies.agreement import Agreement
from layercrit.proxies.formulas import PROXIES
from layercrit.proxies.values import Proxies, measure_proxies

__all__ = ["PROXIES", "Agreement", "Proxies", "measure_proxies"]
