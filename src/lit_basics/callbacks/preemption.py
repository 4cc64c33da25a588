"""Signals: the state is saved at the next step, then the process leaves."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from lit_basics.callbacks.last import LastCheckpoint, at_step_boundary


class Preempted(SystemExit):
    """Raised once the state is saved; its code is 128 + the signal's number."""


class Preemption(Checkpoint):
    """On SIGTERM, SIGINT or SIGUSR1, saves ``last.ckpt`` at the next step boundary and leaves.

    The exit code is 143 (SIGTERM), 130 (SIGINT, Ctrl-C) or 138 (SIGUSR1, which SLURM sends before the end of
    the time if asked to). All ranks stop at the same step if one gets the signal. A second Ctrl-C leaves at
    once. Handlers are installed while training runs, in the main thread only. List it after ``last``.

    Args:
        last: What saves the state.
    """

    def __init__(self, last: LastCheckpoint) -> None:
        self._last = last
        self._signal = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers; Lightning has installed its own before."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self._signal = number  # no more than this: a handler may interrupt anything

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave if a signal came, unless an epoch's end or a validation follows at once."""
        if at_step_boundary(trainer):
            self._leave_if_signalled(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave if a signal came."""
        self._leave_if_signalled(trainer)

    def _leave_if_signalled(self, trainer: pl.Trainer) -> None:
        number = self._signal
        if trainer.world_size > 1:
            agreed = torch.tensor(number, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            number = int(agreed)
        if number:
            self._last.save(trainer)
            raise Preempted(128 + number)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the earlier handlers back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the earlier handlers back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
