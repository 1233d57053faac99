import gc
import weakref

import numpy as np
import pytest
import torch

from layercrit.engine import session as session_module
from layercrit.engine.holder import ReplayHolder
from layercrit.engine.predictions import Predictions
from layercrit.engine.session import Session
from layercrit.engine.subject import Subject
from layercrit.errors import ProbeError
from layercrit.models.references import open_model
from layercrit.progress_bar import Bar
from layercrit.protocol import Protocol
from small_subjects import GROUPS, mostly_right, normalised, photographs, small_network

N_IMAGES = 10


@pytest.fixture
def network():
    return small_network()


def open_session(network, labels=None, batch_size=4, mode=None, predictions=None, **settings):
    protocol = Protocol(trials=2, dtype="float32", batch_size=batch_size, **settings)
    probe_set = photographs(N_IMAGES, labels)
    subject = Subject(protocol, open_model(network, input_size=(3, 12, 12)), None)
    return Session(
        protocol, subject, probe_set, ["cosine", "l1"], labels is not None, Bar(shown=False), mode=mode,
        predictions=predictions,
    )  # fmt: skip


def gathered(batches):
    batches = list(batches)
    return {name: np.concatenate([b.per_image[name] for b in batches], axis=1) for name in batches[0].per_image}


def test_predictions__are_those_of_the_plain_network(network):
    labels = mostly_right(network, N_IMAGES)
    session = open_session(network, labels)

    with torch.no_grad():
        logits = network(normalised(session.probe_set))
    p = logits.softmax(dim=1).double()
    cosines = torch.nn.functional.cosine_similarity(p[:, None], p[None], dim=2)
    others = ~torch.eye(N_IMAGES, dtype=torch.bool)
    target = torch.tensor(session.probe_set.labels)
    found = session.predictions
    assert found.n_classes == 6
    assert found.top1_accuracy == pytest.approx((logits.argmax(dim=1) == target).float().mean().item())
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-5)
    assert found.chance == pytest.approx(cosines[others].mean().item(), rel=1e-5)
    matched = (logits.double() / found.temperature).softmax(dim=1)
    entropy = -(matched * matched.log()).sum(dim=1).mean().item()
    assert entropy == pytest.approx(found.matched_entropy, rel=1e-3)
    assert found.matched_entropy == pytest.approx(0.1 * np.log(6))


def test_predictions__without_labels_have_no_accuracy(network):
    found = open_session(network).predictions

    assert found.top1_accuracy is None
    assert found.loss is None


def test_predictions__of_an_earlier_session_are_not_asked_for_again(network, monkeypatch):
    first = open_session(network)
    monkeypatch.setattr("layercrit.engine.predictions._logits", lambda *_, **__: pytest.fail("the network was asked"))

    second = open_session(network, mode="float32", predictions=first.predictions)

    assert second.predictions is first.predictions
    found, expected = (gathered(session.trial(0).batches()) for session in (second, first))
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_predictions__without_a_temperature_match_nothing(network):
    known = Predictions(6, None, 0.1, 0.5, None, None)

    found = gathered(open_session(network, mode="float32", predictions=known).trial(0).batches())

    assert np.isnan(found["cosine_matched"]).all()
    assert np.isfinite(found["cosine"]).all()


def test_session__labels_that_cannot_be_are_an_error(network):
    with pytest.raises(ProbeError, match="is not in 0 to 5"):
        open_session(network, np.full(N_IMAGES, 6))


def test_session__a_known_mode_is_not_chosen_again(network, monkeypatch):
    monkeypatch.setattr(ReplayHolder, "_fastest", lambda *_: pytest.fail("the mode is known"))
    protocol = Protocol(dtype="auto", batch_size=4)
    subject = Subject(protocol, open_model(network, input_size=(3, 12, 12)), None)

    session = Session(protocol, subject, photographs(4), ["cosine"], False, Bar(shown=False), mode="bfloat16")

    assert session.holder.replay.mode == "bfloat16"


def test_batches__cover_all_images_once(network):
    batches = list(open_session(network).trial(1).batches())

    assert [(batch.start, batch.stop) for batch in batches] == [(0, 4), (4, 8), (8, 10)]
    for batch in batches:
        assert {values.shape for values in batch.per_image.values()} == {(9, batch.stop - batch.start)}
        assert {values.dtype for values in batch.per_image.values()} == {np.dtype("float32")}
        assert list(batch.per_image) == ["cosine", "l1", "cosine_matched"]


@pytest.mark.parametrize("start", [4, 8])
def test_batches__from_the_middle_are_the_rest_bit_for_bit(network, start):
    session = open_session(network)
    whole = gathered(session.trial(0).batches())

    rest = gathered(open_session(network).trial(0).batches(start))

    for name, values in whole.items():
        np.testing.assert_array_equal(rest[name], values[:, start:])


def test_batches__from_any_image_are_the_rest_up_to_rounding(network):
    whole = gathered(open_session(network).trial(0).batches())

    rest = gathered(open_session(network).trial(0).batches(3))

    for name, values in whole.items():
        np.testing.assert_allclose(rest[name], values[:, 3:], rtol=0, atol=1e-5, err_msg=name)


def test_batches__cells_are_measured_at_once_as_one_by_one(network, monkeypatch):
    session = open_session(network, mostly_right(network, N_IMAGES))
    together = gathered(session.trial(0).batches())
    for at_once in (2, 100):
        monkeypatch.setattr(session, "_n_at_once", lambda before, at_once=at_once: at_once)
        apart = gathered(session.trial(0).batches())
        assert list(apart) == list(together)
        for name, values in together.items():
            np.testing.assert_allclose(apart[name], values, rtol=1e-6, atol=1e-7)


def test_batches__from_the_end_are_none(network):
    assert list(open_session(network).trial(0).batches(N_IMAGES)) == []


@pytest.mark.parametrize("chosen", [["stem"], ["layer1.1.conv2", "fc"], ["layer2.0.shortcut"]])
def test_trial__of_some_layers_is_that_part_of_the_whole_one_bit_for_bit(network, chosen):
    session = open_session(network)
    whole = session.trial(0)
    everything = gathered(whole.batches())
    places = [GROUPS["layer"].index(name) for name in chosen]

    some = session.trial(0, [session.subject.layers[place] for place in places])

    assert some.seeds == whole.seeds
    assert some.delta_norm == [whole.delta_norm[place] for place in places]
    for name, values in gathered(some.batches()).items():
        np.testing.assert_array_equal(values, everything[name][places])


def test_trial__says_what_became_of_its_layers(network):
    torch.nn.init.zeros_(network.fc.weight)
    torch.nn.init.zeros_(network.fc.bias)
    torch.nn.init.zeros_(network.layer2[0].conv2.weight)
    session = open_session(network, reset="zero")
    layers = {layer.name: layer for layer in session.subject.layers}
    trial = session.trial(0, [layers["stem"], layers["layer1.0.conv1"], layers["fc"]])

    cosine = np.zeros((3, N_IMAGES), np.float32)
    cosine[1, 3] = np.nan

    assert trial.status({"cosine": cosine, "l1": 0 * cosine}) == ["ok", "not_finite", "unchanged"]
    assert trial.status({"cosine": np.zeros_like(cosine), "l1": cosine}) == ["ok", "not_finite", "unchanged"]
    assert trial.delta_norm[2] == 0
    assert trial.delta_norm[0] == pytest.approx(
        sum((p.double() ** 2).sum().item() for p in network.stem.parameters()) ** 0.5
    )


def test_means__are_over_images_and_nothing_where_a_cell_is_not_ok(network):
    session = open_session(network, mostly_right(network, N_IMAGES))
    values = gathered(session.trial(0).batches())

    means = session.means(values, 2, "ok")

    assert set(means) == {*values, "recovered_accuracy"}
    for name in values:
        assert means[name] == pytest.approx(values[name][2].astype(np.float64).mean(), rel=1e-12), name
    assert means["recovered_accuracy"] == means["top1_accuracy"] / session.predictions.top1_accuracy
    assert all(np.isnan(value) for value in session.means(values, 2, "not_finite").values())


def test_run_batch__goes_on_with_half_the_size_when_memory_runs_out(network, monkeypatch):
    expected = gathered(open_session(network).trial(0).batches())
    session = open_session(network)
    trial = session.trial(0)
    batches = trial.batches()
    first = next(batches)
    run_batch, sizes = Session._run_batch, []

    def short_of_memory(self, replay, draws, start):
        sizes.append(self.holder.batch_size)
        if self.holder.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run_batch(self, replay, draws, start)

    monkeypatch.setattr(session_module.Session, "_run_batch", short_of_memory)
    rest = list(batches)

    assert [(batch.start, batch.stop) for batch in (first, *rest)] == [(0, 4), (4, 6), (6, 8), (8, 10)]
    assert sizes == [4, 2, 2, 2]
    assert session.notes[-1] == "out of memory: batch size halved to 2"
    found = gathered([first, *rest])
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5, err_msg=name)


def test_trial__frees_what_it_drew_when_it_is_over(network):
    import gc
    import weakref

    trial = open_session(network).trial(0)
    list(trial.batches())
    drawn = [
        weakref.ref(value)
        for changes in trial._changes.values()
        for change in changes
        for value in change.values.values()
    ]
    assert drawn

    trial.forget()
    gc.collect()

    assert not [value for value in drawn if value() is not None]


def test_predictions__that_hardly_differ_between_images_are_noted(network):
    assert not any("hardly differ" in note for note in open_session(mostly_sure(network)).notes)
    with torch.no_grad():
        network.fc.weight.zero_()
    assert any("hardly differ from image to image" in note for note in open_session(network).notes)


def mostly_sure(network):
    """The network with larger logits, so that its predictions differ from image to image."""
    pixels = normalised(photographs(N_IMAGES))
    with torch.no_grad():
        logits = network(pixels)
        scale = 30 / logits.std(dim=0)
        network.fc.weight.mul_(scale[:, None])
        network.fc.bias.copy_((network.fc.bias - logits.mean(dim=0)) * scale)
    return network


def test_batches__the_replay_is_freed_before_another_one_is_opened(network, monkeypatch):
    """Else halving the batch would free nothing."""
    session = open_session(network)
    draws = session.trial(0)
    freed, of_first, opened = [], [], session.holder._open

    def opening():
        gc.disable()
        freed.extend(replay() is None for replay in of_first)
        return opened()

    compared = session._compare_cells

    def short_of_memory(*given):
        monkeypatch.setattr(session, "_compare_cells", compared)
        of_first.append(weakref.ref(session.holder.replay))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session, "_compare_cells", short_of_memory)
    monkeypatch.setattr(session.holder, "_open", opening)
    try:
        found = gathered(draws.batches())
    finally:
        gc.enable()
    assert freed == [True]
    assert any("batch size halved" in note for note in session.notes)
    assert np.isfinite(found["cosine"]).all()
