"""Seconds an epoch of each image recipe, beside a plain loop over the same tensors.

Usage: python benchmarks/recipes.py [--rounds 5] [--quick]

On synthetic images, and counted up to the 50,000 of CIFAR-10. Both have the same weights, order and number of
images, and must end with the same weights, bit for bit. Of the loop it is the steps that count; of the recipe also
what ``fit`` does at its end.
"""

from typing import NamedTuple

import torch
from common import begin, by_command, end, figure, in_turns, now, onednn, ratios
from torch import Tensor, nn

from lit_basics import BlitzNet, ConvNet3, EpochOrder, LeNet5, SyntheticCIFAR10


class Settings(NamedTuple):
    """What the loop needs to know of a recipe."""

    net: type[nn.Module]
    batch: int
    lr: float
    momentum: float
    mean: float
    std: float
    steps: int
    """Steps that are measured."""
    words: tuple[str, ...] = ()
    """The recipe's overlays."""
    onednn: bool = True
    """As the recipe's ProcessSettings."""
    fused: bool = False
    """As the recipe's optimizer."""


RECIPES = {
    "blitz": Settings(BlitzNet, 4, 0.001, 0.9, 0.5, 0.5, 1500, onednn=False, fused=True),
    "lenet5": Settings(LeNet5, 64, 0.01, 0.9, 0.5, 0.5, 300),
    "convnet3": Settings(ConvNet3, 64, 0.01, 0.0, 0.0, 1.0, 60, ("--config", "long")),
}
EPOCH = 50_000


def by_hand(settings: Settings, steps: int) -> tuple[float, list[Tensor]]:
    """Return the seconds of a step of a plain loop, and the final weights."""
    batch = settings.batch
    x, y, *_ = SyntheticCIFAR10(steps * batch, 10).load()
    torch.manual_seed(0)
    net, criterion = settings.net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=settings.lr, momentum=settings.momentum, fused=settings.fused)
    begun = 0.0
    for step, index in EpochOrder(steps * batch, batch, shuffle=True):
        if step == 20:
            begun = now()
        images = x.index_select(0, index).float().div_(255).sub_(settings.mean).div_(settings.std)
        optimizer.zero_grad()
        criterion(net(images), y[index]).backward()
        optimizer.step()
    return (now() - begun) / (steps - 20), list(net.parameters())


def compare(recipe: str, steps: int, rounds: int) -> None:
    """Print the figures of a recipe."""
    batch, more = RECIPES[recipe].batch, RECIPES[recipe].words
    data = ["--data", "SyntheticCIFAR10", f"--data.train_images={steps * batch}", "--data.test_images=10"]
    weights: dict[str, list[Tensor]] = {}

    def fit() -> float:
        seconds, module = by_command(["--config", recipe, *more, *data, "--trainer.max_epochs=1"])
        weights["recipe"] = list(module.parameters())
        return seconds * EPOCH / batch

    def loop() -> float:
        with onednn(RECIPES[recipe].onednn):
            seconds, weights["loop"] = by_hand(RECIPES[recipe], steps)
        return seconds * EPOCH / batch

    times = in_turns({"recipe": fit, "loop": loop}, rounds)
    for name, values in times.items():
        figure(f"{recipe}, {name}", values, unit=" s an epoch")
    if not all(map(torch.equal, weights["recipe"], weights["loop"])):
        raise SystemExit(f"{recipe}: the final weights differ: nothing to compare")
    figure(f"{recipe}, recipe ÷ loop", ratios(times, "recipe", "loop"))


def main() -> None:
    """Print the figures of all."""
    options = begin(__doc__)
    for recipe, settings in RECIPES.items():
        compare(recipe, 40 if options.quick else settings.steps, options.rounds)
    end()


if __name__ == "__main__":
    main()
