"""Small labelled images that networks can learn, as files that training reads."""

from pathlib import Path

import numpy as np

ARCHITECTURE = "py:layercrit.demo:small_resnet?num_classes=3"


def stripes(n_images: int, seed: int = 0, size: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Grey noise with stripes that lie across, upright, or nowhere; and which."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n_images) % 3
    images = generator.integers(0, 120, (n_images, size, size))
    for image, label, phase in zip(images, labels, generator.integers(0, 4, n_images), strict=True):
        if label == 0:
            image[phase::4] += 120
        if label == 1:
            image[:, phase::4] += 120
    return images.astype(np.uint8), labels.astype(np.int64)


def write_images(path: Path, n_train: int = 96, n_test: int = 48) -> Path:
    """Write an npz file with a part for training and one for tests."""
    images, labels = stripes(n_train)
    test_images, test_labels = stripes(n_test, seed=1)
    np.savez(path, images=images, labels=labels, test_images=test_images, test_labels=test_labels)
    return path
