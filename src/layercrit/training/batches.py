"""Order and views of the training images, by seeds that are the same for every method and number of workers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from layercrit.errors import TrainingError
from layercrit.probes.images import Preprocessing
from layercrit.restoring import rng_untouched
from layercrit.seeds import seed_generators, seed_of
from layercrit.training.data import Split
from layercrit.training.methods import Inputs, Views

__all__ = ["Batch", "Batches", "held_out_batches", "to_device"]

Batch = tuple[list[Tensor], Tensor]
"""For each view uint8 ``(n_images, channels, height, width)``, and labels ``(n_images,)``."""

_Key = tuple[int, int, int]  # epoch, position in it, image


@dataclass(frozen=True)
class Batches:
    """The batches of a phase of training.

    The order of images depends only on the seed and the epoch, and the random numbers of a view only on these and on
    its position in that order: they are the same for every method, batch size, number of processes and of workers.

    Attributes:
        split: the images.
        views: function that makes views of an image.
        seed: of the run.
        batch_size: number of images per step, over all processes.
        repeats: number of times that each image of a batch occurs in it.
        n_workers: number of data loading processes; 0: load in this process.
    """

    split: Split
    views: Views
    seed: int
    batch_size: int
    repeats: int = 1
    n_workers: int = 0

    @property
    def n_steps(self) -> int:
        """Number of batches per epoch; the last images are left out if they do not fill a batch."""
        return len(self.split) // self.batch_size

    def order(self, epoch: int) -> list[int]:
        """Return the positions of the images of an epoch, in order, each as often as it is repeated."""
        generator = torch.Generator().manual_seed(seed_of("training", self.seed, "order", epoch))
        order = torch.randperm(len(self.split), generator=generator)
        return order.repeat_interleave(self.repeats)[: self.n_steps * self.batch_size].tolist()

    def of_epoch(self, epoch: int, first_step: int = 0, process: int = 0, n_processes: int = 1) -> Iterator[Batch]:
        """Yield the batches of an epoch, or the share of one process in each.

        Args:
            epoch: number of the epoch, which determines order and views.
            first_step: number of batches to skip.
            process: rank of this process.
            n_processes: number of processes; each gets every ``n_processes``-th image of a batch.
        """
        order = self.order(epoch)
        keys = [
            [(epoch, at, order[at]) for at in range(start + process, start + self.batch_size, n_processes)]
            for start in range(first_step * self.batch_size, len(order), self.batch_size)
        ]
        yield from _loader(_ViewsOfImages(self.split, self.views, self.seed), keys, self.n_workers)


class _ViewsOfImages(Dataset[Batch | TrainingError]):
    def __init__(self, split: Split, views: Views, seed: int) -> None:
        self.split, self.views, self.seed = split, views, seed

    def __getitems__(self, keys: Sequence[_Key]) -> Batch | TrainingError:
        """Return a batch or the error: raised in a worker, it would come with the worker's traceback."""
        try:
            return self._batch(keys)
        except TrainingError as error:
            return error

    def _batch(self, keys: Sequence[_Key]) -> Batch:
        """Return a batch; a seed for each image makes its views independent of the batch size."""
        made = []
        with rng_untouched():
            for epoch, position, image in keys:
                seed_generators(seed_of("training", self.seed, "views", epoch, position))
                made.append(self.views(self.split.image(image)))
        views = [torch.stack(list(same)) for same in zip(*made, strict=True)]
        return views, torch.from_numpy(self.split.labels[[image for _, _, image in keys]])


def held_out_batches(
    split: Split, inputs: Inputs, batch_size: int, *, n_workers: int = 0, process: int = 0, n_processes: int = 1
) -> Iterator[Batch]:
    """Yield all images of a split as they are preprocessed for measuring: resized to the network's size, centre crop.

    Each of several processes gets every ``n_processes``-th batch.
    """
    resize = None if inputs.same_size else max(inputs.height, inputs.width)
    centre = Preprocessing(inputs.channels, inputs.height, inputs.width, resize)
    keys = [
        [(0, image, image) for image in range(start, min(start + batch_size, len(split)))]
        for start in range(process * batch_size, len(split), n_processes * batch_size)
    ]
    yield from _loader(_ViewsOfImages(split, lambda image: (torch.tensor(centre(image)),), 0), keys, n_workers)


def _loader(dataset: _ViewsOfImages, keys: Sequence[Sequence[_Key]], n_workers: int) -> Iterator[Batch]:
    batches = DataLoader(
        dataset,
        batch_sampler=keys,  # type: ignore[arg-type]  # torch's annotation allows numbers only
        num_workers=n_workers,
        collate_fn=_as_made,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the default would draw a number from the global generator
    )
    for batch in batches:
        if isinstance(batch, TrainingError):
            raise batch
        yield batch


def _as_made(batch: Any) -> Any:
    return batch


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Return uint8 images as float32 in [0, 1] on the device, channels last."""
    moved = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return moved.to(torch.float32).div_(255)
