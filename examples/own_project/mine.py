"""Two ways to subclass LitClassifier: another loss and optimizer, or another training step."""

import torch
from net import SmallNet
from torch.nn.functional import cross_entropy

from lit_basics import LitClassifier


class Mine(LitClassifier):
    """Label smoothing, and weight decay for the weights only; everything else stays as it is.

    Works in manual optimization too: --config manual
    """

    def __init__(self, width: int = 16, lr: float = 3e-3, smoothing: float = 0.1, **kwargs):
        super().__init__(net=SmallNet(width), **kwargs)
        self.lr, self.smoothing = lr, smoothing

    def compute_loss(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.record("train/acc", (logits.argmax(1) == y).float().mean())
        return cross_entropy(logits, y, label_smoothing=self.smoothing)

    def configure_optimizers(self):
        weights = [p for p in self.parameters() if p.ndim > 1]
        biases = [p for p in self.parameters() if p.ndim == 1]
        groups = [
            {"params": weights, "weight_decay": 0.01, "name": "weights"},
            {"params": biases, "weight_decay": 0.0, "name": "biases"},
        ]
        return torch.optim.AdamW(groups, lr=self.lr)


class Mixup(LitClassifier):
    """A training step of its own, as in any Lightning project: each image is blended with another one."""

    def __init__(self, width: int = 16, **kwargs):
        super().__init__(net=SmallNet(width), **kwargs)

    def training_step(self, batch, batch_idx):
        x, y = batch
        share = torch.rand(len(x), device=x.device)
        pixels = share.view(-1, 1, 1, 1)
        logits = self(pixels * x + (1 - pixels) * x.flip(0))
        losses = [cross_entropy(logits, labels, reduction="none") for labels in (y, y.flip(0))]
        return (share * losses[0] + (1 - share) * losses[1]).mean()
