"""The networks, as plain ``nn.Module``: no Lightning here, so each loads and runs in bare torch."""

import math
from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from lit_basics.errors import UserError

Activation = Literal["tanh", "relu", "sigmoid", "gelu", "silu"]
Pooling = Literal["avg", "max"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
_POOLINGS: dict[str, type[nn.Module]] = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


def _choose(kind: str, name: str, table: dict[str, type[nn.Module]]) -> type[nn.Module]:
    if name not in table:
        raise UserError(f"{kind} is {name!r}; it must be one of {', '.join(table)}")
    return table[name]


class LeNet5(nn.Sequential):
    """LeNet-5 (LeCun et al. 1998), without its sparse connection table and its RBF output layer.

    The paper's tanh is scaled, 1.7159·tanh(2x/3), and its sub-sampling an average with a trained factor and bias for
    each map and a squashing function after it; here both are plain.

    Maps images (N, in_channels, 32, 32) to logits (N, num_classes).

    Args:
        num_classes: Number of classes, 10 for CIFAR-10.
        in_channels: Channels of the images, 3 for colour.
        activation: Name of the activation; the paper's is a scaled ``tanh``.
        pooling: ``avg``, the paper's but for what it trains, or ``max``.

    Raises:
        UserError: If ``activation`` or ``pooling`` has another name.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        activation: Activation = "tanh",
        pooling: Pooling = "avg",
    ) -> None:
        act = _choose("activation", activation, _ACTIVATIONS)
        pool = _choose("pooling", pooling, _POOLINGS)
        layers = {  # the paper's names: c convolution, s sub-sampling, f fully connected
            "c1": nn.Conv2d(in_channels, 6, 5),
            "act1": act(),
            "s2": pool(2),
            "c3": nn.Conv2d(6, 16, 5),
            "act3": act(),
            "s4": pool(2),
            "flatten": nn.Flatten(),
            "c5": nn.Linear(16 * 5 * 5, 120),
            "act5": act(),
            "f6": nn.Linear(120, 84),
            "act6": act(),
            "output": nn.Linear(84, num_classes),
        }
        super().__init__(OrderedDict(layers))


class BlitzNet(nn.Module):
    """The classifier of PyTorch's "60 Minute Blitz": two convolutions, three linear layers.

    Maps images (N, 3, 32, 32) to logits (N, num_classes).
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images ``x`` (N, 3, 32, 32)."""
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.fc1(x.flatten(1)))
        x = torch.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


class ConvNet3(nn.Sequential):
    """Three convolutions, each pooled, and two linear layers, with no activation in between.

    Maps images (N, 3, 32, 32) to logits (N, num_classes). The max-pooling is the only non-linearity.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 5, padding=2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 5, padding=2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 64),
            nn.Linear(64, num_classes),
        )


class SpeedNet(nn.Module):
    """The net of "94 % on CIFAR-10 in seconds" (K. Jordan, https://arxiv.org/abs/2404.00498), 2 M parameters.

    Maps images (N, 3, H, W), sides of 16 pixels or more, to logits (N, num_classes). The first convolution
    whitens 2×2 patches; its weight is set once from images, see :meth:`whiten_`, and not trained. Scales of the
    batch norms are 1 and not trained. The maximum over what is left of the image takes any resolution.

    Args:
        num_classes: Number of classes.
        widths: Channels of the three blocks.
        depth: Convolutions of a block: 2, or 3 with a residual connection over the last two, as for 96 %.
        batch_norm_momentum: Share of a batch in the running statistics.
        logit_scale: Factor of the logits. None: 1/256 of 256 channels, in other nets 1 / √(256 · channels), and a head
            scaled to unit standard deviation.

    Raises:
        UserError: If ``depth`` is neither 2 nor 3.
    """

    def __init__(
        self,
        num_classes: int = 10,
        widths: tuple[int, int, int] = (64, 256, 256),
        depth: int = 2,
        batch_norm_momentum: float = 0.4,
        logit_scale: float | None = None,
    ) -> None:
        if depth not in (2, 3):
            raise UserError(f"depth is {depth}; it must be 2 or 3")
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self._first_filters = self.whiten.weight.clone()
        channels = [24, *widths]
        blocks = (_speed_block(i, o, depth, batch_norm_momentum) for i, o in zip(channels, widths, strict=False))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        self.logit_scale = logit_scale
        if logit_scale is None:
            # so that logits, and what a step does to them, are as large at any width; the source has 256 channels
            self.logit_scale = 1 / math.sqrt(256 * widths[-1])
            with torch.no_grad():
                self.head.weight /= self.head.weight.std()

    @torch.no_grad()
    def whiten_(self, covariance: Tensor) -> None:
        """Set the first convolution: each eigenvector of 2×2 patches scaled to unit variance, and its negative.

        Args:
            covariance: That of the patches, (12, 12), as :func:`patch_covariance` returns it.
        """
        values, vectors = torch.linalg.eigh(covariance.cpu().double())
        filters = (vectors / (values.clamp_min(0) + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    @property
    def whitened(self) -> bool:
        """Whether the first convolution was set: half of its filters are the negatives of the others."""
        filters, negatives = self.whiten.weight.chunk(2)
        return torch.equal(filters, -negatives)

    @property
    def untouched(self) -> bool:
        """Whether the first convolution is as it was made: neither set nor trained, nor loaded."""
        return torch.equal(self.whiten.weight, self._first_filters.to(self.whiten.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images ``x`` (N, 3, H, W)."""
        x = nn.functional.gelu(self.whiten(x))
        # not amax, whose gradient looks for the maximum again: compiled, in bfloat16, it finds none and divides by 0
        x = self.blocks(x).flatten(2).max(2).values
        logits: Tensor = self.head(x) * self.logit_scale
        return logits


class _Residual(nn.Sequential):
    """Adds its input to the output of its layers."""

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return outputs


def _speed_block(channels_in: int, channels_out: int, depth: int, momentum: float) -> nn.Sequential:
    def conv(channels: int) -> nn.Conv2d:
        conv = nn.Conv2d(channels, channels_out, 3, padding=1, bias=False)
        with torch.no_grad():
            nn.init.dirac_(conv.weight[:channels])  # at first a part of the output is the input
        return conv

    def norm() -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(channels_out, eps=1e-12, momentum=momentum)
        norm.weight.requires_grad_(False)
        return norm

    first = [conv(channels_in), nn.MaxPool2d(2), norm(), nn.GELU()]
    if depth == 2:
        return nn.Sequential(*first, conv(channels_out), norm(), nn.GELU())
    rest = [conv(channels_out), norm(), nn.GELU(), conv(channels_out), norm()]
    return nn.Sequential(*first, _Residual(*rest), nn.GELU())


@torch.no_grad()
def patch_covariance(images: Tensor) -> Tensor:
    """Return the covariance (12, 12), about zero, of all 2×2 patches of images (N, 3, H, W).

    The mean is not taken off: normalised images have almost none. Patches that are zero, as of a cut-out square, do
    not count.
    """
    images = images if images.dtype == torch.float64 else images.float()
    with torch.autocast(images.device.type, enabled=False):  # in 16 bits the smallest eigenvalues would be lost
        patches = nn.functional.unfold(images, 2).transpose(1, 2).flatten(0, 1)
        patches = patches[patches.any(1)]
        return patches.T @ patches / max(1, len(patches))


class Line(nn.Module):
    """The straight line w·x + b, with scalar parameters that start at w = 1 and b = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))
        self.b = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return w·x + b, in the shape of ``x``."""
        return self.w * x + self.b


class Quadratic(nn.Module):
    """y = a·x² + b·x + c with parameters a, b, c and a fixed input x; its gradient is (x², x, 1)."""

    x: Tensor

    def __init__(self, a: float = 1.0, b: float = 2.0, c: float = 3.0, x: float = 4.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))
        self.b = nn.Parameter(torch.tensor(b))
        self.c = nn.Parameter(torch.tensor(c))
        self.register_buffer("x", torch.tensor(x))

    def forward(self) -> Tensor:
        """Return y, a scalar."""
        return self.a * self.x**2 + self.b * self.x + self.c


class Square(nn.Module):
    """w = (x + y)² with parameters x and y; its gradient is 2·(x + y) in both."""

    def __init__(self, x: float = 1.0, y: float = 2.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(x))
        self.y = nn.Parameter(torch.tensor(y))

    def forward(self) -> Tensor:
        """Return w, a scalar."""
        return (self.x + self.y) ** 2


class Powers(nn.Module):
    """f = x + y² + z³ with parameters x, y and z; its gradient is (1, 2·y, 3·z²)."""

    def __init__(self, x: float = 1.0, y: float = 2.0, z: float = 3.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(x))
        self.y = nn.Parameter(torch.tensor(y))
        self.z = nn.Parameter(torch.tensor(z))

    def forward(self) -> Tensor:
        """Return f, a scalar."""
        return self.x + self.y**2 + self.z**3
