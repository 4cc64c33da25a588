"""What torch.optim lacks: two optimizers in one, Muon for filters, a quicker SGD; the types of injected optimizers."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lit_basics.errors import UserError

# aliases of our own: lightning.pytorch.cli has the same, but needs jsonargparse at import
OptimizerCallable = Callable[[Iterable], Optimizer]  # type: ignore[type-arg]
"""Makes an optimizer from an iterable of parameters; a class path and its arguments in YAML."""
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]
"""Makes a learning-rate scheduler from an optimizer."""
_Tensors = tuple[Tensor, ...] | list[Tensor]
_OF_GROUP = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")  # what SGD's fused kernel takes


class PairedOptimizer(Optimizer):
    """One optimizer for the matrices of a net and another for its other parameters, stepped as one.

    Muon takes 2-D parameters only; this pairs it with, say, SGD for biases and convolutions. As a single
    ``Optimizer`` it keeps ``global_step``, schedulers, clipping and checkpoints what they are with one.

    Args:
        params: The parameters (tensors, not groups).
        matrices: Makes the optimizer of the 2-D parameters, and of the filters if these go with them.
        rest: Makes the optimizer of all other parameters.
        filters: Whether the filters of convolutions (more than two dimensions) go with the matrices.

    Raises:
        UserError: If there are no matrices, or no others: one optimizer is enough then.
    """

    def __init__(
        self, params: Iterable[Tensor], matrices: OptimizerCallable, rest: OptimizerCallable, filters: bool = False
    ) -> None:
        params = list(params)
        dimensions = range(2, max((p.ndim for p in params), default=0) + 1) if filters else (2,)
        chosen = [p for p in params if p.ndim in dimensions]
        others = [p for p in params if p.ndim not in dimensions]
        if not chosen or not others:
            kind = "2-D or more" if filters else "2-D"
            raise UserError(
                f"PairedOptimizer needs both {kind} parameters and others; "
                f"of {len(params)} parameters {len(chosen)} are {kind}"
            )
        super().__init__(params, {})
        self._optimizers = [matrices(chosen), rest(others)]
        self.param_groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        self._share()

    def _share(self) -> None:
        # the members work on this optimizer's groups and state, so that schedulers and state_dict see all
        start = 0
        for optimizer in self._optimizers:
            stop = start + len(optimizer.param_groups)
            optimizer.param_groups = self.param_groups[start:stop]
            optimizer.state = self.state
            start = stop

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse another group, as a callback adds that unfreezes layers: neither optimizer would step it.

        Raises:
            UserError: After the optimizer was made.
        """
        if hasattr(self, "_optimizers"):
            raise UserError("PairedOptimizer takes no group after it was made: give it all parameters, frozen ones too")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step both optimizers; ``closure``, if given, is evaluated once, first."""
        loss = evaluate(closure)
        for optimizer in self._optimizers:
            optimizer.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied or pickled."""
        return {**super().__getstate__(), "_optimizers": self._optimizers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both optimizers."""
        super().load_state_dict(state_dict)
        self._share()


def _ranged_if_profiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return an optimizer's ``step`` with what torch puts around it: hooks, and a range for the profiler.

    Torch enters the range whether or not a profiler runs, 12 to 20 µs a step. The private names of torch that this
    needs stand here alone, and ``tests/test_optim.py`` breaks when they move.
    """
    as_torch = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Optimizer, closure: Callable[[], float] | None = None) -> Any:
        wanted = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        )
        by_torch = type(self).step is not wrapper  # torch has wrapped the step of a subclass
        return as_torch(self, closure) if wanted and not by_torch else step(self, closure)

    wrapper.hooked = True  # type: ignore[attr-defined]  # torch wraps what does not say so
    return wrapper


@functools.lru_cache(maxsize=16)  # a schedule may change it at every step
def _as_tensor(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64, device="cpu")  # as exact as the number; it changes no dtype


class LeanSGD(torch.optim.SGD):
    """``torch.optim.SGD``, bit for bit, in three calls for all parameters together.

    For small nets on the CPU, where torch's own takes longer to sort the parameters than to move them. Nor is there a
    range for the profiler around a step while none runs. Either takes the other's state.

    Args:
        params: The parameters, or groups of them.
        lr: Learning rate.
        momentum: As in ``torch.optim.SGD``, like all that follow.
        dampening: Share of a gradient that is left out of the momentum.
        weight_decay: Added to a gradient: this times the parameter.
        nesterov: Whether the momentum is Nesterov's.
        maximize: Whether the loss is to grow.
        fused: Whether torch's kernel for all of it makes the update, in one call: ``torch.optim.SGD(fused=True)``,
            bit for bit, which rounds otherwise than without. Gradients that are sparse, or lie in memory otherwise than
            their parameter, are taken as without.

    Raises:
        ValueError: If a value is negative, or ``nesterov`` comes without momentum or with dampening.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, fused=fused)
        self._step_supports_amp_scaling = False  # a GradScaler unscales the gradients itself

    @_ranged_if_profiled
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make an update; ``closure``, if given, is evaluated once, first."""
        loss = evaluate(closure)
        with torch.no_grad():
            self._update()
        return loss

    def _update(self) -> None:
        for group in self.param_groups:
            moved = [(p, g) for p in group["params"] if (g := p.grad) is not None]
            if moved:
                params, grads = zip(*moved, strict=True)
                (self._move_fused if group["fused"] else self._move)(params, grads, group)

    def _move(self, params: _Tensors, grads: _Tensors, group: dict[str, Any]) -> None:
        if group["maximize"]:
            grads = torch._foreach_neg(grads)
        if group["weight_decay"]:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        if momentum := group["momentum"]:
            states = [self.state[p] for p in params]
            buffers = [state.get("momentum_buffer") for state in states]
            old = [(buffer, g) for buffer, g in zip(buffers, grads, strict=True) if buffer is not None]
            if old:
                before, added = zip(*old, strict=True)
                # a number is made a tensor for each parameter, which takes longer than to multiply it
                torch._foreach_mul_(before, _as_tensor(momentum) if before[0].is_cpu else momentum)
                torch._foreach_add_(before, added, alpha=1 - group["dampening"])
            if len(old) < len(states):  # of some this is the first gradient
                for state, buffer, gradient in zip(states, buffers, grads, strict=True):
                    state["momentum_buffer"] = gradient.clone() if buffer is None else buffer
            momenta = [state["momentum_buffer"] for state in states]
            grads = torch._foreach_add(grads, momenta, alpha=momentum) if group["nesterov"] else momenta
        torch._foreach_add_(params, grads, alpha=-group["lr"])

    def _move_fused(self, params: _Tensors, grads: _Tensors, group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params] if group["momentum"] else []
        momenta = [state.get("momentum_buffer") for state in states]
        begun = {momentum is not None for momentum in momenta}
        if len(begun) > 1 or len({p.dtype for p in params}) > 1 or len({p.device for p in params}) > 1:
            for p, g in zip(params, grads, strict=True):  # the kernel takes what is alike
                self._move_fused((p,), (g,), group)
            return
        layout = [p.stride() for p in params]
        others = [grads, momenta] if True in begun else [grads]
        if any([t.stride() for t in tensors] != layout for tensors in others):
            self._move(params, grads, group)  # the kernel takes memory as it lies
            return
        first = False in begun
        if first:
            momenta = [torch.empty_like(g) for g in grads]
            for state, momentum in zip(states, momenta, strict=True):
                state["momentum_buffer"] = momentum
        torch._fused_sgd_(params, grads, momenta, **{name: group[name] for name in _OF_GROUP}, is_first_step=first)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients, or set them to zero."""
        if not set_to_none:
            return super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


class FilterMuon(Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) for matrices and the filters of convolutions.

    A parameter moves by ``lr`` along about the orthogonal matrix nearest to its Nesterov momentum; a filter bank is
    seen as a matrix with a row a filter. On the CPU it computes in the parameters' own precision, where
    ``torch.optim.Muon``, which takes matrices only, computes in bfloat16. Nor is it the same otherwise: three
    iterations instead of five, no weight decay, and no learning rate that depends on the shape.

    Args:
        params: Parameters of two or more dimensions, or groups of them.
        lr: Learning rate.
        momentum: Momentum.

    Raises:
        UserError: If a parameter has fewer dimensions, or ``lr`` or ``momentum`` is negative.
        RuntimeError: In a step, if a gradient is sparse.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.05, momentum: float = 0.9) -> None:
        if lr < 0 or momentum < 0:
            raise UserError(f"FilterMuon takes no negative learning rate or momentum; they are {lr} and {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    shape = tuple(p.shape)
                    raise UserError(f"FilterMuon takes matrices and filters, not {shape}: PairedOptimizer has the rest")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make an update; ``closure``, if given, is evaluated once, first."""
        loss = evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise RuntimeError("FilterMuon does not support sparse gradients")
                    update = nesterov(self.state[p], p.grad, group["momentum"])
                    p.add_(orthogonalized(update.flatten(1)).view_as(p), alpha=-group["lr"])
        return loss


class SpeedOptimizer(Optimizer):
    """Muon for the convolution filters, SGD with Nesterov momentum for the rest, as one optimizer.

    A filter bank is first scaled to the norm √(its number of filters), then moved by ``filters_lr`` along the
    orthogonal matrix nearest to its momentum (Muon, https://kellerjordan.github.io/posts/muon/, as in
    airbench94_muon). The learning rates of SGD are for a loss that is a mean over the batch.

    Args:
        params: Groups with a ``name``: ``filters`` by Muon, ``head``, ``biases`` and ``whitening`` by SGD.
        filters_lr: Learning rate of Muon.
        filters_momentum: Momentum of Muon.
        head_lr: Learning rate of the head.
        bias_lr: Learning rate of the biases.
        momentum: Momentum of SGD.
        weight_decay: Share of its value that a step of SGD at the full learning rate takes from a parameter, before
            momentum, which multiplies it by 1 / (1 - ``momentum``).

    Raises:
        UserError: If a group has another name, or none.
    """

    def __init__(
        self,
        params: Iterable[Any],
        filters_lr: float = 0.24,
        filters_momentum: float = 0.6,
        head_lr: float = 1340.0,
        bias_lr: float = 106.0,
        momentum: float = 0.85,
        weight_decay: float = 0.004,
    ) -> None:
        lrs = {"filters": filters_lr, "head": head_lr, "biases": bias_lr, "whitening": bias_lr}
        groups = named_groups(params, lrs, weight_decay, "SpeedOptimizer takes", "LitSpeedNet's")
        for group in groups:
            group["momentum"] = momentum
            if group["name"] == "filters":
                group |= {"momentum": filters_momentum, "weight_decay": 0.0}
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make an update; ``closure``, if given, is evaluated once, first."""
        loss = evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
                update = nesterov(self.state[p], gradient, group["momentum"])
                if group["name"] == "filters":
                    p.mul_(len(p) ** 0.5 / p.norm())
                    update = orthogonalized(update.flatten(1)).view_as(p)
                p.add_(update, alpha=-group["lr"])
        return loss


class LookaheadSGD(LeanSGD):
    """SGD with Nesterov momentum whose weights return to a slow average every few steps.

    Lookahead (M. Zhang et al., https://arxiv.org/abs/1907.08610) as in airbench96_faster: every ``lookahead_steps``
    steps the slow weights keep a share of themselves and take the rest from the fast ones, which then begin anew from
    there. :class:`LookaheadLR` lets the share grow. The learning rates are for a loss that is a mean over 512 images.

    Args:
        params: Groups with a ``name``: ``weights``, ``biases``, and ``proxy_weights`` and ``proxy_biases``, which
            have no lookahead. A tensor without a gradient, as a running statistic, has lookahead alone.
        lr: Learning rate of the weights.
        bias_lr: Learning rate of the biases.
        momentum: Momentum.
        weight_decay: Share of its value that a step at the full learning rate takes from a parameter, before
            momentum, which multiplies it by 1 / (1 - ``momentum``).
        lookahead: Share of themselves that the slow weights keep.
        lookahead_steps: Steps from one return to the next.

    Raises:
        UserError: If a group has another name, or none, or a value is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.587,
        bias_lr: float = 37.6,
        momentum: float = 0.85,
        weight_decay: float = 0.00157,
        lookahead: float = 0.774,
        lookahead_steps: int = 5,
    ) -> None:
        if min(lr, bias_lr, momentum, weight_decay) < 0:
            raise UserError("LookaheadSGD takes no negative learning rate, momentum or weight decay")
        if not 0 <= lookahead <= 1 or lookahead_steps < 1:
            raise UserError(
                f"lookahead is {lookahead}, lookahead_steps {lookahead_steps}; they must be from 0 to 1, and at least 1"
            )
        lrs = {"weights": lr, "biases": bias_lr, "proxy_weights": lr, "proxy_biases": bias_lr}
        groups = named_groups(params, lrs, weight_decay, "LookaheadSGD takes", "LitSpeedNet96's")
        for group in groups:
            if not group["name"].startswith("proxy"):
                group |= {"lookahead": lookahead, "lookahead_steps": lookahead_steps, "steps": 0}
        super().__init__(groups, lr, momentum, nesterov=momentum > 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make an update; ``closure``, if given, is evaluated once, first."""
        followed = [group for group in self.param_groups if "lookahead" in group]
        for group in followed:
            for p in group["params"]:
                if "slow" not in self.state[p]:
                    self.state[p]["slow"] = p.clone()
        loss = evaluate(closure)
        self._update()
        for group in followed:
            if all(p.grad is None for p in group["params"]):
                continue  # no step, as where a guard has dropped it
            group["steps"] += 1
            if group["steps"] % group["lookahead_steps"] == 0:
                for p in group["params"]:
                    p.copy_(self.state[p]["slow"].lerp_(p, 1 - group["lookahead"]))
        return loss


class LookaheadLR(LRScheduler):
    """Learning rates from a fifth to the whole over a tenth of the steps, then linearly to 0; lookahead with t³.

    As in airbench96_faster. At the last step the share ``lookahead`` of :class:`LookaheadSGD` is what it was given.

    Args:
        optimizer: Any; the lookahead of the groups that have one is scheduled too.
        total_steps: Steps of the training.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int) -> None:
        self.total_steps = total_steps
        for group in optimizer.param_groups:
            if "lookahead" in group:
                group.setdefault("initial_lookahead", group["lookahead"])
        super().__init__(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, without the steps of the training: a resumed one may be longer."""
        return {name: value for name, value in super().state_dict().items() if name != "total_steps"}

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rates of the next step, and set its lookahead."""
        done, total = self.last_epoch, self.total_steps
        warmup = int(0.1 * total)
        share = 0.2 + 0.8 * done / warmup if done < warmup else max(0.0, (total - done) / (total - warmup))
        for group in self.optimizer.param_groups:
            if "lookahead" in group:
                group["lookahead"] = group["initial_lookahead"] * min(1.0, (done + 1) / total) ** 3
        return [share * lr for lr in self.base_lrs]


def named_groups(
    params: Iterable[Any], lrs: dict[str, float], weight_decay: float, taker: str, giver: str
) -> list[dict[str, Any]]:
    """Return parameter groups with the learning rates of their names, and the weight decay at that rate.

    Raises:
        UserError: If a group has no name of ``lrs``; the message begins with ``taker``.
    """
    groups = list(params)
    for group in groups:
        name = group.get("name") if isinstance(group, dict) else None
        if name not in lrs:
            raise UserError(f"{taker} groups named {', '.join(lrs)}, as {giver}; not {name!r}")
        group |= {"lr": lrs[name], "weight_decay": weight_decay / lrs[name] if lrs[name] else 0.0}
    return groups


def evaluate(closure: Callable[[], float] | None) -> float | None:
    """Return the loss of a step's ``closure``, which computes the gradients; None without one."""
    if closure is None:
        return None
    if torch.is_grad_enabled():  # to enable it once more takes a microsecond
        return closure()
    with torch.enable_grad():
        return closure()


def nesterov(state: dict[str, Any], gradient: Tensor, momentum: float) -> Tensor:
    """Add ``gradient`` to the momentum in ``state``; return the update of Nesterov's SGD."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(gradient)
    buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
    return gradient.add(buffer, alpha=momentum)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return about the nearest orthogonal matrix: all singular values near 1, by three Newton–Schulz iterations.

    The quintic's coefficients are Muon's (https://kellerjordan.github.io/posts/muon/). float32 is multiplied in
    bfloat16 on a GPU.

    Args:
        matrix: (M, N), floating.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrix.bfloat16() if matrix.is_cuda and matrix.dtype == torch.float32 else matrix
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(3):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    if tall:
        x = x.T
    return x.to(matrix.dtype)
