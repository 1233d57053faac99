"""Self-supervised methods: pretraining without labels, with the losses and heads of lightly."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layercrit.training.methods import Inputs, Learner, method, setting
from layercrit.training.self_supervised import (
    MultiCrop,
    Pretraining,
    SelfSupervised,
    full_precision,
    gathering,
    local_size,
    need_lightly,
)

__all__ = ["BarlowTwins", "Dino", "MocoV3", "SimClr", "Swav", "VicReg"]


class Siamese(Pretraining):
    """Two views of an image through one network and one projection head.

    Attributes:
        head: the projection head, from features to ``(n_images, output_dim)``.
        loss: computed from the two views' projections.
    """

    def __init__(
        self, network: nn.Module, inputs: Inputs, make_head: Callable[[int], nn.Module], loss: nn.Module
    ) -> None:
        super().__init__(network, inputs)
        self.head = make_head(self.n_features)
        self.loss = loss

    def forward(self, views: Sequence[Tensor], labels: Tensor, progress: float) -> Tensor:
        """Return the loss of the two views; BatchNorm sees one view at a time."""
        features = [self.features(self.network, [view])[0] for view in views]
        with full_precision(views):
            loss: Tensor = self.loss(*(self.head(one) for one in features))
            return loss


@method(
    "simclr",
    category="contrastive",
    changes="two views of an image attract, other images repel; then a linear head",
    paper="Chen et al. 2020, arXiv 2002.05709",
)
@dataclass(frozen=True)
class SimClr(SelfSupervised):
    """Contrastive learning (section 2; appendix B.9 suggests ``jitter=0.5`` and lr 1 to 1.5 for CIFAR)."""

    epochs: int = setting(1000, "of pretraining: passes over the training images", low=1)
    temperature: float = setting(0.1, "temperature of the contrastive loss", low=0.001)
    head_epochs: int = setting(90, "of the linear head: passes over the training images", low=1)

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return a learner with a two-layer head and the NT-Xent loss (equation 1)."""
        need_lightly()
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead

        loss = NTXentLoss(self.temperature, gather_distributed=gathering())
        return Siamese(network, inputs, lambda n: SimCLRProjectionHead(n, self.hidden_dim, self.output_dim), loss)


@method(
    "barlow_twins",
    category="contrastive",
    changes="two views' embeddings correlate, their components do not; then a linear head",
    paper="Zbontar et al. 2021, arXiv 2103.03230",
)
@dataclass(frozen=True)
class BarlowTwins(SelfSupervised):
    """Drives the cross-correlation matrix of two views towards the identity (section 2)."""

    colours: ClassVar[tuple[float, float, float, float]] = (0.4, 0.4, 0.2, 0.1)
    blurred: ClassVar[tuple[float, float]] = (1.0, 0.1)
    solarised: ClassVar[tuple[float, float]] = (0.0, 0.2)

    epochs: int = setting(1000, "of pretraining: passes over the training images", low=1)
    batch_size: int = setting(2048, "images per step, over all processes", low=1)
    lr: float = setting(1.6, "of pretraining: peak learning rate, at this batch size", low=0)
    weight_decay: float = setting(
        1.5e-6, "of pretraining: weight decay, not applied to biases and normalisation", low=0
    )
    hidden_dim: int = setting(8192, "width of the projection head's hidden layers", low=1)
    output_dim: int = setting(8192, "width of the projection head's output", low=2)
    redundancy: float = setting(0.005, "weight of the redundancy reduction term", low=0)
    head_lr: float = setting(2.4, "of the linear head: peak learning rate, at this batch size", low=0)

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return a learner with a three-layer head and the loss of equation 1."""
        need_lightly()
        from lightly.loss import BarlowTwinsLoss
        from lightly.models.modules.heads import BarlowTwinsProjectionHead

        loss = BarlowTwinsLoss(self.redundancy, gather_distributed=gathering())
        return Siamese(network, inputs, lambda n: BarlowTwinsProjectionHead(n, self.hidden_dim, self.output_dim), loss)


@method(
    "vicreg",
    category="contrastive",
    changes="two views' embeddings agree, vary over images and are decorrelated; then a linear head",
    paper="Bardes et al. 2022, arXiv 2105.04906",
)
@dataclass(frozen=True)
class VicReg(SelfSupervised):
    """Variance-invariance-covariance regularisation of two views (section 4)."""

    colours: ClassVar[tuple[float, float, float, float]] = (0.4, 0.4, 0.2, 0.1)
    solarised: ClassVar[tuple[float, float]] = (0.1, 0.1)

    epochs: int = setting(1000, "of pretraining: passes over the training images", low=1)
    batch_size: int = setting(2048, "images per step, over all processes", low=1)
    lr: float = setting(1.6, "of pretraining: peak learning rate, at this batch size", low=0)
    hidden_dim: int = setting(8192, "width of the projection head's hidden layers", low=1)
    output_dim: int = setting(8192, "width of the projection head's output", low=2)
    invariance: float = setting(25.0, "weight of the invariance term: distance between two views", low=0)
    variance: float = setting(25.0, "weight of the variance term: variation over images", low=0)
    covariance: float = setting(1.0, "weight of the covariance term: covariance between components", low=0)
    head_lr: float = setting(0.16, "of the linear head: peak learning rate, at this batch size", low=0)

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return a learner with a three-layer head and the loss of equation 6."""
        need_lightly()
        from lightly.loss import VICRegLoss
        from lightly.models.modules.heads import VICRegProjectionHead

        loss = VICRegLoss(self.invariance, self.variance, self.covariance, gather_distributed=gathering())
        return Siamese(network, inputs, lambda n: VICRegProjectionHead(n, self.hidden_dim, self.output_dim), loss)


def teacher_momentum(start: float, progress: float) -> float:
    """Return the momentum of a teacher's update, which rises from ``start`` to 1 along half a cosine."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


@method(
    "moco_v3",
    category="contrastive",
    changes="contrastive learning against a momentum encoder; then a linear head",
    paper="Chen et al. 2021, arXiv 2104.02057",
)
@dataclass(frozen=True)
class MocoV3(SelfSupervised):
    """Contrastive learning with a momentum encoder; defaults of the authors' 300-epoch ResNet-50."""

    colours: ClassVar[tuple[float, float, float, float]] = (0.4, 0.4, 0.2, 0.1)
    blurred: ClassVar[tuple[float, float]] = (1.0, 0.1)
    solarised: ClassVar[tuple[float, float]] = (0.0, 0.2)
    paper_scale: ClassVar[float] = 0.2

    epochs: int = setting(300, "of pretraining: passes over the training images", low=1)
    hidden_dim: int = setting(4096, "width of the heads' hidden layers", low=1)
    output_dim: int = setting(256, "width of the heads' outputs", low=1)
    temperature: float = setting(1.0, "temperature of the contrastive loss", low=0.001)
    teacher_momentum: float = setting(0.99, "momentum of the teacher's update at the start; rises to 1", low=0, high=1)
    head_epochs: int = setting(90, "of the linear head: passes over the training images", low=1)

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return a learner with the network and its momentum encoder."""
        return MomentumContrast(network, inputs, self)


class MomentumContrast(Pretraining):
    """MoCo v3 (algorithm 1).

    Attributes:
        head: the projection head, from features to ``(n_images, output_dim)``.
        predictor: from the head's output to a prediction of the teacher's.
        teacher: the momentum encoder, a moving average of the network.
        teacher_head: a moving average of the head.
        settings: of the method.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, settings: MocoV3) -> None:
        super().__init__(network, inputs)
        from lightly.models.modules.heads import BYOLPredictionHead, MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        hidden, output = settings.hidden_dim, settings.output_dim
        self.settings = settings
        self.head = MoCoProjectionHead(self.n_features, hidden, output, num_layers=2, batch_norm=True)
        self.predictor = BYOLPredictionHead(output, hidden, output)
        self.teacher, self.teacher_head = copy.deepcopy(network), copy.deepcopy(self.head)
        deactivate_requires_grad(self.teacher)
        deactivate_requires_grad(self.teacher_head)

    def forward(self, views: Sequence[Tensor], labels: Tensor, progress: float) -> Tensor:
        """Return the loss of both views' predictions; BatchNorm sees one view at a time."""
        features = [self.features(self.network, [view])[0] for view in views]
        with torch.no_grad():
            targets = [self.features(self.teacher, [view])[0] for view in views]
        with full_precision(views):
            queries = [self.predictor(self.head(one)) for one in features]
            with torch.no_grad():
                keys = [self.teacher_head(one) for one in targets]
            return self.contrast(queries[0], keys[1]) + self.contrast(queries[1], keys[0])

    def contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the InfoNCE loss of queries and their keys, both ``(n_images, output_dim)``."""
        from lightly.utils.dist import gather, rank, world_size

        queries, keys = F.normalize(queries), F.normalize(keys)
        if world_size() > 1:
            keys = torch.cat(gather(keys))
        similarities = queries @ keys.T / self.settings.temperature  # (n_images, n_images of all processes)
        own = torch.arange(len(queries), device=queries.device) + len(queries) * rank()
        return 2 * self.settings.temperature * F.cross_entropy(similarities, own)

    def after_step(self, progress: float) -> None:
        """Update the teacher."""
        from lightly.models.utils import update_momentum

        kept = teacher_momentum(self.settings.teacher_momentum, progress)
        update_momentum(self.network, self.teacher, m=kept)
        update_momentum(self.head, self.teacher_head, m=kept)


class Prototypes(nn.Module):
    """Cosine similarities of outputs to learned directions.

    Attributes:
        weight: the directions, not normalised, ``(n_prototypes, n_features)``.
    """

    def __init__(self, n_features: int, n_prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_prototypes, n_features))

    def forward(self, outputs: Tensor, learn: bool) -> Tensor:
        """Return cosine similarities ``(n_images, n_prototypes)``; gradients of prototypes are 0 without ``learn``."""
        # Zero gradients instead of none: distributed training waits for the gradient of every parameter.
        weight = self.weight if learn else self.weight.detach() + 0 * self.weight
        return F.linear(F.normalize(outputs), F.normalize(weight))


@method(
    "swav",
    category="contrastive",
    changes="a view predicts the cluster assignment of another; multi-crop; then a linear head",
    paper="Caron et al. 2020, arXiv 2006.09882",
)
@dataclass(frozen=True)
class Swav(MultiCrop):
    """Swapped prediction of cluster assignments, without a queue: use batches of at least ``n_prototypes`` images."""

    temperature: float = setting(0.1, "temperature of the softmax over prototypes", low=0.001)
    n_prototypes: int = setting(3000, "number of prototypes, i.e. clusters", low=2)
    frozen_epochs: float = setting(1.0, "epochs at the start during which the prototypes are frozen", low=0)
    head_lr: float = setting(4.8, "of the linear head: peak learning rate, at this batch size", low=0)

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return a learner with the network and its prototypes."""
        return SwappedPrediction(network, inputs, self)


class SwappedPrediction(Pretraining):
    """SwAV (section 3.1).

    Attributes:
        head: the projection head, from features to ``(n_images, output_dim)``.
        prototypes: the cluster centres.
        loss: computed from the similarities to prototypes of large and of small views.
        settings: of the method.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, settings: Swav) -> None:
        super().__init__(network, inputs, [local_size(inputs)] if settings.n_local_views else [])
        from lightly.loss import SwaVLoss
        from lightly.models.modules.heads import SwaVProjectionHead

        self.settings = settings
        self.head = SwaVProjectionHead(self.n_features, settings.hidden_dim, settings.output_dim)
        self.prototypes = Prototypes(settings.output_dim, settings.n_prototypes)
        self.loss = SwaVLoss(settings.temperature, sinkhorn_gather_distributed=gathering())

    def forward(self, views: Sequence[Tensor], labels: Tensor, progress: float) -> Tensor:
        """Return the loss of all views with the cluster assignments of the first two as targets."""
        features = self.features(self.network, views)
        learn = progress * self.settings.epochs >= self.settings.frozen_epochs
        with full_precision(views):
            # One pass through the head, whose BatchNorm sees all views (as in the authors' code).
            projected = self.prototypes(self.head(torch.cat(features)), learn).chunk(len(views))
            loss: Tensor = self.loss(list(projected[:2]), list(projected[2:]))
            return loss.squeeze()


@method(
    "dino",
    category="contrastive",
    changes="self-distillation from a momentum teacher; multi-crop; then a linear head",
    paper="Caron et al. 2021, arXiv 2104.14294",
)
@dataclass(frozen=True)
class Dino(MultiCrop):
    """Self-distillation without labels; the teacher is kept. Defaults of the authors' code for ResNet-50."""

    colours: ClassVar[tuple[float, float, float, float]] = (0.4, 0.4, 0.2, 0.1)
    blurred: ClassVar[tuple[float, float]] = (1.0, 0.1)
    solarised: ClassVar[tuple[float, float]] = (0.0, 0.2)

    optimizer: str = setting("sgd", "of pretraining: name of an optimizer in timm")
    lr: float = setting(0.48, "of pretraining: peak learning rate, at this batch size", low=0)
    weight_decay: float = setting(1e-4, "of pretraining: weight decay, not applied to biases and normalisation", low=0)
    head_norm: bool = setting(
        True, "whether the projection head has BatchNorm, as the paper's has for convolutional networks"
    )
    bottleneck_dim: int = setting(256, "width of the projection head's bottleneck, before the prototypes", low=1)
    output_dim: int = setting(65536, "number of prototypes", low=2)
    temperature: float = setting(0.1, "temperature of the student", low=0.001)
    teacher_temperature: float = setting(0.07, "temperature of the teacher after warmup", low=0.001)
    first_teacher_temperature: float = setting(0.04, "temperature of the teacher at the start", low=0.001)
    teacher_warmup_epochs: float = setting(50.0, "epochs over which the teacher's temperature rises", low=0)
    teacher_momentum: float = setting(0.996, "momentum of the teacher's update at the start; rises to 1", low=0, high=1)
    center_momentum: float = setting(0.9, "momentum of the centre of the teacher's outputs", low=0, high=1)
    frozen_epochs: float = setting(1.0, "epochs at the start during which the prototypes are frozen", low=0)
    head_lr: float = setting(0.016, "of the linear head: peak learning rate, at this batch size", low=0)

    def learner(self, network: nn.Module, inputs: Inputs) -> Learner:
        """Return a learner with the network as teacher and a trainable student."""
        return SelfDistillation(network, inputs, self)


class DinoHead(nn.Module):
    """From features to cosine similarities to prototypes (appendix C).

    Attributes:
        layers: the three layers from features to the bottleneck.
        prototypes: the last layer, with weights of norm 1.
    """

    def __init__(self, n_features: int, settings: Dino) -> None:
        super().__init__()
        from lightly.models.modules.heads import ProjectionHead

        hidden, bottleneck, normed = settings.hidden_dim, settings.bottleneck_dim, settings.head_norm
        self.layers = ProjectionHead(
            [
                (n_features, hidden, nn.BatchNorm1d(hidden) if normed else None, nn.GELU()),
                (hidden, hidden, nn.BatchNorm1d(hidden) if normed else None, nn.GELU()),
                (hidden, bottleneck, None, None),
            ]
        )
        for layer in self.layers.modules():
            if isinstance(layer, nn.Linear):
                # The paper's 0.02 at its width of 2048; narrower, tiny outputs would make the first steps too large.
                nn.init.trunc_normal_(layer.weight, std=0.02 * (2048 / layer.in_features) ** 0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.prototypes = Prototypes(bottleneck, settings.output_dim)

    def forward(self, features: Tensor, learn: bool) -> Tensor:
        """Return similarities ``(n_images, n_prototypes)`` for features ``(n_images, n_features)``."""
        cosines: Tensor = self.prototypes(self.layers(features), learn)
        return cosines


class SelfDistillation(Pretraining):
    """DINO (algorithm 1); ``network`` is the teacher, whose features the paper uses, and is not trained by gradients.

    Attributes:
        student: a copy of the network, trained by gradients.
        head: the student's head, from features to ``(n_images, n_prototypes)``.
        teacher_head: the teacher's head, a moving average of the student's.
        loss: includes the running centre of the teacher's outputs.
        settings: of the method.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, settings: Dino) -> None:
        super().__init__(network, inputs, [local_size(inputs)] if settings.n_local_views else [])
        from lightly.loss import DINOLoss
        from lightly.models.utils import deactivate_requires_grad

        self.settings = settings
        self.student = copy.deepcopy(network)
        self.head = DinoHead(self.n_features, settings)
        self.teacher_head = copy.deepcopy(self.head)
        deactivate_requires_grad(network)
        deactivate_requires_grad(self.teacher_head)
        self.loss = DINOLoss(
            settings.output_dim, student_temp=settings.temperature, center_momentum=settings.center_momentum
        )

    def forward(self, views: Sequence[Tensor], labels: Tensor, progress: float) -> Tensor:
        """Return the cross-entropy of the student's views with the teacher's first two, over different views."""
        epoch = progress * self.settings.epochs
        learn = epoch >= self.settings.frozen_epochs
        features = self.features(self.student, views)
        with torch.no_grad():
            targets = self.features(self.network, views[:2])
        with full_precision(views):
            student = self.head(torch.cat(features), learn).chunk(len(views))
            with torch.no_grad():
                teacher = self.teacher_head(torch.cat(targets), learn).chunk(2)
            loss: Tensor = self.loss(list(teacher), list(student), teacher_temp=self.temperature(epoch))
            return loss

    def temperature(self, epoch: float) -> float:
        """Return the teacher's temperature, which rises linearly."""
        first, last = self.settings.first_teacher_temperature, self.settings.teacher_temperature
        risen = min(1.0, epoch / self.settings.teacher_warmup_epochs) if self.settings.teacher_warmup_epochs else 1.0
        return first + (last - first) * risen

    def after_step(self, progress: float) -> None:
        """Update the teacher."""
        from lightly.models.utils import update_momentum

        kept = teacher_momentum(self.settings.teacher_momentum, progress)
        update_momentum(self.student, self.network, m=kept)
        update_momentum(self.head, self.teacher_head, m=kept)
