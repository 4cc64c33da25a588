"""A net of one's own, in plain PyTorch."""

from torch import nn


class SmallNet(nn.Sequential):
    def __init__(self, width=16):
        super().__init__(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * width, 10),
        )
