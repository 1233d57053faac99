"""The bundled demo: a family of small networks, trained on Fashion-MNIST by many methods, and a study of them all."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.comparison import Comparison, compare
from layercrit.counts import counted
from layercrit.epoch_map import EpochMap, measure_epochs
from layercrit.errors import StudyError
from layercrit.figures.style import save_figure
from layercrit.foreign_text import write_csv
from layercrit.models.file_source import epochs_of
from layercrit.progress_bar import Bar
from layercrit.reporting.findings import describe_family
from layercrit.reporting.reports import report
from layercrit.study.file import StudyFile, read_study_file
from layercrit.study.running import run_study
from layercrit.study.tables import Study, load_study

__all__ = ["DemoResult", "copy_family", "example_study", "run_demo", "small_resnet"]

STUDY_FILE = "fashion.toml"
EPOCHS_RUN = "baseline-epochs"  # the baseline's recipe, trained anew with epochs that were kept
_N_IMAGES = 200  # of its map, which then takes seconds
_WIDTHS, _BLOCKS, _STEM = (12, 24, 48), (2, 2, 2), 32


class _Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions, as in ResNet-50 (He et al. 2016, figure 5)."""

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        n_out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        self.downsample = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class _SmallResNet(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, _STEM, 3, 2, 1, bias=False), nn.BatchNorm2d(_STEM)
        n_in = _STEM
        stages = []
        for stage, (width, n_blocks) in enumerate(zip(_WIDTHS, _BLOCKS, strict=True)):
            blocks = []
            for block in range(n_blocks):
                blocks.append(_Bottleneck(n_in, width, 2 if stage and not block else 1))
                n_in = 4 * width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(n_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, as torchvision's and timm's ResNets
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def small_resnet(num_classes: int = 10) -> nn.Module:
    """Return the demo's network with fresh weights, a small version of ResNet-50 with 23 layers that can be reset.

    It has a stem, three stages of two bottleneck blocks and a classifier, 126,410 parameters for 10 classes, and maps
    grey images ``(n_images, 1, 28, 28)`` to logits ``(n_images, num_classes)``.
    """
    return _SmallResNet(num_classes)


def example_study(name: str) -> str:
    """Return a study file that comes with layercrit: ``paper`` or ``fashion``."""
    return resources.files("layercrit").joinpath(f"study/examples/{name}.toml").read_text(encoding="utf-8")


def copy_family(folder: str | Path) -> Path:
    """Copy the trained models, the test images and their study file into a folder, and return the file's path.

    Files that are already there stay, so that retrained models are not lost.

    Examples:
        >>> import layercrit
        >>> layercrit.copy_family("family").name
        'fashion.toml'
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    study_file = folder / STUDY_FILE
    study_file.write_text(example_study("fashion"), encoding="utf-8")
    with resources.as_file(resources.files("layercrit") / "family") as family:
        for source in sorted(family.rglob("*")):
            target = folder / ("models" / source.relative_to(family) if source.parent != family else source.name)
            if source.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    return study_file


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, and where it is.

    Attributes:
        study: all models, measured.
        comparison: of them with the baseline.
        findings: what they show and what they do not, in words.
        epochs: layers of one more network, set back to its epochs.
        folder: where models, images, tables and figures are.
    """

    study: Study
    comparison: Comparison
    findings: str
    epochs: EpochMap
    folder: Path


def run_demo(folder: str | Path, say: Callable[[str], Any] = print) -> DemoResult:
    """Measure the bundled family, and write models, images, the study, tables, figures and the page into a folder.

    Args:
        folder: where to write ``models/``, ``fashion-mnist-test.npz``, ``fashion.toml``, the study in ``study/``,
            ``models.csv``, ``layers.csv``, ``epochs.csv``, ``findings.txt``, ``report.html`` and ``figures/``.
        say: called with each progress message.

    Raises:
        StudyError: a model could not be measured, or another process runs the demo in this folder.

    Examples:
        >>> import layercrit
        >>> layercrit.run_demo("layercrit-demo").comparison.baseline  # doctest: +SKIP
        'baseline'
    """
    folder = Path(folder).expanduser()
    study_file = read_study_file(copy_family(folder))
    n_models, trials = len(study_file.models), study_file.protocol.trials
    say(
        f"Resetting each layer of {n_models} small networks in turn, {trials} draws each, and running "
        f"{counted(study_file.n_images, 'image')} through them ..."
    )
    ran = run_study(study_file, folder / "study", n_workers=min(2, os.cpu_count() or 1))
    if ran.failures:
        failure = ran.failures[0]
        raise StudyError(f"The demo could not measure {failure.model}: {failure.error}")
    study = load_study(folder / "study")
    comparison = compare(study)
    findings = describe_family(comparison, _budgets(study))
    (folder / "findings.txt").write_text(findings + "\n", encoding="utf-8")
    write_csv(study.by_model(), folder / "models.csv")
    write_csv(study.to_pandas(), folder / "layers.csv")
    say("Setting each layer of one more network back to its values after each epoch of its training ...")
    epochs = _map_over_epochs(study_file, folder)
    say("Plotting the figures and writing the page ...")
    report(study, folder, epoch_maps=[epochs], progress=True)
    save_figure(epochs.plot(), folder / "figures" / "epochs", ["pdf", "png", "svg"])
    return DemoResult(study, comparison, findings, epochs, folder)


def _map_over_epochs(study: StudyFile, folder: Path) -> EpochMap:
    """Measure how far layers of one network move its predictions when they go back to an epoch."""
    run, trials, done = folder / "models" / EPOCHS_RUN, study.protocol.trials, count(1)
    n_measured = trials + len(epochs_of(run))  # of each layer: fresh draws, and its values after each epoch
    first: dict[str, int] = {}  # of the cells, which are fresh draws

    def show(cell: Mapping[str, Any]) -> None:
        n_layers = first.setdefault("n_planned", cell["n_planned"]) // trials
        bar.measured(next(done), n_measured * n_layers)

    with Bar(shown=True) as bar:
        found = measure_epochs(
            f"file:{run}",
            study.source,
            maps=["rewound"],
            trials=trials,
            n_images=min(study.n_images, _N_IMAGES),
            dtype=study.protocol.dtype,
            distances="cosine",
            progress=False,
            on_cell=show,
        )
    write_csv(found.to_pandas(), folder / "epochs.csv")
    return found


def _budgets(study: Study) -> dict[str, tuple[str, float]]:
    """Return norm and eps of the adversarially trained models, by name."""
    trained = study.models.dropna(subset=["attack_norm", "eps"])
    return {
        str(model): (str(norm), float(eps))
        for model, norm, eps in zip(trained["model"], trained["attack_norm"], trained["eps"], strict=True)
    }
