"""What torch.optim lacks: the types of injected optimizers, and two optimizers in one."""

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
        matrices: Makes the optimizer of the 2-D parameters.
        rest: Makes the optimizer of all other parameters.

    Raises:
        UserError: If there are no 2-D parameters, or no others: one optimizer is enough then.
    """

    def __init__(self, params: Iterable[Tensor], matrices: OptimizerCallable, rest: OptimizerCallable) -> None:
        params = list(params)
        flat = [p for p in params if p.ndim != 2]
        if not flat or len(flat) == len(params):
            raise UserError(
                "PairedOptimizer needs both 2-D parameters and others; "
                f"of {len(params)} parameters {len(params) - len(flat)} are 2-D"
            )
        super().__init__(params, {})
        self._optimizers = [matrices([p for p in params if p.ndim == 2]), rest(flat)]
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both optimizers."""
        super().load_state_dict(state_dict)
        self._share()
