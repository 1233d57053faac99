import csv
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from forked import begin, layercrit
from layercrit.errors import ModelError, ProtocolError, TrainingError
from layercrit.models.checkpoints import hash_tensors
from layercrit.models.references import open_model
from layercrit.seeds import drawing, seed_of
from layercrit.training import Options, get_method, open_training_data, train
from layercrit.training.architecture import initial_network
from layercrit.training.batches import Batches, to_device
from layercrit.training.phases import PhaseOfRun
from layercrit.training.runs import RunFolder
from training_images import ARCHITECTURE, write_images

TINY = {"epochs": 3, "batch_size": 16}
SELF_SUPERVISED = {**TINY, "epochs": 2, "head_epochs": 1, "optimizer": "sgd", "lr": 0.01}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_training_data(write_images(tmp_path_factory.mktemp("images") / "stripes.npz"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run with `TINY` settings, in one go."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(data, folder)
    return folder


def run(data, folder, method="baseline", settings=None, **arguments):
    arguments.setdefault("options", Options(device="cpu"))
    return train(get_method(method, settings or TINY), ARCHITECTURE, data, folder, **arguments)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_train__is_not_disturbed_by_the_callers_settings(data, whole, tmp_path):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        run(data, tmp_path / "other")
    assert same(weights(whole), weights(tmp_path / "other"))


def test_train__takes_names_and_a_file(data, whole, tmp_path):
    options = Options(device="cpu")
    train("baseline", ARCHITECTURE, data.source, tmp_path / "other", settings=TINY, options=options, progress=False)
    assert same(weights(whole), weights(tmp_path / "other"))
    with pytest.raises(TrainingError, match="no setting 'epoch'"):
        train("baseline", ARCHITECTURE, data, tmp_path / "other", settings={"epoch": 1})
    with pytest.raises(TrainingError, match="settings are for a method that is given by name"):
        train(get_method("baseline"), ARCHITECTURE, data, tmp_path / "other", settings=TINY)


class PowerCutError(Exception):
    """Training ended in the middle."""


def interrupted(data, folder, at, **arguments):
    """Train until the step ``at``, every step kept as a state."""

    def progress(done):
        if done.step >= at:
            raise PowerCutError

    options = Options(device="cpu", save_seconds=0.0)
    with pytest.raises(PowerCutError):
        run(data, folder, options=options, progress=progress, **arguments)


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_train__learns_and_leaves_a_model_reference(data, tmp_path):
    trained = run(
        data, tmp_path / "run", settings={**TINY, "epochs": 8}, options=Options(keep_epochs=(2,), device="cpu")
    )
    assert trained.top1_accuracy > 0.8
    assert trained.reference == f"file:{tmp_path / 'run'}"
    record = json.loads((tmp_path / "run" / "model.json").read_text())
    assert record == trained.record | {"sha256": record["sha256"]}
    assert record["method"] == "baseline"
    assert record["category"] == "baseline"
    assert record["settings"]["momentum"] == 0.9
    assert record["data"]["n_test"] == 48
    assert record["by_epoch"][-1]["top1_accuracy"] == record["top1_accuracy"]
    assert record["n_parameters"] == sum(p.numel() for p in open_model(trained.reference).network.parameters())
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"epochs/epoch-0000.safetensors", "epochs/epoch-0002.safetensors", "log.csv", "model.json",
            "model.safetensors"} == files - {".lock"}  # fmt: skip


def test_train__the_model_reference_answers_as_recorded(data, tmp_path):
    trained = run(data, tmp_path / "run")
    model = open_model(trained.reference)
    images = np.stack([np.asarray(data.test.image(i)) for i in range(len(data.test))])[:, None]
    with torch.no_grad():
        predicted = model.classifier(torch.from_numpy(images)).argmax(dim=1).numpy()
    assert (predicted == data.test.labels).mean() == pytest.approx(trained.top1_accuracy)
    initial = open_model(f"{trained.reference}@epoch=0").network.state_dict()
    assert same(initial, load_file(tmp_path / "run" / "epochs" / "epoch-0000.safetensors"))


def test_train__log_has_a_row_an_epoch(whole):
    rows = list(csv.DictReader((whole / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert all(float(row["images_per_second"]) > 0 for row in rows)


def test_train__float16_weights_are_those_the_accuracy_is_of(data, whole, tmp_path):
    trained = run(data, tmp_path / "run", weights_dtype="float16")
    stored = weights(tmp_path / "run")
    assert stored["layer1.0.conv1.weight"].dtype == torch.float16
    assert stored["layer1.0.bn1.running_var"].dtype == torch.float32
    expected = {n: t.half() if t.dim() > 1 else t for n, t in weights(whole).items()}
    assert same(stored, expected)
    assert json.loads((whole / "model.json").read_text())["initial_sha256"] == trained.record["initial_sha256"]


def test_train__kept_epochs_are_in_the_format_of_the_final_weights(data, tmp_path):
    """So a layer that goes back to the last epoch, or a frozen one to any, stays as it is; hashes are recorded."""
    options = Options(device="cpu", keep_epochs=(1, 3))
    trained = run(data, tmp_path / "run", "frozen_random", weights_dtype="float16", options=options)
    first, one, last = (load_file(tmp_path / f"run/epochs/epoch-{n:04d}.safetensors") for n in (0, 1, 3))
    final = load_file(tmp_path / "run" / "model.safetensors")
    assert same(last, final)
    frozen = [name for name in final if final[name].dim() == 4 and final[name].shape[2] == 3]
    assert frozen
    assert all(torch.equal(first[name], final[name]) and torch.equal(one[name], final[name]) for name in frozen)
    assert not torch.equal(one["fc.weight"], final["fc.weight"])
    assert trained.record["kept_sha256"] == {
        str(n): hashlib.sha256((tmp_path / f"run/epochs/epoch-{n:04d}.safetensors").read_bytes()).hexdigest()
        for n in (0, 1, 3)
    }
    again = initial_network(trained.record["arch"], 0, data.inputs).state_dict()
    assert trained.record["initial_sha256"] == hash_tensors(again), "that of the weights before they are rounded"


# --- the same but for the method ------------------------------------------------------------------------------------

METHODS = ("baseline", "frozen_random", "robust_linf", "tv2", "augmix", "simclr")


def test_train__one_seed_gives_every_method_the_same_initial_weights(data, tmp_path):
    short = {"epochs": 1, "batch_size": 48}
    initial = {}
    for method in METHODS:
        run(data, tmp_path / method, method, {**short, **({"head_epochs": 1} if method == "simclr" else {})})
        initial[method] = load_file(tmp_path / method / "epochs" / "epoch-0000.safetensors")
    assert all(same(initial["baseline"], other) for other in initial.values())
    finals = [weights(tmp_path / method)["fc.weight"] for method in METHODS]
    assert all(not torch.equal(finals[0], other) for other in finals[1:]), "the methods did not train differently"
    run(data, tmp_path / "seed1", settings=short, seed=1)
    assert not same(initial["baseline"], load_file(tmp_path / "seed1" / "epochs" / "epoch-0000.safetensors"))


def test_train__frozen_filters_stay_as_drawn(data, tmp_path):
    run(data, tmp_path / "run", "frozen_random")
    initial, final = load_file(tmp_path / "run" / "epochs" / "epoch-0000.safetensors"), weights(tmp_path / "run")
    kept = {name for name in initial if torch.equal(initial[name], final[name])}
    assert {name for name in kept if name.endswith("weight")} == {
        "conv1.weight", *(f"layer{stage}.{block}.conv2.weight" for stage in (1, 2, 3) for block in (0, 1))
    }  # fmt: skip


def test_train__is_sgd_by_formula(data, tmp_path):
    """Nesterov's momentum (Sutskever et al. 2013) as PyTorch writes it, decay on matrices only, cosine schedule."""
    settings = {"epochs": 2, "batch_size": 32, "lr": 0.05, "momentum": 0.8, "weight_decay": 0.01}
    run(data, tmp_path / "run", settings=settings)
    method = get_method("baseline", settings)
    fresh = seed_of("training", 0, "initial weights")
    network = open_model(f"{ARCHITECTURE}&pretrained=false&seed={fresh}").network.train()
    network = network.to(memory_format=torch.channels_last)
    batches = Batches(data.train, method.views(data.inputs), 0, 32)
    velocity = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    n_steps, step = 2 * batches.n_steps, 0
    mean, std = torch.tensor(data.inputs.mean).view(-1, 1, 1), torch.tensor(data.inputs.std).view(-1, 1, 1)
    for epoch in range(2):
        for (images,), labels in batches.of_epoch(epoch):
            lr = 0.05 * (1 + math.cos(math.pi * step / n_steps)) / 2
            loss = F.cross_entropy(network((to_device(images, torch.device("cpu")) - mean) / std), labels)
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for (name, p), gradient in zip(network.named_parameters(), gradients, strict=True):
                    decayed = gradient + 0.01 * p * (p.dim() > 1)
                    velocity[name] = 0.8 * velocity[name] + decayed
                    p -= lr * (decayed + 0.8 * velocity[name])
            step += 1
    initial, final = load_file(tmp_path / "run" / "epochs" / "epoch-0000.safetensors"), weights(tmp_path / "run")
    for name, p in network.named_parameters():
        error, way = (final[name] - p.detach()).norm(), (final[name] - initial[name]).norm()
        assert error < 1e-2 * way, f"{name} is off by {error / way:.1e} of the way it went"


# --- interruption ---------------------------------------------------------------------------------------------------

RESUMED = {
    "baseline": TINY,
    "tv2": {**TINY, "ema_decay": 0.9, "lr": 0.05, "warmup_epochs": 1},  # mixed images, erased parts, moving average
    "robust_l2": TINY,
    "dino": {**SELF_SUPERVISED, "n_local_views": 1, "hidden_dim": 32, "output_dim": 64},
}


@pytest.mark.parametrize("method", RESUMED)
def test_train__resumed_is_bit_for_bit_uninterrupted(data, tmp_path, monkeypatch, method):
    monkeypatch.setattr("layercrit.training.phases._CHECK_EVERY", 2)
    settings = RESUMED[method]
    whole = run(data, tmp_path / "whole", method, settings)
    for at in (3, 9, 14):  # within an epoch, in another (or phase), again
        interrupted(data, tmp_path / "cut", at, method=method, settings=settings)
    lines = []
    resumed = run(data, tmp_path / "cut", method, settings, say=lines.append)
    assert any(line.startswith("Resuming ") and " after 1" in line for line in lines)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k} for row in trained.record["by_epoch"]]
        for trained in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif how == "a flipped bit":
        path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["cut off", "a flipped bit", "empty"])
def test_train__a_damaged_state_is_left_out_for_the_one_before(data, whole, tmp_path, how):
    interrupted(data, tmp_path / "cut", 15)
    states = sorted((tmp_path / "cut" / "state").glob("*.pt"))
    assert len(states) == 2
    damage(states[-1], how)
    lines = []
    run(data, tmp_path / "cut", say=lines.append)
    assert f"{states[-1]} is damaged or incomplete, so it is skipped." in lines
    assert any(line.startswith("Resuming ") for line in lines)
    assert same(weights(whole), weights(tmp_path / "cut"))


def test_train__begins_anew_where_no_state_is_whole(data, whole, tmp_path):
    interrupted(data, tmp_path / "cut", 15)
    for state in (tmp_path / "cut" / "state").glob("*.pt"):
        damage(state, "cut off")
    lines = []
    run(data, tmp_path / "cut", say=lines.append)
    assert "No saved state is intact: training starts from the beginning." in lines
    assert same(weights(whole), weights(tmp_path / "cut"))


def test_train__a_state_cannot_run_code(data, tmp_path):
    interrupted(data, tmp_path / "cut", 15)
    states = sorted((tmp_path / "cut" / "state").glob("*.pt"))
    import hashlib
    import io

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    content = io.BytesIO()
    torch.save({"about": Evil()}, content)
    states[-1].write_bytes(hashlib.sha256(content.getvalue()).digest() + content.getvalue())
    lines = []
    run(data, tmp_path / "cut", say=lines.append)
    assert not (tmp_path / "evil").exists()
    assert any(line.startswith(f"{states[-1]} cannot be read") for line in lines)


COMMAND = ("train", "--method", "baseline", "--arch", ARCHITECTURE, "--epochs", "6", "--set", "batch_size=8",
           "--device", "cpu")  # fmt: skip


@pytest.mark.slow
def test_train__killed_at_any_moment(tmp_path):
    command = (*COMMAND, "--data", write_images(tmp_path / "stripes.npz", n_train=120), "--out")
    whole = layercrit(*command, "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    moments = random.Random(0)
    for kill in range(2):
        process = begin(*command, "cut", cwd=tmp_path, out=tmp_path / "out", err=tmp_path / "err")
        before = states_of(tmp_path / "cut")
        deadline = time.monotonic() + 120
        while states_of(tmp_path / "cut") == before:  # until it has come a step further
            assert process.is_alive(), f"it ended before it could be killed for time {kill + 1}"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        process.join()
        assert not (tmp_path / "cut" / "model.json").exists()
    resumed = layercrit(*command, "cut", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "state").exists()


def states_of(folder):
    return sorted(path.name for path in (folder / "state").glob("*.pt"))


# --- several processes, workers, global state ------------------------------------------------------------------------


def test_train__the_number_of_workers_does_not_matter(data, whole, tmp_path):
    run(data, tmp_path / "two", options=Options(device="cpu", n_workers=2))
    assert same(weights(whole), weights(tmp_path / "two"))


@pytest.mark.slow
def test_train__two_processes_share_each_batch(tmp_path):
    images = write_images(tmp_path / "stripes.npz")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "layercrit"]
    settings = ["--set", "lr=0.05", "--data", images, "--out", tmp_path / "two"]
    settings += ["--arch", "py:recording:recording_network?num_classes=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RECORDED": str(tmp_path)}
    command = [*launch, *COMMAND, *settings]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "two" / "model.json").read_text())
    assert record["n_processes"] == 2
    assert len(list(csv.DictReader((tmp_path / "two" / "log.csv").open()))) == 6

    data = open_training_data(images)
    batches = Batches(data.train, get_method("baseline").phases()[0].views(data.inputs), seed=0, batch_size=8)
    shares = [[torch.load(tmp_path / f"{rank}-{step}.pt") for step in range(72)] for rank in (0, 1)]
    whole = [to_device(images, torch.device("cpu")) for epoch in range(6) for (images,), _ in batches.of_epoch(epoch)]
    for step, (images, first, second) in enumerate(zip(whole, *shares, strict=True)):
        seen = torch.stack([first["images"], second["images"]], dim=1).flatten(0, 1)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.inputs.mean, data.inputs.std))
        assert torch.allclose(seen * std + mean, images, atol=1e-5), f"step {step}: not a half of the batch each"
    draws = {share["draw"] for of_process in shares for share in of_process}
    assert len(draws) == 2 * 72, "processes or steps draw the same random numbers"

    network = open_model(ARCHITECTURE).network
    network.load_state_dict(weights(tmp_path / "two"))
    held_out = torch.from_numpy(np.stack([np.asarray(data.test.image(i)) for i in range(len(data.test))])[:, None])
    with torch.no_grad():
        predicted = network((held_out / 255 - mean) / std).argmax(dim=1).numpy()
    assert record["top1_accuracy"] == pytest.approx((predicted == data.test.labels).mean())
    assert record["top1_accuracy"] > 0.6


def test_train__leaves_global_generators_as_they_were(data, tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    interrupted(data, tmp_path / "cut", 15)
    run(data, tmp_path / "cut")
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()


def test_train__does_not_depend_on_global_generators(data, whole, tmp_path):
    with drawing(2):
        run(data, tmp_path / "two")
    assert same(weights(whole), weights(tmp_path / "two"))


# --- bad input -------------------------------------------------------------------------------------------------------


def test_train__loss_that_is_no_number(data, tmp_path, monkeypatch):
    monkeypatch.setattr("layercrit.training.phases._CHECK_EVERY", 2)
    step = PhaseOfRun._step

    def poisoned(self, number, views, labels):
        if number == 10:
            views[0].fill_(math.nan)
        step(self, number, views, labels)

    monkeypatch.setattr(PhaseOfRun, "_step", poisoned)
    with pytest.raises(TrainingError, match=r"became nan at step 11 of 18, in epoch 2\. The last saved state is "):
        run(data, tmp_path / "run", options=Options(device="cpu", save_seconds=0.0))
    state, problems = RunFolder(tmp_path / "run").load_state()
    assert not problems
    assert state["step"] == 10
    assert all(value.isfinite().all() for value in state["learner"].values())
    assert not (tmp_path / "run" / "model.json").exists()


def test_train__a_finished_run_is_returned(data, whole):
    finished = json.loads((whole / "model.json").read_text())["finished"]
    written = (whole / "model.safetensors").stat().st_mtime_ns
    assert run(data, whole).record["finished"] == finished
    assert (whole / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("finished", [True, False])
def test_train__another_run_lies_there(data, whole, tmp_path, finished):
    folder = whole
    if not finished:
        folder = tmp_path / "run"
        interrupted(data, folder, 15)
    with pytest.raises(
        TrainingError, match=r"contains another training run: lr is 0\.1, but 0\.2 was requested\. Choose another"
    ):
        run(data, folder, settings={**TINY, "lr": 0.2})
    with pytest.raises(TrainingError, match=r"seed is 0, but 1 was requested"):
        run(data, folder, seed=1)
    with pytest.raises(TrainingError, match=r"method is 'baseline', but 'frozen_random' was requested"):
        run(data, folder, "frozen_random")


@pytest.mark.parametrize(
    ("architecture", "error", "text"),
    [
        ("timm:resnet1", ModelError, "resnet1"),
        ("file:somewhere", ModelError, "refers to trained weights; expected an architecture"),
        ("py:layercrit.demo:small_resnet?num_classes=5", ModelError, r"has 5 classes, but the data have 3"),
        (torch.nn.Linear(2, 2), ModelError, r"got a Linear\. Of an own network, name .*'py:my_nets:MyNet'"),
        ("timm:vit_tiny_patch16_224", ModelError, r"does not accept images of \(1, 12, 12\).*--input-size"),
    ],
)
def test_train__architectures_that_do_not_fit(data, tmp_path, architecture, error, text):
    with pytest.raises(error, match=text):
        train(get_method("baseline", TINY), architecture, data, tmp_path / "run", options=Options(device="cpu"))


def test_train__images_without_a_name(tmp_path):
    with pytest.raises(TrainingError, match=r"got a ndarray\. Save arrays as an \.npz file with the keys images and"):
        train("baseline", "py:layercrit.demo:small_resnet", np.zeros((10, 28, 28, 1), np.uint8), tmp_path / "run")


def test_train__settings_that_make_no_sense(data, tmp_path):
    with pytest.raises(TrainingError, match=r"precision must be one of no, bf16, fp16"):
        run(data, tmp_path / "run", precision="int8")
    with pytest.raises(TrainingError, match=r"weights_dtype must be one of float32, float16; got 'float8'"):
        run(data, tmp_path / "run", weights_dtype="float8")
    with pytest.raises(TrainingError, match=r"trackers must be one of tensorboard, wandb; got 'mlflow'"):
        run(data, tmp_path / "run", options=Options(device="cpu", trackers=("wandb", "mlflow")))
    with pytest.raises(TrainingError, match=r"timm has no optimizer 'sdg'\. Did you mean 'sgd'"):
        run(data, tmp_path / "run", settings={**TINY, "optimizer": "sdg"})
    with pytest.raises(TrainingError, match=r"keep_epochs are 2, 5, but training ends after epoch 3"):
        run(data, tmp_path / "run", options=Options(device="cpu", keep_epochs=(2, 5)))
    if not torch.cuda.is_available():
        with pytest.raises(ProtocolError, match="device 'cuda' cannot be used"):
            run(data, tmp_path / "run", options=Options(device="cuda"))
