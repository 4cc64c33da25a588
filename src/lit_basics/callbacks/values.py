"""Parameters and gradients by value, for systems of a handful of numbers."""

import itertools
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_basics.callbacks.gradients import scale_left
from lit_basics.callbacks.names import parameters_by_name
from lit_basics.errors import UserError
from lit_basics.recording import FlushesRows, recorder_of
from lit_basics.steps import accumulating

LIMIT = 100
"""The most numbers that are logged."""


class ValueMonitor(FlushesRows):
    """Logs each parameter and its gradient, number by number, at every step.

    =================== ==========================================================================
    key                 value
    =================== ==========================================================================
    ``grad/<name>``     gradient that made update n, in row n; unscaled and before clipping
    ``param/<name>``    the parameter after update n
    =================== ==========================================================================

    A parameter of several numbers has a key for each: ``param/weight[0,2]``.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record the gradients.

        Raises:
            UserError: If the parameters hold more than 100 numbers.
        """
        parameters = parameters_by_name(pl_module, optimizer)
        numbers = sum(p.numel() for _, p in parameters)
        if numbers > LIMIT:
            raise UserError(
                f"ValueMonitor logs every number by name, {LIMIT} at most, but there are {numbers}; "
                "GradientMonitor logs norms"
            )
        grads = [(f"grad/{name}", p.grad) for name, p in parameters if p.grad is not None]
        step = trainer.global_step + 1
        if grads and not recorder_of(trainer).has(step, _keys(*grads[0])[0]):
            scale = scale_left(trainer, optimizer)
            if scale is not None:
                grads = [(name, grad / scale) for name, grad in grads]
            _record(trainer, step, grads)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the parameters, if this batch ended a step."""
        if accumulating(trainer):
            return
        for optimizer in trainer.optimizers:
            parameters = parameters_by_name(pl_module, optimizer)
            _record(trainer, trainer.global_step, [(f"param/{name}", p) for name, p in parameters])


def _record(trainer: pl.Trainer, step: int, values: list[tuple[str, Tensor]]) -> None:
    keys = [key for name, value in values for key in _keys(name, value)]
    dense = [value.detach().to_dense() if value.is_sparse else value.detach() for _, value in values]
    recorder_of(trainer).put_all(step, keys, torch.cat([value.flatten() for value in dense]))


def _keys(name: str, value: Tensor) -> list[str]:
    if not value.ndim:
        return [name]
    return [f"{name}[{','.join(map(str, place))}]" for place in itertools.product(*map(range, value.shape))]
