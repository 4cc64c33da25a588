"""Images of one's own: subclass ArrayDataModule and return the arrays; the rest is there already."""

import lightning.pytorch as pl
import torch
from torch import nn

from lit_basics import ArrayDataModule, ImageArrays, LitClassifier


class Bars(ArrayDataModule):
    """Grey images of 16 x 16 pixels with a bright bar: class 0 lies, class 1 stands."""

    def load(self):
        return ImageArrays(*self.draw(2000, seed=0), *self.draw(500, seed=1))

    def draw(self, count, seed):
        rng = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 160, (count, 1, 16, 16), dtype=torch.uint8, generator=rng)
        labels = torch.randint(0, 2, (count,), generator=rng)
        places = torch.randint(0, 16, (count,), generator=rng)
        for image, label, place in zip(images, labels, places, strict=True):
            image[0].select(int(label), int(place)).add_(64)
        return images, labels


if __name__ == "__main__":
    pl.seed_everything(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    module = LitClassifier(net, num_classes=2, optimizer=lambda params: torch.optim.Adam(params, lr=0.01))
    data = Bars(batch_size=50, val_size=0.2, crop=2)  # mean and std are measured
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data)
    print(f"test/acc {trainer.callback_metrics['test/acc']:.3f}")
