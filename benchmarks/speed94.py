"""speed94 on CIFAR-10, beside a plain-torch version of the 8-epoch Muon recipe: seconds and test accuracy.

Usage: python benchmarks/speed94.py --data cifar10.npz [--seeds 5] [--images 50000] [--epochs N] [--plain_seeds 5]

The plain version is the source's recipe of eight epochs, without smaller images and without settings of the allocator,
written from its description and free of lit_basics; each of its runs is a process of its own. Both use bfloat16 where
the processor has it. Every seed is reported. Seconds are those of training; the test set is read once a run, after it,
with test-time augmentation.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import prepared
from torch import Tensor, nn

from lit_basics.running import quiet
from lit_basics.whitened import has_bfloat16

BATCH = 2000
DTYPE = torch.bfloat16 if has_bfloat16(torch.device("cpu")) else torch.float32


class Norm(nn.BatchNorm2d):
    """Batch norm in float32, its scale fixed."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x``, in its dtype."""
        return super().forward(x.float()).to(x.dtype)


class Net(nn.Module):
    """The recipe's net."""

    def __init__(self) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        sizes = [(24, 64), (64, 64), (64, 256), (256, 256), (256, 256), (256, 256)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in sizes)
        self.norms = nn.ModuleList(Norm(o) for _, o in sizes)
        self.head = nn.Linear(256, 10, bias=False)
        with torch.no_grad():
            for conv in self.convs:
                nn.init.dirac_(conv.weight[: conv.in_channels])
            self.head.weight /= self.head.weight.std()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 10)."""
        x = F.gelu(self.whiten(x))
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x)
            x = F.gelu(norm(F.max_pool2d(x, 2) if number % 2 == 0 else x))
        return self.head(F.max_pool2d(x, 3).flatten(1)) / 256


def whiten(net: Net, x: Tensor) -> None:
    """Set the first convolution from images."""
    patches = x.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
    net.whiten.weight.data = torch.cat([filters, -filters]).float()


def muon(p: Tensor, momentum: Tensor, lr: float) -> None:
    """Update a filter bank."""
    momentum.mul_(0.6).add_(p.grad)
    g = (p.grad + 0.6 * momentum).flatten(1)
    g = g / (g.norm() + 1e-7)
    tall = g.shape[0] > g.shape[1]
    g = g.T if tall else g
    for _ in range(3):
        a = g @ g.T
        g = 3.4445 * g + (-4.7750 * a + 2.0315 * a @ a) @ g
    p.mul_(len(p) ** 0.5 / p.norm()).sub_(lr * (g.T if tall else g).view_as(p))


def plain(x: Tensor, y: Tensor, epochs: int, seed: int) -> tuple[Net, float]:
    """Train; return the net and the seconds."""
    torch.manual_seed(seed)
    net, begun = Net(), time.monotonic()
    whiten(net, x[:5000])
    net.to(DTYPE, memory_format=torch.channels_last)
    for norm in net.norms:
        norm.float()
    biases = [norm.bias for norm in net.norms]
    optimizer = torch.optim.SGD(
        [
            {"params": [net.whiten.bias], "lr": 0.053, "weight_decay": 2e-6 * BATCH / 0.053},
            {"params": biases, "lr": 0.053, "weight_decay": 2e-6 * BATCH / 0.053},
            {"params": [net.head.weight], "lr": 0.67, "weight_decay": 2e-6 * BATCH / 0.67},
        ],
        momentum=0.85,
        nesterov=True,
        lr=0.0,
    )
    first = [group["lr"] for group in optimizer.param_groups]
    filters = [(conv.weight, torch.zeros_like(conv.weight)) for conv in net.convs]
    padded = F.pad(torch.where((torch.rand(len(x)) < 0.5)[:, None, None, None], x.flip(3), x), (2,) * 4, "reflect")
    a_epoch = len(x) // BATCH
    total = epochs * a_epoch
    for epoch in range(epochs):
        dy, dx = torch.randint(0, 5, (2, len(x), 1, 1, 1))
        rows = (dy + torch.arange(32).view(1, 1, 32, 1)).expand(-1, 3, 32, 36)
        columns = (dx + torch.arange(32).view(1, 1, 1, 32)).expand(-1, 3, 32, 32)
        images = padded.gather(2, rows).gather(3, columns)
        images = images.flip(3) if epoch % 2 else images
        images = images.to(DTYPE, memory_format=torch.channels_last)
        for number, index in enumerate(torch.randperm(len(x))[: a_epoch * BATCH].split(BATCH)):
            step = epoch * a_epoch + number
            shares = (max(0.0, 1 - step / (3 * a_epoch)), 1 - step / total, 1 - step / total)
            for group, lr, share in zip(optimizer.param_groups, first, shares, strict=True):
                group["lr"] = lr * share
            net.whiten.bias.requires_grad_(epoch < 3)
            F.cross_entropy(net(images[index]), y[index], label_smoothing=0.2, reduction="sum").backward()
            optimizer.step()
            with torch.no_grad():
                for p, momentum in filters:
                    muon(p, momentum, 0.24 * (1 - step / total))
            net.zero_grad()
    return net, time.monotonic() - begun


def images(file: Any, name: str) -> Tensor:
    """Return the images of an archive, normalised."""
    center, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    return ((torch.from_numpy(file[name]) / 255 - center) / std).permute(0, 3, 1, 2)


def plain_run(path: Path, size: int, epochs: int, seed: int) -> tuple[float, float]:
    """Train on the first ``size`` images; return the seconds and the test accuracy."""
    file = np.load(path)
    y, y_test = (torch.from_numpy(file[name]).long().flatten() for name in ("y_train", "y_test"))
    net, seconds = plain(images(file, "x_train")[:size], y[:size], epochs, seed)
    return seconds, accuracy(net, images(file, "x_test"), y_test)


def accuracy(net: Net, x: Tensor, y: Tensor) -> float:
    """Return the accuracy with the six views of each image."""
    net.eval()
    right = 0
    with torch.inference_mode():
        for x_part, y_part in zip(x.split(BATCH), y.split(BATCH), strict=True):
            shifted = F.pad(x_part, (1,) * 4, "reflect")
            logits: Tensor | float = 0.0
            for weight, view in ((0.5, x_part), (0.25, shifted[:, :, :32, :32]), (0.25, shifted[:, :, 2:, 2:])):
                for image in (view, view.flip(3)):
                    logits = logits + weight * net(image.to(DTYPE, memory_format=torch.channels_last)).float()
            right += int((logits.argmax(1) == y_part).sum())  # type: ignore[union-attr]
    return right / len(x)


def by_command(path: Path, held_out: int, epochs: int | None, seed: int) -> tuple[float, float]:
    """Train as ``lit_basics fit --config speed94`` does; return the seconds of training and the test accuracy."""
    words = ["--config", "speed94", "--data", "NpzDataModule", f"--data.path={path}", f"--data.seed={seed}"]
    words += [f"--seed_everything={seed}", f"--data.val_size={held_out}", "--trainer.limit_val_batches=0"]
    words += [f"--trainer.max_epochs={epochs}"] if epochs else []
    with prepared(words) as (config, trainer), contextlib.redirect_stderr(io.StringIO()):
        begun = time.monotonic()
        trainer.fit(config.model, datamodule=config.datamodule)
        seconds = time.monotonic() - begun
        with contextlib.redirect_stdout(io.StringIO()):
            (metrics,) = trainer.test(config.model, datamodule=config.datamodule, verbose=False)
    return seconds, metrics["test/acc"]


def main() -> None:
    """Print a line a run, the means and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as .npz, as NpzDataModule takes it")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, help="of both; the recipe's own and 8 by default")
    parser.add_argument("--plain_seeds", type=int, default=5, help="of the seeds, how many the plain version has too")
    options = parser.parse_args()
    quiet()
    held_out = len(np.load(options.data)["y_train"]) - options.images
    rows = []
    for seed in range(options.seeds):
        row = {"seed": seed}
        row["seconds"], row["accuracy"] = by_command(options.data, held_out, options.epochs, seed)
        print(f"seed {seed}: speed94 {row['seconds']:.1f} s, {row['accuracy']:.2%}", flush=True)
        if seed < options.plain_seeds:
            with multiprocessing.get_context("spawn").Pool(1) as process:  # whose allocator nobody has set
                arguments = (options.data, options.images, options.epochs or 8, seed)
                row["plain_seconds"], row["plain_accuracy"] = process.apply(plain_run, arguments)
            print(f"seed {seed}: plain {row['plain_seconds']:.1f} s, {row['plain_accuracy']:.2%}", flush=True)
        rows.append(row)
    seconds = statistics.median(row["seconds"] for row in rows)
    print(
        f"speed94: {statistics.mean(row['accuracy'] for row in rows):.2%} mean of {len(rows)}, {seconds:.1f} s median"
    )
    if options.plain_seeds:
        ratio = statistics.median(row["seconds"] / row["plain_seconds"] for row in rows[: options.plain_seeds])
        print(f"speed94 ÷ plain: {ratio:.2f}, wanted ≤ 0.35: {'PASS' if ratio <= 0.35 else 'FALLS SHORT'}")
    print(json.dumps({"rows": rows, "dtype": str(DTYPE), "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
