"""One run of a configuration: its directory, what the command line adds to every run, and its closing words."""

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar

from lit_basics.callbacks.best_loss import BestLossCheckpoint
from lit_basics.callbacks.last import MIN_SECONDS, LastCheckpoint
from lit_basics.callbacks.preemption import Preempted, Preemption
from lit_basics.callbacks.progress import ProgressBar
from lit_basics.callbacks.random_state import RandomState
from lit_basics.checkpoint_io import DurableCheckpointIO, load_checked
from lit_basics.config import Config, config_names
from lit_basics.errors import UserError
from lit_basics.files import replace_file
from lit_basics.loggers import MetricsCSV
from lit_basics.recipes import recipe_names
from lit_basics.recording import recorder_of
from lit_basics.resuming import OptimizerArguments, check_changes, find_run
from lit_basics.run_directory import new_run_directory, remove_traces, share


def run(command: str, args: list[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with the given words.

    Raises:
        UserError: If the user's input is wrong.
    """
    quiet()
    try:
        (fit if command == "fit" else evaluate)(command, args)
    except (MisconfigurationException, torch.cuda.OutOfMemoryError) as error:
        raise UserError(str(error)) from error
    except (RuntimeError, IndexError, ValueError) as error:
        if not _is_user_error(error):
            raise
        raise UserError(str(error).splitlines()[0]) from error


def _is_user_error(error: Exception) -> bool:
    # what torch finds out only in the first step, and Lightning when it looks for devices
    patterns = (
        r"does not support (dense|sparse)|sparse gradients",
        r"Target .* is out of bounds",
        r"Early stopping conditioned on metric",
        r"No supported gpu",
    )
    return any(re.search(pattern, str(error)) for pattern in patterns)


def quiet() -> None:
    """Silence what the libraries say at every start, and nothing else."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*isinstance\(treespec, LeafSpec\)",  # Lightning's own, on new torch
        r".*`max_epochs` was not set",
        r".*does not have many workers",  # the arrays are in memory
        r".*number of training batches .* is smaller than the logging interval",  # rows come from the recorder
        r".*Checkpoint directory .* exists and is not empty",
        r".*You defined a `validation_step` but have no `val_dataloader`",
        r".*GPU available but not used",
    ):
        warnings.filterwarnings("ignore", message=message)


def fit(command: str, args: list[str]) -> None:
    """Train: everything that the run writes goes into its directory."""
    resume, run_dir = _option(args, "--resume"), _option(args, "--run_dir")
    found = find_run(resume, run_dir, run_name(args)) if resume else None
    if found is None:
        config = Config(args)
        if config.config.ckpt_path is not None:
            config.config.ckpt_path = str(_checkpoint(config.config.ckpt_path, None))
        directory, made = new_run_directory(run_dir, run_name(args), may_exist=resume is not None)
        if resume is not None:
            print(f"there is no run to resume: starting afresh in {directory}")
    else:
        (directory, checkpoint), made = found, []
        config = Config(["--config", str(directory / "config.yaml"), *without_configs(args)])
        config.optimizer_arguments = check_changes(
            yaml.safe_load((directory / "config.yaml").read_text()), config.to_dict()
        )
        config.config.ckpt_path = str(checkpoint)
        share(directory)
    trainer = None
    try:
        config.prepare_loggers(directory)
        config.build()
        ckpt_path = config.config.ckpt_path
        if ckpt_path:
            load_weights(config.model, Path(ckpt_path))  # Lightning loads them again; this refuses a wrong file
        trainer = make_trainer(config, directory, resumed=found is not None)
        trainer.fit(
            config.model, datamodule=config.datamodule, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None
        )
    except Preempted:
        print(f"\nstopped by a signal, the state is saved; go on with --resume {directory}", file=sys.stderr)
        raise
    except SystemExit as error:  # Lightning's way to leave after Ctrl-C
        if trainer is None or not trainer.interrupted:
            raise
        print(f"\nstopped by Ctrl-C after {trainer.global_step} steps; run directory: {directory}", file=sys.stderr)
        raise KeyboardInterrupt from error
    except Exception as error:
        if found is None and (trainer is None or not trainer.global_step):
            remove_traces(directory, made)
            ours = trainer is not None and type(config.model).__module__.startswith("lit_basics.")
            if ours and type(error) is RuntimeError:
                reason = str(error).splitlines()[0]
                raise UserError(f"{type(config.model).__name__} cannot train on this data: {reason}") from error
        raise
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish()  # or the next run of this process would go on in this one
    if trainer.is_global_zero:
        best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestLossCheckpoint)), None)
        print(f"run directory: {directory}")
        if best is not None and best.best_model_score is not None:
            print(f"best checkpoint: {best.best_model_path} ({best.monitor} {best.best_model_score.item():.4g})")


def evaluate(command: str, args: list[str]) -> None:
    """Validate, test or predict with a checkpoint, by default the best of the run in ``--run_dir``."""
    directory = _option(args, "--run_dir")
    if directory is not None and not config_names(args) and _option(args, "--model") is None:
        saved = Path(directory) / "config.yaml"
        if not saved.is_file():
            raise UserError(f"--run_dir {directory}: there is no run here (no config.yaml)")
        args = ["--config", str(saved), *args]
    config = Config(args)
    path = _checkpoint(config.config.ckpt_path, directory)
    config.build()
    load_weights(config.model, path)
    arguments = _with_progress_bar({**config.trainer_arguments, "logger": False, "enable_checkpointing": False})
    arguments["callbacks"] = [callback for callback in arguments["callbacks"] if not isinstance(callback, Checkpoint)]
    trainer = pl.Trainer(**arguments)
    if command == "predict":
        _predict(trainer, config, Path(directory) if directory else path.parent)
        return
    evaluate_method = trainer.validate if command == "validate" else trainer.test
    evaluate_method(config.model, datamodule=config.datamodule, verbose=False)
    if trainer.is_global_zero:
        if not trainer.callback_metrics:
            raise UserError(f"there is nothing to {command} on: the data has no {command} images")
        for name, value in sorted(trainer.callback_metrics.items()):
            print(f"{name} {value:.6g}")


def _predict(trainer: pl.Trainer, config: Config, directory: Path) -> None:
    if trainer.world_size > 1:
        raise UserError("predict runs in one process: --trainer.devices 1")
    batches = trainer.predict(config.model, datamodule=config.datamodule)
    outputs = torch.cat([torch.as_tensor(batch) for batch in batches or []]).float().numpy()
    arrays = {"outputs": outputs}
    if outputs.ndim == 2:
        arrays["classes"] = outputs.argmax(1)
    with replace_file(directory / "predictions.npz") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    print(f"predictions: {directory / 'predictions.npz'}")


def make_trainer(config: Config, directory: Path, resumed: bool) -> pl.Trainer:
    """Return the Trainer of a training run, with what every run gets beside the configured callbacks."""
    arguments = _with_progress_bar(dict(config.trainer_arguments))
    arguments["default_root_dir"] = arguments["default_root_dir"] or str(directory)
    logger = arguments["logger"]
    loggers = [] if logger in (None, True, False) else list(logger) if isinstance(logger, (list, tuple)) else [logger]
    if config.config.metrics_csv:
        loggers.append(MetricsCSV(directory / "metrics.csv", resume=resumed))
    arguments["logger"] = loggers or False
    callbacks = arguments["callbacks"]
    if arguments["enable_checkpointing"] is not False:
        checkpoints = str(directory / "checkpoints")
        if config.config.best_checkpoint:
            callbacks.append(BestLossCheckpoint(checkpoints, str(directory / "best.pth")))
        if config.config.last_checkpoint:
            last = LastCheckpoint(checkpoints)
            callbacks += [last, Preemption(last)]
        arguments["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
    callbacks += [RandomState(), _RunFiles(config, directory)]
    if config.optimizer_arguments:
        callbacks.append(OptimizerArguments(config.optimizer_arguments))
    arguments["plugins"] = _with_durable_checkpoints(arguments["plugins"])
    try:
        return pl.Trainer(**arguments)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from error


def _with_durable_checkpoints(plugins: Any) -> list[Any]:
    given: list[Any] = list(plugins) if isinstance(plugins, (list, tuple)) else [] if plugins is None else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in given):
        given.append(DurableCheckpointIO(min_seconds=MIN_SECONDS))
    return given


class _RunFiles(pl.Callback):
    """Writes the configuration when training starts, and the last rows when it fails."""

    def __init__(self, config: Config, directory: Path) -> None:
        self.config, self.directory = config, directory

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.cut_back(trainer.global_step)
        if trainer.is_global_zero:
            with replace_file(self.directory / "config.yaml") as file:
                file.write(self.config.to_yaml().encode())
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config.to_dict())

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1:  # a flush averages over the ranks, which may not all be here
            recorder_of(trainer).flush()


def _with_progress_bar(arguments: dict[str, Any]) -> dict[str, Any]:
    callbacks = arguments["callbacks"] or []
    callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
    if arguments["enable_progress_bar"] is not False and not any(
        isinstance(callback, LightningProgressBar) for callback in callbacks
    ):
        callbacks.append(ProgressBar())
    if arguments["enable_model_summary"] is None:
        arguments["enable_model_summary"] = False
    return {**arguments, "callbacks": callbacks}


def run_name(args: list[str]) -> str:
    """Return the stem of the first config that is no packaged overlay, else the model's class."""
    names = config_names(args)
    names = [name for name in names if name not in recipe_names("overlays")] or names
    return Path(names[0]).stem if names else (_option(args, "--model") or "run").rpartition(".")[2]


def without_configs(args: list[str]) -> list[str]:
    """Return ``args`` without ``--config`` and its values: a resumed run has its own."""
    flags = ("--config", "-c")
    return [
        word
        for before, word in zip(["", *args], args, strict=False)
        if word not in flags and before not in flags and not word.startswith("--config=")
    ]


def _option(args: list[str], name: str) -> str | None:
    value = None
    for i, word in enumerate(args):
        if word == name and i + 1 < len(args):
            value = args[i + 1]
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
    return value


def _checkpoint(chosen: str | None, directory: str | None) -> Path:
    if chosen in (None, "best", "last"):
        if directory is None:
            raise UserError("which weights? Name a run by --run_dir D or a checkpoint by --ckpt_path P")
        path = Path(directory) / "checkpoints" / f"{chosen or 'best'}.ckpt"
    else:
        path = Path(str(chosen))
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    return path


def load_weights(model: pl.LightningModule, path: Path) -> None:
    """Load a checkpoint's weights.

    Raises:
        UserError: If the file is no checkpoint, is damaged, or is of another model.
    """
    checkpoint = load_checked(path)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UserError(
            f"{path} is a checkpoint of another model than {type(model).__name__}: {_first_key(error)}"
        ) from error


def _first_key(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()[1:]]
    return lines[0][:150] if lines else str(error)
