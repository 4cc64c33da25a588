"""The progress bar, fed from the recorder."""

import math
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_basics.recording import recorder_of

MIN_SECONDS = 0.2
"""Between two refreshes: one takes as long as a step of a small net."""


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the newest ``train/loss``, which costs no host sync of its own.

    Args:
        refresh_rate: Batches between two refreshes, which are a fifth of a second apart at least.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._refreshed_at = -math.inf
        self._numbers: dict[str, tuple[Any, float]] = {}  # of each value that has been read: a GPU is asked once

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refresh the bar if it is time, and at the end of the epoch."""
        due = self.is_enabled and (batch_idx + 1) % self.refresh_rate == 0
        if (due and time.monotonic() - self._refreshed_at >= MIN_SECONDS) or trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._refreshed_at = time.monotonic()

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what stands at the end of the bar."""
        metrics = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        latest = recorder_of(trainer).latest.get("train/loss")
        if latest is not None:
            metrics["train/loss"] = latest
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                if name not in self._numbers or self._numbers[name][0] is not value:
                    self._numbers[name] = value, float(value)
                metrics[name] = self._numbers[name][1]
        return metrics
