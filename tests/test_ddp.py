"""Two and three processes on the CPU, with gloo: gradients, validation, loggers, launchers."""

import os
import random
import runpy
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from helpers import fit_on_ranks, metrics, on_ranks, ranks, write_npz
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, IterableDataset

from lit_basics import (
    ArrayLoader,
    BestLossCheckpoint,
    EpochOrder,
    LastCheckpoint,
    LinearDataModule,
    LitClassifier,
    LitLeNet5,
    LitLinearRegression,
    RandomState,
    ResumableDataLoader,
    SyntheticCIFAR10,
    UserError,
)
from lit_basics.callbacks import last
from lit_basics.cli import main

FIT = [sys.executable, "-m", "lit_basics", "fit"]


def words(path, run_dir, *more):
    return [
        *("--config", "lenet5", "--data", "NpzDataModule", "--data.path", path, "--data.batch_size", "12"),
        *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"),
        *("--trainer.enable_progress_bar", "false", "--run_dir", str(run_dir), *more),
    ]


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done


def final_weights(run_dir):
    checkpoint = torch.load(Path(run_dir) / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"]


MODES = {
    "automatic": [],
    "manual": ["--model.automatic_optimization", "false"],
    "three steps": ["--model.steps_per_execution", "3"],
}


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_give_one_ranks_gradients(mode, tmp_path):
    path = write_npz(tmp_path / "images.npz", train=120)
    more = ["--data.val_size", "12", "--data.flip", "true", "--data.crop", "2"]
    more += ["--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.2"]
    more += MODES[mode]
    assert main(["fit", *words(path, tmp_path / "one", *more)]) == 0
    fit_on_ranks(*words(path, tmp_path / "two", *more, "--config", "ddp"))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert list(one) == list(two)
    for step in one:
        assert one[step].keys() == two[step].keys()
        for key in one[step]:
            # float32 sums in another order
            assert two[step][key] == pytest.approx(one[step][key], abs=1e-6, rel=1e-5), (step, key)
    for name, value in final_weights(tmp_path / "one").items():
        assert torch.allclose(final_weights(tmp_path / "two")[name], value, rtol=0, atol=1e-6), name


def test_a_resume_amid_an_accumulated_step_has_every_ranks_losses(tmp_path):
    """The file is rank 0's: its own losses so far would count for both."""
    path, folder = write_npz(tmp_path / "images.npz", train=132), tmp_path / "two"
    more = ["--config", "ddp", "--data.val_size", "12", "--trainer.max_epochs", "1"]
    more += ["--trainer.accumulate_grad_batches", "4", "--trainer.val_check_interval", "6"]
    more += ["--trainer.callbacks+", "ModelCheckpoint", "--trainer.callbacks.monitor", "val/loss"]
    more += ["--trainer.callbacks.save_top_k", "-1", "--trainer.callbacks.dirpath", str(folder / "checkpoints")]
    fit_on_ranks(*words(path, folder, *more))
    whole = metrics(folder)
    first, *_ = (folder / "checkpoints").glob("epoch*step=1.ckpt")
    saved = (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    fit_on_ranks("--resume", str(first))
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns > saved  # it did train
    assert {step: row["train/loss"] for step, row in metrics(folder).items()} == {
        step: row["train/loss"] for step, row in whole.items()
    }


def test_torchrun_gives_the_same_weights_as_the_launcher(tmp_path):
    path = write_npz(tmp_path / "images.npz", train=60)
    assert run([*FIT, *words(path, tmp_path / "launcher"), "--config", "ddp"]).stdout.count("run directory: ") == 1
    names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    names = sorted(name for name in names if not name.endswith((".sha256", ".previous")))
    files = ["best.pth", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "metrics.csv"]
    assert names == ["images.npz", *(f"launcher/{name}" for name in files)]  # rank 0's
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*torchrun, "-m", "lit_basics", "fit", *words(path, tmp_path / "torchrun"), "--resume", "auto"])
    for said in ("run directory: ", "there is no run to resume"):
        assert done.stdout.count(said) == 1
    for name, value in final_weights(tmp_path / "launcher").items():
        assert torch.equal(final_weights(tmp_path / "torchrun")[name], value), name
    assert metrics(tmp_path / "launcher") == metrics(tmp_path / "torchrun")
    checkpoint = torch.load(tmp_path / "torchrun" / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(checkpoint["random_state"]) == 2, "one of each process"
    trainer = yaml.safe_load((tmp_path / "torchrun" / "config.yaml").read_text())["trainer"]
    assert (trainer["devices"], trainer["num_nodes"]) == ("auto", 1), "a test elsewhere waits for no other process"


SPAWN = """
import sys, lightning.pytorch as pl, torch
from lit_basics import BestLossCheckpoint, DurableCheckpointIO, GradientMonitor, LitLeNet5, NonFiniteGuard
from lit_basics import RandomState, SyntheticCIFAR10

if __name__ == "__main__":
    strategy, weights = sys.argv[1:]
    pl.seed_everything(0)
    model, data = LitLeNet5(), SyntheticCIFAR10(train_images=60, test_images=10, batch_size=10)
    callbacks = [GradientMonitor(), NonFiniteGuard(), BestLossCheckpoint(strategy), RandomState()]
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, logger=False,
                         enable_progress_bar=False, callbacks=callbacks, plugins=[DurableCheckpointIO()])
    trainer.fit(model, data)
    trainer.save_checkpoint(weights + ".ckpt")  # where the processes were spawned they have gone
    if trainer.is_global_zero:
        torch.save(model.state_dict(), weights)
"""


def test_spawned_processes_give_the_same_weights_as_others(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SPAWN)
    weights = {}
    # spawned ones get the module, and give its weights back, by pickle
    run([sys.executable, "script.py", "ddp_spawn", "ddp_spawn.pt"])
    monkeypatch.setattr(sys, "argv", ["script.py", "ddp", "ddp.pt"])
    ranks(lambda: runpy.run_path("script.py", run_name="__main__") and None)
    for strategy in ("ddp", "ddp_spawn"):
        weights[strategy] = torch.load(f"{strategy}.pt", weights_only=True)
        assert Path(strategy, "best.ckpt").is_file()
    assert weights["ddp"].keys() == weights["ddp_spawn"].keys()
    for name, value in weights["ddp"].items():
        assert torch.equal(weights["ddp_spawn"][name], value), name


class Counted(LitLeNet5):
    def validation_step(self, batch, batch_idx):
        self.seen = getattr(self, "seen", 0) + len(batch[1])
        super().validation_step(batch, batch_idx)


def validate(count, size):
    torch.manual_seed(0)
    model, trainer = Counted(), on_ranks(count)
    trainer.validate(model, SyntheticCIFAR10(100, 10, batch_size=12, val_size=size), verbose=False)
    seen = trainer.strategy.reduce(torch.tensor(model.seen), reduce_op="sum")
    return int(seen), {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("count", [2, 3])
def test_validation_counts_every_image_once_at_any_world_size(count):
    sizes = (64, 65, 67)
    results = ranks(lambda: [validate(count, size) for size in sizes], count)
    for size, *of_ranks in zip(sizes, *results, strict=True):
        expected = pytest.approx(validate(1, size)[1], abs=1e-6)
        assert of_ranks == [(size, expected)] * count


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    path = write_npz(tmp_path / "images.npz", train=60)
    done = subprocess.run(
        [*FIT, *words(path, tmp_path / "run", "--data.batch_size", "13"), "--config", "ddp"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "batch_size is 13; it must be divisible by the number of processes, 2" in done.stderr


class Shares(IterableDataset):
    def __iter__(self):
        if os.environ["LOCAL_RANK"] == "0":
            yield from ((torch.full((4,), float(n)), n % 2) for n in range(6))


def test_a_rank_without_a_validation_batch_holds_nobody_up():
    """Where each rank asks for itself whether a metric was updated, one gathers and the other has gone on."""
    net = torch.nn.Linear(4, 2)

    def validated():
        trainer = on_ranks()
        trainer.validate(LitClassifier(net, num_classes=2), DataLoader(Shares(), batch_size=3), verbose=False)
        return float(trainer.callback_metrics["val/acc"])

    right = [int(net(torch.full((4,), float(n))).argmax()) == n % 2 for n in range(6)]
    assert ranks(validated) == [pytest.approx(sum(right) / 6)] * 2


class Draws(LitClassifier):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
        self.drawn = []

    def training_step(self, batch, batch_idx):
        dropped = nn.functional.dropout(torch.ones(16)).tolist()
        self.drawn.append([random.random(), np.random.random(), dropped])
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.trainer.save_checkpoint(f"{self.trainer.world_size}.ckpt")


def test_each_rank_draws_its_own():
    """Without ``seed_by_rank`` all have the same dropout; what is drawn by Python and NumPy may be to agree on."""

    def drawn(count, checkpoint=None):
        pl.seed_everything(0 if checkpoint is None else 9, verbose=False)
        model, data = Draws(), SyntheticCIFAR10(60, 10, batch_size=12, val_size=0)
        on_ranks(count, RandomState(), strategy="ddp").fit(model, data, ckpt_path=checkpoint)
        return model.drawn

    (one,), two = ranks(lambda: drawn(1), 1), ranks(lambda: drawn(2))
    assert two[0] == one
    for (*common, dropped), (*others, of_other) in zip(*two, strict=True):
        assert common == others
        assert dropped != of_other
    assert ranks(lambda: drawn(2, "2.ckpt")) == [draws[2:] for draws in two]


@pytest.mark.parametrize("missing", ["rank", "both"])
def test_loaders_that_are_not_shared_out_are_refused(missing):
    """Without ``check_shared_out`` each rank trains on all samples, or both on those of rank 0."""
    data = SyntheticCIFAR10(60, 10, batch_size=10, val_size=10)
    data.setup("fit")
    loader, size = data.train_dataloader(), 1
    if missing == "rank":
        loader, size = ArrayLoader(loader.inputs, loader.targets, EpochOrder(60, 10, shuffle=True, world_size=2)), 2

    def refused():
        rank = os.environ["RANK"]
        said = f"the loader's EpochOrder is of rank 0 and world_size {size} on rank {rank} of 2"
        with pytest.raises(UserError, match=said):
            on_ranks().fit(LitLeNet5(), loader)

    ranks(refused)


class Parallel(LitClassifier):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.Linear(8, 10)))
        self.labels = []

    def configure_model(self):
        halves = {"1": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], halves)

    def training_step(self, batch, batch_idx):
        self.labels += batch[1].tolist()
        return super().training_step(batch, batch_idx)


def test_a_tensor_parallel_group_takes_the_same_samples():
    """By its global rank each process would compute its part of the layers for samples of its own."""
    data = SyntheticCIFAR10(20, 10, batch_size=10, val_size=0)
    data.setup("fit")
    dataset = list(zip(data._arrays.x_train.float(), data._arrays.y_train, strict=True))
    loader = ResumableDataLoader(dataset, 10, shuffle=True)

    def labels():
        model = Parallel()
        on_ranks(2, RandomState(), strategy=ModelParallelStrategy(1, 2)).fit(model, data)
        said = f"of rank {os.environ['RANK']} and world_size 2 on rank 0 of 1 that share out the data: take a torch.uti"
        with pytest.raises(UserError, match=said):
            on_ranks(2, RandomState(), strategy=ModelParallelStrategy(1, 2)).fit(Parallel(), loader)
        return model.labels

    one, other = ranks(labels)
    assert one == other
    assert len(one) == 20


TELLS = """
import lightning.pytorch as pl

class Tells(pl.Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.is_global_zero:
            print("saved after batch", trainer.fit_loop.batch_idx + 1)
"""


@pytest.mark.parametrize(
    ("more", "allowed"),
    [
        # asked after the first batch and each 50 later, the ranks are never at a step's end
        (["--trainer.accumulate_grad_batches", "2", "--data.val_size", "0"], lambda batch: batch % 2 == 0),
        # asked after some batch alone, it may always be one that a validation follows
        (["--trainer.val_check_interval", "50", "--data.val_size", "16"], lambda batch: batch % 50),
    ],
)
def test_a_long_epoch_is_saved_within(more, allowed, tmp_path, mine, monkeypatch):
    monkeypatch.setattr(last, "MAX_SECONDS", 0)
    path = write_npz(tmp_path / "images.npz", train=1300)
    more = [*more, "--trainer.max_epochs", "1", "--config", "ddp", f"--trainer.callbacks+={mine(TELLS)}.Tells"]
    fit_on_ranks(*words(path, tmp_path / "run"), *more)
    said = Path("ranks.txt").read_text().splitlines()
    saved = [int(line.split()[-1]) for line in said if line.startswith("saved after batch")]
    assert any(2 < batch < 107 and allowed(batch) for batch in saved)  # not at the epoch's end


class Undefined(LitLeNet5):
    def validation_step(self, batch, batch_idx):
        self.log("mine", torch.tensor(float("nan" if self.global_rank else 1.0)))


def test_a_monitor_that_is_undefined_on_one_rank_is_no_best(tmp_path):
    """Asked on each rank alone, one waits for the other until the process group gives up."""
    data = SyntheticCIFAR10(train_images=60, test_images=10, batch_size=10, val_size=20)
    best = BestLossCheckpoint(str(tmp_path), monitor="mine")

    def score():
        on_ranks(2, best, max_epochs=2, enable_checkpointing=True).fit(Undefined(), data)
        return best.best_model_score

    assert ranks(score) == [None, None]


LOGS_ITSELF = """
import torch
import lightning.pytorch as pl

class LogsItself(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)
"""
WITHOUT_VALIDATION = {
    "speed94": [
        *("--config", "speed94", "--model.widths", "[8,16,16]"),
        *("--model.hardest", "[1, 1, 1, 0.5]", "--data.with_indices", "true"),
    ],
    "speed96": [
        *("--config", "speed96", "--model.widths", "[8,16,16]", "--model.proxy_widths", "[4,8,8]"),
        *("--trainer.strategy", "ddp_find_unused_parameters_true"),
    ],
    "own module": ["--model", "logs_itself.LogsItself"],
}


@pytest.mark.parametrize("kind", WITHOUT_VALIDATION)
def test_ranks_do_not_wait_for_rank_0s_progress_bar(kind, tmp_path, mine):
    # without a validation, the bar is the first to read the epoch's means
    mine(LOGS_ITSELF, "logs_itself")
    data = ["--data", "SyntheticCIFAR10", "--data.train_images", "80", "--data.test_images", "20"]
    data += ["--data.val_size", "0", "--data.batch_size", "40"]
    settings = ["--trainer.max_epochs", "5", "--run_dir", str(tmp_path / "run")]
    fit_on_ranks("--config", "ddp", *WITHOUT_VALIDATION[kind], *data, *settings)
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 10
    if kind == "speed94":  # the losses of all ranks, without which those of the other half are missing
        assert (state["state_dict"]["losses"] < 100).sum() == 80


class Slow(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(0.02)


class Counts(LastCheckpoint):
    saves = 0

    def save(self, trainer):
        super().save(trainer)
        self.saves += 1


def test_ranks_of_slow_steps_ask_each_other_after_each_whether_to_save(tmp_path, monkeypatch):
    """Asked after 50 steps, they lose up to 50 of half a minute each."""
    monkeypatch.setattr(last, "MAX_SECONDS", 0.0)
    monkeypatch.setattr(last, "ASK_SECONDS", 0.01)
    counts = Counts(str(tmp_path))

    def saves():
        trainer = on_ranks(2, Slow(), counts, enable_checkpointing=True)
        trainer.fit(LitLinearRegression(), LinearDataModule(batch_size=2))
        return counts.saves, trainer.num_training_batches

    (one, batches), other = ranks(saves)
    assert one == batches
    assert other == (one, batches)
    assert 1 < batches < 50
