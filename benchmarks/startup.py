"""Start-up: ratio 6. Whole processes, from their start to their end or to the first step.

Usage: python benchmarks/startup.py [--rounds 5] [--quick]
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

FIT = ["fit", "--config", "blitz", "--data", "SyntheticCIFAR10", "--data.train_images=1000", "--data.test_images=10"]
CALLBACKS = ["--trainer.callbacks+=startup.FirstStep", "--allow_import=startup"]

BASE = """
import time
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch import Trainer
Trainer(max_epochs=4)
print(time.monotonic())
"""

class FirstStep(pl.Callback):
    """Prints the time, which is the same in all processes, and leaves."""

    def on_train_batch_start(self, *args: Any) -> None:
        print(f"\n{time.monotonic()}", flush=True)  # after the progress bar
        os._exit(0)


def seconds(*command: str) -> float:
    """Return the seconds from the start of a process to the time that it prints at last, or to its end."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True, capture_output=True, text=True)
        ended = time.monotonic()
    last = (done.stdout.split() or [""])[-1]
    return (float(last) if command[0] == "-c" or "fit" in command else ended) - begun


def main() -> None:
    """Print the figures."""
    from common import begin, end, figure, in_turns, ratios

    options = begin(__doc__)
    for word in ("--help", "--version", "recipes"):
        times = in_turns({word: lambda word=word: seconds("-m", "lit_basics", word)}, options.rounds)
        figure(f"6. lit_basics {word}", times[word], 0.3, " s")
    variants = {"fit": lambda: seconds("-m", "lit_basics", *FIT, *CALLBACKS), "base": lambda: seconds("-c", BASE)}
    times = in_turns(variants, options.rounds)
    figure("importing LightningCLI and making a Trainer", times["base"], unit=" s")
    figure("lit_basics fit to its first step", times["fit"], unit=" s")
    figure("6. fit to its first step ÷ importing LightningCLI and making a Trainer", ratios(times, "fit", "base"), 1.15)
    end()


if __name__ == "__main__":
    main()
