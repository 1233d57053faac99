"""Published CIFAR-10 networks and images, kept outside the project: tests skip where they are absent."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
WEIGHTS, IMAGES = REAL / "resnet20-12fca82f.th", REAL / "cifar10-2000.npz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
needs_real_files = pytest.mark.skipif(not WEIGHTS.is_file(), reason="published networks are not here (../shared/real)")


class Block(nn.Module):
    """Two 3 x 3 convolutions; the shortcut has no parameters (He et al. 2016, section 4.2, option A)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.stride, self.n_new = stride, n_out - n_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(x, (0, 0, 0, 0, self.n_new // 2, self.n_new // 2)))


class ResNet20(nn.Module):
    def __init__(self, n_blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for number, (before, width) in enumerate(pairwise(widths), 1):
            blocks = [Block(before, width, 1 if number == 1 else 2)]
            blocks += [Block(width, width, 1) for _ in range(n_blocks - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))
