"""A torch DataLoader for any map dataset, whose order and random draws a resumed run repeats exactly."""

import copy
import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    default_collate,
)

from lit_basics.data.order import EpochOrder, processes
from lit_basics.errors import UserError

Key = tuple[int, list[int]]
"""What fetches a batch: (epoch, sample indices)."""

REFUSED = {
    "sampler": "shuffle and seed make the order; to leave out samples, give a torch.utils.data.Subset",
    "batch_sampler": "batch_size, shuffle and seed make the batches",
    "generator": "every random draw comes from seed",
}


class ResumableDataLoader(DataLoader[Any]):
    """A torch DataLoader that resumes at any batch, with the samples and the random draws that were due.

    The order is that of an :class:`EpochOrder`: a function of ``seed`` and the epoch. While ``dataset[index]`` runs,
    the generators of ``random``, NumPy and torch (on the CPU) are seeded from ``seed``, the epoch and ``index``; so a
    random transform draws the same for every number of workers and processes and after every resume. ``collate_fn``
    goes on with the draws of the batch's last sample. The process's own generators are left as they were.

    Lightning saves and restores the position of a training loader and puts no sampler of its own over this one.
    Processes are those of ``torch.distributed``, which may be initialised after the loader is made. In training
    (``shuffle=True``) each takes its slice of the global batch; in evaluation (``shuffle=False``) each sample comes
    exactly once; processes have as many batches, unless a batch is one sample for each.

    Args:
        dataset: Anything with ``__getitem__``, for indices from 0 on, and ``__len__``. ``loader.dataset`` wraps it and
            shows its attributes; ``__getitems__`` is not used.
        batch_size: Size of the global batch; it must be divisible by the number of processes.
        shuffle: Whether epochs are permuted; also whether this is training, see above.
        seed: Seed of the order and of the draws.
        drop_last: Whether to leave out the last, smaller training batch.
        collate_fn: Makes a batch of a list of samples; torch's ``default_collate`` by default.
        settings: Any other argument of ``DataLoader`` but ``sampler``, ``batch_sampler`` and ``generator``.

    Raises:
        UserError: If an argument cannot work.
    """

    loads_state_late = True
    """A state may be loaded after ``iter``, until the first batch is drawn: ``load_loaders`` does so."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **settings: Any,
    ) -> None:
        # To predict and to overfit, Lightning makes the loader anew, with a sampler that says what shuffle=False
        # does: from the arguments if it saw them, else from the attributes.
        if isinstance(settings.get("sampler"), GlobalBatches | SequentialSampler) and not shuffle:
            del settings["sampler"]
        if isinstance(dataset, SeededBatches):
            settings.pop("generator", None)
            batch_size, seed, collate_fn = dataset._arguments
            dataset = dataset.dataset
        check_dataset(dataset)
        for name, reason in REFUSED.items():
            if settings.pop(name, None) is not None:
                raise UserError(f"ResumableDataLoader takes no {name}: {reason}")
        if not settings.get("in_order", True):
            raise UserError("in_order is False; a loader that resumes must give its batches in order")
        if seed >= 2**64:
            raise UserError(f"seed is {seed}; it must be less than 2^64")
        if batch_size is None:
            raise UserError("batch_size is None; ResumableDataLoader makes batches: give their global size")
        self._batches = GlobalBatches(len(dataset), batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
        super().__init__(
            SeededBatches(dataset, batch_size, seed, collate_fn or default_collate),
            batch_size=None,
            sampler=self._batches,
            collate_fn=as_it_is,
            generator=torch.Generator(),  # else each start of an epoch would draw from the process's own
            **settings,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of the epoch, from the position on."""
        # the order moves on when a batch is given out; what is fetched in advance runs through a copy of it
        order = iter(self._batches.order)
        for batch in super().__iter__():
            next(order)
            yield batch
        next(order, None)  # an order resumed at its end has not begun: begin and end it

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the epoch and the number of batches of it that were given out."""
        return self._batches.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            UserError: If that was another order: of another size, batch size, world size or seed.
        """
        self._batches.order.load_state_dict(state)


class GlobalBatches(DistributedSampler[Key]):
    """The keys of this process's batches; a DistributedSampler, so that Lightning does not put its own in its place.

    Args:
        size: Number of samples.
        batch_size: Size of the global batch.
        shuffle: Whether epochs are permuted.
        seed: Seed of the permutations.
        drop_last: Whether to leave out the last, smaller batch.
    """

    def __init__(self, size: int, batch_size: int, *, shuffle: bool, seed: int, drop_last: bool) -> None:
        # the base's own would count padded shares
        self._shared = partial(EpochOrder, size, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
        rank, world_size = processes()
        self._order = self._shared(rank=rank, world_size=world_size)

    @property
    def order(self) -> EpochOrder:
        """This process's order."""
        rank, world_size = processes()
        if (rank, world_size) != (self._order.rank, self._order.world_size):
            self._order = self._shared(rank=rank, world_size=world_size)  # the process group came after the loader
        return self._order

    def __len__(self) -> int:
        """Return the number of batches of this process in an epoch."""
        return len(self.order)

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch`` at the next iteration, unless it is the one that a loaded state stands in."""
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[Key]:
        """Return the keys from the position on; it does not move by being read here."""
        order = copy.copy(self.order)
        return ((order.epoch, index.tolist()) for _, index in order)


class SeededBatches(Dataset[Any]):
    """A dataset by batches, collated, with the generators seeded for each sample.

    The batch's key says all that its draws depend on, so that workers keep nothing from batch to batch. What is not
    found here is looked up in the dataset, and set there.

    Args:
        dataset: The dataset of samples.
        batch_size: Size of the global batch.
        seed: Seed of the draws.
        collate_fn: Makes a batch of a list of samples.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.dataset = dataset
        self._arguments = batch_size, seed, collate_fn  # by this name, since a dataset may have a seed of its own

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle asks for these before there is a dataset
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("dataset", "_arguments"):
            super().__setattr__(name, value)
        else:  # as of a worker_init_fn that opens a file, or another transform from now on
            setattr(self.dataset, name, value)

    def __getitem__(self, key: Key) -> Any:
        """Return the batch of a key; the process's generators are afterwards what they were."""
        epoch, indices = key
        _, seed, collate_fn = self._arguments
        kept = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
        try:
            samples = []
            for index in indices:
                seed_generators(seed, epoch, index)
                samples.append(self.dataset[index])
            return collate_fn(samples)
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
            torch.default_generator.set_state(kept[2])


def seed_generators(seed: int, epoch: int, index: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generator for a sample."""
    # 10 µs in all: a SeedSequence alone takes 12, and torch.manual_seed, which reaches for every device, 170
    seeds = struct.unpack("<QIQ", blake2b(struct.pack("<3Q", seed, epoch, index), digest_size=20).digest())
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])


def check_dataset(dataset: Any) -> None:
    """Refuse what has no indices.

    Raises:
        UserError: If it is iterable only, or has no length.
    """
    name = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise UserError(f"{name} has no indices, so it cannot be resumed: give it __getitem__ and __len__")
    try:
        len(dataset)
    except (TypeError, NotImplementedError):
        raise UserError(f"{name} has no length, so its samples have no order: give it __len__") from None


def as_it_is(batch: Any) -> Any:
    """Return a batch that is collated already."""
    return batch
