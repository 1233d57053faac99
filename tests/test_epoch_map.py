"""The map over epochs of a training run."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from conditioned_studies import network
from layercrit.cli import cli
from layercrit.epoch_map import measure_epochs
from layercrit.errors import ProtocolError
from layercrit.measuring import measure
from layercrit.seeds import drawing
from running_jobs import write_pixels
from training_runs import write_run

N = 20
OPTIONS = "arch=py:conditioned_studies:network&input_size=(3,2,2)"
HOW = {"trials": 2, "dtype": "reference", "progress": False}


def states():
    """Epoch -> weights; layer '1' is frozen from epoch 2 on, and the last epoch is the final network."""
    found = {}
    for epoch in (0, 2, 5):
        with drawing(epoch):
            found[epoch] = {name: value.detach().clone() for name, value in network().state_dict().items()}
            found[epoch]["4.weight"] *= 20
    for name in ("1.weight", "1.bias"):
        found[5][name] = found[2][name].clone()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("epochs")
    write_run(folder / "run", states(), final=states()[5])
    write_pixels(folder / "images.npz", N)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return measure_epochs(f"file:{folder}/run?{OPTIONS}", str(folder / "images.npz"), folder=folder / "out", **HOW)


def test_measure_epochs__known_answers(found, folder):
    """The last epoch and a frozen layer change nothing; epoch 0 is `rewind`; fresh draws are a plain measurement."""
    grid = found.grid("rewound")
    assert list(grid.index) == ["fresh draw", "epoch 0", "epoch 2", "epoch 5"]
    assert list(grid.columns) == ["1", "4"]
    assert (grid.loc["epoch 5"] == 0).all()
    assert grid.loc["epoch 2", "1"] == 0 < grid.loc["epoch 2", "4"]
    table = found.to_pandas().set_index(["map", "epoch", "layer"])
    assert (table.loc["rewound", 5.0]["status"] == "unchanged").all()
    model, images = f"file:{folder}/run?{OPTIONS}", str(folder / "images.npz")
    rewound = measure(model, images, reset="rewind", donor=f"{folder}/run@epoch=0", **HOW).to_pandas()
    np.testing.assert_allclose(grid.loc["epoch 0"], rewound["criticality"], atol=1e-7)
    np.testing.assert_allclose(grid.loc["fresh draw"], measure(model, images, **HOW).to_pandas()["criticality"])


def test_measure_epochs__criticality_of_every_kept_epoch(found, folder):
    grid = found.grid("trained")
    assert list(grid.index) == ["final weights", "epoch 0", "epoch 2", "epoch 5"]
    for epoch in (0, 2):
        alone = measure(f"file:{folder}/run@epoch={epoch}?{OPTIONS}", str(folder / "images.npz"), **HOW)
        np.testing.assert_allclose(grid.loc[f"epoch {epoch}"], alone.to_pandas()["criticality"])
    np.testing.assert_allclose(grid.loc["epoch 5"], grid.loc["final weights"])


def test_measure_epochs__goes_on_with_what_is_there(found, folder):
    kept = sorted(one.name for one in (folder / "out").iterdir() if one.is_dir())
    assert kept == ["final-weights", *(f"rewound-{n:04d}" for n in (0, 2, 5)), *(f"trained-{n:04d}" for n in (0, 2, 5))]
    before = (folder / "out" / "rewound-0000" / "cells.parquet").read_bytes()
    again = measure_epochs(f"file:{folder}/run?{OPTIONS}", str(folder / "images.npz"), folder=folder / "out", **HOW)
    assert (folder / "out" / "rewound-0000" / "cells.parquet").read_bytes() == before
    np.testing.assert_array_equal(again.grid(), found.grid())
    with pytest.raises(ProtocolError, match="The measurement to go on with is another one"):
        measure_epochs(f"file:{folder}/run?{OPTIONS}", str(folder / "images.npz"), folder=folder / "out", **HOW, seed=1)


def test_measure_epochs__files(found, tmp_path):
    names = {path.name for path in found.save(tmp_path)}
    assert names == {
        "epochs.csv",
        *(f"epochs-{kind}.{end}" for kind in ("rewound", "trained") for end in ("png", "svg")),
    }
    assert all((tmp_path / name).stat().st_size > 100 for name in names)


@pytest.mark.parametrize(
    ("epochs", "settings", "text"),
    [
        ([0, 3], {}, r"did not keep the weights of epoch 3\. Epochs that it kept: 0, 2, 5"),
        ("all", {"reset": "zero"}, "sets reset itself"),
    ],
)
def test_measure_epochs__what_cannot_be_asked(folder, epochs, settings, text):
    with pytest.raises(ProtocolError, match=text):
        measure_epochs(f"file:{folder}/run?{OPTIONS}", str(folder / "images.npz"), epochs=epochs, **settings)


def test_measure_epochs__no_training_run(folder):
    with pytest.raises(ProtocolError, match="no training run with epochs that it kept"):
        measure_epochs(f"file:{folder}/images.npz", str(folder / "images.npz"))


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_measure_command__epochs(folder, tmp_path, found):
    asked = ("measure", f"file:{folder}/run?{OPTIONS}", "--images", folder / "images.npz", "--trials", "2",
             "--dtype", "reference", "--epochs", "0,5", "--out", tmp_path / "out")  # fmt: skip
    shown = invoke(*asked)
    assert shown.exit_code == 0, shown.output
    assert "fresh draw" in shown.output
    assert "epoch 2" not in shown.output
    rows = json.loads(invoke(*asked, "--json").stdout)["rows"]
    (one,) = (row for row in rows if (row["map"], row["epoch"], row["layer"]) == ("rewound", 0, "4"))
    assert one["criticality"] == pytest.approx(found.grid().loc["epoch 0", "4"], abs=1e-6)
    assert "neither --reset" in invoke(*asked, "--reset", "zero").output
    assert "expected 'all' or epochs" in invoke(*asked[:-4], "--epochs", "first", "--out", tmp_path).output
