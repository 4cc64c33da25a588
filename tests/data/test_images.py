"""Normalisation equal to torchvision's, and augmentation per image."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2

from lit_basics import UserError
from lit_basics.data.images import Normalize, cut_out, is_random, per_image, shift_and_flip

IMAGES = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("mean", "std"), [([0.5] * 3, [0.5] * 3), ([0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]), ([0.0], [1.0])]
)
def test_normalized_values_equal_torchvisions_bit_for_bit(mean, std):
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = [theirs(Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0)))) for image in IMAGES]
    assert torch.equal(Normalize(mean, std, 3)(IMAGES), torch.stack(expected))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([125.3, 123.0, 113.9], [0.2], r"mean is \[125.3, 123.0, 113.9\]; pixels are in \[0, 1\]: divide"),
        ([float("nan")], [0.5], r"mean is \[nan\]"),
        ([0.5], [0.5, float("nan"), 0.5], "it must be positive"),
        ([0.5], [0.0], "it must be positive"),
    ],
)
def test_numbers_of_another_scale_are_refused(mean, std, message):
    """All images would be nearly the same, and training would hardly learn."""
    with pytest.raises(UserError, match=message):
        Normalize(mean, std, 3)


@pytest.mark.parametrize("count", [0, 1, 64, 150])
def test_a_batch_of_any_size_is_normalized_as_its_images_are(count):
    """It is worked on in parts."""
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    normalize = Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26], 3)
    one_by_one = [normalize(image[None]) for image in images] or [torch.empty(0, 3, 8, 8)]
    assert torch.equal(normalize(images), torch.cat(one_by_one))
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(normalize(channels_last), normalize(images))
    assert normalize(channels_last).is_contiguous(memory_format=torch.channels_last)


def test_images_on_another_device_leave_the_numbers_where_they_are():
    """Without copies of its own for each device it cannot normalise on the CPU any more: in forked processes, say."""
    normalize = Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26], 3)
    expected = normalize(IMAGES)
    assert normalize(IMAGES.to("meta")).device == torch.device("meta")
    assert torch.equal(normalize(IMAGES), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_grey_level_is_the_same_on_a_gpu():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    normalize = Normalize([0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616], 3)
    assert torch.equal(normalize(grey.to("cuda")).cpu(), normalize(grey))


def test_every_grey_level_equals_torchvisions():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    theirs = transforms.Normalize([0.3], [0.7])(transforms.ToTensor()(Image.fromarray(grey[0, 0].numpy())))
    assert torch.equal(Normalize([0.3], [0.7], 1)(grey)[0], theirs)


def test_shift_and_flip_equals_pad_crop_and_mirror():
    pad = 4
    draws = torch.Generator().manual_seed(1)
    dy, dx = (torch.randint(-pad, pad + 1, (16,), generator=draws) for _ in range(2))
    flip = torch.rand(16, generator=draws) < 0.5
    padded = torch.nn.functional.pad(IMAGES.float(), (pad,) * 4, mode="reflect").byte()
    for i, image in enumerate(shift_and_flip(IMAGES, dy, dx, flip)):
        y, x = pad + dy[i], pad + dx[i]
        crop = padded[i][:, y : y + 32, x : x + 32]
        expected = crop.flip(2) if flip[i] else crop
        assert torch.equal(image, expected)


def test_cut_out_zeroes_one_square():
    ones = torch.ones(2, 3, 8, 8)
    result = cut_out(ones, torch.tensor([0, 5]), torch.tensor([2, 4]), 3)
    expected = torch.ones(2, 3, 8, 8)
    expected[0, :, 0:3, 2:5] = 0
    expected[1, :, 5:8, 4:7] = 0
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomHorizontalFlip(),
        v2.RandomCrop(28),
        v2.ColorJitter(0.5),
        v2.RandAugment(),
        v2.GaussianBlur(3),
        v2.Compose([v2.Resize(28), v2.RandomErasing()]),
        v2.RandomApply([v2.Resize(28)]),
        v2.RandomChoice([v2.Resize(28), v2.Resize(30)]),
        transforms.RandomCrop(28),
        transforms.RandAugment(),
        transforms.ColorJitter(0.5),
    ],
)
def test_transforms_that_draw_are_known(transform):
    assert is_random(transform)


@pytest.mark.parametrize(
    "transform",
    [
        v2.Resize(28),
        v2.CenterCrop(28),
        v2.Pad(2),
        v2.Grayscale(3),
        v2.Normalize([0.5], [0.5]),
        v2.ToDtype(torch.float32),
        v2.Identity(),
        v2.Compose([v2.Resize(28), v2.Pad(2)]),
        transforms.CenterCrop(28),
        lambda images: images,
    ],
)
def test_transforms_that_do_not_draw_are_known(transform):
    assert not is_random(transform)


def test_a_module_of_the_users_own_around_a_random_transform_is_known():
    class Own(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, images):
            return self.inner(images)

    assert is_random(Own(v2.RandomCrop(28)))
    assert is_random(v2.Compose([v2.Pad(2), Own(v2.RandomCrop(28))]))
    assert not is_random(Own(v2.Resize(28)))


def test_per_image_draws_for_each_image():
    torch.manual_seed(0)
    same = IMAGES[:1].expand(32, -1, -1, -1)
    once = v2.RandomHorizontalFlip()(same)
    each = per_image(v2.RandomHorizontalFlip(), same)
    assert len({tuple(image.flatten().tolist()) for image in once}) == 1
    assert len({tuple(image.flatten().tolist()) for image in each}) == 2


def test_wrong_statistics_are_refused():
    with pytest.raises(UserError, match="2 values, but the images have 3"):
        Normalize([0.5, 0.5], [1.0], 3)
    with pytest.raises(UserError, match="positive"):
        Normalize([0.5], [0.0], 3)
