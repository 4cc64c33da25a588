"""``fit``: a new or a resumed run, with what the command line adds to every run."""

import contextlib
import signal
import sys
from pathlib import Path
from shlex import quote
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Timer
from lightning_utilities.core.rank_zero import rank_zero_only

from lit_basics.callbacks.best_loss import BestLossCheckpoint
from lit_basics.callbacks.non_finite import NonFiniteError
from lit_basics.callbacks.preemption import Preempted
from lit_basics.config import PRINT, Config, written_keys
from lit_basics.config_files import read_config
from lit_basics.errors import UserError, first_line
from lit_basics.launching import let_launcher_leave
from lit_basics.recipes import recipe_names
from lit_basics.resuming import (
    OPTIMIZER,
    changed_arguments,
    check_changes,
    find_run,
    flat,
    trained_by,
)
from lit_basics.run_directory import (
    PATIENCE,
    check_writable,
    held,
    launched_directory,
    new_run_directory,
    remove_traces,
    share,
    unshare,
)
from lit_basics.run_files import has_stepped, has_trained
from lit_basics.soft_loggers import finish_wandb
from lit_basics.tracebacks import check_data_fits, is_restoring
from lit_basics.trainers import make_trainer
from lit_basics.weights import checkpoint_path, load_weights
from lit_basics.words import CONFIG_FLAGS, config_names, option, path_option, taken


def fit(args: list[str]) -> None:
    """Train: everything that the run writes goes into its directory."""
    resume, run_dir = path_option(args, "--resume"), path_option(args, "--run_dir") or launched_directory()
    found = find_run(resume, run_dir, run_name(args)) if resume else None
    with contextlib.ExitStack() as stack:
        stack.callback(unshare)
        place = found[0] if found else Path(run_dir or "")
        waits = resume and (found or (run_dir and place.is_dir()))
        if resume and waits and stack.enter_context(held(place, PATIENCE)):
            found = find_run(resume, str(place) if resume == "auto" else run_dir, run_name(args))
        made: list[Path] = []
        if resume and found:
            config, directory = _resumed(args, resume, run_dir, *found), found[0]
        else:
            config, directory, made = _new(args, resume, run_dir)
        if not waits:
            stack.enter_context(held(directory))
        _fit(config, directory, made)


def _fit(config: Config, directory: Path, made: list[Path]) -> None:
    trainer, failed = None, False
    try:
        trainer, ckpt_path = _made(config, directory), config.config.ckpt_path
        trainer.fit(
            config.model, datamodule=config.datamodule, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None
        )
        if ckpt_path and trainer.fit_loop.max_batches and not has_trained(trainer):
            end = _why_nothing_was_left(trainer)
            if not config.resumed:
                remove_traces(made)
                raise UserError(f"there is nothing to train from {ckpt_path} on: {end}")
            rank_zero_only(print)(end)
    except Preempted:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers send it to those that still leave
        saved = (directory / "checkpoints" / "last.ckpt").exists()
        how = f"the state is saved; go on with --resume {quote(str(directory))}" if saved else "before the first step"
        rank_zero_only(print)(f"\nstopped by a signal, {how}", file=sys.stderr)
        raise
    except SystemExit as error:
        if trainer is None or not isinstance(error.__context__, KeyboardInterrupt):  # Lightning's way after Ctrl-C
            raise
        print(f"\nstopped by Ctrl-C after {trainer.global_step} steps; run directory: {directory}", file=sys.stderr)
        raise KeyboardInterrupt from error
    except NonFiniteError as error:
        failed = True
        rank_zero_only(print)(f"\nlit_basics: {error}\n{_after_non_finite(directory)}", file=sys.stderr)
        if trainer is not None and trainer.world_size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            let_launcher_leave(trainer.world_size)
        raise SystemExit(1) from error
    except Exception as error:
        failed = True
        stepped = trainer is not None and has_stepped(trainer)
        if config.config.ckpt_path and trainer is not None and not stepped and is_restoring(error):
            reason = f"{type(error).__name__}: {first_line(error)[:150]}"
            path = config.config.ckpt_path
            raise UserError(f"{path} lacks a part of a run's state, or it does not fit: {reason}") from error
        if not stepped:
            remove_traces(made)
            if trainer is not None:
                check_data_fits(config.model, error, "train")
        raise
    finally:
        finish_wandb(trainer.loggers if trainer is not None else [], failed)
        dry = trainer is not None and trainer.fast_dev_run  # type: ignore[attr-defined]
        if dry:
            remove_traces(made)
    if trainer.is_global_zero and not dry:
        best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestLossCheckpoint)), None)
        print(f"run directory: {directory}")
        if best is not None and best.best_model_score is not None:
            print(f"best checkpoint: {best.best_model_path} ({best.record_of} {best.best_model_score.item():.4g})")


def _made(config: Config, directory: Path) -> pl.Trainer:
    """Make the objects of a configuration, look at its checkpoint, and return the Trainer."""
    config.build(directory)
    config.check_data()
    ckpt_path = config.config.ckpt_path
    if ckpt_path:
        # Lightning loads them again; this refuses a wrong file
        load_weights(config.model, Path(ckpt_path), config.datamodule)
        if not config.resumed:
            config.optimizer_arguments = changed_arguments(Path(ckpt_path), config.to_dict())
    trainer = make_trainer(config, directory)
    if ckpt_path and trainer.fast_dev_run:  # type: ignore[attr-defined]  # public, but set dynamically
        raise UserError("fast_dev_run begins anew and leaves nothing: leave out --resume and --ckpt_path, or it")
    return trainer


def _why_nothing_was_left(trainer: pl.Trainer) -> str:
    """Return why a run that goes on from a checkpoint made no step."""
    times = (c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer))  # type: ignore[attr-defined]
    if any(time is not None and time <= 0 for time in times):  # which counts all that was trained before
        longer = "--trainer.max_time makes it longer, null lifts it"
        return f"max_time is used up at step {trainer.global_step}; {longer}"
    longer = "max_steps" if 0 <= trainer.max_steps <= trainer.global_step else "max_epochs"
    return f"the run is complete at step {trainer.global_step}; --trainer.{longer} makes it longer"


def _after_non_finite(directory: Path) -> str:
    last = directory / "checkpoints" / "last.ckpt"
    if not last.exists():
        return f"no checkpoint was written before; the rows are in {directory}"
    how, words = "", f"lit_basics fit --resume {quote(str(directory))}"
    if f"{OPTIMIZER}lr" in flat(read_config(directory / "config.yaml")):
        how, words = " with another learning rate", f"{words} --model.optimizer.lr ..."
    return f"the last good state is {last}; to go on from it{how}: {words}"


def _new(args: list[str], resume: str | None, run_dir: str | None) -> tuple[Config, Path, list[Path]]:
    """Return a new run's configuration, its directory, and what was made for it."""
    config = Config(args)
    chosen = config.config.ckpt_path
    if chosen in ("best", "last"):
        raise UserError(f"--ckpt_path {chosen}: fit takes a file here, such as RUN/checkpoints/{chosen}.ckpt")
    if chosen is not None:
        config.config.ckpt_path = str(checkpoint_path(chosen, None))
    check_own_configs(args, run_dir)
    directory, made = new_run_directory(run_dir, run_name(args), may_exist=resume is not None)
    if resume is not None:
        rank_zero_only(print)(f"there is no run to resume: starting afresh in {directory}")
    return config, directory, made


def _resumed(args: list[str], resume: str, run_dir: str | None, directory: Path, checkpoint: Path) -> Config:
    """Return the configuration by which the run in a directory goes on from a checkpoint."""
    check_writable(directory)
    own, saved = ["--config", str(directory / "config.yaml")], read_config(directory / "config.yaml")
    # before the run's own, which seeds the process
    typed = typed_settings([*own, *args], saved) if config_names(args) else {}
    words = taken(args, *CONFIG_FLAGS)[1]  # the run has its own config
    config = Config([*own, *words])
    config.drop_repeated(saved)
    now = config.to_dict()
    written = written_keys(words, config.config)
    trained = trained_by(checkpoint, saved)
    config.optimizer_arguments = check_changes(trained, now, config.config.resume_reset, written)
    tell_of_unread(typed, flat(now), directory, chosen=resume != "auto" or run_dir is not None)
    if config.config.ckpt_path is not None:
        chosen = f"--ckpt_path {config.config.ckpt_path}"
        if resume != "auto":
            raise UserError(f"{chosen} beside --resume, whose checkpoint is {checkpoint}: leave one out")
        rank_zero_only(print)(f"the run goes on from {checkpoint}, not from {chosen}")
    config.config.ckpt_path = str(checkpoint)
    config.resumed = True
    share(directory)
    return config


def run_name(args: list[str]) -> str:
    """Return the stem of the first config that is no packaged overlay, else the model's class."""
    names = config_names(args)
    own = [name for name in names if name not in recipe_names("overlays")]
    model = option(args, "--model")
    if own or (names and model is None):
        return Path((own or names)[0]).stem
    model = model or "run"
    if model.startswith("{"):  # the class with its arguments
        with contextlib.suppress(yaml.YAMLError, AttributeError):
            model = str(yaml.safe_load(model).get("class_path"))
    if model.endswith((".yaml", ".yml", ".json")):  # a file that names it
        return Path(model).stem
    return model.rpartition(".")[2].rpartition("/")[2]


def typed_settings(args: list[str], saved: dict[str, Any]) -> dict[str, Any]:
    """Return all settings that a run of this command would have, by dotted keys; none if they cannot be read."""
    try:
        config = Config([word for word in args if word != PRINT])
        config.drop_repeated(saved)
        return flat(config.to_dict())
    except UserError:  # the file may have gone
        return {}


def check_own_configs(args: list[str], run_dir: str | None) -> None:
    """Refuse to write a run's ``config.yaml`` over the one that was typed."""
    for name in config_names(args) if run_dir else []:
        if Path(name).resolve() == (Path(run_dir or "") / "config.yaml").resolve() and Path(name).is_file():
            raise UserError(f"--config {name}: the run would write over it; name another --run_dir than {run_dir}")


def tell_of_unread(typed: dict[str, Any], own: dict[str, Any], directory: Path, chosen: bool) -> None:
    """Say where what was typed as ``--config`` differs from the resumed run, which goes on with its own.

    Args:
        typed: The settings of the words that were typed.
        own: Those of the run.
        directory: The run's directory.
        chosen: Whether it was named, not found as the newest of its recipe's name.

    Raises:
        UserError: If it was not, and has another model or other data.
    """
    keys = [key for key, value in typed.items() if own.get(key, value) != value]
    for kind in ("model", "data"):
        if f"{kind}.class_path" in keys and not chosen:
            raise UserError(
                f"--resume auto found {directory}, whose {kind} is {own[f'{kind}.class_path']}, not "
                f"{typed[f'{kind}.class_path']}: name the run's own --run_dir"
            )
    if keys:
        named = ", ".join(key.replace(".init_args", "") for key in keys[:3]) + (", ..." if keys[3:] else "")
        rank_zero_only(print)(f"the run goes on with its own config.yaml; what --config names has another {named}")
