"""Manual optimization equals automatic optimization bit for bit, with the same Trainer settings."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import Rows, assert_same_steps, copied, fit, metrics, quiet_trainer, write_npz
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from lit_basics import LitClassifier, SyntheticCIFAR10, UserError

MODES = (
    {"automatic_optimization": False},
    {"steps_per_execution": 3},
    {"steps_per_execution": 8},
)
SETTINGS = {
    "plain": {},
    "clip by norm": {"gradient_clip_val": 0.05},
    "clip by value": {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 3},
    "all": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 3},
    "bf16-mixed": {"precision": "bf16-mixed", "gradient_clip_val": 0.05},
    "bf16-true": {"precision": "bf16-true"},
    "float64": {"precision": "64-true"},
    "max_steps": {"max_steps": 13, "accumulate_grad_batches": 2},
    "validation within the epoch": {"val_check_interval": 5},
    "validation by steps": {"val_check_interval": 7, "check_val_every_n_epoch": None},
    "limited": {"limit_train_batches": 10},
}
SCHEDULERS = {
    "none": {},
    "step": {
        "lr_scheduler": lambda o: OneCycleLR(o, max_lr=0.1, total_steps=60),
        "lr_interval": "step",
    },
    "epoch": {"lr_scheduler": lambda o: StepLR(o, 1, 0.5)},
    "plateau": {"lr_scheduler": lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.5)},
    "plateau on validation": {
        "lr_scheduler": lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.5),
        "lr_monitor": "val/loss",
    },
}


class Steps(pl.Callback):
    """Keeps the weights and the learning rate after every step, and the gradients as callbacks see them."""

    def __init__(self):
        self.weights, self.rates, self.gradients = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.net.named_parameters()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.weights):
            self.weights.append(copied(pl_module.net))
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit_small(model, *callbacks, **settings):
    trainer = quiet_trainer(*callbacks, **{"max_epochs": 3, **settings})
    trainer.fit(model, datamodule=SyntheticCIFAR10(120, 10, batch_size=8, val_size=20))
    return trainer


def run(mode, settings, scheduler):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(196, 10))
    model = LitClassifier(
        net,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        **mode,
        **scheduler,
    )
    steps = Steps()
    return steps, fit_small(model, steps, **settings)


@pytest.mark.parametrize(
    ("settings", "scheduler"),
    [
        *((name, "none") for name in SETTINGS),
        *(("plain", name) for name in SCHEDULERS if name != "none"),
        *(("all", name) for name in SCHEDULERS if name != "none"),
    ],
)
def test_manual_equals_automatic(settings, scheduler):
    automatic, trainer = run({}, SETTINGS[settings], SCHEDULERS[scheduler])
    if scheduler != "none":
        assert len(set(automatic.rates)) > 1, "the scheduler did nothing"
    for mode in MODES:
        manual, manual_trainer = run(mode, SETTINGS[settings], SCHEDULERS[scheduler])
        assert_same_steps(manual.weights, automatic.weights, trainer.global_step)
        assert_same_steps(manual.gradients, automatic.gradients, trainer.global_step)
        assert manual.rates == automatic.rates
        assert manual_trainer.global_step == trainer.global_step > 0
        assert manual_trainer.current_epoch == trainer.current_epoch
        assert manual_trainer.gradient_clip_val == SETTINGS[settings].get("gradient_clip_val")
        assert manual_trainer.callback_metrics.keys() == trainer.callback_metrics.keys()
        for name, value in trainer.callback_metrics.items():
            assert torch.equal(manual_trainer.callback_metrics[name], value), name


def test_by_command_manual_logs_what_automatic_logs(tmp_path):
    path = write_npz(tmp_path / "images.npz", train=200)
    words = [
        *("--config", "lenet5", "--data", "NpzDataModule", "--data.path", path, "--data.batch_size", "16"),
        *("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", "--trainer.gradient_clip_val", "0.1"),
        *("--trainer.accumulate_grad_batches", "2", "--data.val_size", "0.2"),
    ]
    automatic = metrics(fit(*words, run_dir="automatic"))
    manual = metrics(fit(*words[:2], "--config", "manual", *words[2:], run_dir="manual"))
    assert automatic == manual
    assert max(row["grad/norm"] for row in automatic.values()) > 0.1, "the norms are those before clipping"


class OwnScheduler(LitClassifier):
    def __init__(self, scheduler, **kwargs):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), **kwargs)
        self.scheduler = scheduler

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step", "frequency": 2}]


def test_a_scheduler_of_the_modules_own_is_stepped_alike():
    found = []
    for mode in ({}, *MODES):
        torch.manual_seed(0)
        model, steps = OwnScheduler(lambda o: StepLR(o, 1, 0.9), **mode), Steps()
        fit_small(model, steps)
        found.append(steps)
    assert len(set(found[0].rates)) > 1
    for other in found[1:]:
        assert other.rates == found[0].rates
        assert_same_steps(other.weights, found[0].weights, len(found[0].weights))


def test_a_plateau_of_the_modules_own_is_refused_where_its_monitor_is_lost():
    with pytest.raises(UserError, match="give it as lr_scheduler= and lr_monitor= instead"):
        fit_small(OwnScheduler(ReduceLROnPlateau, automatic_optimization=False))


class Foreign(pl.LightningModule):
    """The same training without a part of lit_basics: Lightning steps the scheduler."""

    def __init__(self, scheduler):
        super().__init__()
        self.net, self.scheduler = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), scheduler

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), batch_size=len(batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = {"scheduler": self.scheduler(optimizer), "interval": "step", "frequency": 10, "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Ours(LitClassifier):
    configure_optimizers = Foreign.configure_optimizers

    def __init__(self, scheduler):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
        self.scheduler = scheduler


@pytest.mark.parametrize("often", [{}, {"check_val_every_n_epoch": None, "val_check_interval": 5}])
def test_a_plateau_of_steps_sees_the_validation_that_is_due_with_it(often):
    class Watched(ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(float(metrics))
            super().step(metrics, epoch)

    found = []
    for kind in (Foreign, Ours):
        seen = []
        torch.manual_seed(0)
        fit_small(kind(Watched), **{"val_check_interval": 5, **often})
        found.append(seen)
    assert len(set(found[0])) == 3
    assert found[1] == pytest.approx(found[0])


class OwnStep(LitClassifier):
    def training_step(self, batch, batch_idx):
        return self.compute_loss(batch, batch_idx)


class OwnOptimizerStep(LitClassifier):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)


class OwnZeroGrad(LitClassifier):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


@pytest.mark.parametrize(("mode", "value"), [("automatic_optimization", False), ("steps_per_execution", 3)])
@pytest.mark.parametrize(
    ("kind", "name", "instead"),
    [
        (OwnStep, "training_step", "override compute_loss"),
        (OwnOptimizerStep, "optimizer_step", "give a scheduler"),
        (OwnZeroGrad, "optimizer_zero_grad", "use automatic optimization"),
    ],
)
def test_a_step_of_the_modules_own_is_refused_in_manual_mode(kind, name, instead, mode, value):
    kind(nn.Linear(1, 10))
    with pytest.raises(UserError, match=f"{kind.__name__} overrides {name}, so {mode}={value} cannot apply: {instead}"):
        kind(nn.Linear(1, 10), **{mode: value})


class InTurn(LitClassifier):
    """Two optimizers in turn, as of a GAN; the scheduler is stepped by hand."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
        self.automatic_optimization = False

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in self.net.parameters()]
        return optimizers, [ReduceLROnPlateau(optimizers[0], patience=0, factor=0.5)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = self.compute_loss(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.lr_schedulers().step(1.0)
        return loss


def test_a_training_step_that_makes_its_updates_itself_is_lightnings_matter():
    rows, model = Rows(), InTurn()
    trainer = fit_small(model, max_epochs=1, logger=rows, log_every_n_steps=1)
    batches = trainer.num_training_batches
    assert trainer.global_step == 2 * batches
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5 ** (batches - 1)
    assert [step for step, row in rows.table().items() if "train/loss" in row] == [2 * n for n in range(1, batches + 1)]
    for setting in ({"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}):
        with pytest.raises(MisconfigurationException, match="is not supported for manual optimization"):
            fit_small(InTurn(), **setting)
