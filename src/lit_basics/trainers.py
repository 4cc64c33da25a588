"""The Trainer of a command: the arguments of its configuration, with what every run gets beside them."""

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.profilers import PassThroughProfiler

from lit_basics.callbacks.best_loss import BestLossCheckpoint
from lit_basics.callbacks.last import MIN_SECONDS, LastCheckpoint
from lit_basics.callbacks.non_finite import NonFiniteGuard
from lit_basics.callbacks.preemption import Preemption
from lit_basics.callbacks.progress import ProgressBar
from lit_basics.callbacks.random_state import RandomState
from lit_basics.checkpoint_io import DurableCheckpointIO
from lit_basics.config import Config
from lit_basics.errors import UserError, first_line, shortened
from lit_basics.loggers import MetricsCSV
from lit_basics.resuming import OptimizerArguments, RestoredRate, ResumedData
from lit_basics.run_files import RunFiles
from lit_basics.soft_loggers import fail_soft


def make_trainer(config: Config, directory: Path) -> pl.Trainer:
    """Return the Trainer of a training run, with what every run gets beside the configured callbacks."""
    arguments = with_progress_bar(dict(config.trainer_arguments))
    arguments["default_root_dir"] = arguments["default_root_dir"] or str(directory)
    logger = arguments["logger"]
    loggers = [] if isinstance(logger, bool) else as_list(logger)
    if config.config.metrics_csv:
        loggers.append(MetricsCSV(directory / "metrics.csv", resume=config.resumed))
    arguments["logger"] = [fail_soft(logger) for logger in loggers] or False
    callbacks = with_guard(config, arguments["callbacks"])
    if arguments["enable_checkpointing"] is not False:
        checkpoints = str(directory / "checkpoints")
        # without a dirpath, ModelCheckpoint writes into the folder of the first other logger
        others = len(loggers) > config.config.metrics_csv
        here = [callback for callback in callbacks if not others or getattr(callback, "dirpath", None)]
        check_own_checkpoints(config, here, directory)
        best = [callback for callback in callbacks if isinstance(callback, BestLossCheckpoint)]
        for callback in best:
            callback.default_to(checkpoints, str(directory / "best.pth"))
        if config.config.best_checkpoint and all(callback.dirpath != checkpoints for callback in best):
            best.append(BestLossCheckpoint(checkpoints, str(directory / "best.pth")))
            callbacks.append(best[-1])
        for callback in best:
            callback.record_goes_on = config.resumed  # that of --ckpt_path is another run's
        if config.config.last_checkpoint:
            last = LastCheckpoint(checkpoints)
            callbacks += [last, Preemption(last)]
        arguments["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
    callbacks += [RandomState(), RunFiles(config, directory)]
    if config.optimizer_arguments:
        callbacks.insert(0, OptimizerArguments(config.optimizer_arguments))  # may refuse: before files are written
    if config.config.ckpt_path and (not config.resumed or config.config.resume_reset):
        callbacks.append(RestoredRate())
    if config.resumed:
        callbacks.insert(0, ResumedData(config.config.resume_reset))
    arguments["callbacks"] = callbacks
    arguments["profiler"] = arguments["profiler"] or _NoProfiler()
    arguments["plugins"] = with_durable_checkpoints(arguments["plugins"], MIN_SECONDS)
    return new_trainer(arguments)


def check_own_checkpoints(config: Config, callbacks: list[pl.Callback], directory: Path) -> None:
    """Refuse a ModelCheckpoint that would write over the run's ``best.ckpt`` or ``last.ckpt``, or remove it."""
    kept = [name for name in ("best", "last") if config.config[f"{name}_checkpoint"]]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and not isinstance(callback, BestLossCheckpoint):
            folder = Path(callback.dirpath or directory / "checkpoints").resolve()
            # a link goes to another checkpoint, or to one of another kind
            replaces = callback.save_last == "link" or (callback.save_last and callback.save_weights_only)
            own = callback.filename in kept or (replaces and "last" in kept)
            if own and folder == (directory / "checkpoints").resolve():
                named = callback.filename in kept
                name, advice = (callback.filename, "name it otherwise") if named else ("last", "leave out save_last")
                raise UserError(
                    f"a {type(callback).__name__} writes {name}.ckpt: the run keeps a checkpoint of its own under this "
                    f"name; {advice}"
                )


def with_guard(config: Config, callbacks: list[pl.Callback]) -> list[pl.Callback]:
    """Return the callbacks with a NonFiniteGuard, unless there is one or it is switched off."""
    there = any(isinstance(callback, NonFiniteGuard) for callback in callbacks)
    return [*callbacks, NonFiniteGuard()] if config.config.non_finite_guard and not there else callbacks


class _NoProfiler(PassThroughProfiler):
    """Profiles nothing, in a context that is made once and not for each call of each callback."""

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> contextlib.nullcontext[None]:  # type: ignore[override]
        return self._nothing


def as_list(value: Any) -> list[Any]:
    """Return what an argument of a Trainer that takes several, one or none holds."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def new_trainer(arguments: dict[str, Any]) -> pl.Trainer:
    """Return a Trainer.

    Raises:
        UserError: If it does not take its arguments, or what a launcher such as SLURM has put into the environment.
    """
    try:
        return pl.Trainer(**arguments)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(shortened(f"trainer: {first_line(error)}")) from error


def with_durable_checkpoints(plugins: Any, min_seconds: float = 0.0) -> list[Any]:
    """Return a Trainer's plugins with a DurableCheckpointIO, unless there is a CheckpointIO among them."""
    given = as_list(plugins)
    if not any(isinstance(plugin, CheckpointIO) for plugin in given):
        given.append(DurableCheckpointIO(min_seconds))
    return given


def with_progress_bar(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a Trainer's arguments with our progress bar, unless there is another, and without a summary."""
    callbacks = as_list(arguments["callbacks"])
    if arguments["enable_progress_bar"] is not False and not any(
        isinstance(callback, LightningProgressBar) for callback in callbacks
    ):
        callbacks.append(ProgressBar())
    if arguments["enable_model_summary"] is None:
        arguments["enable_model_summary"] = False
    return {**arguments, "callbacks": callbacks}
