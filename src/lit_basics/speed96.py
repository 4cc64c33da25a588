"""Nearly 96 % on CIFAR-10: the LightningModule of the recipe ``speed96``.

The recipe is airbench96_faster's (K. Jordan, https://github.com/KellerJordan/cifar10-airbench). There the proxy is
trained first, on the same batches in the same order, and its choices are kept; here both are trained together, which
makes the same updates. The data's part, alternating flips, shifts of four pixels and cut-out squares, is the
DataModule's.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lit_basics.errors import UserError
from lit_basics.nets import SpeedNet
from lit_basics.optim import LookaheadLR, LookaheadSGD, LRSchedulerCallable, OptimizerCallable
from lit_basics.whitened import LitWhitened

PROXY_EVERY = 4
"""Every how many steps the proxy is trained; it chooses in each."""


class LitSpeedNet96(LitWhitened):
    """A wider and deeper SpeedNet, trained on the images of each batch that a small proxy net finds hardest.

    The proxy is trained beside the net, on what it has chosen, in every fourth step; half of a batch brings almost what
    all of it would. ``train/loss`` is the loss of the chosen images. The optimizer is
    :class:`~lit_basics.optim.LookaheadSGD`; the learning rates rise over the first tenth of the steps, then fall
    linearly to 0.

    As ``LitWhitened`` it computes in bfloat16 where the device has it, and tests and predicts by six views of an image.

    On several processes each rank chooses from its own share. This needs
    ``strategy=ddp_find_unused_parameters_true``, because most steps do not train the proxy.

    Args:
        num_classes: Number of classes.
        widths: Channels of the three blocks.
        proxy_widths: Those of the proxy.
        hardest: Share of a batch that is chosen.
        label_smoothing: As for ``nn.CrossEntropyLoss``.
        optimizer: Makes the optimizer from :meth:`trained_parameters`.
        lr_scheduler: Another scheduler; by default :meth:`rising_and_falling`, which goes by steps.
        lr_interval: Whether it steps every optimizer ``step``, the default here, or every ``epoch``.
        **kwargs: As :class:`LitClassifier`, without ``criterion``.

    Raises:
        UserError: If ``hardest`` is not above 0, or above 1.
    """

    net: SpeedNet

    def __init__(
        self,
        num_classes: int = 10,
        widths: tuple[int, int, int] = (128, 384, 512),
        proxy_widths: tuple[int, int, int] = (32, 64, 64),
        hardest: float = 0.5,
        label_smoothing: float = 0.2,
        *,
        optimizer: OptimizerCallable = LookaheadSGD,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "step",
        **kwargs: Any,
    ) -> None:
        if not 0 < hardest <= 1:
            raise UserError(f"hardest is {hardest}; it must be a share above 0, at most 1")

        def net(widths: tuple[int, int, int], depth: int) -> SpeedNet:
            net = SpeedNet(num_classes, widths, depth, batch_norm_momentum=0.1, logit_scale=1 / 9)
            nn.init.zeros_(net.whiten.bias)  # type: ignore[arg-type]  # it has one
            return net

        super().__init__(
            net=net(widths, 3),
            num_classes=num_classes,
            label_smoothing=label_smoothing,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler or self.rising_and_falling,
            lr_interval=lr_interval,
            **kwargs,
        )
        self.hardest = hardest
        self.proxy = net(proxy_widths, 2).to(memory_format=torch.channels_last)
        self.proxy.whiten.requires_grad_(False)

    def trained_parameters(self) -> list[dict[str, Any]]:
        """Return the groups: biases of the batch norms and all other weights, of the net and of the proxy.

        The net's running statistics, as they are on its device now, are among the weights: they have no gradient, but
        lookahead moves them.
        """
        groups = []
        for prefix, net in (("", self.net), ("proxy_", self.proxy)):
            norms = [module for module in net.modules() if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))]
            biases = {id(norm.bias) for norm in norms}
            weights = [p for p in net.parameters() if p.requires_grad and id(p) not in biases]
            statistics = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
            groups.append({"name": f"{prefix}weights", "params": weights if prefix else [*weights, *statistics]})
            groups.append({"name": f"{prefix}biases", "params": [norm.bias for norm in norms]})
        return groups

    def rising_and_falling(self, optimizer: Optimizer) -> LookaheadLR:
        """Return the scheduler, over all steps of the training.

        Raises:
            UserError: If the training has no end, or none that is known, or ``lr_interval`` is not ``step``.
        """
        steps = self.steps_of_training()
        if math.isinf(steps):
            raise UserError("LitSpeedNet96's learning rates fall until the training ends: give max_epochs or max_steps")
        return LookaheadLR(optimizer, max(1, int(steps)))

    def compute_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of the images that the proxy finds hardest, with the gradient of the proxy's own."""
        x, y, *_ = batch
        self.whiten_once(x, self.net, self.proxy)
        learns = self.global_step % PROXY_EVERY == 0
        with torch.set_grad_enabled(learns):
            logits = self.logits(self.proxy, x)
            losses = cross_entropy(logits, y, reduction="none", label_smoothing=self.label_smoothing)
        chosen = losses.detach().topk(max(1, int(self.hardest * len(x)))).indices.sort().values
        loss: Tensor = self.criterion(self(x[chosen]), y[chosen])
        if learns:
            proxy_loss = losses[chosen].mean()
            loss = loss + (proxy_loss - proxy_loss.detach())  # its gradient, but not its value
        return loss
