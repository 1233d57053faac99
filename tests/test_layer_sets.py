import copy
import json
import re
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from layercrit.cli.root import cli
from layercrit.comparison import compare
from layercrit.contrasts import crossed_contrasts
from layercrit.demo import small_resnet
from layercrit.engine.graph import export_graph
from layercrit.engine.graph_replay import GraphReplay
from layercrit.engine.subject import Subject
from layercrit.errors import LayerError, ProtocolError, StudyError
from layercrit.interactions import Pair, interactions_of
from layercrit.layer_sets import members_of, read_sets, sets_of, stages_of_sets
from layercrit.layers import find_layers, layer_labels, select_layers
from layercrit.measurement import Measurement
from layercrit.measuring import measure
from layercrit.models.model import structure
from layercrit.models.references import open_model
from layercrit.protocol import SETS, Protocol
from layercrit.reporting.reports import report
from layercrit.study.file import read_study_file
from layercrit.study.planning import plan_study
from layercrit.study.running import run_study
from layercrit.study.shards import open_study
from layercrit.study.tables import load_study
from running_jobs import Inline
from slow_measurement import hashed, slow_measurement
from small_studies import N_LAYERS, OPTIONS, write_study, write_weights
from small_subjects import (
    GROUPS,
    PIXELS,
    QUIET,
    SmallNetwork,
    fresh,
    members,
    normalised,
    photographs,
    small_network,
    two_layers,
)


def by_hand(names, sets):
    """Name of a set -> the names in it, written down once more."""
    n = len(names)
    upwards = [names[: k + 1] for k in range(n)]
    downwards = [names[k:] for k in range(n)]
    one = {name: [name] for name in names}
    return {
        "each": one,
        "all-but-one": {f"all but {name}": [other for other in names if other != name] for name in names},
        "cascade-up": {some[0] if len(some) == 1 else f"{some[0]} ... {some[-1]}": some for some in upwards},
        "cascade-down": {some[0] if len(some) == 1 else f"{some[0]} ... {some[-1]}": some for some in downwards},
        "pairs": {
            " + ".join(some): some
            for place, first in enumerate(names)
            for some in ([first], *([first, second] for second in names[place + 1 :]))
        },
    }[sets]


def small_layers():
    return find_layers(small_network(), torch.rand(1, 3, 12, 12))


# --- names and members ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("sets", SETS)
def test_sets_of__names_and_members(group, sets):
    selected = select_layers(small_layers(), group=group)
    units = sets_of(selected, sets)
    expected = by_hand(GROUPS[group], sets)
    assert {one.name: [m.name for m in one.members] or [one.name] for one in units} == expected
    assert [one.depth for one in units] == list(range(len(expected)))
    of = {one.name: one for one in selected}
    for unit in units:
        assert set(unit.parameters) == {p for name in expected[unit.name] for p in of[name].parameters}
        assert unit.n_parameters == sum(of[name].n_parameters for name in expected[unit.name])


@pytest.mark.parametrize("sets", ["each", "cascade-up", "cascade-down", "pairs", {"fc": "fc"}])
def test_sets_of__a_set_of_one_layer_is_that_layer(sets):
    (fc,) = select_layers(small_layers(), patterns="fc")
    assert sets_of([fc], sets) == [fc]


def test_sets_of__two_layers_that_are_left_of_two_are_alone():
    stem, fc = select_layers(small_layers(), patterns="stem,fc")
    but_stem, but_fc = sets_of([stem, fc], "all-but-one")
    assert (but_stem.parameters, but_fc.parameters) == (fc.parameters, stem.parameters)


def test_sets_of__named_sets():
    selected = select_layers(small_layers())
    units = sets_of(selected, {"ends": "fc,stem", "middle": "layer1.*, layer2.0.conv?", "fc": "fc"})
    assert [(one.name, [m.name for m in one.members]) for one in units] == [
        ("ends", ["stem", "fc"]),
        ("middle", [name for name in GROUPS["layer"] if name not in ("stem", "fc", "layer2.0.shortcut")]),
        ("fc", []),
    ]
    blocks = sets_of(select_layers(small_layers(), group="block"), {"inner": "layer*"})
    assert [m.name for m in blocks[0].members] == ["layer1.0", "layer1.1", "layer2.0"]


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ({"early": "stem,layer1.*,fcc"}, "'fcc' of the set 'early'. Did you mean 'fc'"),
        ({"early": "layer3.*"}, "'layer3.*' of the set 'early'"),
        ({"a": "layer1.0.*", "b": "layer1.0.conv2,layer1.0.conv1"}, "'a' and 'b' are the same"),
        ({"fc": "stem"}, "'fc' has the name of a layer"),
        ("pair", "Did you mean 'pairs'"),
    ],
)
def test_sets_of__what_is_wrong_is_said(sets, words):
    with pytest.raises(LayerError, match=re.escape(words)):
        sets_of(select_layers(small_layers()), sets)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no set"),
        ("early = ", "is not a TOML file"),
        ('early = "a"\nearly = "b"', "is not a TOML file"),
        ("early = 3", "The set 'early' of .* is 3"),
        ("early = []", "The set 'early'"),
        ('early = ""', "The set 'early'"),
        ('early = "a,,b"', "The set 'early'"),
        ("[early]\nlayers = 'a'", "The set 'early'"),
        ('" " = "a"', "The set ' '"),
    ],
)
def test_read_sets__a_file_with_a_mistake(tmp_path, text, words):
    (tmp_path / "sets.toml").write_text(text)
    with pytest.raises(LayerError, match=words):
        read_sets(tmp_path / "sets.toml")


def test_read_sets__a_file_and_what_is_none(tmp_path):
    text = 'early = "stem,layer1.*"\nlate = ["fc", "layer2.*"]'
    (tmp_path / "sets.toml").write_text(text, encoding="utf-8-sig")  # as editors on Windows do
    found = {"early": "stem,layer1.*", "late": "fc,layer2.*"}
    assert read_sets(str(tmp_path / "sets.toml")) == read_sets("sets.toml", tmp_path) == read_sets(found) == found
    assert [read_sets(kind) for kind in SETS] == list(SETS)
    with pytest.raises(LayerError, match="Did you mean 'pairs'"):
        read_sets("pair")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(LayerError, match="UTF-8"):
        read_sets(tmp_path / "binary.toml")


@pytest.mark.parametrize("sets", ["pair", "", {}, {"a": 3}, {"": "a"}, 3, None])
def test_protocol__refuses_what_are_no_sets(sets):
    with pytest.raises(ProtocolError, match="sets"):
        Protocol(sets=sets)


def test_layer_labels__names_of_sets_stay_whole():
    names = ["all but layer1.0.conv1", "layer1.0.conv1 ... fc", "stem + layer1.0.conv2", "layer1.0.conv1"]
    assert list(layer_labels(dict.fromkeys(names, "8x8x3x3")).values()) == [*names[:3], "[1.0] conv1:3x3"]


def test_stages_of_sets__only_sets_in_one_stage_have_one():
    units = sets_of(select_layers(small_layers()), {"a": "layer1.*", "b": "layer1.*,fc", "c": "layer2.0.*", "fc": "fc"})
    assert stages_of_sets(members_of(units)) == {"a": "layer1", "b": None, "c": "layer2", "fc": "fc"}
    assert stages_of_sets(members_of(sets_of(units[-1:], "all-but-one"))) == {"all but fc": None}


# --- the whole measurement ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("sets", SETS)
def test_measure__sets_equal_the_slow_way(group, sets):
    network, probe_set = small_network(), photographs(4)
    architecture = f"module:{structure(network)}"
    donors = [fresh(SmallNetwork, hashed(8, architecture, "rerandomize", trial)) for trial in range(2)]
    modules = members(group)
    layers = {
        name: [one for unit in units for one in modules[unit]] for name, units in by_hand(GROUPS[group], sets).items()
    }
    expected, _ = slow_measurement(network, normalised(probe_set), None, layers, donors)
    found = measure(network, probe_set, trials=2, group=group, sets=sets, seed=8, dtype="reference", **QUIET)
    assert list(found.to_pandas()["layer"]) == list(layers)
    for name, values in found.per_image.items():
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-5, err_msg=name)
    if sets == "pairs":
        c = dict(zip(layers, expected["cosine"], strict=True))
        table = found.interactions()
        pairs = list(combinations(GROUPS[group], 2))
        assert list(zip(table["layer_i"], table["layer_j"], strict=True)) == pairs
        each = np.stack([c[f"{i} + {j}"] - c[i] - c[j] for i, j in pairs])
        np.testing.assert_allclose(table["interaction"], each.mean(axis=(1, 2)), atol=2e-5)
        assert np.abs(table["interaction"]).max() > 0.05
        of_all = crossed_contrasts(each, np.eye(len(pairs)), upper=2.0)
        for limit in ("low", "high", "p_value"):
            np.testing.assert_allclose(table[limit], getattr(of_all, limit), atol=2e-3)
        assert (table["n_trials"] == 2).all()


def with_draws(network, protocol, trial=0):
    """Name of each unit -> its new values in a trial, and the norm of what changes."""
    subject = Subject(protocol, open_model(network, input_size=(3, 12, 12)), None)
    return {change.layer.name: (change.values, change.delta_norm) for change in subject.changes(trial)}  # noqa: PD011


@pytest.mark.parametrize("reset", ["rerandomize", "permute"])
@pytest.mark.parametrize("group", ["layer", "block"])
@pytest.mark.parametrize("sets", ["all-but-one", "cascade-up", "cascade-down", "pairs"])
def test_changes__a_layer_gets_the_same_values_in_all_its_sets(sets, group, reset):
    """And those that it gets where it is reset alone; a block as a member those of the block."""
    network = small_network()
    alone = with_draws(network, Protocol(reset=reset, group=group))
    of_sets = with_draws(network, Protocol(reset=reset, group=group, sets=sets))
    for name, names in by_hand(GROUPS[group], sets).items():
        values = of_sets[name][0]
        assert values.keys() == {p for one in names for p in alone[one][0]}
        for one in names:
            assert all(torch.equal(values[p], value) for p, value in alone[one][0].items())
        squares = sum(alone[one][1] ** 2 for one in names)
        assert of_sets[name][1] == pytest.approx(squares**0.5)
    if reset == "permute" and group == "block":  # a block's values are drawn in one go, a set's layer by layer
        apart = with_draws(network, Protocol(reset=reset, sets={"layer1.0 ": "layer1.0.*"}))["layer1.0 "]
        assert not torch.equal(apart[0]["layer1.0.conv2.weight"], alone["layer1.0"][0]["layer1.0.conv2.weight"])


def test_measure__the_whole_network_equals_a_fresh_one():
    """With all types, the largest set of a cascade is the trial's donor, but for statistics."""
    network, probe_set = small_network(), photographs(5)
    donor = fresh(SmallNetwork, hashed(0, f"module:{structure(network)}", "rerandomize", 0)).eval()
    for (_, mine), (_, theirs) in zip(network.named_buffers(), donor.named_buffers(), strict=True):
        theirs.copy_(mine)
    images = normalised(probe_set)
    with torch.no_grad():
        p, q = network(images).softmax(1), donor(images).softmax(1)
    expected = (1 - torch.cosine_similarity(p, q)).numpy()
    for sets, place in (("cascade-up", -1), ("cascade-down", 0), ({"whole": "*"}, 0)):
        found = measure(network, probe_set, types="all", sets=sets, trials=1, dtype="reference", **QUIET)
        np.testing.assert_allclose(found.per_image["cosine"][place, 0], expected, atol=1e-5)


def test_measure__a_set_of_one_layer_equals_its_single_reset():
    network, probe_set = small_network(), photographs(5)
    alone = measure(network, probe_set, trials=2, **QUIET)
    named = measure(network, probe_set, trials=2, sets={f"just {name}": name for name in GROUPS["layer"]}, **QUIET)
    for name, values in alone.per_image.items():
        np.testing.assert_allclose(named.per_image[name], values, rtol=0, atol=1e-6)
    pairs = measure(network, probe_set, trials=2, sets="pairs", **QUIET)
    names = list(pairs.record["layers"])
    for name, values in zip(GROUPS["layer"], alone.per_image["cosine"], strict=True):
        np.testing.assert_allclose(pairs.per_image["cosine"][names.index(name)], values, rtol=0, atol=1e-6)


def test_measure__all_but_one_of_a_single_layer_is_the_reset_of_its_complement():
    """Which is empty: nothing is reset, so nothing changes."""
    (found,) = measure(two_layers(), PIXELS, layers="3", sets="all-but-one", **QUIET).to_pandas().to_dict("records")
    assert (found["layer"], found["type"], found["n_parameters"]) == ("all but 3", "none", 0)
    assert found["status"].startswith("unchanged")
    both = measure(two_layers(), PIXELS, sets="all-but-one", **QUIET)
    alone = measure(two_layers(), PIXELS, **QUIET)
    np.testing.assert_array_equal(both.per_image["cosine"][::-1], alone.per_image["cosine"])


@pytest.mark.parametrize("sets", SETS)
def test_measure__leaves_the_network_bit_for_bit(sets):
    network = small_network()
    before = copy.deepcopy(network.state_dict())
    measure(network, photographs(3), sets=sets, trials=1, **QUIET)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_measure__sets_with_a_half_width():
    found = measure(small_network(), photographs(), sets="cascade-up", half_width=0.3, pilot=3, max_trials=6, **QUIET)
    assert list(found.to_pandas()["layer"]) == list(by_hand(GROUPS["layer"], "cascade-up"))
    assert found.plan is not None
    assert set(found.plan.layers) == set(found.record["layers"])


def test_measurement__saves_and_loads_pairs(tmp_path):
    found = measure(small_network(), photographs(6), sets="pairs", layers="layer1.*,fc", trials=3, **QUIET)
    again = Measurement.load(found.save(tmp_path))
    pd.testing.assert_frame_equal(again.interactions(), found.interactions())
    assert {"interactions.csv", "interactions.png", "interactions.svg", "criticality.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    shown = CliRunner().invoke(cli, ["show", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "interactions" in shown.output
    (squares,) = [one for one in found.plot_interactions().axes[0].collections if len(one.get_paths()) > 1]
    assert len(squares.get_paths()) == 10
    measure(small_network(), photographs(6), layers="fc", trials=1, **QUIET).save(tmp_path)  # in its place
    assert not list(tmp_path.glob("interactions*"))


def test_interactions__need_pairs():
    found = measure(two_layers(), PIXELS, **QUIET)
    assert not found.has_pairs
    with pytest.raises(ProtocolError, match="--sets pairs"):
        found.interactions()
    named = measure(two_layers(), PIXELS, sets={"1": "1", "3": "3", "both": "1,3"}, **QUIET)
    pairs = measure(two_layers(), PIXELS, sets="pairs", **QUIET)
    np.testing.assert_allclose(named.interactions()["interaction"], pairs.interactions()["interaction"], atol=1e-6)


# --- interactions ---------------------------------------------------------------------------------------------------


class Parallel(nn.Module):
    """Two linear branches, side by side, whose outputs are added."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, images):
        x = images.flatten(1)
        return self.left(x) + self.right(x)


class Series(Parallel):
    """The same layers, one after the other."""

    def forward(self, images):
        return self.right(self.left(images.flatten(1)).repeat(1, 3))


@pytest.mark.parametrize(("build", "adds"), [(Parallel, True), (Series, False)])
def test_interactions_of__of_branches_whose_effects_add_is_0(build, adds):
    """The distance here is the change of one logit, which is linear in the weights of both branches."""
    network, donor = fresh(build, 1).eval(), fresh(build, 2)
    images = torch.rand(7, 3, 2, 2)
    units = sets_of(select_layers(find_layers(network, images)), "pairs")
    values = dict(donor.named_parameters())
    replay = GraphReplay(export_graph(network, images), units)
    prepared = {one.name: replay.prepare(one, {p: values[p].detach() for p in one.parameters}) for one in units}
    logits = dict(replay.sweep(images, prepared))
    changes = np.stack([(logits[one.name] - logits[None])[None, :, 0].numpy() for one in units])
    place = {one.name: number for number, one in enumerate(units)}
    found = interactions_of(changes, [Pair(place["left"], place["right"], place["left + right"])], random_trials=False)
    assert (abs(found["interaction"][0]) < 1e-6) == adds
    assert found["low"][0] <= found["interaction"][0] <= found["high"][0]


def test_interactions_of__uses_the_trials_that_all_three_have():
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 0.5, (3, 6, 20)).astype(np.float32)
    values[0, 1], values[2, 4] = np.nan, np.nan
    whole = interactions_of(values[:, [0, 2, 3, 5]], [Pair(0, 1, 2)])
    pd.testing.assert_frame_equal(interactions_of(values, [Pair(0, 1, 2)]), whole)
    assert whole["n_trials"][0] == 4
    values[1] = np.nan
    nothing = interactions_of(values, [Pair(0, 1, 2)])
    assert nothing["n_trials"][0] == 0
    assert nothing[["interaction", "low", "high"]].isna().all(axis=None)


def test_interactions_of__intervals_cover():
    """Of normal effects of draws, images and rest, shared by pair and members."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        shared = rng.normal(0, 0.05, (1, 4, 1)) + rng.normal(0, 0.05, (1, 1, 30))
        own = rng.normal(0, 0.03, (3, 4, 1)) + rng.normal(0, 0.05, (3, 1, 30)) + rng.normal(0, 0.05, (3, 4, 30))
        values = np.array([0.3, 0.2, 0.6])[:, None, None] + shared + own
        found = interactions_of(values.astype(np.float32), [Pair(0, 1, 2)])
        covered += found["low"][0] <= 0.1 <= found["high"][0]
    assert covered >= 184


# --- studies and the command line -----------------------------------------------------------------------------------

CHOSEN = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "fc"]


@pytest.mark.parametrize("sets", ["pairs", "all-but-one", "cascade-down"])
def test_run_study__sets(tmp_path, sets):
    """As in a measurement; what is written with everything resolved reads the same; nothing draws nonsense."""
    settings = {"sets": sets, "layers": ",".join(CHOSEN), "distances": ["cosine"]}
    study = read_study_file(write_study(tmp_path, protocol=settings))
    names = list(by_hand(CHOSEN, sets))
    assert plan_study(study).models["n_layers"].to_list() == [len(names)] * 2
    run_study(study, tmp_path / "out", progress=False, executor=Inline())
    done = load_study(tmp_path / "out")
    assert list(dict.fromkeys(done.cells["layer"])) == names
    again = read_study_file(tmp_path / "out" / "study.toml")
    assert again.protocol == study.protocol
    of_study = done.to_pandas().query("model == 'm0'")
    single = measure(study.models[0].reference, str(tmp_path / "images.npz"), trials=2, sets=sets, dtype="float32",
                     layers=settings["layers"], distances="cosine", **QUIET)  # fmt: skip
    np.testing.assert_allclose(of_study["criticality"], single.to_pandas()["criticality"], atol=1e-6)
    found = compare(done)
    assert found.models["centre_of_mass"].isna().all()
    assert found.layers.loc[[name for name in names if "fc" in name and name != "fc"], "stage"].isna().all()
    written = report(done, tmp_path / "report", formats=["png"])
    assert "have no depth" in written.left_out["depth"]
    with pytest.raises(StudyError, match="have no depth"):
        report(done, tmp_path / "report", figures=["depth"], formats=["png"])


def test_run_study__a_file_of_named_sets(tmp_path):
    (tmp_path / "sets.toml").write_text('ends = "conv1,fc"\nblock = "layer1.0.*"\nfc = "fc"')
    study = read_study_file(write_study(tmp_path, n_models=1, protocol={"sets": "sets.toml"}))
    assert study.protocol.sets == {"ends": "conv1,fc", "block": "layer1.0.*", "fc": "fc"}
    run_study(study, tmp_path / "out", progress=False, executor=Inline())
    assert list(dict.fromkeys(load_study(tmp_path / "out").cells["layer"])) == [
        "ends", "block", "fc",
    ]  # fmt: skip
    assert read_study_file(tmp_path / "out" / "study.toml").protocol == study.protocol


@pytest.mark.parametrize("setting", [{"sets": "pair"}, {"sets": "none.toml"}, {"sets": 3}, {"sets.early": 3}])
def test_read_study_file__sets_with_a_mistake(tmp_path, setting):
    with pytest.raises(StudyError, match="sets"):
        read_study_file(write_study(tmp_path, n_models=1, protocol=setting))


def test_key__of_a_set_differs_from_that_of_a_group(tmp_path):
    """Both reset the same parameters, but a group's values are drawn in one go; those of one layer are the layer's."""
    keys = {}
    for name, protocol in {
        "layer": {},
        "block": {"group": "block"},
        "set": {"sets": "sets.toml"},
        "pairs": {"sets": "pairs", "layers": "fc,conv1"},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sets.toml").write_text('"layer1.0" = "layer1.0.*"\n"fc" = "fc"')
        study = read_study_file(write_study(folder, n_models=1, trials=1, protocol={"resets": ["permute"], **protocol}))
        run_study(study, folder / "out", progress=False, executor=Inline())
        with open_study(folder / "out") as store:
            keys[name] = {row.layer: row.key for row in store.plan()}
    assert keys["set"]["layer1.0"] != keys["block"]["layer1.0"]
    assert keys["layer"]["fc"] == keys["block"]["fc"] == keys["set"]["fc"] == keys["pairs"]["fc"]
    assert len(keys["layer"]) == N_LAYERS


def test_layers_command__lists_sets(tmp_path):
    reference = f"file:{tmp_path / 'm.safetensors'}?{OPTIONS}&input_size=1,8,8"
    write_weights(tmp_path / "m.safetensors", 0)
    (tmp_path / "sets.toml").write_text('ends = "conv1,fc"')
    for sets, n in (("pairs", N_LAYERS * (N_LAYERS + 1) // 2), (str(tmp_path / "sets.toml"), 1)):
        found = CliRunner().invoke(cli, ["layers", reference, "--sets", sets, "--json"])
        assert found.exit_code == 0, found.output
        rows = json.loads(found.output)["layers"]
        assert len(rows) == n
    assert rows[0]["members"] == ["conv1", "fc"]
    assert rows[0]["n_parameters"] == sum(
        one.n_parameters for one in select_layers(find_layers(small_resnet().eval(), torch.zeros(1, 1, 8, 8)))
        if one.name in ("conv1", "fc")
    )  # fmt: skip
