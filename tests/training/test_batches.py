import random

import numpy as np
import pytest
import torch
from PIL import Image

from layercrit.errors import TrainingError
from layercrit.probes.images import Preprocessing
from layercrit.seeds import drawing
from layercrit.training import get_method, open_training_data
from layercrit.training.batches import Batches, held_out_batches, to_device
from training_images import write_images

N_IMAGES = 26


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_training_data(write_images(tmp_path_factory.mktemp("x") / "x.npz", n_train=N_IMAGES, n_test=11))


def noisy(image):
    """Two views that depend on all three generators and on the image."""
    pixels = torch.from_numpy(np.asarray(image).copy()).int()
    noise = torch.randint(5, pixels.shape) + random.randrange(5) + np.random.randint(5)  # noqa: NPY002
    return tuple((pixels + (view + 1) * noise).clamp(0, 255).to(torch.uint8)[None] for view in range(2))


def batches(data, batch_size=4, seed=3, **more):
    return Batches(data.train, noisy, seed, batch_size, **more)


def images_of(made):
    """All first and second views, and the labels, in order."""
    views, labels = zip(*made, strict=True)
    return [torch.cat(same) for same in zip(*views, strict=True)], torch.cat(labels)


def assert_same(one, other):
    assert torch.equal(one[1], other[1]), "other labels"
    for view, (a, b) in enumerate(zip(one[0], other[0], strict=True)):
        assert torch.equal(a, b), f"view {view} differs"


# --- order ----------------------------------------------------------------------------------------------------------


def test_order__depends_on_seed_and_epoch_alone(data):
    one = batches(data)
    assert one.order(0) == batches(data, n_workers=2).order(0)
    longer = batches(data, batch_size=13).order(0)
    assert longer[:24] == one.order(0)
    others = [one.order(1), one.order(2), batches(data, seed=4).order(0), batches(data, seed=2**63).order(0)]
    assert len({tuple(order) for order in [one.order(0), *others]}) == 5
    with drawing(7):
        assert one.order(0) == batches(data).order(0)


@pytest.mark.parametrize(("batch_size", "n_steps"), [(1, 26), (4, 6), (13, 2), (26, 1)])
def test_order__every_image_at_most_once_an_epoch(data, batch_size, n_steps):
    one = batches(data, batch_size)
    assert one.n_steps == n_steps
    assert len(set(one.order(5))) == len(one.order(5)) == n_steps * batch_size


def test_order__images_left_out_change_from_epoch_to_epoch(data):
    seen = {image for epoch in range(6) for image in batches(data, batch_size=9).order(epoch)}
    assert seen == set(range(N_IMAGES))


def test_order__repeats_stand_beside_each_other(data):
    whole, repeated = batches(data, batch_size=26).order(0), batches(data, repeats=3).order(0)
    assert repeated == [image for image in whole for _ in range(3)][:24]


def test_of_epoch__repeats_are_unlike_views_of_one_image(data):
    (first, _), labels = images_of(batches(data, repeats=2).of_epoch(0))
    assert torch.equal(labels[::2], labels[1::2])
    assert all(not torch.equal(a, b) for a, b in zip(first[::2], first[1::2], strict=True))
    assert ((first[::2].int() - first[1::2].int()).abs() <= 12).all()


# --- views ----------------------------------------------------------------------------------------------------------


def test_of_epoch__gives_views_and_labels_of_the_images_in_order(data):
    one = batches(data)
    made = list(one.of_epoch(1))
    assert [views[0].shape for views, _ in made] == [(4, 1, 12, 12)] * 6
    assert all(view.dtype == torch.uint8 for views, _ in made for view in views)
    (first, second), labels = images_of(made)
    for position, image in enumerate(one.order(1)):
        assert labels[position] == data.train.labels[image]
        plain = np.asarray(data.train.image(image)).astype(int)
        noise = first[position, 0].numpy().astype(int) - plain
        assert ((noise >= 0) & (noise <= 12)).all()
        assert np.array_equal((plain + 2 * noise).clip(0, 255), second[position, 0].numpy())


@pytest.mark.parametrize("batch_size", [1, 6, 13])
def test_of_epoch__views_do_not_depend_on_the_batch_size(data, batch_size):
    views, labels = images_of(batches(data, batch_size).of_epoch(2))
    assert_same(images_of(batches(data, batch_size=24).of_epoch(2)), ([view[:24] for view in views], labels[:24]))


def test_of_epoch__views_do_not_depend_on_workers(data):
    assert_same(images_of(batches(data).of_epoch(0)), images_of(batches(data, n_workers=2).of_epoch(0)))


@pytest.mark.parametrize("first_step", [0, 1, 5, 6])
def test_of_epoch__goes_on_from_a_step(data, first_step):
    whole = list(batches(data).of_epoch(0))
    rest = list(batches(data).of_epoch(0, first_step))
    assert len(rest) == 6 - first_step
    for (views, labels), (others, other_labels) in zip(whole[first_step:], rest, strict=True):
        assert_same((views, labels), (others, other_labels))


@pytest.mark.parametrize("n_processes", [2, 4])
def test_of_epoch__shares_of_processes_interleave_to_the_whole(data, n_processes):
    shares = [list(batches(data, 8).of_epoch(0, 1, process, n_processes)) for process in range(n_processes)]
    for step, (views, labels) in enumerate(batches(data, 8).of_epoch(0, 1)):
        assert torch.equal(labels, torch.stack([share[step][1] for share in shares], 1).flatten())
        for number, view in enumerate(views):
            parts = torch.stack([share[step][0][number] for share in shares], 1)
            assert torch.equal(view, parts.flatten(0, 1))


def test_of_epoch__epochs_and_seeds_draw_other_views(data):
    views = []
    for seed, epoch in ((3, 0), (3, 1), (4, 0)):
        one = batches(data, batch_size=26, seed=seed)
        (first, _), _ = images_of(one.of_epoch(epoch))
        views.append(first[one.order(epoch).index(0)])
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_of_epoch__leaves_global_generators_as_they_were(data):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    iterator = batches(data).of_epoch(0)
    next(iterator)
    list(batches(data, n_workers=1).of_epoch(0))
    list(held_out_batches(data.test, data.inputs, 4))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()


def test_of_epoch__does_not_depend_on_global_generators(data):
    whole = images_of(batches(data).of_epoch(0))
    with drawing(11):
        assert_same(whole, images_of(batches(data).of_epoch(0)))


# --- damaged images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_workers", [0, 1])
def test_of_epoch__an_unreadable_image_is_one_clear_message(tmp_path, n_workers):
    generator = np.random.default_rng(0)
    for label in (0, 1):
        (tmp_path / str(label)).mkdir()
        for number in range(10):
            pixels = generator.integers(0, 256, (9, 8 + label, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / str(label) / f"{number}.png")
    data = open_training_data(tmp_path, input_size=(3, 8, 8))
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:60])
    whole = get_method("baseline").phases()[0].views(data.inputs)
    with pytest.raises(TrainingError) as caught:
        list(Batches(data.train, whole, 0, 4, n_workers=n_workers).of_epoch(0))
    assert str(caught.value).startswith("The image ")
    assert "cannot be read" in str(caught.value)
    assert "Traceback" not in str(caught.value)


# --- held-out images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_workers", "batch_size"), [(0, 1), (0, 4), (0, 11), (0, 100), (2, 4)])
def test_held_out_batches__every_image_once_as_it_is(data, n_workers, batch_size):
    made = list(held_out_batches(data.test, data.inputs, batch_size, n_workers=n_workers))
    (images,), labels = images_of(made)
    assert labels.tolist() == data.test.labels.tolist()
    assert np.array_equal(images[:, 0].numpy(), [np.asarray(data.test.image(i)) for i in range(11)])
    assert [len(labels) for _, labels in made] == [min(batch_size, 11 - start) for start in range(0, 11, batch_size)]


def test_held_out_batches__processes_take_turns(data):
    whole = list(held_out_batches(data.test, data.inputs, 3))
    shares = [list(held_out_batches(data.test, data.inputs, 3, process=i, n_processes=3)) for i in range(3)]
    assert [len(share) for share in shares] == [2, 1, 1]
    for number, batch in enumerate(whole):
        assert_same(batch, shares[number % 3][number // 3])
    assert list(held_out_batches(data.test, data.inputs, 11, process=1, n_processes=2)) == []


@pytest.mark.parametrize("size", [(3, 8, 8), (1, 9, 6), (3, 5, 12)])
def test_held_out_batches__centre_of_images_that_cover_the_size(tmp_path, size):
    generator = np.random.default_rng(0)
    for label in (0, 1):
        (tmp_path / str(label)).mkdir()
        for number in range(6):
            pixels = generator.integers(0, 256, (12 + number, 20 - label, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / str(label) / f"{number}.png")
    data = open_training_data(tmp_path, input_size=size)
    ((images,), _) = next(iter(held_out_batches(data.test, data.inputs, 9)))
    channels, height, width = size
    asked = Preprocessing(channels, height, width, resize=max(height, width))
    for made, position in zip(images, range(len(data.test)), strict=True):
        assert np.array_equal(made.numpy(), asked(data.test.image(position)))


def test_to_device__is_a_share_of_255_channels_last():
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 2, 8, 8)
    made = to_device(images, torch.device("cpu"))
    assert made.dtype == torch.float32
    assert torch.equal(made, images.float() / 255)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert images.flatten()[255] == 255, "the images themselves were changed"
