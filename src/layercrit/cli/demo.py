"""The command that measures the bundled family of networks."""

import json
from pathlib import Path

import click

from layercrit.cli.epochs import show_epochs
from layercrit.cli.model_options import NewPath
from layercrit.cli.printing import notice
from layercrit.cli.tables import show_comparison

__all__ = ["demo_command"]


@click.command("demo", short_help="Measure 15 small networks that come with layercrit.")
@click.option("--out", type=NewPath(path_type=Path), default=Path("layercrit-demo"), show_default=True, metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
def demo_command(out: Path, as_json: bool) -> None:
    """Measure 15 small networks, trained on Fashion-MNIST by methods of every category, and one through its training.

    It takes about a minute on two cores and works offline.
    """
    from layercrit.demo import EPOCHS_RUN, run_demo

    result = run_demo(out, say=notice)
    if as_json:
        agreement = result.epochs.agreement().to_dict()
        found = {**result.comparison.to_dict(), "findings": result.findings, "epochs": agreement}
        click.echo(json.dumps(found, allow_nan=False))
    else:
        show_comparison(result.study, result.comparison)
        click.echo(f"\n{result.findings}\n")
        show_epochs(result.epochs)
    files = ", ".join(sorted(path.name for path in out.iterdir() if path.is_file()))
    notice(f"Saved in {out}: {files}; figures in {out / 'figures'}.")
    notice(f"Open {out / 'report.html'} in a browser. The same, step by step:")
    for command in (
        f"layercrit study run {out / 'fashion.toml'} --out {out / 'study'}",
        f"layercrit compare {out / 'study'}",
        f"layercrit report {out / 'study'} --model pixmix",
        f"layercrit measure file:{out / 'models' / 'baseline'} --images {out / 'fashion-mnist-test.npz'} --trials 5",
        f"layercrit measure file:{out / 'models' / EPOCHS_RUN} --images {out / 'fashion-mnist-test.npz'} --epochs all",
    ):
        notice(f"  {command}")
