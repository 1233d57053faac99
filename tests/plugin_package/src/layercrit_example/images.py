import numpy as np

import layercrit
from layercrit.probes import ArraySource


@layercrit.image_source("gratings")
def gratings(rest, options):
    """gratings:N, sine gratings of N orientations in 20 phases each; the option cycles is their frequency."""
    n, cycles = int(rest), float(options.pop("cycles", 4))
    y, x = np.mgrid[:28, :28] / 28
    angles = np.pi * np.arange(n) / n
    across = np.cos(angles)[:, None, None] * x + np.sin(angles)[:, None, None] * y  # (n_orientations, height, width)
    phases = np.arange(20)[:, None, None, None] / 20
    waves = np.sin(2 * np.pi * (cycles * across + phases)).reshape(-1, 28, 28)
    return ArraySource(np.round(127.5 + 127.5 * waves).astype(np.uint8), labels=np.tile(np.arange(n), 20))
