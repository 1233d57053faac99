"""A network as a graph whose weights are inputs, and the rewriting that makes it fast.

A node that depends on the image is *dynamic*. A node that depends on weights alone is *static*: it is computed once for
the trained weights and, below a reset layer, once for the drawn ones. Everything a fast mode does to weights (casts,
memory layout, folding of normalisation into convolutions, packing) is therefore written as static nodes of the graph,
and is right for drawn weights without a special case.
"""

import contextlib
import io
import logging
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from typing_extensions import override

from layercrit.engine import cublas, cudnn, onednn
from layercrit.engine.attention import fuse_attention
from layercrit.engine.functional_form import BATCH_NORM, write_functionally
from layercrit.engine.layer_norms import fuse_layer_norms, norms_work
from layercrit.engine.linear_layers import add_before_permuting, fold_layer_scales
from layercrit.engine.narrowing import narrow
from layercrit.engine.nodes import CONVOLUTIONS, output_of, value_of
from layercrit.models.outputs import logits_of
from layercrit.restoring import attributes_kept

__all__ = ["WeightGraph", "export_graph", "named_tensors", "speed_up"]

aten = torch.ops.aten

_READ_MEMORY = {aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default, aten.view_as_real.default}
# Before torch 2.6 the exporter itself wrote no views and no writes to memory, and decomposing splits fast operators
_EXPORTS_FUNCTIONALLY = torch.__version__ < "2.6"


@dataclass
class WeightGraph:
    """A network exported by ``torch.export`` in evaluation mode.

    Attributes:
        graph: functional nodes in topological order. ``node.meta["val"]`` has the shape and dtype that a node has in
            the exported network.
        images: the placeholder of the network's input, ``(n_images, channels, height, width)``.
        logits: the node of the network's output, ``(n_images, n_classes)``.
        names: placeholder -> every name of the parameter, buffer or constant it stands for; tied ones have several.
        values: placeholder -> its trained value.
    """

    graph: fx.Graph
    images: fx.Node
    logits: fx.Node
    names: dict[fx.Node, tuple[str, ...]]
    values: dict[fx.Node, Tensor]

    def dynamic_nodes(self) -> set[fx.Node]:
        """Return the nodes whose value depends on the image."""
        dynamic = {self.images}
        for node in self.graph.nodes:
            if any(argument in dynamic for argument in node.all_input_nodes):
                dynamic.add(node)
        return dynamic

    def copy(self) -> "WeightGraph":
        """Return a graph with nodes of its own; the values are shared."""
        graph, twin = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.output(graph.graph_copy(self.graph, twin))
        return WeightGraph(
            graph,
            twin[self.images],
            twin[self.logits],
            {twin[node]: names for node, names in self.names.items()},
            {twin[node]: value for node, value in self.values.items()},
        )


class _Logits(nn.Module):
    """The network with its output reduced to the logits, which is what the graph is to compute."""

    def __init__(self, network: nn.Module, read_logits: Callable[[object], Tensor]) -> None:
        super().__init__()
        self.network, self._read_logits = network, read_logits

    def forward(self, images: Tensor) -> Tensor:
        return self._read_logits(self.network(images))


def export_graph(
    network: nn.Module, images: Tensor, read_logits: Callable[[object], Tensor] = logits_of
) -> WeightGraph:
    """Export a network for a fixed batch shape.

    Args:
        network: the network in evaluation mode.
        images: example input, normalised, ``(n_images, channels, height, width)``.
        read_logits: takes the logits out of what the network returns.

    Raises:
        Exception: whatever ``torch.export`` raises for a network it cannot follow, for instance one whose control flow
            depends on the image. The caller takes a slower backend.
    """
    with torch.no_grad(), _quiet(), attributes_kept(network):
        program = torch.export.export(_Logits(network, read_logits), (images,), strict=False)
        if not _EXPORTS_FUNCTIONALLY and not write_functionally(program.graph):
            program = program.run_decompositions({})
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise RuntimeError("the network writes to its own buffers or to its input")
    graph = program.graph
    if any(node.op == "get_attr" for node in graph.nodes):
        raise RuntimeError("the exported network has graphs inside its graph")
    inputs: dict[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = named_tensors(network)
    names_of: dict[int, tuple[str, ...]] = {}
    for name, tensor in tensors.items():
        names_of[id(tensor)] = (*names_of.get(id(tensor), ()), name)
    names, values = {}, {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in inputs:
            name = inputs[node.name].removeprefix("network.")
            values[node] = tensors[name] if name in tensors else program.constants[inputs[node.name]]
            names[node] = names_of.get(id(values[node]), (name,))
    (images_node,) = (node for node in graph.nodes if node.op == "placeholder" and node not in values)
    outputs: Any = output_of(graph).args[0]
    (logits_node,) = outputs
    for node in reversed(list(graph.nodes)):
        # true of the float32 network; a fast mode changes types and layouts on purpose
        is_promise = node.target is aten._assert_tensor_metadata.default
        if is_promise or (node.op == "call_function" and not node.users):  # or the output does not depend on it
            graph.erase_node(node)
    return WeightGraph(graph, images_node, logits_node, names, values)


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by all of their names; tied ones have several."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(network.named_buffers(remove_duplicate=False))}


def speed_up(
    weight_graph: WeightGraph, dtype: torch.dtype, device: torch.device, fold_norms: bool = True
) -> WeightGraph:
    """Return a graph rewritten for speed: same function, other rounding.

    Batch normalisation is folded into the convolution before it (scale ``gamma / sqrt(var + eps)``), values that depend
    on the image are kept in ``dtype`` and channels-last order, what only one token is read of is computed for it alone,
    and a convolution, the residual sum and the activation after it become one call: of oneDNN with packed weights on a
    CPU (linear layers, too, where that is faster), of cuDNN on a GPU. There a linear layer and its activation are one
    call of cuBLASLt, and layer normalisations run in a kernel of their own. On a CPU, attention that is written out
    becomes one call, too. What depends on weights alone is computed in float32 and cast last. Logits stay float32.
    Without ``fold_norms``, batch normalisations stay as they are.
    """
    fast = weight_graph.copy()
    _hold_dtype(fast, dtype)
    _drop_copies(fast)
    narrow(fast.graph, fast.dynamic_nodes())
    if fold_norms:
        _fold_batch_norms(fast)
    fold_layer_scales(fast.graph, fast.dynamic_nodes())
    add_before_permuting(fast.graph)
    if device.type == "cpu":
        fuse_attention(fast.graph, fast.dynamic_nodes())
    _cast_inputs(fast, dtype)
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and onednn.convolutions_work(dtype):
        onednn.fuse_convolutions(fast.graph, fast.dynamic_nodes())
    if device.type == "cuda" and cudnn.convolutions_work(dtype, device):
        cudnn.fuse_convolutions(fast.graph, fast.dynamic_nodes())
    if device.type == "cuda" and cublas.linears_work(dtype, device):
        cublas.fuse_linears(fast.graph, fast.dynamic_nodes(), dtype)
    if device.type == "cuda" and norms_work(dtype, device):
        fuse_layer_norms(fast.graph, fast.dynamic_nodes())
    if device.type == "cpu" and onednn.linears_pay(dtype) and onednn.linears_work(dtype):
        onednn.fuse_linears(fast.graph, fast.dynamic_nodes())
    _cast_logits(fast)
    for node in reversed(list(fast.graph.nodes)):
        if node.op == "call_function" and not node.users:
            fast.graph.erase_node(node)
    return fast


# --- what a node can call -------------------------------------------------------------------------------------------


def in_layout(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast; four-dimensional values are also laid out channels-last."""
    if tensor.ndim == 4:
        return tensor.to(dtype, memory_format=torch.channels_last)
    return tensor.to(dtype)


def norm_scale(gamma: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """Return what batch normalisation multiplies each channel by."""
    scale = (variance + eps).rsqrt()
    return scale if gamma is None else scale * gamma


def folded_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the weight of a convolution with the normalisation after it folded in."""
    return weight * scale.view(-1, *[1] * (weight.ndim - 1))


def folded_bias(bias: Tensor | None, mean: Tensor, beta: Tensor | None, scale: Tensor) -> Tensor:
    """Return the bias of a convolution with the normalisation after it folded in."""
    shifted = -mean * scale if bias is None else (bias - mean) * scale
    return shifted if beta is None else shifted + beta


# --- rewriting ------------------------------------------------------------------------------------------------------


def _hold_dtype(weight_graph: WeightGraph, dtype: torch.dtype) -> None:
    """Keep every dynamic value that is float32 in the network in ``dtype``; drop layout promises.

    Raises:
        RuntimeError: the network reads a value as it lies in memory.
    """
    for node in weight_graph.dynamic_nodes():
        if node.target in _READ_MEMORY:
            raise RuntimeError(f"the network reads values as they lie in memory: {node.target}")
        node.args = map_aggregate(node.args, lambda a: dtype if a is torch.float32 else a)
        node.kwargs = map_aggregate(node.kwargs, lambda a: dtype if a is torch.float32 else a)
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # a channels-last value has no view in the other order


def _drop_copies(weight_graph: WeightGraph) -> None:
    """Take values as they are where the network copies them: `reshape` copies where it must, and nothing else need."""
    for node in [node for node in weight_graph.dynamic_nodes() if node.op == "call_function"]:
        arguments: Any = node.args
        empty_pad = node.target is aten.pad.default and not any(arguments[1])
        idle_dropout = node.target is aten.dropout.default and arguments[2] is False
        if node.target in (aten.clone.default, aten.alias.default) or empty_pad or idle_dropout:
            node.replace_all_uses_with(arguments[0])
            weight_graph.graph.erase_node(node)


def _fold_batch_norms(weight_graph: WeightGraph) -> None:
    graph, dynamic = weight_graph.graph, weight_graph.dynamic_nodes()
    for norm in [node for node in graph.nodes if node.target is BATCH_NORM]:
        x, gamma, beta, mean, variance, _, eps = norm.args
        outputs = list(norm.users)  # (normalised, saved mean, saved variance)
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in outputs):
            continue
        if x.target not in CONVOLUTIONS or len(x.users) != 1:
            continue
        image, weight, bias, *where = [*x.args, None] if len(x.args) == 2 else x.args
        if any(value in dynamic for value in (weight, bias, gamma, beta, mean, variance)):
            continue
        # computed where the normalisation stood, so that its parameters are there by then
        with graph.inserting_before(norm):
            scale = graph.call_function(norm_scale, (gamma, variance, eps))
            new_weight = graph.call_function(folded_weight, (weight, scale))
            new_bias = graph.call_function(folded_bias, (bias, mean, beta, scale))
            conv = graph.call_function(x.target, (image, new_weight, new_bias, *where))
        new_weight.meta, new_bias.meta, conv.meta = {"val": value_of(weight)}, {"val": value_of(mean)}, dict(x.meta)
        for user in outputs:
            user.replace_all_uses_with(conv)
        for node in (*outputs, norm, x):
            graph.erase_node(node)


def _cast_inputs(weight_graph: WeightGraph, dtype: torch.dtype) -> None:
    """Cast the images, and every static value where a dynamic node reads it."""
    graph, dynamic = weight_graph.graph, weight_graph.dynamic_nodes()
    for node in list(graph.nodes):
        readers = [user for user in node.users if user in dynamic]
        if (node in dynamic and node is not weight_graph.images) or not readers:
            continue
        if not isinstance(node.meta.get("val"), Tensor) or node.meta["val"].dtype is not torch.float32:
            continue
        with graph.inserting_after(node):
            cast = graph.call_function(in_layout, (node, dtype))
        cast.meta = {"val": value_of(node)}
        for reader in readers:
            reader.replace_input_with(node, cast)


def _cast_logits(weight_graph: WeightGraph) -> None:
    graph = weight_graph.graph
    output = output_of(graph)
    outputs: Any = output.args[0]
    (logits,) = outputs  # the node that was exported may have been replaced
    with graph.inserting_before(output):
        cast = graph.call_function(aten._to_copy.default, (logits,), {"dtype": torch.float32})
    cast.meta = {"val": value_of(logits)}
    output.args = ((cast,),)
    weight_graph.logits = cast


_EXPORTING = threading.RLock()  # streams, filters of warnings and levels of loggers belong to the whole process


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter prints: after a failed export a slower backend is used, and one note says so.

    What other threads print meanwhile is shown, and so is what they log, unless torch does.
    """
    logger = logging.getLogger("torch")
    with (
        _EXPORTING,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(_OfOtherThreads(sys.stdout)),
        contextlib.redirect_stderr(_OfOtherThreads(sys.stderr)),
    ):
        warnings.simplefilter("ignore")
        level = logger.level
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            logger.setLevel(level)


class _OfOtherThreads(io.TextIOBase):
    """Passes on to a stream what other threads than this one write; all else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream, self._thread = stream, threading.get_ident()

    @override
    def write(self, text: str) -> int:
        if self._stream is not None and threading.get_ident() != self._thread:
            self._stream.write(text)
        return len(text)

    @override
    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()
