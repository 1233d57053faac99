"""A user's program that uses every public name: `test_types.py` type-checks it, and nobody runs it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import layercrit
from layercrit import (
    LayercritError,
    Measurement,
    Model,
    ProbeSet,
    Study,
    advise,
    compare,
    copy_family,
    corruption,
    distance,
    executor,
    export,
    export_format,
    figure,
    image_source,
    list_layers,
    load_study,
    measure,
    measure_epochs,
    measure_feature_criticality,
    measure_module_criticality,
    measure_proxies,
    measure_study_module_criticality,
    measure_study_proxies,
    measure_worst_case,
    merge_studies,
    method,
    methods_section,
    model_source,
    open_model,
    plan_study,
    report,
    reset,
    run_demo,
    run_study,
    tracker,
    train,
)
from layercrit.probes import ArraySource
from layercrit.reporting.study_figures import Drawn, Tables
from layercrit.resets import Draw
from layercrit.study.file import StudyFile
from layercrit.study.local_processes import LocalProcesses, local_places
from layercrit.trackers import Tracker
from layercrit.training import Method, setting


@reset("halved", random=False)
def halved(draw: Draw) -> Mapping[str, Tensor]:
    return {name: value / 2 for name, value in draw.trained.items()}


@distance("largest_change", upper=1.0)
def largest_change(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().amax(dim=1)


@corruption("dimmed", "weather", small=(0.1, 0.2, 0.3, 0.4, 0.5), unit="what is taken away")
def dimmed(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return images * (1 - strength)


@model_source("mine")
def open_mine(rest: str, options: dict[str, Any]) -> Model:
    return open_model(nn.Linear(int(rest), 10), input_size=(1, 1, int(rest)))


@image_source("black")
def open_black(rest: str, options: dict[str, str]) -> ArraySource:
    return ArraySource(np.zeros((int(rest), 28, 28), np.uint8))


@figure("empty", on_page=True)
def empty(tables: Tables) -> Drawn:
    yield "empty", Figure()


@executor("two")
def two(rest: str, study: StudyFile, folder: Path, n_workers: int | None) -> LocalProcesses:
    return LocalProcesses(local_places(2, "cpu", n_gpus=0))


@tracker("printed")
class Printed(Tracker):
    def begin(self, name: str, config: Mapping[str, Any], folder: Path) -> None:
        print(name)

    def cell(self, row: Mapping[str, Any]) -> None:
        print(row["layer"])

    def end(self, ok: bool) -> None:
        print(ok)


@export_format("names", files=["names.csv"])
def write_names(study: Study, folder: Path) -> None:
    study.models[["model"]].to_csv(folder / "names.csv")


@method("long", category="training_recipes", changes="300 epochs", paper="none")
@dataclass(frozen=True)
class Long(Method):
    epochs: int = setting(300, "passes over the training images", low=1)


def one_model(reference: str, images: str) -> pd.DataFrame:
    model: Model = open_model(reference)
    size = model.preprocessing
    drawn: ProbeSet = ProbeSet.from_source(images, size, n_images=100)
    names: list[str] = list_layers(model)["layer"].tolist()
    try:
        measurement: Measurement = measure(model, drawn, trials=5, layers=",".join(names[:2]), half_width=0.1)
    except LayercritError as error:
        print(error)
        raise
    folder: Path = measurement.save("result")
    again = Measurement.load(folder)
    print(methods_section(again), advise(again, "freeze").chosen, layercrit.__version__)
    print(measure_epochs(reference, images, epochs=[0, 5]).epochs)
    print(measure_module_criticality(reference, images).summary()["sum"])
    print(measure_worst_case(reference, images, radius=0.2).summary()["loss"])
    print(measure_feature_criticality(reference, images, eps="4/255").summary()["norm"])
    print(measure_proxies(reference, images).against(again).table)
    return again.to_pandas()


def many_models(folder: Path) -> Study:
    file = copy_family(folder)
    trained = train("long", "timm:resnet18", folder / "images", folder / "run", settings={"epochs": 1})
    print(
        trained.reference,
        trained.top1_accuracy,
        plan_study(file).to_dict(),
        run_study(file, folder / "study").n_measured,
    )
    study = load_study(folder / "study")
    print(compare(study).to_pandas(), report(study).page, export(study, "csv"))
    print(measure_study_module_criticality(study).by_model)
    print(measure_study_proxies(study).sentence, run_demo(folder / "demo").findings)
    return merge_studies([folder / "study", folder / "demo" / "study"], folder / "both")
