"""The step: ratios 1 to 3. System C and a null model, by command, by hand, and by Lightning with its defaults.

Usage: python benchmarks/step.py [--rounds 5] [--steps_per_execution 32] [--quick]

Every variant sees the same images in the same order from the same weights. The seconds of a step are those from
step 20 to the end of ``fit``, checkpoints, rows and closing included.
"""

import json
import tempfile
from collections.abc import Iterable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from common import Images, begin, by_command, end, figure, in_turns, now, onednn, ratios, seconds_a_step
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_basics import ArrayLoader, BlitzNet, EpochOrder, Line, SyntheticCIFAR10

BATCH = 4


class Plain(pl.LightningModule):
    """What anybody writes: one loss, logged to the progress bar."""

    def __init__(self, net: nn.Module, criterion: nn.Module, momentum: float) -> None:
        super().__init__()
        self.net, self.criterion, self.momentum = net, criterion, momentum

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        x, y = batch
        loss: Tensor = self.criterion(self.net(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.001, momentum=self.momentum)


def by_hand(
    net: nn.Module,
    criterion: nn.Module,
    momentum: float,
    loader: Iterable[Any],
    *,
    item: bool,
    fused: bool | None = None,
) -> float:
    """The tutorial's loop; ``item``: whether it adds up the loss, as the tutorial does. Return seconds a step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=momentum, fused=fused)
    running, begun = 0.0, 0.0
    for step, (x, y) in enumerate(loader):
        if step == 20:
            begun = now()
        optimizer.zero_grad()
        loss = criterion(net(x), y)
        loss.backward()
        optimizer.step()
        if item:
            running += loss.item()
            if step % 2000 == 1999:
                print(f"[1, {step + 1:5d}] loss: {running / 2000:.3f}")
                running = 0.0
    return (now() - begun) / (step + 1 - 20)


def by_lightning(model: pl.LightningModule, loader: Iterable[Any]) -> float:
    """A Trainer with its defaults: a logger, a progress bar, a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds_a_step(
            pl.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder), model, train_dataloaders=loader
        )


def system_c(steps: int, rounds: int, cpu_time: bool) -> None:
    """Ratio 1, and the loops beside it."""
    images = steps * BATCH
    data = SyntheticCIFAR10(images, 10, batch_size=BATCH, val_size=0, mean=[0.5], std=[0.5])
    data.setup("fit")
    x, y = data.train_dataloader().inputs, data.train_dataloader().targets
    pictures = Images(x.permute(0, 2, 3, 1).contiguous().numpy(), y.tolist())
    order = torch.cat([index for _, index in EpochOrder(images, BATCH, shuffle=True)]).tolist()
    weights: dict[str, list[Tensor]] = {}
    words = [
        "--config",
        "blitz",
        "--data",
        "SyntheticCIFAR10",
        f"--data.train_images={images}",
        "--data.test_images=10",
    ]

    def net() -> BlitzNet:
        torch.manual_seed(0)
        return BlitzNet()

    def tutorial(name: str, workers: int) -> float:
        model = net()
        loader = DataLoader(pictures, batch_size=BATCH, sampler=order, num_workers=workers)
        seconds = by_hand(model, nn.CrossEntropyLoss(), 0.9, loader, item=True)
        weights[name] = list(model.parameters())
        return seconds

    def tensors(name: str, *, as_recipe: bool) -> float:
        model, loader = net(), data.train_dataloader()
        with onednn(not as_recipe):
            seconds = by_hand(model, nn.CrossEntropyLoss(), 0.9, loader, item=False, fused=as_recipe or None)
        weights[name] = list(model.parameters())
        return seconds

    def lightning() -> float:
        loader = DataLoader(pictures, batch_size=BATCH, sampler=order)
        return by_lightning(Plain(net(), nn.CrossEntropyLoss(), 0.9), loader)

    def ours(name: str, *more: str) -> float:
        seconds, model = by_command([*words, "--trainer.max_epochs=1", *more])
        weights[name] = list(model.parameters())
        return seconds

    variants = {
        "tutorial": partial(tutorial, "tutorial", 0),
        "tensor loop": partial(tensors, "tensor loop", as_recipe=False),
        "tensor loop, as the recipe": partial(tensors, "tensor loop, as the recipe", as_recipe=True),
        "Lightning": lightning,
        "K=1": partial(ours, "K=1", "--model.steps_per_execution=1"),
        "recipe": partial(ours, "recipe"),
    }
    if not cpu_time:  # which leaves out that of the workers
        variants["tutorial, 2 workers"] = partial(tutorial, "tutorial, 2 workers", 2)
    times = in_turns(variants, rounds)
    for name, values in times.items():
        figure(f"system C, {name}", [1e6 * value for value in values], unit=" µs a step")
    figure("1. system C, plain Lightning ÷ tutorial", ratios(times, "Lightning", "tutorial"))
    figure("1. system C, tensor loop ÷ tutorial", ratios(times, "tensor loop", "tutorial"))
    like_recipe = ratios(times, "tensor loop, as the recipe", "tutorial")
    figure("1. system C, tensor loop with the recipe's switches ÷ tutorial", like_recipe)
    figure("1. system C, everything on, K=1 ÷ tutorial", ratios(times, "K=1", "tutorial"), 1.0)
    figure("1. system C, everything on, as the recipe is ÷ tutorial", ratios(times, "recipe", "tutorial"), 0.7)
    for one, other in (("tensor loop", "tutorial"), *((n, "tensor loop, as the recipe") for n in ("K=1", "recipe"))):
        if not all(map(torch.equal, weights[one], weights[other])):
            raise SystemExit(f"the final weights of {one} and {other} differ: nothing to compare")
        print(f"final weights of {one} and {other}: equal")


def null_model(steps: int, rounds: int, k: int) -> None:
    """Ratio 2: what a step costs beside the net's own work."""
    x, y = torch.randn(steps), torch.randn(steps)

    def loader() -> ArrayLoader:
        return ArrayLoader(x, y, EpochOrder(steps, 1, shuffle=True))

    def ours(*more: str) -> float:
        words = ["--model", "LitLinearRegression", "--trainer.max_epochs=1", *more]
        return by_command(words, train_dataloaders=loader())[0]

    variants = {
        "plain loop": lambda: by_hand(Line(), nn.MSELoss(), 0.0, loader(), item=False),
        "Lightning": lambda: by_lightning(Plain(Line(), nn.MSELoss(), 0.0), loader()),
        "K=1": ours,
    }
    variants[f"K={k}"] = partial(ours, f"--model.steps_per_execution={k}")
    same = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.01")  # as the others have it
    variants[f"K={k}, torch's SGD"] = partial(ours, f"--model.steps_per_execution={k}", *same)
    times = in_turns(variants, rounds)
    for name, values in times.items():
        figure(f"null model, {name}", [1e6 * value for value in values], unit=" µs a step")
    over = {name: [a - b for a, b in zip(times[name], times["plain loop"], strict=True)] for name in times}
    figure("2. null model, (ours - plain) ÷ (Lightning - plain), K=1", ratios(over, "K=1", "Lightning"), 1 / 3)
    name = f"K={k}"
    figure(f"2. null model, (ours - plain) ÷ (Lightning - plain), {name}", ratios(over, name, "Lightning"), 1 / 20)
    name += ", torch's SGD"
    figure(f"2. null model, (ours - plain) ÷ (Lightning - plain), {name}", ratios(over, name, "Lightning"))


def gradient_norms(steps: int, rounds: int) -> None:
    """Ratio 3: all norms at every step ÷ none; with the guard that looks at gradients too, and without."""
    data = ["--data", "SyntheticCIFAR10", f"--data.train_images={steps * BATCH}", "--data.test_images=10"]
    words = ["--config", "blitz", *data, "--trainer.max_epochs=1"]
    off = json.dumps(
        [
            {"class_path": "LossReport", "init_args": {"every_n_steps": 2000}},
            {"class_path": "ProcessSettings", "init_args": {"onednn": False}},
        ]
    )
    bare = "--non_finite_guard=false"
    variants = {
        "on": lambda: by_command(words)[0],
        "off": lambda: by_command([*words, f"--trainer.callbacks={off}"])[0],
        "on, no guard": lambda: by_command([*words, bare])[0],
        "off, no guard": lambda: by_command([*words, f"--trainer.callbacks={off}", bare])[0],
    }
    times = in_turns(variants, rounds)
    figure("3. gradient norms on ÷ off", ratios(times, "on", "off"), 1.02)
    figure(
        "3. gradient norms on ÷ off, both without NonFiniteGuard", ratios(times, "on, no guard", "off, no guard"), 1.02
    )


def main() -> None:
    """Print the figures."""
    options = begin(__doc__)
    system_c(40 if options.quick else 3000, options.rounds, options.cpu_time)
    null_model(40 if options.quick else 8000, options.rounds, options.steps_per_execution)
    gradient_norms(40 if options.quick else 1000, options.rounds)
    end()


if __name__ == "__main__":
    main()
