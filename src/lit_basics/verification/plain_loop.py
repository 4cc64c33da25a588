"""The loop that a tutorial would write, over any LightningModule: no Trainer."""

import inspect
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_basics.modules import LitSupervised, default_dtype
from lit_basics.verification.report import NotApplicable

DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
PRECISIONS = ("32-true", "bf16-mixed", *DTYPES)
"""The precisions that the loop has."""
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def plain_loop(
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule | None,
    loaders: Any,
    *,
    steps: int,
    batches: int,
    settings: pl.Trainer,
    before_batch: Callable[[int, Any], None],
    after_step: Callable[[int, list[torch.optim.Optimizer]], None],
) -> None:
    """Train in float32 or the precision of ``settings`` on the CPU.

    Args:
        module: Its ``configure_optimizers`` and ``training_step`` are used (``compute_loss`` of our own), and
            the hooks around the steps if it overrides them.
        datamodule: Gives the training loader and moves batches, if there is one.
        loaders: The training loader, if it was given apart.
        steps: Optimizer steps to make.
        batches: Batches of an epoch, as ``limit_train_batches``.
        settings: Its precision, accumulation, clipping and length count; it does not train.
        before_batch: Called with the number of the batch in the run, from 0, and the batch.
        after_step: Called with the number of the step, from 1, and the optimizers.

    Raises:
        NotApplicable: If the module has no plain loop.
    """
    precision, accumulate = str(settings.precision), settings.accumulate_grad_batches
    ours = isinstance(module, LitSupervised) and not module.own_training_step
    if not (ours or module.automatic_optimization):
        raise NotApplicable(f"{type(module).__name__}.training_step makes its updates itself")
    if precision not in PRECISIONS:
        raise NotApplicable(f"precision {precision} needs the Trainer")
    for owner in (datamodule, module):
        if owner is not None:
            owner.trainer = None  # of an earlier fit, on a GPU perhaps
            owner.prepare_data()
            owner.setup("fit")
    dtype = DTYPES.get(precision)
    with default_dtype(dtype or torch.get_default_dtype()):
        module.configure_model()
    source = loaders if loaders is not None else (datamodule or module).train_dataloader()
    loader = source if isinstance(source, CombinedLoader) else CombinedLoader(source, "max_size_cycle")
    seed_workers(loader)
    module.to(dtype)
    plan = Plan(epoch_length(loader, batches), accumulate, settings.max_epochs or -1, settings.max_steps)
    module.trainer = plan  # type: ignore[assignment]
    optimizers, schedulers = optimizers_of(module)
    module.trainer = None
    step_of: Callable[..., Any] = module.compute_loss if ours else module.training_step  # type: ignore[assignment]
    parameters = inspect.signature(step_of).parameters
    if "dataloader_iter" in parameters:
        raise NotApplicable("training_step draws its batches itself (dataloader_iter)")
    counters = counting(module)
    hook(module, "on_fit_start")
    iter(loader)  # before the hooks, as the Trainer's first: a DataLoader draws a seed for it
    hook(module, "on_train_start")
    done = epoch = number = 0
    while done < steps:
        over = False
        set_epoch(loader, epoch)
        hook(module, "on_train_epoch_start")
        length = epoch_length(loader, batches)
        if epoch:
            iter(loader)
        for batch, index, _ in islice(iter(partial(next, loader, None), None), length):
            batch = transferred(batch, module, datamodule, dtype)
            number += 1
            over = index + 1 == length  # else Lightning does not know, as of a loader without a length
            stepping = (index + 1) % accumulate == 0 or over
            if batch is None:  # Lightning passes over it
                if stepping:
                    update(schedulers, "step", index)
                hook(module, "on_train_batch_end", None, batch, index)
                continue
            before_batch(number - 1, batch)
            if hook(module, "on_train_batch_start", batch, index) == -1:
                over = True
                update(schedulers, "step", index)  # as Lightning does
                break

            outputs: dict[str, Any] = {}

            def backward(index: int = index, batch: Any = batch, outputs: dict[str, Any] = outputs) -> Any:
                with forward_context(precision):
                    output = step_of(*(batch, index)[: len(parameters)])
                loss = output["loss"] if isinstance(output, dict) else output
                if index % accumulate == 0:
                    for optimizer in optimizers:
                        hook(module, "on_before_zero_grad", optimizer)
                        optimizer.zero_grad()
                if loss is not None:
                    loss = loss / accumulate
                    hook(module, "on_before_backward", loss)
                    loss.backward()
                    hook(module, "on_after_backward")
                    outputs.update(output if isinstance(output, dict) else {}, loss=loss.detach())
                return loss

            if stepping:
                for optimizer in optimizers:

                    def closure(optimizer: Any = optimizer, backward: Any = backward) -> Any:
                        return clipped(backward(), module, optimizer, settings)

                    optimizer.step(closure)
                if not optimizers:
                    backward()
                done += 1
                counters["global_step"] = done
                update(schedulers, "step", index)
                after_step(done, optimizers)
            else:
                backward()
            hook(module, "on_train_batch_end", outputs, batch, index)
            if done == steps:
                return
        hook(module, "on_train_epoch_end")
        if over:
            update(schedulers, "epoch", epoch)
        epoch += 1
        counters["current_epoch"] = epoch


@dataclass
class Plan:
    """The length of the training, all that ``configure_optimizers`` can ask of a Trainer before it begins."""

    num_training_batches: int
    accumulate_grad_batches: int
    max_epochs: int
    max_steps: int

    @property
    def estimated_stepping_batches(self) -> int:
        """Return the optimizer steps of the training."""
        steps = self.max_epochs * math.ceil(self.num_training_batches / self.accumulate_grad_batches)
        return min(steps, self.max_steps) if self.max_steps >= 0 else steps


def forward_context(precision: str) -> AbstractContextManager[None]:
    """Return what a step runs in: autocast, or another default dtype."""
    if precision == "bf16-mixed":
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)  # as Lightning's
    return default_dtype(DTYPES.get(precision, torch.get_default_dtype()))


def clipped(loss: Any, module: nn.Module, optimizer: torch.optim.Optimizer, settings: pl.Trainer) -> Any:
    """Clip the optimizer's gradients and return ``loss``."""
    hook(module, "on_before_optimizer_step", optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    clip = settings.gradient_clip_val
    if clip and settings.gradient_clip_algorithm == "value":
        nn.utils.clip_grad_value_(parameters, clip)
    elif clip:
        nn.utils.clip_grad_norm_(parameters, clip)
    return loss


def optimizers_of(module: pl.LightningModule) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
    """Return the optimizers and schedulers that ``configure_optimizers`` made, in any of its forms.

    Raises:
        NotApplicable: If a scheduler follows a logged metric, which only a Trainer has.
    """
    made: Any = module.configure_optimizers()
    optimizers, schedulers = [], []
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], (list, tuple)):
        optimizers, schedulers = list(made[0]), made[1] if isinstance(made[1], list) else [made[1]]
    else:
        for one in made if isinstance(made, (list, tuple)) else [] if made is None else [made]:
            optimizers.append(one["optimizer"] if isinstance(one, dict) else one)
            if isinstance(one, dict) and one.get("lr_scheduler") is not None:
                schedulers.append(one["lr_scheduler"])
    settings = []
    for scheduler in schedulers:
        setting = scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler}
        if isinstance(setting["scheduler"], ReduceLROnPlateau):
            raise NotApplicable("ReduceLROnPlateau follows a logged metric, which a plain loop does not have")
        settings.append({"interval": "epoch", "frequency": 1, **setting})
    return optimizers, settings


def update(schedulers: list[dict[str, Any]], interval: str, index: int) -> None:
    """Step the schedulers of an interval."""
    for setting in schedulers:
        if setting["interval"] == interval and (index + 1) % setting["frequency"] == 0:
            setting["scheduler"].step()


def epoch_length(loader: CombinedLoader, batches: int) -> int:
    """Return the batches of an epoch as the Trainer counts them: of a loader without a length, the limit.

    ``len(loader)`` would need an iterator, for which a DataLoader draws a seed.
    """
    lengths = [sized_len(one) for one in loader.flattened]
    limited = [batches if length is None else min(length, batches) for length in lengths]
    # Lightning has no public name for the mode of a loader that the user has combined
    return min(limited) if loader._mode == "min_size" else max(limited)


def counting(module: pl.LightningModule) -> dict[str, int]:
    """Return the module's ``current_epoch`` and ``global_step``, which are 0 without a Trainer, to be set here."""
    counters = {"current_epoch": 0, "global_step": 0}
    kind = type(module)
    properties = {name: property(lambda _, name=name: counters[name]) for name in counters}  # type: ignore[misc]
    module.__class__ = type(kind.__name__, (kind,), {**properties, "__module__": kind.__module__})
    return counters


def seed_workers(loader: CombinedLoader) -> None:
    """Seed the loaders' workers as the Trainer does after ``seed_everything(workers=True)``."""
    for one in loader.flattened:
        if os.environ.get("PL_SEED_WORKERS", "0") == "1" and getattr(one, "worker_init_fn", "none") is None:
            one.worker_init_fn = partial(pl_worker_init_function, rank=0)


def set_epoch(loader: CombinedLoader, epoch: int) -> None:
    """Tell the samplers which epoch begins."""
    for one in loader.flattened:
        for sampler in (getattr(one, "sampler", None), getattr(getattr(one, "batch_sampler", None), "sampler", None)):
            begin = getattr(sampler, "set_epoch", None)
            if begin is not None:
                begin(epoch)


def transferred(
    batch: Any, module: pl.LightningModule, datamodule: pl.LightningDataModule | None, dtype: torch.dtype | None
) -> Any:
    """Return the batch after the transfer hooks, its floating-point tensors in ``dtype``."""

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    if dtype is not None:
        batch = apply_to_collection(batch, Tensor, cast)
    for name in TRANSFER_HOOKS:
        owner = datamodule if datamodule is not None and is_overridden(name, datamodule) else module
        device = [torch.device("cpu")] if name == "transfer_batch_to_device" else []
        batch = getattr(owner, name)(batch, *device, 0)
    return batch


def hook(module: nn.Module, name: str, *arguments: Any) -> Any:
    """Call a hook of the module, if it overrides it."""
    if is_overridden(name, module):
        return getattr(module, name)(*arguments)
    return None
