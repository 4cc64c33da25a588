"""The DataModules of images: split, batches, augmentation, state."""

import errno
import pickle
import re

import numpy as np
import pytest
import torch
from helpers import epoch_indices, ranks, write_npz
from torch import nn
from torchvision.transforms import v2

from lit_basics import ArrayDataModule, ArrayLoader, EpochOrder, ImageArrays, NpzDataModule, SyntheticCIFAR10, UserError
from lit_basics.data.arrays import channel_statistics
from lit_basics.data.images import Normalize, cut_out, shift_and_flip


class Numbered(ArrayDataModule):
    """Images whose every pixel is their own number, labels too."""

    def load(self):
        x = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
        return ImageArrays(x, torch.arange(100), x[:10], torch.arange(10))


def ready(data):
    data.setup("fit")
    return data


def test_a_random_transform_can_be_pickled():
    """As a local function it could not be sent to a process that is spawned."""
    with pytest.warns(UserWarning, match="applied image by image"):
        data = Numbered(transform=v2.RandomHorizontalFlip())
    assert pickle.loads(pickle.dumps(data)).transform(torch.zeros(2, 1, 8, 8)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": torch.rand(100, 1, 8, 8)}, r"x_train as torch.float32 \(100, 1, 8, 8\); it must be a uint8"),
        ({"x_test": torch.zeros(10, 1, 8, 8, dtype=torch.uint16)}, "x_test as torch.uint16"),
        ({"x_train": torch.zeros(100, 8, 8, dtype=torch.uint8)}, r"x_train as torch.uint8 \(100, 8, 8\)"),
        ({"x_test": np.zeros((10, 1, 8, 8), np.uint8)}, "x_test as ndarray"),
        ({"x_train": torch.zeros(100, 8, 8, 3, dtype=torch.uint8)}, r"x_train of shape \(100, 8, 8, 3\); it must be"),
        ({"y_train": list(range(100))}, "y_train as list; it must be a tensor"),
        ({"y_test": np.arange(10)}, "y_test as ndarray"),
        ({"y_train": torch.arange(99)}, "100 images in x_train, but 99 labels in y_train"),
        ({"y_test": torch.arange(11)}, "10 images in x_test, but 11 labels in y_test"),
    ],
)
def test_what_load_must_not_return_is_refused(change, message):
    """Without ``check_arrays`` images in [0, 1] are divided by 255 once more, and labels are those of other images."""

    class Changed(Numbered):
        def load(self):
            return super().load()._replace(**change)

    with pytest.raises(UserError, match=f"Changed.load returns {message}"):
        ready(Changed(mean=[0.0], std=[1.0]))


def test_a_plain_tuple_is_no_arrays():
    """An AttributeError."""

    class Plain(Numbered):
        def load(self):
            return tuple(super().load())

    with pytest.raises(UserError, match=r"Plain\.load returns a tuple; it must be ImageArrays"):
        ready(Plain())


def test_validation_images_are_split_off_by_seed():
    split = {}
    for seed in (0, 0, 1):
        data = ready(Numbered(8, seed=seed, mean=[0.0], std=[1.0]))
        train = sorted(int(i) for _, y in data.train_dataloader() for i in y)
        val = [int(i) for _, y in data.val_dataloader() for i in y]
        assert sorted(train + val) == list(range(100))
        assert len(val) == 10
        assert split.setdefault(seed, val) == val
    assert split[0] != split[1]
    assert len(ready(Numbered(8, val_size=33)).val_dataloader().sampler._samples()) == 33


def test_batches_hold_what_their_labels_say():
    data = ready(Numbered(8, mean=[0.0], std=[1.0]))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for x, y in loader:
            assert x.dtype == torch.float32
            assert y.dtype == torch.int64
            assert torch.equal((x * 255).round(), y.view(-1, 1, 1, 1).expand_as(x).float())


def test_statistics_are_those_of_the_training_images():
    data = ready(SyntheticCIFAR10(200, 10, val_size=50))
    x = torch.cat([data.normalize(data._arrays.x_train[data._train])])
    assert torch.allclose(x.double().mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(x.double().std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6)


def test_a_checkpoint_has_the_statistics_and_those_given_win():
    """Otherwise other images, here without the validation images, are normalised by their own."""
    trained, other = ready(SyntheticCIFAR10(200, 10, val_size=50)), {"train_images": 100, "test_images": 10}
    for state in (trained.state_dict(), {}):
        data, mean = SyntheticCIFAR10(**other), SyntheticCIFAR10(**other, mean=[0.5])
        for one in (data, mean):
            one.setup("test")  # Lightning restores after it
            one.load_state_dict(state)
            assert torch.equal(one.normalize.std, trained.normalize.std) == bool(state)
        assert torch.equal(data.normalize.mean, trained.normalize.mean) == bool(state)
        assert mean.normalize.mean.flatten().tolist() == [0.5]
    assert SyntheticCIFAR10().state_dict() == {}


def test_a_checkpoints_statistics_hold_until_the_next_checkpoint_or_fit():
    """Else a script that evaluates two runs, or then trains anew, goes on with those of the first."""
    first, second = (ready(SyntheticCIFAR10(size, 10)) for size in (200, 150))
    data = ready(SyntheticCIFAR10(100, 10))
    own = data.state_dict()
    for run in (first, second):
        data.setup("test")
        data.load_state_dict(run.state_dict())
        assert data.state_dict() == run.state_dict()
    data.setup("fit")
    assert data.state_dict() == own
    data.normalize = torch.nn.Identity()  # a subclass's own
    data.load_state_dict(first.state_dict())
    assert data.state_dict() == {}


def test_channel_statistics_are_exact():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    mean, std = channel_statistics(images, torch.arange(len(images)))
    pixels = images.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), rel=1e-12)
    # its mean of squares and its squared mean round differently
    assert channel_statistics(torch.full((90, 1, 8, 8), 25, dtype=torch.uint8), torch.arange(90))[1] == [1.0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_augmentation_is_the_same_at_any_world_size_and_after_a_resume(world_size):
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    options = {"crop": 2, "flip": True, "cutout": 4}

    def loader(rank=0, ranks=1):
        order = EpochOrder(40, 8, shuffle=True, rank=rank, world_size=ranks)
        return ArrayLoader(images, torch.arange(40), order, **options)

    whole = [x for x, _ in loader()]
    shares = [[x for x, _ in loader(rank, world_size)] for rank in range(world_size)]
    assert all(torch.equal(torch.cat(parts), x) for *parts, x in zip(*shares, whole, strict=True))

    resumed, stopped = loader(), loader()
    iterator = iter(stopped)
    next(iterator), next(iterator)
    resumed.load_state_dict(stopped.state_dict())
    assert all(torch.equal(x, y) for (x, _), y in zip(resumed, whole[2:], strict=True))
    assert not torch.equal(whole[0], images[next(iter(loader().sampler))[1]])


@pytest.mark.parametrize(("size", "named"), [(8, False), (8, True), (40, False), (40, True)])
def test_two_loaders_side_by_side_have_an_order_each(size, named):
    """Without ``_readers`` the second is an epoch ahead in a plain loop, and behind in an epoch that is resumed."""
    x = torch.arange(size)
    order, other = (EpochOrder(size, 8, shuffle=True) for _ in range(2))
    first, second, third = ArrayLoader(x, x, order), ArrayLoader(x, -x, order), ArrayLoader(x, -x, other)
    for epoch in range(2):
        for one in (order, other) if named else ():
            one.set_epoch(epoch)
        assert all(torch.equal(y, -z) for (_, y), (_, z) in zip(first, third, strict=True))
    if named:
        order.set_epoch(2)
    with pytest.raises(UserError, match="give each an order of its own"):
        list(zip(first, second, strict=True))
    assert len(list(second)) == len(list(first)), "one after the other"


@pytest.mark.parametrize("batch", [0, 1])
def test_whether_an_image_is_flipped_depends_on_nothing_else(batch):
    """Without a key of its own batch 0 is flipped by what drew the order: 37 % of the even images, 63 % of the odd."""
    index = torch.arange(10000)
    ramps = torch.tensor([0, 1], dtype=torch.uint8).expand(10000, 1, 1, 2)
    loader = ArrayLoader(ramps, index, EpochOrder(10000, 5000, shuffle=True), flip=True)
    x, y = list(loader)[batch]
    flipped = x[:, 0, 0, 0] == 1
    for parity in (0, 1):
        assert flipped[y % 2 == parity].double().mean().item() == pytest.approx(0.5, abs=0.04)


def test_a_batch_is_augmented_by_the_documented_draws():
    """Written out here: flip, rows, columns, and the square's place, from (seed, epoch, batch, 2)."""
    images = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8)
    order = EpochOrder(24, 8, shuffle=True, seed=5)
    order.set_epoch(3)
    batches = list(ArrayLoader(images, torch.arange(24), order, crop=2, flip=True, cutout=4))
    for batch, (x, y) in enumerate(batches):
        state = np.random.SeedSequence((5, 3, batch, 2)).generate_state(1, np.uint64)
        draws = torch.Generator().manual_seed(int(state[0]) >> 1)
        bounds = [(0, 2), (-2, 3), (-2, 3), (0, 13), (0, 13)]
        flip, dy, dx, top, left = (torch.randint(low, high, (8,), generator=draws) for low, high in bounds)
        expected = cut_out(shift_and_flip(images[y], dy, dx, flip.bool()), top, left, 4)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("val_size", [-1, 1.0, float("nan")])
def test_a_split_that_cannot_be_is_refused(val_size):
    with pytest.raises(UserError, match=f"val_size is {val_size}; it must be a fraction"):
        SyntheticCIFAR10(val_size=val_size)


@pytest.mark.parametrize("make", [SyntheticCIFAR10, lambda **flip: ArrayLoader(*[torch.zeros(4)] * 2, None, **flip)])
def test_an_unknown_way_to_flip_is_refused(make):
    """It would mean plain mirroring."""
    with pytest.raises(UserError, match="flip is 'alternate'; it must be True, False or 'alternating'"):
        make(flip="alternate")


@pytest.mark.parametrize("flip", [True, "alternating"])
def test_arrays_on_another_device_stay_there(flip):
    """No value of another device is asked for: on this one there are none."""
    images, normalize = torch.zeros(24, 3, 16, 16, dtype=torch.uint8, device="meta"), Normalize([0.5], [0.5], 3)
    options = {"crop": 2, "flip": flip, "cutout": 4, "normalize": normalize, "indices": torch.arange(24)}
    order = EpochOrder(24, 8, shuffle=True)
    for x, y in ArrayLoader(images, torch.zeros(24, device="meta"), order, **options):
        assert (x.device.type, y.device.type, x.shape, y.shape) == ("meta", "meta", (8, 3, 16, 16), (8,))


class Inverts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("white", torch.full((1, 1, 1), 255, dtype=torch.uint8))

    def forward(self, images):
        return self.white - images


@pytest.mark.filterwarnings("ignore:transform Sequential draws at random")
@pytest.mark.parametrize("transform", [Inverts(), nn.Sequential(v2.RandomHorizontalFlip(), Inverts())])
def test_a_transforms_tensors_follow_the_images_to_their_device(transform):
    data = ready(Numbered(10, mean=[0.0], std=[1.0], transform=transform))
    data._arrays = ImageArrays(*(array.to("meta") for array in data._arrays))  # as setup does on a GPU
    x, y = next(iter(data.train_dataloader()))
    assert (x.device.type, x.shape, y.device.type) == ("meta", (10, 1, 8, 8), "meta")


def test_only_training_images_are_augmented_and_transformed():
    data = ready(Numbered(10, mean=[0.0], std=[1.0], crop=2, flip=True, transform=lambda x: 255 - x))
    for x, y in data.val_dataloader():
        assert torch.equal((x * 255).round(), y.view(-1, 1, 1, 1).expand_as(x).float())
    for x, y in data.train_dataloader():
        assert torch.equal((255 - x * 255).round(), y.view(-1, 1, 1, 1).expand_as(x).float())


def test_a_transform_that_does_not_keep_uint8_is_refused():
    """Without the refusal the pixels are divided by 255 a second time."""
    data = ready(Numbered(10, mean=[0.0], std=[1.0], transform=lambda x: x / 255))
    with pytest.raises(UserError, match=r"transform returns torch.float32; it must keep uint8"):
        next(iter(data.train_dataloader()))


def test_a_random_transform_is_applied_image_by_image():
    with pytest.warns(UserWarning, match="image by image"):
        data = ArrayDataModule(4, transform=v2.RandomHorizontalFlip())
    ramp = torch.arange(8, dtype=torch.uint8).expand(64, 1, 8, 8)
    assert len({tuple(image.flatten().tolist()) for image in data.transform(ramp)}) == 2


@pytest.mark.parametrize("shape", [(20, 8, 8, 3), (20, 8, 8), (20, 8, 8, 1), (20, 28, 20, 3)])
def test_npz_takes_colour_and_grey_of_any_size(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(20, dtype=np.int32)[:, None] % 10
    path = tmp_path / "data.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images[:5], y_test=labels[:5, 0])
    data = ready(NpzDataModule(str(path), val_size=0, mean=[0.0], std=[1.0]))
    x, y = next(iter(data.test_dataloader()))
    channels = shape[3] if len(shape) == 4 else 1
    assert x.shape == (5, channels, *shape[1:3])
    assert torch.equal((x * 255).round().byte().permute(0, 2, 3, 1).flatten(), torch.from_numpy(images[:5]).flatten())
    assert y.tolist() == [0, 1, 2, 3, 4]
    assert data.num_classes == 10


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError("Unable to allocate 1 TiB")])
def test_an_npz_that_cannot_be_read_just_now_is_not_damaged(tmp_path, monkeypatch, error):
    """A good file would be thrown away."""

    def failing(*args, **kwargs):
        raise error

    data = NpzDataModule(write_npz(tmp_path / "images.npz", 40, 10))
    monkeypatch.setattr(np, "load", failing)
    with pytest.raises(UserError, match=f"images.npz cannot be read: {re.escape(str(error))}"):
        data.load()


def test_npz_equals_the_arrays_it_was_written_from(tmp_path):
    path = write_npz(tmp_path / "images.npz", 40, 10)
    for loaded, drawn in zip(NpzDataModule(path).load(), SyntheticCIFAR10(40, 10).load(), strict=True):
        assert torch.equal(loaded, drawn)


def test_synthetic_images_are_cifar_shaped_and_reproducible():
    arrays = SyntheticCIFAR10(300, 50).load()
    assert arrays.x_train.shape == (300, 3, 32, 32)
    assert arrays.x_train.dtype == arrays.x_test.dtype == torch.uint8
    assert set(arrays.y_train.tolist()) == set(range(10))
    assert torch.equal(arrays.x_test, SyntheticCIFAR10(300, 50).load().x_test)
    assert not torch.equal(arrays.x_test, SyntheticCIFAR10(300, 50, image_seed=1).load().x_test)


def test_a_linear_model_cannot_learn_the_synthetic_classes():
    # the least-squares classifier on raw pixels; the network's accuracy is tested by the quickstart recipe
    arrays = SyntheticCIFAR10(10_000, 2_000).load()
    x, x_test = (torch.nn.functional.pad(a.flatten(1).double() / 255, (0, 1), value=1) for a in arrays[::2])
    targets = torch.nn.functional.one_hot(arrays.y_train, 10).double()
    weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(3073, dtype=torch.float64), x.T @ targets)
    assert ((x_test @ weights).argmax(1) == arrays.y_test).double().mean() <= 0.6


def test_python_use_without_a_trainer():
    data = SyntheticCIFAR10(50, 10, batch_size=8)
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (8, 3, 32, 32)
    assert y.shape == (8,)


def test_a_plain_loop_of_two_processes_shares_out_the_samples(tmp_path):
    """Without ``processes()`` each takes all of them."""

    def epochs():
        torch.distributed.init_process_group("gloo")
        loader = SyntheticCIFAR10(100, 10, batch_size=20, val_size=0, with_indices=True).train_dataloader()
        return [[indices.tolist() for _, _, indices in loader] for _ in range(2)]

    first, second = ranks(epochs)
    for epoch in range(2):
        batches = [a + b for a, b in zip(first[epoch], second[epoch], strict=True)]
        assert [index for batch in batches for index in batch] == epoch_indices(0, epoch, 100).tolist()


def test_one_of_mean_and_std_may_be_an_array():
    data = ready(Numbered(8, mean=np.array([0.0])))
    measured = ready(Numbered(8))
    assert float(data.normalize.mean.flatten()) == 0
    assert torch.equal(data.normalize.std, measured.normalize.std)
