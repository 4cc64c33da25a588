"""The eleven points of the optimizer tutorial: as (x, y), and as (row number, y) for an embedding."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_basics.data.arrays import ArrayLoader, epoch_order, no_batches
from lit_basics.data.order import check_batch_size, check_seed


class LinearDataModule(pl.LightningDataModule):
    """Eleven readings x of a thermometer of unknown scale and y in degrees, in one batch.

    Args:
        batch_size: Size of the global batch; all 11 points by default.
        seed: Seed of the order, if the batch is smaller.
    """

    X = (0.5, 14.0, 15.0, 28.0, 11.0, 8.0, 3.0, -4.0, 6.0, 13.0, 21.0)
    Y = (35.7, 55.9, 58.2, 81.9, 56.3, 48.9, 33.9, 21.8, 48.4, 60.4, 68.4)

    def __init__(self, batch_size: int = 11, seed: int = 0) -> None:
        super().__init__()
        check_batch_size(batch_size)
        check_seed(seed)
        self.batch_size, self.seed, self.drop_last = batch_size, seed, False

    def inputs(self) -> Tensor:
        """Return 0.1·X, float32 (11,)."""
        return 0.1 * torch.tensor(self.X)

    def targets(self) -> Tensor:
        """Return Y, float32 (11,)."""
        return torch.tensor(self.Y)

    def train_dataloader(self) -> ArrayLoader:
        """Return the points; in their own order if they make one batch on one process."""
        several = self.trainer is not None and self.trainer.world_size > 1  # a shuffled batch has equal shares
        order = epoch_order(self, len(self.X), shuffle=several or self.batch_size < len(self.X))
        return ArrayLoader(self.inputs(), self.targets(), order)

    def val_dataloader(self) -> list[Any]:
        """Return nothing: there are no points to spare."""
        return no_batches()


class EmbeddingDataModule(LinearDataModule):
    """The numbers 0 to 10 as inputs, each with the y of that point as its target."""

    def inputs(self) -> Tensor:
        """Return the row numbers, int64 (11,)."""
        return torch.arange(len(self.X))

    def targets(self) -> Tensor:
        """Return Y, float32 (11, 1)."""
        return super().targets()[:, None]
