"""What is lost by following criticality, or something cheaper: docs/advise.md's table of regrets.

python benchmarks/regret.py DIR [--models NAME,...] [--actions NAME,...] [--json FILE]

For each network, of the bundled family or of the folder of real inputs (`resnet20`, `resnet56`, and
`efficientnet-lite0`, whose weights are a package): its layers are put in order by criticality, by proxies, by chance
(20 times) and by an oracle that does the action to each layer alone and looks at the loss; then the action is done to
as many layers as make up the budget, and the accuracy that is left is measured on other images. Regret is the accuracy
under the oracle's order minus that under another order; intervals are for new networks (Student's t over networks).

Actions: `quantise` half of the parameters to 4 bits (torch's own rounding, symmetric, by output channel);
`prune-weights` sets half of the weights of half of the parameters to 0 (torch.nn.utils.prune, smallest first);
`prune-channels` removes half of the channels of layers that hold half of the parameters (Torch-Pruning, by magnitude);
`prune-train` does so and then trains the whole network for a moment; `finetune` trains layers that hold at most a
quarter of the parameters on corrupted images, the rest frozen; `freeze` freezes layers that hold at least half of the
parameters, and trains the other convolutions and linear layers on these images (never what normalises).

Everything is kept in DIR as soon as it is measured, an order at a time, so that the same command goes on after an
interruption. FILE gets the networks that are whole, beside those that it has; a network is whole in an action once
all orders were followed.
"""

import argparse
import copy
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import prune

import layercrit
from layercrit.advice.actions import ACTIONS
from layercrit.advice.budgets import chosen_within
from layercrit.advice.coupling import coupled_layers
from layercrit.advice.ranking import knobs_of
from layercrit.demo import copy_family
from layercrit.models.model import Model
from layercrit.probes.probe_set import ProbeSet
from layercrit.proxies import PROXIES, measure_proxies

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "real"
CIFAR = {"resnet20": (3, "resnet20-12fca82f.th"), "resnet56": (9, "resnet56-4bfd9763.th")}
N_RANDOM = 20
SHIFT = "corrupt:gaussian_noise@5:"
BUDGETS = {
    "quantise": 0.5,
    "prune-weights": 0.5,
    "prune-channels": 0.5,
    "prune-train": 0.5,
    "finetune": 0.25,
    "freeze": 0.5,
}
BY_CHANNEL, SHIFTED = ("prune-channels", "prune-train"), ("finetune", "freeze")


@dataclass(frozen=True)
class Sizes:
    """How many images layers are put in order by, how many are trained on, how many in all, and draws of the reset.

    Accuracy is that on the images that are neither. Where something is trained, it is so for some steps, with so many
    images each and a rate of Adam.
    """

    select: int = 500
    tune: int = 750
    total: int = 2000
    trials: int = 5
    steps: int = 40
    batch: int = 64
    rate: float = 1e-3


# There are 1,000 images of 224 x 224 pixels. Of the rates 1e-3, 1e-4 and 3e-5, this one leaves the smallest loss on the
# first 100 when all layers are trained on noisy images (5.4 before, then 7.2, 4.1 and 4.1).
SIZES = {"efficientnet-lite0": Sizes(100, 300, 1000, 3, 10, 32, 1e-4)}


@dataclass
class Images:
    """Pixels as a network takes them, `(n_images, channels, height, width)`, and labels `(n_images,)`."""

    pixels: Tensor
    labels: Tensor

    def part(self, start: int, stop: int | None = None) -> "Images":
        return Images(self.pixels[start:stop], self.labels[start:stop])


def images_of(source: str, model: Model, n_images: int) -> Images:
    """Return the first images of a source in its order, which are the same for all sources made of it."""
    probe_set = ProbeSet.from_source(source, model.preprocessing, n_images=n_images, seed=0)
    pixels = model.classifier.normalise(torch.from_numpy(np.array(probe_set.images)))
    return Images(pixels, torch.from_numpy(np.array(probe_set.labels)))


@torch.inference_mode()
def logits_of(network: nn.Module, images: Images) -> Tensor:
    return torch.cat([network(pixels) for pixels in images.pixels.split(50 if images.pixels.shape[-1] > 64 else 250)])


def quantise(network: nn.Module, layers: list[str]) -> None:
    for layer in layers:
        weight = network.get_submodule(layer).weight
        scale = weight.detach().abs().flatten(1).amax(1).clamp_min(1e-12) / 7
        zero = torch.zeros(len(scale), dtype=torch.int32)
        weight.data = torch.fake_quantize_per_channel_affine(weight.detach(), scale, zero, 0, -8, 7)


def prune_weights(network: nn.Module, layers: list[str]) -> None:
    for layer in layers:
        module = network.get_submodule(layer)
        prune.l1_unstructured(module, "weight", 0.5)
        prune.remove(module, "weight")


def prune_channels(network: nn.Module, layers: list[str], example: Tensor) -> None:
    import torch_pruning

    if layers:
        ratios = {network.get_submodule(layer): 0.5 for layer in layers}
        importance = torch_pruning.importance.MagnitudeImportance()
        torch_pruning.pruner.BasePruner(
            network, example, importance=importance, pruning_ratio=0.0, pruning_ratio_dict=ratios
        ).step()


def finetune(network: nn.Module, layers: list[str], images: Images, sizes: Sizes) -> None:
    """Train some layers; normalisation layers keep their statistics, so that only these layers adapt."""
    network.to(memory_format=torch.channels_last).requires_grad_(False)  # in which depthwise convolutions are faster
    parameters = [p.requires_grad_() for layer in layers for p in network.get_submodule(layer).parameters()]
    optimizer = torch.optim.Adam(parameters, sizes.rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(sizes.steps):
        batch = torch.randint(len(images.labels), (sizes.batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images.pixels[batch]), images.labels[batch]).backward()
        optimizer.step()


@dataclass
class Subject:
    """A network, its images and its layers."""

    model: Model
    source: str
    sizes: Sizes
    layers: pd.DataFrame
    knobs: dict[str, str]
    fixed: list[str]
    accuracies: dict[tuple[str, frozenset[str]], float] = field(default_factory=dict)

    @cached_property
    def clean(self) -> Images:
        return images_of(self.source, self.model, self.sizes.total)

    @cached_property
    def shifted(self) -> Images:
        return images_of(SHIFT + self.source, self.model, self.sizes.total)

    def images(self, action: str) -> Images:
        return self.shifted if action in SHIFTED else self.clean

    def after(self, action: str, layers: list[str]) -> nn.Module:
        """Return a copy of the network to which the action was done."""
        network = copy.deepcopy(self.model.network).eval()
        tuned_on = slice(self.sizes.select, self.sizes.select + self.sizes.tune)
        if action in SHIFTED:
            trained = [layer for layer in self.layers["layer"] if (layer in layers) == (action == "finetune")]
            finetune(network, trained, self.images(action).part(tuned_on.start, tuned_on.stop), self.sizes)
        elif action in BY_CHANNEL:
            prune_channels(network, layers, self.clean.pixels[:1])
            if action == "prune-train":
                finetune(network, [""], self.clean.part(tuned_on.start, tuned_on.stop), self.sizes)
        else:
            {"quantise": quantise, "prune-weights": prune_weights}[action](network, layers)
        return network

    def loss(self, action: str, network: nn.Module) -> float:
        """Return the loss on the images that orders are found with."""
        images = self.images(action).part(0, self.sizes.select)
        return float(nn.functional.cross_entropy(logits_of(network, images), images.labels))

    def accuracy(self, action: str, network: nn.Module) -> float:
        """Return the accuracy on the images held out."""
        images = self.images(action).part(self.sizes.select + self.sizes.tune)
        return float((logits_of(network, images).argmax(1) == images.labels).float().mean())

    def accuracy_after(self, action: str, layers: list[str]) -> float:
        """Return the accuracy after the action; that of layers which several orders choose is measured once."""
        key = action, frozenset(layers)
        if key not in self.accuracies:
            self.accuracies[key] = self.accuracy(action, self.after(action, layers))
        return self.accuracies[key]

    def chosen(self, action: str, order: "Order") -> list[str]:
        """Return the layers that are chosen where an order takes the place of that by criticality."""
        by_channel = action in BY_CHANNEL
        of_layer = self.knobs if by_channel else {}
        values = self.layers["layer"].map(order.by_layer) if order.by_layer else 0.0
        table = self.layers.assign(criticality=values, low=np.nan, high=np.nan)
        table["measured"] = ~table["layer"].isin(self.fixed) | (not by_channel)
        knobs = knobs_of(table, of_layer)
        knobs = knobs[knobs["measured"]]
        way = ACTIONS["finetune" if action == "finetune" else "freeze"]
        ordered = knobs.loc[order.of(knobs, way.highest_first).sort_values(kind="stable").index]
        total = int(table["n_parameters"].sum())
        budget = BUDGETS[action] * (ordered["n_parameters"].sum() / total if by_channel else 1)
        taken = set(ordered.index[chosen_within(ordered["n_parameters"], way, budget, total)])
        return [layer for layer in table["layer"] if of_layer.get(layer, layer) in taken]


@dataclass
class Order:
    """What layers (or knobs) are put in order by: their values, or something else about them.

    Of a knob, the value is that of its most critical layer, as in `layercrit.advice`.
    """

    by_layer: Mapping[str, float] | None = None
    per_parameter: bool = False
    by: Callable[[pd.DataFrame], pd.Series] | None = None

    def of(self, knobs: pd.DataFrame, highest_first: bool) -> pd.Series:
        if self.by is not None:
            return self.by(knobs)
        values = knobs["criticality"] / (knobs["n_parameters"] if self.per_parameter else 1)
        return -values if highest_first else values


def chance(number: int) -> Order:
    return Order(by=lambda knobs: pd.Series(np.random.default_rng(number).permutation(len(knobs)), knobs.index))


def orders_of(exact: "layercrit.Measurement", proxies: Mapping[str, pd.Series], action: str) -> dict[str, Order]:
    table = exact.to_pandas().set_index("layer")
    by_size = action != "finetune"
    found = {
        "criticality": Order(table["criticality"].to_dict()),
        "criticality per parameter": Order(table["criticality"].to_dict(), per_parameter=True),
        "largest first": Order(by=lambda knobs: -knobs["n_parameters"]),
        "smallest first": Order(by=lambda knobs: knobs["n_parameters"]),
        "last first": Order(by=lambda knobs: -knobs["depth"]),
        "first first": Order(by=lambda knobs: knobs["depth"]),
    }
    for proxy, own in proxies.items():
        if own.notna().all():
            found[f"{proxy}, per parameter" if by_size else proxy] = Order(own.to_dict(), per_parameter=by_size)
    return found


def oracle(subject: Subject, action: str, kept: "Kept") -> Order:
    """Return the order by how much loss the action adds for each parameter, done to each layer (or knob) alone.

    Loss is added to that of the untouched network; where layers are frozen, to that after training all of them.
    """
    of_layer = subject.knobs if action in BY_CHANNEL else {}
    before = subject.loss(action, subject.after(action, []) if action == "freeze" else subject.model.network)
    added = kept.added(action)
    for knob in dict.fromkeys(of_layer.get(layer, layer) for layer in subject.layers["layer"]):
        members = [layer for layer in subject.layers["layer"] if of_layer.get(layer, layer) == knob]
        fixed = action in BY_CHANNEL and bool(set(members) & set(subject.fixed))
        if knob not in added:
            added[knob] = 0.0 if fixed else subject.loss(action, subject.after(action, members)) - before
            kept.add("oracle.csv", {"action": action, "knob": knob, "added": added[knob]})
    return Order(by=lambda knobs: knobs.index.to_series().map(added) / knobs["n_parameters"])


class Kept:
    """What was measured of one network, in a folder of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder / "regret" / name, name
        self.folder.mkdir(parents=True, exist_ok=True)

    def check(self, sizes: Sizes) -> None:
        """Make sure that what is kept was measured with today's settings; note them where nothing is kept."""
        path = self.folder / "settings.json"
        now = {**vars(sizes), "shift": SHIFT, "budgets": BUDGETS}
        if not any(self.folder.iterdir()):
            path.write_text(json.dumps(now), encoding="utf-8")
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else "unknown ones"
        if there != now:
            raise SystemExit(f"{self.folder} has results of other settings: {there}, not {now}. Name another.")

    def add(self, file: str, row: dict[str, Any]) -> None:
        path = self.folder / file
        pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False)

    def rows(self, file: str = "accuracies.csv") -> pd.DataFrame:
        path = self.folder / file
        found = (
            pd.read_csv(path, dtype={"knob": str})
            if path.exists()
            else pd.DataFrame({"action": [], "order": [], "accuracy": []})
        )
        return found.assign(model=self.name)

    def added(self, action: str) -> dict[str, float]:
        found = self.rows("oracle.csv")
        own = found[found["action"] == action]
        return dict(zip(own["knob"], own["added"], strict=True)) if len(own) else {}

    def exact(self, model: Model, images: ProbeSet, trials: int) -> "layercrit.Measurement":
        folder = self.folder / "measurement"
        if (folder / "measurement.json").exists():
            return layercrit.Measurement.load(folder)
        found = layercrit.measure(model, images, trials=trials, progress=False)
        found.save(folder)
        return found

    def proxies(self, model: Model, images: ProbeSet, trials: int) -> pd.DataFrame:
        path = self.folder / "proxies.csv"
        if not path.exists():
            measure_proxies(model, images, trials=trials, progress=False).layers.to_csv(path, index=False)
        return pd.read_csv(path).set_index("layer")


def subject_of(folder: Path, name: str, kept: Kept) -> tuple[Subject, "layercrit.Measurement", dict[str, pd.Series]]:
    """Return a network, its criticality, and its proxies by label."""
    if name in CIFAR:
        source, model = str(REAL / "cifar10-2000.npz"), cifar_model(name)
    elif name == "efficientnet-lite0":
        source, model = str(REAL / "imagenet-sample"), of_tests("trained_models").efficientnet_lite0()
    else:
        source, model = str(folder / "fashion-mnist-test.npz"), layercrit.open_model(f"file:{folder}/models/{name}")
    sizes = SIZES.get(name, Sizes())
    probe_set = ProbeSet.from_source(source, model.preprocessing, n_images=sizes.total, seed=0).first(sizes.select)
    exact = kept.exact(model, probe_set, sizes.trials)
    found = kept.proxies(model, probe_set.first(64), sizes.trials)
    cheap = [proxy for proxy in PROXIES.values() if proxy.name not in ("log_parameters", "depth")]
    proxies = {proxy.label: found[proxy.name] for proxy in cheap}
    knobs, fixed = coupled_layers(model)
    table = exact.to_pandas()[["layer", "n_parameters", "depth", "status"]]
    return Subject(model, source, sizes, table, knobs, fixed), exact, proxies


def of_tests(name: str) -> Any:
    """Return a module of the tests."""
    sys.path.append(str(ROOT / "tests"))
    return importlib.import_module(name)


def cifar_model(name: str) -> Model:
    """Return a published network; see README.md of the folder of real inputs."""
    networks = of_tests("cifar_networks")
    n_blocks, file = CIFAR[name]
    weights = torch.load(REAL / file, weights_only=True, map_location="cpu")["state_dict"]
    network = networks.ResNet20(n_blocks)
    network.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})
    return layercrit.open_model(network.eval(), mean=networks.MEAN, std=networks.STD, input_size=(3, 32, 32))


def measure_orders(folder: Path, name: str, actions: list[str], report: Callable[[str], None]) -> None:
    """Follow the orders of a network that were not followed yet, and keep the accuracies."""
    kept = Kept(folder, name)
    there = kept.rows()
    left = {action: set(there.loc[there["action"] == action, "order"]) for action in actions}
    left = {action: orders for action, orders in left.items() if LAST not in orders}
    if not left:
        return
    kept.check(SIZES.get(name, Sizes()))
    subject, exact, proxies = subject_of(folder, name, kept)
    report(f"{name}: criticality and proxies are there")
    for action, followed in left.items():
        started = time.perf_counter()
        for order, layers in orders_left(subject, action, exact, proxies, kept, followed):
            accuracy = (
                subject.accuracy(action, subject.model.network)
                if layers is None
                else subject.accuracy_after(action, layers)
            )
            kept.add("accuracies.csv", {"action": action, "order": order, "accuracy": accuracy})
        report(f"{name}, {action}: {time.perf_counter() - started:.0f} s")


ALL_TRAINED = "no layer frozen"
LAST = "nothing done"  # of the orders that are followed: an action that has it is whole


def orders_left(
    subject: Subject, action: str, exact: "layercrit.Measurement", proxies: Mapping[str, pd.Series], kept: Kept,
    followed: set[str],
) -> Iterator[tuple[str, list[str] | None]]:  # fmt: skip
    """Yield the name of each order and the layers that it chooses; None: nothing is done."""
    if "oracle" not in followed:
        yield "oracle", subject.chosen(action, oracle(subject, action, kept))
    found = orders_of(exact, proxies, action) | {f"random {number}": chance(number) for number in range(N_RANDOM)}
    yield from ((name, subject.chosen(action, order)) for name, order in found.items() if name not in followed)
    if action == "freeze" and ALL_TRAINED not in followed:
        yield ALL_TRAINED, []
    yield LAST, None


def interval(values: np.ndarray) -> tuple[float, float]:
    if np.ptp(values) < 1e-6:  # few networks that happen to differ by as many images say nothing of others
        return math.nan, math.nan
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    return float(low), float(high)


def summary(found: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one row per action and order: mean accuracy and regret over networks, with intervals for new ones.

    Args:
        found: one row per action, network and order: ``action``, ``model``, ``order``, ``accuracy``.
    """
    rows: list[dict[str, Any]] = []
    for action, of_action in found.groupby("action", sort=False):
        wide = of_action.pivot_table(index="model", columns="order", values="accuracy", sort=False)
        wide = wide.reindex(sorted(wide.index))
        for order in of_action["order"].unique():
            own = wide[order].dropna()
            regret = (wide["oracle"] - wide[order]).dropna()
            over_random = (wide[order] - wide["random"]).dropna()
            limits = [interval(one.to_numpy()) for one in (regret, over_random)]
            rows.append({"action": action, "order": order, "n_models": len(own), "accuracy": own.mean(),
                         "accuracies": own.to_dict(),
                         "regret": regret.mean(), "low": limits[0][0], "high": limits[0][1],
                         "over_random": over_random.mean(), "over_random_low": limits[1][0],
                         "over_random_high": limits[1][1]})  # fmt: skip
    return rows


def whole(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the accuracies of networks in actions in which all orders were followed; of random orders, their mean."""
    found = pd.concat(tables)
    done = found[found["order"] == LAST].set_index(["action", "model"]).index
    found = found[found.set_index(["action", "model"]).index.isin(done)]
    found = found.assign(order=found["order"].str.replace(r"^random \d+$", "random", regex=True))
    return found.groupby(["action", "model", "order"], sort=False, as_index=False)["accuracy"].mean()


def beside(former: Mapping[str, Any], found: pd.DataFrame) -> pd.DataFrame:
    """Return accuracies with those of a former file, of actions and networks that were not measured now."""
    rows = [
        {"action": row["action"], "model": model, "order": row["order"], "accuracy": accuracy}
        for row in former["rows"]
        for model, accuracy in row["accuracies"].items()
    ]
    now = set(zip(found["action"], found["model"], strict=True))
    return pd.concat([pd.DataFrame([row for row in rows if (row["action"], row["model"]) not in now]), found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default="")
    parser.add_argument("--actions", default=",".join(BUDGETS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    copy_family(given.folder)
    family = sorted(path.name for path in (given.folder / "models").iterdir())
    for name in given.models.split(",") if given.models else family:
        measure_orders(given.folder, name, given.actions.split(","), partial(print, flush=True))
    found = whole([Kept(given.folder, path.name).rows() for path in (given.folder / "regret").iterdir()])
    if given.json and given.json.exists():
        found = beside(json.loads(given.json.read_text(encoding="utf-8")), found)
    rows = summary(found)
    print(pd.DataFrame(rows).drop(columns="accuracies").round(4).to_string(index=False))
    if given.json:
        rows = json.loads(pd.Series(rows).to_json(orient="values", double_precision=6))
        text = json.dumps({"torch": torch.__version__, "rows": rows}, indent=1)
        given.json.write_text(text + "\n", encoding="utf-8")


TITLES = {
    "quantise": "Quantise layers that hold at least half of the parameters to 4 bits",
    "prune-weights": "Set half of the weights to 0 in layers that hold at least half of the parameters",
    "prune-channels": "Remove half of the channels of layers that hold at least half of the parameters that can be",
    "prune-train": "The same, and then train the whole network for 40 steps",
    "finetune": "Fine-tune layers that hold at most a quarter of the parameters on noisy images",
    "freeze": "Freeze layers that hold at least half of the parameters, and fine-tune all others on noisy images",
}


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of docs/advise.md: accuracies and their differences in points."""
    lines = []
    for action, title in TITLES.items():
        rows = [row for row in results["rows"] if row["action"] == action]
        if not rows:
            continue
        n_networks = len(rows[0]["accuracies"])
        lines += [f"**{title}** ({n_networks} network{'s' * (n_networks > 1)})", ""]
        lines += ["| layers in the order of | accuracy left | regret | more than by chance |", "|---|---|---|---|"]
        for row in sorted(rows, key=lambda row: -row["accuracy"]):
            parts = [points(row[name], row[low], row[high]) for name, low, high in
                     (("regret", "low", "high"), ("over_random", "over_random_low", "over_random_high"))]  # fmt: skip
            parts[0] = parts[0] if row["order"] != "oracle" else "0"
            parts[1] = parts[1] if row["order"] != "random" else "0"
            name = NAMES.get(row["order"], row["order"])
            lines.append(f"| {name} | {100 * row['accuracy']:.1f} | {' | '.join(parts)} |")
        lines += ["", *by_network(action, {row["order"]: row["accuracies"] for row in rows}), ""]
    return "\n".join(lines).strip()


def by_network(action: str, accuracies: dict[str, dict[str, float]]) -> list[str]:
    """Return the table of what is left of each network under some orders: order -> network -> accuracy."""
    own = "criticality" if action == "finetune" else "criticality per parameter"
    orders = [order for order in (LAST, ALL_TRAINED, own, *NULLS, "random", "oracle") if order in accuracies]
    lines = [f"| network | {' | '.join(NAMES.get(order, order) for order in orders)} |", f"|---|{'---|' * len(orders)}"]
    for network in accuracies[own]:
        left = (f"{100 * accuracies[order][network]:.1f}" for order in orders)
        lines.append(f"| {network} | {' | '.join(left)} |")
    return lines


NULLS = {
    "largest first": "the largest layers first",
    "smallest first": "the smallest layers first",
    "last first": "the last layers first",
    "first first": "the first layers first",
}


def evidence(results: dict[str, Any]) -> dict[str, str]:
    """Return what `layercrit.advice.ACTIONS` says of how good a guide criticality is."""
    rows = {(row["action"], row["order"]): row for row in results["rows"]}

    def told(action: str, order: str, what: str, untouched: str = LAST) -> str:
        own, before, chance = (rows[action, name] for name in (order, untouched, "random"))
        null = max((rows[action, name] for name in NULLS), key=lambda row: row["accuracy"])
        gap = [accuracy - null["accuracies"][model] for model, accuracy in own["accuracies"].items()]
        low, high = interval(np.array(gap))
        judged = "was a better guide than" if low > 0 else "was a poorer guide than" if high < 0 else (
            "could not be told from")  # fmt: skip
        return (
            f"criticality {judged} {NULLS[null['order']]} where {what}: {100 * own['accuracy']:.1f} % accuracy "
            f"against {100 * null['accuracy']:.1f} %, by chance {100 * chance['accuracy']:.1f} %, "
            f"{'before it' if untouched == LAST else 'with none frozen'} {100 * before['accuracy']:.1f} % "
            f"({'mean of ' * (own['n_models'] > 1)}{own['n_models']} network{'s' * (own['n_models'] > 1)})"
        )

    pruned = [
        ("prune-channels", "channels are removed and nothing is trained afterwards"),
        ("prune-train", "channels are removed and the network is trained for a moment afterwards"),
        ("prune-weights", "half of the weights of layers are set to 0"),
    ]
    frozen = "layers are frozen and all others fine-tuned on noisy images"
    return {
        "freeze": told("freeze", "criticality per parameter", frozen, ALL_TRAINED),
        "finetune": told("finetune", "criticality", "layers are fine-tuned on noisy images and all others frozen"),
        "prune": "; ".join(told(action, "criticality per parameter", what) for action, what in pruned),
        "quantise": told("quantise", "criticality per parameter", "half of the parameters are rounded to 4 bits"),
    }


NAMES = {
    "random": "chance, mean of 20",
    "oracle": "the oracle",
    "nothing done": "(nothing done)",
    "no layer frozen": "(no layer frozen)",
}


def points(value: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{100 * value:+.1f}"
    return f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


if __name__ == "__main__":
    main()
