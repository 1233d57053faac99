"""Many models measured under one protocol: the study file, the plan, the run, and the tables."""

from layercrit.study.tables import Study, load_study

__all__ = ["Study", "load_study"]
