"""A prediction depends on its image alone, or the network is refused before anything is measured."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layercrit.errors import ModelError
from layercrit.measuring import measure
from layercrit.study.store import Store
from running_jobs import Inline, run, write_small
from small_subjects import QUIET, assert_same_cells, fresh, photographs, small_network


class Around(nn.Module):
    """The small network, with something before or after it."""

    def __init__(self, network=None):
        super().__init__()
        self.network = small_network() if network is None else network

    def forward(self, images):
        return self.network(images)


# a network that writes to its input


class Shifted(Around):
    """Normalises its input, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place

    def forward(self, images):
        return self.network(images.sub_(0.1).mul_(1.3) if self.in_place else (images - 0.1) * 1.3)


class Clipped(Around):
    """A child clips the input, in place or not; its call is recorded."""

    def __init__(self, in_place):
        super().__init__(nn.Sequential(nn.Hardtanh(0.2, 0.6, inplace=in_place), small_network()))


class Recorded(Shifted):
    """Is not exported, for its control flow depends on the images."""

    def forward(self, images):
        if not images.mean().isfinite():
            raise ValueError
        return super().forward(images)


@pytest.mark.parametrize("mode", ["reference", "float32"])
@pytest.mark.parametrize("kind", [Shifted, Clipped, Recorded])
def test_measure__every_pass_has_its_own_input(kind, mode):
    probe_set = photographs(10)
    expected, found = (
        measure(kind(in_place).eval(), probe_set, dtype=mode, batch_size=4, **QUIET) for in_place in (False, True)
    )
    assert_same_cells(found, expected, atol=1e-5)
    assert (found.cells["cosine"] > 0.01).sum() > len(found.cells) / 2


# predictions that depend on more


class Dropping(Around):
    """Dropout by the function, which in evaluation mode does not know of it."""

    def forward(self, images):
        return self.network(F.dropout(images, 0.3, training=True))


class AlwaysDropout(nn.Dropout):
    def forward(self, values):
        return F.dropout(values, self.p, training=True)


class DroppingModule(Around):
    """Dropout that is kept for evaluation, before the last layer."""

    def __init__(self):
        super().__init__()
        self.network.fc = nn.Sequential(AlwaysDropout(0.2), self.network.fc)


class Remembering(Around):
    """What it was shown before moves what it predicts."""

    def __init__(self):
        super().__init__()
        self.mean = 0.0

    def forward(self, images):
        self.mean = 0.9 * self.mean + 0.1 * float(images.mean())
        return self.network(images - self.mean)


class BatchStatistics(Around):
    """Normalises with the statistics of the batch, since there are no running ones."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), small_network()))


class Centred(Around):
    """Subtracts the mean over images from the logits."""

    def forward(self, images):
        logits = self.network(images)
        return logits - logits.mean(dim=0)


class Shared(Around):
    """Divides by the number of images, whichever they are."""

    def forward(self, images):
        return self.network(images) / len(images)


class Scale(nn.Module):
    def forward(self, images, factor):
        return images * factor


class Scaled(Centred):
    """Gives a module a single number beside the images."""

    def __init__(self):
        super().__init__()
        self.scale = Scale()

    def forward(self, images):
        return super().forward(self.scale(images, torch.tensor(2.0)))


class Turn(nn.Module):
    def forward(self, values):
        return values.T


class Turned(Around):
    """The images are the second dimension of what a module returns."""

    def __init__(self):
        super().__init__()
        self.turn = Turn()

    def forward(self, images):
        return self.turn(self.network(images)).T / len(images)


REFUSED = {
    Dropping: "the forward of Dropping itself. It draws random numbers",
    DroppingModule: "'network.fc.0' (AlwaysDropout). It draws random numbers",
    Remembering: "the forward of Remembering itself. It draws random numbers in evaluation mode, or keeps",
    BatchStatistics: "'network.0' (BatchNorm2d). It has no running statistics",
    Centred: "the forward of Centred itself. It computes something over all images",
    Scaled: "the forward of Scaled itself. It computes something over all images",
    Turned: "It computes something over all images",
    Shared: "the forward of Shared itself. It computes something over all images",
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("n_images", [2, 10])
def test_measure__predictions_that_depend_on_more_than_the_image_are_refused(kind, n_images):
    finished = []
    with pytest.raises(ModelError) as caught:
        measure(fresh(kind, 0).eval(), photographs(n_images), on_trial=finished.append, **QUIET)
    assert REFUSED[kind] in str(caught.value)
    assert not finished


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(3), nn.GroupNorm(3, 3), nn.BatchNorm2d(3)], ids=["i", "g", "b"])
@pytest.mark.parametrize("n_images", [1, 3])
def test_measure__normalisation_of_each_image_by_itself_is_not_refused(norm, n_images):
    network = Around(nn.Sequential(norm, small_network())).eval()
    assert (measure(network, photographs(n_images), **QUIET).cells["status"] == "ok").all()


class OneAtATime(Around):
    def forward(self, images):
        return torch.cat([self.network(image[None]) for image in images])


def test_measure__the_way_out_for_batch_statistics_does_not_depend_on_the_batch_size():
    network, probe_set = OneAtATime(BatchStatistics()).eval(), photographs(6)
    all_at_once, in_pairs = (measure(network, probe_set, batch_size=size, **QUIET) for size in (6, 2))
    assert_same_cells(in_pairs, all_at_once, atol=1e-5)


def test_run_study__a_model_whose_predictions_depend_on_its_batch_fails_alone(tmp_path):
    path = write_small(
        tmp_path / "study",
        models=[
            {"name": "m0", "reference": "file:m0.safetensors?arch=py:running_jobs:small_network"},
            {"name": "mixed", "reference": "py:running_jobs:batch_statistics?pretrained=false"},
        ],
    )
    report = run(path, tmp_path / "out", Inline())
    assert {failure.model for failure in report.failures} == {"mixed"}
    assert all(failure.error.startswith("ModelError: ") for failure in report.failures)
    with Store(tmp_path / "out") as store:
        assert set(store.cells()["model"]) == {"m0"}
