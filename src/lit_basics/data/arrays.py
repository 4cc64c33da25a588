"""Arrays that stay in memory, on the accelerator where they fit: the loader and the DataModule of images."""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lit_basics.data.images import Normalize, cut_out, is_random, per_image, shift_and_flip
from lit_basics.data.order import EpochOrder, check_batch_size, check_seed, generator, processes
from lit_basics.errors import UserError

Transform = nn.Module | Callable[[Tensor], Any]
"""Makes images of images; not ``Tensor``, of which jsonargparse would want a class to be a subclass."""
Flip = bool | Literal["alternating"]
MEAN, STD = "image_mean", "image_std"
"""The keys of a DataModule's state."""


_readers: weakref.WeakKeyDictionary[EpochOrder, int] = weakref.WeakKeyDictionary()  # the loader that iterates each


class ImageArrays(NamedTuple):
    """A data set of images with its two splits."""

    x_train: Tensor
    """uint8 (N, C, H, W)"""
    y_train: Tensor
    """int64 (N,)"""
    x_test: Tensor
    """uint8 (M, C, H, W)"""
    y_test: Tensor
    """int64 (M,)"""


class ArrayLoader:
    """Batches gathered from tensors, in the order of an :class:`EpochOrder`; resumes at any batch.

    ``Trainer(overfit_batches=...)`` leaves the order as it is: give it one with ``shuffle=False``.

    Args:
        inputs: Tensor (N, …).
        targets: Tensor (N, …) on the same device.
        order: Which samples come in which batch.
        indices: The samples of ``inputs`` that ``order`` counts, int64; all by default.
        normalize: Applied to a gathered batch of images.
        transform: Applied to a gathered batch of images, before ``normalize``.
        crop: Largest random shift of each image, in pixels, filled in by reflection.
        flip: Whether to mirror each image at random; ``alternating``: at random in the first epoch, and then the
            other way in each next one.
        cutout: Side of a square of each image, at a random place, that is set to zero.
        with_indices: Whether a batch has the places of its samples in ``inputs`` too.

    Raises:
        UserError: If ``flip`` is none of its values.
    """

    batch_sampler = None
    """Lightning looks here, then at ``sampler``, whose ``set_epoch`` it calls before each epoch."""
    loads_state_late = True
    """A state may be loaded after ``iter``, until the first batch is drawn: ``load_loaders`` does so."""

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        order: EpochOrder,
        *,
        indices: Tensor | None = None,
        normalize: Normalize | None = None,
        transform: Transform | None = None,
        crop: int = 0,
        flip: Flip = False,
        cutout: int = 0,
        with_indices: bool = False,
    ) -> None:
        check_flip(flip)
        self.inputs, self.targets, self.sampler = inputs, targets, order
        self._with_indices = with_indices
        self._indices = None if indices is None else indices.to(inputs.device)
        self._normalize, self._transform = normalize, transform
        self._crop, self._flip, self._cutout = crop, flip, cutout
        if flip == "alternating":
            draws = generator(order.seed, 0, 0, 1)  # as no batch of any epoch draws
            self._first_flip = torch.randint(2, (len(inputs),), generator=draws).to(inputs.device)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield (inputs, targets), gathered, augmented and normalised, or (inputs, targets, indices).

        Raises:
            UserError: If another loader is iterating over the same order, of which there is one position.
        """
        if _readers.get(self.sampler, id(self)) != id(self):
            raise UserError("two ArrayLoaders side by side have one EpochOrder: give each an order of its own")
        _readers[self.sampler] = id(self)
        try:
            yield from self._batches()
        finally:
            if _readers.get(self.sampler) == id(self):
                del _readers[self.sampler]

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        for batch, index in self.sampler:
            index = sent([index], self.inputs.device)[0]
            if self._indices is not None:
                index = self._indices.index_select(0, index)
            x = self.inputs.index_select(0, index)  # row by row; indexing copies byte by byte on the CPU
            if self._transform is not None:
                x = self._transform(x)
                if self._normalize is not None and x.dtype != torch.uint8:
                    raise UserError(f"transform returns {x.dtype}; it must keep uint8: normalisation comes after it")
            x, y = self._augmented(x, batch, index), self.targets.index_select(0, index)
            yield (x, y, index) if self._with_indices else (x, y)

    def _augmented(self, x: Tensor, batch: int, index: Tensor) -> Tensor:
        crop, cutout = self._crop, self._cutout
        if not (crop or self._flip or cutout):
            return x if self._normalize is None else self._normalize(x)
        order = self.sampler
        # one stream a batch, drawn for all ranks and cut: the same images at any world size and any resume
        draws = generator(order.seed, order.epoch, batch, 2)
        share = slice(order.rank * len(x), (order.rank + 1) * len(x))
        total = len(x) * order.world_size

        def draw(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, (total,), generator=draws)[share]

        alternates = self._flip == "alternating"
        bounds = [(0, 1)] if self._flip and not alternates else []
        bounds += [(-crop, crop)] * 2 if crop or self._flip else []
        bounds += [(0, side - cutout) for side in x.shape[2:]] if cutout else []
        drawn = sent([draw(low, high) for low, high in bounds], x.device)
        if crop or self._flip:
            if alternates:
                flip = self._first_flip[index] != order.epoch % 2
            else:
                flip = drawn.pop(0).bool() if self._flip else torch.zeros(len(x), dtype=torch.bool, device=x.device)
            x = shift_and_flip(x, drawn.pop(0), drawn.pop(0), flip)
        if self._normalize is not None:
            x = self._normalize(x)
        return cut_out(x, drawn[0], drawn[1], cutout) if cutout else x

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the order."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.sampler.load_state_dict(state)


class ArrayDataModule(pl.LightningDataModule):
    """Images in memory, as batches of normalised tensors; subclass it and define :meth:`load`.

    Without a Trainer make each loader once: each iteration of a training loader is the next epoch.

    Args:
        batch_size: Size of the global batch; it must be divisible by the number of processes.
        val_size: Validation images taken from the training images: a fraction (float) or a number (int).
        seed: Seed of the validation split, of the order and of crop, flip and cutout of each epoch.
        mean: Mean of each channel of pixels in [0, 1]; of the training images by default, or a checkpoint's.
        std: Standard deviation of each channel; of the training images by default, or a checkpoint's.
        crop: Largest random shift of a training image, in pixels, filled in by reflection.
        flip: Whether training images are mirrored at random; ``alternating``: at random in the first epoch, and
            then the other way in each next one (https://arxiv.org/abs/2404.00498).
        cutout: Side of a random square of each training image that is set to the mean colour.
        transform: A torchvision v2 transform, or any function, of uint8 training batches (N, C, H, W). One of
            torchvision's that draws at random is applied image by image, which is slower.
        drop_last: Whether to leave out the last, smaller training batch.
        with_indices: Whether a training batch is (images, labels, places of the images in ``x_train``), for a module
            that keeps something of each image.

    Raises:
        UserError: If an argument is out of its range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        *,
        val_size: int | float = 0.1,
        seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop: int = 0,
        flip: Flip = False,
        cutout: int = 0,
        transform: Transform | None = None,
        drop_last: bool = False,
        with_indices: bool = False,
    ) -> None:
        super().__init__()
        check_batch_size(batch_size)
        check_seed(seed)
        check_flip(flip)
        if not val_size >= 0 or (isinstance(val_size, float) and val_size >= 1):
            raise UserError(f"val_size is {val_size}; it must be a fraction in [0, 1) or a number of images")
        for name, value in (("crop", crop), ("cutout", cutout)):
            if value < 0:
                raise UserError(f"{name} is {value}; it must be 0 or more pixels")
        self.batch_size, self.val_size, self.seed, self.drop_last = batch_size, val_size, seed, drop_last
        self.mean, self.std = mean, std
        self.crop, self.flip, self.cutout = crop, flip, cutout
        self.transform, self.with_indices = transform, with_indices
        if transform is not None and is_random(transform):
            warnings.warn(
                f"transform {type(transform).__name__} draws at random: it is applied image by image, which is "
                "slower; crop, flip and cutout are faster",
                stacklevel=2,
            )
            self.transform = partial(per_image, transform)  # which can be pickled
        self._arrays: ImageArrays | None = None
        self._own: Normalize | None = None  # what a fit begins with, while a checkpoint's is in the place of it

    def load(self) -> ImageArrays:
        """Return uint8 images and labels, on the CPU; called once in each process, after ``prepare_data``."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int | None:
        """The largest label plus one; None before ``setup``."""
        if self._arrays is None:
            return None
        return 1 + max(int(y.max()) if len(y) else -1 for y in (self._arrays.y_train, self._arrays.y_test))

    def setup(self, stage: str) -> None:
        """Load the arrays, split off the validation images and move all to the accelerator if they fit."""
        if self._arrays is None:
            self._arrays, self._train, self._val = self._split()
        elif stage == TrainerFn.FITTING and self._own is not None:
            self.normalize, self._own = self._own, None
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if fits(self._arrays, device):
            self._arrays = ImageArrays(*(array.to(device) for array in self._arrays))
            self._train, self._val = self._train.to(device), self._val.to(device)

    def _split(self) -> tuple[ImageArrays, Tensor, Tensor]:
        """Return the arrays, and which of the training images are to train on and which to validate on."""
        arrays = self.load()
        check_arrays(arrays, type(self).__name__)
        size = len(arrays.x_train)
        val = int(self.val_size * size) if isinstance(self.val_size, float) else self.val_size
        if val >= size:
            raise UserError(f"val_size is {self.val_size}, but there are only {size} training images")
        side = min(arrays.x_train.shape[2:])
        for name, value in (("crop", self.crop), ("cutout", self.cutout)):
            if value >= side:
                raise UserError(f"{name} is {value}; it must be less than the images' {side} pixels")
        # sorted: the split is random, the order within it is not its business
        shuffled = torch.randperm(size, generator=generator(self.seed, 0, 1)) if val else torch.arange(size)
        held_out, train = shuffled[:val].sort().values, shuffled[val:].sort().values
        mean, std = self.mean, self.std
        if mean is None or std is None:
            measured_mean, measured_std = channel_statistics(arrays.x_train, train)
            mean = measured_mean if mean is None else mean
            std = measured_std if std is None else std
        self.normalize = Normalize(mean, std, arrays.x_train.shape[1])
        return arrays, train, held_out

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and the standard deviation that images are normalised by; nothing before ``setup``."""
        if self._arrays is None or not isinstance(self.normalize, Normalize):  # a subclass's own
            return {}
        return {MEAN: self.normalize.mean.flatten().tolist(), STD: self.normalize.std.flatten().tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Normalise as in the run that was saved, until the next fit; a given ``mean`` or ``std`` wins."""
        if MEAN not in state_dict or self._arrays is None or not isinstance(self.normalize, Normalize):
            return
        self._own = self._own or self.normalize
        mean = state_dict[MEAN] if self.mean is None else self.mean
        std = state_dict[STD] if self.std is None else self.std
        self.normalize = Normalize(mean, std, self._arrays.x_train.shape[1])

    def train_dataloader(self) -> ArrayLoader:
        """Return the shuffled, augmented training batches."""
        arrays = self._loaded()
        for part in self.transform.args if isinstance(self.transform, partial) else (self.transform,):
            if isinstance(part, nn.Module):  # its buffers go where the images are
                part.to(arrays.x_train.device)
        overfit = bool(self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        return ArrayLoader(
            arrays.x_train,
            arrays.y_train,
            epoch_order(self, len(self._train), shuffle=not overfit),
            indices=self._train,
            normalize=self.normalize,
            transform=self.transform,
            crop=self.crop,
            flip=self.flip,
            cutout=self.cutout,
            with_indices=self.with_indices,
        )

    def val_dataloader(self) -> ArrayLoader | list[Any]:
        """Return the validation batches; an empty list if ``val_size`` is 0."""
        arrays = self._loaded()
        if not len(self._val):
            return no_batches()
        order = epoch_order(self, len(self._val), shuffle=False)
        return ArrayLoader(arrays.x_train, arrays.y_train, order, indices=self._val, normalize=self.normalize)

    def test_dataloader(self) -> ArrayLoader:
        """Return the test batches."""
        arrays = self._loaded()
        order = epoch_order(self, len(arrays.x_test), shuffle=False)
        return ArrayLoader(arrays.x_test, arrays.y_test, order, normalize=self.normalize)

    def predict_dataloader(self) -> ArrayLoader:
        """Return the test batches."""
        return self.test_dataloader()

    def _loaded(self) -> ImageArrays:
        if self._arrays is None:
            self.setup("fit")
        assert self._arrays is not None
        return self._arrays


def check_flip(flip: Flip) -> None:
    """Refuse an unknown value of ``flip``."""
    if flip not in (True, False, "alternating"):
        raise UserError(f"flip is {flip!r}; it must be True, False or 'alternating'")


def check_arrays(arrays: ImageArrays, name: str) -> None:
    """Refuse what a DataModule's ``load`` must not return.

    Args:
        arrays: What it has returned.
        name: The DataModule's class.

    Raises:
        UserError: If they are no :class:`ImageArrays`, images not uint8 (N, C, H, W), labels no tensor, or not as many.
    """
    if not isinstance(arrays, ImageArrays):
        kind = type(arrays).__name__
        raise UserError(f"{name}.load returns a {kind}; it must be ImageArrays(x_train, y_train, x_test, y_test)")
    for split, x, y in (("train", arrays.x_train, arrays.y_train), ("test", arrays.x_test, arrays.y_test)):
        if not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.ndim != 4:
            what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise UserError(f"{name}.load returns x_{split} as {what}; it must be a uint8 tensor (N, C, H, W)")
        if x.shape[-1] in (1, 3) and x.shape[1] > 4:
            raise UserError(f"{name}.load returns x_{split} of shape {tuple(x.shape)}; it must be (N, C, H, W)")
        if not isinstance(y, Tensor):
            raise UserError(f"{name}.load returns y_{split} as {type(y).__name__}; it must be a tensor (N,)")
        if len(y) != len(x):
            raise UserError(f"{name}.load returns {len(x)} images in x_{split}, but {len(y)} labels in y_{split}")


def sent(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return the CPU's tensors of one shape on a device: on a GPU by one copy, which waits for no earlier work."""
    if device.type == "cpu":
        return tensors
    whole = torch.stack(tensors)
    return list(whole.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else whole.to(device))


def no_batches() -> list[Any]:
    """Return an empty list of batches, and spare the user Lightning's warning that it is empty."""
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    return []


def epoch_order(data: ArrayDataModule | Any, size: int, *, shuffle: bool) -> EpochOrder:
    """Return the order of a DataModule's samples for this process, of its Trainer's or of ``torch.distributed``'s.

    Raises:
        UserError: If the batch or the samples cannot be shared out over the processes.
    """
    rank, world_size = processes()
    if data.trainer:  # its kwargs are None on one device; under tensor parallelism a group of processes is one
        shares = data.trainer.distributed_sampler_kwargs or {}
        rank, world_size = shares.get("rank", 0), shares.get("num_replicas", 1)
    share = {"rank": rank, "world_size": world_size}
    return EpochOrder(size, data.batch_size, shuffle=shuffle, seed=data.seed, drop_last=data.drop_last, **share)


def channel_statistics(images: Tensor, indices: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, of pixels in [0, 1].

    Exact: counted from a histogram of the 256 values. A constant channel has standard deviation 1.

    Args:
        images: uint8 (N, C, H, W).
        indices: The images that count, int64.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    histograms = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for part in torch.split(indices, 100):  # some at a time: a copy of all would double the memory
        for counts, pixels in zip(histograms, images.index_select(0, part).unbind(1), strict=True):
            counts += torch.bincount(pixels.flatten(), minlength=256)
    means, stds = [], []
    for counts in histograms.double():
        mean = (counts * values).sum() / counts.sum()
        variance = (counts * (values - mean) ** 2).sum() / counts.sum()
        means.append(mean.item())
        constant = int((counts > 0).sum()) < 2  # rounded, its variance need not be 0
        stds.append(1.0 if constant else variance.sqrt().item())
    return means, stds


def fits(arrays: ImageArrays, device: torch.device) -> bool:
    """Return whether the arrays take at most half of the free memory of an accelerator."""
    if device.type != "cuda":
        return device.type == "cpu"
    free, _ = torch.cuda.mem_get_info(device)
    return sum(array.nbytes for array in arrays) <= free / 2
