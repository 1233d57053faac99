"""Weights of a file, matched with an architecture."""

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models import convnext, swin_transformer
from torch import nn

from layercrit.errors import CheckpointError
from layercrit.models.checkpoints import Checkpoint
from layercrit.models.fitting import fit, fit_to
from layercrit.models.renames import Renames


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)


@pytest.fixture
def state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net().state_dict()


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# Matching names


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "model.", "_orig_mod.", "network.", "backbone.", "module.model.", "module._orig_mod.model."],
)
def test_fit_to__wrappers(state, prefix):
    wrapped = {prefix + name: tensor for name, tensor in reversed(state.items())}
    assert same(fit_to(wrapped, state, "w.pth"), state)


def test_fit_to__prefix_that_only_some_names_have_stays(state):
    names = list(state)
    partly = {("module." if name == names[0] else "") + name: tensor for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"1 missing: 'conv.weight' \(similar: 'module.conv.weight'\)"):
        fit_to(partly, state, "w.pth")


def test_fit_to__prefix_that_belongs_to_the_architecture_stays(state):
    expected = {f"model.{name}": tensor for name, tensor in state.items()}
    assert same(fit_to({f"module.{name}": tensor for name, tensor in expected.items()}, expected, "w.pth"), expected)


def test_fit_to__loads_strictly(state):
    network = Net()
    assert network.load_state_dict(fit_to(state, network.state_dict(), "w.pth"), strict=True)
    assert same(network.state_dict(), state)


def test_fit_to__returns_copies(state):
    fitted = fit_to(state, state, "w.pth")
    fitted["fc.bias"].add_(1)
    assert not torch.equal(fitted["fc.bias"], state["fc.bias"])


def test_fit_to__differences_are_listed(state):
    other = dict(state)
    other["head.weight"], other["extra"] = other.pop("fc.weight"), torch.zeros(1)
    other["fc.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        fit_to(other, state, "w.pth for timm:net")
    assert str(caught.value) == (
        "w.pth for timm:net: the weights do not fit. 1 missing: 'fc.weight' (similar: 'head.weight'). "
        "2 unexpected: 'head.weight', 'extra'. "
        "1 of another shape or type: 'fc.bias' is (7,) float32 in the file, (5,) float32 expected. "
        "Check the architecture and its options (such as num_classes), or rename the tensors first."
    )


def test_fit_to__long_differences_are_counted(state):
    many = {f"layer{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(CheckpointError, match=r"9 missing: .*20 unexpected: 'layer0', .*'layer7' and 12 more\."):
        fit_to(many, {**state, "x": torch.zeros(1)}, "w.pth")


def test_fit_to__empty(state):
    with pytest.raises(CheckpointError, match="8 missing"):
        fit_to({}, state, "w.pth")


def test_fit_to__old_files_without_num_batches_tracked(state):
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert same(fit_to(old, state, "w.pth"), state)


def test_fit_to__precision_is_that_of_the_architecture(state):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        other = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        fitted = fit_to(other, state, "w.pth")
        assert [t.dtype for t in fitted.values()] == [t.dtype for t in state.values()]
        assert torch.equal(fitted["fc.weight"], state["fc.weight"].to(dtype).to(torch.float32))


def test_fit_to__integers_are_no_weights(state):
    with pytest.raises(CheckpointError, match=r"'fc.bias' is \(5,\) int64 in the file, \(5,\) float32 expected"):
        fit_to({**state, "fc.bias": torch.zeros(5, dtype=torch.int64)}, state, "w.pth")


# Numbers that are whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.int32])
def test_fit_to__counters_of_another_type(state, dtype):
    counted = {**state, "bn.num_batches_tracked": torch.tensor(384)}
    stored = {name: t.to(dtype) if "num_batches" in name else t for name, t in counted.items()}
    fitted = fit_to(stored, state, "w.pth")
    assert same(fitted, counted)
    assert fitted["bn.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("value", [384.5, float("inf"), float("nan"), 1e30])
def test_fit_to__counters_that_are_not_whole(state, value):
    with pytest.raises(CheckpointError, match=r"1 of another shape or type: 'bn.num_batches_tracked' .*may .*deleted"):
        fit_to({**state, "bn.num_batches_tracked": torch.tensor(value)}, state, "w.pth")


# What stands beside the network


def averaged(state):
    """As ``torch.optim.swa_utils.AveragedModel`` saves it."""
    return {"n_averaged": torch.tensor(3), **{f"module.{name}": tensor for name, tensor in state.items()}}


def other(state, shift=1.0):
    return {name: tensor + shift if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


LEFT_OVER = {
    "average": (averaged, ["'n_averaged'"]),
    "average-without-prefix": (lambda s: {**s, "n_averaged": torch.tensor(3)}, ["'n_averaged'"]),
    "criterion": (lambda s: {**under("model.", s), "criterion.weight": torch.ones(5)}, ["'criterion.weight'"]),
    "loss-and-ema": (
        lambda s: {"loss.scale": torch.ones(1), **under("net.", s), **under("ema.", {"a.b": torch.ones(2)})},
        ["'loss.scale'", "'ema.a.b'"],
    ),
    "metrics": (
        lambda s: {**under("model.", s), **under("train_acc.", {"correct": torch.tensor(4), "total": torch.tensor(5)})},
        ["'train_acc.' (2 tensors)"],
    ),
    "moco": (
        lambda s: {
            **under("module.encoder_q.", s),
            "module.queue": torch.ones(3, 4),
            "module.queue_ptr": torch.zeros(1),
        },
        ["'module.queue'", "'module.queue_ptr'"],
    ),
    "normalisation": (lambda s: {"0.mean": torch.ones(3), **under("1.", s)}, ["'0.mean'"]),
    "another-head": (
        lambda s: {**under("student.", s), **under("teacher.", {**s, "fc.weight": torch.ones(9, 4)})},
        ["'teacher.' (9 tensors)"],
    ),
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_fit__what_is_left_over_is_listed(state, name):
    write, listed = LEFT_OVER[name]
    found = fit(Checkpoint(Path("w.pth"), write(state), "0"), state, "w.pth")
    assert same(found.tensors, state)
    assert len(found.notes) == 1
    assert all(words in found.notes[0] for words in listed), found.notes


def test_fit__odd_entries_are_left_over(state):
    found = fit(Checkpoint(Path("w.pth"), state, "0", {"epoch": "int"}), state, "w.pth")
    assert same(found.tensors, state)
    assert found.notes == ("w.pth: left over, and not used: 'epoch' (int, not a tensor).",)


def test_fit__odd_entry_in_place_of_a_tensor(state):
    rest = {name: tensor for name, tensor in state.items() if name != "fc.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing: 'fc.bias'.* 1 not a tensor: 'fc.bias' \(list\)"):
        fit(Checkpoint(Path("w.pth"), rest, "0", {"fc.bias": "list"}), state, "w.pth")


def test_fit__nothing_to_say_of_plain_files(state):
    for tensors in (state, under("module._orig_mod.", state), under("module.model.", state)):
        assert fit(Checkpoint(Path("w.pth"), tensors, "0"), state, "w.pth").notes == ()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_fit__names_inside_the_network_are_never_left_over(state, prefix):
    tensors = under(prefix, {**state, "fc2.weight": torch.ones(5, 4)})
    with pytest.raises(CheckpointError, match=r"do not fit\. 1 unexpected: 'fc2.weight'"):
        fit(Checkpoint(Path("w.pth"), tensors, "0"), state, "w.pth")


@pytest.mark.parametrize("extra", [{"n_averaged": torch.tensor(3)}, {"criterion.weight": torch.ones(5)}])
def test_fit_to__nothing_is_left_over(state, extra):
    with pytest.raises(CheckpointError, match="1 unexpected"):
        fit_to({**under("module.", state), **extra}, state, "w.pth")
    with pytest.raises(CheckpointError, match="1 unexpected"):
        fit_to({**state, **extra}, state, "w.pth")


# Several networks


SEVERAL = {
    "student-teacher": ("student.", "teacher."),
    "generator": ("module.netG.", "module.netD."),
    "momentum": ("encoder_q.", "encoder_k."),
    "bare-and-average": ("", "ema."),
    "numbered": ("0.", "1."),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_fit__several_networks_are_refused_until_one_is_named(state, name):
    one, two = SEVERAL[name]
    checkpoint = Checkpoint(Path("w.pth"), {**under(one, state), **under(two, other(state))}, "0")
    with pytest.raises(CheckpointError, match=rf"holds 2 networks that fit.*'{one}', '{two}'.*prefix={two},"):
        fit(checkpoint, state, "w.pth")
    first, second = (fit(checkpoint, state, "w.pth", prefix) for prefix in (one, two.rstrip(".")))
    assert same(first.tensors, state)
    assert same(second.tensors, other(state))
    assert "left over" in first.notes[0]
    assert "left over" in second.notes[0]
    assert second.notes[0] != first.notes[0]


def test_fit__wrapped_networks_are_named_by_the_outer_prefix(state):
    tensors = {**under("teacher.module.", state), **under("student.module.", other(state))}
    assert same(fit(Checkpoint(Path("w.pth"), tensors, "0"), state, "w.pth", "teacher").tensors, state)


def test_fit__one_network_under_two_names_is_no_choice(state):
    tensors = {**under("model.", state), **under("classifier.", state)}
    found = fit(Checkpoint(Path("w.pth"), tensors, "0"), state, "w.pth")
    assert same(found.tensors, state)
    assert "'classifier.' (9 tensors)" in found.notes[0]


def test_fit__prefix_that_does_not_fit(state):
    tensors = {**under("student.", state), **under("teacher.", {**state, "fc.weight": torch.ones(9, 4)})}
    checkpoint = Checkpoint(Path("w.pth"), tensors, "0")
    with pytest.raises(CheckpointError, match=r"1 of another shape or type: 'fc.weight' is \(9, 4\)"):
        fit(checkpoint, state, "w.pth", "teacher.")
    with pytest.raises(CheckpointError, match=r"no name in the file begins with 'techer'. Did you mean 'teacher.'"):
        fit(checkpoint, state, "w.pth", "techer")
    partly = {name: tensor for name, tensor in tensors.items() if name != "teacher.bn.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing: 'bn.bias'"):
        fit(Checkpoint(Path("w.pth"), partly, "0"), state, "w.pth", "teacher.")


def test_fit__wrapped_weights_with_another_head_name_only_what_differs(state):
    tensors = {**under("model.", {**state, "fc.weight": torch.ones(9, 4)}), "criterion.weight": torch.ones(5)}
    with pytest.raises(CheckpointError) as caught:
        fit(Checkpoint(Path("w.pth"), tensors, "0"), state, "w.pth")
    assert "do not fit. 1 of another shape or type: 'fc.weight' is (9, 4)" in str(caught.value)


# Names of known formats


def written_as_old_densenet(state):
    """As torchvision saved DenseNet before modules lost their dots."""
    return {re.sub(r"(denselayer\d+\.)(norm|conv)([12])\.", r"\1\2.\3.", name): t for name, t in state.items()}


def written_as_official_swin(state):
    """As microsoft/Swin-Transformer does: merging ends a stage, and masks and positions are buffers."""
    official = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"layers\.(\d)\.downsample\.(.*)", name):
            name = f"layers.{int(match[1]) - 1}.downsample.{match[2]}"
        official[name.replace("head.fc.", "head.")] = tensor
        if name.endswith("relative_position_bias_table"):
            official[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
        if name.endswith("blocks.1.norm1.weight"):
            official[name.replace("norm1.weight", "attn_mask")] = torch.zeros(4, 49, 49)
    return official


def written_as_official_convnext(state):
    official = {}
    for name, tensor in state.items():
        name = re.sub(r"stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2.", name)
        name = re.sub(r"stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", name)
        for new, old in {
            "stem.": "downsample_layers.0.",
            "conv_dw": "dwconv",
            "mlp.fc": "pwconv",
            "head.fc.": "head.",
            "head.norm.": "norm.",
        }.items():
            name = name.replace(new, old)
        official[name] = tensor
    return official


def written_in_parts(state):
    """As torch.compile of a module inside the network and FSDP save it."""
    return {
        re.sub(r"^(features|layers\.0|stages\.1)\.", r"\1._fsdp_wrapped_module._orig_mod.", name): tensor
        for name, tensor in state.items()
    }


FORMATS = {
    "old-densenet": ("densenet121", {"block_config": (2, 2), "growth_rate": 4}, written_as_old_densenet),
    "official-swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1,) * 4},
                      written_as_official_swin),
    "official-convnext": ("convnext_atto", {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "conv_mlp": False},
                          written_as_official_convnext),
    "wrapped-parts-of-densenet": ("densenet121", {"block_config": (2, 2), "growth_rate": 4}, written_in_parts),
    "wrapped-parts-of-swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (2, 2, 2, 2),
                              "num_heads": (1,) * 4}, written_in_parts),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", FORMATS)
def test_fit__known_formats(name, prefix):
    architecture, options, write = FORMATS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = timm.create_model(architecture, pretrained=False, **options).state_dict()
        network = timm.create_model(architecture, pretrained=False, **options)
    written = under(prefix, write(state))
    assert written.keys() != under(prefix, state).keys()
    found = fit(Checkpoint(Path("w.pth"), written, "0"), network.state_dict(), "w.pth")
    assert same(found.tensors, state)
    assert "names were read as those of" in found.notes[0]
    assert fit(Checkpoint(Path("w.pth"), under(prefix, state), "0"), network.state_dict(), "w.pth").notes == ()
    if name == "official-swin":
        assert "'...relative_position_index' (8 tensors), '...attn_mask' (4 tensors)" in found.notes[1]


@pytest.mark.parametrize(
    ("name", "convert"),
    [("official-swin", swin_transformer.checkpoint_filter_fn), ("official-convnext", convnext.checkpoint_filter_fn)],
)
def test_formats__are_those_that_timm_converts(name, convert):
    """The files that these tests write are official ones: timm's own conversion undoes them."""
    architecture, options, write = FORMATS[name]
    network = timm.create_model(architecture, pretrained=False, **options)
    converted = convert(write(network.state_dict()), network)
    assert converted.keys() == network.state_dict().keys()
    assert all(torch.equal(converted[key], value) for key, value in network.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_fit__old_weight_normalisation():
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)).state_dict()
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    network.load_state_dict(fit(Checkpoint(Path("w.pth"), old, "0"), network.state_dict(), "w.pth").tensors)
    weight = old["0.weight_v"] * old["0.weight_g"] / old["0.weight_v"].norm(dim=1, keepdim=True)
    assert torch.allclose(network[0].weight, weight)


def test_renames__names_that_would_collide_are_left_alone():
    table = Renames("x", ((r"^a\.", ""),))
    assert table.new_names(["a.b", "c"]) == {"b": "a.b", "c": "c"}
    assert table.new_names(["a.b", "b"]) == {}
