"""A small study in a folder of its own: fresh networks in weight files, random images, and the study file."""

import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from layercrit.demo import small_resnet
from layercrit.seeds import drawing

OPTIONS = "arch=py:layercrit.demo:small_resnet&mean=(0.305,)&std=(0.376,)"
"""What a reference ``file:PATH?...`` to one of the weight files says after the question mark."""

N_LAYERS = 23
"""Convolutions and linear layers of the network."""


def write_weights(path, seed):
    """Write the weights that the demo's network has when it is built under a seed."""
    with drawing(seed):
        network = small_resnet()
    save_file(network.state_dict(), path)


def write_images(path, n_images, seed=0):
    """Write random images ``(n_images, 1, 8, 8)`` uint8 and labels in 0 to 9."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (n_images, 1, 8, 8), dtype=np.uint8)
    np.savez(path, images=pixels, labels=generator.integers(0, 10, n_images))


def write_study(folder, n_models=2, trials=2, n_images=24, **sections):
    """Write weight files ``m0.safetensors`` and on, ``images.npz`` and ``study.toml``; return the path of the last.

    Args:
        folder: made where it is missing.
        n_models: how many models, of seeds 0 and on; they are named ``m0`` and on, the first is the baseline.
        trials: of each layer.
        n_images: in ``images.npz``; all are drawn.
        sections: ``study``, ``images``, ``protocol`` or ``module_criticality``: a table whose keys are added and win;
            ``models``: a list of tables that takes the place of the one with a pattern; ``images`` may be such a list
            as well. None as a value leaves a key out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(n_models):
        write_weights(folder / f"m{seed}.safetensors", seed)
    write_images(folder / "images.npz", n_images)
    content = {
        "study": {"baseline": "m0"},
        "images": {"source": "images.npz", "n_images": n_images, "input_size": [1, 8, 8], "resize": 0},
        "protocol": {"trials": trials, "dtype": "float32", "device": "cpu"},
    }
    content |= {name: {} for name in ("module_criticality",) if name in sections}
    models = sections.pop("models", [{"reference": f"file:m*.safetensors?{OPTIONS}"}])
    several = sections.pop("images") if isinstance(sections.get("images"), list) else []
    if several:
        del content["images"]
    tables = [(f"[{name}]", table | sections.pop(name, {})) for name, table in content.items()]
    tables += [("[[images]]", images) for images in several]
    assert not sections, f"sections of a study file: {sections}"
    tables += [("[[models]]", model) for model in models]
    path = folder / "study.toml"
    path.write_text("\n".join(_table(title, values) for title, values in tables), encoding="utf-8")
    return path


def _table(title, values):
    return "\n".join(
        [title, *(f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None), ""]
    )
