"""What the benchmarks share: variants measured in turns, ratios of neighbours, a verdict, and a line of JSON."""

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from lit_basics.config import Config
from lit_basics.hooks import skip_empty_hooks
from lit_basics.running import quiet
from lit_basics.trainers import make_trainer

FIGURES: list[dict[str, Any]] = []
"""What :func:`figure` has printed."""


CPU_TIME = "LIT_BASICS_CPU_TIME"
"""Set in the environment by ``--cpu_time``, so that processes started by a script know it too."""


def now() -> float:
    """Return the seconds on the clock: the wall's, or with ``--cpu_time`` the processor's that this process took.

    The second leaves out what other processes take, and waiting for the disk: for a machine that is busy.
    """
    return time.process_time() if CPU_TIME in os.environ else time.monotonic()


def begin(doc: str | None) -> argparse.Namespace:
    """Read the options of a script; one thread, and no chatter of the libraries."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny counts: whether it runs, not how fast")
    parser.add_argument("--rounds", type=int, default=5, help="how often a variant is measured; short ones more often")
    parser.add_argument("--steps_per_execution", type=int, default=32, help="the K of the variants that have one")
    parser.add_argument("--cpu_time", action="store_true", help="count processor time, on a busy machine")
    options = parser.parse_args()
    if options.cpu_time:
        os.environ[CPU_TIME] = "1"
    options.rounds = 1 if options.quick else options.rounds
    quiet()
    logging.getLogger("lightning.pytorch.callbacks").setLevel(logging.WARNING)  # summaries of Lightning's defaults
    torch.set_num_threads(1)
    return options


def in_turns(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every variant once a round, each round beginning with another."""
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(variants[name]())
    return times


def ratios(times: dict[str, list[float]], name: str, other: str) -> list[float]:
    """Return ``name`` ÷ ``other``, round by round: what disturbs the machine disturbs neighbours alike."""
    return [a / b for a, b in zip(times[name], times[other], strict=True)]


def figure(name: str, values: Sequence[float], wanted: float | None = None, unit: str = "") -> None:
    """Print the median, the spread and the verdict."""
    value = statistics.median(values)
    verdict = None if wanted is None else "PASS" if value <= wanted else "FALLS SHORT"
    line = f"{name}: {value:.4g}{unit} ({min(values):.4g} to {max(values):.4g})"
    print(line if wanted is None else f"{line}, wanted ≤ {wanted:.4g}{unit}: {verdict}", flush=True)
    FIGURES.append({"name": name, "median": value, "all": list(values), "wanted": wanted, "verdict": verdict})


def end() -> None:
    """Print everything as one line of JSON."""
    versions = {name: version(name) for name in ("torch", "lightning", "lit_basics")} | {
        "python": platform.python_version()
    }
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "clock": "processor" if CPU_TIME in os.environ else "wall",
    }
    print(json.dumps({"figures": FIGURES, **versions, **machine}))


@contextlib.contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """Let oneDNN compute convolutions, or not."""
    torch.backends.mkldnn.enabled = enabled
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


class Images(Dataset[tuple[Tensor, int]]):
    """What ``torchvision.datasets.CIFAR10`` does with its arrays, and the tutorial's transform."""

    def __init__(self, data: np.ndarray, targets: list[int]) -> None:
        self.data, self.targets = data, targets
        normalize = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.transform = transforms.Compose([transforms.ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


class Clock(pl.Callback):
    """Begins to count after some steps."""

    def __init__(self, skip: int) -> None:
        self.skip, self.step, self.begun = skip, -1, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin."""
        if self.step < 0 and trainer.global_step >= self.skip:
            self.step, self.begun = trainer.global_step, now()


def seconds_a_step(trainer: pl.Trainer, model: pl.LightningModule, **data: Any) -> float:
    """Fit; return the seconds of a step, all that ``fit`` does at its end included, the first steps left out."""
    clock = Clock(skip=20)
    skip_empty_hooks(clock)  # so that it adds nothing to a step
    trainer.callbacks.insert(0, clock)
    # what goes to a terminal is made, and thrown away
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer.fit(model, **data)
    return (now() - clock.begun) / (trainer.global_step - clock.step)


@contextlib.contextmanager
def prepared(words: list[str]) -> Iterator[tuple[Config, pl.Trainer]]:
    """Make what ``lit_basics fit`` makes before it trains, on the CPU, in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        config = Config([*words, "--trainer.accelerator=cpu"])
        config.build(Path(folder))
        yield config, make_trainer(config, Path(folder))


def by_command(words: list[str], **data: Any) -> tuple[float, pl.LightningModule]:
    """Train as ``lit_basics fit`` does; return the seconds of a step and the trained module."""
    with prepared(words) as (config, trainer):
        data = data or {"datamodule": config.datamodule}
        return seconds_a_step(trainer, config.model, **data), config.model
