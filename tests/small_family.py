"""The demo's study, of few models on few images: what pages and examples find where a reader has run the demo."""

import re
from pathlib import Path

from layercrit.demo import example_study
from layercrit.study.file import read_study_file
from layercrit.study.running import run_study
from running_jobs import Inline

MODELS = ("baseline", "baseline-seed1", "l2-eps1.5", "pixmix")


def measure_small_family(folder: Path, file: str) -> None:
    """Write a study file of few of the models in a folder, and measure it into ``study``."""
    head, *models = example_study("fashion").replace("trials = 5", "trials = 3").split("[[models]]")
    kept = [text for text in models if re.search(r'name = "([^"]+)"', text)[1] in MODELS]
    few = "[[models]]".join([head.replace("n_images = 250", "n_images = 40"), *kept])
    (folder / file).write_text(few, encoding="utf-8")
    run_study(read_study_file(folder / file), folder / "study", executor=Inline())
