"""What is particular to GPUs: fused operators, CUDA graphs, and that every tensor is on the device.

Most of it is tested on the CPU, with stand-ins for what a GPU does; the tests marked so need one.
"""

import contextlib
import os
import subprocess
import sys
import types

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from layercrit.distances import label_scores, measure_distances
from layercrit.engine import cublas, cuda_graphs, cudnn, graph, layer_norms
from layercrit.engine.cuda_graphs import SweepCaptures
from layercrit.engine.exports import graph_of
from layercrit.engine.graph import speed_up
from layercrit.engine.graph_replay import GraphReplay
from layercrit.engine.replay import PlainReplay
from layercrit.layers import find_layers, select_layers
from layercrit.measuring import measure
from layercrit.probes.images import Preprocessing
from layercrit.probes.probe_set import ProbeSet
from layercrit.seeds import drawing

CUDA = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
ARCHITECTURES = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"]


def opened(arch, n_images=4):
    """Return a network that tells images apart, images, its layers, and new values for them."""
    with drawing(0):
        network = timm.create_model(arch, num_classes=5).eval()
        donor = dict(timm.create_model(arch, num_classes=5).named_parameters())
        size = network.default_cfg["input_size"][-1]
        images = torch.randn(n_images, 3, size, size)
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):  # statistics that matter when they are folded
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 2)
                    module.bias.normal_(0, 0.1)
                    module.weight.uniform_(0.5, 1.5)
            for name, parameter in network.named_parameters():
                if name.endswith("gamma"):  # with which ConvNeXt's blocks would do next to nothing
                    parameter.fill_(0.5)
            network.get_classifier().weight.mul_(30)
    layers = select_layers(find_layers(network, images))
    return network, images, layers, {layer.name: {n: donor[n].detach() for n in layer.parameters} for layer in layers}


def sweep(replay, images, values, run=None):
    prepared = {layer.name: replay.prepare(layer, values[layer.name]) for layer in replay.layers}
    return dict((run or replay.sweep)(images, prepared))


@pytest.fixture
def spelled_out(monkeypatch):
    """The fused operators, spelled out."""

    def linear(x, weight, bias, activation):
        y = nn.functional.linear(x, weight, bias)
        return nn.functional.gelu(y, approximate="tanh") if activation == "gelu" else y.relu()

    def norm(x, added, weight, bias, eps):
        return nn.functional.layer_norm(x if added is None else x + added, x.shape[-1:], weight, bias, eps)

    for module, name in ((cudnn, "convolutions_work"), (cublas, "linears_work"), (graph, "norms_work")):
        monkeypatch.setattr(module, name, lambda dtype, device: True)
    monkeypatch.setattr(cudnn, "fused_convolution", lambda *conv: torch.conv2d(*conv).relu())
    monkeypatch.setattr(cudnn, "fused_residual", lambda *conv: (torch.conv2d(*conv[:7]) + conv[7]).relu())
    monkeypatch.setattr(cublas, "fused_linear", linear)
    monkeypatch.setattr(layer_norms, "normalised", norm)


def targets(arch, dtype):
    """Return what the nodes of a network call that was made fast for GPUs."""
    network, images, *_ = opened(arch)
    return [node.target for node in speed_up(graph_of(network, images)[0], dtype, CUDA).graph.nodes]


# --- fused operators ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("spelled_out")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fused_operators__are_right_for_trained_and_for_drawn_weights(arch):
    network, images, layers, values = opened(arch)
    fast = GraphReplay(speed_up(graph_of(network, images)[0], torch.float32, CUDA), layers, "float32")
    expected = dict(PlainReplay(network, layers).sweep(images, values))
    found = sweep(fast, images, values, fast._run)
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, rtol=1e-4, atol=1e-4)
    changed = [(logits - expected[None]).abs().max() for name, logits in expected.items() if name is not None]
    assert min(changed) > 1e-2


@pytest.mark.usefixtures("spelled_out")
def test_fused_convolutions__leave_no_bias_and_no_relu_alone():
    network, images, *_ = opened("resnet18")
    fast = speed_up(graph_of(network, images)[0], torch.float32, CUDA)
    called = [node.target for node in fast.graph.nodes]
    assert called.count(cudnn.fused_convolution) == 1 + 8
    assert called.count(cudnn.fused_residual) == 8
    assert torch.ops.aten.relu.default not in called
    alone = [node for node in fast.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert len(alone) == 3, "the shortcuts of the stages"
    assert all(node.args[2] is None for node in alone)


@pytest.mark.usefixtures("spelled_out")
def test_fused_convolutions__a_shortcut_that_is_read_again_keeps_its_bias():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            shortcut = self.a(x)
            return ((self.b(x) + shortcut).relu() + shortcut).mean(dim=(2, 3))

    with drawing(0):
        network, images = Network().eval(), torch.randn(2, 3, 8, 8)
    fast = speed_up(graph_of(network, images)[0], torch.float32, CUDA)
    assert cudnn.fused_residual in [node.target for node in fast.graph.nodes]
    torch.testing.assert_close(GraphReplay(fast, [], "float32").logits(images), network(images).detach())


def test_convolutions_work__says_no_where_they_are_missing():
    assert not cudnn.convolutions_work(torch.float32, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_linears_and_norms_work__say_no_where_there_is_no_gpu():
    assert not cublas.linears_work(torch.bfloat16, CUDA)
    assert not layer_norms.norms_work(torch.bfloat16, CUDA)


@pytest.mark.usefixtures("spelled_out")
def test_fused_linears__replace_the_exact_gelu_where_values_are_rounded_anyhow():
    rough, exact = targets("test_vit", torch.bfloat16), targets("test_vit", torch.float32)
    gelu = torch.ops.aten.gelu.default
    assert exact.count(gelu) == rough.count(cublas.fused_linear) > 0
    assert rough.count(gelu) == exact.count(cublas.fused_linear) == 0


@pytest.mark.usefixtures("spelled_out")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_linears__know_the_approximate_gelu_and_relu(dtype):
    with drawing(0):
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(12, 8), nn.GELU("tanh"), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False),
            nn.ReLU(), nn.Linear(8, 3),
        ).eval()  # fmt: skip
        images = torch.randn(5, 3, 2, 2)
    fast = speed_up(graph_of(network, images)[0], dtype, CUDA)
    called = [node.target for node in fast.graph.nodes]
    assert called.count(cublas.fused_linear) == 2, "a bias is what the operator begins with"
    tolerance = 1e-6 if dtype is torch.float32 else 0.02
    found = GraphReplay(fast, [], str(dtype).removeprefix("torch.")).logits(images)
    torch.testing.assert_close(found, network(images).detach(), atol=tolerance, rtol=0)


@pytest.mark.usefixtures("spelled_out")
def test_layer_norms__add_the_biases_of_convolutions_before_them():
    network, images, *_ = opened("test_convnext")
    fast = speed_up(graph_of(network, images)[0], torch.float32, CUDA)
    norms = [node for node in fast.graph.nodes if node.target is layer_norms.normalised]
    convolutions = {node: node.args[2] for node in fast.graph.nodes if node.target is torch.ops.aten.conv2d.default}
    assert torch.ops.aten.layer_norm.default not in [node.target for node in fast.graph.nodes]
    before = [norm.args[0].args[0] for norm in norms if norm.args[1] is not None]
    assert [convolutions.pop(conv) for conv in before] == [None] * len(before)
    assert len(before) > 4
    assert None not in convolutions.values()


@pytest.mark.usefixtures("spelled_out")
@pytest.mark.parametrize("what_is_read_again", ["the convolution", "what is permuted"])
def test_layer_norms__leave_the_bias_of_a_convolution_that_is_read_again(what_is_read_again):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.LayerNorm(4, elementwise_affine=False)

        def forward(self, x):
            x = self.conv(x)
            permuted = x.permute(0, 2, 3, 1)
            again = permuted if what_is_read_again == "what is permuted" else x.permute(0, 2, 3, 1)
            return (self.norm(permuted) + again).mean(dim=(1, 2))

    with drawing(0):
        network, images = Network().eval(), torch.randn(2, 3, 8, 8)
    fast = speed_up(graph_of(network, images)[0], torch.float32, CUDA)
    (norm,) = (node for node in fast.graph.nodes if node.target is layer_norms.normalised)
    assert norm.args[1:4] == (None, None, None)
    torch.testing.assert_close(GraphReplay(fast, [], "float32").logits(images), network(images).detach())


def test_layer_norm_kernel__in_the_interpreter():
    """Triton's interpreter runs the kernel on a CPU, but rounds to bfloat16 in a way of its own."""
    pytest.importorskip("triton", reason="Triton is not there: torch brings it where there can be GPUs")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    checked = subprocess.run([sys.executable, "-c", CHECK_OF_NORMS, "cpu", "float32"], env=environment, check=False,
                             capture_output=True, text=True)  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.split() == ["5", "widths"]


CHECK_OF_NORMS = """
import sys
import torch
from layercrit.engine.layer_norm_kernel import layer_norm

device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
generator = torch.Generator().manual_seed(0)
shapes = (3, 7, 24), (5, 96), (2, 33, 768), (1, 4096), (9, 3000)
for shape in shapes:
    x = 3 + torch.randn(shape, generator=generator)
    added, weight, bias = torch.randn(3, shape[-1], generator=generator)
    x, added, weight, bias = (tensor.to(device, dtype) for tensor in (x, added, weight, bias))
    for given in ((added, weight, bias), (None, None, None), (None, weight, None), (added, None, bias)):
        a, w, b = (None if tensor is None else tensor.double() for tensor in given)
        expected = x.double() if a is None else x.double() + a
        expected = torch.nn.functional.layer_norm(expected, shape[-1:], w, b, 1e-6)
        found = layer_norm(x, *given, 1e-6)
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=max(2e-6, rounding / 4))
print(len(shapes), "widths")
"""


# --- every tensor on the device -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "mode"),
    # the reference mode of test_vit relies on the memory layout of the device it was exported on
    [(arch, mode) for arch in ARCHITECTURES for mode in ("reference", "float32", "bfloat16")
     if (arch, mode) != ("test_vit", "reference")],
)  # fmt: skip
def test_replay__every_tensor_is_on_the_gpu(arch, mode, monkeypatch):
    """Fake tensors have devices and no memory; an operator with tensors of two devices raises."""
    for module, name in ((cudnn, "convolutions_work"), (graph, "norms_work")):  # unknown to fake tensors
        monkeypatch.setattr(module, name, lambda dtype, device: False)
    network, images, layers, values = opened(arch)
    exported = graph_of(network, images)[0]
    if mode != "reference":
        exported = speed_up(exported, getattr(torch, mode), CUDA)
    with FakeTensorMode(allow_non_fake_inputs=False):

        def on_gpu(tensor):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        exported.values = {node: on_gpu(value) for node, value in exported.values.items()}
        replay = GraphReplay(exported, layers, mode)
        drawn = {name: {n: on_gpu(value) for n, value in of_layer.items()} for name, of_layer in values.items()}
        found = sweep(replay, on_gpu(images), drawn, replay._run)
        assert {logits.device.type for logits in found.values()} == {"cuda"}
        p, q = (found[name].float().softmax(dim=1) for name in (None, layers[0].name))
        measured = measure_distances(p, q, ["cosine", "js", "top1"])
        measured |= label_scores(found[None].float(), torch.zeros(4, dtype=torch.int64, device="cuda"))
        assert {value.device.type for value in measured.values()} == {"cuda"}


# --- CUDA graphs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs whose capture is what the test runs, and whose replay runs it again on the captured memory."""
    captured = []

    class Graph:
        replay: object = None

    @contextlib.contextmanager
    def capture(graph, **_):
        captured.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return captured


class Doubled:
    """A sweep that is easy to check: for each layer images times its values, then the images."""

    def __init__(self, graphs):
        self.graphs, self.n_run = graphs, 0

    def __call__(self, images, *prepared):
        self.n_run += 1
        outputs = []
        for of_trial in prepared:
            outputs += [(name, images * of_layer["weight"]) for name, of_layer in of_trial.items()]
        outputs.append((None, images * 1))
        if self.graphs and self.graphs[-1].replay is None:

            def replay(prepared=prepared, outputs=outputs):
                again = [images * v["weight"] for of_trial in prepared for v in of_trial.values()]
                for (_, output), value in zip(outputs, [*again, images], strict=True):
                    output.copy_(value)

            self.graphs[-1].replay = replay
        yield from outputs


def trial(**factors):
    return {name: {"weight": torch.tensor(float(factor))} for name, factor in factors.items()}


def test_captures__give_what_the_sweep_gives(graphs):
    run = Doubled(graphs)
    captures = SweepCaptures()
    kept = []
    for prepared in ([trial(a=2, b=3)], [trial(a=4, b=5)], [trial(a=6)], [trial(a=7)], [trial(a=1), trial(a=2)]):
        for batch in range(3):
            images = torch.full((2, 2), float(1 + batch))
            found = list(captures.sweep(run, images, *prepared))
            expected = list(Doubled([])(images, *prepared))
            kept.append((found, expected))
    for found, expected in kept:  # later sweeps write over none of them
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))
    assert len(graphs) == 3
    assert run.n_run == 6, "once as it is and once for the capture, for each set of layers"


def test_captures__what_cannot_be_captured_is_run(monkeypatch):
    tried = []

    @contextlib.contextmanager
    def capture(graph, **_):
        tried.append(graph)
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    streams = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream before")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", types.SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    captures = SweepCaptures()
    for batch in range(4):
        images = torch.full((2, 2), float(batch))
        (_, found), (_, clean) = captures.sweep(Doubled([]), images, trial(a=3))
        assert torch.equal(found, 3 * images)
        assert torch.equal(clean, images)
    assert len(tried) == 1
    assert streams == ["the stream before"]


# --- a GPU ----------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize(
    ("mode", "atol"),
    [("reference", 1e-5), ("float32", 1e-5), ("bfloat16", 0.1)],  # on a CPU, too, bfloat16 moves a cell by up to 0.044
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_measure__gives_on_a_gpu_what_it_gives_on_the_cpu(arch, mode, atol):
    network, images, *_ = opened(arch)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    size = images.shape[-1]
    pixels = torch.randint(0, 256, (24, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    settings = {"trials": 3, "progress": False, "batch_size": 8}
    expected = measure(network, pixels, device="cpu", dtype="float32", **settings).cells
    found = measure(network, pixels, device="cuda", dtype=mode, **settings)
    assert found.record["dtype"] == mode
    assert (found.cells["seed"] == expected["seed"]).all()
    assert (found.cells["cosine"] - expected["cosine"]).abs().max() < atol
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@needs_gpu
def test_probe_set__is_put_on_a_gpu_once():
    pixels = torch.randint(0, 256, (600, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    probe_set = ProbeSet.from_source(pixels, Preprocessing(height=4, width=4, resize=None))
    device = torch.zeros(1, device="cuda").device
    batches = [probe_set.batch_on(device, start, start + 256) for start in (0, 256, 512)]
    assert torch.equal(torch.cat(batches).cpu(), pixels)
    assert len({batch.untyped_storage().data_ptr() for batch in batches}) == 1
    assert torch.equal(probe_set.first(5).batch_on(device, 2, 9).cpu(), pixels[2:5])


@needs_gpu
def test_convolutions_work__on_a_gpu():
    assert all(
        cudnn.convolutions_work(dtype, torch.zeros(1, device="cuda").device)
        for dtype in (torch.float32, torch.bfloat16)
    )


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_and_norms_work__on_a_gpu(dtype):
    device = torch.zeros(1, device="cuda").device
    assert cublas.linears_work(dtype, device)
    assert layer_norms.norms_work(dtype, device)


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_kernel__on_a_gpu(dtype):
    subprocess.run([sys.executable, "-c", CHECK_OF_NORMS, "cuda", dtype], check=True)


@needs_gpu
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_captures__on_a_gpu(arch, monkeypatch):
    captured: list[Tensor | None] = []
    capture = cuda_graphs.SweepCaptures._captured
    monkeypatch.setattr(
        cuda_graphs.SweepCaptures, "_captured", lambda *given: captured.append(capture(*given)) or captured[-1]
    )
    network, images, layers, values = opened(arch)
    network, images = network.to(CUDA), images.to(CUDA)
    replay = GraphReplay(graph_of(network, images)[0], layers).in_mode("bfloat16", CUDA)
    for factor in (1.0, 1.5):
        drawn = {name: {n: factor * v.to(CUDA) for n, v in of_layer.items()} for name, of_layer in values.items()}
        prepared = {layer.name: replay.prepare(layer, drawn[layer.name]) for layer in layers}
        for shift in (0.0, 0.5, 1.0):
            found = dict(replay.sweep(images + shift, prepared))
            expected = dict(replay._run(images + shift, prepared))
            for name, logits in expected.items():
                torch.testing.assert_close(found[name], logits, rtol=0, atol=1e-2)
    assert len(captured) == 1
    assert captured[0] is not None
