"""``validate``, ``test`` and ``predict``: a run's weights on its data."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_basics.config import Config
from lit_basics.config_files import read_config
from lit_basics.errors import UserError
from lit_basics.files import replace_file
from lit_basics.run_directory import check_writable
from lit_basics.tracebacks import check_data_fits, is_restoring
from lit_basics.trainers import new_trainer, with_durable_checkpoints, with_progress_bar
from lit_basics.weights import checkpoint_path, load_weights, of_another_model
from lit_basics.words import config_names, option, path_option


def evaluate(command: str, args: list[str]) -> None:
    """Validate, test or predict with a checkpoint, by default the best of the run in ``--run_dir``."""
    directory, run = path_option(args, "--run_dir"), None
    if directory is not None:
        saved = Path(directory) / "config.yaml"
        if saved.is_file():
            args, run = ["--config", str(saved), *args], read_config(saved)
        elif not config_names(args) and option(args, "--model") is None:
            raise UserError(f"--run_dir {directory}: there is no run here (no config.yaml)")
    config = Config(args)
    if run is not None:
        config.drop_repeated(run)
    path = checkpoint_path(config.config.ckpt_path, directory)
    folder = Path(directory) if directory else path.parent
    if command == "predict":
        elsewhere = "beside --config and --ckpt_path, --run_dir may name another for the predictions"
        check_writable(next(there for there in (folder, *folder.parents) if there.exists()), elsewhere)
    config.config.trainer.logger = False  # not even made: its package may be missing here
    config.build()
    loaded = load_weights(config.model, path, config.datamodule)
    # max_epochs counts for nothing here, but Lightning warns where it is not given
    bare = {"logger": False, "enable_checkpointing": False, "max_epochs": 1}
    arguments = with_progress_bar({**config.trainer_arguments, **bare})
    arguments["callbacks"] = [callback for callback in arguments["callbacks"] if not isinstance(callback, Checkpoint)]
    arguments["callbacks"].append(_EndsOnSigterm())
    arguments["plugins"] = with_durable_checkpoints(arguments["plugins"])
    trainer = new_trainer(arguments)
    known: dict[str, Any] = {
        "datamodule": config.datamodule,
        "ckpt_path": None if loaded else str(path),
        "weights_only": True,
    }
    # of the callbacks that only a fit has
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
    try:
        if command == "predict":
            _predict(trainer, config.model, known, folder)
            return
        evaluate_method = trainer.validate if command == "validate" else trainer.test
        evaluate_method(config.model, **known, verbose=False)
    except Exception as error:  # a file that lacks a part ends Lightning's load in many kinds
        if not loaded and is_restoring(error):
            raise of_another_model(path, config.model, error) from error
        check_data_fits(config.model, error, command)
        raise
    if trainer.is_global_zero:
        batches = trainer.num_val_batches if command == "validate" else trainer.num_test_batches
        if not any(batches):
            raise UserError(f"there is nothing to {command} on: the data has no {command} batches")
        if not trainer.callback_metrics:
            print(f"{type(config.model).__name__} logs no metric")
        for name, value in sorted(trainer.callback_metrics.items()):
            print(f"{name} {value:.6g}")


class _EndsOnSigterm(pl.Callback):
    """Ends a prediction after SIGTERM: Lightning notes the signal, and looks at its note in the other loops only."""

    def on_predict_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.received_sigterm:
            raise SIGTERMException


def _predict(trainer: pl.Trainer, model: pl.LightningModule, known: dict[str, Any], directory: Path) -> None:
    if trainer.world_size > 1:
        raise UserError("predict runs in one process: --trainer.devices 1")
    batches: list[Any] = trainer.predict(model, **known) or []
    if not batches:
        raise UserError("there is nothing to predict: the data has no batches")
    if len(trainer.num_predict_batches) > 1:  # of one loader after the other
        batches = [batch for part in batches for batch in part]
    other = next((batch for batch in batches if not isinstance(batch, torch.Tensor)), None)
    if other is not None:
        kind = type(other).__name__
        raise UserError(f"{type(model).__name__}.predict_step returns a {kind}; predict writes one tensor a batch")
    if any(batch.ndim == 0 or batch.shape[1:] != batches[0].shape[1:] for batch in batches):
        shapes = ", ".join(sorted({str(tuple(batch.shape)) for batch in batches})[:3])
        name = type(model).__name__
        raise UserError(f"{name}.predict_step returns shapes {shapes}; predict writes (N, …), alike but for N")
    tensor = torch.cat(batches)
    outputs = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()  # which NumPy lacks
    arrays = {"outputs": outputs}
    if outputs.ndim == 2:
        arrays["classes"] = outputs.argmax(1)
    with replace_file(directory / "predictions.npz") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    print(f"predictions: {directory / 'predictions.npz'}")
