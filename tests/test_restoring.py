"""What a measurement leaves behind: nothing."""

import contextlib
import multiprocessing
import os
import random
import threading
from functools import lru_cache
from itertools import groupby

import numpy as np
import pytest
import torch
from torch import nn

from layercrit.errors import LayerError, ModelError, ProbeError, ProtocolError
from layercrit.measuring import list_layers, measure
from layercrit.models.references import open_model
from layercrit.resets import RESETS, reset
from layercrit.restoring import undisturbed
from small_subjects import (
    PIXELS,
    QUIET,
    SIZE,
    assert_same_cells,
    fresh,
    photographs,
    registered,
    small_network,
    two_layers,
)


@pytest.fixture
def own_reset():
    with registered(RESETS):
        yield reset


class Troubled(nn.Module):
    """Raises at one call of its forward; may write to its own parameters and buffers, which keeps it off the graph."""

    def __init__(self, call=None, error=None, writes=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.call, self.error, self.writes = call, error, writes
        self.seen = []  # a list, for the exporter takes back what a forward assigns

    def forward(self, images):
        if self.writes:
            self.calls += 1
            self.head.weight.data.clamp_(-0.01, 0.01)
        self.seen.append(len(images))
        if len(self.seen) == self.call:
            raise self.error
        return self.head(self.body(images).mean(dim=(2, 3)))


def troubled(**trouble):
    network = Troubled(**trouble).eval()
    network.body[0].weight.requires_grad_(False)
    network.body.register_forward_hook(lambda module, inputs, output: None)
    network.head.register_forward_pre_hook(lambda module, inputs: None)
    return network


def state_of(network):
    """Everything that a measurement must leave as it was, tensors as bytes."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        "values": {name: (t.detach().numpy().tobytes(), id(t)) for name, t in tensors.items()},
        "requires_grad": {name: p.requires_grad for name, p in network.named_parameters()},
        "training": [m.training for m in network.modules()],
        "hooks": [[dict(h) for n, h in sorted(vars(m).items()) if "hooks" in n] for m in network.modules()],
        "attributes": [sorted(vars(m)) for m in network.modules()],
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "python": random.getstate(),
    }


def interrupt(_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("writes", [False, True], ids=["pure", "writing"])
@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, None),
        ({"dtype": "reference", "reset": "permute"}, None),
        ({"layers": "nothing*"}, LayerError),
        ({"reset": "rewind"}, ProtocolError),
        ({"images": "nowhere"}, ProbeError),
        ({"on_trial": interrupt}, KeyboardInterrupt),
    ],
    ids=["finished", "reference", "layers", "donor", "images", "on_trial"],
)
def test_measure__leaves_everything_as_it_was(writes, settings, error):
    network = troubled(writes=writes)
    before = state_of(network)
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        measure(network, **{"images": photographs(4), "types": "all", "batch_size": 2, **QUIET, **settings})
    assert_same_state(network, before)


def assert_same_state(network, before):
    after = state_of(network)
    for what, value in before.items():
        assert after[what] == value, f"{what} changed"


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("writes", [False, True], ids=["pure", "writing"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError], ids=["Ctrl-C", "exception"])
def test_measure__an_exception_in_the_forward_leaves_everything_as_it_was(error, writes, call):
    """Whether the pass is watched, exported, recorded or replayed when it is cut short."""
    network = troubled(call=call, error=error("the network's own"), writes=writes)
    before = state_of(network)
    raised = found = None
    try:
        found = measure(network, photographs(4), **QUIET)
    except (error, ModelError) as caught:
        raised = caught
    assert_same_state(network, before)
    if raised is not None:
        assert "the network's own" in str(raised)
        assert call <= 5 or not isinstance(raised, ModelError), "only the first passes tell whether images fit"
    elif len(network.seen) >= call:
        notes = found.record["notes"]
        assert any("cannot be exported (ValueError: the network's own)" in note for note in notes)


def test_measure__an_exception_in_the_midst_of_a_trial_leaves_everything_as_it_was(own_reset):
    @own_reset("failing", random=True)
    def failing(draw):
        if draw.layer.name == "head":
            raise ZeroDivisionError
        return {name: value + 1 for name, value in draw.trained.items()}

    network = troubled()
    before = state_of(network)
    with pytest.raises(ZeroDivisionError):
        measure(network, photographs(4), reset="failing", **QUIET)
    assert_same_state(network, before)


def test_measure__leaves_the_global_random_states_to_others(own_reset):
    """A reset of the user's may draw from them; afterwards they are as before."""

    @own_reset("global", random=True)
    def drawing(draw):
        noise = random.random() + np.random.rand()  # noqa: NPY002
        return {name: torch.rand_like(value) + noise for name, value in draw.trained.items()}

    network = two_layers()
    before = state_of(network)
    measure(network, PIXELS, reset="global", **QUIET)
    assert_same_state(network, before)


@pytest.mark.parametrize("opened", [False, True], ids=["a module", "a Model"])
def test_measure__a_network_in_training_mode_is_measured_in_evaluation_mode(opened):
    network, probe_set = small_network(), photographs(5)
    expected = measure(network, probe_set, **QUIET)
    model = open_model(network, input_size=(3, SIZE, SIZE))
    network.train()
    before = state_of(network)
    found = measure(model if opened else network, probe_set, **QUIET)
    assert_same_state(network, before)
    assert_same_cells(found, expected, atol=0)


def test_measure__weights_changed_since_are_seen():
    """Nothing of a measurement is kept for the next one."""
    network, probe_set = small_network(), photographs(5)
    first = measure(network, probe_set, **QUIET)
    with torch.no_grad():
        network.fc.weight.mul_(0.1)
    second = measure(network, probe_set, **QUIET)
    assert (second.cells["cosine"] < first.cells["cosine"]).all()
    assert first.record["model"]["sha256"] != second.record["model"]["sha256"]


# the settings of the process


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


BACKENDS = () if not hasattr(torch.backends, "fp32_precision") else (  # from torch 2.9 on
    *(torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul),
    *(torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn, torch.backends.mkldnn.matmul),
    *(torch.backends, torch.backends.cudnn, torch.backends.mkldnn),
)  # fmt: skip


BY_DEFAULT = [backend.fp32_precision for backend in BACKENDS]


def products_now():
    """How float32 is multiplied, by torch's newer and its older interface."""
    now = [backend.fp32_precision for backend in BACKENDS]
    for read in (lambda: torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision):
        try:
            now.append(read())
        except RuntimeError:
            now.append("the interfaces disagree")
    return tuple(now)


@contextlib.contextmanager
def products(change):
    """Multiply float32 otherwise, and then as torch does by default."""
    change()
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")
        for backend, precision in zip(BACKENDS, BY_DEFAULT, strict=True):
            backend.fp32_precision = precision


def bfloat16_on_the_cpu():
    for backend in BACKENDS[3:6]:
        backend.fp32_precision = "bf16"


def both_interfaces():
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.conv.fp32_precision = "ieee"


NEWER_INTERFACE = {
    "bfloat16 products": lambda: products(bfloat16_on_the_cpu),
    "both interfaces": lambda: products(both_interfaces),
}
SETTINGS = {
    **(NEWER_INTERFACE if BACKENDS else {}),
    "medium products": lambda: products(lambda: torch.set_float32_matmul_precision("medium")),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "within meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
}


def settings_now():
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        *products_now(),
    )


@pytest.mark.parametrize("mode", ["float32", "reference"])
@pytest.mark.parametrize("name", SETTINGS)
def test_measure__is_not_disturbed_by_the_callers_settings(name, mode):
    network, probe_set = small_network(), photographs(5)
    quiet = QUIET | {"dtype": mode}
    expected = measure(network, probe_set, **quiet)
    assert (expected.cells["cosine"] > 0.01).any()
    with SETTINGS[name]():
        before = settings_now()
        found = measure(network, probe_set, **quiet)
        assert settings_now() == before
    assert_same_cells(found, expected, atol=0)
    assert found.record["notes"] == expected.record["notes"]


@pytest.mark.parametrize("name", [name for name in SETTINGS if name in ("medium products", *NEWER_INTERFACE)])
def test_measure__float32_is_multiplied_as_float32(name):
    seen = set()

    class Watching(nn.Sequential):
        def forward(self, images):
            seen.add(products_now())
            return super().forward(images)

    with SETTINGS[name]():
        measure(Watching(nn.Flatten(), nn.Linear(12, 3)), PIXELS, **QUIET)
    assert seen == {(*["ieee"] * len(BACKENDS), False, "highest")}


def test_measure__several_settings_are_as_they_were_after_an_error():
    network = two_layers()
    with contextlib.ExitStack() as stack:
        for enter in SETTINGS.values():
            stack.enter_context(enter())
        before = settings_now()
        with pytest.raises(LayerError):
            measure(network, PIXELS, layers="nothing*", **QUIET)
        assert settings_now() == before


@pytest.mark.parametrize("name", SETTINGS)
def test_open_model__is_not_disturbed_by_the_callers_settings(name):
    reference = "timm:test_resnet?pretrained=false&num_classes=5&seed=3"
    expected = open_model(reference).network.state_dict()
    with SETTINGS[name]():
        found = open_model(reference).network.state_dict()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())


def test_measure__a_network_made_in_inference_mode_is_measured_outside_it():
    expected = measure(small_network(), photographs(5), **QUIET)
    with torch.inference_mode():
        network = small_network()
    assert_same_cells(measure(network, photographs(5), **QUIET), expected, atol=1e-5)


class Busy(Troubled):
    """Notes which thread runs it; not to be exported, so that resets are written to its own weights."""

    def __init__(self):
        super().__init__(writes=True)
        self.threads = []

    def forward(self, images):
        self.threads.append(threading.get_ident())
        return super().forward(images)


class Tables(nn.Module):
    """Keeps tensors for each shape of its input, in a dictionary, within a tuple in a list, and in a cache outside."""

    outside = None

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (SIZE - 2) ** 2, 3))
        self.tables, self.listed = {}, []

    def forward(self, images):
        n = len(images)
        if n not in self.tables:
            self.tables[n] = images.new_ones(n, 1)
            self.listed.append(("of", images.new_ones(n, 1)))
        logits = self.body(images) * self.tables[n] * self.listed[list(self.tables).index(n)][1]
        return logits if self.outside is None else logits * self.outside(n)


def test_measure__a_network_that_keeps_tensors_by_shape_is_measured_and_runs_afterwards():
    networks = [fresh(Tables, 0).eval() for _ in range(2)]
    for n in range(1, 9):
        networks[1](torch.rand(n, 3, SIZE, SIZE))
    found, expected = (measure(network, photographs(8), **QUIET) for network in networks)
    assert found.record["backend"] == "exported graph" or torch.__version__ < "2.6"  # whose exporter gives up
    assert_same_cells(found, expected, atol=1e-5)
    kept = [*networks[0].tables.values(), *(table for _, table in networks[0].listed)]
    assert {type(table) for table in kept} <= {torch.Tensor}, "tensors without values are left"
    assert networks[0](torch.rand(8, 3, SIZE, SIZE)).isfinite().all()


def test_measure__a_network_whose_tables_outside_it_the_exporter_filled_is_told_what_to_do():
    network = Tables().eval()
    network.outside = lru_cache(lambda n: torch.ones(n, 1))
    told = r"cannot be run on 8 images, .*lru_cache.* in a new process run it once on 8 images"
    with pytest.raises(ModelError, match=told):
        measure(network, photographs(8), **QUIET)
    network.outside.cache_clear()
    with torch.no_grad():
        network(torch.rand(8, 3, SIZE, SIZE))
    measure(network, photographs(8), **QUIET)


def test_measure__a_parameter_of_indices():
    network = small_network()
    network.order = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)
    network.register_forward_pre_hook(lambda module, given: given[0][:, module.order])
    assert set(measure(network.eval(), photographs(4), **QUIET).to_pandas()["status"]) == {"ok"}


def test_measure__a_network_that_cannot_be_copied_needs_another_donor():
    network = small_network().eval()
    network.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"cannot be copied \(TypeError: .*_thread.lock.*py:PACKAGE.*donor=.*zero"):
        measure(network, photographs(4), **QUIET)
    measure(network, photographs(4), reset="zero", **QUIET)


def test_list_layers__of_a_network_of_another_size_leaves_it_as_it_was():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).eval()
    with pytest.raises(ModelError, match=r"cannot run on one image of 3 channels, 224 x 224 pixels .*input_size"):
        list_layers(network)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_undisturbed__a_process_forked_while_a_thread_measures_does_not_wait_for_it():
    inside, forked = threading.Event(), threading.Event()

    def measuring():
        with undisturbed():
            inside.set()
            forked.wait()

    thread = threading.Thread(target=measuring)
    thread.start()
    inside.wait()
    child = multiprocessing.get_context("fork").Process(target=enter_undisturbed)
    child.start()
    forked.set()
    thread.join()
    child.join(20)
    code = child.exitcode
    child.kill()
    assert code == 0, "it waits for a thread that it does not have"


def enter_undisturbed():
    with undisturbed():
        pass


def test_measure__of_two_threads_on_one_network_one_waits():
    network, probe_set = fresh(Busy, 0).eval(), photographs(4)
    expected = [measure(network, probe_set, seed=seed, **QUIET) for seed in (0, 1)]
    assert not np.array_equal(expected[0].cells["cosine"], expected[1].cells["cosine"])
    before = state_of(network)
    network.threads.clear()
    found, together = {}, threading.Barrier(2)

    def work(seed):
        together.wait()
        found[seed] = measure(network, probe_set, seed=seed, **QUIET)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(groupby(network.threads))) == 2, "the two took turns within their measurements"
    for seed in (0, 1):
        assert_same_cells(found[seed], expected[seed], atol=0)
    assert_same_state(network, before)
