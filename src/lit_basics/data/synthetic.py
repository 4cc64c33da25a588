"""Ten classes drawn by procedure, in CIFAR-10's shapes: no network, no files."""

import math
from typing import Any

import torch
from torch import Tensor

from lit_basics.data.arrays import ArrayDataModule, ImageArrays
from lit_basics.data.order import check_seed, generator
from lit_basics.errors import UserError

ORIENTATIONS = 5
CYCLES = (3.0, 6.0)
"""Waves across the image; the classes are all pairs of an orientation and one of these."""


class SyntheticCIFAR10(ArrayDataModule):
    """Striped images: the class is the direction of the stripes and their width.

    Phase, colours and noise are random, so the mean image of every class is the same: a linear model on raw
    pixels is close to chance, a small convolutional net learns the classes in seconds.

    Args:
        train_images: Number of training images, validation images included.
        test_images: Number of test images.
        noise: Standard deviation of the pixel noise, in grey levels.
        image_seed: Seed of the drawing; ``seed`` is that of the split and the order.
        **kwargs: As :class:`~lit_basics.data.arrays.ArrayDataModule`.

    Raises:
        UserError: If a number of images is below 1.
    """

    def __init__(
        self,
        train_images: int = 10_000,
        test_images: int = 2_000,
        *,
        noise: float = 24.0,
        image_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("train_images", train_images), ("test_images", test_images)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        check_seed(image_seed, "image_seed")
        if noise < 0:
            raise UserError(f"noise is {noise}; it must be 0 or more grey levels")
        self.train_images, self.test_images = train_images, test_images
        self.noise, self.image_seed = noise, image_seed

    def load(self) -> ImageArrays:
        """Draw both splits."""
        return ImageArrays(*self._draw(self.train_images, 0), *self._draw(self.test_images, 1))

    def _draw(self, count: int, split: int) -> tuple[Tensor, Tensor]:
        rng = generator(self.image_seed, split)
        labels = torch.randint(0, ORIENTATIONS * len(CYCLES), (count,), generator=rng)
        angle = math.pi / ORIENTATIONS * (labels % ORIENTATIONS + 0.4 * torch.rand(count, generator=rng) - 0.2)
        cycles = torch.tensor(CYCLES)[labels // ORIENTATIONS]
        phase = 2 * math.pi * torch.rand(count, generator=rng)
        axis = torch.arange(32) / 32
        along = angle.cos()[:, None, None] * axis + angle.sin()[:, None, None] * axis[:, None]
        waves = (2 * math.pi * cycles[:, None, None] * along + phase[:, None, None]).sin()
        # a random contrast a channel, of either sign, around a random brightness
        contrast = 70 * (2 * torch.rand(count, 3, 1, 1, generator=rng) - 1)
        brightness = 96 + 64 * torch.rand(count, 3, 1, 1, generator=rng)
        images = brightness + contrast * waves[:, None]
        images += self.noise * torch.randn(images.shape, generator=rng)
        return images.round_().clamp_(0, 255).to(torch.uint8), labels
