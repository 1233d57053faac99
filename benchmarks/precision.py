"""What does a half-width cost against the published protocol, and do intervals cover what they say?

    python benchmarks/precision.py --make-truth DIR                # a bundled network, 400 trials: about 10 minutes
    python benchmarks/precision.py --make-truth DIR --network FILE.th --images IMAGES.npz     # ResNet-20, 30 minutes
    python benchmarks/precision.py --truth DIR [DIR ...] [--photographs DIR]

Cost, on Fashion-MNIST's 10,000 test images and a bundled network: the published protocol (3 trials on 10,000 images,
the whole network for every layer) against `--half-width` set to the standard error of that protocol times the quantile
of the interval. Both errors are root mean squares over layers against the first truth, of measurements drawn from it
again and again. Opening the model is left out on both sides, as in `benchmarks/replay.py`, and said. With photographs
(one folder a class), the same at the size of ResNet-50: what an evaluation costs is measured on that network, and how
much images vary on EfficientNet-Lite0 with its ImageNet weights.

Coverage, on real draws: the trials and images of a measurement are the population, and the mean over all of them is the
truth of each layer. Measurements of 3, 5 and 10 of its trials, and of two stages, are drawn from it again and again.
Trials and images are drawn with replacement, so that the population is what was measured, and in all layers alike, as a
measurement draws them. Simulated draws: means of trials from four distributions, two of which hide rare draws.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtrit
from torch import nn

import layercrit
from layercrit.intervals import betting, half_width, limits
from layercrit.measurement import Measurement
from layercrit.precision import SD_TRIALS, Components, Cost, Pilot, n_pilot_images, plan_half_width
from layercrit.probes.probe_set import ProbeSet
from layercrit.statistics import estimate

Array = npt.NDArray[Any]

FAMILY = files("layercrit") / "family"
LEVEL = 0.95
N_TRIALS, HALF_WIDTHS = (3, 5, 10), (0.03, 0.05, 0.087)
PILOT, MOST_TRIALS = 10, 200
PLAIN_BATCH = 250  # images; on two cores faster than 32, 64, 125, 500 and 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--truth", nargs="+", default=[], metavar="DIR", help="saved measurements, 400 trials or more")
    parser.add_argument("--make-truth", metavar="DIR", help="measure one and keep it there")
    parser.add_argument("--network", default=str(FAMILY / "baseline"), help="a bundled one, or weights of ResNet-20")
    parser.add_argument("--images", default=str(FAMILY / "fashion-mnist-test.npz"))
    parser.add_argument("--trials", type=int, default=400, help="of the truth")
    parser.add_argument("--truth-images", type=int, default=400)
    parser.add_argument("--n-images", type=int, default=120, help="of the measurements of 3, 5 and 10 trials")
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--fashion-mnist", default="/usr/share/datasets/fashion-mnist", help="Debian's package")
    parser.add_argument("--photographs", metavar="DIR", help="of ImageNet's classes, for the size of ResNet-50")
    arguments = parser.parse_args()
    if arguments.make_truth:
        make_truth(arguments)
        return
    simulations(arguments.repetitions)
    populations = {Path(folder).name: read(folder) for folder in arguments.truth}
    rows = [
        row
        for name, population in populations.items()
        for row in coverage(name, population, arguments.n_images, arguments.repetitions)
    ]
    if not rows:
        return
    ratio = against_published(next(iter(populations.values())), arguments.fashion_mnist, arguments.repetitions)
    at_resnet50 = at_size_of_resnet50(arguments.photographs) if arguments.photographs else float("nan")
    mean, worst = np.mean([row.mean for row in rows]), min(row.worst for row in rows)
    print(
        f"ratio_equal_error={ratio:.1f} ratio_resnet50={at_resnet50:.0f} coverage={mean:.3f} coverage_worst={worst:.3f}"
    )


def make_truth(arguments: argparse.Namespace) -> None:
    """Measure one network with many trials, and keep the measurement."""
    reference = f"file:{arguments.network}"
    if arguments.network.endswith(".th"):
        reference += "?arch=py:cifar_networks:ResNet20&mean=0.485,0.456,0.406&std=0.229,0.224,0.225&input_size=3,32,32"
    found = layercrit.measure(
        reference, arguments.images, trials=arguments.trials, n_images=arguments.truth_images, distances="cosine"
    )
    print(found.save(arguments.make_truth))


# --- real draws -----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """How often intervals covered: in the mean over layers, and in the layer where they did so least often."""

    mean: float
    worst: float


class Sample(NamedTuple):
    """Estimates of each layer from one measurement drawn, or of many; ``(n_layers,)`` or ``(n_samples, n_layers)``."""

    mean: Array
    sd_trial_effect: Array
    sd_image_effect: Array
    sd_rest: Array
    low: Array
    high: Array


def read(folder: str) -> Array:
    """Return the criticality in a saved measurement, ``(n_layers, n_trials, n_images)``."""
    return Measurement.load(folder).per_image["cosine"].astype(np.float64)


def coverage(name: str, population: Array, n_images: int, repetitions: int) -> list[Found]:
    """Draw measurements from a large one, print how often their intervals cover its means, and return that."""
    truth, rng = population.mean(axis=(1, 2)), np.random.default_rng(0)
    print(f"\n{name}: {len(truth)} layers, {population.shape[1]} trials, {population.shape[2]} images")
    print(f"  {'':28} {'coverage':>8} {'worst':>6} {'layer':>5} {'half-width':>10} {'of t':>5} {'trials':>7}")
    found = []
    for n in N_TRIALS:
        samples = stacked([draw(population, n, n_images, rng) for _ in range(repetitions)])
        plain = students(samples, n, n_images, n, n_images)
        show(f"{n} trials, Student's t", plain[0], plain[1], truth, plain[1] - plain[0], n)
        found.append(show(f"{n} trials", samples.low, samples.high, truth, plain[1] - plain[0], n))
    return found + two_stages(population, truth, repetitions, rng)


def draw(population: Array, n_trials: int, n_images: int, rng: np.random.Generator) -> Sample:
    """Draw one measurement: the same trials and images in every layer."""
    trials = rng.integers(0, population.shape[1], n_trials)
    images = rng.integers(0, population.shape[2], n_images)
    return of_layers(population[:, trials[:, None], images])


def of_layers(distances: Array) -> Sample:
    """Return the estimates of ``(n_layers, n_trials, n_images)``."""
    estimates = [estimate(layer, level=LEVEL) for layer in distances]
    return Sample(*(np.array([getattr(one, name) for one in estimates]) for name in Sample._fields))


def stacked(samples: list[Sample]) -> Sample:
    return Sample(*(np.stack(values) for values in zip(*samples, strict=True)))


def error(sample: Sample, n_pilot: int, n_pilot_images: int, n_trials: Any, n_images: int) -> tuple[Array, Array]:
    """Return the standard error of means over more trials and images than those of the pilot, and its df."""
    rest = sample.sd_rest**2
    ms_trials, ms_images = n_pilot_images * sample.sd_trial_effect**2 + rest, n_pilot * sample.sd_image_effect**2 + rest
    parts = (
        (ms_trials / (n_pilot_images * n_trials), n_pilot - 1),
        (ms_images / (n_pilot * n_images), n_pilot_images - 1),
        (
            rest * (1 / (n_trials * n_images) - 1 / (n_pilot_images * n_trials) - 1 / (n_pilot * n_images)),
            (n_pilot - 1) * (n_pilot_images - 1),
        ),
    )
    variance = np.maximum(sum(part for part, _ in parts), 1e-300)
    return np.sqrt(variance), 1 / sum((part / variance) ** 2 / df for part, df in parts)


def students(sample: Sample, *numbers: Any) -> tuple[Array, Array]:
    """Return Student's limits, cut at 0 and 1."""
    standard_error, df = error(sample, *numbers)
    reach = stdtrit(df, 0.5 + LEVEL / 2) * standard_error
    return np.maximum(sample.mean - reach, 0), np.minimum(sample.mean + reach, 1)


def show(name: str, low: Array, high: Array, truth: Array, plain_width: Array, trials: float) -> Found:
    """Print how often limits ``(n_samples, n_layers)`` hold the truth ``(n_layers,)``, and their mean half-width."""
    rounding = 1e-9  # of float32 distances
    covered = ((low <= truth + rounding) & (truth - rounding <= high)).mean(axis=0)
    width = (high - low).mean()
    print(
        f"  {name:28} {covered.mean():8.3f} {covered.min():6.3f} {covered.argmin():5} {width / 2:10.4f} "
        f"{width / plain_width.mean():5.2f} {trials:7.1f}",
        flush=True,
    )
    return Found(float(covered.mean()), float(covered.min()))


def two_stages(population: Array, truth: Array, repetitions: int, rng: np.random.Generator) -> list[Found]:
    """Draw pilots, plan trials for each half-width, and print how often the intervals cover; all images in both."""
    n_images = population.shape[2]
    found = []
    for asked in HALF_WIDTHS:
        pilot, mean, n_trials = drawn_in_two_stages(population, asked, n_images, repetitions, rng)
        reach = pilot.half_width(n_trials, n_images, LEVEL)
        sds = (np.sqrt(one) for one in (pilot.trials, pilot.images, pilot.rest))
        plain = students(Sample(mean, *sds, mean, mean), PILOT, n_images, n_trials, n_images)
        width = plain[1] - plain[0]
        show(f"two stages, {asked}, t", plain[0], plain[1], truth, width, n_trials.mean())
        low, high = np.maximum(mean - reach, 0), np.minimum(mean + reach, 1)
        found.append(show(f"two stages, {asked}", low, high, truth, width, n_trials.mean()))
    return found


def drawn_in_two_stages(
    population: Array, asked: float, n_images: int, repetitions: int, rng: np.random.Generator
) -> tuple[Components, Array, Array]:
    """Draw pilots and what they plan: the pilots' components, means and numbers of trials ``(n_samples, n_layers)``."""
    n_layers, n_measured, n_known = population.shape
    trials = rng.integers(0, n_measured, (repetitions, MOST_TRIALS))
    images = rng.integers(0, n_known, (repetitions, n_images))
    pilot = stacked(
        [of_layers(population[:, one[:PILOT, None], seen]) for one, seen in zip(trials, images, strict=True)]
    )
    counts = np.stack([np.bincount(seen, minlength=n_known) for seen in images], axis=1)  # (n_known, n_samples)
    of_trials = (population.reshape(-1, n_known) @ counts / n_images).reshape(n_layers, n_measured, repetitions)
    so_far = np.empty((repetitions, n_layers, MOST_TRIALS))  # means over the first trials
    for sample, order in enumerate(trials):
        so_far[sample] = of_trials[:, order, sample].cumsum(axis=1) / np.arange(1, MOST_TRIALS + 1)
    components = Components(pilot.sd_trial_effect**2, pilot.sd_image_effect**2, pilot.sd_rest**2, PILOT, n_images)
    n_trials = fewest(components, n_images, asked)
    return components, np.take_along_axis(so_far, n_trials[..., None] - 1, axis=2)[..., 0], n_trials


def fewest(pilot: Components, n_images: int, asked: float) -> Array:
    """Return how many trials each layer gets for a half-width, ``(n_samples, n_layers)``; at most MOST_TRIALS."""
    too_few, enough = np.full(pilot.trials.shape, PILOT - 1), np.full(pilot.trials.shape, MOST_TRIALS)
    while (enough - too_few > 1).any():
        middle = (too_few + enough + 1) // 2
        short = pilot.half_width(middle, n_images, LEVEL) <= asked
        too_few, enough = np.where(short, too_few, np.minimum(middle, enough - 1)), np.where(short, middle, enough)
    return enough


# --- the published protocol against a half-width --------------------------------------------------------------------


class Equal(NamedTuple):
    """The half-width of the published protocol, and how far both ways are off, in the root mean square over layers."""

    half_width: float
    published_error: float
    error: float
    evaluations: float  # of a layer, by the plan


def against_published(population: Array, source: str, repetitions: int) -> float:
    """Print what a half-width costs against the published protocol on a bundled network; return the ratio of times."""
    reference = f"file:{FAMILY / 'baseline'}"
    equal = equal_error(population, repetitions)
    planned(reference, source, equal.half_width)  # a first run in a process also imports
    ours = [planned(reference, source, equal.half_width) for _ in range(3)]
    seconds, opening = (float(np.median(values)) for values in zip(*ours, strict=True))
    published = plain(reference, source, 10_000)
    print(
        f"\nFashion-MNIST, 23 layers: half-width {equal.half_width:.3f}, the standard error of 3 x 10,000 times "
        f"{stdtrit(PILOT - 1, 0.5 + LEVEL / 2):.2f}\n"
        f"  published protocol, plainly  {published:8.1f} s   error {equal.published_error:.4f}   30,000 evaluations "
        f"of a layer\n"
        f"  --half-width                 {seconds:8.1f} s   error {equal.error:.4f}   {equal.evaluations:,.0f} "
        f"evaluations of a layer\n"
        f"  and opening and exporting    {opening:8.1f} s   with it {published / (seconds + opening):.0f} times as "
        "fast",
        flush=True,
    )
    return published / seconds


def plain(reference: str, source: str, n_images: int) -> float:
    """Return the seconds of the published protocol as plainly as it can be written: the whole network every time."""
    torch.manual_seed(0)
    model = layercrit.open_model(reference)
    images = ProbeSet.from_source(source, model.preprocessing, n_images=n_images)
    network, classify, build = model.network.eval(), model.classifier, model.build
    assert build is not None
    weights = {name: value.clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def predict() -> torch.Tensor:
        starts = range(0, images.n_images, PLAIN_BATCH)
        batches = (classify.normalise(images.batch(start, start + PLAIN_BATCH)) for start in starts)
        return torch.cat([network(batch).softmax(dim=1) for batch in batches])

    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    predict()  # warm up
    started = time.perf_counter()
    before = predict()
    for _ in range(3):
        donor = dict(build().named_parameters())
        for layer in layers:
            with torch.no_grad():
                for name, value in network.named_parameters():
                    if name.rpartition(".")[0] == layer:
                        value.copy_(donor[name])
            (1 - torch.cosine_similarity(before, predict())).mean().item()
            network.load_state_dict(weights)
    return time.perf_counter() - started


def planned(reference: str, source: str, half_width: float) -> tuple[float, float]:
    """Return the seconds of a measurement for a half-width, without and only of opening its replay."""
    started = time.perf_counter()
    found = layercrit.measure(reference, source, half_width=half_width, distances="cosine", progress=False)
    opening = found.record["seconds_opening"]
    return time.perf_counter() - started - opening, opening


def at_size_of_resnet50(photographs: str, n_images: int = 32, n_trials: int = 10, n_known: int = 48) -> float:
    """Print what a half-width costs at the size of ResNet-50; return the ratio of times.

    The published protocol takes 3 x 10,000 images x 54 layers times what its plainest form takes an image and layer.
    How much images vary is measured on EfficientNet-Lite0; how much draws vary also, and, for ResNet-50 itself, taken
    from the published results.
    """
    import replay  # beside this file; it also makes the modules of the tests known

    from trained_models import efficientnet_lite0

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "images").mkdir()
        for number, path in enumerate(sorted(Path(photographs).glob("*/*"))[:n_images]):
            (folder / "images" / f"{number}.jpg").symlink_to(path)
        replay.child(what="network", arch="resnet50", folder=scratch)
        task = {"arch": "resnet50", "folder": scratch, "n_images": n_images}
        plainly = [replay.child(what="plain", batch_size=n, **task)["seconds"] / n_images for n in (32, 8)]
        ours = replay.child(what="measure", dtype="auto", **task)["seconds"] / n_images
    found = layercrit.measure(
        efficientnet_lite0(), photographs, trials=n_trials, n_images=n_known, distances="cosine", progress=False
    )
    lite0 = [Components.of(layer, random_trials=True) for layer in found.per_image["cosine"].astype(np.float64)]
    images, rest = (float(np.mean([getattr(one, name) for one in lite0])) for name in ("images", "rest"))
    print(
        f"\nResNet-50, 54 layers: an image and trial takes {1e3 * plainly[0]:.0f} ms plainly in batches of 32, "
        f"{1e3 * plainly[1]:.0f} ms in batches of 8, and {1e3 * ours:.0f} ms here; SD of images {images**0.5:.2f}, "
        f"of the rest {rest**0.5:.2f}"
    )
    resnet50 = [Components(SD_TRIALS**2, images, rest, PILOT, n_known)]
    ratios = []
    for name, components in (("EfficientNet-Lite0's", lite0), ("the published", resnet50)):
        asked = published_half_width(components)
        evaluations, n = evaluations_of(components, asked)
        ratios = [30_000 * one / (evaluations * ours) for one in plainly]
        print(
            f"  with {name} spread of draws: half-width {asked:.3f} takes {evaluations:,.0f} evaluations of a layer "
            f"({n} images) instead of 30,000: {ratios[0]:.0f} and {ratios[1]:.0f} times as fast",
            flush=True,
        )
    return ratios[0]


def evaluations_of(components: Sequence[Components], half_width: float) -> tuple[float, int]:
    """Return how many evaluations a layer takes in the mean, those of the pilot included, and the plan's images."""
    n_layers = len(components)
    free, one_each = np.zeros(n_layers), np.ones(n_layers)
    pilot = Pilot(
        {f"{number}": one for number, one in enumerate(components)}, Cost(0.0, 0.0, free, one_each), random_trials=True
    )
    n_first = n_pilot_images(half_width, LEVEL, PILOT, 10_000)
    plan = plan_half_width(
        {"": pilot}, half_width, level=LEVEL, n_pilot=PILOT, n_pilot_images=n_first, n_available=10_000,
        max_trials=MOST_TRIALS,
    )[""]  # fmt: skip
    return PILOT * n_first + plan.seconds / n_layers, plan.n_images


def published_half_width(components: Sequence[Components]) -> float:
    """Return the standard error of 3 trials on 10,000 images, root mean square over layers, times the quantile."""
    variances = [one.trials / 3 + one.images / 10_000 + one.rest / 30_000 for one in components]
    return float(np.sqrt(np.mean(variances)) * stdtrit(PILOT - 1, 0.5 + LEVEL / 2))


def equal_error(population: Array, repetitions: int) -> Equal:
    """Draw measurements of both kinds from a large one: 3 trials on 10,000 images, and two stages for their error."""
    truth, rng = population.mean(axis=(1, 2)), np.random.default_rng(1)
    asked = published_half_width([Components.of(layer, random_trials=True) for layer in population])
    n_images = n_pilot_images(asked, LEVEL, PILOT, 10_000)
    counts = rng.multinomial(10_000, np.full(population.shape[2], 1 / population.shape[2]), repetitions)
    trials = rng.integers(0, population.shape[1], (repetitions, 3))
    of_trials = population @ counts.T / 10_000  # (n_layers, n_measured, n_samples)
    published = np.stack([of_trials[:, own, sample].mean(axis=1) for sample, own in enumerate(trials)])
    _, mean, n_trials = drawn_in_two_stages(population, asked, n_images, repetitions, rng)
    errors = [float(np.sqrt(np.mean((one - truth) ** 2))) for one in (published, mean)]
    return Equal(asked, *errors, float(n_trials.mean() * n_images))


# --- simulated draws ------------------------------------------------------------------------------------------------


def simulations(repetitions: int, asked: float = 0.02) -> None:
    """Print coverage where the distribution of trials is known: with 10 trials, in two stages, and by betting.

    The two-stage plan has no cap here, as in Stein 1945. Betting may look after any trial: it stops at the first of a
    grid of numbers whose interval is short enough.
    """
    rng = np.random.default_rng(0)
    print(f"half-width {asked}: coverage (mean trials)")
    print(f"  {'':32} {'10 trials':>10} {'two stages':>14} {'betting':>14}")
    for name, draws in DISTRIBUTIONS.items():
        truth = draws(rng, 2_000_000).mean()
        pilot = draws(rng, (repetitions, PILOT))
        low, high = trial_limits(pilot.mean(axis=1), pilot.var(axis=1, ddof=1), PILOT)
        fixed = np.mean((low <= truth) & (truth <= high))
        needed = (stdtrit(PILOT - 1, 0.5 + LEVEL / 2) / asked) ** 2 * pilot.var(axis=1, ddof=1)
        n_trials = np.maximum(np.ceil(needed), PILOT).astype(int)
        more = np.array([draws(rng, n - PILOT).sum() for n in n_trials])
        low, high = trial_limits((pilot.sum(axis=1) + more) / n_trials, pilot.var(axis=1, ddof=1), n_trials)
        staged = np.mean((low <= truth) & (truth <= high))
        bets, took = betting_until(draws(rng, (200, 800)), asked, truth)
        print(f"  {name:32} {fixed:10.3f} {staged:7.3f} ({n_trials.mean():4.0f}) {bets:7.3f} ({took:4.0f})", flush=True)


Draws = Callable[[np.random.Generator, Any], Array]

DISTRIBUTIONS: dict[str, Draws] = {
    "normal, SD 0.04": lambda rng, shape: rng.normal(0.5, 0.04, shape),
    "beta(8, 2), SD 0.12": lambda rng, shape: rng.beta(8, 2, shape),
    "90 % N(.9, .02), 10 % U": lambda rng, shape: mixed(
        rng, 0.1, rng.normal(0.9, 0.02, shape), rng.uniform(0.2, 0.8, shape)
    ),
    "97 % N(.95, .01), 3 % N(.4, .1)": lambda rng, shape: mixed(
        rng, 0.03, rng.normal(0.95, 0.01, shape), rng.normal(0.4, 0.1, shape)
    ),
}


def mixed(rng: np.random.Generator, share: float, common: Array, rare: Array) -> Array:
    return np.clip(np.where(rng.random(common.shape) < share, rare, common), 0, 1)


def trial_limits(mean: Array, variance: Array, n_trials: Any) -> tuple[Array, Array]:
    """Return the limits of means of trials, with the variance of the pilot's."""
    return limits(mean, half_width([(variance / n_trials, PILOT - 1)], LEVEL))


def betting_until(draws: Array, asked: float, truth: float) -> tuple[float, float]:
    """Return how often betting intervals cover when they stop, and after how many trials; ``(n_samples, n_trials)``."""
    stopped, covered = np.full(len(draws), draws.shape[1]), np.zeros(len(draws), bool)
    running = np.arange(len(draws))
    for n in range(20, draws.shape[1] + 1, 20):
        low, high = betting(draws[running, :n], LEVEL)
        covered[running] = (low <= truth) & (truth <= high)
        done = (high - low) / 2 <= asked
        stopped[running[done]] = n
        running = running[~done]
        if not len(running):
            break
    return float(covered.mean()), float(stopped.mean())


if __name__ == "__main__":
    main()
