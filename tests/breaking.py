"""Callbacks that break, while a run goes on, what its loggers need."""

import os
import subprocess

import lightning.pytorch as pl


def children(name):
    """Return the ids of this process's children of that name."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), name], capture_output=True, text=True, timeout=10)
    return [int(word) for word in found.stdout.split()]


def fill(folder):
    """Fill a file system to its last byte."""
    with open(f"{folder}/fill", "ab", buffering=0) as file:
        try:
            while file.write(bytes(512)):
                pass
        except OSError:
            pass


class KillWandb(pl.Callback):
    """Kills W&B's service after the second step."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            (service,) = children("wandb-core")
            os.kill(service, 9)


class FillDisk(pl.Callback):
    """Fills a file system after the second step."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            fill(self.folder)
