"""RandomState's part beside the random states: the place of a loader that Lightning set up before its restore."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import SaveEverywhere, assert_equal, quiet_trainer
from torch import nn
from torch.utils.data import TensorDataset

from lit_basics import LitClassifier, RandomState, ResumableDataLoader, SyntheticCIFAR10
from lit_basics.callbacks.random_state import generator_states, set_generator_states

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class Cycled(LitClassifier):
    """Reads estimated_stepping_batches, for which Lightning sets up the training loader early."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(3072, 10)))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def images():
    return SyntheticCIFAR10(44, 4, batch_size=8, val_size=0)


def samples():
    data = images()
    data.setup("fit")
    x, y = (torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True))
    return TensorDataset(x, y)


class LitResumable(pl.LightningDataModule):
    def train_dataloader(self):
        return ResumableDataLoader(samples(), batch_size=8, shuffle=True, seed=4)


def train(data, max_steps, checkpoint=None, save_to=None):
    pl.seed_everything(0 if checkpoint is None else 9, verbose=False)
    model = Cycled()
    savers = [SaveEverywhere(save_to)] if save_to else []
    trainer = quiet_trainer(
        RandomState(), *savers, enable_checkpointing=bool(save_to), max_epochs=3, max_steps=max_steps
    )
    trainer.fit(model, datamodule=data(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    state = trainer.optimizers[0].state_dict()
    momentum = {str(key): value["momentum_buffer"] for key, value in state["state"].items()}
    return (
        {**model.state_dict(), **momentum, "random": torch.get_rng_state()},
        trainer.global_step,
        state["param_groups"][0]["lr"],
    )


@pytest.mark.parametrize("max_steps", [-1, 16])
@pytest.mark.parametrize("data", [images, LitResumable])
def test_a_loader_that_is_set_up_early_resumes_at_its_place(data, max_steps, tmp_path):
    """Without ``_load_loaders`` it begins at epoch 0."""
    state, steps, lr = train(data, max_steps, save_to=tmp_path)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))[:-1]
    assert len(checkpoints) == steps - 1
    for checkpoint in checkpoints:
        resumed = train(data, max_steps, checkpoint=checkpoint)
        assert_equal(resumed[0], state)
        assert resumed[1:] == (steps, lr), checkpoint.stem


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_state_of_the_device_that_is_trained_on_is_kept(kind, monkeypatch):
    """By stand-ins for what torch has of GPUs."""
    states = {torch.device(kind, 0): torch.tensor([1]), torch.device(kind, 3): torch.tensor([2])}
    module = getattr(torch, kind)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(module, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(module, "set_rng_state", lambda state, device: states.update({device: state}))
    saved = generator_states(torch.device(kind, 3))
    set_generator_states(saved, torch.device(kind, 0))  # the third alone was visible, say
    assert torch.equal(states[torch.device(kind, 0)], torch.tensor([2]))
    with pytest.warns(UserWarning, match=f"the run was on {kind}, here it is on cpu"):
        set_generator_states(saved)
