"""Trainers, callbacks, loaders and commands used a second time: nothing of the first use is left in the second."""

import os
import re
import shutil
import subprocess
import sys
import time

import lightning.pytorch as pl
import pytest
import torch
from helpers import assert_equal, fit
from helpers import quiet_trainer as trainer
from torch import nn

from lit_basics import (
    ArrayLoader,
    BestLossCheckpoint,
    EpochOrder,
    LastCheckpoint,
    LitClassifier,
    NonFiniteGuard,
    RandomState,
    SyntheticCIFAR10,
    run_directory,
)
from lit_basics.cli import main

SMALL = ("--config", "quickstart", "--data.train_images", "200", "--data.test_images", "50")


def net(width=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.Linear(width, 10))


def data(**options):
    return SyntheticCIFAR10(60, 20, **{"batch_size": 10, "val_size": 20, **options})


class Breaking(LitClassifier):
    """Its loss is NaN in one batch."""

    def __init__(self, bad, **kwargs):
        super().__init__(net(), **kwargs)
        self.bad, self.before = bad, {}

    def compute_loss(self, batch, batch_idx):
        if batch_idx == self.bad:
            self.before = {name: value.clone() for name, value in self.net.state_dict().items()}
        loss = super().compute_loss(batch, batch_idx)
        return loss * float("nan") if batch_idx == self.bad else loss


@pytest.mark.filterwarnings("ignore:loss is")
@pytest.mark.parametrize("first", [Breaking(2), LitClassifier(net(width=7))])
def test_a_guard_has_nothing_of_an_earlier_fit_to_go_back_to(first):
    guard = NonFiniteGuard("rollback", budget=1)
    trainer(guard).fit(first, datamodule=data())
    module = Breaking(0, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    trainer(guard).fit(module, datamodule=data())
    trainer(guard).validate(module, datamodule=data(), verbose=False)
    assert guard.faults == 1
    assert_equal(module.net.state_dict(), module.before)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_last_checkpoint_saves_the_second_fit_too(tmp_path):
    last = LastCheckpoint(str(tmp_path))
    for _ in range(2):
        module = LitClassifier(net())
        trainer(last, max_steps=3, enable_checkpointing=True).fit(module, datamodule=data())
        assert_equal(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], module.state_dict())


class Late(SyntheticCIFAR10):
    """Its files are not there at first."""

    there = False

    def setup(self, stage):
        if not self.there:
            raise FileNotFoundError
        super().setup(stage)


@pytest.mark.parametrize("mode", [{"automatic_optimization": False}, {"steps_per_execution": 2}])
def test_a_fit_that_failed_early_leaves_the_trainers_settings(mode):
    fitted = trainer(accumulate_grad_batches=2, gradient_clip_val=0.5)
    images = Late(60, 20, batch_size=10, val_size=20)
    with pytest.raises(FileNotFoundError):
        fitted.fit(LitClassifier(net(), **mode), datamodule=images)
    assert (fitted.accumulate_grad_batches, fitted.gradient_clip_val) == (2, 0.5)
    images.there = True
    fitted.fit(LitClassifier(net(), **mode), datamodule=images)
    assert fitted.global_step == 2


class Negative(SyntheticCIFAR10):
    """Its transfer hook turns the images around."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return -batch[0], batch[1]


@pytest.mark.parametrize(("classes", "steps"), [(2, 1), (10, 4)])
def test_a_datamodule_has_no_part_in_a_later_fit_without_it(classes, steps):
    """Without ``datamodule_of``: "the labels go up to 9, but num_classes is 2", and its hooks get the batches."""
    x, y = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
    weights = []
    for validates in (False, True):
        fitted = trainer()
        if validates:
            fitted.validate(LitClassifier(net()), datamodule=Negative(60, 20, val_size=20), verbose=False)
        torch.manual_seed(0)
        small = nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))
        module = LitClassifier(small, num_classes=classes, steps_per_execution=steps)
        fitted.fit(module, *(ArrayLoader(x, y, EpochOrder(60, 10, shuffle=shuffle)) for shuffle in (True, False)))
        weights.append(module.net.state_dict())
    assert_equal(*weights)


KEPT = """
import gc, weakref
import lightning.pytorch as pl
from lit_basics import LitBlitzNet, LossReport, SyntheticCIFAR10

settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
trainer = pl.Trainer(**settings, callbacks=[LossReport()])
trainer.fit(LitBlitzNet(), datamodule=SyntheticCIFAR10(20, 20, val_size=0))
known = weakref.ref(trainer)
del trainer
gc.collect()
print("kept:", known() is not None)
"""


def test_a_loss_report_keeps_no_trainer_alive():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    assert "kept: False" in done.stdout


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_best_loss_without_validation_after_one_with(tmp_path):
    best = BestLossCheckpoint(str(tmp_path))
    scores = []
    for settings in ({}, {"limit_val_batches": 0, "max_epochs": 2}):
        fitted = trainer(best, enable_checkpointing=True, **settings)
        fitted.fit(LitClassifier(net()), datamodule=data())
        scores.append(fitted.callback_metrics[best.monitor])
    assert best.monitor == "train/loss"
    assert best.best_model_score == scores[1]


@pytest.mark.filterwarnings("ignore:Checkpoint directory|Be aware that when using")
def test_generators_go_on_after_a_checkpoint_was_validated(tmp_path):
    class Draws(LitClassifier):
        drawn = []  # noqa: RUF012

        def compute_loss(self, batch, batch_idx):
            self.drawn.append(torch.rand(()).item())
            return super().compute_loss(batch, batch_idx)

    fitted, module, images = trainer(RandomState(), enable_checkpointing=True, max_epochs=1), Draws(net()), data()
    fitted.fit(module, datamodule=images)
    fitted.save_checkpoint(tmp_path / "c.ckpt")
    torch.rand(1000)  # the generator moves on
    expected = torch.get_rng_state()
    fitted.validate(module, datamodule=images, ckpt_path=tmp_path / "c.ckpt")
    torch.set_rng_state(expected)
    fitted.fit_loop.max_epochs = 2
    fitted.fit(module, datamodule=images)
    torch.set_rng_state(expected)
    assert module.drawn[-4:] == [torch.rand(()).item() for _ in range(4)]


class Foreign(pl.LightningModule):
    """Counts its batches."""

    def __init__(self):
        super().__init__()
        self.net, self.batches = net(), 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_a_trainer_trains_a_foreign_module_after_one_of_ours():
    fitted = trainer()
    ours = LitClassifier(net(), steps_per_execution=2)
    fitted.fit(ours, datamodule=data(val_size=0))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    module = Foreign()
    fitted.fit_loop.max_epochs = 3
    fitted.fit(module, datamodule=data(val_size=0))
    assert module.batches == 2 * 6
    assert_equal(ours.state_dict(), before)


def test_a_second_iteration_within_the_first():
    loader = ArrayLoader(torch.arange(12.0), torch.zeros(12, dtype=torch.long), EpochOrder(12, 4, shuffle=True))
    seen = []
    for number, (x, _) in enumerate(loader):
        seen.append(x)
        if number == 1:
            inner = torch.cat([x for x, _ in loader])
        if number == 2:
            state = loader.state_dict()
    assert sorted(torch.cat(seen).tolist()) == sorted(inner.tolist()) == list(range(12))
    assert (state["epoch"], state["position"]) == (0, 3)
    state = loader.state_dict()  # of a whole epoch of a plain loop: the next is due
    assert (state["epoch"], state["position"]) == (1, 0)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_the_command_of_a_run_can_be_given_again(capsys):
    words = ["--trainer.callbacks+=NonFiniteGuard", "--trainer.callbacks.policy=skip"]
    words += [
        "--trainer.callbacks+=LossReport",
        "--trainer.logger+=lightning.pytorch.loggers.CSVLogger",
        "--trainer.logger.save_dir=logs",
    ]
    run = fit(*SMALL, *words)
    text = (run / "config.yaml").read_text()
    for _ in range(2):
        fit(*SMALL, *words, "--resume", "auto")
        assert (run / "config.yaml").read_text() == text
    more = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval=step"]
    fit(*SMALL, *words, *more, "--resume", "auto", "--trainer.max_epochs", "6")
    assert (run / "config.yaml").read_text().count("LearningRateMonitor") == 1


@pytest.mark.parametrize("own", [[], ["--config", "more.yaml"]], ids=["overlay", "file"])
def test_what_a_plus_appends_is_no_other_setting(own, tmp_path, capsys):
    """Laid over the run's own config.yaml it is there twice: said to be another, or two callbacks of one kind."""
    (tmp_path / "more.yaml").write_text("trainer: {callbacks+: [{class_path: lightning.pytorch.callbacks.Timer}]}")
    words = [*SMALL, "--config", "tensorboard", *own, "--trainer.max_epochs", "1"]
    run = fit(*words)
    capsys.readouterr()
    assert main(["fit", *words, "--run_dir", str(run), "--resume", "auto"]) == 0
    assert "--config names" not in capsys.readouterr().out
    assert main(["test", "--run_dir", str(run), *(own or ["--config", "tensorboard"])]) == 0


def test_a_list_of_callbacks_that_is_typed_whole_is_taken_as_it_is():
    run = fit(*SMALL, "--trainer.callbacks", '["LossReport"]')
    words = ["--trainer.callbacks", '["GradientMonitor", "LossReport"]', "--trainer.max_epochs", "6"]
    fit("--resume", "run", *words)
    text = (run / "config.yaml").read_text()
    assert text.count("LossReport") == text.count("GradientMonitor") == 1


def test_what_a_process_that_was_waited_for_has_saved_is_gone_on_from(tmp_path, monkeypatch, capsys):
    fit(*SMALL, run_dir="other")
    (tmp_path / "run").mkdir()
    lock = run_directory._lock

    def busy(descriptor):
        if (tmp_path / "other").exists():  # it saves, and leaves
            shutil.copytree("other", "run", dirs_exist_ok=True)
            shutil.rmtree("other")
            return False
        return lock(descriptor)

    monkeypatch.setattr(run_directory, "_lock", busy)
    fit(*SMALL, "--resume", "auto", "--trainer.max_epochs", "6")
    out = capsys.readouterr().out
    assert "afresh" not in out
    assert "resuming with trainer.max_epochs 6 (was 5)" in out


def test_another_config_on_a_resume_is_told_of(capsys):
    fit(*SMALL, "--seed_everything", "3")
    capsys.readouterr()
    fit(*SMALL, "--resume", "auto", "--trainer.max_epochs", "6")
    assert "what --config names has another seed_everything" in capsys.readouterr().out
    assert os.environ["PL_GLOBAL_SEED"] == "3"
    fit(*SMALL, "--config", "manual", "--resume", "auto")
    out = capsys.readouterr().out
    assert "the run goes on with its own config.yaml; what --config names has another seed_everything" in out
    assert "model.automatic_optimization" in out


def test_one_process_at_a_time_trains_in_a_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lit_basics.fitting.PATIENCE", 0.5)
    words = ["fit", *SMALL, "--trainer.max_epochs", "1000", "--run_dir", "run"]
    with subprocess.Popen([sys.executable, "-m", "lit_basics", *words], stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            for how in ([], ["--resume", "auto"]):
                assert main([*words, *how]) == 2
                assert re.search("holds a run already|another process trains in .*run", capsys.readouterr().err)
            assert process.poll() is None
        finally:
            process.kill()
    assert main([*words, "--resume", "auto", "--trainer.max_epochs", "1"]) == 0
