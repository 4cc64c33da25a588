"""What torch.optim lacks: two optimizers in one, Muon for filters, a quicker SGD; the types of injected optimizers."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_basics.errors import UserError

# aliases of our own: lightning.pytorch.cli has the same, but needs jsonargparse at import
OptimizerCallable = Callable[[Iterable], Optimizer]  # type: ignore[type-arg]
"""Makes an optimizer from an iterable of parameters; a class path and its arguments in YAML."""
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]
"""Makes a learning-rate scheduler from an optimizer."""


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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step both optimizers; ``closure``, if given, is evaluated once, first."""
        loss = evaluate(closure)
        for optimizer in self._optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both optimizers."""
        super().load_state_dict(state_dict)
        self._share()


class LeanSGD(torch.optim.SGD):
    """``torch.optim.SGD``, bit for bit, in three calls for all parameters together.

    For small nets on the CPU, where torch's own takes longer to sort the parameters than to move them. Either takes the
    other's state.

    Args:
        params: The parameters, or groups of them.
        lr: Learning rate.
        momentum: As in ``torch.optim.SGD``, like all that follow.
        dampening: Share of a gradient that is left out of the momentum.
        weight_decay: Added to a gradient: this times the parameter.
        nesterov: Whether the momentum is Nesterov's.
        maximize: Whether the loss is to grow.

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
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make an update; ``closure``, if given, is evaluated once, first."""
        loss = evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._move(params, [p.grad for p in params if p.grad is not None], group)
        return loss

    def _move(self, params: list[Tensor], grads: list[Tensor] | tuple[Tensor, ...], group: dict[str, Any]) -> None:
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
                torch._foreach_mul_(before, momentum)
                torch._foreach_add_(before, added, alpha=1 - group["dampening"])
            if len(old) < len(states):  # of some this is the first gradient
                for state, buffer, gradient in zip(states, buffers, grads, strict=True):
                    state["momentum_buffer"] = gradient.clone() if buffer is None else buffer
            momenta = [state["momentum_buffer"] for state in states]
            grads = torch._foreach_add(grads, momenta, alpha=momentum) if group["nesterov"] else momenta
        torch._foreach_add_(params, grads, alpha=-group["lr"])

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
        weight_decay: Share of its value that a parameter of SGD loses in a step at the full learning rate.

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
        groups = list(params)
        for group in groups:
            name = group.get("name") if isinstance(group, dict) else None
            if name not in lrs:
                raise UserError(f"SpeedOptimizer takes groups named {', '.join(lrs)}, as LitSpeedNet's; not {name!r}")
            muon = name == "filters"
            group["lr"] = lrs[name]
            group["momentum"] = filters_momentum if muon else momentum
            group["weight_decay"] = 0.0 if muon or not lrs[name] else weight_decay / lrs[name]
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


def evaluate(closure: Callable[[], float] | None) -> float | None:
    """Return the loss of a step's ``closure``, which computes the gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def nesterov(state: dict[str, Any], gradient: Tensor, momentum: float) -> Tensor:
    """Add ``gradient`` to the momentum in ``state``; return the update of Nesterov's SGD."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(gradient)
    buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
    return gradient.add(buffer, alpha=momentum)


def orthogonalized(matrix: Tensor, steps: int = 3) -> Tensor:
    """Return about the nearest orthogonal matrix: all singular values near 1, by Newton–Schulz iterations.

    The quintic's coefficients are Muon's (https://kellerjordan.github.io/posts/muon/). In bfloat16 on a GPU.

    Args:
        matrix: (M, N), floating.
        steps: Iterations.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    if tall:
        x = x.T
    return x.to(matrix.dtype)
