"""A whole measurement once more, slowly and close to its formulas."""

import copy
import hashlib
import json
import math

import numpy as np
import torch


def hashed(*words):
    """The first 8 bytes of the SHA-256 of a JSON list."""
    text = json.dumps(list(words), separators=(",", ":"))
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)


def slow_measurement(network, images, labels, layers, donors):
    """Measure a network by deep copies, one layer, one donor and one image at a time.

    Args:
        network: in evaluation mode.
        images: normalised, ``(n_images, channels, height, width)``.
        labels: ``(n_images,)``, or None.
        layers: name -> the modules that are reset.
        donors: one network per trial.

    Returns:
        Column -> ``(n_layers, n_trials, n_images)`` or ``(n_layers, n_trials)`` in float64; and of the trained network
        ``chance``, ``temperature``, ``top1_accuracy`` and ``loss``.
    """
    before = logits_of(network, images)
    temperature = matched_temperature(before)
    columns = {}
    for modules in layers.values():
        for donor in donors:
            after = logits_of(with_values_of(donor, network, modules), images)
            per_image = distances(softmax(before), softmax(after))
            per_image["cosine_matched"] = distances(softmax(before / temperature), softmax(after / temperature))[
                "cosine"
            ]
            if labels is not None:
                per_image |= scores(after, labels)
                columns.setdefault("recovered_accuracy", []).append(
                    per_image["top1_accuracy"].mean() / scores(before, labels)["top1_accuracy"].mean()
                )
            for name, values in per_image.items():
                columns.setdefault(name, []).append(values)
    shape = (len(layers), len(donors))
    result = {name: np.array(rows).reshape(*shape, *np.shape(rows[0])) for name, rows in columns.items()}
    return result, {"chance": chance(softmax(before)), "temperature": temperature} | (
        {} if labels is None else {name: scores(before, labels)[name].mean() for name in ("top1_accuracy", "loss")}
    )


def with_values_of(donor, network, modules):
    """A copy of the network with the parameters, but not the buffers, of some modules taken from the donor."""
    changed = copy.deepcopy(network)
    with torch.no_grad():
        for name in modules:
            theirs = dict(donor.get_submodule(name).named_parameters())
            for key, parameter in changed.get_submodule(name).named_parameters():
                parameter.copy_(theirs[key])
    return changed


def logits_of(network, images):
    with torch.no_grad():
        return np.concatenate([network(image[None]).double().numpy() for image in images])


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def distances(p, q):
    """Each distance of two sets of predictions ``(n_images, n_classes)``, by its textbook formula."""
    cosine = (p * q).sum(axis=1) / np.sqrt((p**2).sum(axis=1) * (q**2).sum(axis=1))
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = (np.where(a > 0, a * np.log(a / m), 0).sum(axis=1) / 2 for a in (p, q))
        js = sum(terms)
    return {
        "cosine": 1 - cosine,
        "l1": np.abs(p - q).sum(axis=1),
        "l2": np.sqrt(((p - q) ** 2).sum(axis=1)),
        "js": js,
        "top1": (p.argmax(axis=1) != q.argmax(axis=1)).astype(float),
    }


def scores(logits, labels):
    """Cross-entropy, and whether the label is among the first classes of the order by logit."""
    order = np.argsort(-logits, axis=1, kind="stable")
    return {
        "loss": -np.log(softmax(logits)[np.arange(len(labels)), labels]),
        "top1_accuracy": (order[:, :1] == labels[:, None]).any(axis=1).astype(float),
        "top5_accuracy": (order[:, :5] == labels[:, None]).any(axis=1).astype(float),
    }


def chance(p):
    """The mean cosine over all pairs of different images."""
    pairs = [
        p[i] @ p[j] / math.sqrt((p[i] @ p[i]) * (p[j] @ p[j])) for i in range(len(p)) for j in range(len(p)) if i != j
    ]
    return sum(pairs) / len(pairs)


def matched_temperature(logits):
    """The temperature at which the mean entropy is a tenth of the largest possible one, by bisection of ln T."""

    def entropy(log_t):
        p = softmax(logits / math.exp(log_t))
        return -np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0).sum(axis=1).mean()

    low, high = -20.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if entropy(middle) > 0.1 * math.log(logits.shape[1]) else (middle, high)
    return math.exp((low + high) / 2)
