from matplotlib.figure import Figure

import layercrit
from layercrit.errors import StudyError
from layercrit.figures import figure_style, printable


@layercrit.figure("critical_share", on_page=True)
def critical_share(tables):
    """Share of each model's layers whose criticality is above 0.5."""
    shares = (tables.comparison.criticality > 0.5).mean(axis=1)
    if len(shares) < 2:
        raise StudyError("There is one model only, and nothing to compare it with.")
    with figure_style():
        drawn = Figure(figsize=(4, 0.6 + 0.2 * len(shares)), layout="constrained")
        axes = drawn.subplots()
        axes.barh([printable(name) for name in shares.index], shares)
        axes.set(xlabel="share of layers above 0.5", xlim=(0, 1))
    yield "critical_share", drawn
