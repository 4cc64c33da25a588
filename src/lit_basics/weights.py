"""A checkpoint's weights: where they lie, in a module, and what to say where they do not fit."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_basics.checkpoint_files import load_checked
from lit_basics.data.arrays import MEAN, STD, ArrayDataModule
from lit_basics.errors import UserError
from lit_basics.files import local_path


def checkpoint_path(chosen: str | None, directory: str | None) -> Path:
    """Return the file that ``--ckpt_path`` means: a path, or ``best`` or ``last`` of a run's directory.

    Raises:
        UserError: If there is none.
    """
    if chosen in (None, "best", "last"):
        if directory is None:
            raise UserError("which weights? Name a run by --run_dir D or a checkpoint by --ckpt_path P")
        path = Path(directory) / "checkpoints" / f"{chosen or 'best'}.ckpt"
    else:
        path = local_path(str(chosen))
    if not path.is_file():
        last = path.name == "best.ckpt" and path.with_name("last.ckpt").is_file()
        other = "; --ckpt_path last takes the newest" if last else ""
        raise UserError(f"there is no checkpoint {path}{other}")
    return path


def load_weights(model: pl.LightningModule, path: Path, data: Any = None) -> bool:
    """Load a checkpoint's weights, but not into a module that is not complete yet, which Lightning does later.

    Args:
        model: The module.
        path: The file.
        data: A DataModule to be evaluated on; one of images is to normalise them as the checkpoint's run did.

    Returns:
        Whether they are loaded.

    Raises:
        UserError: If the file is no checkpoint, is damaged, or is of another model.
    """
    checkpoint = load_checked(path)
    # Lightning looks under the class of this DataModule, and the run's may be another
    state = next((part for part in checkpoint.values() if isinstance(part, dict) and MEAN in part), None)
    if state and isinstance(data, ArrayDataModule):
        data.mean = state[MEAN] if data.mean is None else data.mean
        data.std = state[STD] if data.std is None else data.std
    if any(is_overridden(hook, model) for hook in ("configure_model", "setup", "on_load_checkpoint")):
        return False  # layers, or the checkpoint's names, may be made there
    try:
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise of_another_model(path, model, error) from error
    return True


def of_another_model(path: Path, model: pl.LightningModule, error: Exception) -> UserError:
    """Return what to say where a checkpoint's weights do not fit."""
    head, *keys = str(error).splitlines() or [""]
    reason = keys[0].strip()[:150] if keys else head
    return UserError(f"{path} is a checkpoint of another model than {type(model).__name__}: {reason}")
