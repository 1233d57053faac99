import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import layercrit
from layercrit.advice import FORMATS, advise
from layercrit.advice.evidence import Evidence
from layercrit.errors import AdviceError
from layercrit.layers import Shared
from layercrit.seeds import drawing
from running_jobs import Inline, run, tied_network, write_small
from small_subjects import QUIET, SmallNetwork
from tiny_networks import Tied

LAYERS = [
    # layer, criticality, half-width, parameters
    ("blocks.0.attn", 0.30, 0.02, 100),
    ("blocks.0.mlp", 0.10, 0.02, 100),
    ("blocks.1.attn", 0.61, 0.02, 100),
    ("blocks.1.mlp", 0.60, 0.05, 100),
    ("head", 0.90, 0.01, 20),
]


def table(rows=LAYERS, **status):
    layers = [(name, c, c - half, c + half, n, status.get(name.replace(".", "_"), "ok")) for name, c, half, n in rows]
    found = pd.DataFrame(layers, columns=["layer", "criticality", "low", "high", "n_parameters", "status"])
    found.loc[found["status"] != "ok", ["criticality", "low", "high"]] = np.nan
    return found


def of(advice, layer):
    return advice.to_pandas().set_index("layer").loc[layer]


@pytest.mark.parametrize(
    ("action", "budget", "chosen"),
    [
        ("freeze", 0.4, ["blocks.0.attn", "blocks.0.mlp"]),
        ("prune", 0.2, ["blocks.0.attn", "blocks.0.mlp"]),
        ("finetune", 0.30, ["blocks.1.attn", "head"]),
        ("quantise", 6.2, ["blocks.0.attn", "blocks.0.mlp"]),
    ],
)
def test_advise__chooses_within_the_budget(action, budget, chosen):
    assert advise(table(), action, budget).chosen == chosen


def test_advise__on_nothing():
    with pytest.raises(AdviceError, match=r"the folder of either, or a table of layers; got None\."):
        advise(None, "freeze")


def test_advise__layers_that_might_be_on_the_other_side_are_ties():
    """The two of block 1 are 0.01 apart, less than their half-widths; the other three are far from the cut."""
    found = advise(table(), "freeze", 0.7)

    assert found.chosen == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.mlp"]
    assert found.layers.set_index("layer")["tie"].to_dict() == {
        "blocks.0.attn": False, "blocks.0.mlp": False, "blocks.1.attn": True, "blocks.1.mlp": True, "head": False,
    }  # fmt: skip
    assert of(found, "blocks.1.mlp")[["rank", "rank_low", "rank_high"]].to_list() == [3, 3, 4]
    assert any("2 layers are ties" in line for line in found.in_words())


def test_advise__layers_that_were_not_measured_are_never_chosen():
    found = advise(table(blocks_0_mlp="failed"), "freeze", 0.7)

    assert found.chosen == ["blocks.0.attn", "blocks.1.attn", "blocks.1.mlp"]
    assert pd.isna(of(found, "blocks.0.mlp")["rank"])
    assert "not measured" in of(found, "blocks.0.mlp")["reason"]
    assert found.record["not_measured"] == ["blocks.0.mlp"]
    assert any("blocks.0.mlp" in line for line in found.in_words())
    with pytest.raises(AdviceError, match=r"Give at most 76\.2%"):  # its 100 of 420 parameters cannot be frozen
        advise(table(blocks_0_mlp="failed"), "freeze", 0.8)
    assert of(advise(table(blocks_0_mlp="failed"), "quantise", 7.0), "blocks.0.mlp")["bits"] == 8


def test_advise__a_layer_that_not_all_trials_measured_is_not_robust():
    rows = table()
    rows.loc[1, "status"] = "2 of 3 trials: not finite"

    assert "blocks.0.mlp" not in advise(rows, "freeze", 0.3).chosen


def test_advise__coupled_layers_are_chosen_as_one():
    """Pruned alone, blocks.0.mlp would be the first; the most critical layer of its knob makes it the last."""
    knobs = {"blocks.0.mlp": "blocks.0.mlp", "blocks.1.attn": "blocks.0.mlp"}

    found = advise(table(), "prune", 0.15, knobs=knobs)
    all_of_it = advise(table(), "prune", 0.45, knobs=knobs)

    assert found.chosen == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"]
    assert of(found, "blocks.0.mlp")["rank"] == of(found, "blocks.1.attn")["rank"] == 2
    assert "together with blocks.1.attn" in of(found, "blocks.0.mlp")["reason"]
    assert {"blocks.0.mlp", "blocks.1.attn"} <= set(all_of_it.chosen)
    assert advise(table(blocks_1_attn="failed"), "prune", 0.1, knobs=knobs).chosen == ["blocks.0.attn"]


def test_advise__fixed_layers_are_left_as_they_are():
    found = advise(table(), "prune", 0.1, fixed=["blocks.0.mlp"])

    assert found.chosen == ["blocks.0.attn"]
    assert of(found, "blocks.0.mlp")["reason"] == "fixed: left as it is"
    assert advise(table(), "prune", 0.1, fixed="blocks.0.mlp").record == found.record


@pytest.mark.parametrize("given", [{"fixed": ["heads"]}, {"fixed": "heads"}, {"knobs": {"heads": "a"}}])
def test_advise__of_layers_that_do_not_exist(given):
    with pytest.raises(AdviceError, match=r"no layer 'heads', which '(fixed|knobs)' names\. Did you mean 'head'\?"):
        advise(table(), "prune", **given)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"action": "prunne"}, "'prune'"),
        ({"action": "freeze", "budget": 30}, "give 0.3"),
        ({"action": "freeze", "budget": 0}, r"above 0 and at most 1, not 0\.$"),
        ({"action": "quantise", "budget": 3}, "from 4 to 8"),
        ({"action": "freeze", "budget": "10%"}, r"a number, such as 0\.1 for 10 %, not '10%'"),
        ({"action": "quantise", "bits": [4]}, "two or more"),
        ({"action": "quantise", "bits": 8}, r"two or more .* not \[8\]"),
        ({"action": "prune", "knobs": "chanels"}, "not 'chanels'. Did you mean 'channels'?"),
        ({"action": "prune", "ratio": 1}, "between 0 and 1"),
    ],
)
def test_advise__what_makes_no_sense(asked, message):
    with pytest.raises(AdviceError, match=message):
        advise(table(), **asked)


@pytest.mark.parametrize("action", ["freeze", "finetune", "prune", "quantise"])
def test_advise__where_sizes_are_not_known(action):
    imported = table()
    imported["n_parameters"] = imported["n_parameters"].astype(object)
    imported.loc[2, "n_parameters"] = None
    with pytest.raises(AdviceError, match=r"not known, such as of 'blocks.*budgets are shares.*: measure the model"):
        advise(imported, action)


def test_advise__of_nothing_measured():
    with pytest.raises(AdviceError, match="none of these layers"):
        advise(table([LAYERS[0]], blocks_0_attn="failed"), "freeze")


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda rows: rows.drop(columns="low"), "lacks the columns low"), (lambda rows: pd.concat([rows, rows]), "twice")],
)
def test_advise__of_a_table_that_is_not_one(change, message):
    with pytest.raises(AdviceError, match=message):
        advise(change(table()), "freeze")


# --- as other programs read it --------------------------------------------------------------------------------------


def test_to__json_is_everything():
    found = advise(table(blocks_0_mlp="failed"), "freeze", 0.4)

    told = json.loads(found.to("json"))

    assert told["chosen"] == found.chosen
    assert told["budget"] == 0.4
    assert [row["layer"] for row in told["table"]] == list(found.layers["layer"])
    assert told["table"][-1]["rank"] is None


def test_to__list_and_regex_name_the_chosen_layers_and_no_other():
    found = advise(table([*LAYERS, ("blocks_0.attn", 0.7, 0.01, 10), ("head.attn", 0.7, 0.01, 10)]), "freeze", 0.4)

    names, pattern = found.to("list").split(), re.compile(found.to("regex").strip())

    assert names == found.chosen == ["blocks.0.attn", "blocks.0.mlp"]
    assert [layer for layer in found.record["layers"] if pattern.fullmatch(layer)] == names


def test_to__ratios_and_groups_that_cannot_be():
    found = advise(table(), "freeze")

    with pytest.raises(AdviceError, match="--for prune"):
        found.to("torch-pruning")
    with pytest.raises(AdviceError, match="Measure the model"):
        found.to("groups")
    with pytest.raises(AdviceError, match="'regex'"):
        found.to("regexp")


def test_to__torch_pruning_has_a_ratio_for_each_chosen_layer():
    found = advise(table(), "prune", 0.11, ratio=0.25, fixed=["head"])

    assert json.loads(found.to("torch-pruning")) == {"blocks.0.attn": 0.25, "blocks.0.mlp": 0.25}


@pytest.mark.parametrize(("fixed", "chosen"), [(["blocks.0.mlp"], "blocks.0.attn"), ([], "blocks.0.mlp")])
def test_to__torch_pruning_cuts_no_classes_out_unasked(fixed, chosen):
    with pytest.raises(AdviceError, match=r"their channels are the classes.*knobs=\"channels\".*fixed=\[\.\.\.\]"):
        advise(table(), "prune", 0.05).to("torch-pruning")
    assert list(json.loads(advise(table(), "prune", 0.05, fixed=fixed).to("torch-pruning"))) == [chosen]


def test_to__nncf_ignores_all_other_layers():
    """As NNCF names operations: the layer with slashes, the operation, and a number."""
    patterns = json.loads(advise(table(), "quantise", 6.2).to("nncf"))["patterns"]
    operations = [f"{name.replace('.', '/')}/linear/0" for name, *_ in LAYERS]

    ignored = [one for one in operations if any(re.fullmatch(pattern, one) for pattern in patterns)]

    assert ignored == ["blocks/1/attn/linear/0", "blocks/1/mlp/linear/0", "head/linear/0"]


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)}) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["mlp"](block["attn"](x))
        return self.head(x)


@pytest.mark.parametrize(
    ("critical", "way"),
    [
        (["blocks.0.attn", "blocks.2.attn"], "layers_to_transform"),
        (["blocks.1.attn", "blocks.1.mlp"], "layers_to_transform"),
        (["blocks.0.attn", "blocks.1.mlp"], "regular expression"),
        (["blocks.0.attn", "head"], "regular expression"),
    ],
)
def test_to__peft_adapts_the_chosen_layers_and_no_other(critical, way):
    peft = pytest.importorskip("peft")
    names = [f"blocks.{block}.{part}" for block in range(3) for part in ("attn", "mlp")] + ["head"]
    rows = [(name, 0.9 if name in critical else 0.1, 0.01, 10) for name in names]

    arguments = json.loads(advise(table(rows), "finetune", 0.3).to("peft"))
    adapted = peft.get_peft_model(Blocks(), peft.LoraConfig(r=2, **arguments))

    found = [name.removeprefix("base_model.model.") for name, module in adapted.named_modules()
             if isinstance(module, peft.tuners.lora.Linear)]  # fmt: skip
    assert found == critical
    assert ("layers_to_transform" in arguments) == (way == "layers_to_transform")


# --- of a real measurement ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measurement():
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), dtype=np.uint8)
    return layercrit.measure(SmallNetwork().eval(), images, trials=3, dtype="float32", **QUIET)


def test_to__groups_are_what_an_optimizer_takes(measurement):
    frozen = advise(measurement, "freeze", 0.5)
    trained = advise(measurement, "finetune", 0.5)
    network = SmallNetwork()
    named = dict(network.named_parameters())

    for advice, n in ((frozen, 1), (trained, 0)):
        groups = json.loads(advice.to("groups"))
        optimizer = torch.optim.SGD(
            [{"params": [named[name] for name in group["params"]], "lr": group["lr_scale"]} for group in groups]
        )
        layers = [{name.rpartition(".")[0] for name in group["params"]} for group in groups]
        assert layers[n] == set(advice.chosen)
        assert layers[1 - n] == set(advice.kept)
        assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.0]


def test_plot__marks_the_chosen_layers(measurement):
    advice = advise(measurement, "freeze", 0.5)

    figure = advice.plot()

    marks = [len(line.get_xdata()) for line in figure.axes[0].lines if "frozen" in (line.get_gid() or "")]
    ties = advice.layers["tie"]
    assert sum(marks) == (advice.layers["chosen"] | ties).sum() > 0


def test_advise__of_a_folder_is_that_of_the_measurement(measurement, tmp_path):
    found = advise(measurement.save(tmp_path / "kept"), "freeze", 0.5)
    pd.testing.assert_frame_equal(found.to_pandas(), advise(measurement, "freeze", 0.5).to_pandas())
    with pytest.raises(AdviceError, match="no measurement or study in"):
        advise(tmp_path, "freeze")


def test_advise__channels_of_what_no_network_is_known_of(measurement):
    with pytest.raises(AdviceError, match="a table does not say which one it is of"):
        advise(table(), "prune", knobs="channels")
    with pytest.raises(AdviceError, match="cannot be opened"):
        advise(measurement, "prune", knobs="channels")  # of a network that was given as an object
    with pytest.raises(AdviceError, match="chooses from a study"):
        advise(measurement, "freeze", reset="zero")


def test_advise__of_sets_of_layers(measurement):
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (10, 12, 12, 3), dtype=np.uint8)
    pairs = layercrit.measure(SmallNetwork().eval(), images, trials=1, layers="stem,fc", sets="pairs", **QUIET)

    with pytest.raises(AdviceError, match="--sets each"):
        advise(pairs, "freeze")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_to__every_format_of_a_measurement(measurement, name):
    advice = advise(measurement, "prune", 0.1, fixed=["fc"])

    assert advice.to(name).strip()


@pytest.mark.parametrize("name", ["peft", "torch-pruning"])
def test_to__formats_of_single_modules_refuse_groups(name):
    images = np.random.default_rng(0).integers(0, 256, (10, 12, 12, 3), dtype=np.uint8)
    blocks = layercrit.measure(SmallNetwork().eval(), images, trials=2, group="block", **QUIET)

    advice = advise(blocks, "prune", 0.1)

    with pytest.raises(AdviceError, match="--group layer"):
        advice.to(name)
    assert advice.to("list").split() == advice.chosen


class Attention(nn.Module):
    """Of whose layers one is computed from other parameters, and one is a parameter of a module."""

    def __init__(self):
        super().__init__()
        self.embed = nn.utils.parametrizations.weight_norm(nn.Linear(12, 4))
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.embed(x.flatten(2))
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.fixture(scope="module")
def attention():
    with torch.random.fork_rng(devices=[]):
        network = Attention().eval()
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 3, 4), dtype=np.uint8)
    return layercrit.measure(network, images, trials=1, types="all", **QUIET)


def only(measurement, layer, action="prune"):
    """The advice to do something to one layer."""
    return advise(measurement, action, 0.01, fixed=[name for name in measurement.record["layers"] if name != layer])


def test_to__layers_with_computed_weights_are_single_modules(attention):
    assert json.loads(only(attention, "embed").to("peft"))["target_modules"] == "(?:embed)"
    assert json.loads(only(attention, "fc").to("torch-pruning")) == {"fc": 0.5}
    with pytest.raises(AdviceError, match=r"'embed' has no parameter 'weight' .* embed\.parametrizations"):
        only(attention, "embed").to("torch-pruning")


@pytest.mark.parametrize("name", ["peft", "torch-pruning"])
def test_to__parameters_of_a_module_are_no_modules(attention, name):
    with pytest.raises(AdviceError, match=r"'attention\.in_proj' is a parameter of 'attention'"):
        only(attention, "attention.in_proj").to(name)


def test_advise__says_first_how_good_a_guide_it_is():
    for action in ("freeze", "finetune", "prune", "quantise"):
        first = advise(table(), action).in_words()[0]
        assert re.search(r"criticality (could not be told from|was a (poorer|better) guide than)", first)


def test_command__offers_what_there_is():
    """The command lists them itself, so that its help need not import pandas."""
    from layercrit.advice import ACTIONS
    from layercrit.cli.advise import advise_command

    choices = {
        option.name: list(option.type.choices) for option in advise_command.params if option.name in ("action", "form")
    }
    assert choices == {"action": list(ACTIONS), "form": ["table", *FORMATS]}


# --- layers that share parameters ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tied():
    with torch.random.fork_rng(devices=[]):
        network = Tied().eval()
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    return layercrit.measure(network, images, trials=1, **QUIET)


@pytest.mark.parametrize(
    ("action", "budget"),
    [("freeze", 0.05), ("freeze", 0.6), ("finetune", 0.3), ("finetune", 0.7), ("quantise", 5.0), ("prune", 0.3)],
)
def test_advise__layers_that_share_parameters_are_one_knob(tied, action, budget):
    found = advise(tied, action, budget)
    knobs = found.to_pandas().set_index("layer")["knob"]
    assert knobs["second"] == knobs["first"] != knobs["decode"] == knobs["encode"]
    for pair in ({"first", "second"}, {"encode", "decode"}):
        assert len(pair & set(found.chosen)) in (0, 2)
    assert found.record["n_parameters"] == tied.record["model"]["n_parameters"]  # each once


def test_advise__shared_parameters_are_in_one_group_of_an_optimizer(tied, tmp_path):
    tied.save(tmp_path / "tied")
    groups = json.loads(advise(tmp_path / "tied", "freeze", 0.5).to("groups"))
    names = [name for group in groups for name in group["params"]]
    assert sorted(names) == sorted(name for name, _ in Tied().named_parameters())  # which has shared ones once


def test_together__knobs_of_channels_that_share_a_parameter_are_one():
    shared = {"d": Shared("b", (), 0)}
    layers = pd.DataFrame({"layer": list("abcde"), "n_parameters": 10})
    found = Evidence(layers, "model", shared=shared).together({"b": "a", "d": "c"})
    assert found == {"a": "a", "b": "a", "c": "a", "d": "a", "e": "e"}
    assert Evidence(layers, "model").together({"b": "a"})["b"] == "a"


def test_advise__a_study_knows_which_layers_share_parameters(tmp_path):
    with drawing(0):
        network = tied_network()
    save_file({name: value.clone() for name, value in network.state_dict().items()}, tmp_path / "m.safetensors")
    path = write_small(tmp_path / "tied", trials=1, models=[
        {"reference": "file:../m.safetensors?arch=py:running_jobs:tied_network&input_size=(3,2,2)", "name": "m0"}
    ])  # fmt: skip
    run(path, tmp_path / "out", Inline())
    table = advise(tmp_path / "out", "freeze", 0.6).to_pandas().set_index("layer")
    assert table.loc["3", "knob"] == table.loc["1", "knob"] == "1"
    assert table["n_parameters"].to_dict() == {"1": 12 * 12 + 12, "3": 12, "4": 36 + 3}
