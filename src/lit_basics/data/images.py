"""Image batches as tensors: normalisation equal to torchvision's, and augmentation drawn per image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

from lit_basics.errors import UserError

IN_CACHE = 64
"""Images that are normalised at once on the CPU, so that what is made of them is still in its cache at each step."""


class Normalize:
    """uint8 images to float32: divided by 255, less the mean, divided by the standard deviation.

    Bit for bit what torchvision's ``ToTensor`` and ``Normalize`` make of the same image.

    Args:
        mean: Mean of each channel, or one for all, of pixels in [0, 1].
        std: Standard deviation of each channel, or one for all.
        channels: Number of channels.

    Raises:
        UserError: If a length does not fit ``channels``, a mean is above 1, or a standard deviation is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels: int) -> None:
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise UserError(
                    f"{name} has {len(values)} values, but the images have {channels} channels; for fit, "
                    "--data.mean null --data.std null measures both"
                )
        if not all(value > 0 for value in std):
            raise UserError(f"std is {list(std)}; it must be positive")
        if not all(value <= 1 for value in mean):
            raise UserError(f"mean is {list(mean)}; pixels are in [0, 1]: divide mean and std of 0 to 255 by 255")
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        # by a tensor, which a GPU divides exactly, where it multiplies by the reciprocal of a number
        self._largest = torch.tensor(255.0, dtype=torch.float32)
        self._elsewhere: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}  # a forked process cannot have a GPU's

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 images of the shape of ``images`` (N, C, H, W)."""
        largest, mean, std = self._largest, self.mean, self.std
        if (device := images.device) != mean.device:
            if device not in self._elsewhere:
                self._elsewhere[device] = largest.to(device), mean.to(device), std.to(device)
            largest, mean, std = self._elsewhere[device]
        made = torch.empty_like(images, dtype=torch.float32)
        parts = [(images, made)]
        if images.device.type == "cpu" and len(images) > IN_CACHE:
            parts = list(zip(torch.split(images, IN_CACHE), torch.split(made, IN_CACHE), strict=True))
        for some, out in parts:
            out.copy_(some).div_(largest).sub_(mean).div_(std)
        return made


def shift_and_flip(images: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """Shift each image, filling in by reflection, and mirror some: random crop and flip, given the draws.

    Args:
        images: (N, C, H, W), any dtype.
        dy: Rows to shift by, int64 (N,), each less than H in size.
        dx: Columns to shift by, int64 (N,), each less than W in size.
        flip: Whether to mirror, bool (N,).
    """
    count, channels, height, width = images.shape
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None], columns.flip(0), columns) + dx[:, None]
    rows = torch.arange(height, device=images.device) + dy[:, None]
    index = _reflect(rows, height)[:, :, None] * width + _reflect(columns, width)[:, None, :]
    index = index.view(count, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view_as(images)


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def cut_out(images: Tensor, y: Tensor, x: Tensor, side: int) -> Tensor:
    """Set a square of each image to zero, in place; after normalisation zero is the mean colour.

    Args:
        images: (N, C, H, W), any dtype.
        y: First row of the square, int64 (N,).
        x: First column, int64 (N,).
        side: Rows and columns of the square.
    """
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) - y[:, None]
    columns = torch.arange(width, device=images.device) - x[:, None]
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return images.masked_fill_(inside[:, None], 0)


def per_image(transform: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply ``transform`` to each image, with draws of its own."""
    return torch.stack([transform(image) for image in images])


def is_random(transform: object) -> bool:
    """Return whether a torchvision transform draws at random: once a call, whatever the batch's size.

    >>> is_random(v2.Compose([v2.RandomCrop(28), v2.Resize(32)])), is_random(v2.Resize(32))
    (True, False)
    """
    if isinstance(transform, (v2.Compose, transforms.Compose, nn.Sequential)):
        return any(is_random(t) for t in getattr(transform, "transforms", transform))
    if isinstance(transform, v2.Transform):
        # a deterministic transform overrides neither: draws are made in make_params, chances taken in forward
        kind = type(transform)
        return kind.make_params is not v2.Transform.make_params or (
            kind.forward is not v2.Transform.forward
            and not isinstance(transform, (v2.Identity, v2.Normalize, v2.ToDtype))
        )
    if isinstance(transform, nn.Module) and not type(transform).__module__.startswith("torchvision."):
        return any(map(is_random, transform.children()))  # a module of the user's own around some
    return type(transform).__module__.startswith("torchvision.") and type(transform).__name__.startswith(
        (
            "Random",
            "ColorJitter",
            "AutoAugment",
            "RandAugment",
            "TrivialAugment",
            "AugMix",
            "ElasticTransform",
            "GaussianBlur",
        )
    )
