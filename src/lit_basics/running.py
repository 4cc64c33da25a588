"""Runs a subcommand: quietly, and with the libraries' errors sorted into the user's and ours."""

import errno
import logging
import re
import warnings

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_basics.errors import UserError, first_line, shortened
from lit_basics.evaluating import evaluate
from lit_basics.fitting import fit
from lit_basics.launching import ending_with_launcher


def run(command: str, args: list[str]) -> None:
    """Run ``fit``, ``verify``, ``validate``, ``test`` or ``predict`` with the given words."""
    quiet()
    try:
        with ending_with_launcher():
            if command == "fit":
                fit(args)
            elif command == "verify":
                from lit_basics.verification.command import verify_config

                verify_config(args)
            else:
                evaluate(command, args)
    except OSError as error:
        if not error.filename or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
            raise
        raise UserError(f"{shortened(str(error.filename))}: {error.strerror}") from error
    except (MisconfigurationException, torch.cuda.OutOfMemoryError) as error:
        raise UserError(shortened(str(error))) from error
    except (RuntimeError, IndexError, ValueError, ImportError, AttributeError) as error:
        if not _is_user_error(error):
            raise
        raise UserError(shortened(first_line(error))) from error


def _is_user_error(error: Exception) -> bool:
    # what torch finds out only in the first step, and Lightning when it looks for devices
    patterns = (
        r"does not support (dense|sparse)|sparse gradients",
        r"Target .* is out of bounds",
        r"Early stopping conditioned on metric",
        r"Tried to step \d+ times",  # a OneCycleLR of fewer steps
        r"must be less than or equal to the number of the training batches",
        r"You have set `accumulate_grad_batches` and are using",
        r"is missing the required \"forward\" function",
        r"parameters that were not used in producing the loss",
        r"can.t allocate memory|not enough memory",
        r"is not installed|pip install",
        r"When using the learning rate finder",
        r"^You set `",  # other processes than SLURM or torchrun has started
    )
    return any(re.search(pattern, str(error)) for pattern in patterns)


def quiet() -> None:
    """Silence what the libraries say at every start, and nothing else; of warnings, the line of code they came from."""
    warnings.formatwarning = lambda message, kind, file, line, *_: f"{file}:{line}: {kind.__name__}: {message}\n"
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("callbacks", "profilers", "tuner"):  # what they say was asked for: a summary, a profile, a rate found
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    for message in (
        r".*isinstance\(treespec, LeafSpec\)",  # Lightning's own, on new torch
        r".*does not have many workers",  # the arrays are in memory
        r".*number of training batches .* is smaller than the logging interval",  # rows come from the recorder
        r".*Checkpoint directory .* exists and is not empty",
        r".*You defined a `validation_step` but have no `val_dataloader`",
        r".*GPU available but not used",
    ):
        warnings.filterwarnings("ignore", message=message)
