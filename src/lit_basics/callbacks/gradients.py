"""The norms of all gradients, at every step, without a host sync."""

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_basics.callbacks.names import parameters_by_name
from lit_basics.errors import UserError
from lit_basics.finite import plain_parts
from lit_basics.recording import FlushesRows, recorder_of


class GradientMonitor(FlushesRows):
    """Logs the Euclidean norm of each parameter's gradient and of all of them together.

    ======================= ==========================================================================
    key                     value
    ======================= ==========================================================================
    ``grad/norm``           norm of all gradients, as one vector
    ``grad/norm/<name>``    norm of the gradient of the parameter ``<name>``; the prefix that all names
                            share (``net.``) is left out
    ======================= ==========================================================================

    Row n holds the gradients that made update n: unscaled, and before clipping. (A foreign module that clips
    in its own ``training_step``, in manual optimization, shows them clipped.) With LBFGS it is the gradient of
    the first evaluation of the step. Works in any Lightning project, in automatic and manual optimization and
    on several processes; the rows go to the Trainer's loggers with one host sync every 100 steps, or every second.

    Args:
        every_n_steps: Steps between two rows. Lightning counts the steps of all optimizers together: with n optimizers,
            n successive steps are logged.

    Raises:
        UserError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps is {every_n_steps}; it must be at least 1")
        self.every_n_steps = every_n_steps
        self.newest: Tensor | float | None = None
        """The norm of all gradients as recorded last, for a callback after this one, which sets it to None."""
        self._names: tuple[str, ...] = ()
        self._keys: list[str] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Flush the rows when it is due: the last step's is complete now."""
        recorder_of(trainer).flush_if_due()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record the norms of the gradients that this optimizer is about to use."""
        step, recorder = trainer.global_step + 1, recorder_of(trainer)
        # optimizers that take turns each raise the step: all are shown, not again and again the one whose turn it is
        if -step % self.every_n_steps >= len(trainer.optimizers) or recorder.has(step, "grad/norm"):
            return
        named = [(name, p.grad) for name, p in parameters_by_name(pl_module, optimizer) if p.grad is not None]
        if named:
            names, grads = zip(*named, strict=True)
            if names != self._names:
                self._names, self._keys = names, ["grad/norm", *(f"grad/norm/{name}" for name in names)]
            norms, scale = gradient_norms(grads), scale_left(trainer, optimizer)
            if scale is not None:
                norms = [norm / scale.item() for norm in norms] if isinstance(norms, list) else norms / scale
            recorder.put_all(step, self._keys, norms)
            self.newest = norms[0]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Flush, so that the rows of earlier steps come before the validation's."""
        recorder_of(trainer).flush_finished()


def scale_left(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Return what gradients are multiplied by still: under ``16-mixed`` a fused optimizer divides by it itself."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):  # as Lightning asks
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=trainer.strategy.root_device))  # get_scale would wait for a GPU
    return scale


def gradient_norms(grads: Sequence[Tensor]) -> Tensor | list[float]:
    """Return the norm of all gradients together and of each, without a host sync.

    Args:
        grads: n tensors of any shapes, dense or sparse; of one that is sharded this process's part.

    Returns:
        On the CPU n + 1 numbers, which are there sooner than a tensor of them; elsewhere a tensor (n + 1,), float64
        if any gradient is, else float32.
    """
    dense = plain_parts(grads)
    kinds = {grad.dtype for grad in dense}
    dtype = torch.float64 if torch.float64 in kinds else torch.float32
    # the kernel behind torch.nn.utils.get_total_norm, which returns only the total
    norms = torch._foreach_norm(dense, 2, dtype=None if kinds == {dtype} else dtype)
    if dense[0].is_cpu:
        numbers = [norm.item() for norm in norms]
        return [math.hypot(*numbers), *numbers]
    each = torch.stack([norm.to(norms[0].device) for norm in norms])
    return torch.cat([torch.linalg.vector_norm(each)[None], each])
