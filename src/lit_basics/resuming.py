"""``--resume``: which run goes on, from which checkpoint, and what may differ from the saved configuration."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from lit_basics.checkpoint_io import load_checked
from lit_basics.errors import UserError

CHANGEABLE = ("trainer.", "metrics_csv", "best_checkpoint", "last_checkpoint", "non_finite_guard")
"""Keys, or beginnings of keys, that a resumed run may be given anew."""
PATHS = ("data.init_args.path", "data.init_args.data_dir", "data.init_args.mirrors", "data.init_args.timeout")
OPTIMIZER = "model.init_args.optimizer.init_args."


def find_run(resume: str, run_dir: str | None, name: str) -> tuple[Path, Path] | None:
    """Return the directory and the checkpoint of the run to go on with.

    Args:
        resume: ``auto`` for the newest good run, else a run's directory or a checkpoint in one.
        run_dir: The directory that ``auto`` looks at, if one was typed.
        name: The recipe whose runs ``auto`` looks through, if none was typed.

    Returns:
        None if ``auto`` finds none.

    Raises:
        UserError: If ``resume`` is a path without a good checkpoint or configuration.
    """
    if resume == "auto":
        runs = [Path(run_dir)] if run_dir else sorted(Path("runs", name).glob("*"), reverse=True)
        for directory in runs:
            checkpoint = directory / "checkpoints" / "last.ckpt"
            try:
                load_checked(checkpoint)
            except UserError:
                continue
            if (directory / "config.yaml").is_file():
                return directory, checkpoint
        return None
    path = Path(resume)
    checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    load_checked(checkpoint)
    directory = Path(run_dir) if run_dir else checkpoint.parent.parent
    if not (directory / "config.yaml").is_file():
        raise UserError(f"--resume {resume}: there is no config.yaml in {directory}; is it a run's directory?")
    return directory, checkpoint


def check_changes(saved: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """Print what differs from the saved configuration; return the new arguments of the optimizer.

    Raises:
        UserError: If a value differs that the run cannot go on with: net, data, order, seed.
    """
    before, after = _flat(saved), _flat(typed)
    changes = {key: value for key, value in after.items() if before.get(key) != value}
    for key, value in changes.items():
        short = key.replace(".init_args", "")
        if not key.startswith((*CHANGEABLE, OPTIMIZER)) and key not in PATHS:
            raise UserError(
                f"--{short} {value}: the run to resume has {before.get(key)}; start a new run for another net, "
                "data, order or seed"
            )
        rank_zero_only(print)(f"resuming with {short} {value} (was {before.get(key)})")
    return {key.removeprefix(OPTIMIZER): value for key, value in changes.items() if key.startswith(OPTIMIZER)}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}".strip(".")).items()}


class OptimizerArguments(pl.Callback):
    """Gives a resumed optimizer new arguments: the checkpoint has just restored the old ones.

    Args:
        arguments: Values for every parameter group; a new ``lr`` scales what the scheduler has made of it.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the arguments into the groups and the schedulers.

        Raises:
            UserError: If ``lr`` is to change under a scheduler that sets it by itself.
        """
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if "lr" in self.arguments:
            for scheduler in schedulers:
                if isinstance(scheduler, (OneCycleLR, CyclicLR)):
                    raise UserError(f"{type(scheduler).__name__} sets the learning rate itself: lr cannot be changed")
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            for name, value in self.arguments.items():
                if name == "lr" and "initial_lr" in group:
                    group["lr"] *= value / group["initial_lr"]
                    group["initial_lr"] = value
                else:
                    group[name] = value
        for scheduler in schedulers:
            if "lr" in self.arguments and hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [self.arguments["lr"]] * len(scheduler.base_lrs)
