"""What an exception's traceback says: whose code it came from, and while what was done."""

import sysconfig
import traceback
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_basics.errors import UserError, first_line, shortened


def root_cause(error: BaseException) -> BaseException:
    """Return the exception that the others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of an exception's traceback that are of the user's own code, the innermost last."""
    libraries = ("site-packages", "dist-packages", str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<frozen ")
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not any(library in frame.filename for library in libraries)]


def where(error: BaseException) -> str:
    """Return an exception's kind, the innermost line of the user's own code it came from, and its message."""
    frames = own_frames(error) or traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}: {first_line(error) if str(error) else 'no message'}"


def is_restoring(error: Exception) -> bool:
    """Return whether an error came while a state was given back, and means that it does not fit."""
    if isinstance(error, (UserError, OSError, MisconfigurationException, torch.cuda.OutOfMemoryError)):
        return False
    ours = Path(__file__).parent  # our callbacks give states back when training starts
    names = ("_restore_modules_and_callbacks", "restore_training_state", "load_state_dict")
    frames = traceback.extract_tb(error.__traceback__)
    return any(f.name in names or (f.name == "on_train_start" and ours in Path(f.filename).parents) for f in frames)


def check_data_fits(model: pl.LightningModule, error: Exception, command: str) -> None:
    """Raise a UserError in the place of torch's, where a model of ours does not take the data that it was given."""
    ours = type(model).__module__.startswith("lit_basics.")
    # not what a DataLoader's worker met, another process that is gone, or a driver
    given = {"compute_loss", "_evaluate", "predict_step"} & {f.name for f in traceback.extract_tb(error.__traceback__)}
    kinds = (RuntimeError, TypeError, OverflowError, MemoryError)
    if ours and given and type(error) in kinds and not own_frames(error):
        reason = shortened(first_line(error))
        raise UserError(f"{type(model).__name__} cannot {command} on this data: {reason}") from error
