"""ResNet with bottleneck blocks (arXiv 1512.03385): 101 layers by default."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

__all__ = ["ResNet"]


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolutions beside a shortcut."""

    def __init__(self, given: int, planes: int, stride: int) -> None:
        super().__init__()
        out = 4 * planes
        self.conv1, self.bn1 = nn.Conv2d(given, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or given != out:
            conv = nn.Conv2d(given, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, 4 · planes, h, w)."""
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """Four stages of ``blocks``, the first ``width`` wide."""

    def __init__(
        self, blocks: Sequence[int] = (3, 4, 23, 3), width: int = 64, classes: int = 1000
    ) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages: list[nn.Module] = []
        given = width
        for stage, count in enumerate(blocks):
            planes = width * 2**stage
            for block in range(count):
                stages.append(Bottleneck(given, planes, 2 if stage and not block else 1))
                given = 4 * planes
        self.stages = nn.Sequential(*stages)
        self.output = nn.Linear(given, classes)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of images (b, 3, h, w) and labels (b,)."""
        x = self.stages(self.pool(self.bn(self.conv(images)).relu()))
        return cross_entropy(self.output(x.mean((2, 3))), labels)
