"""The checkpoint of the newest state."""

import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

MIN_SECONDS = 10.0
"""Epochs shorter than this do not each write a file; the end of training always does."""


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, the whole state at the end of the newest epoch; no metric decides.

    (``ModelCheckpoint(save_last=True)`` with a monitor writes only when the monitored metric improves.)

    Args:
        dirpath: Folder of ``last.ckpt``.
    """

    def __init__(self, dirpath: str) -> None:
        self.path = Path(dirpath) / "last.ckpt"
        self._saved_at = 0.0
        self._saved_step = -1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, unless the last save is less than ten seconds old."""
        due = time.monotonic() - self._saved_at >= MIN_SECONDS
        if trainer.strategy.broadcast(due):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final state."""
        if self._saved_step != trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
