import json

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from layercrit.models.references import open_model
from layercrit.study import planning
from layercrit.study.file import read_study_file
from layercrit.study.planning import plan_study
from layercrit.study.store import CellRow, ModelRow, PlanRow, Store
from small_studies import N_LAYERS, OPTIONS, write_study

NETS = """
import torch
from torch import nn

class Two(nn.Module):
    '''Multiply-adds of an image of 8 x 8 pixels: 64 * 4 * 9 in conv, 40 in fc.'''
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.Linear(width, 10)
    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))

def broken():
    raise RuntimeError("nothing to build")
"""
CONV, FC = 2 * 64 * 4 * 9, 2 * 40
TWO = "py:my_planned_nets:Two?pretrained=false"


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """The current directory with a module of networks, and there a folder for a study."""
    (tmp_path / "my_planned_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("LAYERCRIT_CACHE", str(tmp_path / "zoo"))
    return tmp_path / "study"


def planned(folder, *references, **sections):
    models = [{"reference": reference, "name": f"model {n}"} for n, reference in enumerate(references)]
    study = {"study": {"baseline": None}} | sections
    return plan_study(read_study_file(write_study(folder, n_models=0, models=models, **study)))


def test_plan_study__counts(tmp_path):
    plan = plan_study(read_study_file(write_study(tmp_path, n_models=3, trials=4)))
    assert plan.n_images == 24
    assert plan.models.to_dict("list") == {
        "model": ["m0", "m1", "m2"],
        "reference": [f"file:{tmp_path}/m{n}.safetensors?{OPTIONS}" for n in range(3)],
        "architecture": ["py:layercrit.demo:small_resnet?pretrained=False"] * 3,
        "n_layers": [N_LAYERS] * 3,
        "n_cells": [4 * N_LAYERS] * 3,
        "n_done": [0] * 3,
        "download": [0] * 3,
        "mistake": [""] * 3,
    }
    assert plan.seconds > 0


def test_plan_study__of_a_path(tmp_path):
    path = write_study(tmp_path)
    assert plan_study(path).to_dict()["n_cells"] == plan_study(read_study_file(path)).to_dict()["n_cells"]


def test_plan_study__flops_by_hand(nets):
    """3 trials of two layers on 24 images; each trial runs the trained network beside what follows each layer."""
    plan = planned(nets, TWO, trials=3)
    trained = CONV + FC
    assert plan.flops_plain == 24 * (3 * 2 + 1) * trained
    assert plan.flops == 24 * (trained + 3 * (trained + trained + FC))
    twice = planned(nets, TWO, f"{TWO}&width=8", trials=3)
    assert twice.flops_plain == pytest.approx(3 * plan.flops_plain)
    assert twice.flops == pytest.approx(3 * plan.flops)


def test_plan_study__resets_that_are_not_random_have_one_trial(nets):
    plan = planned(nets, TWO, trials=3, protocol={"resets": ["rerandomize", "zero", "permute"]})
    assert plan.models["n_cells"].to_list() == [2 * (3 + 1 + 3)]
    trained = CONV + FC
    assert plan.flops == 24 * (trained + 7 * (trained + trained + FC))


@pytest.mark.parametrize(
    ("protocol", "n_layers"),
    [({"layers": "conv,fc"}, 2), ({"layers": "fc"}, 1), ({"types": "conv"}, 1), ({"types": "all"}, 2)],
)
def test_plan_study__selected_layers(nets, protocol, n_layers):
    plan = planned(nets, TWO, protocol=protocol)
    assert plan.models["n_layers"].to_list() == [n_layers]
    expected = {1: CONV + FC if protocol.get("types") == "conv" else FC, 2: CONV + 2 * FC}[n_layers]
    assert plan.flops == 24 * (CONV + FC + 2 * (CONV + FC + expected))


def test_plan_study__groups(tmp_path):
    study = read_study_file(write_study(tmp_path, protocol={"group": "stage"}))
    assert plan_study(study).models["n_layers"].to_list() == [5, 5]  # stem, three stages, head


def measure_some(folder, models, n_layers, trials):
    """Write a store in which the first cells of each model are measured."""
    with Store(folder, create=True) as store, store.transaction():
        store.put_models([ModelRow(model, model) for model in models])
        for model in models:
            rows = [
                PlanRow(model, f"l{n}", "rerandomize", trial, f"{model} {n} {trial}", None, None, n, 1, 0.5)
                for trial in range(trials)
                for n in range(n_layers)
            ]
            store.put_plan(rows)
            store.put_cells(CellRow(row.key, "ok", 1, 1.0, 1, {"cosine": 0.5}) for row in rows[: models[model]])


def test_plan_study__what_is_done_in_the_folder(tmp_path):
    study = read_study_file(write_study(tmp_path, trials=2))
    new = plan_study(study, tmp_path / "out")
    assert new.models["n_done"].to_list() == [0, 0]
    assert not (tmp_path / "out").exists(), "planning writes nothing"
    n_cells = 2 * N_LAYERS
    measure_some(tmp_path / "out", {"m0": n_cells, "m1": n_cells // 4, "gone": 3}, N_LAYERS, 2)
    plan = plan_study(study, tmp_path / "out")
    assert plan.models["n_done"].to_list() == [n_cells, n_cells // 4]
    left = 1 - n_cells // 4 / n_cells
    assert plan.flops == pytest.approx(new.flops / 2 * left)
    assert plan.flops_plain == pytest.approx(new.flops_plain / 2 * left)
    assert plan_study(study, str(tmp_path / "out")).models.equals(plan.models)


def test_plan_study__more_done_than_asked_for(tmp_path):
    study = read_study_file(write_study(tmp_path, trials=1))
    measure_some(tmp_path / "out", {"m0": 2 * N_LAYERS, "m1": 2 * N_LAYERS}, N_LAYERS, 2)
    plan = plan_study(study, tmp_path / "out")
    assert plan.models["n_done"].to_list() == [N_LAYERS, N_LAYERS]
    assert (plan.flops, plan.flops_plain, plan.seconds) == (0, 0, 0)


def test_plan_study__builds_each_architecture_once(nets, monkeypatch):
    opened = []

    def counting(reference, **options):
        opened.append(reference)
        return open_model(reference, **options)

    monkeypatch.setattr(planning, "open_model", counting)
    write_study(nets, n_models=2)
    file = f"file:{nets}/m0.safetensors?{OPTIONS}"
    mine = [f"{TWO}&seed={seed}" for seed in range(3)]
    plan = planned(nets, *mine, file, f"{TWO}&width=8", f"{TWO}&mean=(0.2,)", file.replace("m0", "m1"))
    assert len(opened) == 3
    assert plan.models["architecture"].nunique() == 3
    assert plan.models["mistake"].eq("").all()


def test_plan_study__a_mistake_of_one_model_does_not_stop_the_others(nets):
    (nets / "bare.pth").parent.mkdir()
    (nets / "bare.pth").touch()
    references = [
        TWO,
        "py:my_planned_nets:broken?pretrained=false",
        "py:my_planned_nets:Twoo",
        "py:no_such_module:x",
        "file:bare.pth?arch=py:no_such_nets:x",
        "torchvision:resnet19",
        "torchvision:resnet18:IMAGENET1K_V9?num_classes=10",
        "hf:someone/not-here",
        f"{TWO}&width=8",
    ]
    plan = planned(nets, *references, images={"input_size": [1, 32, 32]})
    good = plan.models["mistake"].eq("")
    assert plan.models["reference"][good].to_list() == [TWO, f"{TWO}&width=8"]
    for place, message in {
        1: "nothing to build",
        2: "has no function or class 'Twoo'. Did you mean 'Two'?",
        3: "there is no module 'no_such_module'",
        4: "there is no module 'no_such_nets'",
        5: "torchvision has no classifier 'resnet19'",
        6: "pretrained=False' cannot run on an image of 1 x 32 x 32 (channels, height, width) (RuntimeError: Given gro",
        7: "hf:someone/not-here",
    }.items():
        assert message in plan.models["mistake"][place]
        assert plan.models.loc[place, ["n_layers", "n_cells", "download"]].to_list() == [0, 0, 0]
    alone = planned(nets, TWO, f"{TWO}&width=8", images={"input_size": [1, 32, 32]})
    assert plan.flops == alone.flops


def test_plan_study__patterns_that_fit_one_model_only(nets):
    plan = planned(nets, TWO, "py:layercrit.demo:small_resnet?pretrained=false", protocol={"layers": "conv,fc"})
    assert plan.models["n_layers"].to_list() == [2, 0]
    assert "No layer matches 'conv'" in plan.models["mistake"][1]


def test_plan_study__weights_that_are_not_known(nets):
    plan = planned(nets, "torchvision:squeezenet1_1:IMAGENET1K_V9", images={"input_size": [3, 64, 64]})
    assert "has no weights 'IMAGENET1K_V9'. Did you mean 'IMAGENET1K_V1'" in plan.models["mistake"][0]


def test_plan_study__downloads(nets):
    network = timm.create_model("test_resnet")
    size = 4 * sum(tensor.numel() for tensor in network.state_dict().values())
    nets.mkdir()
    safetensors.torch.save_file(network.state_dict(), nets / "w.safetensors")
    references = [
        "timm:test_resnet.r160_in1k",
        "timm:test_resnet?pretrained=false",
        "timm:test_resnet?num_classes=1000&pretrained=False",
        f"file:{nets}/w.safetensors?arch=timm:test_resnet",
    ]
    plan = planned(nets, *references, images={"input_size": [3, 64, 64]})
    assert plan.models["mistake"].to_list() == [""] * 4
    assert plan.models["download"].to_list() == [size, 0, 0, 0]


def test_plan_study__zoo(nets):
    plan = planned(nets, "zoo:resnet50_dino", images={"input_size": [3, 32, 32]})
    (row,) = plan.models.to_dict("records")
    assert (row["architecture"], row["n_layers"], row["mistake"]) == ("timm:resnet50?pretrained=False", 54, "")
    assert row["download"] == pytest.approx(4 * 25.6e6, rel=0.01)


def test_plan_study__images_of_one_channel_for_a_network_with_other_means(nets):
    """The mean of the reference fits the images, that of the architecture without it does not."""
    reference = "timm:test_resnet?pretrained=false&in_chans=1&mean=(0.1,)&std=(0.2,)"
    assert planned(nets, reference).models["mistake"].to_list() == [""]


def test_plan_study__twice_gives_the_same_but_for_the_time(tmp_path):
    study = read_study_file(write_study(tmp_path))
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, second = plan_study(study), plan_study(study)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002
    assert first.models.equals(second.models)
    assert (first.flops, first.flops_plain) == (second.flops, second.flops_plain)


def test_to_dict__is_plain_data(tmp_path):
    plan = plan_study(read_study_file(write_study(tmp_path)))
    found = plan.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["models"] == plan.models.to_dict("records")
    totals = {name: found[name] for name in ("n_images", "n_cells", "n_done", "download")}
    assert totals == {"n_images": 24, "n_cells": 4 * N_LAYERS, "n_done": 0, "download": 0}
    assert (found["flops"], found["flops_plain"], found["seconds"]) == (plan.flops, plan.flops_plain, plan.seconds)


def test_plan_study__counts_the_images_that_there_are(tmp_path):
    study = read_study_file(write_study(tmp_path, n_images=24, images={"n_images": 10_000}))
    assert plan_study(study).n_images == 24
    (tmp_path / "images.npz").unlink()
    plan = plan_study(study)
    assert plan.n_images == 10_000, "as many as are asked for"
    assert "images.npz" in plan.images_mistake


def test_plan_study__lists_beside_the_images_are_read(tmp_path):
    asked = {"labels": "labels.csv", "classes": "classes.txt"}
    study = read_study_file(write_study(tmp_path, n_images=2, images=asked))
    assert plan_study(study).images_mistake.startswith(f"No such file of labels: '{tmp_path}/labels.csv'")
    (tmp_path / "labels.csv").write_text("label\ncat\n")
    assert "1 labels without names for 2 images" in plan_study(study).images_mistake
    (tmp_path / "labels.csv").write_text("label\ncat\ndog\n")
    assert "classes.txt" in plan_study(study).images_mistake
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    assert (plan_study(study).images_mistake, plan_study(study).n_images) == ("", 2)
