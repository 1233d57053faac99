"""The command line on real files: in processes of their own, some of them begun by the installed entry point."""

import inspect
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from forked import layercrit, without_network
from labelled_images import BASELINE, LABELS, NAMES, write_classes, write_pngs
from layercrit.cli.root import cli, main
from layercrit.errors import LayercritError
from layercrit.protocol import Protocol
from running_jobs import write_model, write_pixels
from training_runs import write_run

LAYERCRIT = Path(sys.executable).parent / "layercrit"
MODEL = "timm:test_resnet?pretrained=false&num_classes=7"


def entry_point(*arguments, cwd, **options):
    return subprocess.run([LAYERCRIT, *arguments], cwd=cwd, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for label in range(7):
        (folder / str(label)).mkdir()
        for index in range(2):
            pixels = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((200, 180)).save(folder / str(label) / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def measured(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    command = ("measure", MODEL, "--images", photographs, "--trials", "2", "--out", "result", "--json")
    result = entry_point(*command, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "result", result


def test_measure__json_is_all_of_stdout_and_equals_the_files(measured):
    folder, result = measured
    printed = json.loads(result.stdout)
    assert "\nFor a page to explore: `layercrit report result`." in result.stderr
    table = pd.read_csv(folder / "layers.csv")
    assert [row["layer"] for row in printed["layers"]] == table["layer"].to_list()
    assert np.allclose([row["criticality"] for row in printed["layers"]], table["criticality"], atol=1e-12)
    assert printed["n_trials"] == 2
    assert printed["n_images"] == 14
    cells = pd.read_parquet(folder / "cells.parquet")
    assert len(cells) == 2 * len(table)
    assert printed["criticality"]["mean"] == pytest.approx(cells["cosine"].mean(), abs=1e-9)


def test_measure__writes_every_file_that_is_promised(measured):
    folder, _ = measured
    names = {"cells.parquet", "images.parquet", "layers.csv", "measurement.json", "criticality.png", "criticality.svg"}
    assert {path.name for path in folder.iterdir()} == names


def test_measure__same_seed_same_table_in_another_process(measured, photographs, tmp_path):
    folder, _ = measured
    again = layercrit("measure", MODEL, "--images", photographs, "--trials", "2", "--out", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "layers.csv").read_bytes() == (folder / "layers.csv").read_bytes()
    assert "mean criticality" in again.stdout
    assert "layer1.0.conv1" in again.stdout


def test_measure__calls_the_model_as_it_is_told(photographs, tmp_path, capsys, monkeypatch):
    arguments = ["measure", MODEL, "--images", str(photographs), "--trials", "1", "--layers", "fc", "--name", "mine"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["layercrit", *arguments, "--out", "result"])
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().out.splitlines()
    assert "mine" in [line.strip() for line in lines]
    assert f"model: {MODEL}" in lines
    assert any(line.startswith("1 layer, 1 trial, 14 images; ") for line in lines)


def test_measure__does_not_replace_a_measurement_unasked(measured, photographs):
    folder, _ = measured
    before = (folder / "measurement.json").read_bytes()
    result = layercrit("measure", MODEL, "--images", photographs, "--trials", "2", "--out", folder, cwd=folder.parent)
    assert result.returncode == 1
    assert "already contains a measurement" in result.stderr
    assert "--overwrite" in result.stderr
    assert (folder / "measurement.json").read_bytes() == before


def test_show__prints_the_table_again(measured):
    folder, _ = measured
    (folder / "criticality.png").unlink()
    result = layercrit("show", folder, cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    assert "mean criticality" in result.stdout
    assert Image.open(folder / "criticality.png").width > 500


def test_layers__lists_depth_type_shape_and_share(tmp_path):
    result = layercrit("layers", MODEL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "conv1" in result.stdout
    assert "fc" in result.stdout
    n_layers, n_parameters = re.search(r"^(\d+) layers, ([\d,]+) parameters; one", result.stdout, re.MULTILINE).groups()
    assert int(n_parameters.replace(",", "")) > 1000
    in_pairs = layercrit("layers", MODEL, "--sets", "pairs", cwd=tmp_path).stdout
    n_pairs = int(n_layers) * (int(n_layers) + 1) // 2
    assert f"\n{n_pairs} sets of layers; one trial of all sets costs " in in_pairs, "which share parameters"
    printed = json.loads(layercrit("layers", MODEL, "--types", "all", "--json", cwd=tmp_path).stdout)
    shares = {row["name"]: row["flops_after"] for row in printed["layers"]}
    assert shares["conv1.0"] == max(shares.values())
    assert 0 < shares["fc"] < 0.1
    assert {"conv", "linear", "norm"} <= {row["type"] for row in printed["layers"]}


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["measure", "timm:resnet5", "--images", "."], 1, "Did you mean 'resnet50'"),
        (["measure", "resnet50", "--images", "."], 1, "Did you mean 'timm:resnet50'"),
        (["measure", MODEL, "--images", "nowhere"], 1, "nowhere"),
        (
            ["measure", MODEL, "--images", "PHOTOGRAPHS", "--layers", "layer1.0.conv9"],
            1,
            "Did you mean 'layer1.0.conv",
        ),
        (["measure", MODEL, "--images", "corrupt:foggy@3:."], 1, "Did you mean 'fog'"),
        (["measure", MODEL, "--images", "corrupt:fog@9:."], 1, "from 1 (weak) to 5 (strong); got 9"),
        (["measure", MODEL, "--images", "attack:pgd(norm=linf, eps=4):."], 1, "write eps=4/255"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--types", "convolution"], 1, "Did you mean 'conv'"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--reset", "rerandomise"], 1, "Did you mean 'rerandomize'"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--reset", "rewind"], 1, "--from"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--reset", "donor"], 1, "--from"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--reset", "rewind(epoch=3)"], 1, "needs the training run"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--reset", "noise(scale=-1)"], 1, "at least 0; got -1"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--reset", "skip"], 1, "--group block"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--n-images", "0"], 1, "n_images must be"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--batch-size", "many"], 2, "a whole number"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--dtype", "float23"], 2, "float32"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--device", "abacus"], 1, "abacus"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--pilot", "4"], 2, "limits of what --half-width or --minutes"),
        (["measure", MODEL, "--images", "PHOTOGRAPHS", "--max-trials", "9"], 2, "or --trials alone"),
        (["show", "."], 1, "no measurement"),
        (["messure"], 2, "No such command 'messure'"),
    ],
    ids=lambda value: "-".join(value[:1] + value[-1:]) if isinstance(value, list) else "",
)
def test_errors__one_clear_message_no_traceback(arguments, code, text, photographs, tmp_path, monkeypatch, capsys):
    arguments = [str(photographs) if argument == "PHOTOGRAPHS" else argument for argument in arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["layercrit", *arguments])
    with pytest.raises(SystemExit) as stopped:  # in this process, for each start of Python costs seconds
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == code
    assert text in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


SMALL = "py:running_jobs:small_network?input_size=(3,2,2)"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with images for a small network, and a function that runs the command there in this process."""
    monkeypatch.chdir(tmp_path)
    write_pixels(tmp_path / "images.npz")

    def invoke(*arguments):
        result = CliRunner().invoke(cli, [*arguments, "--images", "images.npz", "--out", "out", "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return invoke


def test_measure__a_reset_with_options_is_resumed_however_it_is_written(small):
    first = small("measure", SMALL, "--reset", "noise(scale=0.5)", "--trials", "2")
    found = small("measure", SMALL, "--reset", "noise( scale = .50 )", "--trials", "3")
    assert (first["n_trials"], found["n_trials"]) == (2, 3)
    cells = pd.read_parquet("out/cells.parquet")
    assert set(cells["reset"]) == {"noise(scale=0.5)"}
    assert (cells["status"] == "ok").all()


def test_measure__donor_from_a_reference(small):
    found = small("measure", SMALL, "--reset", "donor", "--from", f"{SMALL}&seed=5")
    assert [row["status"] for row in found["layers"]] == ["ok"] * 3
    record = json.loads(Path("out/measurement.json").read_text())
    assert record["model"]["donor"].startswith(f"given: the model {SMALL}&seed=5, SHA-256 ")


def test_measure__rewinds_to_an_epoch_of_the_models_own_run(small, tmp_path):
    for epoch in (0, 2):
        write_model(tmp_path / f"{epoch}.safetensors", epoch)
    states = {epoch: load_file(tmp_path / f"{epoch}.safetensors") for epoch in (0, 2)}
    write_run(tmp_path / "run", states, arch=SMALL, final=states[2])
    found = small("measure", f"file:run?arch={SMALL.partition('?')[0]}", "--reset", "rewind(epoch=2)")
    assert [row["status"] for row in found["layers"]] == ["unchanged 1/1"] * 3
    found = small("measure", f"file:run?arch={SMALL.partition('?')[0]}", "--reset", "rewind(epoch=0)", "--overwrite")
    assert [row["status"] for row in found["layers"]] == ["ok"] * 3


def test_errors__a_bug_is_called_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layercrit", "show", "."])
    monkeypatch.setattr("layercrit.measurement.Measurement.load", lambda folder: 1 / 0)
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 70
    assert "ZeroDivisionError" in printed.err
    assert "--traceback" in printed.err
    assert "Traceback" not in printed.err


def test_errors__a_bug_of_a_plug_in_is_called_one_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layercrit", "show", "."])
    monkeypatch.setattr("layercrit.measurement.Measurement.load", lambda folder: 1 / 0)
    monkeypatch.setattr("layercrit.cli.root.plug_in_that_raised", lambda error: "lab.resets of the package lab 1.2")
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr().err
    assert stopped.value.code == 70
    assert "ZeroDivisionError: division by zero" in printed
    assert "This is an error of the plug-in lab.resets of the package lab 1.2." in printed
    assert "bug in layercrit" not in printed


def test_measure__a_full_disk_loses_nothing(photographs, tmp_path, monkeypatch, capsys):
    from layercrit.measurement import Measurement

    save, elsewhere = Measurement.save, []

    def full(self, folder):
        if Path(folder).name == "result":
            raise LayercritError("No space left on device.")
        elsewhere.append(Path(folder))
        return save(self, folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Measurement, "save", full)
    monkeypatch.setattr(sys, "argv", ["layercrit", "measure", MODEL, "--images", str(photographs), "--out", "result"])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 1
    assert "mean criticality" in printed.out
    assert f"saved in {elsewhere[0]} instead" in printed.err
    assert Measurement.load(elsewhere[0]).summary()["n_images"] == 14


def test_measure__truncated_image_is_named(photographs, tmp_path):
    whole = (photographs / "0" / "0.png").read_bytes()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "whole.png").write_bytes(whole)
    (tmp_path / "images" / "broken.png").write_bytes(whole[: len(whole) // 2])
    result = layercrit("measure", MODEL, "--images", "images", cwd=tmp_path)
    assert result.returncode == 1
    assert "broken.png" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("interruptible")
def test_measure__ctrl_c_keeps_finished_trials(photographs, tmp_path, monkeypatch, capsys):
    from layercrit.cli.saver import Saver
    from layercrit.measurement import Measurement

    keep = Saver.keep

    def keep_then_interrupt(self, so_far):
        keep(self, so_far)
        if so_far().cells["trial"].nunique() == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Saver, "keep", keep_then_interrupt)
    arguments = ["measure", MODEL, "--images", str(photographs), "--trials", "50", "--out", "result"]
    monkeypatch.setattr(sys, "argv", ["layercrit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 130
    assert "Traceback" not in printed.err
    assert "finished trials saved in result" in printed.err
    assert 2 <= Measurement.load("result").summary()["n_trials"] < 50


def test_help__answers_without_importing_torch(tmp_path):
    code = (
        "import sys, layercrit.cli.root as c; c.cli(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.strip().endswith("False")


def test_options__defaults_are_the_library_s():
    from layercrit.measuring import measure

    options = {option.name: option.default for option in cli.commands["measure"].params}
    library = inspect.signature(measure).parameters
    for name, value in Protocol().to_dict().items():
        given = None if value is None and f"{options[name]}" == "Sentinel.UNSET" else options[name]
        assert str(given) == str(value), f"--{name} has another default than the protocol"
        assert library[name].default == value, f"measure({name}=) has another default than the protocol"


def test_layers__downloads_nothing(tmp_path):
    command = ("layers", "timm:test_resnet.r160_in1k", "--json")
    result = layercrit(*command, cwd=tmp_path, prepare=without_network)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["layers"]) > 10


def test_measure__labels_and_classes(tmp_path):
    write_pngs(tmp_path / "images")
    lines = [f"{number:03}.png,{NAMES[label]}" for number, label in enumerate(LABELS)]
    (tmp_path / "images" / "labels.csv").write_text("\n".join(lines))
    write_classes(tmp_path / "classes.txt")
    short = ("--layers", "fc", "--trials", "1", "--dtype", "float32")
    given = ("--labels", "images/labels.csv", "--classes", "classes.txt", "--out", "given", "--json")
    result = layercrit("measure", BASELINE, "--images", "images", *short, *given, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["top1_accuracy"] > 0.85
    result = layercrit("measure", BASELINE, "--images", "images", *short, "--out", "auto", cwd=tmp_path)
    assert "note: the file" in result.stdout
    assert str(tmp_path / "images" / "labels.csv") in result.stdout
    assert "accuracy" not in result.stdout


def test_measure__folders_numbered_from_one(tmp_path):
    write_pngs(tmp_path / "dev", "{one}/{number}.png", one=range(1, 11))
    few = ("measure", BASELINE, "--images", "dev", "--n-images", "5", "--layers", "fc", "--trials", "1", "--out", "out")
    result = layercrit(*few, cwd=tmp_path)
    assert result.returncode == 1
    assert "--classes" in result.stderr
    assert not (tmp_path / "out" / "measurement.json").exists()
    for ignored in (("--no-labels",), ("--labels", "none", "--overwrite")):
        result = layercrit(*few, *ignored, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "accuracy" not in result.stdout


def test_measure__for_a_half_width_prints_plan_trials_and_methods(photographs, tmp_path):
    asked = ["measure", MODEL, "--images", photographs, "--half-width", "0.2", "--pilot", "3", "--layers", "*.0.*"]
    done = layercrit(*asked, "--out", "result", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plan for a half-width of 0.2" in done.stderr
    (header,) = (line for line in done.stdout.splitlines() if line.startswith("layer "))
    assert "half-width" in header
    assert "trials" in header
    table = pd.read_csv(tmp_path / "result" / "layers.csv")
    assert (table["half_width"] <= 0.2).all()

    paragraph = layercrit("show", "result", "--methods", cwd=tmp_path)
    assert paragraph.returncode == 0, paragraph.stderr
    assert "half-width of 0.2" in paragraph.stdout
    assert paragraph.stdout.count("\n") == 1

    again = layercrit(*asked, "--out", "result", cwd=tmp_path)
    assert again.returncode == 1
    assert "already contains a measurement" in again.stderr

    both = layercrit(*asked, "--trials", "3", cwd=tmp_path)
    assert both.returncode == 2
    assert "--max-trials" in both.stderr


def test_measure__goes_on_with_fewer_trials_in_the_same_folder(photographs, tmp_path):
    asked = ["measure", MODEL, "--images", photographs, "--layers", "*.0.*", "--out", "result"]
    first = layercrit(*asked, "--trials", "1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    before = pd.read_parquet(tmp_path / "result" / "cells.parquet")

    more = layercrit(*asked, "--trials", "2", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    after = pd.read_parquet(tmp_path / "result" / "cells.parquet")
    assert f"going on with {len(before)} cells" in more.stderr
    assert len(after) == 2 * len(before)
    kept = after[after["trial"] == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before)

    other = layercrit(*asked, "--trials", "3", "--seed", "1", cwd=tmp_path)
    assert other.returncode == 1
    assert "seed 0 instead of 1" in other.stderr
    assert len(pd.read_parquet(tmp_path / "result" / "cells.parquet")) == len(after), "nothing is lost"


def test_measure__adversarial_images_are_kept_in_the_folder(photographs, tmp_path):
    asked = [
        "measure", MODEL, "--images", f"attack:pgd(norm=linf, eps=4/255, steps=2):corrupt:contrast@1:{photographs}",
        "--layers", "*.0.conv1", "--out", "result",
    ]  # fmt: skip
    first = layercrit(*asked, "--trials", "1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "the images are adversarial: pgd(norm=linf, eps=4/255, steps=2)" in first.stdout
    kept = tmp_path / "result" / "images" / "images.npy"
    before = kept.stat().st_mtime_ns
    more = layercrit(*asked, "--trials", "2", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert kept.stat().st_mtime_ns == before, "the images were attacked again"
    record = json.loads((tmp_path / "result" / "measurement.json").read_text())
    assert record["probe_set"]["sha256"] == json.loads((kept.parent / "probe_set.json").read_text())["sha256"]
