"""The map over epochs of a training run."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from conditioned_studies import network
from layercrit.cli import cli
from layercrit.epoch_map import measure_epochs
from layercrit.errors import CheckpointError, ProtocolError
from layercrit.measuring import measure
from layercrit.models.references import open_model
from layercrit.seeds import drawing
from layercrit.training.runs import RunFolder
from running_jobs import write_pixels
from training_runs import write_run

N = 20
NAMED = "arch=py:conditioned_studies:network"
OPTIONS = f"{NAMED}&input_size=(3,2,2)"
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
        (2, {}, r"epochs is one number, 2; expected a list of epochs, such as \[2\]"),
        ([], {}, r"epochs names none: got \[\]. Give numbers of epochs"),
        ("all", {"reset": "zero"}, "sets reset itself"),
        ("all", {"maps": ["rewind"]}, r"list of rewound and trained, .* got \['rewind'\]"),
        ("all", {"maps": []}, "got \\[\\]"),
    ],
)
def test_measure_epochs__what_cannot_be_asked(folder, epochs, settings, text):
    with pytest.raises(ProtocolError, match=text):
        measure_epochs(f"file:{folder}/run?{OPTIONS}", str(folder / "images.npz"), epochs=epochs, **settings)


def test_measure_epochs__no_training_run(folder):
    with pytest.raises(ProtocolError, match="no training run with epochs that it kept"):
        measure_epochs(f"file:{folder}/images.npz", str(folder / "images.npz"))


@pytest.fixture(scope="module")
def plain(folder):
    """Checkpoints as other training code leaves them, of the same weights as the training run."""
    (folder / "ckpt").mkdir()
    for epoch, state in states().items():
        torch.save({"epoch": epoch, "state_dict": state, "optimizer": {0: state}}, folder / f"ckpt/epoch_{epoch}.pt")
    return folder / "ckpt"


def test_measure_epochs__list_of_checkpoints_is_as_a_training_run(found, folder, plain):
    final = f"file:{plain}/epoch_5.pt?{OPTIONS}"
    images = str(folder / "images.npz")
    same = measure_epochs(final, images, epochs=f"{plain}/epoch_*.pt", folder=folder / "plain", **HOW)
    for kind in ("rewound", "trained"):
        pd.testing.assert_frame_equal(same.grid(kind), found.grid(kind))
    assert (same.to_pandas()["status"] == found.to_pandas()["status"]).all()
    donor = same.measurements["rewound", 2].record["model"]["donor"]
    opened = open_model(f"file:{plain}/epoch_2.pt?{OPTIONS}")
    assert opened.sha256 in donor, "the hash of the weights is not recorded"
    kept = (folder / "plain" / "rewound-0002" / "cells.parquet").read_bytes()
    one = measure_epochs(final, images, epochs={2: plain / "epoch_2.pt"}, folder=folder / "plain", **HOW)
    assert list(one.grid().index) == ["fresh draw", "epoch 2"]
    assert (folder / "plain" / "rewound-0002" / "cells.parquet").read_bytes() == kept
    with pytest.raises(ProtocolError, match="no row for going back to epoch 0"):
        one.agreement()
    torch.save(states()[5], plain / "epoch_2.pt")
    with pytest.raises(ProtocolError, match="The measurement to go on with is another one"):
        measure_epochs(final, images, epochs={2: plain / "epoch_2.pt"}, folder=folder / "plain", **HOW)


@pytest.mark.parametrize("wrong", ["shape", "key", "text"])
def test_measure_epochs__unlike_checkpoint_ends_before_anything_is_measured(folder, tmp_path, wrong):
    state = states()[0]
    torch.save(state, tmp_path / "epoch_0.pt")
    if wrong == "shape":
        state["1.weight"] = state["1.weight"][:, :4]
    elif wrong == "key":
        del state["4.bias"]
    torch.save(state, tmp_path / "epoch_1.pt")
    if wrong == "text":
        (tmp_path / "epoch_1.pt").write_text("loss 0.3")
    with pytest.raises(CheckpointError, match="epoch_1"):
        measure_epochs(
            f"file:{folder}/run?{OPTIONS}", str(folder / "images.npz"), epochs=str(tmp_path / "epoch_*.pt"),
            folder=tmp_path / "out", **HOW,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_measure_epochs__kept_epoch_is_checked_by_hash(folder, tmp_path):
    """As training records it: one weight that changes by a bit is another file."""
    run = write_run(
        tmp_path / "run", states(), arch=OPTIONS.removeprefix("arch=").replace("&", "?", 1), final=states()[5]
    )
    record = json.loads((run / "model.json").read_text())
    hashes = RunFolder(run).kept_hashes()
    assert list(hashes) == ["0", "2", "5"]
    (run / "model.json").write_text(json.dumps({**record, "kept_sha256": hashes}))
    assert open_model(f"file:{run}@epoch=2?{NAMED}").network is not None
    changed = states()[2]
    changed["4.bias"].view(torch.int32)[0] ^= 1
    save_file(changed, run / "epochs" / "epoch-0002.safetensors")
    assert open_model(f"file:{run}@epoch=0?{NAMED}").network is not None
    images = str(folder / "images.npz")
    for asks in (
        lambda: open_model(f"file:{run}@epoch=2?{NAMED}"),
        lambda: measure(f"file:{run}?{NAMED}", images, reset="rewind(epoch=2)", **HOW),
        lambda: measure_epochs(f"file:{run}?{NAMED}", images, folder=tmp_path / "out", **HOW),
    ):
        with pytest.raises(CheckpointError, match=f"epoch-0002.safetensors is not the file .* has {hashes['2']}"):
            asks()
    assert not (tmp_path / "out").exists()


def test_measure_epochs__one_map_alone(found, folder):
    alone = measure_epochs(
        f"file:{folder}/run?{OPTIONS}", str(folder / "images.npz"), maps=["rewound"], folder=folder / "out", **HOW
    )
    assert alone.kinds == ["rewound"]
    pd.testing.assert_frame_equal(alone.grid(), found.grid())


def test_agreement__is_spearmans_rho_over_the_layers(found):
    """Two layers: their order is the same in both rows, or it is not."""
    same = found.grid().rank(axis=1).loc[["fresh draw", "epoch 0"]].nunique().eq(1).all()
    agreement = found.agreement()
    assert agreement.rho == pytest.approx(1 if same else -1)
    assert (agreement.n_layers, agreement.n_trials, agreement.level) == (2, 2, 0.95)
    assert np.isnan(found.agreement(5).rho), "the last epoch moves nothing, so it orders nothing"


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
    wrong = invoke(*asked[:-4], "--epochs", "first", "--out", tmp_path / "wrong")
    assert isinstance(wrong.exception, CheckpointError)
    assert not list((tmp_path / "wrong").iterdir()), "something was kept"
