"""Test accuracy of the CIFAR-10 recipes beside the plain loop, over seeds.

Usage: python benchmarks/accuracy.py cifar10.npz [--recipes blitz lenet5 convnet3] [--seeds 0 1 2]

Each recipe is trained by the command line, as a user would; the loop is written out below, with its own
initial weights and order. Both use the last weights; the test images are read once a run.

With ``--exact`` the loop takes the recipe's initial weights and order instead, and the final weights are
compared bit for bit: where they are equal, a gap between the means above is the luck of the seeds.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile

import numpy as np
import torch
from torch import nn

from lit_basics import EpochOrder

SETTINGS = {  # batch, epochs, lr, momentum, mean, std; and the recipe's overlays
    "blitz": (4, 4, 0.001, 0.9, 0.5, 0.5, []),
    "lenet5": (64, 10, 0.01, 0.9, 0.5, 0.5, []),
    "convnet3": (64, 10, 0.01, 0.0, 0.0, 1.0, ["--config", "long"]),
}


def net(recipe: str) -> nn.Module:
    """Return the recipe's net, written out."""
    if recipe == "convnet3":
        return nn.Sequential(
            *(nn.Conv2d(3, 32, 5, padding=2), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 5, padding=2), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, 10)),
        )
    act, pool = (nn.ReLU, nn.MaxPool2d) if recipe == "blitz" else (nn.Tanh, nn.AvgPool2d)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), act(), pool(2), nn.Conv2d(6, 16, 5), act(), pool(2), nn.Flatten()),
        *(nn.Linear(400, 120), act(), nn.Linear(120, 84), act(), nn.Linear(84, 10)),
    )


def plain_loop(recipe: str, path: str, seed: int, exact: bool) -> tuple[float, list[torch.Tensor]]:
    """Train by a hand-written loop; return the test accuracy and the final weights."""
    batch, epochs, lr, momentum, mean, std, _ = SETTINGS[recipe]
    with np.load(path) as file:
        x, x_test = (torch.from_numpy(file[k]).permute(0, 3, 1, 2).contiguous() for k in ("x_train", "x_test"))
        y, y_test = (torch.from_numpy(file[k].astype(np.int64)) for k in ("y_train", "y_test"))
    torch.manual_seed(seed)
    model = net(recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, fused=recipe == "blitz")
    order = EpochOrder(len(x), batch, shuffle=True, seed=seed)
    torch.backends.mkldnn.enabled = recipe != "blitz"  # as the recipe's
    for _ in range(epochs):
        for index in (i for _, i in order) if exact else torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            images = x[index].float().div_(255).sub_(mean).div_(std)
            nn.functional.cross_entropy(model(images), y[index]).backward()
            optimizer.step()
    correct = 0
    with torch.no_grad():
        for images, labels in zip(x_test.split(1000), y_test.split(1000), strict=True):
            correct += int((model(images.float().div_(255).sub_(mean).div_(std)).argmax(1) == labels).sum())
    return correct / len(y_test), list(model.state_dict().values())


def by_recipe(recipe: str, path: str, seed: int) -> tuple[float, list[torch.Tensor]]:
    """Train and test by the command line; return the test accuracy and the final weights."""
    command = [sys.executable, "-m", "lit_basics"]
    with tempfile.TemporaryDirectory() as folder:
        data = ["--data", "NpzDataModule", "--data.path", path, f"--data.seed={seed}"]
        fit = ["fit", "--config", recipe, *SETTINGS[recipe][6], *data, f"--seed_everything={seed}"]
        quiet = ["--trainer.enable_progress_bar=false", f"--run_dir={folder}/run"]
        subprocess.run([*command, *fit, *quiet], check=True, stdout=subprocess.DEVNULL)
        test = ["test", f"--run_dir={folder}/run", "--ckpt_path=last", "--trainer.enable_progress_bar=false"]
        printed = subprocess.run([*command, *test], check=True, capture_output=True, text=True).stdout
        weights = torch.load(f"{folder}/run/checkpoints/last.ckpt", weights_only=True)["state_dict"].values()
    return float(dict(line.split() for line in printed.splitlines())["test/acc"]), list(weights)


def main() -> None:
    """Print a line a recipe and seed, then the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("npz")
    parser.add_argument("--recipes", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--exact", action="store_true", help="the same start and order; compare the weights")
    options = parser.parse_args()
    for recipe in options.recipes:
        ours, plain = [], []
        for seed in options.seeds:
            accuracy, weights = by_recipe(recipe, options.npz, seed)
            expected, others = plain_loop(recipe, options.npz, seed, options.exact)
            ours.append(accuracy)
            plain.append(expected)
            line = f"{recipe} seed {seed}: recipe {accuracy:.4f}, plain loop {expected:.4f}"
            if options.exact:
                equal = all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
                line += f", final weights {'equal' if equal else 'DIFFERENT'}"
            print(line, flush=True)
        gap = statistics.mean(ours) - statistics.mean(plain)
        print(f"{recipe} mean: recipe {statistics.mean(ours):.4f}, plain {statistics.mean(plain):.4f}, gap {gap:+.4f}")


if __name__ == "__main__":
    main()
