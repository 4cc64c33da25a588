"""RandomState's part beside the random states: the place of a loader that Lightning set up before its restore."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import SaveEverywhere, assert_equal, quiet_trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import TensorDataset

from lit_basics import LitClassifier, RandomState, ResumableDataLoader, SyntheticCIFAR10
from lit_basics.callbacks.random_state import generator_states, set_generator_states

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class Cycled(LitClassifier):
    """Reads estimated_stepping_batches, for which Lightning sets up the training loader early."""

    def __init__(self, dropout=0.3, **mode):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(3072, 10)), **mode)

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
    """Without ``load_loaders`` it begins at epoch 0."""
    state, steps, lr = train(data, max_steps, save_to=tmp_path)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))[:-1]
    assert len(checkpoints) == steps - 1
    for checkpoint in checkpoints:
        resumed = train(data, max_steps, checkpoint=checkpoint)
        assert_equal(resumed[0], state)
        assert resumed[1:] == (steps, lr), checkpoint.stem


@pytest.mark.parametrize("mode", [{}, {"steps_per_execution": 2}])
def test_so_it_does_by_the_module_alone(mode, tmp_path):
    """A net that draws nothing needs no RandomState."""
    whole = Cycled(0.0, **mode)
    quiet_trainer(SaveEverywhere(tmp_path), enable_checkpointing=True, max_epochs=2).fit(whole, images())
    for number in (2, 8):
        resumed = Cycled(0.0, **mode)
        quiet_trainer(max_epochs=2).fit(resumed, images(), ckpt_path=tmp_path / f"{number:03}.ckpt", weights_only=True)
        assert_equal(resumed.state_dict(), whole.state_dict())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_an_epoch_saved_without_random_states_is_not_ended_twice(tmp_path):
    """Lightning would end it a second time, and leave one out."""

    def train(*callbacks, checkpoint=None):
        torch.manual_seed(0)
        module = LitClassifier(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
        fitted = quiet_trainer(*callbacks, enable_checkpointing=checkpoint is None, max_epochs=5, max_steps=16)
        fitted.fit(module, images(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return module.state_dict(), fitted.global_step, fitted.current_epoch

    whole = train(ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1))
    resumed = train(RandomState(), checkpoint=tmp_path / "epoch=0.ckpt")
    assert_equal(resumed[0], whole[0])
    assert resumed[1:] == whole[1:]


@pytest.mark.parametrize("first", [True, False])
def test_a_schedule_of_accumulation_goes_on_within_an_epoch(first, tmp_path):
    """Lightning calls no ``on_train_epoch_start`` then: the rest of the epoch would make a step of each batch."""

    def train(checkpoint=None, savers=()):
        torch.manual_seed(0)
        module = LitClassifier(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
        callbacks = [RandomState(), GradientAccumulationScheduler({0: 4, 1: 2})][:: 1 if first else -1]
        fitted = quiet_trainer(*callbacks, *savers, enable_checkpointing=bool(savers), max_epochs=2)
        fitted.fit(module, datamodule=images(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return module, fitted.global_step

    whole, steps = train(savers=[SaveEverywhere(tmp_path)])
    checkpoints = sorted(tmp_path.glob("*.ckpt"))[:-1]
    assert (len(checkpoints), steps) == (11, 2 + 3)
    for checkpoint in checkpoints:
        resumed, resumed_steps = train(checkpoint)
        assert resumed_steps == steps, checkpoint.stem
        assert_equal(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("fails", [True, False])
def test_states_that_no_training_took_are_not_those_of_the_next_fit(fails, tmp_path):
    """Those of a finished run, or of a resume that failed, would be set where the next fit begins anew."""

    class Fails(pl.Callback):
        def on_load_checkpoint(self, trainer, pl_module, checkpoint):
            if fails:
                raise ValueError("before training starts")

    def train(state, checkpoint=None):
        module = LitClassifier(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
        fitted = quiet_trainer(state, Fails(), max_epochs=1)
        fitted.fit(module, datamodule=images(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return fitted

    train(RandomState()).save_checkpoint(tmp_path / "end.ckpt")
    again = RandomState()
    if fails:
        with pytest.raises(ValueError, match="before training starts"):
            train(again, tmp_path / "end.ckpt")
    else:
        train(again, tmp_path / "end.ckpt")
    torch.manual_seed(7)
    train(again)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    train(RandomState())
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    ("finder", "settings"),
    [("lr_find", {"num_training": 3, "update_attr": False}), ("scale_batch_size", {"max_trials": 1})],
)
def test_a_search_is_not_put_back_after_a_later_seed(finder, settings):
    """Lightning ends it without ``on_fit_end``; what it had drawn from came back where the fit began."""

    def drawn(searches):
        module = LitClassifier(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3072, 10)))
        fitted, before = quiet_trainer(RandomState()), torch.get_rng_state()
        if searches:
            getattr(Tuner(fitted), finder)(module, datamodule=images(), **settings)
            assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(7)
        fitted.fit(module, datamodule=images())
        return torch.rand(3)

    assert torch.equal(drawn(True), drawn(False))


@pytest.mark.parametrize("fails", [True, False])
def test_what_a_module_draws_when_training_starts_is_drawn_before_the_restore(fails, tmp_path):
    class Noise(LitClassifier):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3072, 10)))

        def on_train_start(self):
            self.noise = torch.randn(3)

    class Fails(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            raise ValueError("as training starts")

    def train(checkpoint=None, callbacks=()):
        torch.manual_seed(0)
        module, fitted = Noise(), quiet_trainer(RandomState(), *callbacks, enable_checkpointing=checkpoint is None)
        fitted.fit(module, datamodule=images(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return {**module.state_dict(), "random": torch.get_rng_state()}

    whole = train(callbacks=[SaveEverywhere(tmp_path)])
    if fails:  # nothing is left behind
        fitted = quiet_trainer(RandomState(), Fails())
        with pytest.raises(ValueError, match="as training starts"):
            fitted.fit(Noise(), datamodule=images(), ckpt_path=tmp_path / "003.ckpt", weights_only=True)
        assert "on_train_start" not in vars(fitted.strategy)
    else:
        assert_equal(train(tmp_path / "003.ckpt"), whole)
        assert_equal(train(tmp_path / "001.ckpt"), whole)


def test_a_batch_that_is_drawn_ahead_is_told_of():
    """The checkpoint's position is one too far: Lightning looks there for the end of a loader without a length."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([torch.zeros(1)] * 4)

    class Both(Cycled):
        configure_optimizers = LitClassifier.configure_optimizers

        def compute_loss(self, batch, batch_idx):
            return super().compute_loss(batch[0], batch_idx)

    def train(**settings):
        ours, stream = LitResumable().train_dataloader(), torch.utils.data.DataLoader(Stream())
        quiet_trainer(RandomState(), **settings).fit(Both(), CombinedLoader([ours, stream], "max_size_cycle"))

    with pytest.warns(UserWarning, match="Lightning draws one batch ahead"):
        train()
    train(limit_train_batches=3)


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
