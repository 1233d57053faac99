"""The replay of one subject and one probe set: opened when needed, in batches that fit into memory."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from layercrit.engine.calibration import calibrate
from layercrit.engine.graph_replay import GraphReplay
from layercrit.engine.norm_statistics import NormStatistics
from layercrit.engine.opening import open_replay, reopen
from layercrit.engine.replay import Mode, Replay
from layercrit.engine.subject import Subject
from layercrit.errors import LayercritError, first_line
from layercrit.machine import choose_batch_size, is_out_of_memory, multiplies_bfloat16
from layercrit.probes.probe_set import ProbeSet

__all__ = ["ReplayHolder"]

_CALIBRATION_LAYERS = 12
# FLOPs from which `auto` considers bfloat16, where a calibration pays: some 20 s on a CPU, and so many more on a GPU.
_LONG_JOB, _GPU_IS_FASTER = 4e12, 100

Result = TypeVar("Result")

_LOG = logging.getLogger(__name__)


class ReplayHolder:
    """Holds the replay of one subject and one probe set.

    A replay fits one batch size. When memory runs out it is dropped, and opened again for batches of half the size in
    the mode that was chosen first.

    Attributes:
        mode: the mode of the replay that was opened last.
        backend: its backend.
        batch_size: how many images are run at once.
        seconds_opening: the time that opening replays took.

    Args:
        subject: the network, its layers and what is drawn for them.
        probe_set: the images.
        dtype: what the protocol asks for.
        batch_size: what the protocol asks for.
        mode: the replay's mode, where an earlier session with the same protocol chose it.
        notes: the list to which notes for the user are added.
        say: called with a message when batches become smaller.
        statistics: what becomes of the running statistics of normalisation layers; None: they stay as trained.
    """

    mode: Mode
    backend: str

    def __init__(
        self,
        subject: Subject,
        probe_set: ProbeSet,
        *,
        dtype: str,
        batch_size: int | str,
        mode: Mode | None,
        notes: list[str],
        say: Callable[[str], None],
        statistics: NormStatistics | None = None,
    ) -> None:
        size = probe_set.preprocessing
        n_estimated = 0 if statistics is None else statistics.n_images
        self.batch_size = choose_batch_size(
            batch_size, probe_set.n_images, size.height, size.width, subject.device, n_estimated
        )
        self.seconds_opening = 0.0
        self._subject, self._probe_set, self._notes, self._say = subject, probe_set, notes, say
        self._statistics = statistics
        self._wanted: str = dtype if mode is None else mode
        self._replay: Replay | None = None

    @property
    def network(self) -> nn.Module:
        """The trained network."""
        return self._subject.network

    @property
    def replay(self) -> Replay:
        """The replay, opened if need be."""
        if self._replay is None:
            self._replay = self._open()
        return self._replay

    def run(self, work: Callable[[Replay], Result]) -> Result:
        """Do some work; if memory runs out, do it again with half the batch size, and say so."""
        while True:
            try:
                return work(self.replay)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Only here, where the error's traceback no longer holds the tensors that were too many:
            self._replay = None
            self._probe_set.leave_gpus()
            if self.batch_size == 1:
                raise LayercritError(
                    f"Out of memory on {self._subject.device} even with a batch of one image ({reason}). "
                    "Close other programs, or use a smaller network or another device (--device)."
                )
            self.batch_size //= 2
            self._notes.append(f"out of memory: batch size halved to {self.batch_size}")
            self._say(self._notes[-1])

    def batches(self) -> Iterator[tuple[Tensor, int]]:
        """Yield `batch` after `batch`, from the first image on."""
        start = 0
        while start < self._probe_set.n_images:
            images, n = self.batch(start)
            yield images, n
            start += n

    def batch(self, start: int) -> tuple[Tensor, int]:
        """Return a full batch of normalised images, and how many of them count: the last one repeats to fill it."""
        pixels = self._probe_set.batch_on(self._subject.device, start, start + self.batch_size)
        n = len(pixels)
        if n < self.batch_size:
            pixels = torch.cat([pixels, pixels[-1:].expand(self.batch_size - n, *pixels.shape[1:])])
        return self._subject.normalise(pixels), n

    def _open(self) -> Replay:
        started = time.perf_counter()
        images, _ = self.batch(0)
        if self._wanted == "auto":
            replay = self._fastest(images)
        else:
            mode = cast(Mode, self._wanted)
            replay = self._open_in(mode, images)
        self.mode = self._wanted = replay.mode
        self.backend = replay.backend
        if replay.note and replay.note not in self._notes:
            self._notes.append(replay.note)
        seconds = time.perf_counter() - started
        self.seconds_opening += seconds
        _LOG.info(
            "%s, %s, on %s, in batches of %d; opened in %.1f s%s",
            *(replay.backend, replay.mode, self._subject.device, self.batch_size, seconds),
            f"; {replay.note}" * bool(replay.note),
        )
        return replay

    def _open_in(self, mode: Mode, images: Tensor) -> Replay:
        subject = self._subject
        layers_of = None if self._statistics is None else self._statistics.layers_with_statistics
        return open_replay(subject.network, subject.layers, images, mode, subject.model.read_logits, layers_of)

    def _fastest(self, images: Tensor) -> Replay:
        """Return a bfloat16 replay if it pays and its error on one batch is tolerable, else the float32 one."""
        subject = self._subject
        float32 = self._open_in("float32", images)
        if not isinstance(float32, GraphReplay) or not multiplies_bfloat16(subject.device):
            return float32
        flops, after = subject.flops
        long = _LONG_JOB * (1 if subject.device.type == "cpu" else _GPU_IS_FASTER)
        if flops * subject.n_trials * self._probe_set.n_images * (1 + sum(after.values())) < long:
            return float32
        bfloat16 = reopen(float32, images, "bfloat16")
        if bfloat16.mode != "bfloat16":
            return bfloat16  # its note says why it is another
        some = subject.layers[:: math.ceil(len(subject.layers) / _CALIBRATION_LAYERS)]
        changes = list(subject.changes(0, some))
        if self._statistics is not None:
            changes = [self._statistics.with_trained(change) for change in changes]
        calibration = calibrate(float32, bfloat16, changes, images)
        if calibration.tolerable:
            self._notes.append(f"bfloat16: {calibration}")
            return bfloat16
        self._notes.append(f"float32, since bfloat16 is too inexact: {calibration}")
        return float32
