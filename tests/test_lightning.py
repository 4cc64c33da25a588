"""A good citizen of Lightning: other people's callbacks, hooks, loggers and Trainer settings."""

from datetime import timedelta
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from helpers import Rows, fit, metrics, quiet_trainer
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lit_basics import (
    ArrayLoader,
    DurableCheckpointIO,
    EpochOrder,
    GradientMonitor,
    LastCheckpoint,
    LitClassifier,
    LitLeNet5,
    LitSupervised,
    NonFiniteGuard,
    RandomState,
    SyntheticCIFAR10,
    UserError,
)
from lit_basics.cli import main

SMALL = ("--config", "quickstart", "--data.train_images", "300", "--trainer.log_every_n_steps", "1")
trainer = partial(quiet_trainer, max_epochs=2)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


def data(**options):
    return SyntheticCIFAR10(60, 20, **{"batch_size": 10, "val_size": 20, **options})


class Foreign(pl.LightningModule):
    """A module without a part of lit_basics."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("stage", "own"), [("fit", True), ("validate", True), ("test", True), ("fit", False)])
def test_an_order_of_another_world_size_than_the_trainers_is_refused(stage, own):
    """Without ``check_shared_out`` half of the samples are left out, unasked."""
    x, y = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
    loader = ArrayLoader(x, y, EpochOrder(20, 10, shuffle=stage == "fit", world_size=2))
    val = [ArrayLoader(x, y, EpochOrder(20, 10, shuffle=False))] if stage == "fit" and own else []
    module = LitClassifier(small_net()) if own else Foreign()
    settings = {"max_epochs": 1, "callbacks": [] if own else [RandomState()]}
    with pytest.raises(UserError, match="EpochOrder is of rank 0 and world_size 2 on rank 0 of 1"):
        getattr(trainer(**settings), stage)(module, loader, *val)
    getattr(trainer(**settings, use_distributed_sampler=False), stage)(module, loader, *val)


class Overriding(LitClassifier):
    """A subclass that overrides every hook it can, without ``super()``."""

    def on_before_optimizer_step(self, optimizer):
        pass

    def on_train_epoch_start(self):
        pass

    def on_train_epoch_end(self):
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        pass

    def on_train_start(self):
        pass


@pytest.mark.parametrize("manual", [False, True])
def test_an_overridden_hook_takes_nothing_away(manual):
    seen = []
    for kind in (LitClassifier, Overriding):
        rows = Rows()
        model = kind(
            small_net(),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.9),
            automatic_optimization=not manual,
        )
        fitted = trainer(gradient_clip_val=0.01, logger=rows, log_every_n_steps=1, max_epochs=3)
        fitted.fit(model, data())
        seen.append((rows.rows, model.net[1].weight.clone(), fitted.optimizers[0].param_groups[0]["lr"]))
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])
    assert seen[0][2] == seen[1][2] < 0.1


def test_clipping_of_the_users_works_in_manual_mode():
    class Own(LitClassifier):
        calls = 0

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            type(self).calls += 1

    trainer().fit(Own(small_net(), automatic_optimization=False), data())
    assert Own.calls == 8


MODES = {"automatic": {}, "manual": {"automatic_optimization": False}, "three steps": {"steps_per_execution": 3}}


def test_gradients_are_clipped_after_the_modules_own_hook():
    """Clipped by a callback, before it, they are ten times as large in manual optimization."""

    class Tenfold(LitClassifier):
        def on_before_optimizer_step(self, optimizer):
            self.net[1].weight.grad *= 10

    weights = []
    for mode in MODES.values():
        model = Tenfold(small_net(), **mode)
        fitted = trainer(gradient_clip_val=0.5)
        fitted.fit(model, data())
        fitted.fit(model, data())  # nothing of it is left
        weights.append(model.net[1].weight)
        assert "on_before_optimizer_step" not in vars(model)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_validation_start"])
def test_a_look_at_the_training_loader_trains_nothing(hook):
    """Without ``is_lightnings_own`` the look makes two steps, or calls backward in a validation."""

    class Looks(pl.Callback):
        pass

    def look(self, trainer, pl_module):
        if trainer.training or not trainer.sanity_checking:
            assert len(list(trainer.train_dataloader)) == 4

    setattr(Looks, hook, look)
    weights, steps = [], []
    for mode in MODES.values():
        model = LitClassifier(small_net(), **mode)
        fitted = trainer(callbacks=[Looks()], val_check_interval=2)
        fitted.fit(model, data())
        weights.append(model.net[1].weight)
        steps.append(fitted.global_step)
    assert steps == [8, 8, 8]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


class Recording(LitClassifier):
    """Validates by the loss that it trains by, which records."""

    def compute_loss(self, batch, batch_idx):
        self.record("train/mine", torch.tensor(float(self.training)))
        return super().compute_loss(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.compute_loss(batch, batch_idx))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_recorded_in_a_validation_is_not_of_the_training(mode):
    """Averaged with the next batch's it is a half."""
    rows = Rows()
    fitted = trainer(val_check_interval=2, logger=rows, log_every_n_steps=1)
    fitted.fit(Recording(small_net(), **MODES[mode]), data())
    assert [row["train/mine"] for row in rows.table().values() if "train/mine" in row] == [1.0] * 8


def test_a_module_that_records_can_be_tried_without_a_trainer():
    module, batch = Recording(small_net()), (torch.randn(4, 3, 32, 32), torch.arange(4))
    expected = nn.functional.cross_entropy(module(batch[0]), batch[1])
    assert torch.equal(module.compute_loss(batch, 0), expected)
    assert torch.equal(module.training_step(batch, 0), expected)
    fabric = Fabric(accelerator="cpu")
    fabricated = fabric.setup(module)
    fabric.backward(fabricated.training_step(batch, 0))
    assert module.net[1].weight.grad.any()


@pytest.mark.parametrize("foreign", [False, True])
def test_a_validation_before_the_fit(foreign):
    """Reset in inference mode, a mean or the recorder's rows could not be written to in the fit."""

    class Validating(Foreign):
        def validation_step(self, batch, batch_idx):
            pass

    model, rows = Validating() if foreign else LitClassifier(small_net()), Rows()
    fitted = trainer(callbacks=[GradientMonitor()], logger=rows, log_every_n_steps=1, num_sanity_val_steps=0)
    fitted.validate(model, datamodule=data(), verbose=False)
    fitted.fit(model, datamodule=data())
    assert all("grad/norm" in rows.table()[step] for step in range(1, 9))


def test_a_metric_that_adds_in_place_after_a_validation_before_the_fit():
    loader = DataLoader(TensorDataset(torch.rand(8, 3), torch.rand(8, 1)), batch_size=4)
    model = LitSupervised(nn.Linear(3, 1), nn.MSELoss(), metrics={"mse": MeanSquaredError()})
    fitted = trainer()
    fitted.validate(model, loader, verbose=False)
    fitted.fit(model, loader, loader)
    assert fitted.callback_metrics["val/mse"] == pytest.approx(fitted.callback_metrics["val/loss"].item())


def test_a_metric_called_loss_is_refused():
    with pytest.raises(UserError, match="give it another name"):
        LitSupervised(nn.Linear(3, 1), nn.MSELoss(), metrics={"loss": MeanSquaredError()})


class Scored(LitClassifier):
    """What its plateau watches is logged at the epoch's end: rising twice, then falling."""

    def on_train_epoch_end(self):
        self.log("train/score", float([1, 2, 3, 0, 4, 5][self.current_epoch]))


def test_a_resumed_plateau_that_watches_what_the_epochs_end_logs(tmp_path):
    class Rates(pl.Callback):
        def __init__(self, rates):
            self.rates = rates

        def on_train_epoch_start(self, trainer, pl_module):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def model():
        plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0)
        return Scored(small_net(), lr_scheduler=plateau, lr_monitor="train/score")

    whole, resumed = [], []
    for rates, parts in ((whole, [6]), (resumed, [3, 6])):
        for epochs in parts:
            fitted = trainer(max_epochs=epochs, callbacks=[Rates(rates), RandomState()])
            last = tmp_path / "last.ckpt"
            goes_on = {"ckpt_path": last, "weights_only": True} if epochs > parts[0] else {}
            fitted.fit(model(), datamodule=data(), **goes_on)
            fitted.save_checkpoint(last)
    assert len(set(whole)) > 2
    assert resumed == whole
    # in manual optimization Lightning would step it no more than we do
    manual = model()
    manual.automatic_optimization, manual.lr_monitor = False, "train/other"
    with pytest.raises(UserError, match=r"monitors 'train/other' .*, which is not there"):
        trainer(max_epochs=9).fit(manual, data(), ckpt_path=last, weights_only=True)


@pytest.mark.filterwarnings("ignore:Precision 16-mixed|.*mixed precision")
def test_a_mean_of_many_batches_in_bfloat16():
    """Counted in bfloat16 it stays at 256 samples."""
    images = SyntheticCIFAR10(1010, 20, batch_size=1, val_size=1000)
    model, fitted = LitClassifier(small_net()), trainer(precision="bf16-true")
    (metrics,) = fitted.validate(model, datamodule=images, verbose=False)
    with torch.no_grad():
        batches = images.val_dataloader()
        losses = [model.criterion(model(x.bfloat16()), y).double() for x, y in batches]
    assert metrics["val/loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*barebones|.*in `Trainer.barebones")
def test_a_barebones_trainer_trains():
    """Without ``NEVER`` its ``log_every_n_steps`` of 0 is divided by."""
    fitted = pl.Trainer(barebones=True, max_epochs=2, accelerator="cpu")
    fitted.fit(LitClassifier(small_net()), data())
    assert fitted.global_step == 8


@pytest.mark.parametrize("mode", MODES)
def test_lightnings_monitor_of_learning_rates_sees_each_step(mode):
    """Without the interval in manual optimization it sees one an epoch."""
    scheduler = {"lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1), "lr_interval": "step"}
    rows, model = Rows(), LitClassifier(small_net(), **scheduler, **MODES[mode])
    trainer(logger=rows, log_every_n_steps=1, callbacks=[LearningRateMonitor()]).fit(model, data())
    assert len([row for _, row in rows.rows if "lr-SGD" in row or "lr-LeanSGD" in row]) == 8


def test_a_checkpoint_by_time_that_lightning_never_saves_is_refused(tmp_path):
    by_time = {"callbacks": [ModelCheckpoint(tmp_path, train_time_interval=timedelta(seconds=1))]}
    for mode in ("manual", "three steps"):
        fitted = trainer(**by_time, enable_checkpointing=True)
        with pytest.raises(UserError, match=r"train_time_interval=...\) saves nothing in manual optimization"):
            fitted.fit(LitClassifier(small_net(), **MODES[mode]), data())
    trainer(**by_time, enable_checkpointing=True).fit(LitClassifier(small_net()), data())


def test_two_optimizers_are_refused_in_manual_mode():
    class TwoOptimizers(LitClassifier):
        def configure_optimizers(self):
            return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]

    with pytest.raises(UserError, match="returns 2 optimizers"):
        trainer().fit(TwoOptimizers(small_net(), automatic_optimization=False), data())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_training_step_adds_to_ours_is_in_the_logged_loss(accumulate):
    class Penalised(LitClassifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 100

    rows = Rows()
    fitted = trainer(logger=rows, log_every_n_steps=1, max_epochs=1, accumulate_grad_batches=accumulate)
    fitted.fit(Penalised(small_net()), data())
    losses = [row["train/loss"] for _, row in rows.rows if "train/loss" in row]
    assert len(losses) == 4 // accumulate
    assert all(100 < loss < 110 for loss in losses)
    assert 100 < fitted.callback_metrics["train/loss"] < 110


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_training_step_may_skip_a_batch():
    class Skipping(LitClassifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else self.compute_loss(batch, batch_idx)

    rows = Rows()
    trainer(logger=rows, log_every_n_steps=1, max_epochs=1).fit(Skipping(small_net()), data())
    # Lightning counts the skipped batch as a step
    assert [step for step, row in rows.rows if "train/loss" in row] == [1, 3, 4]


def test_what_is_monitored_is_there_in_time():
    class Watch(pl.Callback):
        seen = ()

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen = sorted(trainer.callback_metrics)

    watch, stop = Watch(), EarlyStopping("train/loss", patience=0, min_delta=100.0)
    fitted = trainer(callbacks=[watch, stop], max_epochs=9)
    fitted.fit(LitClassifier(small_net()), data())
    assert watch.seen == ["train/loss", "val/acc", "val/loss"]
    assert fitted.current_epoch == 2


@pytest.mark.filterwarnings("ignore:.*shuffling for you")
def test_overfit_batches_overfits():
    class Keep(LitClassifier):
        def compute_loss(self, batch, batch_idx):
            seen.append(batch[1].tolist())
            return super().compute_loss(batch, batch_idx)

    seen = []
    trainer(overfit_batches=1, limit_val_batches=0).fit(Keep(small_net()), data())
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_one_trainer_one_module_and_one_datamodule_serve_again():
    fitted, model, images = trainer(), LitClassifier(small_net()), data(val_size=0)
    fitted.fit(model, images)
    (result,) = fitted.validate(model, data(), verbose=False)
    assert set(result) == {"val/loss", "val/acc"}
    (result,) = fitted.test(model, images, verbose=False)
    assert set(result) == {"test/loss", "test/acc"}
    orders = []
    for _ in range(2):
        again = trainer(max_epochs=1)
        again.fit(LitClassifier(small_net()), images)
        orders.append(again.callback_metrics["train/loss"].item())
    assert orders[0] == orders[1]


@pytest.mark.parametrize("finder", ["lr_find", "scale_batch_size"])
@pytest.mark.parametrize("mode", [{}, {"automatic_optimization": False}, {"steps_per_execution": 3}])
def test_a_search_before_training_changes_nothing(mode, finder):
    found = []
    for searches in (True, False):
        finds_size = searches and finder == "scale_batch_size"
        rows, module, images = Rows(), LitClassifier(small_net(), **mode), data(batch_size=5 if finds_size else 10)
        callbacks = [NonFiniteGuard("rollback"), GradientMonitor(), RandomState()]
        fitted = trainer(logger=rows, log_every_n_steps=1, callbacks=callbacks, plugins=[DurableCheckpointIO()])
        if finds_size:
            assert Tuner(fitted).scale_batch_size(module, datamodule=images, init_val=5, max_val=10) == 10
        elif searches:
            Tuner(fitted).lr_find(module, datamodule=images, num_training=5, update_attr=False)
        fitted.fit(module, images)
        found.append((rows.table(), module.net[1].weight, fitted.global_step))
    (table, weight, steps), (expected, expected_weight, expected_steps) = found
    assert steps == expected_steps == 8
    assert torch.equal(weight, expected_weight)
    assert table == expected


def test_a_search_for_a_batch_size_where_a_schedule_takes_the_runs_length():
    """Lightning then has the loader load its state of before the search, of another batch size."""

    class Cycled(LitClassifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            steps = self.trainer.estimated_stepping_batches
            return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=int(steps))]

    fitted, images = trainer(max_epochs=5, max_steps=10), data(batch_size=2)
    assert Tuner(fitted).scale_batch_size(Cycled(small_net()), datamodule=images, max_trials=2) == 4
    fitted.fit(Cycled(small_net()), images)
    assert fitted.global_step == 10


def test_a_search_for_a_learning_rate_tries_the_same_in_each_mode():
    """With the module's own interval for Lightning's scheduler it tries one rate only."""
    found = []
    for mode in ({}, {"automatic_optimization": False}, {"steps_per_execution": 3}):
        finder = Tuner(trainer()).lr_find(
            LitClassifier(small_net(), **mode), datamodule=data(), num_training=5, update_attr=False
        )
        found.append(finder.results)
    assert len(set(found[0]["lr"])) == 5
    assert found[0] == found[1] == found[2]


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_stochastic_weight_averaging_falls_by_epochs_in_both_modes():
    """Its scheduler is of epochs, whatever that of the module is of."""
    found = []
    for mode in ({}, {"automatic_optimization": False}):
        swa = StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=3)
        module = LitClassifier(
            small_net(), lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 3), lr_interval="step", **mode
        )
        trainer(callbacks=[swa], max_epochs=4).fit(module, data())
        found.append(module.net[1].weight)
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_the_averages_of_stochastic_weight_averaging_are_saved(tmp_path, monkeypatch):
    """It puts them in at the end of training, when the last epoch's end has been saved already."""
    monkeypatch.setattr("lit_basics.callbacks.last.MIN_SECONDS", 0.0)  # as in epochs of ten seconds
    module, last = LitClassifier(small_net()), LastCheckpoint(tmp_path)
    callbacks = [StochasticWeightAveraging(0.05, swa_epoch_start=1), last]
    trainer(callbacks=callbacks, max_epochs=4, enable_checkpointing=True).fit(module, data())
    saved = torch.load(last.path, weights_only=True)["state_dict"]
    assert torch.equal(saved["net.1.weight"], module.net[1].weight)


def test_a_second_fit_says_nothing_of_callbacks(caplog):
    """Of the first fit's ``TrainingHooks`` Lightning said that they are overridden; the user has given none."""
    module, fits = LitClassifier(small_net()), trainer(max_epochs=1)
    fits.fit(module, data())
    fits.test(module, data(), verbose=False)
    assert "override" not in caplog.text


class Forwarding(pl.Callback):
    """One of the user's own, around another."""

    def __init__(self, inner):
        self.inner = inner

    def on_train_batch_end(self, *args):
        self.inner.on_train_batch_end(*args)


def test_a_callback_is_left_its_hooks():
    """Taken away where it does not define them, they cannot be called by another."""

    class Inner(pl.Callback):
        pass

    inner = Inner()
    trainer(max_epochs=1, callbacks=[inner, Forwarding(inner)]).fit(LitClassifier(small_net()), data())


class Forgets(LitClassifier):
    def compute_loss(self, batch, batch_idx):
        super().compute_loss(batch, batch_idx)


class Dicts(LitClassifier):
    def compute_loss(self, batch, batch_idx):
        return {"loss": super().compute_loss(batch, batch_idx)}


class Unreduced(LitClassifier):
    def compute_loss(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")


REFUSED = [(Forgets, "of type NoneType"), (Dicts, "of type dict"), (Unreduced, r"a tensor \(10,\)")]


@pytest.mark.parametrize(("kind", "what"), REFUSED)
@pytest.mark.parametrize("mode", [{"automatic_optimization": False}, {"steps_per_execution": 3}, {}])
def test_a_loss_that_is_no_number_is_refused(kind, what, mode):
    """Without a loss Lightning passes over each batch, and a training to the end has trained nothing."""
    message = f"{kind.__name__}: train/loss, which compute_loss returns, is {what}; it must be a scalar tensor"
    with pytest.raises(UserError, match=message):
        trainer(max_epochs=1).fit(kind(small_net(), **mode), data())


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("mode", [{}, {"automatic_optimization": False}, {"steps_per_execution": 3}])
def test_a_checkpoint_of_a_validation_at_the_epochs_end_has_its_schedulers_rate(mode, interval, tmp_path):
    """Nothing is left of the epoch; taken for one that the module left, it steps them again."""

    class Saves(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    found = []
    for path in (None, tmp_path / "a.ckpt"):
        scheduler = {"lr_scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), "lr_interval": interval}
        module = LitClassifier(small_net(), **scheduler, **mode)
        fitted = trainer(callbacks=[Saves(), RandomState()], max_epochs=3)
        fitted.fit(module, data(), ckpt_path=path, weights_only=bool(path))
        found.append((fitted.optimizers[0].param_groups[0]["lr"], module.net[1].weight))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


class Dropping(SyntheticCIFAR10):
    """A loader that has lost two batches, as a ``collate_fn`` that leaves out broken samples does."""

    def train_dataloader(self):
        batches = list(super().train_dataloader())
        kept = [None if index in (2, len(batches) - 1) else batch for index, batch in enumerate(batches)]
        return DataLoader(kept, batch_size=None)


class Leaving(LitClassifier):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("kind", "images"), [(Leaving, SyntheticCIFAR10), (LitClassifier, Dropping)])
def test_an_epoch_cut_short_and_lost_batches_step_the_schedulers_alike(kind, images, accumulate, interval):
    found = []
    for mode in ({}, {"automatic_optimization": False}, {"steps_per_execution": 3}):
        if kind is Leaving and "steps_per_execution" in mode:
            continue  # refused
        module = kind(
            small_net(), lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5), lr_interval=interval, **mode
        )
        fitted = trainer(max_epochs=3, accumulate_grad_batches=accumulate)
        fitted.fit(module, images(60, 20, batch_size=10, val_size=20))
        found.append((module.net[1].weight, fitted.optimizers[0].param_groups[0]["lr"], fitted.global_step))
    assert found[0][1] < 0.01
    for weight, rate, steps in found[1:]:
        assert (rate, steps) == found[0][1:]
        assert torch.equal(weight, found[0][0])


def test_an_optimizer_that_is_made_in_the_default_dtype_is_so_in_both_modes():
    """In float64, where a step's forward is, NAdam's product of momenta is another."""
    found = []
    for mode in ({}, {"automatic_optimization": False}, {"steps_per_execution": 8}):
        module = LitClassifier(small_net(), optimizer=torch.optim.NAdam, **mode)
        trainer(precision="64-true").fit(module, data())
        found.append(module.net[1].weight)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


class PassesOn(LitLeNet5):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Mixin:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Mixed(Mixin, LitLeNet5):
    pass


@pytest.mark.parametrize("kind", [PassesOn, Mixed])
def test_arguments_without_a_name_come_back_from_a_checkpoint(kind, tmp_path):
    module = kind(10, 3, "relu", pooling="max")
    fitted = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    fitted.fit(module, data())
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    again = kind.load_from_checkpoint(tmp_path / "a.ckpt")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(module(x), again(x))


def test_a_classifier_takes_metrics_beside_its_accuracy():
    model = LitClassifier(small_net(), metrics={"top10": MulticlassAccuracy(10, average="micro", top_k=10)})
    (result,) = trainer().validate(model, data(), verbose=False)
    assert set(result) == {"val/loss", "val/acc", "val/top10"}
    assert result["val/top10"] == 1 > result["val/acc"]


def test_metrics_that_give_no_one_number_are_refused():
    with pytest.raises(UserError, match="metrics: both is a MetricCollection, not a Metric"):
        LitSupervised(small_net(), nn.CrossEntropyLoss(), {"both": MetricCollection([MulticlassAccuracy(10)])})
    module = LitSupervised(small_net(), nn.CrossEntropyLoss(), {"each": MulticlassAccuracy(10, average=None)})
    with pytest.raises(UserError, match=r"val/each is tensor\((.|\n)*, not one number"):
        trainer().fit(module, data())


class OneLogit(LitClassifier):
    """Two classes by one number."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3072, 1), nn.Flatten(0)), num_classes=1)

    def compute_loss(self, batch, batch_idx):
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])


class OwnData(pl.LightningDataModule):
    num_classes = 2

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.ones(4)))

    val_dataloader = train_dataloader


class OneOutput(LitSupervised):
    num_classes = 1


def test_numbers_of_classes_of_others_are_not_compared():
    trainer(limit_val_batches=0).fit(OneLogit(), OwnData())
    trainer(limit_val_batches=0).fit(OneOutput(small_net(), nn.CrossEntropyLoss()), data())


class OwnMetrics(LitClassifier):
    """The way of torchmetrics' documentation: the prefix is in the collection."""

    def __init__(self):
        super().__init__(small_net())
        self.val_metrics = MetricCollection({"top2": MulticlassAccuracy(10, top_k=2)}, prefix="val/")

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.val_metrics.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self):
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()


def test_metrics_of_a_subclass_stand_beside_ours():
    fitted, module = trainer(), OwnMetrics()
    fitted.fit(module, data())
    assert set(fitted.callback_metrics) == {"train/loss", "val/loss", "val/acc", "val/top2"}
    assert set(module.state_dict()) == {"net.1.weight", "net.1.bias"}


class Autoencoder(LitSupervised):
    def __init__(self):
        super().__init__(nn.Linear(3, 3), nn.MSELoss())

    def compute_loss(self, batch, batch_idx):
        return self.criterion(self(batch), batch)


@pytest.mark.parametrize(
    ("batch", "what"),
    [(torch.rand(4, 3), "a Tensor"), ({"x": torch.rand(4, 3)}, "a dict"), ([torch.rand(4)], "a list of 1")],
)
def test_a_batch_that_is_no_pair_is_refused(batch, what):
    """A tensor is taken apart along its first dimension: one sample is the inputs, another the targets."""
    loader = DataLoader([batch], batch_size=None)
    module = LitSupervised(nn.Linear(3, 3), nn.MSELoss())
    with pytest.raises(UserError, match=rf"a batch is {what}, not .*: override compute_loss of LitSupervised"):
        trainer(num_sanity_val_steps=0).fit(module, loader, loader)
    with pytest.raises(UserError, match=rf"a batch is {what}, not .*: override validation_step and test_step of Auto"):
        trainer().validate(Autoencoder(), loader)


class Pair:
    """A batch of somebody's own, which is neither a list nor a tuple."""

    def __iter__(self):
        return iter((torch.rand(4, 3), torch.rand(4, 3)))


def test_a_batch_of_another_kind_is_taken_apart():
    loader = DataLoader([Pair()], batch_size=None)
    trainer(num_sanity_val_steps=0).fit(LitSupervised(nn.Linear(3, 3), nn.MSELoss()), loader, loader)


class Tasks(nn.Module):
    def forward(self, predictions, targets):
        targets = targets.values() if isinstance(targets, dict) else targets
        return sum(nn.functional.mse_loss(predictions[:, 0], y) for y in targets)


@pytest.mark.parametrize("kind", [dict, lambda targets: tuple(targets.values())])
def test_each_sample_counts_once_whatever_the_targets_are(kind):
    """Taken as long as there are tasks, a batch of two samples counts as much as one of six."""
    x, y = torch.randn(8, 3), torch.randn(8)
    batches = [(x[part], kind({"a": y[part], "b": -y[part]})) for part in (slice(6), slice(6, 8))]
    module = LitSupervised(nn.Linear(3, 1), Tasks())
    (result,) = trainer().validate(module, DataLoader(batches, batch_size=None), verbose=False)
    whole = module.criterion(module(x), {"a": y, "b": -y})
    assert result["val/loss"] == pytest.approx(whole.item())


class Boxes(nn.Module):
    def forward(self, predictions, targets):
        return torch.stack([(p - t.sum()).square() for p, t in zip(predictions[:, 0], targets, strict=True)]).mean()


@pytest.mark.parametrize("listed", [False, True])
def test_ragged_targets_count_as_samples(listed):
    """Taken as long as the first, a batch whose first image has no boxes is no batch: ``val/loss`` was NaN."""
    x, boxes = torch.randn(5, 3), [torch.randn(n, 4) for n in (0, 2, 1, 3, 1)]
    parts = (slice(0, 3), slice(3, 5))

    class Listed(LitSupervised):
        def forward(self, x):
            return super().forward(torch.stack(x) if listed else x)

    module = Listed(nn.Linear(3, 1), Boxes())
    batches = [(list(x[part]) if listed else x[part], boxes[part]) for part in parts]
    (result,) = trainer().validate(module, DataLoader(batches, batch_size=None), verbose=False)
    whole = module.criterion(module(list(x) if listed else x), boxes)
    assert result["val/loss"] == pytest.approx(whole.item())


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_begins_its_metrics(stage):
    """Those of one that failed, or that a user tried by hand, were counted again."""
    module = LitClassifier(small_net())
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    batches = DataLoader([(x, y)], batch_size=None)
    (first,) = getattr(trainer(), stage)(module, batches, verbose=False)
    module.test_step((x, (y + 1) % 8), 0)
    module.validation_step((x, (y + 1) % 8), 0)
    (second,) = getattr(trainer(), stage)(module, batches, verbose=False)
    assert first == second
    (third,) = getattr(trainer(inference_mode=False), stage)(module, batches, verbose=False)
    assert third == first


class Weighted(LitClassifier):
    def __init__(self, weights, scale=1.0, rates=(), **kwargs):
        super().__init__(small_net(), criterion=nn.CrossEntropyLoss(torch.tensor(weights)), **kwargs)


def test_numbers_of_numpy_are_kept_and_arrays_do_no_harm():
    module = Weighted(np.ones(10, np.float32), scale=np.float64(0.5), rates=[np.float32(0.25), 1])
    assert module.hparams == {"scale": 0.5, "rates": [0.25, 1]}
    assert type(module.hparams["scale"]) is float


def test_rows_stand_in_order_whoever_logs(mine):
    module = mine(
        "from lit_basics import LitLeNet5\n\n\n"
        "class Logging(LitLeNet5):\n"
        "    def compute_loss(self, batch, batch_idx):\n"
        "        loss = super().compute_loss(batch, batch_idx)\n"
        "        self.log('mine', loss)\n"
        "        return loss\n"
    )
    words = [*SMALL[2:], "--trainer.max_epochs", "2", "--trainer.val_check_interval", "1"]
    run = fit("--model", f"{module}.Logging", "--data", "SyntheticCIFAR10", *words)
    table = metrics(run)  # asserts that no step has two rows
    assert list(table) == sorted(table)
    assert all({"val/loss", "train/loss"} <= set(table[step]) for step in range(1, 11))
    for step in range(10):  # Lightning's own number is one less
        assert table[step]["mine"] == pytest.approx(table[step + 1]["train/loss"])


def test_a_users_modelcheckpoint_works_in_a_run_and_its_test(tmp_path):
    words = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.max_epochs", "1"]
    run = fit(*SMALL, *words)
    assert list((run / "checkpoints").glob("epoch=*.ckpt"))
    assert main(["test", "--run_dir", str(run)]) == 0
    off = ["--best_checkpoint", "false", "--last_checkpoint", "false"]
    assert list((fit(*SMALL, *words, *off, run_dir="off") / "checkpoints").glob("epoch=*.ckpt"))


def test_max_steps_before_the_first_validation_still_keeps_a_best(tmp_path, capsys):
    run = fit(*SMALL, "--trainer.max_steps", "2")
    assert (run / "best.pth").is_file()
    assert "best checkpoint" in capsys.readouterr().out
    assert main(["test", "--run_dir", str(run)]) == 0


def test_a_modelcheckpoint_of_lightnings_may_monitor_our_keys(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val/acc", mode="max")
    trainer(enable_checkpointing=True, callbacks=[keep]).fit(LitClassifier(small_net()), data())
    assert keep.best_model_path


@pytest.mark.parametrize(
    "words",
    [
        ["--model.activation", "relu", "--data.train_images", "100"],
        ["--model.init_args.activation", "relu", "--data.init_args.train_images", "100"],
        ["--model.activation=relu", '--data={"class_path":"SyntheticCIFAR10","init_args":{"train_images":100}}'],
        ["--model.activation=relu", "--data", "data.yaml"],
        ["--config", "flat.yaml"],
    ],
)
def test_every_spelling_of_a_value_counts(words, tmp_path):
    (tmp_path / "data.yaml").write_text("class_path: SyntheticCIFAR10\ninit_args:\n  train_images: 100\n")
    (tmp_path / "flat.yaml").write_text("model.init_args.activation: relu\ndata.init_args.train_images: 100\n")
    start = ["fit", "--model", "LitLeNet5", "--data", "SyntheticCIFAR10", *words, "--trainer.max_epochs", "1"]
    assert main([*start, "--run_dir", "run", "--trainer.enable_progress_bar", "false"]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["init_args"]["activation"] == "relu"
    assert config["data"]["init_args"]["train_images"] == 100


def test_config_yaml_does_not_carry_the_run_directory(tmp_path):
    pytest.importorskip("tensorboard")
    short = ["--trainer.max_epochs", "1"]
    first = fit(*SMALL, "--config", "tensorboard", *short, run_dir="first")
    assert "first" not in (first / "config.yaml").read_text()
    before = sorted(first.rglob("*"))
    second = fit("--config", str(first / "config.yaml"), run_dir="second")
    assert list((second / "tensorboard").glob("events*"))
    assert sorted(first.rglob("*")) == before


class Ends(pl.Callback):
    batches = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1


def test_lightning_passes_over_the_hooks_that_a_callback_does_not_have():
    ends, other, monitor = Ends(), pl.Callback(), GradientMonitor()
    other.on_train_batch_start = lambda *_: setattr(other, "set", True)  # on the instance: it stays
    trainer(callbacks=[ends, other, monitor], max_epochs=1).fit(LitClassifier(small_net()), data())
    assert ends.batches == 4
    assert other.set
    # what Lightning can call costs time: without skip_empty_hooks this is a method
    assert monitor.on_before_zero_grad is None
    assert ends.on_before_zero_grad is not None


def test_attributes_are_those_of_any_module():
    # the short way of LitSupervised.__setattr__ is for strings and None over plain attributes
    def after(module):
        for value in ("a", None, nn.Parameter(torch.ones(1)), None, nn.Linear(1, 1), None, "b"):
            try:
                module.note = value
            except TypeError as error:
                yield str(error).split("'")[1]
            yield [name for name, _ in module.named_parameters()], "note" in vars(module), type(module.note)

    ours = LitClassifier(nn.Identity())
    ours.net = ours.criterion = None
    assert list(after(ours)) == list(after(pl.LightningModule()))


@pytest.mark.filterwarnings("ignore")  # deprecated all of it, but still there
def test_a_module_can_be_scripted():
    module = LitClassifier(small_net())
    module.log_every_n_steps = 3  # a name like any other
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(module.to_torchscript()(x), module.eval()(x))
