"""The training that is verified, and each kind of run of it."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_basics.modules import LitSupervised
from lit_basics.verification.plain_loop import TRANSFER_HOOKS, plain_loop
from lit_basics.verification.ranks import RANKS, Recorded, Recorder, Replay, Samples
from lit_basics.verification.report import NotApplicable
from lit_basics.verification.tracing import Trace, Tracer, digest, random_digest, training_state

Tell = Callable[[int], None]
"""Tells the parent process of a step; the same first argument in each kind of run."""
LEFT_OUT = (
    *("max_time", "min_epochs", "min_steps", "fast_dev_run", "overfit_batches", "profiler", "barebones"),
    "model_registry",
)
"""The Trainer's arguments that no run is given."""
OUTPUT = (Checkpoint, ProgressBar)
"""Callbacks that write checkpoints to places of their own, or draw bars."""
RANK_STEPS = 5
"""Optimizer steps on two ranks: rounding in another order grows with each."""


class Nowhere(DummyLogger):
    """A logger that writes nothing, and has a folder for what others write beside it.

    Args:
        folder: That folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = str(folder)

    @property
    def save_dir(self) -> str:
        """Return the folder."""
        return self._folder

    log_dir = save_dir


class StopAfter(pl.Callback):
    """Ends a run after a number of steps; not ``max_steps``, with which Lightning counts epochs in another way.

    Args:
        steps: Optimizer steps; and batches, so that several steps a batch do not cost the run its epochs' ends.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask the Trainer to stop."""
        if min(trainer.global_step, trainer.fit_loop.total_batch_idx + 1) >= self._steps:
            trainer.should_stop = True


@dataclass
class Subject:
    """What is trained."""

    model: pl.LightningModule
    train_dataloaders: Any
    val_dataloaders: Any
    datamodule: pl.LightningDataModule | None
    arguments: dict[str, Any]
    steps: int
    weights_only: bool | None

    @property
    def accumulate(self) -> int:
        """Batches of an optimizer step."""
        return int(self.arguments.get("accumulate_grad_batches") or 1)

    def limit(self, steps: int) -> int:
        """Return the batches of an epoch: a third of the run, unless the user wants fewer."""
        wanted = self.arguments.get("limit_train_batches")
        limit = math.ceil(steps / 3) * self.accumulate
        return min(limit, wanted) if isinstance(wanted, int) else limit

    def trainer(self, folder: Path, steps: int, callbacks: list[pl.Callback], **others: Any) -> pl.Trainer:
        """Return a Trainer for a run that writes into ``folder`` only."""
        # there alone None is no default: validation by the batches of the whole run
        given = {n: v for n, v in self.arguments.items() if v is not None or n == "check_val_every_n_epoch"}
        limit = self.limit(steps)
        interval = given.get("val_check_interval", 1.0)
        if (isinstance(interval, int) and interval > limit) or (isinstance(interval, float) and interval * limit < 1):
            given["val_check_interval"] = 1.0 if given.get("check_val_every_n_epoch", 1) else limit
        if (given.get("check_val_every_n_epoch") or 1) * limit >= steps * self.accumulate:
            given["check_val_every_n_epoch"] = 1  # else no validation has training after it
        for name in LEFT_OUT:
            given.pop(name, None)
        wanted = given.get("limit_val_batches", 1.0)
        settings = {
            **given,
            "accelerator": "cpu",
            "devices": 1,
            "num_nodes": 1,
            "strategy": "auto",
            "sync_batchnorm": False,
            "max_epochs": steps,
            "max_steps": steps if given.get("max_steps", -1) != -1 else -1,
            "limit_train_batches": limit,
            "limit_val_batches": min(2, wanted) if isinstance(wanted, int) or not wanted else 2,
            "logger": Nowhere(folder),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "callbacks": [StopAfter(steps), *callbacks],
            "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
            "plugins": without(given.get("plugins", []), ClusterEnvironment),  # the ranks are two processes here
            **others,
        }
        if isinstance(self.model, LitSupervised):
            self.model.compile_net = False  # it rounds differently
        configured = self.model.configure_callbacks
        self.model.configure_callbacks = lambda: without(configured(), *OUTPUT)  # type: ignore[method-assign]
        return pl.Trainer(**settings)

    def fit(self, trainer: pl.Trainer, checkpoint: Path | None = None) -> None:
        """Train; from a checkpoint if there is one."""
        trainer.fit(
            self.model,
            self.train_dataloaders,
            self.val_dataloaders,
            self.datamodule,
            ckpt_path=checkpoint,
            weights_only=self.weights_only if checkpoint else None,
        )

    def trace(
        self,
        report: Tell,
        folder: Path,
        reference: Trace | None = None,
        *,
        checkpoint: Path | None = None,
        manual: bool = False,
        bare: bool = False,
        **tracer: Any,
    ) -> Trace:
        """Train as the user does, ``bare`` without validation and callbacks, with a tracer; return its trace."""
        folder.mkdir(exist_ok=True)
        trace = Trace(folder)
        if manual:
            self.model.automatic_optimization = not self.model.automatic_optimization
        onlooker = Tracer(trace, reference, report=report, **tracer)
        others = {"limit_val_batches": 0, "num_sanity_val_steps": 0} if bare else {}
        callbacks = [] if bare else without(self.arguments.get("callbacks") or [], *OUTPUT)
        trainer = self.trainer(folder, self.steps, [*callbacks, onlooker], **others)
        self.fit(trainer, checkpoint)
        onlooker.look(0, trainer)
        return trace

    def loop(self, report: Tell, folder: Path, reference: Trace) -> Trace:
        """Train by the plain loop, if the module has one."""
        if self.arguments.get("reload_dataloaders_every_n_epochs"):
            raise NotApplicable("reload_dataloaders_every_n_epochs makes loaders anew, which only a Trainer does")
        folder.mkdir()
        trace = Trace(folder)
        trainer = self.trainer(folder, self.steps, [])  # knows the settings in their final form

        def before_batch(number: int, batch: Any) -> None:
            trace.batches[number], trace.random[number] = digest(batch), random_digest()

        def after_step(step: int, optimizers: list[Any]) -> None:
            trace.steps = step
            trace.compare(step, training_state(self.model, optimizers), reference)

        plain_loop(
            self.model,
            self.datamodule,
            self.train_dataloaders,
            steps=reference.steps,
            batches=self.limit(self.steps),
            settings=trainer,
            before_batch=before_batch,
            after_step=after_step,
        )
        return trace

    def short_trainer(self, folder: Path, recorder: Recorder, precision: str | None, **others: Any) -> pl.Trainer:
        """Return a Trainer for a few steps without validation, of which everything is kept."""
        return self.trainer(
            folder,
            RANK_STEPS,
            [recorder],
            limit_train_batches=RANK_STEPS * self.accumulate,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            **({"precision": precision} if precision else {}),
            **others,
        )

    def ranks(self, report: Tell, folder: Path, precision: str | None) -> Recorded:
        """Train as one of two ranks; every step's batches and weights."""
        recorder = Recorder()
        trainer = self.short_trainer(folder, recorder, precision, devices=RANKS, strategy=self.ddp_strategy())
        self.double_odd_batches()
        self.fit(trainer)
        return recorder.recorded

    def replay(
        self, report: Tell, folder: Path, epochs: list[list[Any]], length: int, precision: str | None
    ) -> Recorded:
        """Train in one process on given batches."""
        recorder, loader = Recorder(), Replay(epochs, length)
        trainer = self.short_trainer(folder, recorder, precision)
        for owner in self.owners():  # the batches have been through these hooks
            for name in TRANSFER_HOOKS:
                setattr(owner, name, lambda batch, *_: batch)
        if self.datamodule is None or self.train_dataloaders is not None:
            trainer.fit(self.model, loader)
        else:  # with it, for what asks the Trainer for its DataModule
            self.datamodule.train_dataloader = lambda: loader  # type: ignore[method-assign]
            trainer.fit(self.model, datamodule=self.datamodule)
        return recorder.recorded

    def validate(
        self, report: Tell, folder: Path, ranks: int, precision: str | None
    ) -> tuple[Counter[str], dict[str, float], bool]:
        """Validate the untrained module as within ``fit``; the samples and metrics of this rank, and if it draws."""
        samples = Samples()
        several = {"devices": ranks, "strategy": self.ddp_strategy()} if ranks > 1 else {}
        if precision:
            several["precision"] = precision
        trainer = self.trainer(folder, RANK_STEPS, [samples], limit_val_batches=1.0, **several)
        self.double_odd_batches()
        loads = [owner for owner in self.owners() if is_overridden("val_dataloader", owner)]
        for owner in loads[-1:]:  # the DataModule's wins
            # as a fit does: a DataModule may prepare its validation in that stage only
            owner.setup = lambda stage, setup=owner.setup: setup("fit")  # type: ignore[misc,method-assign]
        trainer.validate(self.model, self.val_dataloaders, datamodule=self.datamodule, verbose=False)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return samples.seen, metrics, samples.draws

    def owners(self) -> list[pl.LightningModule | pl.LightningDataModule]:
        """Return the module, and the DataModule if there is one."""
        return [self.model, *([] if self.datamodule is None else [self.datamodule])]

    def ddp_strategy(self) -> str | DDPStrategy:
        """Return DistributedDataParallel with the user's settings of it, for processes that are there already."""
        strategy = self.arguments.get("strategy")
        if type(strategy) is DDPStrategy:  # Lightning's private name of the settings: not the backend, of a GPU
            return DDPStrategy(**strategy._ddp_kwargs)
        if isinstance(strategy, str) and strategy.startswith("ddp"):
            return re.sub("_(spawn|fork|notebook)", "", strategy)
        return "ddp"

    def double_odd_batches(self) -> None:
        """Double a DataModule's batch size that two ranks could not share."""
        size = getattr(self.datamodule, "batch_size", None)
        if isinstance(size, int) and size % RANKS:
            self.datamodule.batch_size = size * RANKS  # type: ignore[union-attr]


def without(values: Any, *kinds: type) -> list[Any]:
    """Return values, one or several, without those of some kinds."""
    several = values if isinstance(values, (list, tuple)) else [values]
    return [value for value in several if not isinstance(value, kinds)]
