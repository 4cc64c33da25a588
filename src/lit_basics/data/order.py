"""Which samples come in which batch: a pure function of (seed, epoch), so that a run resumes at any batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_basics.errors import UserError


def generator(seed: int, *keys: int) -> torch.Generator:
    """Return a CPU generator whose stream depends on all of ``seed`` and ``keys``, but for zeros at their end.

    The keys in use: (epoch) for its order, (0, 1) for the split, (0, 0, 1) for the first flips, (epoch, batch, 2) for
    the other augmentation of a batch.
    """
    state = np.random.SeedSequence((seed, *keys)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


@dataclass(eq=False)
class _Iteration:
    """An iteration that goes on, equal to itself alone."""

    epoch: int
    position: int


class EpochOrder:
    """Batches of sample indices, shared out over ranks, with an exact state.

    Every epoch is a permutation of all samples (or their natural order) cut into global batches, of which
    each rank takes its slice. In training the last, smaller batch is cut to a multiple of the world size, so
    that all ranks take equal shares; in evaluation (``shuffle=False``) rank r takes every world-size-th sample
    from r on, so that each sample comes exactly once.

    Lightning calls :meth:`set_epoch` before each epoch. After ``set_epoch(n)`` an iteration gives epoch n, from its
    beginning or from where a loaded state stood, until one has come to its end: then the next gives epoch n + 1. A look
    at some batches beside the training's iteration does not move it. Without ``set_epoch`` each iteration gives the
    next epoch.

    Args:
        size: Number of samples.
        batch_size: Size of the global batch.
        shuffle: Whether epochs are permuted; also whether this is training, see above.
        seed: Seed of the permutations.
        drop_last: Whether to leave out the last, smaller training batch.
        rank: This process's rank.
        world_size: Number of processes.

    Raises:
        UserError: If ``batch_size`` is below 1 or does not divide by ``world_size``, ``seed`` is negative, there are
            fewer samples than processes, or with ``drop_last`` no batch is full.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.rank = rank
        self.world_size = world_size
        self._epoch_set = 0  # by set_epoch; the order runs ahead of it where it is begun again within
        self._is_set = False  # whether set_epoch was called
        self._loaded: tuple[int, int] | None = None  # the epoch and position of a state, until training goes on there
        self._running: tuple[_Iteration, ...] = ()  # those after set_epoch, the latest last
        self._begin(0, 0)
        check_batch_size(batch_size)
        check_seed(seed)
        if batch_size % world_size:
            raise UserError(
                f"batch_size is {batch_size}; it must be divisible by the number of processes, {world_size} "
                "(devices: 1 trains in a single process)"
            )
        if size < world_size and (size or shuffle):  # nothing to evaluate is nothing on every rank
            raise UserError(f"{size} samples cannot be shared by {world_size} processes")
        if shuffle:
            full, rest = divmod(size, batch_size)
            rest = 0 if drop_last else rest // world_size * world_size
            self._stops = [(i + 1) * batch_size for i in range(full)]
            if rest:
                self._stops.append(full * batch_size + rest)
            if not self._stops:
                raise UserError(f"batch_size is {batch_size}, but with drop_last {size} samples do not fill one batch")
        else:
            local = batch_size // world_size
            shares = [len(range(r, size, world_size)) for r in range(world_size)]
            most, fewest, share = -(-shares[0] // local), -(-shares[-1] // local), shares[rank]
            self._stops = [min(i + local, share) for i in range(0, share, local)]
            if most > fewest and shares[-1] >= most:
                # even parts, so that all ranks come to as many batches: DistributedDataParallel sends at each
                self._stops = [share * (i + 1) // most for i in range(most)]

    def __len__(self) -> int:
        """Return the number of batches of this rank in an epoch."""
        return len(self._stops)

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch`` at the next iteration, unless it is the one in which a loaded state was taken."""
        self._begin(*(self._loaded if self._loaded is not None and epoch == self._epoch_set else (epoch, 0)))
        self._epoch_set, self._is_set, self._running = epoch, True, ()

    def _begin(self, epoch: int, start: int) -> None:
        """Have the next iterations begin at a batch."""
        self.epoch, self._start, self._position = epoch, start, start
        self._begun = self._exhausted = False

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the batch, this rank's sample indices, int64)."""
        moves_on = self._begun and (not self._is_set or (self._position == len(self) and not self._running))
        if moves_on:
            # Lightning does not exhaust a loader, so nothing after the last yield would run: start anew here
            self._begin(self.epoch + 1, 0)
        self._begun = True
        if self._is_set:
            self._loaded = None
        first = 0 if self._running else self._start  # beside the training's, a look at the whole epoch
        order, own = self._samples(), _Iteration(self.epoch, first)
        try:
            for batch in range(first, len(self._stops)):
                start, own.position = self._stops[batch - 1] if batch else 0, batch + 1
                self._stand_at(own)  # there may be another beside this one
                self._exhausted = False
                if self._is_set and (not self._running or self._running[-1] is not own):
                    self._running = (*self._others(own), own)
                yield batch, self._share(order, start, self._stops[batch])
            if not self._is_set:
                self._exhausted = True
                if moves_on:  # a plain loop goes on, and not a fit that is to be resumed
                    self._loaded = None
        finally:
            if own in self._running:  # a look that is over: back to where the training is
                self._running = self._others(own)
                if self._running:
                    self._stand_at(self._running[-1])

    def _stand_at(self, iteration: _Iteration) -> None:
        self.epoch, self._position = iteration.epoch, iteration.position

    def _others(self, own: _Iteration) -> tuple[_Iteration, ...]:
        return tuple(other for other in self._running if other is not own)

    def _samples(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(min(self.rank, self.size), self.size, self.world_size)
        return torch.randperm(self.size, generator=generator(self.seed, self.epoch))

    def _share(self, order: Tensor, start: int, stop: int) -> Tensor:
        if not self.shuffle:
            return order[start:stop]
        share = (stop - start) // self.world_size
        return order[start + self.rank * share : start + (self.rank + 1) * share]

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the number of batches of it that were given out."""
        # after the last batch it is due; after a whole iteration of a plain loop it has been trained on
        epoch, position = (self.epoch + 1, 0) if self._exhausted else (self.epoch, self._position)
        return {"epoch": epoch, "position": position, "set_epoch": self._epoch_set, **self._shape()}

    def _shape(self) -> dict[str, int]:
        return {"size": self.size, "batch_size": self.batch_size, "world_size": self.world_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which :meth:`state_dict` was taken.

        Raises:
            UserError: If that was amid another order: of another size, batch size, world size or seed.
        """
        # at the very beginning any data will do, as after a search for a batch size
        if (state.get("epoch"), state.get("position")) != (0, 0):
            check_same_data(state, self._shape())
        self._loaded = int(state["epoch"]), int(state["position"])
        self._begin(*self._loaded)
        self._epoch_set = int(state["set_epoch"])
        self._is_set, self._running = False, ()


def check_same_data(state: dict[str, Any], shape: dict[str, int]) -> None:
    """Refuse a loader's state that was taken over other data."""
    for name, value in shape.items():
        if (other := state.get(name)) != value:
            raise UserError(
                f"the checkpoint's data had {name} {other}, here it is {value}: cannot resume; by command, "
                "--resume_reset keeps the weights and the optimizer and begins the data anew"
            )


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch size below 1."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")


def check_seed(seed: int, name: str = "seed") -> None:
    """Refuse a seed that no generator takes."""
    if seed < 0:
        raise UserError(f"{name} is {seed}; it must be 0 or more")


def processes() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
