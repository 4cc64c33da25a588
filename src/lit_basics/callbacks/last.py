"""The checkpoint of the newest state."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn

from lit_basics.checkpoint_files import free_name, is_there, move_aside
from lit_basics.checkpoint_io import DurableCheckpointIO
from lit_basics.files import local_path
from lit_basics.loggers import MetricsCSV
from lit_basics.recording import compute_logged, recorder_of
from lit_basics.steps import at_step_boundary, ends_after_batch, place

MIN_SECONDS = 10.0
"""Epochs shorter than this do not each write a file; the end of training always does."""
MAX_SECONDS = 300.0
"""Within an epoch that is longer than this there is a save as well."""
ASK_SECONDS = 60.0
"""Several ranks ask each other about this often whether it is time, or after 50 batches."""


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, the whole newest state; no metric decides.

    It is written at the end of an epoch (at most every 10 seconds), every 5 minutes within an epoch, and at the end of
    training; within the epoch if ``max_steps``, ``max_time`` or ``EarlyStopping`` ends it there, so that a resumed run
    does not leave out the rest. (``ModelCheckpoint(save_last=True)`` with a monitor writes only when the monitored
    metric improves.) It goes behind all other callbacks, so that it holds the newest record of ``BestLossCheckpoint``.
    A run goes on from it by ``fit(ckpt_path=last.path)``; ``ckpt_path="last"`` finds those of ``ModelCheckpoint`` only.
    A fit that begins anew moves another run's file aside (``last-1.ckpt``) before it saves.

    Args:
        dirpath: Folder of ``last.ckpt``.

    Raises:
        UserError: If ``dirpath`` is remote.
    """

    def __init__(self, dirpath: str) -> None:
        self.path = local_path(dirpath) / "last.ckpt"
        self.best_model_path = ""
        """What ``Trainer.test()`` takes where there is no other checkpoint callback; Lightning asks for it."""
        self._saved_at = 0.0
        self._saved: tuple[int, int] | None = None  # the place of the newest save
        self._asked_at, self._ask_at = (0.0, 0), 0  # when, and at which batch, the ranks asked; the batch of the next
        self._begins = False  # a new run, beside the file of another
        self._ended: tuple[int, int] | None = None  # that of a save within the epoch, at the end of training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Go behind all other callbacks, and join those of the Trainer if only ``Preemption`` has this one."""
        go_behind(trainer, self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and warn if this run begins anew where another has saved."""
        if isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO):
            trainer.strategy.checkpoint_io.begin()
        self._saved_at = time.monotonic() - MIN_SECONDS
        self._asked_at = time.monotonic(), trainer.fit_loop.total_batch_idx
        self._ask_at = 0
        begun = trainer.fit_loop.total_batch_idx >= 0  # after a search for a learning rate, ckpt_path is the search's
        self._saved = place(trainer) if begun else None  # a resumed run that makes no step has nothing to save
        self._ended = None
        self._begins = not begun and not self.best_model_path and is_there(self.path)
        if self._begins and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"this fit begins anew, and at its first save moves the {self.path.name} of another run to "
                f"{free_name(self.path)}; fit(ckpt_path={str(self.path)!r}) would go on with that run"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if the last save is five minutes old, or if training ends within the epoch."""
        # halfway: of other modules than a LitSupervised some gradients are lost, but not the rest of the epoch
        if ends_after_batch(trainer) and at_step_boundary(trainer, halfway=True):
            self._save_end(trainer)
            return
        # ranks must agree, which costs a message: they ask now and then, at a boundary
        several = trainer.world_size > 1
        due = trainer.fit_loop.total_batch_idx >= self._ask_at if several else self._is_older(MAX_SECONDS)
        if due and at_step_boundary(trainer):
            self._save_if_older(trainer, MAX_SECONDS)
            if several:
                self._choose_next(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if training ends with a validation within the epoch."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and ends_after_batch(trainer) and not trainer.is_last_batch:
            self._save_end(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, unless the last save is less than ten seconds old."""
        compute_logged(trainer)
        if self._ended == place(trainer):
            return
        ends = trainer.should_stop or ends_after_batch(trainer) or trainer.current_epoch + 1 == trainer.max_epochs
        if ends and any(isinstance(c, WeightAveraging) for c in trainer.callbacks):  # type: ignore[attr-defined]
            self.save(trainer)  # at the end of training it puts the averages in the place of the weights
        else:
            self._save_if_older(trainer, MIN_SECONDS)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final state."""
        # which has put the averages in the place of the weights just now
        averaged = any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if self._saved != place(trainer) or averaged:
            self.save(trainer)

    def _save_end(self, trainer: pl.Trainer) -> None:
        """Save within the epoch, which Lightning is about to count as done."""
        if self._ended != place(trainer):
            self.save(trainer)
            self._ended = place(trainer)

    def _save_if_older(self, trainer: pl.Trainer, seconds: float) -> None:
        if trainer.strategy.broadcast(self._is_older(seconds)):
            self.save(trainer)

    def _choose_next(self, trainer: pl.Trainer) -> None:
        """Let rank 0 choose the batch after which the ranks ask each other again."""
        then, batch = self._asked_at
        self._asked_at = time.monotonic(), trainer.fit_loop.total_batch_idx
        seconds = (self._asked_at[0] - then) / max(1, self._asked_at[1] - batch)
        batches = int(min(max(ASK_SECONDS / max(seconds, 1e-9), 1), 50))
        self._ask_at = self._asked_at[1] + trainer.strategy.broadcast(batches)

    def _is_older(self, seconds: float) -> bool:
        return time.monotonic() - self._saved_at >= seconds

    def save(self, trainer: pl.Trainer) -> None:
        """Save now; on all ranks."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # public, but set dynamically
            return
        if self._begins and trainer.is_global_zero:  # strategies whose other ranks write too let them wait for rank 0
            move_aside(self.path)
        self._begins = False
        recorder_of(trainer).flush_finished()
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.synchronize()
        trainer.save_checkpoint(self.path)
        self.best_model_path = str(self.path)
        self._saved_at, self._saved = time.monotonic(), place(trainer)


def go_behind(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Put a callback behind all others of the Trainer."""
    trainer.callbacks = [*(c for c in trainer.callbacks if c is not callback), callback]  # type: ignore[attr-defined]
