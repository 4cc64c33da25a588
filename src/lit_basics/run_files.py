"""What a run writes of itself: its configuration, and where its rows and its checkpoints begin."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from lit_basics.checkpoint_io import described, refused_in
from lit_basics.config import Config
from lit_basics.errors import UserError
from lit_basics.execution import Counters
from lit_basics.files import replace_file
from lit_basics.loggers import MetricsCSV
from lit_basics.modules import LitSupervised
from lit_basics.recording import FlushesRows
from lit_basics.resuming import CONFIG


class RunFiles(pl.Callback):
    """Writes the configuration when training starts, and into every checkpoint."""

    def __init__(self, config: Config, directory: Path) -> None:
        self.config, self.directory = config, directory
        self.written = False
        self.first_step = self.first_batch = 0
        self._text = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``config.yaml``, and what loggers keep of it; cut ``metrics.csv`` back to where a resume begins.

        Raises:
            UserError: If no safe load would take the checkpoints, or an optimizer was typed that has no effect.
        """
        check_optimizer(pl_module, self.config)
        if trainer.checkpoint_callbacks:
            check_hyperparameters(pl_module)
            if self.config.datamodule is not None:
                check_hyperparameters(self.config.datamodule)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.cut_back(last_row(trainer))
        text = self._text = self.config.to_yaml()
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with replace_file(self.directory / "config.yaml") as file:
                file.write(text.encode())
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(text))
        self.written = True
        self.first_step, self.first_batch = trainer.global_step, trainer.fit_loop.total_batch_idx + 1

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the configuration into the checkpoint."""
        checkpoint[CONFIG] = self._text  # as text: YAML has dates, which a safe load refuses


def has_trained(trainer: pl.Trainer) -> bool:
    """Return whether a training has begun, and not only its Trainer been made."""
    return any(isinstance(c, RunFiles) and c.written for c in trainer.callbacks)  # type: ignore[attr-defined]


def has_stepped(trainer: pl.Trainer) -> bool:
    """Return whether a training has made a step; those of the checkpoint that it goes on from are not its own."""
    # a search of Lightning's that failed leaves its own callbacks alone there
    files = next((c for c in trainer.callbacks if isinstance(c, RunFiles)), None)  # type: ignore[attr-defined]
    if files is None:
        return False
    # a module that steps its optimizer past Lightning has no global_step
    beyond = trainer.global_step > files.first_step or trainer.fit_loop.total_batch_idx > files.first_batch
    return bool(files.written and beyond)


def check_hyperparameters(owner: pl.LightningModule | pl.LightningDataModule) -> None:
    """Refuse what would make every checkpoint of the run one that cannot be loaded, since loads run no code."""
    for keys, value in refused_in({"hyper_parameters": dict(owner.hparams)}, set()):
        what, advice = described(keys, value)
        raise UserError(
            f"{type(owner).__name__} saves {what}, a {type(value).__name__}, and no run could go on from a checkpoint "
            f"with it (numbers, text and tensors are loaded, in lists and dicts too): {advice}"
        )


def check_optimizer(module: pl.LightningModule, config: Config) -> None:
    """Refuse an optimizer or a scheduler that was typed for a module that makes others."""
    typed = next((key for key in config.typed if re.match(r"model\.(optimizer|lr_scheduler)(\.|$)", key)), None)
    if isinstance(module, LitSupervised) and not module._made_optimizer and typed:
        name = type(module).__name__
        raise UserError(f"--{typed} has no effect: {name}.configure_optimizers makes others; leave it out")


def last_row(trainer: pl.Trainer) -> int:
    """Return the step of a resumed run's newest row."""
    module, rows = trainer.lightning_module, Counters(trainer).rows
    if isinstance(module, LitSupervised) or module.automatic_optimization:
        return trainer.global_step
    # ours count steps
    monitors = any(isinstance(callback, FlushesRows) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return max(rows, trainer.global_step) if monitors else rows
