"""The commands about published checkpoints, on real files and a real server."""

import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from layercrit.cli.zoo import zoo
from layercrit.errors import LayercritError
from layercrit.models.references import open_model
from layercrit.models.zoo import downloads
from layercrit.models.zoo.fetching import ZOO
from zoo_files import WRITERS, light_state

ENTRY = "resnet50_pixmix_90ep"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERCRIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "_PAUSES", ())
    return tmp_path / "cache" / "zoo"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on this machine in the place of the Hugging Face Hub and of Google Drive; it serves a folder."""
    folder = tmp_path / "hub"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def run(*arguments):
    return CliRunner().invoke(zoo, list(map(str, arguments)))


def error_of(result):
    assert result.exit_code == 1
    assert isinstance(result.exception, LayercritError), result.exception
    return str(result.exception)


# list and show


def test_list__all():
    result = run("list")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) == 1 + 51 + 1
    assert lines[-1] == "51 models"
    [moco] = [line for line in lines if line.startswith("resnet50_moco_v3_300ep")]
    assert moco.split() == ["resnet50_moco_v3_300ep", "contrastive", "MoCo", "v3", "(300Ep)", "72.80%", "CC-BY-NC-4.0"]


def test_list__pattern_and_category():
    assert run("list", "robust_*", "--category", "adversarial_training").output.endswith("15 models\n")
    assert run("list", "robust_*", "--category", "baseline").output.endswith("0 models\n")


def test_list__json():
    models = json.loads(run("list", "resnet50_*", "--category", "freezing", "--json").output)["models"]
    assert [model["id"] for model in models] == ["resnet50_frozen_random"]
    assert models[0]["documented_accuracy"] is None
    assert models[0]["fetched"] is False


def test_list__unknown():
    assert "Did you mean 'resnet50_prime'" in error_of(run("list", "resnet50_primed"))
    assert "no category 'frozen'" in error_of(run("list", "--category", "frozen"))


def test_show(cache):
    result = run("show", "resnet50_dino")
    assert result.exit_code == 0
    for part in (
        "reference     zoo:resnet50_dino",
        "top-1         75.28% on ImageNet-1k, as documented",
        "mean          0.485, 0.456, 0.406",
        "licence       Apache-2.0",
        f"weights       {cache}/resnet50_dino.safetensors (not fetched)",
        "pretrain.pth\n              - names stay as they are\n",
        "linearweights.pth\n              - take the mapping 'state_dict'\n"
        "              - cut 'module.' off the beginning\n              - replace '^linear\\.' by 'fc.'\n",
        "@misc{resnet50_dino,\n",
        "eprint = {2104.14294}",
    ):
        assert part in result.output
    assert "top-1         - on" in run("show", "resnet50_frozen_random").output


def test_show__json():
    shown = json.loads(run("show", "resnet50_simclrv2", "--json").output)
    assert shown["files"][0]["address"] == "gdrive:1fDaMhujPnxo4SYOe4asPqCKQ3XB_sZvj"
    assert shown["files"][0]["rename"][0] == ["^net\\.0\\.0\\.", "conv1."]
    assert shown["rules"][0][0] == "take the mapping 'resnet'"
    assert shown["std"] == [1.0, 1.0, 1.0]


def test_show__unknown():
    assert "Did you mean 'resnet50_dino'" in error_of(run("show", "resnet50_dinno"))
    assert "no model 'robust_*'" in error_of(run("show", "robust_*"))


# fetch


def test_fetch__from_files(tmp_path, cache):
    state = light_state()
    first, second = WRITERS["dino"](tmp_path, state)
    result = run("fetch", "resnet50_dino", "--from", first, "--from", second)
    assert (result.exit_code, result.stdout) == (0, f"resnet50_dino: {cache}/resnet50_dino.safetensors\n")
    assert torch.equal(open_model("zoo:resnet50_dino").network.fc.weight, state["fc.weight"])
    assert json.loads(run("show", "resnet50_dino", "--json").output)["fetched"] is True


def test_fetch__over_the_net_goes_on_after_a_failure(tmp_path, cache, hub):
    """Of four models the hub has one whole, one broken, and two not at all."""
    folder = hub / "madrylab" / "robust-imagenet-models" / "resolve" / "main"
    folder.mkdir(parents=True)
    state = light_state()
    WRITERS["robust"](tmp_path, state)[0].rename(folder / "resnet50_l2_eps0.05.ckpt")
    (folder / "resnet50_l2_eps0.01.ckpt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    result = run("fetch", "robust_resnet50_l2_eps0", "robust_resnet50_l2_eps0.0*")
    assert error_of(result).startswith(
        "3 of 4 models could not be fetched, see above: robust_resnet50_l2_eps0, robust_"
    )
    assert result.stdout == f"robust_resnet50_l2_eps0.05: {cache}/robust_resnet50_l2_eps0.05.safetensors\n"
    assert (
        "robust_resnet50_l2_eps0: hf:madrylab/robust-imagenet-models/resnet50_l2_eps0.ckpt: the server" in result.stderr
    )
    assert "answered 404" in result.stderr
    assert "Git LFS pointer" in result.stderr
    assert sorted(path.name for path in cache.iterdir() if path.is_file() and path.suffix != ".lock") == [
        "robust_resnet50_l2_eps0.05.json",
        "robust_resnet50_l2_eps0.05.safetensors",
    ]
    assert not list((cache / "raw").rglob("[!.]*.ckpt"))
    assert torch.equal(open_model("zoo:robust_resnet50_l2_eps0.05").network.fc.bias, state["fc.bias"])


def test_fetch__one_failure_is_told_whole(hub):
    error = error_of(run("fetch", "robust_resnet50_l2_eps3"))
    assert "answered 404" in error
    assert "layercrit zoo fetch ID --from FILE" in error


def test_fetch__changed_file_is_refused_the_second_time(tmp_path, cache, hub):
    folder = hub / "madrylab" / "robust-imagenet-models" / "resolve" / "main"
    folder.mkdir(parents=True)
    state = light_state()
    WRITERS["robust"](folder, state)[0].rename(folder / "resnet50_l2_eps3.ckpt")
    assert run("fetch", "robust_resnet50_l2_eps3").exit_code == 0
    (cache / "robust_resnet50_l2_eps3.safetensors").unlink()
    changed = {**state, "fc.bias": torch.ones(1000)}
    WRITERS["robust"](folder, changed)[0].rename(folder / "resnet50_l2_eps3.ckpt")
    assert "It is not, or no longer, the file that was published" in error_of(run("fetch", "robust_resnet50_l2_eps3"))
    WRITERS["robust"](folder, state)[0].rename(folder / "resnet50_l2_eps3.ckpt")
    assert run("fetch", "robust_resnet50_l2_eps3").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["fetch"], "Name the models to fetch, or all of them with --all"),
        (["fetch", ENTRY, "--all"], "Name the models to fetch, or all of them with --all"),
        (["fetch", "resnet50_pixmix_*", "--from", "x"], "gives the files of one model, but 2 are named"),
        (["check", ENTRY], "--images"),
        (["check", ENTRY, "--images", "x", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_usage(arguments, text):
    result = run(*arguments)
    assert result.exit_code == 2
    assert text in result.stderr


def test_fetch__errors():
    assert "Did you mean 'resnet50_dino'" in error_of(run("fetch", "resnet50_dinno"))
    assert "There is no file" in error_of(run("fetch", ENTRY, "--from", "nowhere.pth"))
    assert "consists of 2 files, but 1 were given" in error_of(run("fetch", "resnet50_swav", "--from", "nowhere.pth"))


# check


def test_check(tmp_path):
    state = {name: tensor * 0 for name, tensor in light_state().items()}
    state["fc.bias"] = torch.eye(1000)[3]
    run("fetch", ENTRY, "--from", WRITERS["pixmix"](tmp_path, state)[0])
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 224, 224, 3), np.uint8), labels=np.array([3, 3, 3, 7]))
    checked = json.loads(run("check", ENTRY, "--images", tmp_path / "x.npz", "--json").output)
    assert (checked["top1_accuracy"], checked["n_images"], checked["verdict"]) == (0.75, 4, "agrees")
    assert checked["documented_accuracy"] == ZOO[ENTRY].documented_accuracy == 0.7736
    words = run("check", ENTRY, "--images", tmp_path / "x.npz", "--batch-size", "3", "--device", "cpu").output
    assert words == (
        "zoo:resnet50_pixmix_90ep: top-1 75.00% on 4 images (95% interval 30.06% - 95.44%); documented 77.36%: agrees\n"
    )


def test_check__not_fetched():
    assert f"layercrit zoo fetch {ENTRY}" in error_of(run("check", ENTRY, "--images", "x.npz"))


def test_import__loads_neither_torch_nor_rich():
    code = "import sys, layercrit.cli.zoo; assert not {'torch', 'rich', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
