"""Reports of a study: figures for papers, the page to explore, and files for other programs."""

from layercrit.reporting.reports import FIGURES, Report, Tables, figure, report

__all__ = ["FIGURES", "Report", "Tables", "figure", "report"]
