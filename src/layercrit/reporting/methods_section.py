"""The paragraph about a measurement for the methods section of a paper, with its numbers filled in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layercrit.counts import counted, counted_units
from layercrit.errors import LayercritError, ProtocolError
from layercrit.foreign_text import visible
from layercrit.intervals import excluded_share
from layercrit.measurement import Measurement
from layercrit.named_options import split_name
from layercrit.probes.changes import plain_source
from layercrit.seeds import probe_set_seed

__all__ = ["methods_section"]

_GROUPS = {
    **{name: name for name in ("layer", "block", "stage")},
    "attention": "layer (those of an attention as one)",
    "mlp": "layer (those of an MLP as one)",
    "conv+norm": "layer (convolution and normalisation as one)",
}
_SETS = {
    "each": "of each {}",
    "all-but-one": "of all but each {}",
    "cascade-up": "of each {} and all before it",
    "cascade-down": "of each {} and all after it",
    "pairs": "of each {} and of every two of them",
}
_SOURCES = {  # by name and options of the reset
    "rerandomize": "fresh draws of the architecture's initialiser (Gavrikov et al. 2024)",
    "rewind": "their values before training (Zhang, Bengio & Singer 2022)",
    "rewind(epoch)": "their values after {epoch} epochs of training (Zhang, Bengio & Singer 2022)",
    "zero": "zeros",
    "permute": "their own values in random order",
    "noise(scale)": "their own values plus normal noise of {scale:g} times the root mean square of each tensor",
    "moments(per)": "normal draws with their own mean and standard deviation, per {per}",
    "skip": "zeros where they end its residual branches, which leaves it its shortcut",
    "donor": "those of another model",
}


def methods_section(measurement: Measurement | str | Path) -> str:
    """Return a paragraph that says how a measurement was made: resets, images, trials, intervals.

    Args:
        measurement: of any reset and layers, or its folder.

    Raises:
        LayercritError: this is no measurement and no folder of one, or it is damaged.

    Examples:
        >>> import layercrit
        >>> measurement = layercrit.Measurement.load("layercrit-pixmix")
        >>> layercrit.methods_section(measurement).partition(" of file:")[0]
        'We measured the criticality of 2 layers'
    """
    if isinstance(measurement, str | Path):
        measurement = Measurement.load(measurement)
    if not isinstance(measurement, Measurement):
        raise LayercritError(
            f"methods_section takes a measurement or its folder, not a {type(measurement).__name__}. Give what "
            "layercrit.measure returned, or the folder that it was saved in."
        )
    record, summary = measurement.record, measurement.summary()
    protocol, images = record["protocol"], record["probe_set"]
    layers = measurement.to_pandas()
    version = record["versions"].get("layercrit", "")
    values = _new_values(protocol["reset"])
    one = _GROUPS[protocol["group"]]
    sets = protocol.get("sets", "each")
    what = _SETS[sets].format(one) if isinstance(sets, str) else f"of each of {len(layers)} sets of {one}s"
    units = counted_units(len(layers), sets)
    size = images["preprocessing"]
    by_protocol = images["seed"] == probe_set_seed(protocol["seed"])  # else the probe set was made by itself
    seed = protocol["seed"] if by_protocol else f"{images['seed']} of the probe set"
    sentences = [
        f"We measured the criticality of {units} of {visible(record['model']['reference'])} with "
        f"layercrit {version}: the parameters {what} in turn were replaced by {values}, and criticality is 1 minus the "
        "cosine similarity of the softmax outputs before and after, averaged over trials (draws) and images.",
        f"The network was shown {counted(images['n_images'], 'image')} drawn at random (seed {seed}) from "
        f"{_source(images['source'])}, of {size['height']} x {size['width']} pixels.",
        *_about_statistics(record),
        *_about_trials(measurement, summary),
        *_about_intervals(measurement, summary),
    ]
    return " ".join(sentences)


def _source(source: str) -> str:
    """Return where images come from without folders, and what was done to them."""
    changes, plain = plain_source(source)
    return visible(Path(plain).name) + (f", changed by {visible(changes.removesuffix(':'))}" if changes else "")


def _about_statistics(record: Mapping[str, Any]) -> list[str]:
    """Say what became of running statistics, where they did not stay as trained."""
    statistics = record.get("norm_statistics") or {}
    if statistics.get("how") == "reset":
        return ["Running statistics of the first normalisation layer after a reset were set to mean 0 and variance 1."]
    if statistics.get("how") == "reestimate" and statistics["n_images"]:
        return [
            "Running statistics of the normalisation layers after a reset were estimated again, layer by layer, on "
            f"{statistics['n_images']} of the images."
        ]
    return []


def _new_values(reset: str) -> str:
    name, options = split_name(reset, "reset", ProtocolError)
    known = _SOURCES.get(f"{name}({', '.join(options)})" if options else name)
    return f"those of the reset '{reset}'" if known is None else known.format(**options)


def _about_trials(measurement: Measurement, summary: dict[str, Any]) -> list[str]:
    counts = measurement.to_pandas()["n_trials"]
    plan = measurement.plan
    if not measurement.record["random_trials"]:
        return ["The reset is not random, so one trial was run."]
    if plan is None:
        return [f"Each layer was reset in {counted(counts.max(), 'trial')}, each with a draw of its own."]
    several = f"{counts.min()} to {counts.max()} (median {counts.median():g})"
    numbers = f"{counts.min()}" if counts.min() == counts.max() else several
    sentences = [
        f"In a pilot of {plan.pilot} trials on {plan.n_pilot_images:,} images we estimated, layer by layer, how much "
        "criticality varies between trials and between images; from this the numbers of images and of trials were "
        f"fixed, once, such that the {100 * plan.level:g}% interval of every layer has a half-width of "
        f"{plan.half_width:.2g} (Stein's two-stage procedure, 1945). This took {numbers} trials a layer on "
        f"{counted(plan.n_images, 'image')}."
    ]
    if missed := summary["precision"]["not_reached"]:
        widths = measurement.to_pandas().set_index("layer")["half_width"]
        sentences.append(
            f"{len(missed)} of the layers did not reach it within {plan.max_trials} trials (half-widths up to "
            f"{widths[missed].max():.2g})."
        )
    return sentences


def _about_intervals(measurement: Measurement, summary: dict[str, Any]) -> list[str]:
    level = f"{100 * summary['level']:g}%"
    if measurement.record["protocol"].get("interval", "t") == "betting":
        sentences = [
            f"Intervals at {level} are those of hedged betting (Waudby-Smith & Ramdas 2024) on the means of trials, "
            "which assume nothing but that distances lie in [0, 1]; they hold for new trials on the same images."
        ]
    elif summary["covers"] == "trials and images":
        variance = ", estimated by the pilot" if measurement.plan is not None else ""
        shape = "" if measurement.plan is not None else ", limits as of Wilson's score interval (1927)"
        sentences = [
            f"Intervals at {level} take trials and images as crossed random effects{variance}: the standard error "
            f"times Student's quantiles, weighted by the parts of the variance (Cochran 1964){shape}. They hold for "
            "new trials and new images."
        ]
    elif summary["covers"] == "nothing":
        return ["A single trial gives no interval."]
    else:
        sentences = [f"Intervals at {level} are Student's; they hold for new {summary['covers']}."]
    if measurement.record["random_trials"]:
        n_trials = int(measurement.to_pandas()["n_trials"].min())
        sentences.append(
            f"After {n_trials} trials, draws unlike all of these cannot be excluded if they make up less than "
            f"{excluded_share(n_trials):.0%} of all draws."
        )
    return sentences
