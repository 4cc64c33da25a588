"""What the guards cost: the time to train blitz with all of them ÷ with none.

Usage: python benchmarks/guards.py [--images 10000] [--epochs 4] [--pairs 5]

The guards are what every run gets: RandomState, NonFiniteGuard, BestLossCheckpoint, LastCheckpoint, Preemption
and DurableCheckpointIO. Both are trained in one process, in turns, on synthetic images; the time is that of
``Trainer.fit``, saves included. The final weights must be equal bit for bit.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lit_basics import RandomState
from lit_basics.config import Config
from lit_basics.fitting import make_trainer
from lit_basics.running import quiet

WANTED = 1.02
OFF = ["--best_checkpoint=false", "--last_checkpoint=false", "--non_finite_guard=false"]


def train(guarded: bool, images: int, epochs: int) -> tuple[float, list[torch.Tensor]]:
    """Train blitz; return the seconds and the final weights."""
    data = ["--data", "SyntheticCIFAR10", f"--data.train_images={images}", "--data.test_images=10"]
    quiet_words = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    length = [f"--trainer.max_epochs={epochs}", "--trainer.accelerator=cpu"]
    with tempfile.TemporaryDirectory() as folder:
        config = Config(["--config", "blitz", *data, *length, *quiet_words, *([] if guarded else OFF)])
        config.prepare_loggers(Path(folder))
        config.build()
        trainer = make_trainer(config, Path(folder))
        if not guarded:
            trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, RandomState)]
        begun = time.perf_counter()
        trainer.fit(config.model, datamodule=config.datamodule)
        seconds = time.perf_counter() - begun
    return seconds, [value.clone() for value in config.model.state_dict().values()]


def main() -> None:
    """Print a line a pair, the median of the ratios, and everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    train(True, 400, 1)  # warm up
    ratios, equal = [], True
    for pair in range(options.pairs):
        runs = {}
        for guarded in (True, False) if pair % 2 else (False, True):
            runs[guarded] = train(guarded, options.images, options.epochs)
        ratios.append(runs[True][0] / runs[False][0])
        equal &= all(torch.equal(a, b) for a, b in zip(runs[True][1], runs[False][1], strict=True))
        print(f"on {runs[True][0]:.2f} s, off {runs[False][0]:.2f} s, ratio {ratios[-1]:.4f}", flush=True)
    ratio = statistics.median(ratios)
    verdict = "PASS" if ratio <= WANTED and equal else "FALLS SHORT"
    words = "equal" if equal else "DIFFERENT"
    print(f"guards on ÷ off: {ratio:.4f} ({min(ratios):.4f} to {max(ratios):.4f}), weights {words}: {verdict}")
    figures = {"guards": ratio, "ratios": ratios, "wanted": WANTED, "weights_equal": equal, "torch": torch.__version__}
    print(json.dumps({**figures, "images": options.images, "epochs": options.epochs, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
