"""A study of two small networks on two probe sets, whose running statistics matter."""

from safetensors.torch import save_file
from torch import nn

from layercrit.seeds import drawing
from running_jobs import write_pixels
from small_studies import write_study

N = 20


def network():
    """From images ``(n_images, 3, 2, 2)`` to 3 classes, with a normalisation; resets change the layers '1' and '4'."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def write_weights(path, seed):
    with drawing(seed):
        state = network().state_dict()
        state["4.weight"] *= 20
        state["2.running_mean"].normal_(0, 0.2)
        state["2.running_var"].uniform_(0.1, 0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def write(folder, *, protocol=None, images=None, models=None, **sections):
    """Write a study of two networks and two probe sets."""
    models = models or [{"reference": "file:m*.safetensors?arch=py:conditioned_studies:network"}]
    images = images or [
        {"name": "clean", "source": "clean.npz", "n_images": N, "input_size": [3, 2, 2]},
        {"name": "dark", "source": "dark.npz"},
    ]
    protocol = {"norm_statistics": ["trained", "reestimate"]} if protocol is None else protocol
    path = write_study(folder, 0, 2, N, models=models, images=images, protocol=protocol, **sections)
    for seed in range(2):
        write_weights(folder / f"m{seed}.safetensors", seed)
    write_pixels(folder / "clean.npz", N)
    write_pixels(folder / "dark.npz", N, seed=1)
    return path
