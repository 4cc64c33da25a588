"""Checkpoints: ratio 5. A checkpoint every epoch ÷ none, and for how long a save holds up the training.

Usage: python benchmarks/checkpoints.py [--rounds 5] [--quick]

An epoch is 500 steps of system C, a 25th of the real one: 25 times as many saves.
"""

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import begin, by_command, end, figure, in_turns, ratios
from torch import nn

from lit_basics import BlitzNet, DurableCheckpointIO


def every_epoch(steps: int, rounds: int) -> None:
    """Train by command without checkpoints, and with a whole one at the end of each epoch."""
    data = ["--data", "SyntheticCIFAR10", f"--data.train_images={4 * steps // 5}", "--data.test_images=10"]
    words = ["--config", "blitz", *data, "--trainer.max_epochs=5", "--best_checkpoint=false", "--last_checkpoint=false"]

    def saving(asynchronous: bool) -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"dirpath": folder, "every_n_epochs": 1}  # the newest only
            callbacks = ["GradientMonitor", {"class_path": "ModelCheckpoint", "init_args": arguments}]
            plugin = {"class_path": "DurableCheckpointIO", "init_args": {"asynchronous": asynchronous}}
            more = [f"--trainer.callbacks={json.dumps(callbacks)}", f"--trainer.plugins={json.dumps([plugin])}"]
            return by_command([*words, *more])[0]

    variants = {
        "without": lambda: by_command([*words, '--trainer.callbacks=["GradientMonitor"]'])[0],
        "synchronous": lambda: saving(False),
        "asynchronous": lambda: saving(True),
    }
    times = in_turns(variants, rounds)
    for name in ("synchronous", "asynchronous"):
        figure(f"5. a checkpoint every epoch ÷ none, {name}", ratios(times, name, "without"), 1.01)


def checkpoint_of(net: nn.Module) -> dict[str, Any]:
    """The state of a net and of its SGD with momentum."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}


def stall(net: nn.Module, name: str, rounds: int) -> None:
    """For how long ``save_checkpoint`` keeps its caller, beside a synchronous save."""
    checkpoint = checkpoint_of(net)
    plugins = {"synchronous": DurableCheckpointIO(), "asynchronous": DurableCheckpointIO(asynchronous=True)}
    with tempfile.TemporaryDirectory() as folder:

        def save(kind: str) -> float:
            begun = time.perf_counter()
            plugins[kind].save_checkpoint(checkpoint, Path(folder) / f"{kind}.ckpt")
            seconds = time.perf_counter() - begun
            plugins[kind].flush()
            return seconds

        for kind in plugins:
            save(kind)  # the first makes the file, and starts the thread
        times = in_turns({kind: partial(save, kind) for kind in plugins}, 3 * rounds)
    for kind, values in times.items():
        figure(f"save of {name}, {kind}", [1e3 * value for value in values], unit=" ms")
    figure(f"5. stall of a save, {name}, asynchronous ÷ synchronous", ratios(times, "asynchronous", "synchronous"), 0.1)


def main() -> None:
    """Print the figures."""
    options = begin(__doc__)
    large = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(1 if options.quick else 11)))
    stall(large, f"{sum(p.numel() for p in large.parameters()) / 1e6:.1f} M parameters", options.rounds)
    stall(BlitzNet(), "system C's net", options.rounds)
    every_epoch(40 if options.quick else 2500, options.rounds)
    end()


if __name__ == "__main__":
    main()
