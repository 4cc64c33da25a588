"""Two processes beside one: the same update from the same global batch, each validation sample once."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from lit_basics.verification.tracing import Onlooker, State, digest, finite, random_digest, tensors_of, training_state

RANKS = 2
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def environments(count: int = RANKS) -> list[dict[str, str]]:
    """Return the variables that torchrun would give to each of ``count`` ranks."""
    shared = {"TORCHELASTIC_RUN_ID": "verify", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


@dataclasses.dataclass
class Recorded:
    """What a short run did."""

    epochs: list[list[Any]] = dataclasses.field(default_factory=list)
    """The training batches of each epoch."""
    length: int = 0
    """The batches of an epoch as the Trainer counts them: of a loader without a length, its limit."""
    initial: State = dataclasses.field(default_factory=dict)
    """The trained parameters before the first step."""
    states: list[State] = dataclasses.field(default_factory=list)
    """Parameters and buffers after each step."""
    rates: list[float] = dataclasses.field(default_factory=list)
    """The learning rates of each step."""
    diverged: int = 0
    """The first step after which a trained parameter was not finite, or 0."""
    draws: bool = False
    """Whether random numbers are drawn between a batch's start and its end."""


class Recorder(Onlooker):
    """Keeps the training batches and the state after each step."""

    def __init__(self) -> None:
        self.recorded = Recorded()
        self._random = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights; hold batch-norm and dropout still: they differ from rank to rank by intent."""
        self.recorded.length = int(trainer.num_training_batches)
        trained = {name: value for name, value in pl_module.named_parameters() if value.requires_grad}
        self.recorded.initial = {name: value.detach().clone() for name, value in trained.items()}
        for module in pl_module.modules():
            rate = getattr(module, "dropout", None)  # a number, as of nn.LSTM: it draws by itself
            if isinstance(module, BATCH_NORMS) or "Dropout" in type(module).__name__ or isinstance(rate, (int, float)):
                module.training = False  # and not that of the modules in it
                # nor when the user's module puts itself into training; this process is for this run only
                module.train = partial(train_within, module)  # type: ignore[method-assign]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a list of batches."""
        self.recorded.epochs.append([])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch."""
        kept = apply_to_collection(batch, Tensor, lambda value: value.detach().clone())
        self.recorded.epochs[-1].append(kept)
        self._random = random_digest()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the learning rates."""
        self.recorded.rates += [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the state, if a step was made, and note whether random numbers were drawn."""
        self.recorded.draws |= random_digest() != self._random
        if trainer.global_step > len(self.recorded.states):
            self.recorded.states.append(training_state(pl_module, []))
            if not (self.recorded.diverged or finite(pl_module)):
                self.recorded.diverged = len(self.recorded.states)


class Replay:
    """A loader of recorded batches.

    Args:
        epochs: The batches of each epoch.
        length: How many they are said to be.
    """

    batch_sampler = None

    def __init__(self, epochs: list[list[Any]], length: int) -> None:
        self._epochs, self._length = epochs, length
        self._epoch = 0
        self.sampler = self  # Lightning calls set_epoch of it

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return iter(self._epochs[self._epoch])


def joined(batches: list[Any]) -> Any:
    """Return one batch of the ranks' batches: tensors, and lists of text, are put together along their first dimension.

    Raises:
        RuntimeError: If their other dimensions differ.
        TypeError: If a batch is of a type that is not known.
        ValueError: If lists in them are of different lengths, or dictionaries have different keys.
    """
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(batches) if first.ndim else first
    if isinstance(first, Mapping):
        if any(batch.keys() != first.keys() for batch in batches):
            raise ValueError("dictionaries with other keys")
        parts = {key: joined([batch[key] for batch in batches]) for key in first}
        return parts if type(first) is dict else type(first)(parts)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return dataclasses.replace(first, **{n: joined([getattr(batch, n) for batch in batches]) for n in names})
    if type(first) in (list, tuple) and first and all(isinstance(item, str) for item in first):
        return sum(batches[1:], start=first)  # one text for each sample
    if isinstance(first, PackedSequence):
        return pack_sequence([part for batch in batches for part in unpack_sequence(batch)], enforce_sorted=False)
    if isinstance(first, (list, tuple)):
        items = [joined(list(part)) for part in zip(*batches, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if first is None or isinstance(first, (str, int, float, bool)):
        return first
    raise TypeError(f"a batch of type {type(first).__name__}")


def uneven(batch: Any) -> bool:
    """Return whether the tensors of a batch differ in their first dimension: it is not the sample's in all."""
    return len({len(value) for value in tensors_of(batch, (PackedSequence,))}) > 1


def train_within(module: nn.Module, mode: bool = True) -> nn.Module:
    """Do what ``module.train(mode)`` does, but for the module itself."""
    for child in module.children():
        child.train(mode)
    return module


class Samples(Onlooker):
    """Counts the samples of a validation by their content, and notes whether its steps draw random numbers."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.draws = False
        self._random = ""

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the random state."""
        self._random = random_digest()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch's samples, and note whether random numbers were drawn."""
        self.draws |= random_digest() != self._random
        tensors = tensors_of(batch)
        tensors = [value for value in tensors if len(value) == len(tensors[0])]
        for sample in zip(*tensors, strict=True):
            self.seen[f"{dataloader_idx} {digest(list(sample))}"] += 1
