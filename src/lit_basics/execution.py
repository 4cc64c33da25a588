"""Several optimizer steps for each batch that Lightning handles: ``steps_per_execution``.

Lightning's work around a batch (a profiler entered for every hook of every callback, results, progress) costs more
than a step of a small net. With K steps per execution it handles every K-th step; the training loader that it is
given, a :class:`StepsInBetween`, makes those in between itself before it hands out the next batch. They are made in
the same order, with the same counters and the same hooks called. So what lies between two batches (weights, random
state, counters, and every checkpoint) is the same for every K.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_basics.errors import UserError
from lit_basics.steps import validates_after

if TYPE_CHECKING:
    from lit_basics.modules import LitSupervised

Hook = Callable[..., Any]

BATCH_HOOKS = (
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end"),
)


class StepsInBetween:
    """A training loader for Lightning: trains on all batches but those that Lightning is to handle.

    Those are every K-th of the epoch (with accumulation: the batch that makes every K-th step), the last, those
    before a validation, the one that makes the step ``max_steps``, and all once the Trainer is asked to stop.
    For the rest it is the loader that it wraps: its length, its state, its samplers.

    Args:
        loader: A loader with a length.
        module: What is trained.

    Raises:
        UserError: If the loader has no length.
    """

    def __init__(self, loader: Any, module: LitSupervised) -> None:
        if sized_len(loader) is None:
            raise UserError(
                f"steps_per_execution is {module.steps_per_execution}, but {type(loader).__name__} has no length: "
                "the last step of an epoch would not be known; give it __len__"
            )
        own = {"loader": loader, "module": module}
        for name in ("state_dict", "load_state_dict"):  # isinstance of a protocol does not ask __getattr__
            if hasattr(loader, name):
                own[name] = getattr(loader, name)
        vars(self).update(own)

    def __len__(self) -> int:
        """Return the number of batches of an epoch, Lightning's and those in between."""
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)["loader"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.loader, name, value)  # Lightning sets worker_init_fn, and resets _iterator

    def __iter__(self) -> Iterator[Any]:
        """Return the iterator over Lightning's batches."""
        # no generator itself: a DataLoader draws from the random state when its iterator is made
        iterator = self._batches(iter(self.loader), lambda: is_lightnings_own(self.module.trainer, itself()))
        # it must not hold itself: Lightning leaves it at an epoch's last batch, and its workers with it
        itself = weakref.ref(iterator)
        return iterator

    def _batches(self, batches: Iterator[Any], trains: Callable[[], bool]) -> Iterator[Any]:
        if not trains():  # a callback's, or the module's, that looks at some batches
            yield from batches
            return
        step = Step(self.module)
        for batch in batches:
            if batch is None or step.is_lightnings():  # Lightning passes over None
                yield batch
            else:
                step.make(batch)


class Step:
    """Makes a step as Lightning would in manual optimization, with the counters and hooks of its loops.

    Args:
        module: What is trained; its Trainer is running.
    """

    def __init__(self, module: LitSupervised) -> None:
        self.module, self.trainer = module, module.trainer
        self.optimizer = only_optimizer(module)
        self.counters = Counters(self.trainer)
        # on one device; elsewhere the strategy has a part in forward, backward and step
        self.directly = type(self.trainer.strategy) is SingleDeviceStrategy
        precision = self.trainer.precision_plugin
        usual = type(precision).train_step_context is Precision.train_step_context
        # usually that is this one, wrapped in a generator
        self._forward_context = precision.forward_context if usual else precision.train_step_context
        self._transfer = transfer_hooks(module)
        self._hooks = {name: hooks(module, name) for name in BATCH_HOOKS}

    def is_lightnings(self) -> bool:
        """Return whether Lightning is to handle the batch that comes."""
        trainer = self.trainer
        number, total = self.counters.batches_begun
        number, total = number + 1, total + 1
        return (
            number % (self.module.steps_per_execution * trainer.accumulate_grad_batches) == 0
            or number >= trainer.num_training_batches
            or trainer.should_stop
            or validates_after(trainer, number, total)
            or 0 <= trainer.max_steps <= trainer.global_step + 1
        )

    def make(self, batch: Any) -> None:
        """Train on a batch.

        Raises:
            UserError: If something asks for what only Lightning's own batches have.
        """
        for move in self._transfer:
            batch = move(batch)
        index = self.counters.begin_batch()
        try:
            if any([hook(batch, index) == -1 for hook in self._hooks["on_train_batch_start"]]):
                raise UserError(f"{self._said()} an epoch cannot be left by returning -1 from on_train_batch_start")
            self.counters.start_batch()
            stepped = (index + 1) % self.trainer.accumulate_grad_batches == 0
            loss = self._train_directly(batch, index, stepped) if self.directly else self._train(batch, index)
            self.counters.process_batch()
            for hook in self._hooks["on_train_batch_end"]:
                hook({"loss": loss}, batch, index)
        except MisconfigurationException as error:
            if "self.log()" in str(error):
                raise UserError(f"{self._said()} self.log has no place: record(name, scalar) logs each step") from error
            raise
        self.counters.complete_batch(stepped)

    def _said(self) -> str:
        return f"steps_per_execution is {self.module.steps_per_execution}:"

    def _train(self, batch: Any, index: int) -> Any:
        optimizer: Any = self.module.optimizers()
        # a private name, by which Lightning too counts a step before schedulers and hooks read trainer.global_step
        before, optimizer._on_after_step = optimizer._on_after_step, self.counters.count_step
        loss = self.trainer.strategy.training_step(batch, index)
        optimizer._on_after_step = before
        return loss

    def _train_directly(self, batch: Any, index: int, stepped: bool) -> Tensor:
        """Make the update of ``LitSupervised._manual_step`` without what Lightning does around it."""
        module, trainer, optimizer = self.module, self.trainer, self.optimizer
        accumulate = trainer.accumulate_grad_batches
        kept: list[Tensor] = []

        def closure() -> Tensor:
            # the context is left before the next evaluation: no cast of a weight outlives the weight
            with self._forward_context():
                loss = module.compute_loss(batch, index)
            module.record("train/loss", loss)
            if index % accumulate == 0:
                optimizer.zero_grad()
            scaled = loss if accumulate == 1 else loss / accumulate
            for hook in self._hooks["on_before_backward"]:
                hook(scaled)
            module.backward(scaled)
            for hook in self._hooks["on_after_backward"]:
                hook()
            if stepped:
                for hook in self._hooks["on_before_optimizer_step"]:
                    hook(optimizer)
            kept[:] = [scaled.detach()]
            return scaled

        if stepped:
            optimizer.step(closure)  # type: ignore[arg-type]  # the stub's float is a tensor in torch's own examples
            self.counters.count_step()
            step_schedulers(module, "step")
        else:
            closure()
        return kept[0]


class Counters:
    """Lightning's counters of batches and steps: the one place that knows where its loops keep them.

    Args:
        trainer: A running Trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer, self._loop = trainer, trainer.fit_loop.epoch_loop
        self._batches = self._loop.batch_progress
        self._steps = self._loop.manual_optimization.optim_step_progress

    @property
    def batches_begun(self) -> tuple[int, int]:
        """The batches begun in the epoch and in the run."""
        return self._batches.current.ready, self._batches.total.ready

    @property
    def left(self) -> bool:
        """Whether the module has left the epoch, by returning -1 from ``on_train_batch_start``."""
        return bool(self._batches.current.ready > self._batches.current.completed)

    def begin_batch(self) -> int:
        """Count a batch as drawn; return its index in the epoch."""
        fetcher: Any = self._trainer.fit_loop._data_fetcher
        fetcher.fetched += 1  # by which Lightning knows an epoch's last batch
        self._batches.increment_ready()
        return self._batches.current.ready - 1

    def start_batch(self) -> None:
        """Count a batch as started."""
        self._batches.increment_started()

    def process_batch(self) -> None:
        """Count a batch as trained on: a checkpoint saved from here on goes on after it."""
        self._batches.increment_processed()

    def complete_batch(self, stepped: bool) -> None:
        """Count a batch as done with; ``stepped`` is whether it made a step, which loggers of Lightning count."""
        self._batches.increment_completed()
        self._loop._batches_that_stepped += stepped

    @property
    def rows(self) -> int:
        """The step of what a foreign module logs next: batches, in manual optimization, where few or many may step."""
        return self._loop._batches_that_stepped

    def count_step(self) -> None:
        """Count an optimizer step: ``trainer.global_step``."""
        self._steps.increment_ready()
        self._steps.increment_completed()


def is_lightnings_own(trainer: pl.Trainer, iterator: Iterator[Any] | None) -> bool:
    """Return whether an iterator over the training loader is the one that Lightning trains by."""
    combined: Any = trainer.fit_loop._combined_loader  # private names, as in Counters
    return any(one is iterator for one in getattr(combined._iterator, "iterators", []))


def carry_steps(checkpoint: dict[str, Any], module: LitSupervised) -> None:
    """Let a checkpoint of the other mode of optimization be resumed: Lightning counts the steps of each apart."""
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None:
        return
    if module.automatic_optimization:
        steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    else:
        steps = loops["epoch_loop.manual_optimization.optim_step_progress"]
    steps["total"] = dict.fromkeys(("ready", "completed"), checkpoint["global_step"])


def put_between(module: LitSupervised) -> None:
    """Let Lightning's training loader make the steps in between, from the next one that is set up.

    Raises:
        UserError: If the Trainer has something that cannot work with it.
    """
    trainer, steps = module.trainer, module.steps_per_execution
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise UserError(f"steps_per_execution is {steps}, but 16-mixed scales each step: use bf16-mixed, or 1")
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise UserError(
            f"steps_per_execution is {steps}, but StochasticWeightAveraging needs automatic optimization: use "
            "WeightAveraging, or 1"
        )
    missed = [type(owner).__name__ for owner in owners(module, "on_before_zero_grad")]
    if missed:
        rank_zero_warn(
            f"steps_per_execution is {steps}: on_before_zero_grad of {', '.join(missed)} is not called, as always in "
            "manual optimization"
        )
    strategy = trainer.strategy
    leave_alone(trainer)
    process = strategy.process_dataloader

    def process_dataloader(dataloader: object) -> object:
        dataloader = process(dataloader)
        return StepsInBetween(dataloader, module) if trainer.training else dataloader

    strategy.process_dataloader = process_dataloader  # type: ignore[method-assign]


def leave_alone(trainer: pl.Trainer) -> None:
    """Take back what :func:`put_between` did."""
    vars(trainer.strategy).pop("process_dataloader", None)


def only_optimizer(module: LitSupervised) -> Optimizer:
    """Return the optimizer.

    Raises:
        UserError: If there are several.
    """
    optimizers = module.trainer.optimizers
    if len(optimizers) > 1:
        raise UserError(
            f"{type(module).__name__}.configure_optimizers returns {len(optimizers)} optimizers; "
            "LitSupervised steps one: PairedOptimizer makes one of two"
        )
    return optimizers[0]


def owners(module: LitSupervised, name: str) -> list[Any]:
    """Return the callbacks, and the module, that have a hook of this name of their own, in Lightning's order."""
    found: list[Any] = []
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        method = getattr(callback, name, None)
        if callable(method) and getattr(method, "__func__", method) is not getattr(pl.Callback, name):
            found.append(callback)
    return [*found, module] if is_overridden(name, module) else found


def hooks(module: LitSupervised, name: str) -> list[Hook]:
    """Return the hooks of this name, to be called without the Trainer and the module."""
    return [
        getattr(owner, name) if owner is module else partial(getattr(owner, name), module.trainer, module)
        for owner in owners(module, name)
    ]


def datamodule_of(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    """Return this run's DataModule; ``trainer.datamodule`` is one of an earlier run where this has none."""
    selector = trainer._data_connector._datahook_selector  # private, and what Lightning asks for a batch's hooks
    return None if selector is None else selector.datamodule


def transfer_hooks(module: LitSupervised) -> list[Hook]:
    """Return what brings a batch to the device, in order: the precision's, and the DataModule's or the module's."""
    trainer = module.trainer
    data = datamodule_of(trainer)

    def owner(name: str) -> Any:
        return data if data is not None and is_overridden(name, data) else module

    before, move, after = (
        getattr(owner(name), name)
        for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    )
    convert = trainer.precision_plugin.convert_input
    device = trainer.strategy.root_device

    def overridden(name: str) -> bool:
        return is_overridden(name, owner(name))

    own = overridden("transfer_batch_to_device")

    def moved(batch: Any) -> Any:
        # Lightning's walk through the batch takes longer than to see that nothing is to be moved
        flat = not own and type(batch) in (tuple, list)
        there = flat and all(type(part) is Tensor and part.device == device for part in batch)
        return batch if there else move(batch, device, 0)

    return [
        *([convert] if getattr(convert, "__func__", None) is not Precision.convert_input else []),
        *([lambda batch: before(batch, 0)] if overridden("on_before_batch_transfer") else []),
        moved,
        *([lambda batch: after(batch, 0)] if overridden("on_after_batch_transfer") else []),
    ]


def step_schedulers(module: LitSupervised, interval: str) -> None:
    """In manual optimization, step the schedulers as Lightning does in automatic, at the same moments.

    Except a ``ReduceLROnPlateau``, which :class:`~lit_basics.hooks.TrainingHooks` steps after metrics are logged.
    """
    trainer = module.trainer
    for config in trainer.lr_scheduler_configs:
        counter = 1 + (trainer.fit_loop.batch_idx if interval == "step" else trainer.current_epoch)
        plateau = isinstance(config.scheduler, ReduceLROnPlateau)
        if config.interval == interval and not plateau and counter % config.frequency == 0:
            module.lr_scheduler_step(config.scheduler, None)


def step_schedulers_of_batch(module: LitSupervised) -> None:
    """Step those of steps and, after an epoch's last batch, those of epochs."""
    step_schedulers(module, "step")
    if module.trainer.is_last_batch:
        step_schedulers(module, "epoch")
