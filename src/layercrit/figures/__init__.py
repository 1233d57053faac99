"""Figures of one model and of many, and how they are saved."""

from layercrit.figures.accuracy import criticality_against_accuracy
from layercrit.figures.bars import criticality_bars
from layercrit.figures.budget import criticality_against_budget
from layercrit.figures.categories import CATEGORY_COLORS, CATEGORY_MARKERS
from layercrit.figures.depth import criticality_over_depth
from layercrit.figures.heat_maps import difference_map, heat_map, spread_map
from layercrit.figures.interactions import interaction_map
from layercrit.figures.rankings import ranking
from layercrit.figures.style import check_formats, figure_style, printable, save_figure, text_width

__all__ = [
    "CATEGORY_COLORS",
    "CATEGORY_MARKERS",
    "check_formats",
    "criticality_against_accuracy",
    "criticality_against_budget",
    "criticality_bars",
    "criticality_over_depth",
    "difference_map",
    "figure_style",
    "heat_map",
    "interaction_map",
    "printable",
    "ranking",
    "save_figure",
    "spread_map",
    "text_width",
]
