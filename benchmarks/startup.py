"""Start-up: ratio 6. Whole processes, from their start to their end or to the first step.

Usage: python benchmarks/startup.py [--rounds 5] [--quick]
"""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

HERE = Path(__file__).parent
DATA = ["--data", "SyntheticCIFAR10", "--data.train_images=1000", "--data.test_images=10"]
FIT = ["fit", "--config", "blitz", *DATA, "--trainer.callbacks+=startup.FirstStep"]
BASE = """
import time
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch import Trainer
Trainer(max_epochs=4)
print(time.monotonic(), time.process_time())
"""


class FirstStep(pl.Callback):
    """Prints the time, which is the same in all processes, and the processor's, and leaves."""

    def on_train_batch_start(self, *args: Any) -> None:
        """Do so."""
        print(f"\n{time.monotonic()} {time.process_time()}", flush=True)  # after the progress bar
        os._exit(0)


def seconds(*command: str, printed: bool) -> float:
    """Return the seconds from the start of a process to its end, or to the times that it prints at last."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, *command], cwd=HERE, check=True, capture_output=True, text=True)
    if not printed:
        return time.monotonic() - begun
    wall, processor = map(float, done.stdout.split()[-2:])
    return processor if "LIT_BASICS_CPU_TIME" in os.environ else wall - begun  # importing common would import torch


def fit() -> float:
    """Return the seconds from the start of ``lit_basics fit`` to its first step."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds("-m", "lit_basics", *FIT, f"--run_dir={folder}/run", printed=True)


def main() -> None:
    """Print the figures."""
    from common import begin, end, figure, in_turns, ratios

    options = begin(__doc__)
    for word in ("--help", "--version", "recipes"):
        times = in_turns({word: partial(seconds, "-m", "lit_basics", word, printed=False)}, options.rounds)
        figure(f"6. lit_basics {word}", times[word], 0.3, " s")
    times = in_turns({"fit": fit, "base": partial(seconds, "-c", BASE, printed=True)}, options.rounds)
    figure("importing LightningCLI and making a Trainer", times["base"], unit=" s")
    figure("lit_basics fit to its first step", times["fit"], unit=" s")
    figure("6. fit to its first step ÷ importing LightningCLI and making a Trainer", ratios(times, "fit", "base"), 1.15)
    end()


if __name__ == "__main__":
    main()
