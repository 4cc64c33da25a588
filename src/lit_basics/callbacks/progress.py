"""The progress bar, fed from the recorder."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_basics.recording import recorder_of


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the newest ``train/loss``, which costs no host sync of its own.

    Args:
        refresh_rate: Batches between two refreshes.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what stands at the end of the bar."""
        metrics = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        latest = recorder_of(trainer).latest.get("train/loss")
        if latest is not None:
            metrics["train/loss"] = latest
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                metrics[name] = float(value)
        return metrics
