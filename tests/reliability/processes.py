"""Training runs in processes of their own, forked from one that has torch and Lightning loaded.

A run by the command line spends six seconds on imports; a forked one begins to train in one. It saves after
every batch, draws from torch's generator in every step, and writes down the samples of each. As a program
(``python -m reliability.processes fit ...``) this is the command line with the same changes.
"""

import hashlib
import multiprocessing
import os
import sys
import time
import zlib
from pathlib import Path

import lightning.pytorch as pl
import torch

from lit_basics import fitting, trainers
from lit_basics.callbacks import best_loss, last
from lit_basics.cli import main

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["reliability.processes", "lit_basics.running"])

STEPS = 170
WORDS = (
    *("--config", "quickstart", "--data.train_images", "600", "--data.batch_size", "16", "--data.val_size", "56"),
    *("--trainer.max_epochs", "5", "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
)
"""A run of five epochs of 34 steps."""


class Witness(pl.Callback):
    """Records the samples that this rank sees, and disturbs them at random, so that the random state counts."""

    def __init__(self, directory):
        self.directory = directory

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        images = " ".join(str(zlib.crc32(image.numpy().tobytes())) for image in batch[0])
        with (self.directory / f"seen{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{trainer.global_step} {trainer.current_epoch} {images}\n")
        batch[0].add_(torch.randn_like(batch[0]), alpha=0.01)
        if os.environ.get("SLEEP_AT_STEP") == str(trainer.global_step):
            time.sleep(60)

    def on_exception(self, trainer, pl_module, exception):
        if trainer.is_global_zero:
            time.sleep(float(os.environ.get("RANK_0_LEAVES_IN", 0)))


def watched_main(words):
    """Run the command line, saving at every chance, with a witness."""
    for module in (trainers, best_loss, last):
        assert module.MIN_SECONDS > 0  # it is there: else every run would keep its saves in memory
        module.MIN_SECONDS = 0.0
    last.MAX_SECONDS = 0.0
    make_trainer = fitting.make_trainer

    def with_witness(config, directory):
        trainer = make_trainer(config, directory)
        trainer.callbacks.insert(0, Witness(directory))
        return trainer

    fitting.make_trainer = with_witness
    return main(words)


def _forked(words, output):
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    code = watched_main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start_fit(run, *more, output=None):
    """Start ``lit_basics fit`` in a forked process; its output is appended to a file, by default ``<run>.txt``."""
    words = ("fit", *WORDS, "--run_dir", str(run), *more)
    process = FORKS.Process(target=_forked, args=(words, str(output or f"{run}.txt")))
    process.start()
    return process


def finish(process, run, seconds=300):
    """Wait for the end of a run that must succeed."""
    process.join(seconds)
    assert process.exitcode == 0, Path(f"{run}.txt").read_text()


def until(condition, process, seconds=300):
    """Wait until a condition holds; return False if the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not process.is_alive():
            return False
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return True


def lines(run, rank=0):
    """Return the samples of each step as ``{step: line}``; what was done again comes last and counts."""
    path = run / f"seen{rank}.txt"
    text = path.read_text() if path.exists() else ""
    whole = [line.split(" ", 1) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {int(step): rest for step, rest in whole}


def step_of(run):
    """Return the step of the newest state of a run."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def results(run):
    """Return the checksum of everything that two equal runs have in common."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    digest = hashlib.sha256()
    for name, value in sorted(checkpoint["state_dict"].items()):
        digest.update(name.encode() + value.numpy().tobytes())
    momentum = hashlib.sha256()
    for state in checkpoint["optimizer_states"][0]["state"].values():
        momentum.update(state["momentum_buffer"].numpy().tobytes())
    random_state = b"".join(state["torch"].numpy().tobytes() for state in checkpoint["random_state"])
    return {
        "weights": digest.hexdigest(),
        "momentum": momentum.hexdigest(),
        "random state": hashlib.sha256(random_state).hexdigest(),
        "step": checkpoint["global_step"],
        "rows": (run / "metrics.csv").read_bytes(),
        "best": {k: v.tolist() for k, v in torch.load(run / "best.pth", weights_only=True).items()},
        "samples": [lines(run, rank) for rank in range(len(checkpoint["random_state"]))],
    }


def assert_each_sample_once(samples, epochs, size):
    """Assert that the ranks together saw each of ``size`` samples exactly once in each epoch."""
    seen = {}
    for line in (line for rank in samples for line in rank.values()):
        epoch, *images = line.split()
        seen.setdefault(epoch, []).extend(images)
    assert len(seen) == epochs
    for images in seen.values():
        assert len(images) == len(set(images)) == size
        assert set(images) == set(seen["0"])


if __name__ == "__main__":
    code = watched_main(sys.argv[1:])
    assert not torch.distributed.is_initialized()  # gloo's threads may abort Python's exit: code -6 for 0 or 143
    print(f"rank {os.environ.get('LOCAL_RANK', 0)} leaves with {code}", flush=True)
    sys.exit(code)
