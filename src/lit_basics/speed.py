"""CIFAR-10 in minutes: the LightningModule of the recipe ``speed94``, and what ``speed96`` shares with it.

The recipe is airbench94_muon's (K. Jordan, https://github.com/KellerJordan/cifar10-airbench) with smaller images in
the first epochs. The data's part, alternating flips and shifts of two pixels, is the DataModule's.
"""

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy, interpolate, pad
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_basics.errors import UserError
from lit_basics.modules import LitClassifier
from lit_basics.nets import SpeedNet, patch_covariance
from lit_basics.optim import LRSchedulerCallable, OptimizerCallable, SpeedOptimizer

SLOTS = 65_536
"""For how many images the last loss is kept; of more, some share a place."""
WHITENING_EPOCHS = 3
"""Epochs in which the bias of the whitening convolution is trained, and then left as it is."""


class LitWhitened(LitClassifier):
    """What the recipes share: whitening from the first batch, bfloat16, six views of an image in test.

    It computes in bfloat16 where the device has instructions for it (see :func:`has_bfloat16`), at every precision
    of the Trainer but ``64-true``; weights stay float32. Tested and predicted is with test-time augmentation:
    the mean over the image and its mirror image of the centre (½) and of two diagonal shifts (¼ each).

    Args:
        net: Maps images (N, 3, H, W) to logits (N, num_classes).
        label_smoothing: As for ``nn.CrossEntropyLoss``.
        **kwargs: As :class:`LitClassifier`.
    """

    def __init__(self, net: SpeedNet, label_smoothing: float, **kwargs: Any) -> None:
        super().__init__(net=net, criterion=nn.CrossEntropyLoss(label_smoothing=label_smoothing), **kwargs)
        self.label_smoothing = label_smoothing
        self.net.to(memory_format=torch.channels_last)
        self._seen: dict[SpeedNet, int] = {}

    def whiten_once(self, images: Tensor, *nets: SpeedNet) -> None:
        """Set the whitening of those of ``nets`` that have none from the images of a batch, of all ranks together."""
        for net in nets:
            filters = net.whiten.weight
            if self.global_step and filters.requires_grad:
                continue  # a subclass trains them
            if self._seen.get(net) == filters._version:  # not written to since: no need to wait for the device
                continue
            if not net.whitened:
                covariance = patch_covariance(images)
                if distributed.is_initialized():
                    covariance = self.trainer.strategy.reduce(covariance, reduce_op="mean")
                net.whiten_(covariance)
            self._seen[net] = filters._version

    def steps_of_training(self) -> float:
        """Return the number of optimizer steps of the training; infinity where it has no end.

        Raises:
            UserError: If a training loader without a length does not tell.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps < 0:
            raise UserError(
                f"{type(self).__name__}'s learning rates fall until the training ends, which a training loader without "
                "a length does not tell: give max_steps"
            )
        return steps

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images ``x`` (N, 3, H, W), in the dtype of ``x``."""
        return self.logits(self.net, x)

    def logits(self, net: nn.Module, x: Tensor) -> Tensor:
        """Return what ``net`` makes of images ``x``, as :meth:`forward`."""
        x = x.contiguous(memory_format=torch.channels_last)
        fast, kind = has_bfloat16(x.device), x.device.type
        # a GPU without it, as the T4, keeps the float16 of a 16-mixed around this
        with torch.autocast(kind, torch.bfloat16, enabled=fast) if fast or kind == "cpu" else nullcontext():
            logits: Tensor = net(x)
        return logits.to(x.dtype)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the test loss and metrics, with test-time augmentation."""
        self._evaluate(batch, self.test_metrics, self.forward_augmented)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the predictions for a batch's inputs, with test-time augmentation."""
        return self.forward_augmented(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def forward_augmented(self, x: Tensor) -> Tensor:
        """Return the mean logits of six views of images ``x``."""

        def mirrored(x: Tensor) -> Tensor:
            logits: Tensor = (self(x) + self(x.flip(-1))) / 2
            return logits

        shifted = pad(x, (1, 1, 1, 1), mode="reflect")
        return mirrored(x) / 2 + (mirrored(shifted[:, :, :-2, :-2]) + mirrored(shifted[:, :, 2:, 2:])) / 4


class LitSpeedNet(LitWhitened):
    """SpeedNet by :class:`~lit_basics.optim.SpeedOptimizer`, all learning rates falling linearly to 0.

    Later epochs may train on the hardest images of each batch only: those whose loss was largest when they were last
    trained on. ``train/loss`` is then the loss of these. Each rank chooses from its own share.

    It computes in bfloat16 where the device has instructions for it, at every precision of the Trainer but ``64-true``;
    weights stay float32. It tests and predicts with test-time augmentation: the mean over the image and its mirror
    image of the centre (½) and of two diagonal shifts (¼ each).

    Args:
        num_classes: Number of classes.
        widths: Channels of the three blocks.
        resolutions: Sides in pixels to which the images of each epoch are scaled down; the last holds for all
            later epochs. Empty: the images as they are.
        hardest: Shares of a batch that are trained on, by epoch; the last holds for all later epochs. Empty: all. For
            others than 1 a batch is (images, labels, indices), as of ``CIFAR10DataModule(with_indices=True)``.
        label_smoothing: As for ``nn.CrossEntropyLoss``.
        optimizer: Makes the optimizer from :meth:`trained_parameters`.
        lr_scheduler: Another scheduler; by default :meth:`falling_to_zero`.
        lr_interval: Whether it steps every optimizer ``step``, the default here, or every ``epoch``.
        **kwargs: As :class:`LitClassifier`.

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
            UserError: If the end of training is not known.
        """
        steps = self.steps_of_training()  # which sets the loaders up, whose batches are known then
        an_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        early = min(steps, WHITENING_EPOCHS * (math.ceil(an_epoch) if math.isfinite(an_epoch) else math.inf))

        def linear(end: float) -> Any:
            return lambda step: max(0.0, 1 - step / end)

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


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16, so that it is faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.12
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def with_or_without_losses(module: LitSpeedNet, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a state be loaded that was saved with another ``hardest``."""
    if module.hardest:
        state_dict.setdefault(f"{prefix}losses", module.losses)
    else:
        state_dict.pop(f"{prefix}losses", None)
