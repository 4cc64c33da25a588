"""``--resume``: which run goes on, from which checkpoint, and what may differ from the saved configuration."""

import re
from collections.abc import Collection, Container, Iterable
from pathlib import Path
from shlex import quote
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch.optim.lr_scheduler import ChainedScheduler, CyclicLR, OneCycleLR, SequentialLR

from lit_basics.checkpoint_files import is_there, is_whole, load_checked
from lit_basics.data.order import check_same_data
from lit_basics.errors import UserError
from lit_basics.loaders import states_of_loaders

CHANGEABLE = (
    *("trainer.", "metrics_csv", "best_checkpoint", "last_checkpoint", "non_finite_guard"),
    "model.init_args.steps_per_execution",
)
"""Keys, or beginnings of keys, that a resumed run may be given anew."""
PATHS = ("data.init_args.path", "data.init_args.data_dir", "data.init_args.mirrors", "data.init_args.timeout")
OPTIMIZER_CLASS, SCHEDULER_CLASS = "model.init_args.optimizer.", "model.init_args.lr_scheduler."
OPTIMIZER = f"{OPTIMIZER_CLASS}init_args."
RESTORED = re.compile(
    r"model\.init_args\.(optimizer\.|lr_scheduler(\.|$)|(lr_interval|lr_monitor|automatic_optimization)$)"
)
"""What the checkpoint's state belongs to, so that no other can take it."""
CONFIG = "config_yaml"
"""The key of a checkpoint under which the run's configuration lies."""
OWN_RATES = (OneCycleLR, CyclicLR, SequentialLR, ChainedScheduler)
"""Schedulers that would undo another ``lr``."""


def find_run(resume: str, run_dir: str | None, name: str) -> tuple[Path, Path] | None:
    """Return the directory and the checkpoint of the run to go on with.

    Args:
        resume: ``auto`` for the newest good run, else a run's directory or a checkpoint in one.
        run_dir: The directory that ``auto`` looks at, if one was typed.
        name: The recipe whose runs ``auto`` looks through, if none was typed.

    Returns:
        None if ``auto`` finds none, and no checkpoint in ``run_dir``.

    Raises:
        UserError: If ``resume`` is a path without a good checkpoint or configuration, or ``run_dir`` has none but
            damaged ones.
    """
    if resume == "auto":
        runs = [Path(run_dir)] if run_dir else sorted(Path("runs", name).glob("*"), key=_saved_at, reverse=True)
        for directory in runs:
            checkpoint, damages = _newest_good(directory)
            if checkpoint is not None and (run_dir or (directory / "config.yaml").is_file()):
                for damage in damages:
                    rank_zero_warn(f"{damage}; going on from {checkpoint}")
                return _checked_directory(directory, resume), checkpoint
            if run_dir and damages:
                raise UserError(f"{damages[0]}, and {directory} has no good one; to start anew, name another --run_dir")
            others = [file for file in directory.glob("checkpoints/*.ckpt") if file.is_file()]
            if run_dir and others and (directory / "config.yaml").is_file():
                others.sort(key=lambda file: file.stat().st_mtime)
                how = f"go on with --resume {quote(str(others[-1]))}, or name another --run_dir"
                raise UserError(f"{directory} has neither last.ckpt nor best.ckpt; {how}")
            for damage in damages:
                rank_zero_warn(f"{damage}; looking for an earlier run")
        return None
    path = Path(resume)
    checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    best = checkpoint.with_name("best.ckpt")
    if path.is_dir() and not is_there(checkpoint):
        if is_there(best):
            raise UserError(f"there is no checkpoint {checkpoint}; to go on from the best: --resume {quote(str(best))}")
        if runs := list(path.glob("*/checkpoints/last.ckpt")):
            newest = quote(str(max(runs, key=lambda file: file.stat().st_mtime).parent.parent))
            raise UserError(f"--resume {resume}: there are runs in it, no checkpoint; the newest: --resume {newest}")
    load_checked(checkpoint)
    own = path if path.is_dir() else checkpoint.absolute().parent.parent
    if run_dir and own.resolve() != Path(run_dir).resolve() and (own / "config.yaml").is_file():
        raise UserError(
            f"--resume {resume} goes on in its own directory, and would write over --run_dir {run_dir}: leave one out"
        )
    return _checked_directory(Path(run_dir or own), resume), checkpoint


def _saved_at(directory: Path) -> float:
    """Return the time of a run's newest checkpoint, 0 without one."""
    return max((file.stat().st_mtime for file in directory.glob("checkpoints/*.ckpt")), default=0.0)


def _newest_good(directory: Path) -> tuple[Path | None, list[str]]:
    """Return a run's newest good checkpoint, and what is wrong with the newer ones."""
    damages = []
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = directory / "checkpoints" / name
        if not is_there(checkpoint):
            continue
        try:
            load_checked(checkpoint)
        except UserError as error:
            if is_whole(checkpoint):
                raise  # of a newer version, or with other things than tensors: beginning anew would lose it
            damages.append(str(error))
        else:
            return checkpoint, damages
    return None, damages


def _checked_directory(directory: Path, resume: str) -> Path:
    if not (directory / "config.yaml").is_file():
        raise UserError(f"--resume {resume}: there is no config.yaml in {directory}; is it a run's directory?")
    return directory


def check_changes(
    saved: dict[str, Any], wanted: dict[str, Any], reset: bool = False, written: Iterable[str] = ()
) -> dict[str, Any]:
    """Print what differs from the saved configuration; return the new arguments of the optimizer.

    Args:
        saved: The run's configuration.
        wanted: What it is to be from now on.
        reset: Whether another net, other data, another order or seed may be tried (``--resume_reset``).
        written: The keys of it, without ``init_args``, that were typed.

    Raises:
        UserError: If a value differs that the run cannot go on with.
    """
    before, after = flat(saved), flat(wanted)
    # a class in the place of which is now null is there by its arguments only
    nulled = {k for k, value in after.items() if value in (None, {}) and any(b.startswith(f"{k}.") for b in before)}
    changes = {key: value for key, value in after.items() if before.get(key) != value or key in nulled}
    changes |= dict.fromkeys(key for key in before if is_gone(key, after, changes))
    arguments = {}
    for key, value in changes.items():
        short = key.replace(".init_args", "")
        if is_new_argument(key, before, changes, written):
            rank_zero_only(print)(f"the run's config.yaml has no {short}; it has its default, {value}")
            continue
        old = before.get(f"{key}.class_path", "one") if key in nulled else before.get(key)
        was = f"--{short} {value}: the run to resume has {old}"
        if key.startswith(OPTIMIZER) and "." not in key.removeprefix(OPTIMIZER):
            arguments[key.removeprefix(OPTIMIZER)] = value
        elif RESTORED.match(key):
            raise UserError(f"{was}, which cannot change with its saved state; start a new run")
        elif not key.startswith(CHANGEABLE) and key not in PATHS and not reset:
            raise UserError(
                f"{was}; start a new run for another net, data, order or seed, or add --resume_reset to keep the "
                "weights and the optimizer and begin the data anew"
            )
        rank_zero_only(print)(f"resuming with {short} {value} (was {old})")
        if key in ("data.init_args.seed", "data.init_args.val_size"):
            rank_zero_only(print)("the validation images are drawn anew: many of them have been trained on")
    if reset and any(key.startswith("model.") and not key.startswith((OPTIMIZER, *CHANGEABLE)) for key in changes):
        rank_zero_only(print)("the optimizer keeps the arguments that the checkpoint has, its learning rate too")
    return arguments


def trained_config(checkpoint: Path) -> dict[str, Any]:
    """Return the configuration that a checkpoint was trained by, by dotted keys; empty if it does not say."""
    return flat(yaml.safe_load(load_checked(checkpoint).get(CONFIG) or "{}"))


def trained_by(checkpoint: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a run's configuration with the model and the seed that its checkpoint says, by dotted keys.

    Args:
        checkpoint: The file, which may be older than what was typed since, or than an edit of config.yaml.
        saved: What config.yaml holds.
    """
    state, trained = ("model.", "seed_everything"), trained_config(checkpoint)
    own = {key: value for key, value in trained.items() if key.startswith(state)}
    return {key: value for key, value in flat(saved).items() if not (own and key.startswith(state))} | own


def changed_arguments(checkpoint: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the optimizer that differ from a checkpoint's, from which a new run is to begin.

    Args:
        checkpoint: The file.
        wanted: The new run's configuration.

    Raises:
        UserError: If the optimizer or the scheduler is another: Lightning gives it the checkpoint's state.
    """
    before, after, arguments = trained_config(checkpoint), flat(wanted), {}
    scheduler = f"{SCHEDULER_CLASS}class_path"
    if before and scheduler in after and scheduler not in before:  # it would begin from groups without an initial_lr
        raise UserError(f"model.lr_scheduler is {after[scheduler]}, but {checkpoint} was not trained with it")
    for key, old in before.items():
        if not key.startswith((OPTIMIZER_CLASS, SCHEDULER_CLASS)) or after.get(key) == old:
            continue
        short, new = key.replace(".init_args", ""), after.get(key)
        if not key.startswith(OPTIMIZER) or "." in key.removeprefix(OPTIMIZER):
            raise UserError(f"{short} is {new}, but {checkpoint} has {old}, whose state the new run would be given")
        if key in after:
            arguments[key.removeprefix(OPTIMIZER)] = new
            rank_zero_only(print)(f"{short} is {new} ({checkpoint} has {old})")
    return arguments


def is_gone(key: str, after: Collection[str], changes: Container[str]) -> bool:
    """Return whether a key is not there any more, as one of a dict that was typed anew, and no other key tells so.

    Args:
        key: The key, one of the run's configuration.
        after: All keys that there are now.
        changes: Those with other values.
    """
    parts = key.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts))]
    told = any(name in after or f"{name}.class_path" in changes for name in above)
    return key not in after and not told and not any(other.startswith(f"{key}.") for other in after)


def is_new_argument(key: str, before: Collection[str], changes: Container[str], written: Iterable[str]) -> bool:
    """Return whether a key is, or is within, an argument that the run's class does not have, and that nobody typed.

    Args:
        key: The key.
        before: All keys of the run's configuration.
        changes: The keys of which there are other values now.
        written: The keys, without ``init_args``, that were typed.
    """
    known = {".".join(parts[:n]) for parts in (name.split(".") for name in before) for n in range(len(parts) + 1)}
    parts = key.split(".")
    argument = next((start for n in range(1, len(parts) + 1) if (start := ".".join(parts[:n])) not in known), "")
    owner, within, name = argument.rpartition(".init_args.")
    kind, short = f"{owner}.class_path", argument.replace(".init_args", "")
    typed = any(word == short or word.startswith(f"{short}.") for word in written)
    # a name with a dot is within an argument that the class does have, which is null
    return bool(within) and "." not in name and kind in before and kind not in changes and not typed


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return the values of nested dicts by their dotted keys."""
    if not isinstance(value, dict) or (not value and key):
        return {key: value}
    return {k: v for name, inner in value.items() for k, v in flat(inner, f"{key}.{name}".strip(".")).items()}


class ResumedData(pl.Callback):
    """Holds the data of a resumed run against the checkpoint's, or begins it anew with the next epoch.

    Lightning gives a loader its state back only within an epoch, and says nothing of other data after one. It must
    stand before the callbacks that restore the random states and write files.

    Args:
        reset: Whether to begin the data and the random numbers anew, as ``--resume_reset`` asks for; the weights, the
            optimizer and the counters are the checkpoint's in any case.
    """

    def __init__(self, reset: bool) -> None:
        self.reset = reset
        self._step: int | None = None
        self._state: dict[str, Any] = {}
        self._patience: list[tuple[EarlyStopping, int]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep how patient each ``EarlyStopping`` is to be: its state would bring the old patience back."""
        stops = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
        self._patience = [(stop, stop.patience) for stop in stops]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what is known of the data; for a reset, take out all that belongs to a position in it."""
        if self._step is None:
            self._step = checkpoint["global_step"]
        self._state = {"world_size": len(checkpoint.get("random_state", [])) or trainer.world_size}
        for state in states_of_loaders(checkpoint):
            self._state |= state if isinstance(state, dict) else {}
        if self.reset:
            checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
            for name in ("random_state", "lit_basics"):
                checkpoint.pop(name, None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the data; for a reset, print what is different and end the checkpoint's epoch.

        A run that ``EarlyStopping`` has ended makes no step: Lightning would train on to its next look.

        Raises:
            UserError: If it is other data, and no reset, or if another state was given back since.
        """
        if trainer.global_step != self._step:  # its rows would be cut away, and its checkpoints replaced
            raise UserError(
                f"the run to resume stands at step {self._step}, but would begin at {trainer.global_step}: a callback "
                "has given back another state, as BatchSizeFinder does; leave it out, by --trainer.callbacks null"
            )
        for stop, patience in self._patience:
            stop.patience = patience
        stopped = any(stop.stopping_reason != EarlyStoppingReason.NOT_STOPPED for stop, _ in self._patience)
        if not self.reset and stopped:
            trainer.should_stop = True
            rank_zero_only(print)(
                f"EarlyStopping ended this run at step {self._step}; to train on, leave it out of --trainer.callbacks"
            )
        loader: Any = trainer.train_dataloader
        now = {"world_size": trainer.world_size, **(loader.state_dict() if hasattr(loader, "state_dict") else {})}
        names = ("size", "batch_size", "world_size", "seed")
        shape = {name: now[name] for name in names if name in self._state and name in now}
        if not self.reset:
            check_same_data(self._state, shape)
            return
        for name in ("size", "world_size"):  # the others are in the configuration
            if name in shape and shape[name] != self._state[name]:
                rank_zero_only(print)(f"resuming with data of {name} {shape[name]} (was {self._state[name]})")
        loop: Any = trainer.fit_loop
        for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
            progress.ready = progress.processed = progress.completed = progress.started
        loop.restarting = False  # else Lightning would go on at the batch where the checkpoint stands
        loop.reset_restart_stage()
        rank_zero_only(print)(
            f"--resume_reset: from step {trainer.global_step} on, with the checkpoint's weights and optimizer; the "
            f"data and the random numbers begin anew with epoch {trainer.current_epoch}"
        )


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
            UserError: As :func:`check_arguments`.
        """
        check_arguments(trainer, self.arguments)
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            for name, value in self.arguments.items():
                if name == "lr" and "initial_lr" in group:
                    group["lr"] *= value / group["initial_lr"]
                    group["initial_lr"] = value
                else:
                    group[name] = value
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            if "lr" in self.arguments and hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [self.arguments["lr"]] * len(scheduler.base_lrs)


class RestoredRate(pl.Callback):
    """Says where a checkpoint has brought another learning rate than the one that the optimizer was made with."""

    def __init__(self) -> None:
        self._made: list[float] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the optimizers, which have just been made."""
        self._made = _rates(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look again, after the restore and after :class:`OptimizerArguments`."""
        for made, restored in zip(self._made, _rates(trainer), strict=False):
            if made != restored:
                rank_zero_only(print)(f"the learning rate is that of {trainer.ckpt_path}, {restored:g}, not {made:g}")
                break


def _rates(trainer: pl.Trainer) -> list[float]:
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups if "lr" in group]
    key = "initial_lr" if trainer.lr_scheduler_configs else "lr"
    return [float(group.get(key, group["lr"])) for group in groups]


def check_arguments(trainer: pl.Trainer, arguments: dict[str, Any]) -> None:
    """Check that the Trainer's optimizers can be given new arguments beside a checkpoint's state.

    Raises:
        UserError: If ``lr`` is to change under a scheduler that would undo it, or if the groups do not share a value.
    """
    if "lr" in arguments:
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            if isinstance(scheduler, OWN_RATES):
                raise UserError(
                    f"{type(scheduler).__name__} keeps learning rates of its own, so lr cannot be {arguments['lr']} "
                    "with the checkpoint's state: leave it out, or start afresh with it"
                )
    for name, wanted in arguments.items():
        for optimizer in trainer.optimizers:
            groups = optimizer.param_groups
            key = "initial_lr" if name == "lr" else name
            values = [group.get(key, group.get(name)) for group in groups]
            if name not in groups[0] or any(value != values[0] for value in values):
                raise UserError(
                    f"{type(optimizer).__name__} has no one {name} for all parameters, so it cannot be {wanted} "
                    "with the checkpoint's state: leave it out, or start afresh with it"
                )
