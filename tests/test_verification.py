"""``verify`` passes what is exact, and finds the faults of what is not, with their causes."""

import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.demos.boring_classes import (
    BoringDataModule,
    BoringDataModuleNoLen,
    BoringModel,
    DemoModel,
    IterableBoringDataModule,
    ManualOptimBoringModel,
)
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lit_basics import (
    ArrayLoader,
    DurableCheckpointIO,
    EpochOrder,
    LitBlitzNet,
    LitClassifier,
    LitLeNet5,
    RandomState,
    ResumableDataLoader,
    SyntheticCIFAR10,
    UserError,
    verify,
)
from lit_basics.cli import main
from lit_basics.verification.forks import Run, run_all
from lit_basics.verification.report import NotApplicable
from lit_basics.verification.tracing import largest_difference, training_state

EXACT = {"callbacks": [RandomState()], "plugins": [DurableCheckpointIO()], "progress": False}


class Plain(pl.LightningModule):
    """A module as anybody would write it, without a part of lit_basics."""

    def __init__(self, dropout=0.0, samples=65, sync_dist=True, reduction="mean"):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2))
        self.samples, self.sync_dist = samples, sync_dist
        self.criterion = nn.CrossEntropyLoss(reduction=reduction)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", self.criterion(self.net(x), y), batch_size=len(y), sync_dist=self.sync_dist)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def val_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.samples, 4, generator=generator)
        return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


def loader(shuffle):
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle=shuffle)


def images(**options):
    return SyntheticCIFAR10(48, 10, **{"batch_size": 8, "val_size": 6, **options})


def outcomes(report):
    return {verdict.check: verdict.outcome for verdict in report.verdicts}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "expected", "largest"),
    [
        ([1 + 5j], [1 - 5j], 10.0),
        ([1 + 5j], [1 + 5j], 0.0),
        ([NAN, 1.0], [NAN, 1.5], 0.5),
        ([NAN, 1.0], [1.0, 1.0], INF),
        ([-INF, 1.0], [-INF, 1.5], 0.5),
        ([-INF, 1.0], [INF, 1.0], INF),
        ([3, 5], [3, 7], 2.0),
    ],
)
def test_largest_difference(value, expected, largest):
    """Complex numbers by both their parts; what is NaN, or the same infinity, in both does not differ."""
    assert largest_difference(torch.tensor(value), torch.tensor(expected)) == largest


def test_tensors_in_lists_of_an_optimizers_state_are_compared():
    """LBFGS keeps its history in lists."""
    net = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert {"d of weight", "old_dirs[0] of weight", "old_stps[0] of weight"} <= training_state(net, [optimizer]).keys()


def test_a_rank_that_cannot_start_ends_the_others(tmp_path):
    """Started outside the ``try``, the first stays. File descriptors are left for the start of one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0) for _ in range(8)]
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            run_all([lambda _: time.sleep(60)] * 2, tmp_path / "log", lambda: None, [{"RANK": "0"}, {"RANK": "1"}])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert multiprocessing.active_children() == []


def test_our_own_module_passes_every_check():
    report = verify(LitLeNet5(), datamodule=images(crop=2, flip=True), steps=6, accumulate_grad_batches=2, **EXACT)
    assert outcomes(report) == dict.fromkeys(("loop", "resume", "manual", "ddp", "kill"), "passed"), str(report)
    assert report.passed
    assert "11 resume points" in report["resume"].text
    assert "each of 6 validation samples counted once" in report["ddp"].text
    assert report["kill"].text.count(",") == 2, "three kills"


def test_a_datamodule_by_position_and_a_progress_bar_as_trainer_fit_takes_them():
    settings = EXACT | {"callbacks": [*EXACT["callbacks"], TQDMProgressBar(refresh_rate=10)]}
    report = verify(LitLeNet5(), images(), checks=["loop", "resume", "ddp"], steps=2, **settings)
    assert report.passed, str(report)
    assert "validation samples counted once" in report["ddp"].text


@pytest.mark.slow
def test_several_steps_per_execution_pass_every_check():
    model = LitLeNet5(steps_per_execution=3)
    report = verify(model, datamodule=images(crop=2, flip=True), steps=6, accumulate_grad_batches=2, **EXACT)
    assert outcomes(report) == dict.fromkeys(("loop", "resume", "manual", "ddp", "kill"), "passed"), str(report)
    assert "11 resume points" in report["resume"].text  # within a group too


def test_a_loader_without_state_is_named_at_several_steps_per_execution():
    net = nn.Linear(4, 2)
    model = LitClassifier(net, num_classes=2, steps_per_execution=3)
    report = verify(model, loader(shuffle=True), checks=["resume"], steps=4, **EXACT)
    assert "the training loader (DataLoader) has no state_dict: batch 1 is of another order" in report["resume"].text


def test_a_shuffled_loader_of_plain_lightning_fails_to_resume():
    report = verify(Plain(), loader(shuffle=True), checks=["loop", "resume"], steps=12, **EXACT)
    assert outcomes(report) == {"loop": "passed", "resume": "failed"}, str(report)
    assert not report.passed
    text = report["resume"].text
    assert "11 of 11 resume points differ; the first, resumed after batch1, at step 2: net.0.weight by " in text
    assert "the training loader (DataLoader) has no state_dict: batch 1 is of another order" in text
    assert "ResumableDataLoader" in text


def test_an_unshuffled_loader_begins_its_epoch_again():
    report = verify(Plain(), loader(shuffle=False), checks=["resume"], steps=12, **EXACT)
    # at the two epochs' ends nothing is lost
    assert "9 of 11 resume points differ" in report["resume"].text
    assert "batch 1 is batch 0 again" in report["resume"].text


def test_dropout_without_the_random_state_fails():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 10))
    report = verify(LitClassifier(net), datamodule=images(), checks=["resume", "kill"], steps=6, progress=False)
    assert outcomes(report) == {"resume": "failed", "kill": "failed"}
    for verdict in report.verdicts:
        assert "the random state is not in the checkpoint (dropout" in verdict.text
        assert "RandomState" in verdict.text
    report = verify(LitClassifier(net), datamodule=images(), checks=["resume", "kill"], steps=6, **EXACT)
    assert report.passed, str(report)


def test_padded_validation_on_two_ranks_fails():
    report = verify(Plain(), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "failed"}
    assert "of 65 validation samples two ranks repeat 1 and miss 0: Lightning's sampler pads" in report["ddp"].text


def test_a_metric_of_one_rank_only_fails():
    report = verify(Plain(samples=64, sync_dist=False), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert "val_loss is " in report["ddp"].text
    assert "sync_dist=True" in report["ddp"].text
    assert verify(Plain(samples=64), loader(shuffle=True), checks=["ddp"], **EXACT).passed


class MeanOfLargest(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("val_largest", self.net(batch[0]).max(), batch_size=len(batch[1]), sync_dist=True)


def test_a_metric_that_depends_on_the_batches_is_not_one_of_one_rank_only():
    """Of it ``sync_dist=True`` was said to be missing."""
    report = verify(MeanOfLargest(samples=64), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert "in one process: its mean over batches depends on how samples fall into them" in report["ddp"].text


@pytest.mark.parametrize(
    ("limit", "more"),
    [
        (1, "validation is cut by limit_val_batches, its samples and metrics are not compared"),
        (0.0, "no validation"),
    ],
)
def test_a_validation_of_some_batches_or_none_is_not_compared(limit, more):
    """That the metrics are not went unsaid, and a validation that there is not in the user's run was made whole."""
    model = Plain(samples=64, sync_dist=False)
    report = verify(model, loader(shuffle=True), checks=["ddp"], limit_val_batches=limit, **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)
    assert report["ddp"].text.endswith(f"; {more}")


class BreaksInValidation(Plain):
    """Breaks amid the run; it has three epochs."""

    def validation_step(self, batch, batch_idx):
        assert self.trainer.sanity_checking or self.current_epoch == 2, "validated"


@pytest.mark.parametrize("every", [3, 5])
def test_a_rare_validation_is_brought_into_the_run(every):
    """Left to come after the run, or at its end, nothing of it is verified."""
    report = verify(
        BreaksInValidation(), loader(shuffle=False), checks=["resume"], steps=6, check_val_every_n_epoch=every, **EXACT
    )
    assert "validated" in report["resume"].text


class Synchronized(Plain):
    def __init__(self):
        super().__init__(samples=64)
        self.net.insert(1, nn.SyncBatchNorm(8))


def test_synchronized_batch_norm_says_nothing_of_ranks_on_the_cpu():
    """DistributedDataParallel refuses it there: "failed"."""
    report = verify(Synchronized(), loader(shuffle=True), checks=["loop", "ddp"], steps=4, **EXACT)
    assert outcomes(report) == {"loop": "passed", "ddp": "not applicable"}, str(report)
    assert "SyncBatchNorm, which several processes can train on GPUs only" in report["ddp"].text


class DrawsInValidation(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("val_noise", torch.rand(()), sync_dist=True)


class RankZero(Plain):
    def validation_step(self, batch, batch_idx):
        if self.global_rank == 0:
            self.log("val_batches", 8.0, rank_zero_only=True)


class InFloat(Plain):
    def validation_step(self, batch, batch_idx):
        super().validation_step((batch[0].float(), batch[1]), batch_idx)


@pytest.mark.parametrize(
    ("kind", "settings", "more"),
    [
        (DrawsInValidation, {}, "; validation draws random numbers, its metrics are not compared"),
        (RankZero, {}, ""),
        (Plain, {"precision": "bf16-true"}, ""),
        (InFloat, {}, ""),
    ],
    ids=["draws", "rank 0 only", "bf16-true", "not in float64"],
)
def test_metrics_that_may_differ_from_rank_to_rank(kind, settings, more):
    """Of each it was said that it is the mean of one rank's batches; the last cannot be validated in float64."""
    report = verify(kind(samples=64), loader(shuffle=True), checks=["ddp"], **settings, **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)
    assert report["ddp"].text.endswith(f"; each of 64 validation samples counted once{more}")


class Undefined(Plain):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_undefined", NAN, sync_dist=True)


def test_a_metric_that_is_undefined_everywhere_is_the_same():
    """Without ``isnan`` in ``same_metric`` it "is nan on rank 0 of two, nan in one process"."""
    report = verify(Undefined(samples=64), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)


def test_a_summed_loss_fails_on_two_ranks():
    report = verify(Plain(samples=64, reduction="sum"), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert "two ranks differ from one process on the same global batch at step 1: net.0.weight" in report["ddp"].text


class LogsTheRate(Plain):
    def on_validation_epoch_end(self):
        self.log("lr", self.optimizers().param_groups[0]["lr"])


def test_a_validation_that_reads_what_a_fit_has_is_not_counted():
    """Raised, it is a failure of the ranks."""
    report = verify(LogsTheRate(samples=64), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)
    line = LogsTheRate.on_validation_epoch_end.__code__.co_firstlineno + 1
    assert f"validation cannot run outside a fit (AttributeError at test_verification.py:{line}" in report["ddp"].text


class ScalesTheRate(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1 * self.trainer.world_size)


def test_a_rate_scaled_by_the_number_of_processes_says_nothing_of_ranks():
    """Else the loss is blamed."""
    report = verify(ScalesTheRate(samples=64), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "not applicable"}, str(report)
    assert report["ddp"].text == "the learning rate depends on the number of processes (0.2 on two, 0.1 on one)"


class TrainsItself(Plain):
    def __init__(self):
        super().__init__(samples=64)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))

    def on_train_epoch_start(self):
        self.train()


def test_layers_stay_still_on_two_ranks_when_the_module_trains_itself():
    """Without the ``train`` that does nothing dropout draws, and batch-norm takes each rank's own batch."""
    report = verify(TrainsItself(), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)


def test_data_too_few_for_two_ranks_say_nothing_of_them():
    """Without the look at the ranks' batches the reason is an IndexError of the replay."""
    data = DataLoader(TensorDataset(*loader(shuffle=False).dataset[:12]), batch_size=8, shuffle=True, drop_last=True)
    report = verify(Plain(samples=64), data, checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "not applicable"}, str(report)
    assert report["ddp"].text == "a rank has no batch: the data are too few for two"


class ReadsTheBest(Plain):
    def on_train_epoch_end(self):
        callback = self.trainer.checkpoint_callback
        assert (callback.best_model_path, callback.best_model_score) == ("", None)


def test_a_module_that_reads_the_best_checkpoint_gets_verdicts():
    """Without a checkpoint callback of that face all are failures."""
    data = ResumableDataLoader(loader(shuffle=False).dataset, batch_size=8, shuffle=True)
    report = verify(ReadsTheBest(samples=64), data, checks=["resume", "ddp"], steps=4, **EXACT)
    assert outcomes(report) == {"resume": "passed", "ddp": "passed"}, str(report)


class EndsWithMean(pl.Callback):
    """Averages the bias over the run, and puts the mean in its place at the end; ``kept`` in the checkpoint."""

    def __init__(self, kept):
        self.kept, self.sum, self.count = kept, 0.0, 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.sum, self.count = self.sum + pl_module.net[3].bias.detach().clone(), self.count + 1

    def on_train_end(self, trainer, pl_module):
        pl_module.net[3].bias.data = self.sum / self.count

    def state_dict(self):
        return {"sum": self.sum, "count": self.count} if self.kept else {}

    def load_state_dict(self, state):
        self.sum, self.count = state["sum"], state["count"]


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_run_ends_with_is_compared(kept):
    """After the steps alone both are "passed"."""
    data = ResumableDataLoader(loader(shuffle=False).dataset, batch_size=8, shuffle=True)
    settings = {**EXACT, "callbacks": [RandomState(), EndsWithMean(kept)]}
    report = verify(Plain(), data, checks=["resume", "kill"], steps=12, **settings)
    assert outcomes(report) == dict.fromkeys(("resume", "kill"), "passed" if kept else "failed"), str(report)
    assert kept or "at the end: net.3.bias by" in report["resume"].text


def test_a_process_that_has_trained_on_a_gpu_is_refused(monkeypatch):
    """Its forks cannot train: each check was a failure of autograd's. There are none here with a GPU."""

    def refuse(*_):
        raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert verify(Plain(), loader(shuffle=False), checks=["loop"], steps=2, **EXACT).passed
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    with pytest.raises(UserError, match="this process has trained already; call verify in a new one, or before"):
        verify(Plain(), loader(shuffle=False), checks=["loop"], steps=2, **EXACT)


class Gentle(Plain):
    """Trains by hardly visible updates, and loses ``lost`` samples of each batch."""

    def __init__(self, lr, lost=0, single=False):
        super().__init__(samples=64)
        self.lr, self.lost, self.single = lr, lost, single

    def training_step(self, batch, batch_idx):
        x, y = batch[0][self.lost :], batch[1][self.lost :]
        return super().training_step((x.float() if self.single else x, y), batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class GentleSGD(Gentle):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize(
    ("kind", "lr", "single"),
    [(Gentle, 1e-9, False), (GentleSGD, 1e-8, False), (GentleSGD, 3e-5, True)],
    ids=["AdamW", "SGD", "SGD in float32"],
)
def test_a_lost_sample_fails_on_two_ranks_however_small_the_updates(kind, lr, single):
    """By absolute tolerances, 1e-8 in float64 and else 1e-5, it passes."""
    report = verify(kind(lr, lost=1, single=single), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert "two ranks differ from one process on the same global batch" in report["ddp"].text
    report = verify(kind(lr, single=single), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)


def test_updates_below_the_rounding_of_the_weights_say_nothing_of_ranks():
    """Without ``TELLING`` it passes, though samples are lost."""
    report = verify(Gentle(1e-8, lost=1, single=True), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "not applicable"}, str(report)
    assert "in 5 steps no weight moves by more than " in report["ddp"].text


class Counting(LitBlitzNet):
    """Keeps in an attribute, which no checkpoint holds, how it trains."""

    calls = 0

    def compute_loss(self, batch, batch_idx):
        self.calls += 1
        return super().compute_loss(batch, batch_idx) * (1 + self.calls % 3)


def test_state_outside_the_checkpoint_fails():
    report = verify(Counting(), datamodule=images(), checks=["resume"], steps=6, **EXACT)
    assert "keeps outside parameters and buffers" in report["resume"].text


class Teaches(Plain):
    """Follows its weights with those of a teacher, which it takes into account."""

    def __init__(self):
        super().__init__(samples=64)
        self.teacher = nn.Linear(4, 2).requires_grad_(False)
        self.net = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self.net(batch[0]) - self.teacher(batch[0])).square().mean()

    def follow(self):
        for value, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            value.data.lerp_(new.data, 0.1)


class TeachesAfterTheBatch(Teaches):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.follow()


class TeachesBeforeTheNext(Teaches):
    def on_before_zero_grad(self, optimizer):
        self.follow()


class TeachesInTheStep(Teaches):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.follow()


def test_a_teacher_that_follows_after_the_callbacks_is_named():
    """Without it "something is not in the checkpoint"; the hooks that are named in its place are resumed."""
    data = ResumableDataLoader(loader(shuffle=False).dataset, batch_size=8, shuffle=True)
    text = verify(TeachesAfterTheBatch(), data, checks=["resume"], steps=4, **EXACT)["resume"].text
    assert "checkpoints are saved before the module's on_train_batch_end, which a resume does not repeat" in text
    for kind in (TeachesBeforeTheNext, TeachesInTheStep):
        report = verify(kind(), data, checks=["resume"], steps=4, **EXACT)
        assert outcomes(report) == {"resume": "passed"}, str(report)


class Clock(LitBlitzNet):
    def compute_loss(self, batch, batch_idx):
        return super().compute_loss(batch, batch_idx) * random.SystemRandom().random()


def test_a_run_that_never_comes_out_the_same_is_said_to():
    report = verify(Clock(), datamodule=images(), checks=["resume"], steps=4, **EXACT)
    assert "the same run, made twice, differs at step 1" in report["resume"].text


class Own(Plain):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.trainer.global_step == 3:
            with torch.no_grad():
                self.net[3].bias.add_(1)


class Diverging(Plain):
    """Has a mask, whose elements are never finite."""

    def __init__(self, factor=1.0):
        super().__init__(samples=64)
        self.factor = factor
        self.register_buffer("mask", torch.full((2,), -INF))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.factor


def test_a_training_that_diverges_proves_nothing():
    """Without ``refuse_diverged`` every check passes, as NaN is the same as NaN."""
    data = ResumableDataLoader(loader(shuffle=False).dataset, batch_size=8)
    checks = ["loop", "resume", "ddp", "kill"]
    report = verify(Diverging(NAN), data, checks=checks, steps=4, **EXACT)
    assert outcomes(report) == dict.fromkeys(checks, "not applicable"), str(report)
    for verdict in report.verdicts:
        assert verdict.text == "the weights are not finite after step 1: nothing can be compared"
    assert verify(Diverging(), data, checks=["loop", "ddp"], steps=4, **EXACT).passed


class ForgetsTheLoss(Plain):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


class TrainsAnother(Plain):
    def configure_optimizers(self):
        return torch.optim.SGD(nn.Linear(4, 2).parameters(), lr=0.1)


class Still(LitClassifier):
    """Keeps its weights; those of its batch-norm's buffers change."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), num_classes=2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("kind", [ForgetsTheLoss, TrainsAnother, Still])
def test_a_training_that_changes_no_weight_proves_nothing(kind):
    """Every check but *ddp* passes, as nothing that is lost shows."""
    data = ResumableDataLoader(loader(shuffle=False).dataset, batch_size=8)
    checks = ["loop", "resume", "kill", *(["manual"] if kind is Still else [])]
    report = verify(kind(), data, checks=checks, steps=4, **EXACT)
    assert outcomes(report) == dict.fromkeys(checks, "not applicable"), str(report)
    for verdict in report.verdicts:
        assert verdict.text.startswith("in 4 steps no weight changes: nothing is proved")


def test_lazy_weights_are_no_still_ones():
    """They have no values before the first step."""
    model = Plain()
    model.net = nn.Sequential(nn.LazyLinear(2))
    report = verify(model, loader(shuffle=False), checks=["loop"], steps=4, **EXACT)
    assert outcomes(report) == {"loop": "passed"}, str(report)


def test_an_update_of_the_modules_own_has_no_plain_loop():
    report = verify(Own(), loader(shuffle=False), checks=["loop"], steps=6, **EXACT)
    assert outcomes(report) == {"loop": "not applicable"}
    assert "at step 4: net.3.bias by 1" in report["loop"].text
    assert "Own overrides optimizer_step" in report["loop"].text


class Adds(pl.Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step == 3:
            with torch.no_grad():
                pl_module.net[3].bias.add_(1)


class WithAdds(Plain):
    def configure_callbacks(self):
        return [Adds()]


def test_a_changed_update_fails_against_the_plain_loop():
    report = verify(WithAdds(), loader(shuffle=False), checks=["loop"], steps=6, **EXACT)
    assert outcomes(report) == {"loop": "failed"}
    assert "at step 4: net.3.bias by 1" in report["loop"].text


class WarmsUp(LitClassifier):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (1 + self.trainer.global_step) / 4)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class KeepsGradients(LitClassifier):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


@pytest.mark.parametrize(("kind", "name"), [(WarmsUp, "optimizer_step"), (KeepsGradients, "optimizer_zero_grad")])
def test_what_only_automatic_optimization_calls_leaves_one_mode(kind, name):
    """Tried nevertheless, "manual differs"."""
    model = kind(nn.Linear(4, 2), num_classes=2)
    report = verify(model, loader(shuffle=False), checks=["loop", "manual"], steps=4, **EXACT)
    assert outcomes(report) == {"loop": "not applicable", "manual": "not applicable"}, str(report)
    assert all(f"{kind.__name__} overrides {name}" in verdict.text for verdict in report.verdicts)


class Records(LitClassifier):
    def compute_loss(self, batch, batch_idx):
        loss = super().compute_loss(batch, batch_idx)
        self.record("train/mine", loss)
        return loss


def test_a_module_that_records_has_a_plain_loop():
    report = verify(Records(nn.Linear(4, 2), 2), loader(shuffle=False), checks=["loop"], steps=4, **EXACT)
    assert outcomes(report) == {"loop": "passed"}, str(report)


class NeedsTrainer(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.trainer.current_epoch)


def test_a_module_that_needs_a_trainer_has_no_plain_loop():
    report = verify(NeedsTrainer(), loader(shuffle=False), checks=["loop", "manual"], steps=4, **EXACT)
    assert outcomes(report) == {"loop": "not applicable", "manual": "not applicable"}
    line = NeedsTrainer.training_step.__code__.co_firstlineno + 1
    assert f"it needs a Trainer: RuntimeError at test_verification.py:{line}" in report["loop"].text
    assert "Plain has one mode" in report["manual"].text.replace("NeedsTrainer", "Plain")


class InContainer(Plain):
    """Takes batches of several loaders."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch[0], batch_idx)


@pytest.mark.parametrize(
    "loaders",
    [
        [loader(shuffle=True)],
        {"a": loader(shuffle=True)},
        {"a": loader(shuffle=True), "b": [loader(shuffle=False)]},
        CombinedLoader({"a": loader(shuffle=True), "b": loader(shuffle=False)}, "min_size"),
    ],
    ids=["list of one", "dict of one", "two", "combined"],
)
def test_loaders_in_a_container_have_a_plain_loop(loaders):
    """With the container in the place of its one loader ``training_step`` gets a loader, or 'a', for a batch."""
    report = verify(InContainer(), loaders, checks=["loop"], steps=6, **EXACT)
    assert outcomes(report) == {"loop": "passed"}, str(report)


def test_a_compiled_module_is_verified_as_it_was():
    """Without ``to_uncompiled`` it is no LightningModule: "Expected a parent"."""
    model = Plain(samples=64)
    report = verify(torch.compile(model), loader(shuffle=False), checks=["loop", "ddp"], steps=4, **EXACT)
    assert report.passed, str(report)
    assert model._compiler_ctx is None


class NeverCompiled(nn.Linear):
    def compile(self, *args, **kwargs):
        raise AssertionError("compiled")


def test_compile_net_is_left_out():
    """A compiled net rounds otherwise than the plain loop's."""
    model = LitClassifier(NeverCompiled(4, 2), num_classes=2, compile_net=True)
    report = verify(model, loader(shuffle=False), checks=["loop", "ddp"], steps=4, **EXACT)
    assert outcomes(report) == {"loop": "passed", "ddp": "passed"}, str(report)
    assert model.compile_net is True


class NoLength(IterableDataset):
    """Five batches, which nobody knows before."""

    def __iter__(self):
        yield from zip(*loader(shuffle=False).dataset[:40], strict=True)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_loader_without_length_that_ends_before_the_limit_has_a_plain_loop(accumulate):
    """A ``last`` where the loader ends differs: with a limit Lightning makes no step of what remains there."""
    data = DataLoader(NoLength(), batch_size=8)
    settings = {**EXACT, "accumulate_grad_batches": accumulate}
    report = verify(Plain(), data, checks=["loop"], steps=9, **settings)
    assert outcomes(report) == {"loop": "passed"}, str(report)


class Halves(Plain):
    """Halves the learning rate at each epoch's end, or at each step."""

    interval = "epoch"

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], {"scheduler": scheduler, "interval": self.interval}


class Skips(Halves):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None


class SkipsByStep(Skips):
    interval = "step"


@pytest.mark.parametrize(
    ("kind", "dataset"),
    [(Halves, NoLength()), (Skips, NoLength()), (SkipsByStep, NoLength()), (Halves, loader(shuffle=False).dataset)],
    ids=["no length", "skips", "skips a step", "length"],
)
def test_an_epochs_end_that_the_trainer_does_not_know_steps_no_scheduler(kind, dataset):
    """Stepped wherever an epoch ends, the first differs."""
    report = verify(kind(), DataLoader(dataset, batch_size=8), checks=["loop"], steps=18, **EXACT)
    assert outcomes(report) == {"loop": "passed"}, str(report)


class SharedNoLength(IterableDataset):
    """Three batches of a rank, which nobody knows before."""

    def __iter__(self):
        rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        yield from zip(*loader(shuffle=False).dataset[rank::ranks], strict=True)


def test_two_ranks_of_a_loader_without_length():
    """Replayed as three batches of an epoch that has three, one process makes a step of what remains of two."""
    data = DataLoader(SharedNoLength(), batch_size=8)
    report = verify(Halves(samples=64), data, checks=["ddp"], accumulate_grad_batches=2, **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)


class DrawsAtTheStart(Plain):
    def on_train_start(self):
        self.factor = torch.rand(())

    def on_train_epoch_start(self):
        self.factor = self.factor + torch.rand(())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.factor


def test_what_hooks_draw_comes_after_the_seed_of_the_first_epochs_loader():
    """With the loader's iterator made after them, both the factor and the order are others."""
    report = verify(DrawsAtTheStart(), loader(shuffle=True), checks=["loop"], steps=6, **EXACT)
    assert outcomes(report) == {"loop": "passed"}, str(report)


class SumsLosses(Halves):
    """Weighs the next loss by this one, and by what it is told of each batch."""

    interval, weight = "step", 1.0

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx) * self.weight, "size": len(batch[1])}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.weight = 2.0 if batch is None else float(outputs["loss"]) + outputs["size"]


def some_none(samples):
    x, y = map(torch.stack, zip(*samples, strict=True))
    return None if x[0, 0] > 0 else (x, y)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_that_are_none_and_the_outputs_of_a_step_are_in_the_plain_loop_too(accumulate):
    """Else it "needs a Trainer"."""
    data = DataLoader(loader(shuffle=False).dataset, batch_size=8, collate_fn=some_none)
    assert {batch is None for batch in data} == {True, False}
    settings = {**EXACT, "accumulate_grad_batches": accumulate}
    report = verify(SumsLosses(), data, checks=["loop"], steps=8, **settings)
    assert outcomes(report) == {"loop": "passed"}, str(report)


def test_a_validation_by_the_batches_of_the_whole_run_is_resumed():
    """With 1 in the place of ``check_val_every_n_epoch=None`` the Trainer refuses an interval beyond an epoch."""
    data = ResumableDataLoader(TensorDataset(*loader(shuffle=False).dataset[:16]), batch_size=8, shuffle=True)
    settings = {"val_check_interval": 3, "check_val_every_n_epoch": None, **EXACT}
    report = verify(Plain(), data, checks=["resume"], steps=9, **settings)
    assert outcomes(report) == {"resume": "passed"}, str(report)


class MadeLater(Plain):
    def __init__(self):
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(4, 2))


def test_layers_made_in_configure_model_are_drawn_in_the_precision():
    """Drawn in float32 they are other numbers."""
    report = verify(MadeLater(), loader(shuffle=False), checks=["loop"], steps=4, precision="64-true", **EXACT)
    assert outcomes(report) == {"loop": "passed"}, str(report)


class CallsTwice(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self.net(x) + self.net(2 * x), y)


def test_a_net_called_twice_in_mixed_precision_has_a_plain_loop():
    """With autocast's cache, which Lightning does without, its two gradients are added in bfloat16."""
    report = verify(CallsTwice(), loader(shuffle=False), checks=["loop"], steps=4, precision="bf16-mixed", **EXACT)
    assert outcomes(report) == {"loop": "passed"}, str(report)


class KeepsAMean(Plain):
    """Trains nothing, and keeps the mean of what it sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def training_step(self, batch, batch_idx):
        self.mean = self.mean.lerp(batch[0].mean(0), 0.1)

    def configure_optimizers(self):
        return None


def test_a_module_without_an_optimizer_has_a_plain_loop():
    """A loop over no optimizer never calls ``training_step``."""
    report = verify(KeepsAMean(), loader(shuffle=False), checks=["loop"], steps=4, **EXACT)
    assert outcomes(report) == {"loop": "passed"}, str(report)


class ByEpoch(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.current_epoch)


def test_a_module_that_reads_its_epoch_has_a_plain_loop():
    """Without ``counting`` the loop is at epoch 0 throughout, and the weights differ from step 3 on."""
    report = verify(ByEpoch(), loader(shuffle=False), checks=["loop"], steps=6, **EXACT)
    assert outcomes(report) == {"loop": "passed"}, str(report)


class Drawing(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * random.random()


def test_draws_of_pythons_own_generator_are_resumed():
    """Without ``random.setstate`` in forks.py each run draws other numbers."""
    data = ResumableDataLoader(loader(shuffle=False).dataset, batch_size=8, shuffle=True)
    report = verify(Drawing(), data, checks=["resume"], steps=4, **EXACT)
    assert outcomes(report) == {"resume": "passed"}, str(report)
    settings = {**EXACT, "callbacks": []}
    report = verify(Drawing(), data, checks=["resume"], steps=4, **settings)
    assert "the random state is not in the checkpoint" in report["resume"].text


class Manual(Plain):
    """Makes ``updates`` of each batch, or one of every ``-updates``."""

    def __init__(self, updates):
        super().__init__(samples=64)
        self.updates, self.automatic_optimization = updates, False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(max(self.updates, 1)):
            self.manual_backward(super().training_step(batch, batch_idx))
            if self.updates > 0 or (batch_idx + 1) % -self.updates == 0:
                optimizer.step()
                optimizer.zero_grad()


class ForgetsItsEpoch:
    """Has a state that says where in its epoch of four batches it is, and not in which."""

    epoch, position, start = -1, 0, 0

    def __iter__(self):
        self.epoch += 1
        start, self.start = self.start, 0
        order = torch.randperm(48, generator=torch.Generator().manual_seed(self.epoch)).split(8)
        for self.position in range(start, 4):
            yield loader(shuffle=False).dataset[order[self.position]]

    def state_dict(self):
        return {"start": (self.position + 1) % 4}

    def load_state_dict(self, state):
        self.start = state["start"]


def test_several_updates_of_a_batch_are_resumed_at_epochs_ends_too():
    """Ended after as many updates, the run has no second epoch."""
    settings = {**EXACT, "limit_train_batches": 4}
    report = verify(Manual(3), ForgetsItsEpoch(), checks=["resume"], steps=12, **settings)
    assert "8 of 11 resume points differ; the first, resumed after batch4" in report["resume"].text
    data = ResumableDataLoader(loader(shuffle=False).dataset, batch_size=8, shuffle=True)
    assert verify(Manual(3), data, checks=["resume"], steps=12, **EXACT).passed


def test_a_module_that_makes_no_step_in_a_short_epoch_says_nothing():
    """Else both are "failed"."""
    data = ResumableDataLoader(loader(shuffle=False).dataset, batch_size=8, shuffle=True)
    report = verify(Manual(-6), data, checks=["resume", "ddp"], steps=6, **EXACT)
    assert outcomes(report) == {"resume": "not applicable", "ddp": "not applicable"}, str(report)
    assert (
        report["resume"].text
        == "no optimizer step that Lightning counts in epochs of 2 batches; --steps makes them longer"
    )


def test_gradients_that_a_module_accumulates_by_itself():
    """Saved amid the batches of a step they are lost: "something is not in the checkpoint"."""
    data = ResumableDataLoader(loader(shuffle=False).dataset, batch_size=8, shuffle=True)
    report = verify(Manual(-2), data, checks=["resume", "kill"], steps=10, **EXACT)
    assert outcomes(report) == {"resume": "passed", "kill": "passed"}, str(report)
    assert "9 resume points" in report["resume"].text
    report = verify(Manual(-3), data, checks=["resume"], steps=10, limit_val_batches=0, **EXACT)
    assert "resumed after batch4, at step 2: " in report["resume"].text
    assert "an epoch ends amid the batches of a step" in report["resume"].text


class Keeps:
    """A loader with a state, whose length nobody knows."""

    position, start = 0, 0

    def __iter__(self):
        start, self.start = self.start, 0
        for self.position in range(start, 6):
            yield loader(shuffle=False).dataset[8 * self.position : 8 * self.position + 8]

    def state_dict(self):
        return {"start": (self.position + 1) % 6}

    def load_state_dict(self, state):
        self.start = state["start"]


def test_a_loader_of_which_lightning_takes_a_batch_ahead_proves_nothing():
    """Our runs, all of a limited length, take none ahead: "passed", and the user's run loses one."""
    report = verify(Plain(), Keeps(), checks=["resume", "kill"], steps=6, **EXACT)
    assert outcomes(report) == {"resume": "not applicable", "kill": "not applicable"}, str(report)
    assert "the training loader has a state and no length" in report["resume"].text
    report = verify(Plain(), Keeps(), checks=["resume"], steps=6, limit_train_batches=6, **EXACT)
    assert outcomes(report) == {"resume": "passed"}, str(report)


class Saving(Plain):
    def configure_callbacks(self):
        return [ModelCheckpoint(), ModelCheckpoint("here", save_last=True)]


def test_a_checkpoint_callback_of_the_module_writes_nothing(tmp_path):
    """Without ``without_checkpoints`` around ``configure_callbacks`` there is a folder ``here``."""
    report = verify(Saving(samples=64), loader(shuffle=False), checks=["loop", "resume", "ddp"], steps=4, **EXACT)
    assert outcomes(report) == {"loop": "passed", "resume": "failed", "ddp": "passed"}, str(report)
    assert list(tmp_path.iterdir()) == []


class Plateau(Plain):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def test_what_follows_a_validation_has_no_plain_loop_and_no_ranks():
    """Without ``bare`` in ``_ddp_updates`` the second row is a failure; without ``exist_ok`` it names a folder."""
    report = verify(Plateau(samples=64), loader(shuffle=True), checks=["loop", "ddp"], steps=4, **EXACT)
    assert outcomes(report) == {"loop": "not applicable", "ddp": "not applicable"}, str(report)
    for verdict in report.verdicts:
        assert "without validation and callbacks it cannot train: MisconfigurationException" in verdict.text
        assert "val_loss" in verdict.text


class Padded(Plain):
    """Takes sequences of any length."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self.net(x.mean(1)), y)


def padded(samples):
    """Pad to the longest of the batch, which no two ranks share."""
    longest = 1 + max(int(length) for _, _, length in samples)
    return torch.stack([x.expand(longest, -1) for x, _, _ in samples]), torch.stack([y for _, y, _ in samples])


def test_batches_of_other_lengths_on_each_rank_cannot_be_compared():
    """Without the ``except`` around ``joined`` that is a traceback."""
    x, y = loader(shuffle=False).dataset.tensors
    data = DataLoader(TensorDataset(x, y, torch.arange(48)), batch_size=8, collate_fn=padded)
    report = verify(Padded(samples=64), data, checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "not applicable"}, str(report)
    assert "the ranks' batches cannot be put together into one: Sizes of tensors must match" in report["ddp"].text


class Texts(TensorDataset):
    """A text for each sample, that says twice its first number."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, y, str(2 * float(x[0]))


class ReadsTexts(Plain):
    val_dataloader = None

    def training_step(self, batch, batch_idx):
        x, y, texts = batch
        return super().training_step((x * torch.tensor([[float(text)] for text in texts]), y), batch_idx)


def test_texts_of_two_ranks_are_put_together():
    """Those of one rank alone are too few: "The size of tensor a (16) must match"."""
    data = DataLoader(Texts(*loader(shuffle=False).dataset.tensors), batch_size=8, shuffle=True)
    report = verify(ReadsTexts(), data, checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)


class Masked(Plain):
    def training_step(self, batch, batch_idx):
        x, y, mask = batch
        return super().training_step((mask @ x, y), batch_idx)


class Keyed(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(next(iter(batch.values())), batch_idx)


def with_mask(samples):
    return *(torch.stack(part) for part in zip(*samples, strict=True)), torch.eye(len(samples))


def with_key(samples):
    x, y = map(torch.stack, zip(*samples, strict=True))
    return {f"{float(x[0, 0])}": (x, y)}


@pytest.mark.parametrize(
    ("kind", "collate", "reason"),
    [
        (Masked, with_mask, "one process cannot take the ranks' batches put together: RuntimeError at test_verif"),
        (Keyed, with_key, "the ranks' batches cannot be put together into one: dictionaries with other keys"),
    ],
)
def test_batches_that_one_process_cannot_take_say_nothing_of_two(kind, collate, reason):
    """Else the first is "failed", and the second a KeyError out of ``verify``."""
    data = DataLoader(loader(shuffle=False).dataset, batch_size=8, shuffle=True, collate_fn=collate)
    report = verify(kind(samples=64), data, checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "not applicable"}, str(report)
    assert reason in report["ddp"].text


class Weighted(Plain):
    """Sums up a few numbers for the whole batch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx) * batch[2].sum()


def with_numbers(samples):
    return *(torch.stack(part) for part in zip(*samples, strict=True)), torch.ones(3)


def test_tensors_that_differ_in_their_first_dimension_say_nothing_of_ranks():
    """The numbers of both ranks are put together like samples: the loss was blamed."""
    data = DataLoader(loader(shuffle=False).dataset, batch_size=8, shuffle=True, collate_fn=with_numbers)
    report = verify(Weighted(samples=64), data, checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "not applicable"}, str(report)
    assert "tensors of a batch differ in their first dimension" in report["ddp"].text


class Packed(Plain):
    """Reads sequences; keeps a table."""

    def __init__(self, table):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.register_buffer("table", table)

    def training_step(self, batch, batch_idx):
        x, y = batch
        _, (hidden, _) = self.lstm(x)
        return self.criterion(self.net(torch.sparse.mm(self.table.to(hidden.dtype), hidden[0].mT).mT), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch[1]), sync_dist=True)


def packed(samples):
    parts = [x.expand(1 + int(length) % 3, -1) for x, _, length in samples]
    return nn.utils.rnn.pack_sequence(parts, enforce_sorted=False), torch.stack([y for _, y, _ in samples])


@pytest.mark.parametrize(
    ("table", "checks"),
    [(torch.eye(4), ["loop", "ddp"]), (torch.eye(4).to_sparse(), ["loop", "resume"])],  # DDP takes no sparse buffer
)
def test_packed_sequences_and_sparse_buffers_are_compared(table, checks):
    """Made anew of None, and without a kernel for ``torch.equal``, they end in errors."""
    x, y = loader(shuffle=False).dataset.tensors
    data = ResumableDataLoader(TensorDataset(x, y, torch.arange(48)), batch_size=8, shuffle=True, collate_fn=packed)
    report = verify(Packed(table), data, data, checks=checks, steps=4, **EXACT)
    assert outcomes(report) == dict.fromkeys(checks, "passed"), str(report)


def test_a_summed_loss_of_packed_sequences_fails_on_two_ranks():
    """A packed sequence has more rows than the batch has samples, and is put together rightly."""
    x, y = loader(shuffle=False).dataset.tensors
    data = DataLoader(TensorDataset(x, y, torch.arange(48)), batch_size=8, shuffle=True, collate_fn=packed)
    model = Packed(torch.eye(4))
    model.criterion = nn.CrossEntropyLoss(reduction="sum")
    report = verify(model, data, data, checks=["ddp"], **EXACT)
    assert "two ranks differ from one process on the same global batch at step 1" in report["ddp"].text


class PadsValidation(Plain):
    def validation_step(self, batch, batch_idx):
        x, y = batch
        return super().validation_step((x.mean(1), y), batch_idx)

    def val_dataloader(self):
        x, y = super().val_dataloader().dataset.tensors
        return DataLoader(TensorDataset(x, y, torch.arange(len(x))), batch_size=8, collate_fn=padded)


def test_validation_samples_that_are_padded_in_their_batch_are_not_counted():
    """Otherwise two ranks repeat and miss nearly all of them."""
    report = verify(PadsValidation(samples=64), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)
    others = "validation samples are others in other batches (padding, random draws)"
    assert f"{others}: they and the metrics are not compared" in report["ddp"].text


class WithScale(Plain):
    """A number for all samples of a batch comes first."""

    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch[1:], batch_idx)

    def val_dataloader(self):
        def collate(samples):
            return torch.tensor(2.0), *map(torch.stack, zip(*samples, strict=True))

        return DataLoader(super().val_dataloader().dataset, batch_size=8, collate_fn=collate)


def test_a_number_of_the_whole_batch_is_no_sample():
    report = verify(WithScale(samples=64), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)
    assert "each of 64 validation samples counted once" in report["ddp"].text


class Transfers(Plain):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        x, y = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return x / 3, y


def test_a_module_that_transfers_its_batches_itself_passes():
    """Without the hook in the plain loop, or with it in the replay of the ranks' batches, they are other ones."""
    report = verify(Transfers(samples=64), loader(shuffle=True), checks=["loop", "ddp"], **EXACT)
    assert outcomes(report) == {"loop": "passed", "ddp": "passed"}, str(report)


def test_ranks_that_train_on_the_same_batches_fail():
    """Without the comparison of the ranks' first batches only the validation is blamed: equal gradients agree."""
    settings = {**EXACT, "use_distributed_sampler": False}
    report = verify(Plain(samples=64), loader(shuffle=False), checks=["ddp"], **settings)
    assert outcomes(report) == {"ddp": "failed"}
    assert "both ranks train on the same batches: share the samples out by rank" in report["ddp"].text


class Asks(Plain):
    """Asks in its setup for the length of the training, which a validation has not."""

    val_dataloader = None

    def setup(self, stage):
        if stage == "fit":
            self.total = self.trainer.estimated_stepping_batches


def test_a_module_whose_setup_asks_for_the_training_is_validated():
    """Given ``fit`` in a validation too it finds no training loader."""
    report = verify(Asks(), loader(shuffle=True), loader(shuffle=False), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)


class FitOnly(pl.LightningDataModule):
    """Prepares its validation with its training, as a ``fit`` asks for."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def setup(self, stage):
        if stage == "fit":
            self.train, self.val = loader(shuffle=True), loader(shuffle=False)

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return self.val


class ReadsData(Plain):
    """Asks for its DataModule, and changes the batches as they come."""

    val_dataloader = None

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * 3, batch[1]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.trainer.datamodule.factor


def test_two_ranks_of_a_module_that_needs_its_datamodule_and_changes_its_batches():
    """Set up for validation FitOnly has no ``val``, without the DataModule ``factor`` is asked of None, and with the
    transfer hooks the batches of one process are three times as large again."""
    report = verify(ReadsData(), datamodule=FitOnly(), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)
    assert "each of 48 validation samples counted once" in report["ddp"].text


@pytest.mark.parametrize("settings", [{}, {"max_steps": 18}], ids=["epochs", "steps"])
@pytest.mark.parametrize("kind", ["arrays", "datasets"])
def test_the_shorter_of_two_loaders_is_resumed_in_its_second_round(kind, settings):
    """Begun anew at Lightning's epoch it gives the batches of its first round again; going on at the epoch's end, as
    Lightning lets it under ``max_steps``, those of its second."""

    def made(size, seed):
        x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
        y = (x.sum(1) > 0).long()
        if kind == "arrays":
            return ArrayLoader(x, y, EpochOrder(size, 8, shuffle=True, seed=seed))
        return ResumableDataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, seed=seed)

    report = verify(
        InContainer(), {"a": made(24, 1), "b": made(64, 2)}, checks=["resume"], steps=18, **settings, **EXACT
    )
    assert outcomes(report) == {"resume": "passed"}, str(report)


class Noisy(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((nn.functional.dropout(x, 0.5), y), batch_idx)


def test_random_numbers_within_the_step_say_nothing_of_ranks():
    """Without ``draws`` the loss is blamed."""
    report = verify(Noisy(samples=64), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "not applicable"}, str(report)
    assert "the step draws random numbers, which differ from rank to rank by intent" in report["ddp"].text


class Branching(nn.Module):
    """Has a second output in training, as GoogLeNet."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.linear, self.second = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        y = self.linear(self.dropout(x))
        return (y, self.second(x)) if self.training else y


class TwoOutputs(Plain):
    val_dataloader = None

    def __init__(self):
        super().__init__()
        self.net = Branching()

    def training_step(self, batch, batch_idx):
        (first, second), y = self.net(batch[0]), batch[1]
        return self.criterion(first, y) + self.criterion(second, y)


def test_a_net_that_holds_a_dropout_layer_stays_in_training_on_two_ranks():
    """Held still as its dropout layer is, it has one output, and "the run ended in ValueError"."""
    report = verify(TwoOutputs(), loader(shuffle=True), checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)


@pytest.mark.parametrize("alone", [True, False])
def test_two_ranks_under_slurm(alone):
    """With SLURM's environment among the plugins both are rank 0, or wait for a master."""
    slurm = SLURMEnvironment(auto_requeue=False)
    settings = {**EXACT, "plugins": slurm if alone else [*EXACT["plugins"], slurm]}
    report = verify(Plain(samples=64), loader(shuffle=True), checks=["ddp"], **settings)
    assert outcomes(report) == {"ddp": "passed"}, str(report)


class Unused(Plain):
    def __init__(self):
        super().__init__(samples=64)
        self.unused = nn.Linear(1, 1)


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp_spawn_find_unused_parameters_true",
        DDPStrategy(find_unused_parameters=True),
        DDPStrategy(find_unused_parameters=True, process_group_backend="nccl"),
        DDPStrategy(find_unused_parameters=True, start_method="spawn"),
    ],
)
def test_two_ranks_have_the_settings_of_the_strategy(strategy):
    """As "ddp" they end in "parameters that were not used"; a "ddp_spawn" would start ranks of its own."""
    report = verify(Unused(), loader(shuffle=True), checks=["ddp"], strategy=strategy, **EXACT)
    assert outcomes(report) == {"ddp": "passed"}, str(report)


def test_a_batch_that_two_ranks_cannot_share_says_nothing_of_them():
    data = ResumableDataLoader(loader(shuffle=False).dataset, batch_size=5, shuffle=True)
    report = verify(Plain(samples=64), data, checks=["ddp"], **EXACT)
    assert outcomes(report) == {"ddp": "not applicable"}, str(report)
    assert "batch_size is 5; it must be divisible by the number of processes, 2" in report["ddp"].text


class Augmented(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + np.random.randn(), y


def test_workers_are_seeded_in_the_plain_loop_too(monkeypatch):
    """Without ``seed_workers`` both workers draw the numbers that this process would."""
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    data = DataLoader(Augmented(*loader(shuffle=False).dataset.tensors), batch_size=8, num_workers=2)
    report = verify(Plain(), data, checks=["loop"], steps=4, **EXACT)
    assert outcomes(report) == {"loop": "passed"}, str(report)


def test_overfit_batches_is_left_out():
    """It takes the place of ``limit_train_batches``."""
    report = verify(Plain(), loader(shuffle=False), checks=["loop"], steps=6, overfit_batches=1, **EXACT)
    assert outcomes(report) == {"loop": "passed"}, str(report)


def test_loaders_made_anew_have_no_plain_loop():
    settings = {**EXACT, "reload_dataloaders_every_n_epochs": 1}
    report = verify(Plain(), loader(shuffle=False), checks=["loop"], steps=4, **settings)
    assert outcomes(report) == {"loop": "not applicable"}, str(report)
    assert "reload_dataloaders_every_n_epochs" in report["loop"].text


class DrawsDefault(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x + 0.01 * torch.rand(x.shape), y), batch_idx)


def test_another_default_dtype_holds_in_the_plain_loop_too():
    """In float32 it draws other numbers."""
    torch.set_default_dtype(torch.float64)
    try:
        module, (x, y) = DrawsDefault(), loader(shuffle=False).dataset.tensors
        data = DataLoader(TensorDataset(x.double(), y), batch_size=8)
        report = verify(module, data, checks=["loop"], steps=4, **EXACT)
    finally:
        torch.set_default_dtype(torch.float32)
    assert outcomes(report) == {"loop": "passed"}, str(report)


def test_runs_ask_for_no_gpu_of_their_parent(monkeypatch):
    """The Trainer asks for the random state of every GPU there is, which a forked process cannot have."""

    def refuse(*_):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda.random, "get_rng_state", refuse)
    data = SyntheticCIFAR10(64, 8, batch_size=8)  # with a validation, before whose trial it asks
    report = verify(LitBlitzNet(), datamodule=data, checks=["resume"], steps=4, **EXACT)
    assert outcomes(report) == {"resume": "passed"}, str(report)


def test_images_are_prepared_without_the_trainer_of_an_earlier_fit():
    """Without ``owner.trainer = None`` the plain loop prepares them with it."""
    trainer = pl.Trainer(logger=False, enable_checkpointing=False)

    class Prepared(SyntheticCIFAR10):
        def setup(self, stage):
            assert self.trainer is not trainer
            super().setup(stage)

    data = Prepared(train_images=64, test_images=8)
    data.trainer = trainer
    report = verify(LitBlitzNet(), datamodule=data, checks=["loop"], steps=4, **EXACT)
    assert outcomes(report) == {"loop": "passed"}, str(report)
    assert data.trainer is trainer


def test_images_whose_setup_asks_for_the_trainer():
    """Before the runs there is none: without the look away ``verify`` ends in an AttributeError."""

    class Asks(SyntheticCIFAR10):
        def setup(self, stage):
            super().setup(stage)
            self.first = self.trainer.is_global_zero

    report = verify(LitBlitzNet(), datamodule=Asks(64, 8), checks=["resume"], steps=4, **EXACT)
    assert outcomes(report) == {"resume": "passed"}, str(report)


def test_workers_of_an_earlier_iteration_are_left_to_their_parent():
    """Without ``reset`` the runs end in "can only join a child process", and the workers with them."""
    data = DataLoader(loader(shuffle=False).dataset, batch_size=8, num_workers=2, persistent_workers=True)
    before = [x for x, _ in data]
    for loaders in ({"a": data}, CombinedLoader([data])):
        report = verify(InContainer(), loaders, checks=["loop"], steps=3, **EXACT)
        assert outcomes(report) == {"loop": "passed"}, str(report)
        assert all(torch.equal(x, y) for (x, _), y in zip(data, before, strict=True))


def test_sigterm_leaves_no_folder_and_no_process(tmp_path):
    """Without ``ending_on_sigterm`` the folder stays."""
    words = ["--config", "quickstart", "--data.train_images", "60", "--checks", "resume", "--steps", "300"]
    command = [sys.executable, "-m", "lit_basics", "verify", *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}, **quiet)
    try:
        until(lambda: any(tmp_path.glob("lit_basics_verify_*/reference/*.pt")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    finally:
        process.kill()
    assert not list(tmp_path.glob("lit_basics_verify_*"))
    until(lambda: subprocess.run(["pgrep", "-g", str(process.pid)], stdout=subprocess.DEVNULL).returncode == 1)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


class Torn(DurableCheckpointIO):
    """Writes every third checkpoint in halves."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        torch.save(checkpoint, path)
        if checkpoint["global_step"] % 3 == 0:
            path.write_bytes(path.read_bytes()[:1000])


def test_checkpoints_that_are_torn_fail():
    settings = {**EXACT, "plugins": [Torn()]}
    report = verify(LitBlitzNet(), datamodule=images(), checks=["resume"], steps=6, **settings)
    assert "resumed after batch3, the run ended in UserError" in report["resume"].text
    assert "damaged" in report["resume"].text


class OfSeveralLoaders(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return super().training_step(sum(batch), batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (BoringModel, None),
        (BoringModel, BoringDataModule),
        (BoringModel, BoringDataModuleNoLen),
        (OfSeveralLoaders, IterableBoringDataModule),
        (ManualOptimBoringModel, None),
        (DemoModel, BoringDataModule),
        pytest.param(lambda: LightningLSTM(vocab_size=512), None, id="LightningLSTM"),
        pytest.param(lambda: LightningTransformer(vocab_size=512), None, id="LightningTransformer"),
    ],
)
@pytest.mark.slow
def test_every_demo_module_of_lightning_gets_verdicts(model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()  # where two of them would put the text that they download
    (tmp_path / "data" / "wikitext-2.txt").write_text(" ".join(map(str, torch.randint(0, 500, (3000,)).tolist())))
    report = verify(model(), datamodule=data() if data else None, **EXACT)
    assert len(report.verdicts) == 5
    assert "Traceback" not in str(report)
    for check in ("loop", "resume"):  # on two ranks, Lightning refuses the LSTM's batch sampler
        assert "the run ended in" not in report[check].text
    print(report)


def test_a_demo_module_gets_verdicts():
    report = verify(BoringModel(), datamodule=BoringDataModule(), steps=6, checks=["loop", "resume", "ddp"], **EXACT)
    assert outcomes(report) == {"loop": "passed", "resume": "failed", "ddp": "passed"}, str(report)


def test_a_run_that_fails_is_a_verdict_with_its_line():
    report = verify(Plain(), loader(shuffle=False), checks=["resume"], steps=4, gradient_clip_algorithm="x", **EXACT)
    assert "the run ended in MisconfigurationException" in report["resume"].text


class Killed(Plain):
    def training_step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_is_killed_from_outside_says_nothing():
    """As the kernel does where memory runs out: "the run ended in SIGKILL", or "a plain loop cannot run it"."""
    report = verify(Killed(), loader(shuffle=False), checks=["loop", "resume"], steps=4, **EXACT)
    assert outcomes(report) == {"loop": "not applicable", "resume": "not applicable"}, str(report)
    assert all(verdict.text.startswith("a run was killed from outside (SIGKILL)") for verdict in report.verdicts)


def test_a_process_that_is_killed_amid_a_message_says_nothing(tmp_path):
    """The connection then raises OSError, not EOFError."""
    run = Run(lambda step: torch.zeros(4_000_000), tmp_path / "log")
    assert run.connection.poll(60)  # more than the pipe holds
    os.kill(run.process.pid, signal.SIGKILL)
    assert not run.receive()
    with pytest.raises(NotApplicable, match="killed from outside"):
        run.result()
    run = Run(lambda step: torch.zeros(4_000_000), tmp_path / "log")
    assert run.connection.poll(60)
    run.kill()


class Misread(Plain):
    def training_step(self, batch, batch_idx):
        return json.loads("{")


class Misnamed(Plain):
    def training_step(self, batch, batch_idx):
        return importlib.import_module("not_there")


@pytest.mark.parametrize(("model", "kind"), [(Misread, "JSONDecodeError"), (Misnamed, "ModuleNotFoundError")])
def test_a_run_that_fails_in_the_standard_library_is_named_by_the_users_line(model, kind):
    """Without its folder among the libraries it is "at decoder.py:353", and "at <frozen importlib._bootstrap>"."""
    report = verify(model(), loader(shuffle=False), checks=["resume"], steps=4, **EXACT)
    line = model.training_step.__code__.co_firstlineno + 1
    assert f"the run ended in {kind} at test_verification.py:{line}: " in report["resume"].text


def test_by_command_nothing_is_touched(tmp_path, capsys):
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "mine").write_text("x")
    words = ["--config", "quickstart", "--data.train_images", "60", "--data.batch_size", "8", "--steps", "4"]
    assert main(["verify", *words, "--checks", "loop,kill"]) == 0
    out, err = capsys.readouterr()
    rows = out.splitlines()
    assert [row.split()[:2] for row in rows] == [["loop", "passed"], ["kill", "passed"]]
    assert "verify" in err, "a progress bar"
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        *("runs", "runs/quickstart", "runs/quickstart/mine"),
    ]


def test_by_command_one_callback_needs_no_list(tmp_path, capsys):
    """Without the list around it ``with_guard`` is a TypeError."""
    (tmp_path / "one.yaml").write_text("trainer: {callbacks: {class_path: lightning.pytorch.callbacks.Timer}}")
    words = ["--config", str(tmp_path / "one.yaml"), "--model", "LitBlitzNet", "--data", "SyntheticCIFAR10"]
    sizes = ["--data.train_images", "60", "--data.batch_size", "8"]
    assert main(["verify", *words, *sizes, "--checks", "loop", "--steps", "2"]) == 0
    assert "loop    passed" in capsys.readouterr().out


def test_by_command_a_failure_is_exit_code_1(tmp_path, capsys):
    words = ["--model", "lightning.pytorch.demos.boring_classes.BoringModel"]
    assert main(["verify", *words, "--checks", "resume", "--steps", "4"]) == 1
    assert "resume  failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checks", "loop,resum"], "there is no check 'resum'; did you mean 'resume'?"),
        (["--steps", "many"], "steps is many; it must be a number of optimizer steps"),
        (["--steps", "1"], "steps is 1; it must be at least 2"),
        (["--run_dir", "here"], "verify takes no --run_dir"),
        (["--resume", "here"], "verify takes no --resume"),
        (["--ckpt_path", "last.ckpt"], "verify takes no --ckpt_path"),
    ],
)
def test_wrong_words_are_refused(words, message, capsys):
    assert main(["verify", "--config", "quickstart", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_module_is_not_changed():
    model = LitBlitzNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    verify(model, datamodule=images(), checks=["loop"], steps=2, **EXACT)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="no check"):
        verify(model, checks=["none"])
