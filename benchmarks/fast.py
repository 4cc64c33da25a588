"""Time to 55 % on CIFAR-10 with the net of blitz: the overlay `fast` ÷ the tutorial's own loop.

Usage: python benchmarks/fast.py --data cifar10.npz [--rounds 3]

5000 training images are held out and tell the accuracy: the tutorial's loop, on PIL images, is asked every 2000
batches and stops at 55 %; the overlay is trained to its end. Being asked is not counted. Both take the threads that
torch takes.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from common import Images, prepared
from torch import nn
from torch.utils.data import DataLoader

from lit_basics import BlitzNet
from lit_basics.running import quiet

HELD_OUT, WANTED = 5000, 0.55


def tutorial(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float]:
    """Train until 55 % or for eight epochs; return the seconds and the accuracy."""
    torch.manual_seed(seed)
    loader = DataLoader(Images(x[HELD_OUT:], y[HELD_OUT:].tolist()), batch_size=4, shuffle=True)
    x_held = torch.from_numpy(x[:HELD_OUT]).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
    y_held = torch.from_numpy(y[:HELD_OUT])
    net, criterion = BlitzNet(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    seconds, begun, step, running, accuracy = 0.0, time.monotonic(), 0, 0.0, 0.0
    for _ in range(8):
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = criterion(net(inputs), labels)
            loss.backward()
            optimizer.step()
            running += loss.item()
            step += 1
            if step % 2000 == 0:
                seconds += time.monotonic() - begun
                with torch.no_grad():
                    accuracy = float((net(x_held).argmax(1) == y_held).float().mean())
                if accuracy >= WANTED:
                    return seconds, accuracy
                begun = time.monotonic()
    return seconds, accuracy


def fast(path: Path, seed: int) -> tuple[float, float]:
    """Train as ``lit_basics fit --config blitz --config fast`` does; return the seconds and the accuracy."""
    words = ["--config", "blitz", "--config", "fast", "--data", "NpzDataModule", f"--data.path={path}"]
    words += [f"--data.val_size={HELD_OUT}", f"--seed_everything={seed}", f"--data.seed={seed}"]
    words += ["--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    with prepared(words) as (config, trainer):
        config.datamodule.setup("fit")  # the tutorial's loop has its images in memory too
        begun = time.monotonic()
        trainer.fit(config.model, datamodule=config.datamodule)
        seconds = time.monotonic() - begun
        trainer.limit_val_batches = 1.0
        (metrics,) = trainer.validate(config.model, datamodule=config.datamodule, verbose=False)
    return seconds, metrics["val/acc"]


def main() -> None:
    """Print a line a round, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as .npz, as NpzDataModule takes it")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    quiet()
    with np.load(options.data) as file:
        x, y = file["x_train"], file["y_train"].astype(np.int64).reshape(-1)
    ratios, reached = [], True
    for seed in range(options.rounds):
        ours, accuracy = fast(options.data, seed)
        theirs, other = tutorial(x, y, seed)
        ratios.append(ours / theirs)
        reached &= accuracy >= WANTED
        print(f"seed {seed}: fast {ours:.1f} s, {accuracy:.2%}; tutorial {theirs:.1f} s, {other:.2%}", flush=True)
    ratio = statistics.median(ratios)
    verdict = "PASS" if reached and ratio <= 0.1 else "FALLS SHORT"
    print(f"fast ÷ tutorial to {WANTED:.0%}: {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}): {verdict}")


if __name__ == "__main__":
    main()
