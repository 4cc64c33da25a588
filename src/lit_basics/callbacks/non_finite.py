"""NaN and infinity: found before they reach the weights or a file, and named."""

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_basics.callbacks.gradients import GradientMonitor
from lit_basics.errors import UserError
from lit_basics.finite import are_finite, holds, is_finite, norms_of
from lit_basics.hooks import skip_empty_hooks
from lit_basics.nested import tensors_in
from lit_basics.recording import compute_logged, recorder_of
from lit_basics.steps import accumulating

Policy = Literal["stop", "skip", "rollback"]

LOSSES = 1000
"""The most losses that are kept of a step (there is one for each accumulated batch)."""


class NonFiniteError(RuntimeError):
    """Training met a non-finite value and stops; the message names the step, the loss and what broke first."""


class _Step(NamedTuple):
    """What is kept of a step until the host looks at it."""

    number: int
    losses: list[Tensor]
    parameters: list[nn.Parameter]
    norms: Tensor


class _Fault(NamedTuple):
    """What was found; the smallest of several is told."""

    step: float
    loss_is_finite: bool
    text: str


class NonFiniteGuard(pl.Callback):
    """Finds a loss, gradient, weight, buffer or optimizer state that is NaN or infinite, and acts on it.

    ============ =================================================================================
    ``policy``   what is done
    ============ =================================================================================
    ``stop``     :class:`NonFiniteError` is raised; on the command line: its message, exit code 1
    ``skip``     the step's update is not made; buffers (batch-norm's statistics) are put back
    ``rollback`` weights, buffers and optimizer state go back to the last snapshot
    ============ =================================================================================

    After a skip or a rollback, training goes on with the next batch: data, step count, schedulers, random
    states and metrics go on, and the epoch's mean leaves the step out. With accumulated gradients the whole
    step is dropped. When ``budget`` faults have been met, the next one stops.

    Loss and gradients are those before clipping. On the CPU they are looked at before each update; on a GPU
    or on several processes every ``every_n_batches`` batches, without a host sync in between (``skip`` looks
    at every step everywhere). At the same pace, before a validation, at the end of an epoch and at every save of
    a whole checkpoint, weights, buffers and optimizer state are looked at too. A save of a non-finite state is
    refused, or made from the snapshot: the file before it stays. (A ``ModelCheckpoint`` with
    ``save_weights_only=True`` asks no callback: with one, the weights are looked at after every step.)

    A finite spike is no fault, however high; once its gradient overflows it is one. Steps that a GradScaler
    skips (``16-mixed``) are none. A buffer that is infinite from the start, such as an attention mask, may be
    so. An optimizer that evaluates a step several times (LBFGS) is stopped by ``skip`` if a later evaluation
    breaks: what the earlier ones did cannot be undone. ``skip`` and ``rollback`` leave the gradients of the
    step None.

    All processes decide alike. A checkpoint keeps the faults met and, for ``rollback``, the snapshot: a resumed
    run goes on as if it had not stopped. Works in any Lightning project, in automatic and manual optimization.

    Args:
        policy: ``stop`` with an error, ``skip`` the step, or ``rollback`` to the last snapshot.
        budget: Number of faults that ``skip`` and ``rollback`` tolerate.
        every_n_batches: Batches between two snapshots.

    Raises:
        UserError: If ``policy`` is unknown, ``budget`` below 0 or ``every_n_batches`` below 1.
    """

    def __init__(self, policy: Policy = "stop", budget: int = 10, every_n_batches: int = 100) -> None:
        if policy not in ("stop", "skip", "rollback"):
            raise UserError(f"policy is {policy!r}; it must be 'stop', 'skip' or 'rollback'")
        if budget < 0:
            raise UserError(f"budget is {budget}; it must be at least 0")
        if every_n_batches < 1:
            raise UserError(f"every_n_batches is {every_n_batches}; it must be at least 1")
        self.policy, self.budget, self.every_n_batches = policy, budget, every_n_batches
        self._begin()
        skip_empty_hooks(self)

    def _begin(self) -> None:
        self.faults = 0
        """Number of faults so far."""
        self._losses: deque[Tensor] = deque(maxlen=LOSSES)  # of the step that is being made
        self._steps: list[_Step] = []  # to be looked at
        self._drop = False  # the step that is being accumulated is not to be made
        self._undo = False  # to be rolled back at the end of this batch
        self._stepped = False
        self._evaluated: tuple[int, int] | None = None
        self._checked = 0
        self._snapshot: dict[str, Any] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._infinite: set[str] | None = None  # what may be so; known once training starts

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew: a save before training starts, such as a search for a learning rate makes, is let pass."""
        if stage == TrainerFn.FITTING:
            self._begin()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose how to look, and take the first snapshot.

        Raises:
            NonFiniteError: If a weight, a buffer or the optimizer's state is not finite before the first step.
        """
        self._scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        on_cpu = trainer.strategy.root_device.type == "cpu" and trainer.world_size == 1
        self._at_once = on_cpu or self.policy == "skip"
        self._weights_only = any(getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks)
        before = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        self._monitor = next((c for c in before if isinstance(c, GradientMonitor)), None)
        fixed = [*pl_module.named_buffers(), *((n, p) for n, p in pl_module.named_parameters() if not p.requires_grad)]
        self._infinite = {name for name, value in fixed if holds(value, torch.isinf) and not holds(value, torch.isnan)}
        if fault := _agreed(trainer, self._fault_of_state(trainer, pl_module)):
            self._stop(trainer, fault.text)
        if self.policy == "rollback" and self._snapshot is None:
            self._take_snapshot(trainer, pl_module)
        if not self._buffers:
            self._keep_buffers(pl_module)
        if not accumulating(trainer):
            self._check_if_due(trainer, pl_module)  # a resumed run may have been stopped before its turn

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss until the step."""
        if not self._scaled:
            # manual_backward(loss, gradient=...) takes one that is no scalar
            self._losses.append(loss.detach() if loss.numel() == 1 else loss.detach().sum())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the step's losses and gradients, or keep what is to be looked at later.

        Raises:
            NonFiniteError: If they are not finite and the policy or the budget says so.
        """
        self._stepped = True
        losses, number = list(self._losses), trainer.global_step + 1
        self._losses.clear()
        norm = None
        if self._monitor is not None:
            norm, self._monitor.newest = self._monitor.newest, None
        if self._drop or self._undo:
            self._drop = False
            self._drop_step(pl_module, optimizer)
        elif self._scaled:
            return
        elif not self._at_once:
            moved = _with_gradients(optimizer)
            self._steps.append(_Step(number, losses, moved, norms_of(_gradients(moved))))
        else:
            evaluated, self._evaluated = self._evaluated, (id(optimizer), number)
            healthy = all(math.isfinite(loss.item()) for loss in losses)
            if norm is None or not math.isfinite(norm):  # a norm may overflow where no gradient does
                healthy = healthy and are_finite(_gradients(_with_gradients(optimizer)), True)
            if self._buffers:
                healthy = healthy and are_finite(self._live_buffers(pl_module).values())
            if healthy and trainer.world_size == 1:
                return
            broken = None if healthy else [p for p in _with_gradients(optimizer) if not is_finite(p.grad)]
            fault = None if broken is None else self._fault_of_step(trainer, pl_module, number, losses, broken)
            if fault := _agreed(trainer, fault):
                if self.policy == "skip" and evaluated == self._evaluated:
                    begun = f"{type(optimizer).__name__} has begun this step, it cannot be skipped"
                    self._stop(trainer, f"{fault.text}; {begun}")
                self._count(trainer, fault)
                self._drop_step(pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Roll back if this batch broke, and look at the weights when it is due.

        Raises:
            NonFiniteError: If they are not finite and the policy or the budget says so.
        """
        if self._undo:
            self._roll_back(trainer, pl_module)
        # not amid a step, also one of several batches by hand; global_step stays 0 where it is made past Lightning
        if self._stepped or not (trainer.global_step or accumulating(trainer)):
            self._check_if_due(trainer, pl_module)
            if self._buffers and (self._stepped or are_finite(self._live_buffers(pl_module).values())):
                self._keep_buffers(pl_module)
        self._stepped = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at all before it is validated.

        Raises:
            NonFiniteError: If something is not finite and the policy or the budget says so.
        """
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at all before checkpoints are written.

        Raises:
            NonFiniteError: If something is not finite and the policy or the budget says so.
        """
        compute_logged(trainer)
        self._check(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """After a fault, let nobody save the state: the refusal would leave the run's end half done."""
        if isinstance(exception, NonFiniteError):
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False):
                    _pass_over(callback)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the device's memory, as Lightning has done with the module and the optimizer; a later save finds all."""
        self._snapshot, self._buffers = move_data_to_device((self._snapshot, self._buffers), torch.device("cpu"))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let nothing non-finite into the file.

        Raises:
            NonFiniteError: If something is not finite and the policy or the budget says so.
        """
        if trainer.state.fn != TrainerFn.FITTING or self._infinite is None:
            return
        undo = self._undo
        if undo:  # the save comes before this callback's turn at the end of the batch
            self._roll_back(trainer, pl_module)
        if self._check(trainer, pl_module) or undo:
            # they were put in before this hook
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
            checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(o) for o in trainer.optimizers]
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of faults and what a step may have to go back to."""
        return {
            "faults": self.faults,
            "drop": self._drop,
            "checked": self._checked,
            "snapshot": self._snapshot,
            "buffers": self._buffers,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.faults, self._drop, self._checked = (state_dict[key] for key in ("faults", "drop", "checked"))
        if self.policy == "rollback":
            self._snapshot = state_dict["snapshot"]
        if self.policy == "skip":
            self._buffers = state_dict["buffers"]

    # looking

    def _check_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        number = (trainer.fit_loop.total_batch_idx + 1) // self.every_n_batches
        due, self._checked = number != self._checked, number
        if due or self._weights_only:
            found = self._check(trainer, pl_module)
            if due and not found and self.policy == "rollback":
                self._take_snapshot(trainer, pl_module)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Look at the steps that were kept and at the whole state; return whether something was found."""
        amid = accumulating(trainer) and not self._scaled
        fault = self._fault_of_steps(trainer, pl_module)
        if amid and fault is None:
            fault = self._fault_of_accumulation(trainer, pl_module)
        fault = _agreed(trainer, fault or self._fault_of_state(trainer, pl_module))
        if fault is None:
            return False
        if self.policy == "skip" and not (amid and fault.step == trainer.global_step + 1):
            self._stop(trainer, f"{fault.text}; that cannot be skipped")
        if not self._drop:
            self._count(trainer, fault)
        if self.policy == "skip":
            self._drop = True
            for optimizer in trainer.optimizers:
                self._drop_step(pl_module, optimizer)
        else:
            self._roll_back(trainer, pl_module)
        return True

    def _fault_of_steps(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> _Fault | None:
        """Look at the losses and norms that were kept, all in one transfer."""
        steps, self._steps = self._steps, []
        values = [v.flatten() for step in steps for v in (*step.losses, step.norms) if v.numel()]
        # the parameters of two optimizers may be on two devices
        if not values or bool(torch.isfinite(torch.cat([v.to(values[0].device) for v in values])).all()):
            return None
        for step in steps:
            finite = torch.isfinite(step.norms).tolist()
            broken = [p for p, good in zip(step.parameters, finite, strict=True) if not good]
            if broken or not all(math.isfinite(loss.item()) for loss in step.losses):
                return self._fault_of_step(trainer, pl_module, step.number, step.losses, broken)
        return None

    def _fault_of_accumulation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> _Fault | None:
        """Look at the step that is being accumulated."""
        losses = list(self._losses)
        broken = [p for p in pl_module.parameters() if p.grad is not None and not is_finite(p.grad)]
        poisoned = self.policy == "skip" and not are_finite(self._live_buffers(pl_module).values())
        if not broken and not poisoned and all(math.isfinite(loss.item()) for loss in losses):
            return None
        return self._fault_of_step(trainer, pl_module, trainer.global_step + 1, losses, broken)

    def _fault_of_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        number: int,
        losses: list[Tensor],
        broken: list[nn.Parameter],
    ) -> _Fault:
        """Say what is wrong with a step, of which the losses and the parameters with broken gradients are given."""
        # Lightning has divided the loss by the number of accumulated batches
        values = [loss.item() * trainer.accumulate_grad_batches for loss in losses]
        finite = all(math.isfinite(value) for value in values)
        value = next((v for v in values if not math.isfinite(v)), max(values, key=abs, default=None))
        ids = {id(p) for p in broken}
        first = next((_clean(name) for name, p in pl_module.named_parameters() if id(p) in ids), None)
        if first is not None:
            what = f"first broken gradient: {first}"
        elif not finite:
            what = "all gradients are finite"
        else:
            buffers = self._live_buffers(pl_module).items()
            buffer = next((_clean(name) for name, b in buffers if not is_finite(b)), "a buffer")
            what = f"{buffer} is not finite, all gradients are"
        loss = "unknown" if value is None else f"{value:.6g}"
        return _Fault(number, finite, f"loss is {loss} at step {number} ({what})")

    def _fault_of_state(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> _Fault | None:
        """Look at all weights, buffers and optimizer state."""
        assert self._infinite is not None
        parameters = dict(pl_module.named_parameters())
        names = {id(p): name for name, p in parameters.items()}
        state: dict[str, Tensor] = {name: p for name, p in parameters.items() if name not in self._infinite}
        state |= self._live_buffers(pl_module)
        for optimizer in trainer.optimizers:
            for parameter, values in optimizer.state.items():
                of = names.get(id(parameter), "a parameter")
                state |= {f"{of} ({where} of the optimizer)": value for where, value in tensors_in(values)}
        if are_finite(state.values()):
            return None
        first = next((_clean(name) for name, value in state.items() if not is_finite(value)), None)
        step, batches = trainer.global_step, trainer.fit_loop.total_batch_idx + 1
        when = f"after step {step}" if step else f"after batch {batches}" if batches else "before the first step"
        return None if first is None else _Fault(math.inf, True, f"{first} is not finite {when}")

    def _live_buffers(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        assert self._infinite is not None
        return {name: buffer for name, buffer in pl_module.named_buffers() if name not in self._infinite}

    # acting

    def _count(self, trainer: pl.Trainer, fault: _Fault) -> None:
        """Count a fault; warn or stop."""
        if self.policy == "stop":
            self._stop(trainer, fault.text)
        self.faults += 1
        if self.faults > self.budget:
            self._stop(trainer, f"{fault.text}; the budget of {self.budget} faults is spent")
        if math.isfinite(fault.step):  # found late, it is in the steps since as well
            first = int(fault.step)
            recorder_of(trainer).leave_out(first, max(first, trainer.global_step + accumulating(trainer)))
        if self._snapshot is None:
            action = "the update is skipped"
        else:
            action = f"back to the weights after step {self._snapshot['step']}"
        rank_zero_warn(f"{fault.text}: {action} (fault {self.faults} of {self.budget})")

    def _stop(self, trainer: pl.Trainer, text: str) -> None:
        recorder_of(trainer).flush()  # all ranks are here
        raise NonFiniteError(text)

    @torch.no_grad()
    def _drop_step(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        _drop_gradients(optimizer)
        if self.policy == "rollback":
            self._undo = True  # once the optimizer and others of this batch have done with it
        _copy_back(pl_module.named_buffers(), self._buffers)

    def _keep_buffers(self, pl_module: pl.LightningModule) -> None:
        if self.policy == "skip":
            self._buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}

    def _take_snapshot(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._snapshot = None  # else there would be two for a moment
        self._snapshot = {
            "step": trainer.global_step,
            "weights": {name: value.detach().clone() for name, value in _weights(pl_module)},
            # without the groups: learning rates go on
            # Lightning's stand-in where configure_optimizers returns None has neither
            "optimizers": [copy.deepcopy(optimizer.state_dict().get("state", {})) for optimizer in trainer.optimizers],
        }

    @torch.no_grad()
    def _roll_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._snapshot is not None
        self._undo = False
        self._steps = []
        self._losses.clear()
        _copy_back(_weights(pl_module), self._snapshot["weights"])
        for optimizer, state in zip(trainer.optimizers, self._snapshot["optimizers"], strict=True):
            groups = optimizer.state_dict().get("param_groups", [])
            optimizer.load_state_dict({"state": copy.deepcopy(state), "param_groups": groups})
            _drop_gradients(optimizer)
        self._drop = accumulating(trainer)  # its first batches saw other weights


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _pass_over(callback: pl.Callback) -> None:
    """Let the next call of a callback's ``on_exception`` do nothing."""

    def once(*_: Any) -> None:
        del vars(callback)["on_exception"]

    vars(callback)["on_exception"] = once


def _copy_back(values: Iterable[tuple[str, Tensor]], kept: dict[str, Tensor]) -> None:
    for name, value in values:
        if name in kept and kept[name].shape == value.shape:  # it may have been made since
            value.copy_(kept[name])


def _drop_gradients(optimizer: Optimizer) -> None:
    """Make each gradient None, whatever ``zero_grad`` does.

    An optimizer passes over what has no gradient, with its momentum and weight decay.
    """
    for parameter in _with_gradients(optimizer):
        parameter.grad = None


def _with_gradients(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [gradient for p in parameters if (gradient := p.grad) is not None]


def _agreed(trainer: pl.Trainer, fault: _Fault | None) -> _Fault | None:
    """Return the fault of the earliest step among all ranks, on all ranks."""
    if trainer.world_size == 1:
        return fault
    if not trainer.strategy.reduce_boolean_decision(fault is not None, all=False):
        return None
    faults: list[_Fault | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(faults, fault)
    return min(fault for fault in faults if fault is not None)


def _clean(name: str) -> str:
    return name.replace("_orig_mod.", "")
