"""CIFAR-10 in minutes: the LightningModule of the recipe ``speed94``.

The recipe is airbench94_muon's (K. Jordan, https://github.com/KellerJordan/cifar10-airbench) with smaller images in
the first epochs. The data's part, alternating flips and shifts of two pixels, is the DataModule's.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, interpolate
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_basics.errors import UserError
from lit_basics.nets import SpeedNet
from lit_basics.optim import LRSchedulerCallable, OptimizerCallable, SpeedOptimizer
from lit_basics.whitened import LitWhitened

SLOTS = 65_536
"""For how many images the last loss is kept; of more, some share a place."""
WHITENING_EPOCHS = 3
"""Epochs in which the bias of the whitening convolution is trained, and then left as it is."""


class LitSpeedNet(LitWhitened):
    """SpeedNet by :class:`~lit_basics.optim.SpeedOptimizer`, all learning rates falling linearly to 0.

    Later epochs may train on the hardest images of each batch only: those whose loss was largest when they were last
    trained on. ``train/loss`` is then the loss of these. Each rank chooses from its own share.

    As ``LitWhitened`` it computes in bfloat16 where the device has it, and tests and predicts by six views of an image.

    Args:
        num_classes: Number of classes.
        widths: Channels of the three blocks.
        resolutions: Sides in pixels to which the images of each epoch are scaled down; the last holds for all
            later epochs. Empty: the images as they are.
        hardest: Shares of a batch that are trained on, by epoch; the last holds for all later epochs. Empty: all. For
            others than 1 a batch is (images, labels, indices), as of ``CIFAR10DataModule(with_indices=True)``.
        label_smoothing: As for ``nn.CrossEntropyLoss``.
        optimizer: Makes the optimizer from :meth:`trained_parameters`.
        lr_scheduler: Another scheduler; by default :meth:`falling_to_zero`, which goes by steps.
        lr_interval: Whether it steps every optimizer ``step``, the default here, or every ``epoch``.
        **kwargs: As :class:`LitClassifier`, without ``criterion``.

    Raises:
        UserError: If a resolution is below 16, or one of ``hardest`` not above 0, or above 1.
    """

    net: SpeedNet
    losses: Tensor

    def __init__(
        self,
        num_classes: int = 10,
        widths: tuple[int, int, int] = (64, 256, 256),
        resolutions: Sequence[int] = (24, 24, 24, 28, 28, 28, 32),
        hardest: Sequence[float] = (),
        label_smoothing: float = 0.2,
        *,
        optimizer: OptimizerCallable = SpeedOptimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "step",
        **kwargs: Any,
    ) -> None:
        if min(resolutions, default=16) < 16:
            raise UserError(f"resolutions are {list(resolutions)}; each must be at least 16 pixels")
        if not all(0 < share <= 1 for share in hardest):
            raise UserError(f"hardest is {list(hardest)}; each must be a share above 0, at most 1")
        super().__init__(
            net=SpeedNet(num_classes, widths),
            num_classes=num_classes,
            label_smoothing=label_smoothing,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler or self.falling_to_zero,
            lr_interval=lr_interval,
            **kwargs,
        )
        self.resolutions, self.hardest = list(resolutions), list(hardest)
        if hardest:
            self.register_buffer("losses", torch.full((SLOTS,), 1e4))  # what was never trained on comes first
        self.register_load_state_dict_pre_hook(with_or_without_losses)  # type: ignore[no-untyped-call]
        self._froze = False

    def trained_parameters(self) -> list[dict[str, Any]]:
        """Return the groups: the whitening's bias, the other biases, the head, the filters."""
        net = self.net
        rest = [p for p in net.parameters() if p.requires_grad and p is not net.whiten.bias]
        return [
            {"name": "whitening", "params": [net.whiten.bias]},
            {"name": "biases", "params": [p for p in rest if p.ndim == 1]},
            {"name": "head", "params": [p for p in rest if p.ndim == 2]},
            {"name": "filters", "params": [p for p in rest if p.ndim == 4]},
        ]

    def falling_to_zero(self, optimizer: Optimizer) -> LambdaLR:
        """Return the scheduler: to 0 at the end of training, for the whitening's bias after three epochs.

        Raises:
            UserError: If the end of training is not known, or ``lr_interval`` is not ``step``.
        """
        steps = self.steps_of_training()  # which sets the loaders up, whose batches are known then
        an_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        early = min(steps, WHITENING_EPOCHS * (math.ceil(an_epoch) if math.isfinite(an_epoch) else math.inf))

        def linear(end: float) -> Any:
            return lambda step: max(0.0, 1 - step / max(1, end))

        ends = [early if group.get("name") == "whitening" else steps for group in optimizer.param_groups]
        return LambdaLR(optimizer, [linear(end) for end in ends])

    def compute_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of the batch, or its hardest images, at the epoch's resolution.

        The first batch sets the whitening.

        Raises:
            UserError: If the hardest are to be chosen, and the batch has no indices.
        """
        x, y = batch[:2]
        self.whiten_once(x, self.net)
        trained: Any = self.net.whiten.bias
        if self._froze and self.current_epoch < WHITENING_EPOCHS:  # another fit
            trained.requires_grad_(True)
            self._froze = False
        elif self.current_epoch >= WHITENING_EPOCHS and trained.requires_grad and not distributed.is_initialized():
            # its gradient, which nobody uses, is a tenth of the backward pass; DistributedDataParallel waits for it
            trained.requires_grad_(False)
            self._froze = True
        index = None
        if self.hardest:
            if len(batch) < 3:
                raise UserError(
                    "hardest needs batches of (images, labels, indices): --data.with_indices true; or --model.hardest "
                    "'[]' trains on all"
                )
            index, share = batch[2] % SLOTS, self.of_epoch(self.hardest)
            if share < 1:
                chosen = self.losses[index].topk(max(1, int(share * len(x)))).indices.sort().values
                x, y, index = x[chosen], y[chosen], index[chosen]
        if self.resolutions:
            side = self.of_epoch(self.resolutions)
            if side < x.shape[-1]:
                x = interpolate(x, size=(side, side), mode="bilinear")
        logits = self(x)
        if index is not None:
            self.keep_losses(index, logits.detach(), y)
        loss: Tensor = self.criterion(logits, y)
        return loss

    def on_after_backward(self) -> None:
        """Leave the whitening's bias as it is, where several processes go on computing its gradient."""
        if self.current_epoch >= WHITENING_EPOCHS:
            trained: Any = self.net.whiten.bias
            trained.grad = None

    def of_epoch(self, values: list[Any]) -> Any:
        """Return the value of this epoch, of a list of which the last holds for all later ones."""
        return values[min(self.current_epoch, len(values) - 1)]

    def keep_losses(self, index: Tensor, logits: Tensor, y: Tensor) -> None:
        """Keep the loss of each image, of those of all ranks."""
        losses = cross_entropy(logits, y, reduction="none", label_smoothing=self.label_smoothing).to(self.losses)
        if distributed.is_initialized():
            index, losses = self.all_gather((index, losses))
        self.losses[index] = losses


def with_or_without_losses(module: LitSpeedNet, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a state be loaded that was saved with another ``hardest``."""
    if module.hardest:
        state_dict.setdefault(f"{prefix}losses", module.losses)
    else:
        state_dict.pop(f"{prefix}losses", None)
