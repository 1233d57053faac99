"""Memory that runs out, devices, batch sizes, the progress bar."""

import numpy as np
import pytest
import torch

from layercrit.engine import calibration as _calibration
from layercrit.engine import holder
from layercrit.engine.graph_replay import GraphReplay
from layercrit.errors import LayercritError
from layercrit.machine import choose_batch_size, find_device, is_out_of_memory
from layercrit.measuring import measure
from layercrit.progress_bar import Bar
from small_subjects import (
    PIXELS,
    QUIET,
    assert_same_cells,
    mostly_right,
    photographs,
    small_network,
    two_layers,
)


class Memory:
    """Holds ``n_images`` at once: sweeps of more fail as torch does.

    With ``layers``, only sweeps that reset layers fail, from that layer on, and only after ``spared`` more of them.
    """

    def __init__(self, monkeypatch, error, n_images, layers=0, spared=0):
        self.failures = 0
        sweep, spared_layers = GraphReplay.sweep, iter(range(spared))

        def failing(replay, images, prepared):
            for index, found in enumerate(sweep(replay, images, prepared)):
                too_many = len(images) > n_images and index >= layers and bool(prepared) == bool(layers)
                if too_many and next(spared_layers, None) is None:
                    self.failures += 1
                    raise error
                yield found

        monkeypatch.setattr(GraphReplay, "sweep", failing)


OUT_OF_MEMORY = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("could not create a primitive"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["CPU", "GPU", "cuDNN", "oneDNN", "Python"])
def test_measure__without_enough_memory_batches_are_halved_and_that_is_said(monkeypatch, capsys, error):
    network, probe_set = small_network(), photographs(labels=mostly_right(small_network()))
    expected = measure(network, probe_set, batch_size=10, trials=2, **QUIET)
    memory = Memory(monkeypatch, error, n_images=2)
    found = measure(network, probe_set, batch_size=10, trials=2, progress=True)
    assert memory.failures > 0
    said = ["out of memory: batch size halved to 5", "out of memory: batch size halved to 2"]
    assert [note for note in found.record["notes"] if "memory" in note] == said
    assert found.record["protocol"]["batch_size"] == 2
    assert found.record["dtype"] == "float32"
    assert_same_cells(found, expected, atol=2e-6)
    assert [line for line in capsys.readouterr().err.splitlines() if "memory" in line] == said


def test_measure__memory_that_runs_out_within_a_trial_costs_that_trial_only(monkeypatch):
    """The third batch of the second trial fails when two layers are done; trial 0 is kept as it is."""
    network, probe_set = small_network(), photographs(labels=mostly_right(small_network()))
    expected = measure(network, probe_set, batch_size=4, trials=3, **QUIET)
    monkeypatch.setattr("layercrit.engine.predictions._TEMPERATURE_IMAGES", 4)
    memory = Memory(monkeypatch, OUT_OF_MEMORY[0], n_images=2, layers=2, spared=2 * 7 + 3 * 7)
    shown = []
    found = measure(network, probe_set, batch_size=4, trials=3, on_trial=lambda so_far: shown.append(so_far()), **QUIET)
    assert memory.failures == 1
    assert [note for note in found.record["notes"] if "memory" in note] == ["out of memory: batch size halved to 2"]
    assert [one.cells["trial"].nunique() for one in shown] == [1, 2, 3]
    assert shown[0].record["protocol"]["batch_size"] == 4
    for name, values in shown[0].per_image.items():
        assert np.array_equal(values[:, 0], found.per_image[name][:, 0])
    np.testing.assert_allclose(found.per_image["cosine"], expected.per_image["cosine"], atol=2e-6)


def test_measure__a_batch_of_one_that_does_not_fit_is_an_error(monkeypatch):
    Memory(monkeypatch, OUT_OF_MEMORY[1], n_images=0)
    with pytest.raises(LayercritError, match=r"Out of memory on cpu even with a batch of one image \(OutOfMemoryE"):
        measure(small_network(), photographs(3), **QUIET)


def test_measure__other_runtime_errors_are_not_taken_for_lack_of_memory(monkeypatch):
    Memory(monkeypatch, RuntimeError("shapes cannot be multiplied"), n_images=0)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        measure(two_layers(), PIXELS, **QUIET)


def test_measure__the_format_stays_when_memory_runs_out(monkeypatch):
    """Trials of one measurement are all in the format that was chosen first, without another calibration."""
    network, probe_set = small_network(), photographs(6)
    monkeypatch.setattr(holder, "_LONG_JOB", 0)
    monkeypatch.setattr(holder, "multiplies_bfloat16", lambda device: True)
    Memory(monkeypatch, OUT_OF_MEMORY[0], n_images=3, layers=2, spared=30)
    monkeypatch.setattr(_calibration, "LAYER_TOLERANCE", 1)
    monkeypatch.setattr(_calibration, "MEAN_TOLERANCE", 1)

    def forbid(_):
        monkeypatch.setattr(_calibration, "LAYER_TOLERANCE", -1)

    found = measure(network, probe_set, trials=5, on_trial=forbid, **QUIET)
    assert [note.partition(":")[0] for note in found.record["notes"][2:]] == ["bfloat16", "out of memory"]
    assert found.record["dtype"] == "bfloat16"


# devices, batch sizes, progress


@pytest.mark.parametrize(
    ("n_images", "size", "expected"),
    [(10_000, 224, 16), (100, 224, 15), (20, 224, 10), (5, 224, 5), (3, 4096, 1), (1000, 32, 125), (512, 8, 128)],
)
def test_choose_batch_size__auto_divides_evenly(n_images, size, expected):
    cpu = torch.device("cpu")
    assert choose_batch_size("auto", n_images, size, size, cpu) == expected
    assert choose_batch_size(7, n_images, size, size, cpu) == min(7, n_images)


@pytest.mark.parametrize(
    ("n_images", "n_again", "size", "expected"),
    [
        (500, 128, 28, 128),  # 4 and 1 batches; of 125 images they would be 4 and 2
        (1000, 128, 32, 128),
        (200, 128, 32, 67),  # 3 and 2 batches, 335 images in all; of 100 they would be 400
        (128, 128, 32, 128),
        (5, 5, 224, 5),
        (1, 1, 4096, 1),
        (10_000, 128, 224, 16),
    ],
)
def test_choose_batch_size__of_images_that_are_run_again(n_images, n_again, size, expected):
    cpu = torch.device("cpu")
    assert choose_batch_size("auto", n_images, size, size, cpu, n_again) == expected
    assert choose_batch_size(7, n_images, size, size, cpu, n_again) == min(7, n_images)


def test_find_device__names_the_device():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda")


def test_is_out_of_memory__tells_such_errors_from_others():
    assert all(is_out_of_memory(error) for error in OUT_OF_MEMORY)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for a convolution"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_bar__is_drawn_on_a_terminal_and_silent_elsewhere(monkeypatch, capsys):
    def work(shown):
        with Bar(shown) as bar:
            bar.decoded(1, 2)
            bar.measured(0, 400)
            bar.measured(300, 400)
            bar.say("a line")
        return capsys.readouterr().err

    assert work(shown=True) == "a line\n"
    assert work(shown=False) == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    drawn = work(shown=True)
    assert "measuring" in drawn
    assert "75%" in drawn
    assert "a line" in drawn
    assert work(shown=False) == ""


@pytest.mark.parametrize(("accuracy", "said"), [(0.5, "loss 1.250 accuracy 50.0%"), (None, "loss 1.250")])
def test_bar__shows_how_far_a_training_run_is(monkeypatch, capsys, accuracy, said):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with Bar(shown=True) as bar:
        bar.trained("net", phase="main", epoch=2, epochs=3, step=5, steps=8, loss=1.25, accuracy=accuracy)
    drawn = capsys.readouterr().err
    assert f"net main epoch 2/3 {said} " in drawn
    assert "62%" in drawn
