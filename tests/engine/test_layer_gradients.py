"""Gradients of outputs and parameters, and curvature, image by image: against plain formulas, and known answers."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

import tiny_networks as tiny
from layercrit.engine.layer_gradients import LayerGradients
from layercrit.layers import find_layers
from layercrit.models.model import logits_of
from layercrit.restoring import untouched
from tiny_networks import IMAGES, Sketch, case

padded = partial(nn.Conv2d, 8, 8, 3, padding=1)


def grouped():
    return Sketch(lambda net, x: net.b(net.a(x)).relu() + x, a=padded(groups=4), b=nn.GroupNorm(2, 8))


def tokens():
    """Linear layers on tokens between layer norms, as in a transformer's MLP."""

    def how(net, x):
        y = net.norm(x.flatten(2).transpose(1, 2))
        y = net.out(F.gelu(net.into(y)))
        return x + y.transpose(1, 2).view_as(x)

    return Sketch(how, norm=nn.LayerNorm(8), into=nn.Linear(8, 16), out=nn.Linear(16, 8))


def written_over():
    """The input of a convolution is written over once that has read it."""
    return Sketch(lambda net, x: net.a(x) + net.b(x.relu_()), a=padded(), b=padded())


NETWORKS = {
    "written over": (written_over, IMAGES),
    "grouped": (grouped, IMAGES),
    "tokens": (tokens, IMAGES),
    "used twice": (tiny.UsedTwice, IMAGES),
    "in place": (tiny.InPlace, IMAGES),
    "pre-activation": (tiny.PreActivation, IMAGES),
    "recurrent": (tiny.Recurrent, IMAGES),
    **{
        name: (tiny.ARCHITECTURES[name][0], (2, 3, tiny.ARCHITECTURES[name][1], tiny.ARCHITECTURES[name][1]))
        for name in ("resnet50", "convnext_tiny", "vit_tiny", "swin_tiny", "transformers_vit")
    },
}


def cross_entropy(logits):
    return F.cross_entropy(logits, torch.tensor([3]))


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda name: name.replace(" ", "-"))
def found(request):
    """A network with its gradients for one image."""
    build, shape = NETWORKS[request.param]
    one = case(build, *shape)
    image = one.images[1:2]
    gradients = LayerGradients(one.network, one.layers, [], logits_of, image)
    return one, image, gradients, gradients.of_image(image, cross_entropy)


class Slow:
    """A layer's calls on one image, by hooks that add 0 to each output, whose gradient is the output's."""

    def __init__(self, network, module, image):
        self.inputs, self.outputs, zeros = [], [], []

        def before(_, args, kwargs):
            self.inputs.append(
                tree_map(lambda one: one.detach().clone() if torch.is_tensor(one) else one, (args, kwargs))
            )

        def after(_, __, output):
            self.outputs.append(output.detach().clone())
            zeros.append(torch.zeros_like(output, requires_grad=True))
            return output + zeros[-1]

        twin = copy.deepcopy(network)
        handles = [twin.get_submodule(module).register_forward_pre_hook(before, with_kwargs=True),
                   twin.get_submodule(module).register_forward_hook(after)]  # fmt: skip
        with torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors():
            cross_entropy(logits_of(twin(image))).backward()
        for handle in handles:
            handle.remove()
        self.gradients = [zero.grad for zero in zeros]
        self.module = twin.get_submodule(module)

    def change(self, values, prefix):
        with torch.no_grad():
            for name, value in values.items():
                self.module.get_parameter(name.removeprefix(prefix)).copy_(value)
            after = [self.module(*args, **kwargs) for args, kwargs in self.inputs]
        parts = [g * (new - old) for g, new, old in zip(self.gradients, after, self.outputs, strict=True)]
        return sum(float(part.square().sum()) for part in parts), sum(float(part.sum()) for part in parts)


def test_output_change__is_that_of_the_slow_way(found):
    one, image, _, of_image = found
    moved = 0
    for layer in one.layers:
        module, _, _ = layer.parameters[0].rpartition(".")
        if not module or not isinstance(one.network.get_submodule(module), (nn.Conv2d, nn.Linear, nn.LayerNorm)):
            continue
        change = of_image.output_change(layer, one.values(layer))
        weighted, first_order = Slow(one.network, module, image).change(one.values(layer), f"{module}.")
        assert change.weighted == pytest.approx(weighted, rel=1e-3, abs=1e-9), layer.name
        assert change.first_order == pytest.approx(first_order, rel=1e-3, abs=1e-5), layer.name
        moved += change.weighted > 0
    assert moved >= 2


def test_gradients_of_parameters__are_those_of_a_plain_backward_pass(found):
    one, image, _, of_image = found
    twin = copy.deepcopy(one.network)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        cross_entropy(logits_of(twin(image))).backward()
    mine = {id(p): name for name, p in one.network.named_parameters()}
    for layer in one.layers:
        for parameter, gradient in of_image.pairs(layer):
            name = next(
                name for name in mine.values() if one.network.get_parameter(name).data_ptr() == parameter.data_ptr()
            )
            torch.testing.assert_close(gradient, twin.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["grouped", "tokens", "used twice", "pre-activation", "vit_tiny"])
def test_curvature__is_the_second_derivative_along_the_change(name):
    """Twin: forward mode over reverse mode, in float64."""
    build, shape = NETWORKS[name]
    one = case(build, *shape)
    network, image = one.network.double(), one.images[:1].double()
    gradients = LayerGradients(network, one.layers, [], logits_of, image)
    values = [{name: value.double() for name, value in one.values(layer).items()} for layer in one.layers]
    found = gradients.curvature(image, cross_entropy, values)
    trained = {name: value.detach() for name, value in network.named_parameters()}
    for layer, new, mine in zip(one.layers, values, found, strict=True):
        own = {name: trained[name] for name in layer.parameters}
        change = {name: new[name] - trained[name] for name in own}

        def loss(own):
            return cross_entropy(logits_of(functional_call(network, {**trained, **own}, (image,))))

        with sdpa_kernel(SDPBackend.MATH):
            product = jvp(grad(loss), (own,), (change,))[1]
        expected = 0.5 * sum(float((product[name] * change[name]).sum()) for name in own)
        assert mine == pytest.approx(expected, rel=1e-6, abs=1e-9), layer.name
    assert max(map(abs, found)) > 1e-3


def linear_network():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 4), nn.Linear(4, 3)).double().eval()


def test_curvature__of_a_linear_network_with_squared_loss_is_exact():
    """The loss is quadratic in one layer, and its output linear: L(theta + D) = L(theta) + g D + 1/2 D^T H D."""
    with tiny.seeded(4):
        network, donor = linear_network(), linear_network()
    image, target = tiny.normal(1, 3, 2, 2).double(), tiny.normal(1, 3, seed=2).double()

    def squared(logits):
        return 0.5 * (logits - target).square().sum()

    layers = find_layers(network, image)
    gradients = LayerGradients(network, layers, [], lambda output: output, image)
    values = [{name: donor.get_parameter(name).detach() for name in layer.parameters} for layer in layers]
    curvature = gradients.curvature(image, squared, values)
    of_image = gradients.of_image(image, squared)
    for layer, new, second in zip(layers, values, curvature, strict=True):
        with torch.no_grad(), gradients.holding(new):
            exact = float(squared(network(image)))
        first = of_image.output_change(layer, new).first_order
        assert of_image.loss + first + second == pytest.approx(exact, rel=1e-12)
        assert second > 0


def test_output_change__by_hand():
    """x = 1: hidden (2, 0), logits (2, 0); with the loss -logit_0 g of `last` is (-1, 0), and of `first` (-1, 1)."""
    network = tiny.ByHand()
    image = tiny.BY_HAND_IMAGES[:1]
    layers = find_layers(network, image)
    gradients = LayerGradients(network, layers, [], lambda output: output, image)
    of_image = gradients.of_image(image, lambda logits: -logits[0, 0])
    first, last = layers
    change = of_image.output_change(first, {"first.weight": torch.tensor([[5.0], [7.0]])})
    # the second hidden unit is below 0, where its gradient is 0: the first moves from 2 to 5
    assert (change.weighted, change.first_order) == (9, -3)
    change = of_image.output_change(last, {"last.weight": torch.tensor([[3.0, 0.0], [9.0, 0.0]])})
    assert (change.weighted, change.first_order) == (16, -4)


def test_output_change__tied_weights_count_in_both_their_modules():
    one = case(tiny.Tied, *IMAGES)
    image = one.images[:1]
    of_image = LayerGradients(one.network, one.layers, [], logits_of, image).of_image(image, cross_entropy)
    layers = {layer.name: layer for layer in one.layers}
    weight = one.donor.first.weight.detach()
    first = Slow(one.network, "first", image).change({"first.weight": weight}, "first.")
    second = Slow(one.network, "second", image).change({"second.weight": weight}, "second.")
    values = {"first.weight": weight}
    assert of_image.output_change(layers["first"], values).weighted == pytest.approx(first[0] + second[0], rel=1e-4)


def test_sites__are_the_innermost_modules_that_are_called():
    one = case(*[(tiny.ARCHITECTURES["torchvision_vit_b_16"][0], 2, 3, 32, 32)][0])
    gradients = LayerGradients(one.network, one.layers, [], logits_of, one.images[:1])
    attention = one.network.encoder.layers[0].self_attention
    name = "encoder.layers.encoder_layer_0.self_attention"
    sites = gradients.sites
    assert sites[f"{name}.in_proj"] == [attention]
    assert sites[f"{name}.out_proj"] == [attention]  # whose weight is read, but which is never called
    assert sites["class_token"] == [one.network]
    assert sites["conv_proj"] == [one.network.conv_proj]
    of_image = gradients.of_image(one.images[:1], cross_entropy)
    for layer in one.layers:
        assert of_image.output_change(layer, one.values(layer)).weighted > 0, layer.name


def test_output_change__of_weight_normalisation():
    def build():
        norm = nn.utils.parametrizations.weight_norm
        return Sketch(lambda net, x: net.a(x).relu() + net.b(x), a=norm(padded()), b=norm(padded()))

    one = case(build, *IMAGES)
    image = one.images[:1]
    gradients = LayerGradients(one.network, one.layers, [], logits_of, image)
    of_image = gradients.of_image(image, cross_entropy)
    for layer in (layer for layer in one.layers if layer.name in "ab"):
        weighted, _ = Slow(one.network, layer.name, image).change(one.values(layer), f"{layer.name}.")
        assert of_image.output_change(layer, one.values(layer)).weighted == pytest.approx(weighted, rel=1e-4)
        assert gradients.sites[layer.name] == [getattr(one.network, layer.name)]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_network__is_as_before(error):
    one = case(tiny.Failing, *IMAGES)
    network = one.network
    network.last.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pointers = {name: value.data_ptr() for name, value in network.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in network.named_modules()}
    with pytest.raises(error) if error else nullcontext(), untouched(network):
        gradients = LayerGradients(network, one.layers, [], logits_of, one.images[:1])
        of_image = gradients.of_image(one.images[:1], cross_entropy)
        if error:
            network.fuse.calls_left, network.fuse.error = 1, error
        fuse = next(layer for layer in one.layers if layer.name == "fuse.conv")
        of_image.output_change(fuse, one.values(fuse))
        gradients.curvature(one.images[:1], cross_entropy, [one.values(layer) for layer in one.layers])
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert pointers == {name: value.data_ptr() for name, value in network.named_parameters()}
    assert attributes == {name: set(vars(module)) for name, module in network.named_modules()}
    assert not network.last.weight.requires_grad
    assert network.fuse.conv.weight.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(not module._forward_hooks for module in network.modules())
