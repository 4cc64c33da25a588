"""What the tests of speed94 and speed96 share: small data, short runs, and the whitening written out."""

import torch
from helpers import quiet_trainer

from lit_basics import SyntheticCIFAR10

EPOCHS, BATCH, IMAGES = 4, 32, 96


def images(**kwargs):
    return SyntheticCIFAR10(
        IMAGES, 20, **{"batch_size": BATCH, "val_size": 0, "crop": 2, "flip": "alternating", "drop_last": True} | kwargs
    )


def fit(model, data, *callbacks, train_dataloaders=None, **settings):
    trainer = quiet_trainer(*callbacks, **{"max_epochs": EPOCHS, **settings})
    trainer.fit(model, train_dataloaders, datamodule=data)
    return trainer


def same_batches(monkeypatch, **kwargs):
    """Return data, and the batches that it gives in every epoch from here on."""
    data = images(crop=0, flip=False, **kwargs)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    batches = list(loader)
    monkeypatch.setattr(type(loader), "__iter__", lambda self: iter(batches))
    return data, batches


def whitening(x):
    patches = torch.stack([x[:, :, i : i + 31, j : j + 31] for i in (0, 1) for j in (0, 1)], 2)  # (N, C, 4, 31, 31)
    patches = patches.permute(0, 3, 4, 1, 2).reshape(-1, 12)
    values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
    filters = torch.stack([vectors[:, i] / (values[i] + 5e-4).sqrt() for i in range(12)]).view(12, 3, 2, 2)
    return torch.cat([filters, -filters])
