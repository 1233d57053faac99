import json
import resource
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import nn

from layercrit.distances import DISTANCES
from layercrit.errors import LayercritError, ModelError
from layercrit.measurement import CELL_COLUMNS, PER_IMAGE, Measurement
from layercrit.measuring import measure
from layercrit.probes.images import Preprocessing
from layercrit.probes.probe_set import ProbeSet
from layercrit.protocol import MATCHED
from layercrit.statistics import estimate, estimate_mean_over_layers

FILES = ["cells.parquet", "criticality.png", "criticality.svg", "images.parquet", "layers.csv", "measurement.json"]
PLAIN = Preprocessing(height=2, width=2, resize=None)


def network(seed=0):
    """Linear layers '1' and '3', and '4', which is 0 so that resetting it to 0 changes nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3), Extra()).eval()
        with torch.no_grad():
            net[3].weight.mul_(10)
    return net


class Extra(nn.Module):
    """Adds a linear map of weight 0 to its input."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 3)
        for parameter in self.map.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x):
        return x + self.map(x)


def images(n_images=7, labelled=True):
    generator = np.random.default_rng(3)
    pixels = generator.integers(0, 256, (n_images, 3, 2, 2), dtype=np.uint8)
    return ProbeSet.from_array(pixels, PLAIN, np.arange(n_images) % 3 if labelled else None)


@pytest.fixture(scope="module")
def measured():
    return measure(network(), images(), trials=3, seed=5, level=0.9, progress=False)


@pytest.fixture(scope="module")
def zeroed():
    """With a cell that does not count, and without labels."""
    return measure(network(), images(labelled=False), reset="zero", progress=False)


@pytest.fixture
def folder(measured, tmp_path):
    return measured.save(tmp_path / "kept")


def refuse_constants(name):
    raise AssertionError(f"{name} is no JSON")


def strict_json(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constants)


# tables and summary


def test_to_pandas__gives_each_layer_its_estimate(measured):
    table = measured.to_pandas()
    assert list(table["layer"]) == ["1", "3", "4.map"]
    for index, row in enumerate(table.to_dict("records")):
        for prefix, distance in (("", "cosine"), ("matched_", MATCHED)):
            expected = estimate(measured.per_image[distance][index], level=0.9)
            mean = row["criticality_matched" if prefix else "criticality"]
            assert (mean, row[f"{prefix}low"], row[f"{prefix}high"]) == (expected.mean, expected.low, expected.high)
        cells = measured.cells[measured.cells["layer"] == row["layer"]]
        for column in ("l1", "l2", "js", "loss", "top1_accuracy", "top5_accuracy", "recovered_accuracy"):
            assert row[column] == pytest.approx(cells[column].mean(), rel=1e-15)
        assert row["criticality"] == pytest.approx(cells["cosine"].mean(), rel=1e-6)
        assert row["top1_agreement"] == pytest.approx(1 - cells["top1"].mean())
        assert (row["depth"], row["n_trials"], row["status"]) == (index, 3, "ok")


def test_to_pandas__names_its_columns(measured, zeroed):
    columns = [
        "layer", "type", "depth", "n_parameters", "flops_after", "criticality", "low", "high", "half_width",
        "sd_trials", "criticality_matched", "matched_low", "matched_high", "l1", "l2", "js", "loss", "top1_accuracy",
        "top5_accuracy", "recovered_accuracy", "top1_agreement", "n_trials", "status",
    ]  # fmt: skip
    assert list(measured.to_pandas()) == columns
    about_labels = {"loss", "top1_accuracy", "top5_accuracy", "recovered_accuracy"}
    assert list(zeroed.to_pandas()) == [column for column in columns if column not in about_labels]


def test_summary__is_the_mean_over_layers_with_what_it_takes_to_read_it(measured):
    summary = measured.summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    for key, distance in (("criticality", "cosine"), ("criticality_matched", MATCHED)):
        expected = estimate_mean_over_layers(measured.per_image[distance], level=0.9)
        assert summary[key] == {"mean": expected.mean, "low": expected.low, "high": expected.high}
    assert summary["criticality"]["mean"] == pytest.approx(measured.to_pandas()["criticality"].mean())
    assert (summary["level"], summary["covers"]) == (0.9, "trials and images")
    assert (summary["n_layers"], summary["n_layers_in_mean"], summary["left_out"]) == (3, 3, [])
    assert (summary["n_trials"], summary["n_images"], summary["cells"]) == (3, 7, {"ok": 9})
    assert 0 < summary["chance"] < 1
    assert summary["top1_accuracy"] in {k / 7 for k in range(8)}


def test_summary__leaves_out_layers_with_cells_that_do_not_count(zeroed):
    summary = zeroed.summary()
    assert (summary["n_layers"], summary["n_layers_in_mean"], summary["left_out"]) == (3, 2, ["4.map"])
    assert summary["cells"] == {"ok": 2, "unchanged": 1}
    assert summary["covers"] == "images"
    assert zeroed.to_pandas()["status"].tolist() == ["ok", "ok", "unchanged 1/1"]
    assert summary["criticality"]["mean"] == pytest.approx(zeroed.per_image["cosine"][:2].mean(), rel=1e-6)


def test_repr__is_one_line(measured):
    mean = measured.summary()["criticality"]
    assert repr(measured) == (
        f"<Measurement of module:torch.nn.modules.container.Sequential: mean criticality {mean['mean']:.3f} "
        f"(90% interval {mean['low']:.3f} to {mean['high']:.3f}), 3 layers, 3 trials, 7 images, reset rerandomize>"
    )


def test_repr_html__facts_figure_and_layers(measured, zeroed):
    html, summary = measured._repr_html_(), measured.summary()
    assert f"{summary['criticality']['mean']:.3f} (90% interval" in html
    assert f"{summary['top1_accuracy']:.1%}" in html
    for row in measured.to_pandas().to_dict("records"):
        assert f">{row['layer']}</td>" in html
        assert f"{row['criticality']:.3f} <span" in html
    assert html.count("<img") == 1
    assert "1 layers" not in html
    unchanged = zeroed._repr_html_()
    assert "unchanged 1/1" in unchanged
    assert "top-1 accuracy" not in unchanged


def test_repr_html__nothing_is_known(zeroed):
    with np.errstate(all="ignore"):
        cells = zeroed.cells.assign(status="not_finite")
    html = Measurement(
        cells, {name: values * np.nan for name, values in zeroed.per_image.items()}, zeroed.record
    )._repr_html_()
    assert "not known" in html
    assert html.count("<img") == 1


def test_record__is_plain_data_and_complete(measured):
    record = measured.record
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["protocol"] == {
        "trials": 3, "n_images": 7, "layers": "*", "types": "conv,linear", "group": "layer", "reset": "rerandomize",
        "seed": 5, "batch_size": 7, "dtype": "float32", "device": "cpu", "level": 0.9, "distances": list(DISTANCES),
        "interval": "t", "half_width": None, "minutes": None, "pilot": 10, "max_trials": 200,
        "sets": "each", "norm_statistics": "trained",
    }  # fmt: skip
    assert len(record["model"]["sha256"]) == len(record["probe_set"]["sha256"]) == 64
    assert record["trial_seeds"] == measured.cells["seed"][:3].tolist()
    assert record["model"]["n_classes"] == 3
    assert record["versions"].keys() >= {"python", "layercrit", "torch", "numpy"}
    assert record["layers"]["1"] == {"parameters": ["1.weight", "1.bias"], "shape": [8, 12]}
    assert 0 < record["seconds_opening"] < record["seconds"]


def test_cells__have_the_documented_columns(measured, zeroed):
    assert set(measured.cells) == {*CELL_COLUMNS, *DISTANCES}
    about_labels = {"loss", "top1_accuracy", "top5_accuracy", "recovered_accuracy"}
    assert set(zeroed.cells) == {*CELL_COLUMNS, *DISTANCES} - about_labels
    for name, values in measured.per_image.items():
        np.testing.assert_array_equal(measured.cells[name], values.mean(axis=2, dtype=np.float64).ravel(), name)


def test_plot__draws_one_bar_per_layer(measured):
    figure = measured.plot()
    assert isinstance(figure, Figure)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "3", "4.map"]


# files


@pytest.mark.parametrize("name", ["measured", "zeroed"])
def test_load__gives_back_what_was_saved_bit_for_bit(name, request, tmp_path):
    saved = request.getfixturevalue(name)
    assert saved.save(str(tmp_path / "new" / "folder")) == tmp_path / "new" / "folder"
    loaded = Measurement.load(str(tmp_path / "new" / "folder"))
    pd.testing.assert_frame_equal(loaded.cells, saved.cells, check_exact=True)
    pd.testing.assert_frame_equal(loaded.to_pandas(), saved.to_pandas(), check_exact=True)
    assert loaded.summary() == saved.summary()
    assert loaded.record == saved.record
    assert list(loaded.per_image) == list(saved.per_image)
    for distance, values in saved.per_image.items():
        assert loaded.per_image[distance].dtype == np.float32
        np.testing.assert_array_equal(loaded.per_image[distance], values)


def test_load__knows_what_backends_were_called_before(folder, measured, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    record = json.loads((old / "measurement.json").read_text())
    assert record.pop("backend") == "exported graph"
    (old / "measurement.json").write_text(json.dumps({**record, "road": "graph"}))
    assert Measurement.load(old).record == measured.record


def test_save__writes_the_documented_files(folder, measured):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert (folder / "criticality.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "criticality.svg").read_text()
    layers = pd.read_csv(folder / "layers.csv", dtype={"layer": str})
    pd.testing.assert_frame_equal(layers, measured.to_pandas(), rtol=1e-12, check_dtype=False)
    record = strict_json(folder / "measurement.json")
    assert record["format"] == 1
    assert record["summary"] == measured.summary()
    assert (folder / "measurement.json").read_text().endswith("}\n")


def test_save__cells_can_be_read_without_layercrit(folder, measured):
    plain, arrow = pd.read_parquet(folder / "cells.parquet"), pyarrow.parquet.read_table(folder / "cells.parquet")
    per_image = {f"{name}{PER_IMAGE}" for name in measured.per_image}
    assert set(plain) == set(arrow.column_names) == set(measured.cells) | per_image
    assert len(plain) == arrow.num_rows == 9
    assert str(arrow.schema.field("seed").type) == "uint64"
    assert str(arrow.schema.field("cosine_per_image").type) == "list<element: float>"
    for index, row in enumerate(arrow.to_pylist()):
        assert row["cosine_per_image"] == measured.per_image["cosine"][index // 3, index % 3].tolist()
        assert row["seed"] == int(measured.cells["seed"][index])


@pytest.mark.parametrize(
    ("pixels", "settings"),
    [
        (images(1), {"trials": 1}),
        (images(1, labelled=False), {"trials": 2}),
        (ProbeSet.from_array(np.zeros((3, 3, 2, 2), np.uint8), PLAIN, [0, 0, 0]), {}),
    ],
    ids=["one image, one trial", "one image", "constant predictions"],
)
def test_save__edge_cases_are_strict_json_too(pixels, settings, tmp_path):
    net = network()
    if pixels.n_images == 3:
        for parameter in net[3].parameters():
            nn.init.zeros_(parameter)
    found = measure(net, pixels, progress=False, **settings)
    found.save(tmp_path)
    summary = strict_json(tmp_path / "measurement.json")["summary"]
    if pixels.n_images == 1:
        assert summary["chance"] is None, "there is no pair of different images"
        assert (summary["criticality"]["low"] is None) == (settings["trials"] == 1)
    else:
        assert summary["temperature"] is None
    loaded = Measurement.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.to_pandas(), found.to_pandas(), check_exact=True)
    assert loaded.summary() == found.summary()


def test_measure__tensors_are_no_donor():
    net = network()
    with pytest.raises(ModelError, match=r"a weight file, not a OrderedDict\. .*load_state_dict"):
        measure(net, images(), reset="donor", donor=net.state_dict(), progress=False)


def test_save__nothing_counts(tmp_path):
    net = network()
    save_file(net.state_dict(), tmp_path / "same.safetensors")
    found = measure(net, images(), reset="rewind", donor=tmp_path / "same.safetensors", progress=False)
    found.save(tmp_path / "kept")
    assert strict_json(tmp_path / "kept" / "measurement.json")["summary"]["criticality"] is None
    assert Measurement.load(tmp_path / "kept").summary()["cells"] == {"unchanged": 3}


def test_save__replaces_what_was_there(folder, zeroed):
    zeroed.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert Measurement.load(folder).record == zeroed.record


@pytest.mark.parametrize("limit", [10, 3_000, 30_000])
def test_save__a_full_disk_is_said_and_leaves_what_was_saved(folder, zeroed, limit):
    """Files may have ``limit`` bytes: the table of cells, the table of layers or the picture is cut off."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        with pytest.raises(LayercritError, match=rf"cannot be written to {folder} \(.*Free some space or name another"):
            zeroed.save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("n_moved", range(5))
def test_save__interrupted_between_two_files_leaves_something_readable(folder, measured, monkeypatch, n_moved):
    """A run of the same trials and one more is saved over this one, and cut short after some files."""
    longer = measure(network(), images(), trials=4, seed=5, level=0.9, progress=False)
    replace, moved = type(folder).replace, []

    def interrupted(path, target):
        if len(moved) == n_moved:
            raise KeyboardInterrupt
        moved.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(type(folder), "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        longer.save(folder)
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == FILES
    found = Measurement.load(folder)
    expected = longer if n_moved else measured
    pd.testing.assert_frame_equal(found.to_pandas(), expected.to_pandas(), check_exact=True)


def test_save__a_file_in_place_of_the_folder_is_said(measured, tmp_path):
    (tmp_path / "file").write_text("here")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LayercritError, match=rf"cannot be written to {folder} \((File exists|Not a directory)"):
            measured.save(folder)
    assert (tmp_path / "file").read_text() == "here"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_record(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **changes}))


def drop(folder, key, inner=None):
    record = json.loads((folder / "measurement.json").read_text())
    del (record if inner is None else record[key])[inner or key]
    (folder / "measurement.json").write_text(json.dumps(record))


def within(folder, *names):
    """Leave measurements in folders of a folder, as the map over epochs does."""
    for name in names:
        (folder / name).mkdir()
        shutil.copy(folder / "measurement.json", folder / name)
    (folder / "measurement.json").unlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: (folder / "measurement.json").unlink(), "no measurement in .* measurement.json is missing"),
        (lambda folder: shutil.rmtree(folder), "There is no measurement in"),
        (lambda folder: within(folder, "rewound-0000", "trained-0000"), r"name one: rewound-0000, trained-0000\.$"),
        (lambda folder: (folder / "cells.parquet").unlink(), "is damaged .*FileNotFoundError: .*cells.parquet"),
        (lambda folder: cut(folder / "measurement.json"), "is damaged .*JSONDecodeError"),
        (lambda folder: cut(folder / "cells.parquet"), "is damaged .*[Pp]arquet"),
        (lambda folder: (folder / "cells.parquet").write_bytes(b""), "is damaged .*[Pp]arquet"),
        (lambda folder: (folder / "measurement.json").write_text("[]"), "is damaged .*TypeError"),
        (lambda folder: (folder / "measurement.json").write_text("{}"), "is damaged .*KeyError: 'format'"),
        (lambda folder: (folder / "measurement.json").write_bytes(b"\xff"), "is damaged .*UnicodeDecodeError"),
        (lambda folder: change_record(folder / "measurement.json", format=2), "has format 2; this version reads 1"),
        (lambda folder: change_record(folder / "measurement.json", probe_set={"n_images": 6}), "is damaged"),
        (lambda folder: change_record(folder / "measurement.json", trial_seeds=[1, 2, 3]), "different measurements"),
        (lambda folder: change_record(folder / "measurement.json", layers={"1": {}}), "different measurements"),
        (lambda folder: pd.DataFrame({"layer": ["1"]}).to_parquet(folder / "cells.parquet"), "is damaged"),
        (
            lambda folder: drop(folder, "protocol"),
            r"measurement.json has no 'protocol'\). Restore the folder",
        ),
        (lambda folder: drop(folder, "predictions", "chance"), "measurement.json has no 'chance' in 'predictions'"),
    ],
    ids=range(17),
)
def test_load__what_is_missing_or_damaged_is_said(folder, damage, text):
    damage(folder)
    with pytest.raises(LayercritError, match=text) as raised:
        Measurement.load(folder)
    assert str(folder) in str(raised.value)


def test_load__a_file_is_no_measurement(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(
        LayercritError, match=r"no measurement in .*Give the folder that `layercrit measure --out` wrote"
    ):
        Measurement.load(tmp_path / "file")


# what it is called


@pytest.mark.parametrize(("given", "called"), [("mine", "mine"), (None, "b")])
def test_name__is_in_tables_figures_and_files(tmp_path, given, called):
    found = measure(network(), images(), trials=2, progress=False, name=given)
    reference = "file:/data/runs/b.pt?arch=py:nets:b"
    found.record["model"]["reference"] = reference
    again = Measurement.load(replace(found, cells=found.cells.assign(model=reference)).save(tmp_path))
    assert (again.name, again.summary()["name"], again.summary()["model"]) == (called, called, reference)
    assert called in [text.get_text() for text in again.plot().axes[0].texts]
    assert f"<strong>{called}<" in again._repr_html_()
    assert "b.pt?arch=py:nets:b" in again._repr_html_()  # without folders, which are private
