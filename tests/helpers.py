"""What several tests need: a run by the command line, by the Trainer, and the weights after every step."""

import csv
import signal
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from lit_basics.cli import main
from lit_basics.config import Config
from lit_basics.data.synthetic import SyntheticCIFAR10
from lit_basics.verification.forks import run_all
from lit_basics.verification.ranks import environments


class Weights(pl.Callback):
    """Keeps a copy of the net's state before the first step and after every step."""

    def __init__(self):
        self.before, self.after = {}, []

    def on_train_start(self, trainer, pl_module):
        self.before = copied(pl_module.net)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.after):
            self.after.append(copied(pl_module.net))


class Rows(DummyLogger):
    """A logger that keeps the rows that it is given, as (step, metrics)."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def table(self):
        """Return the rows by step, those of a step together."""
        table = {}
        for step, row in self.rows:
            table.setdefault(step, {}).update(row)
        return table


class SaveEverywhere(Checkpoint):
    """Saves after every batch where ``when(trainer)`` holds, under the number of batches so far."""

    def __init__(self, folder, when=lambda trainer: True):
        self.folder, self.when = folder, when

    def on_train_batch_end(self, trainer, *_):
        if self.when(trainer):
            trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.total_batch_idx + 1:03}.ckpt")


def epoch_indices(seed, epoch, size):
    """The documented order of an epoch, written out: a permutation drawn from (seed, epoch) alone."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    indices = torch.randperm(size, generator=torch.Generator().manual_seed(int(state[0]) >> 1))
    assert sorted(indices.tolist()) == list(range(size))
    return indices


def copied(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal(state, other):
    assert state.keys() == other.keys()
    for name in state:
        assert torch.equal(state[name], other[name]), name


def assert_same_steps(weights, others, steps):
    """Assert that two runs of ``steps`` steps had the same weights after each."""
    assert len(weights) == len(others) == steps
    for state, other in zip(weights, others, strict=True):
        assert_equal(state, other)


def quiet_trainer(*callbacks, **settings):
    """Return a Trainer of one epoch on the CPU that shows, logs and saves nothing, but as ``settings`` say."""
    quiet = {
        **{"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        **{"enable_progress_bar": False, "enable_model_summary": False, "callbacks": list(callbacks)},
    }
    return pl.Trainer(**{**quiet, **settings})


def train(*args, callbacks=(), **trainer):
    """Train a configuration by a bare Trainer; return the module, the weights and the Trainer."""
    config = Config([*args])
    config.build()
    weights = Weights()
    chosen = config.trainer_arguments["callbacks"] or []
    arguments = {
        **config.trainer_arguments,
        "callbacks": [*chosen, weights, *callbacks],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **trainer,
    }
    fitted = pl.Trainer(**arguments)
    fitted.fit(config.model, datamodule=config.datamodule)
    return config.model, weights, fitted


def fit(*args, run_dir="run"):
    """Run ``lit_basics fit`` and return its run directory."""
    assert main(["fit", *args, "--run_dir", str(run_dir), "--trainer.enable_progress_bar", "false"]) == 0
    return Path(run_dir)


def metrics(run_dir):
    """Return metrics.csv as {step: {key: value}}, without the empty cells."""
    with (Path(run_dir) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = {int(row["step"]): {k: float(v) for k, v in row.items() if k != "step" and v != ""} for row in rows}
    assert len(table) == len(rows), "a step has two rows"
    return table


def ranks(work, count=2):
    """Return what ``work`` returns in each of ``count`` forked processes, which are as if torchrun had started them.

    One that fails, or takes more than two minutes, ends the others: its error is raised. They write to ``ranks.txt``.
    """

    def ranked(rank, _):
        signal.alarm(120)
        rank_zero_only.rank = rank
        result = work()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # rank 0, which leaves, takes the others' connections away
        return result

    works = [partial(ranked, rank) for rank in range(count)]
    return [run.result() for run in run_all(works, Path("ranks.txt"), lambda: None, environments(count))]


def fit_on_ranks(*args):
    """Run ``lit_basics fit`` on two ranks."""
    assert ranks(lambda: main(["fit", *args])) == [0, 0]


def on_ranks(count=2, *callbacks, **settings):
    """Return a quiet Trainer of this rank."""
    ddp = {"devices": count, "strategy": "ddp" if count > 1 else "auto"}
    return quiet_trainer(*callbacks, **{**ddp, "num_sanity_val_steps": 0, **settings})


def write_npz(path, train=400, test=100):
    """Write synthetic images as an ``.npz`` file and return its path as text."""
    arrays = SyntheticCIFAR10(train, test).load()
    np.savez(
        path,
        x_train=arrays.x_train.permute(0, 2, 3, 1).numpy(),
        y_train=arrays.y_train.numpy(),
        x_test=arrays.x_test.permute(0, 2, 3, 1).numpy(),
        y_test=arrays.y_test.numpy(),
    )
    return str(path)
