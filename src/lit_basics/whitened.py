"""What ``speed94`` and ``speed96`` share: whitening from the first batch, bfloat16, six views of an image in test."""

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import pad

from lit_basics.errors import UserError
from lit_basics.modules import LitClassifier
from lit_basics.nets import SpeedNet, patch_covariance


class LitWhitened(LitClassifier):
    """What the recipes share: whitening from the first batch, bfloat16, six views of an image in test.

    It computes in bfloat16 where the device has instructions for it (see :func:`has_bfloat16`), at every precision
    of the Trainer but ``64-true``; weights stay float32. ``test`` and ``predict`` use test-time augmentation:
    the mean over the image and its mirror image of the centre (½) and of two diagonal shifts (¼ each).

    Args:
        net: Maps images (N, 3, H, W) to logits (N, num_classes).
        label_smoothing: As for ``nn.CrossEntropyLoss``.
        **kwargs: As :class:`LitClassifier`, without ``criterion``.
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
            if filters.requires_grad and (self.global_step or self._trained(net)):
                continue  # a subclass trains them
            if self._seen.get(net) == filters._version:  # not written to since: no need to wait for the device
                continue
            if not net.whitened:
                covariance = patch_covariance(images)
                if distributed.is_initialized():
                    covariance = self.trainer.strategy.reduce(covariance, reduce_op="mean")
                net.whiten_(covariance)
            self._seen[net] = filters._version

    def _trained(self, net: SpeedNet) -> bool:
        # rank 0's filters are those that all ranks begin with
        trained = not net.untouched
        return self.trainer.strategy.broadcast(trained) if distributed.is_initialized() else trained

    def steps_of_training(self) -> float:
        """Return the number of optimizer steps of the training, for a schedule by steps; infinity where it has no end.

        Raises:
            UserError: If the scheduler steps by epochs, or a training loader without a length does not tell.
        """
        if self.lr_interval != "step":
            raise UserError(
                f"{type(self).__name__}'s learning rates change step by step, but lr_interval is {self.lr_interval!r}: "
                "give an lr_scheduler for epochs, or leave it"
            )
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
        self._evaluate(batch, self._test_metrics, self.forward_augmented)

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


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16, so that it is faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.12
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
