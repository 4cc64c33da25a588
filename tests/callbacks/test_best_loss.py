"""BestLossCheckpoint and LastCheckpoint; the tutorial's mistakes are tested with system E."""

import json
import shutil
import time
import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from helpers import SaveEverywhere, assert_equal, fit, metrics, on_ranks, quiet_trainer, ranks
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from lit_basics import (
    BestLossCheckpoint,
    DurableCheckpointIO,
    LinearDataModule,
    LitBlitzNet,
    LitClassifier,
    LitLinearRegression,
    SyntheticCIFAR10,
)
from lit_basics.callbacks import last
from lit_basics.cli import main

trainer = partial(quiet_trainer, max_epochs=2, enable_checkpointing=True)


class Losses(pl.Callback):
    """Keeps the loss of each validation."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append(trainer.callback_metrics["val/loss"])


def data(**options):
    return SyntheticCIFAR10(64, 16, batch_size=16, **options)


def test_validation_loss_is_monitored_where_there_is_validation(tmp_path):
    best, losses = BestLossCheckpoint(str(tmp_path)), Losses()
    trainer(best, losses).fit(LitBlitzNet(), datamodule=data(val_size=16))
    assert best.monitor == "val/loss"
    assert len(losses.seen) == 2
    assert best.best_model_score == min(losses.seen)


@pytest.mark.parametrize("how", [{"val_size": 0}, {"limit": 0}])
def test_training_loss_is_monitored_where_there_is_none(tmp_path, how):
    best = BestLossCheckpoint(str(tmp_path))
    fitted = trainer(best, limit_val_batches=how.get("limit", 1.0))
    fitted.fit(LitBlitzNet(), datamodule=data(val_size=how.get("val_size", 16)))
    assert best.monitor == "train/loss"
    assert (tmp_path / "best.ckpt").is_file()


def test_a_subclass_may_add_to_the_end_of_a_batch(tmp_path):
    """Where it does not, Lightning passes over the hook."""
    batches = []

    class Counts(BestLossCheckpoint):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            batches.append(batch_idx)

    trainer(Counts(str(tmp_path))).fit(LitBlitzNet(), data())
    assert batches
    assert (tmp_path / "best.ckpt").exists()
    assert BestLossCheckpoint(str(tmp_path)).on_train_batch_end is None


def test_in_a_foreign_project_it_saves_the_module(tmp_path):
    class Foreign(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch).pow(2).mean()
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.ones(12, 2), batch_size=4)

    best = BestLossCheckpoint(str(tmp_path), monitor="loss")
    module = Foreign()
    trainer(best).fit(module)
    bare = nn.ModuleDict({"layer": nn.Linear(2, 1)})
    bare.load_state_dict(torch.load(tmp_path / "best.pth", weights_only=True))
    assert torch.equal(bare["layer"].weight, module.layer.weight)


class Otherwise(pl.LightningModule):
    """Logs its losses under names of its own."""

    def __init__(self, val_key="val_loss", train_key="train_loss"):
        super().__init__()
        self.layer, self.val_key, self.train_key = nn.Linear(3072, 10), val_key, train_key

    def loss(self, batch):
        return nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.train_key:
            self.log(self.train_key, loss, on_step=False, on_epoch=True, batch_size=16)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log(self.val_key, self.loss(batch), batch_size=16)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class OfEachStep(Otherwise):
    """Logs as Lightning does by default, the loss of each step and no mean."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss, batch_size=16)
        return loss


@pytest.mark.parametrize("val_size", [0, 16])
def test_the_loss_of_the_last_batch_is_not_taken_for_the_epochs(val_size, tmp_path):
    """Looked for in ``callback_metrics`` alone it is the one that decides."""
    best = BestLossCheckpoint(str(tmp_path))
    fitted = trainer(best)
    with pytest.warns(UserWarning, match="neither val/loss nor the epoch's train/loss"):
        fitted.fit(OfEachStep(), datamodule=data(val_size=val_size))
    assert best.best_model_score is None
    assert "train/loss" in fitted.callback_metrics, "what others may look at"


def test_weights_that_are_views_of_one_memory_are_kept_once(tmp_path):
    """Copied one by one each brings the whole memory, as of an LSTM's on a GPU."""

    class Views(LitBlitzNet):
        def __init__(self):
            super().__init__()
            memory = torch.cat([p.detach().flatten() for p in self.net.parameters()])
            parts = memory.split([p.numel() for p in self.net.parameters()])
            for p, part in zip(self.net.parameters(), parts, strict=True):
                p.data = part.view_as(p)

    size = sum(p.nbytes for p in LitBlitzNet().parameters())
    trainer(BestLossCheckpoint(str(tmp_path)), max_epochs=1).fit(Views(), datamodule=data(val_size=16))
    assert (tmp_path / "best.pth").stat().st_size < 1.2 * size


def test_a_trainer_with_a_last_checkpoint_alone_tests_and_one_with_more_takes_the_best(tmp_path):
    """Lightning asks the first checkpoint callback for ``best_model_path``."""
    module, images = LitBlitzNet(), data(val_size=16)
    fitted = trainer(last.LastCheckpoint(str(tmp_path / "one")), max_epochs=1)
    fitted.fit(module, datamodule=images)
    with pytest.warns(UserWarning, match="The best model of the previous"):
        fitted.test(datamodule=images, verbose=False)
    assert fitted.ckpt_path == str(tmp_path / "one" / "last.ckpt")
    best = BestLossCheckpoint(str(tmp_path / "two"))
    fitted = trainer(last.LastCheckpoint(str(tmp_path / "two")), best, max_epochs=1)
    fitted.fit(module, datamodule=images)
    with pytest.warns(UserWarning, match="multiple `ModelCheckpoint`"):
        fitted.test(datamodule=images, ckpt_path="best", verbose=False)
    assert fitted.ckpt_path == best.best_model_path


def named(state):
    """The files of a folder, with which ``last.ckpt`` is that of which module."""
    return {path.name: torch.load(path, weights_only=True)["state_dict"] for path in sorted(state.glob("*.ckpt"))}


@pytest.mark.parametrize("finder", [False, True])
def test_a_fit_that_begins_anew_keeps_what_another_has_saved(finder, tmp_path):
    """Without it ``ckpt_path="last"``, which finds no such file, costs the whole run at the first save. A search for a
    learning rate leaves its own ``ckpt_path``."""
    images, plugins = data(val_size=16), [DurableCheckpointIO()]
    first, second, third = LitBlitzNet(), LitBlitzNet(), LitBlitzNet()
    saver = last.LastCheckpoint(str(tmp_path))
    trainer(saver, max_epochs=1, plugins=plugins).fit(first, images)
    trainer(saver, max_epochs=1, plugins=plugins).fit(first, images)  # no other run: the same callback
    trainer(last.LastCheckpoint(str(tmp_path)), fast_dev_run=True).fit(LitBlitzNet(), images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.previous", "last.ckpt.sha256"]
    more = [LearningRateFinder(num_training_steps=3, update_attr=False)] if finder else []
    anew = trainer(*more, last.LastCheckpoint(str(tmp_path)), max_epochs=1, plugins=plugins)
    with pytest.warns(UserWarning, match=r"begins anew.*to .*last-1.ckpt; fit\(ckpt_path='.*last.ckpt'\) would go on"):
        anew.fit(second, images)
    states = named(tmp_path)
    assert_equal(states["last-1.ckpt"], first.state_dict())
    assert_equal(states["last.ckpt"], second.state_dict())
    assert {"last-1.ckpt.previous", "last-1.ckpt.sha256"} < {p.name for p in tmp_path.iterdir()}
    fitted = trainer(last.LastCheckpoint(str(tmp_path)), plugins=plugins)
    fitted.fit(third, images, ckpt_path=saver.path, weights_only=True)
    assert_equal(named(tmp_path)["last-1.ckpt"], first.state_dict())
    assert_equal(named(tmp_path)["last.ckpt"], third.state_dict())
    assert len(list(tmp_path.glob("*.ckpt"))) == 2


@pytest.mark.filterwarnings("ignore:You are using the `WeightAveraging`|Checkpoint directory|Be aware that when using")
def test_the_last_state_is_that_of_the_training_not_its_average(tmp_path):
    """Saved when training ends, the averages have taken the place of the weights."""
    ends = []
    for epochs, checkpoint in ((4, None), (2, None), (4, tmp_path / "2" / "last.ckpt")):
        torch.manual_seed(0)
        module = LitBlitzNet()
        saver = last.LastCheckpoint(str(tmp_path / str(epochs)))
        fitted = trainer(EMAWeightAveraging(decay=0.5), saver, max_epochs=epochs)
        fitted.fit(module, datamodule=data(val_size=16), ckpt_path=checkpoint, weights_only=checkpoint and True)
        ends.append(module.state_dict())
    assert_equal(ends[2], ends[0])


class PastLightning(LitBlitzNet):
    """Steps an optimizer of its own, so that ``global_step`` stays 0."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        self.own = torch.optim.SGD(self.parameters(), 0.01)

    def training_step(self, batch, batch_idx):
        self.own.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        self.own.step()


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("stop", [None, 6])
def test_the_last_state_of_a_module_that_steps_past_lightning(stop, tmp_path):
    """By ``global_step`` alone all that follows the first save is saved already."""

    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop |= trainer.fit_loop.total_batch_idx + 1 == stop

    saver, module = last.LastCheckpoint(str(tmp_path)), PastLightning()
    fitted = trainer(Stops(), saver, max_epochs=3)
    fitted.fit(module, datamodule=data(val_size=16))
    assert fitted.global_step == 0
    assert_equal(torch.load(saver.path, weights_only=True)["state_dict"], module.state_dict())


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}])
def test_where_neither_loss_is_logged_it_says_so_once_and_stays_off(settings, tmp_path):
    """Without ``_off`` Lightning's ModelCheckpoint ends the run."""
    best = BestLossCheckpoint(str(tmp_path))
    fitted = trainer(best, max_epochs=4, **settings)
    with pytest.warns(UserWarning, match="it logs train_loss, val_loss; monitor= takes another key") as caught:
        fitted.fit(Otherwise(), datamodule=data(val_size=16))
    assert len([warning for warning in caught if "BestLossCheckpoint" in str(warning.message)]) == 1
    assert fitted.current_epoch == 4
    assert list(tmp_path.iterdir()) == []


def test_by_command_such_a_run_has_its_last_checkpoint(capsys):
    with pytest.warns(UserWarning, match="BestLossCheckpoint keeps nothing"):
        run = fit("--model", "lightning.pytorch.demos.boring_classes.BoringModel", "--trainer.max_epochs", "1")
    assert "best checkpoint" not in capsys.readouterr().out
    assert main(["predict", "--run_dir", str(run)]) == 2
    assert "best.ckpt; --ckpt_path last takes the newest" in capsys.readouterr().err
    assert main(["predict", "--run_dir", str(run), "--ckpt_path", "last"]) == 0


def test_where_nothing_is_logged_it_stays_off(tmp_path):
    with pytest.warns(UserWarning, match="it logs nothing"):
        trainer(BestLossCheckpoint(str(tmp_path))).fit(Otherwise(train_key=None), datamodule=data(val_size=0))
    assert list(tmp_path.iterdir()) == []


class OfSeveral(Otherwise):
    """Has two validation loaders, of which Lightning adds the number to the key."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val/loss", self.loss(batch), batch_size=16)


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}])
@pytest.mark.parametrize("kind", [Otherwise, OfSeveral])
def test_where_the_validation_logs_its_loss_otherwise_it_says_that_the_training_loss_decides(kind, settings, tmp_path):
    """Without the warning the best of the training is taken for that of the validation."""
    best, images = BestLossCheckpoint(str(tmp_path)), data(val_size=16)
    images.setup("fit")
    loaders = [images.val_dataloader()] * (1 + (kind is OfSeveral))
    keys = "val_loss" if kind is Otherwise else "val/loss/dataloader_idx_0, val/loss/dataloader_idx_1"
    with pytest.warns(UserWarning, match=f"goes by train/loss: the validation logs {keys}, and no val/loss") as caught:
        trainer(best, max_epochs=4, **settings).fit(kind(train_key="train/loss"), images.train_dataloader(), loaders)
    assert len([warning for warning in caught if "BestLossCheckpoint" in str(warning.message)]) == 1
    assert best.monitor == "train/loss"
    assert (tmp_path / "best.ckpt").is_file()


def test_a_monitor_of_ones_own_that_is_not_logged_is_an_error(tmp_path):
    with pytest.raises(MisconfigurationException, match="val_los"):
        trainer(BestLossCheckpoint(str(tmp_path), monitor="val_los")).fit(Otherwise(), datamodule=data(val_size=16))


def test_validation_that_comes_later_is_waited_for(tmp_path):
    """Without the look at ``check_val_every_n_epoch`` the first epoch's end makes ``train/loss`` the monitor."""
    best, losses = BestLossCheckpoint(str(tmp_path)), Losses()
    trainer(best, losses, max_epochs=4, check_val_every_n_epoch=2).fit(LitBlitzNet(), datamodule=data(val_size=16))
    assert best.monitor == "val/loss"
    assert len(losses.seen) == 2
    assert best.best_model_score == min(losses.seen)


def test_the_record_goes_on_in_another_directory(tmp_path):
    first = BestLossCheckpoint(str(tmp_path / "first"))
    fitted = trainer(first, max_epochs=4)
    fitted.fit(LitBlitzNet(), datamodule=data(val_size=16))
    fitted.save_checkpoint(tmp_path / "end.ckpt")
    second = BestLossCheckpoint(str(tmp_path / "second"))
    continued = trainer(second, max_epochs=5)
    others = data(val_size=16, noise=255.0)  # of larger losses: without the record the fifth epoch is the best
    continued.fit(LitBlitzNet(), datamodule=others, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert continued.callback_metrics["val/loss"] > first.best_model_score
    assert second.best_model_score == first.best_model_score


def test_a_new_run_from_the_checkpoint_of_another_has_a_best_of_its_own(capsys):
    """With the record of the other, data of larger losses never give it a ``best.ckpt``, and it names the other's."""
    words = ["--config", "quickstart", "--data.train_images", "200", "--data.test_images", "50"]
    old = fit(*words, "--trainer.max_epochs", "3", run_dir="old")
    checkpoint = str(old / "checkpoints" / "last.ckpt")
    new = fit(*words, "--data.noise", "255", "--ckpt_path", checkpoint, "--trainer.max_epochs", "5", run_dir="new")
    assert f"best checkpoint: {new.resolve()}/checkpoints/best.ckpt" in capsys.readouterr().out
    assert torch.load(new / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] in (3, 4)
    assert (new / "best.pth").is_file()
    assert main(["test", "--run_dir", "new"]) == 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_training_loss_is_no_record_for_validation_losses(tmp_path):
    """Without the reset a run that is resumed with validation is held against the training loss of before."""
    best, end, zero = BestLossCheckpoint(str(tmp_path)), tmp_path / "end.ckpt", torch.tensor(0.0)
    fitted = trainer(best, max_epochs=1)
    fitted.fit(LitBlitzNet(), datamodule=data(val_size=0))
    fitted.save_checkpoint(end)
    (tmp_path / "best.pth").unlink()
    state = torch.load(end, weights_only=True)
    record = state["callbacks"][best.state_key]
    record |= {"best_model_score": zero, "kth_value": zero, "best_k_models": {best.best_model_path: zero}}
    torch.save(state, end)
    fitted = trainer(best, max_epochs=2)
    fitted.fit(LitBlitzNet(), datamodule=data(val_size=16), ckpt_path=end, weights_only=True)
    assert best.best_model_score == fitted.callback_metrics["val/loss"]
    assert (tmp_path / "best.pth").is_file()


def test_checkpoints_load_safely_and_name_no_class(tmp_path):
    best = BestLossCheckpoint(str(tmp_path))
    model = LitBlitzNet(num_classes=10, optimizer=lambda p: torch.optim.Adam(p), lr_interval="step")
    trainer(best, max_epochs=1).fit(model, datamodule=data())
    checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"] == {"num_classes": 10, "lr_interval": "step"}
    assert "_instantiator" not in json.dumps(checkpoint["hyper_parameters"])
    reloaded = LitBlitzNet.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    for name, value in reloaded.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][name])


class Wide(LitClassifier):
    """A user's subclass with an argument of its own that its base has too, with another value."""

    def __init__(self, width=8, num_classes=10, **kwargs):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, num_classes))
        super().__init__(net=net, num_classes=num_classes, **kwargs)


class Wider(Wide):
    def __init__(self, factor, **kwargs):
        super().__init__(width=8 * factor, **kwargs)


def test_a_subclass_reloads_with_its_own_arguments(tmp_path):
    model = Wider(2, automatic_optimization=False)
    assert dict(model.hparams) == {"factor": 2, "automatic_optimization": False}
    trainer(BestLossCheckpoint(str(tmp_path)), max_epochs=1).fit(model, datamodule=data())
    reloaded = Wider.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    assert reloaded.net[1].out_features == 16
    assert reloaded.automatic_optimization is False


def test_last_is_the_newest_state_whatever_the_metric(tmp_path, monkeypatch):
    # Lightning's save_last with a monitor would stay at the epoch of the lowest loss
    monkeypatch.setattr(last, "MIN_SECONDS", 0.0)
    run = fit(
        *("--config", "quickstart", "--data.train_images", "200", "--trainer.max_epochs", "3"),
        *("--model.optimizer.lr", "1e4"),  # the loss only rises
    )
    newest = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    steps = max(metrics(run))
    assert newest["global_step"] == steps
    assert best["global_step"] < steps


def test_short_epochs_do_not_each_write_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(last, "MIN_SECONDS", 1e6)  # however long the machine pauses
    saves = []
    run = tmp_path / "run"
    callback = last.LastCheckpoint(str(run))
    fitted = trainer(callback, max_epochs=20)
    save, fitted.save_checkpoint = fitted.save_checkpoint, lambda path: (saves.append(path), save(path))
    fitted.fit(LitBlitzNet(), datamodule=data(val_size=0))
    assert len(saves) == 2  # the first epoch's and the last state
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 80


def test_best_weights_are_written_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    from lit_basics.callbacks import best_loss

    monkeypatch.setattr(best_loss, "MIN_SECONDS", 1e6)
    writes, replace_file = [], best_loss.replace_file
    monkeypatch.setattr(best_loss, "replace_file", lambda path: (writes.append(path), replace_file(path))[1])
    run = fit("--config", "linear", "--trainer.max_epochs", "30")  # every epoch has a lower loss
    assert len(writes) == 2
    saved = torch.load(run / "best.pth", weights_only=True)
    assert saved["w"].item() == metrics(run)[30]["param/w"]


def test_the_record_goes_on_where_validations_come_every_second_epoch():
    """Without a sanity check the validation batches are not counted when training starts."""
    words = ["--config", "quickstart", "--data.train_images", "300", "--trainer.check_val_every_n_epoch", "2"]
    words += ["--trainer.num_sanity_val_steps", "0"]
    fit(*words, "--trainer.max_epochs", "6", run_dir="whole")
    fit(*words, "--trainer.max_epochs", "2", run_dir="run")
    assert main(["fit", "--run_dir", "run", "--resume", "auto", "--trainer.max_epochs", "6"]) == 0
    states = []
    for name in ("run", "whole"):
        callbacks = torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True)["callbacks"]
        states.append(next(state for key, state in callbacks.items() if key.startswith("BestLossCheckpoint")))
    assert states[0]["monitor"] == states[1]["monitor"] == "val/loss"
    assert states[0]["best_model_score"] == states[1]["best_model_score"]


def test_training_loss_where_validations_every_second_epoch_are_switched_off(tmp_path):
    best = BestLossCheckpoint(str(tmp_path))
    fitted = trainer(best, limit_val_batches=0, check_val_every_n_epoch=2)
    fitted.fit(LitBlitzNet(), datamodule=data(val_size=16))
    assert best.monitor == "train/loss"
    assert best.best_model_score is not None
    assert (tmp_path / "best.pth").is_file()


def test_the_plain_weights_of_a_net_that_has_another_name_in_its_module(tmp_path):
    class Named(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 1)

        @property
        def net(self):
            return self.model

        def training_step(self, batch, batch_idx):
            loss = self.net(batch).pow(2).mean()
            self.log("train/loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    module, batches = Named(), torch.utils.data.DataLoader(torch.ones(8, 2), 4)
    trainer(BestLossCheckpoint(str(tmp_path)), max_epochs=1).fit(module, batches)
    assert_equal(torch.load(tmp_path / "best.pth", weights_only=True), module.model.state_dict())


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_save_that_fails_leaves_the_plain_weights_of_the_one_before(tmp_path, monkeypatch):
    best = BestLossCheckpoint(str(tmp_path))
    module = LitBlitzNet(optimizer=lambda params: torch.optim.SGD(params, 0.01))
    fitted = trainer(best, max_epochs=1)
    fitted.fit(module, datamodule=data(val_size=16))
    before = torch.load(tmp_path / "best.pth", weights_only=True)

    def full(*args, **kwargs):
        raise OSError("no space left")

    fitted.fit_loop.max_epochs = 2
    monkeypatch.setattr(fitted.strategy.checkpoint_io, "save_checkpoint", full)
    with pytest.raises(OSError, match="no space left"):
        fitted.fit(module, datamodule=data(val_size=16))
    assert_equal(torch.load(tmp_path / "best.pth", weights_only=True), before)


def test_weights_that_cannot_be_written_leave_the_first_exception(tmp_path):
    """Raised there, no callback behind has its turn and Lightning tears nothing down."""
    ended = []

    class Fails(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                shutil.rmtree(tmp_path / "plain")
                (tmp_path / "plain").write_text("a file")
                raise ZeroDivisionError

    class Behind(Checkpoint):
        def on_exception(self, trainer, pl_module, exception):
            ended.append(type(exception))

    best = BestLossCheckpoint(str(tmp_path), weights_path=str(tmp_path / "plain" / "best.pth"))
    fitted = trainer(best, Fails(), Behind(), max_epochs=5)
    with pytest.warns(UserWarning, match=r"plain/best.pth could not be written: "), pytest.raises(ZeroDivisionError):
        fitted.fit(LitLinearRegression(), LinearDataModule())
    assert ended == [ZeroDivisionError]


@pytest.mark.parametrize("own", [False, True])
def test_the_mean_of_the_rest_of_an_epoch_is_no_best(own, tmp_path):
    """Lightning keeps no means in a checkpoint; those of a LitSupervised are restored."""
    settings = {"max_epochs": 1, "limit_val_batches": 0}

    def run(folder, *callbacks, ckpt_path=None):
        torch.manual_seed(0)
        module = LitBlitzNet() if own else Otherwise(train_key="train/loss")
        best = BestLossCheckpoint(str(tmp_path / folder), monitor="train/loss")
        trainer(best, *callbacks, **settings).fit(module, data(val_size=0), ckpt_path=ckpt_path, weights_only=True)
        return best.best_model_score

    whole = run("whole", SaveEverywhere(tmp_path))
    resumed = run("resumed", ckpt_path=tmp_path / "002.ckpt")
    assert whole is not None
    assert resumed == (whole if own else None)


@pytest.mark.filterwarnings("ignore:You are using the `WeightAveraging`")
def test_the_plain_weights_are_the_averages_whose_loss_was_the_lowest(tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    trainer(average, BestLossCheckpoint(str(tmp_path))).fit(LitBlitzNet(), datamodule=data(val_size=16))
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    plain = torch.load(tmp_path / "best.pth", weights_only=True)
    assert_equal(plain, {name.removeprefix("net."): v for name, v in saved.items() if name.startswith("net.")})


class OfBoth(Otherwise):
    """Logs the loss of each step and its mean, under one key."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=16)
        return loss


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}])
@pytest.mark.parametrize(
    ("kind", "monitor"), [(LitBlitzNet, "train/loss"), (Otherwise, "train_loss"), (OfBoth, "train_loss")]
)
def test_the_training_loss_that_was_asked_for_is_taken_at_the_end_of_its_epoch(kind, monitor, settings, tmp_path):
    """At the validation's end, which is when Lightning would look, it is missing, of a step or of the epoch before."""
    means = {}

    class Means(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            means[trainer.global_step] = trainer.callback_metrics[monitor].item()

    best = BestLossCheckpoint(str(tmp_path), monitor=monitor)
    trainer(Means(), best, max_epochs=4, **settings).fit(kind(), datamodule=data(val_size=16))
    assert best.best_model_score.item() == min(means.values())
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"]
    assert means[saved] == min(means.values())


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}, {"max_steps": 2}])
@pytest.mark.parametrize("key", ["train/loss", "train_loss"])
def test_the_loss_of_one_batch_that_was_asked_for_is_refused(key, settings, tmp_path):
    """Without it the best is that of the luckiest last batch."""

    class OfStep(Otherwise):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log(key, loss, batch_size=16)
            return loss

    best = BestLossCheckpoint(str(tmp_path), monitor=key)
    fitted = trainer(best, max_epochs=4, **settings)
    with pytest.warns(UserWarning, match=f"{key} is logged of each step alone; log it with on_epoch=True") as caught:
        fitted.fit(OfStep(), datamodule=data(val_size=16))
    assert len([warning for warning in caught if "BestLossCheckpoint" in str(warning.message)]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seconds", "monitor"), [("00:00:00:01", "val/loss"), ("00:01:00:00", "train/loss")])
def test_validations_after_a_time_are_waited_for_to_the_end(seconds, monitor, tmp_path):
    class Slow(pl.Callback):
        def on_train_batch_end(self, *_):
            time.sleep(0.1)

    best = BestLossCheckpoint(str(tmp_path))
    fitted = trainer(best, Slow(), max_epochs=6, val_check_interval=seconds, num_sanity_val_steps=0)
    fitted.fit(LitBlitzNet(), datamodule=data(val_size=16))  # 0.3 s an epoch
    assert best.monitor == best.record_of == monitor
    assert (tmp_path / "best.ckpt").is_file()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_second_fit_of_as_many_steps_can_be_better(tmp_path):
    best = BestLossCheckpoint(str(tmp_path))
    module = LitBlitzNet()
    scores = []
    for _ in range(2):
        fitted = trainer(best, max_epochs=1)
        fitted.fit(module, datamodule=data(val_size=16))
        scores.append(fitted.callback_metrics["val/loss"])
    assert scores[1] < scores[0]
    assert best.best_model_score == scores[1]
    assert_equal(torch.load(tmp_path / "best.pth", weights_only=True), module.net.state_dict())


class Told(Otherwise):
    """Its losses of the validations are given."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.losses[self.current_epoch], batch_size=16)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_fit_that_begins_anew_has_a_record_of_its_own(tmp_path):
    """With that of the fit before, the next fold of larger losses has no ``best.ckpt``, and tests the other's."""
    best = BestLossCheckpoint(str(tmp_path))
    for losses in ([1.0], [2.0, 3.0]):
        fitted, module = trainer(best, max_epochs=1), Told(losses)
        fitted.fit(module, datamodule=data(val_size=16))
        assert best.best_model_score == losses[0]
        assert_equal(torch.load(best.best_model_path, weights_only=True)["state_dict"], module.state_dict())
        assert_equal(torch.load(tmp_path / "best.pth", weights_only=True), module.state_dict())
    fitted.fit_loop.max_epochs = 2  # the same training goes on
    fitted.fit(module, datamodule=data(val_size=16))
    assert best.best_model_score == 2.0


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_the_best_of_a_module_that_steps_past_lightning(tmp_path):
    """``global_step`` stays 0, which Lightning takes for no step."""
    best, losses = BestLossCheckpoint(str(tmp_path)), Losses()
    trainer(best, losses).fit(PastLightning(), datamodule=data(val_size=16))
    assert losses.seen[1] < losses.seen[0]
    assert best.best_model_score == losses.seen[1]
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 1


def test_what_is_held_is_written_by_a_later_validation(tmp_path, monkeypatch):
    """Else it stays in memory, maybe for hours, until the loss falls again."""

    class Clock(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch:
                whole, plain = (torch.load(tmp_path / f"best.{kind}", weights_only=True) for kind in ("ckpt", "pth"))
                assert_equal(whole["state_dict"], plain)
                kept.append(whole["epoch"])
            if trainer.current_epoch == 2:
                monkeypatch.setattr(time, "monotonic", lambda: now() + 20)

    now, kept = time.monotonic, []
    fitted = trainer(Clock(), BestLossCheckpoint(str(tmp_path)), max_epochs=4, plugins=[DurableCheckpointIO(10)])
    fitted.fit(Told([3.0, 2.0, 5.0, 5.0]), datamodule=data(val_size=16))
    assert kept == [0, 0, 1]


def test_a_moved_run_names_its_own_best(tmp_path, capsys):
    words = ["--config", "quickstart", "--data.train_images", "100", "--data.val_size", "0"]
    fit(*words, "--trainer.max_epochs", "1").rename("moved")
    capsys.readouterr()
    assert main(["fit", "--resume", "moved"]) == 0  # it makes no step
    assert "moved/checkpoints/best.ckpt (train/loss " in capsys.readouterr().out


class Sharded(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.asked = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), 0
        self.net.register_state_dict_pre_hook(self.ask)

    def ask(self, *_):
        self.asked += 1  # here FullyShardedDataParallel waits for all ranks

    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_weights_that_are_shared_out_over_ranks(kind, tmp_path):
    """Shards are no plain weights; of the whole ones rank 0 alone has any, and no other may ask the net for them."""
    folder = tmp_path / "checkpoints"

    def asked_and_told():
        strategy = ModelParallelStrategy(save_distributed_checkpoint=kind == "sharded", process_group_backend="gloo")
        callbacks = BestLossCheckpoint(str(folder)), ModelCheckpoint(folder, "other-{epoch}", "train/loss")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            settings = {"strategy": strategy, "max_epochs": 3, "plugins": [DurableCheckpointIO()]}
            fitted = on_ranks(2, *callbacks, enable_checkpointing=True, **settings)
            module = Sharded()
            fitted.fit(module)
        return module.asked, [str(warning.message) for warning in caught if "best.pth" in str(warning.message)]

    (asked, told), others = ranks(asked_and_told)
    assert others == (asked, [])
    # of the checkpoints of another callback, of which it keeps one, the older are removed, files or folders
    assert [path.name for path in folder.glob("other-*.ckpt")] == ["other-epoch=2.ckpt"]
    if kind == "sharded":
        assert told == ["no best.pth: the weights are saved in shards; best.ckpt has them"]
        assert not (folder / "best.pth").exists()
    else:
        assert told == []
        weights = torch.load(folder / "best.pth", weights_only=True)
        assert list(weights) == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert all(type(value) is torch.Tensor for value in weights.values())
