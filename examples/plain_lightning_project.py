"""Somebody's Lightning project, with three parts of lit_basics: a loader and two callbacks. No command line."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lit_basics import ArrayLoader, BestLossCheckpoint, EpochOrder, GradientMonitor


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.layers(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", nn.functional.mse_loss(self.layers(x), y), batch_size=len(x))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


if __name__ == "__main__":
    pl.seed_everything(0)
    x = torch.randn(1200, 8)
    y = x.square().sum(1, keepdim=True).sqrt()
    train = ArrayLoader(x[:1000], y[:1000], EpochOrder(1000, 50, shuffle=True))
    val = ArrayLoader(x[1000:], y[1000:], EpochOrder(200, 50, shuffle=False))
    best = BestLossCheckpoint("runs/regression", monitor="val/loss")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=10,
        callbacks=[GradientMonitor(), best],
        logger=CSVLogger("runs", name="regression", version="csv"),
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Regression(), train, val)
    print(f"best val/loss {best.best_model_score:.4f} in {best.best_model_path}")
