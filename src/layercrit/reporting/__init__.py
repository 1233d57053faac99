"""Reports of a study: figures for papers, the page to explore, and files for other programs."""

from layercrit.reporting.reports import Report, report
from layercrit.reporting.study_figures import FIGURES, Tables, figure

__all__ = ["FIGURES", "Report", "Tables", "figure", "report"]
