"""AlexNet as PaSE's released code has it: one tower, three fully connected layers."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

__all__ = ["AlexNet"]


class AlexNet(nn.Module):
    """``width`` scales every layer; images are 227 × 227, or ``image``."""

    def __init__(self, width: float = 1.0, classes: int = 1000, image: int = 227) -> None:
        super().__init__()
        a, b, c, d = (int(width * n) for n in (96, 256, 384, 4096))
        self.features = nn.Sequential(
            *(nn.Conv2d(3, a, 11, stride=4), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(b, c, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(c, c, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(c, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )
        side = (((image - 11) // 4 + 1 - 3) // 2 + 1 - 3) // 2 + 1
        side = (side - 3) // 2 + 1
        self.classifier = nn.Sequential(
            *(nn.Linear(b * side * side, d), nn.ReLU()),
            *(nn.Linear(d, d), nn.ReLU()),
            nn.Linear(d, classes),
        )

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of images (b, 3, image, image) and labels (b,)."""
        return cross_entropy(self.classifier(self.features(images).flatten(1)), labels)
