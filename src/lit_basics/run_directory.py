"""Where a run writes: a directory of its own, the same on all processes."""

import contextlib
import os
import time
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from lit_basics.errors import UserError
from lit_basics.files import replace_file

_RUN_DIR = "LIT_BASICS_RUN_DIR"
"""Carries the run's directory from rank 0 to the processes that Lightning starts."""


CONTENTS = ("config.yaml", "metrics.csv", "checkpoints", "best.pth")
"""What a run leaves in its directory, next to its loggers' files."""
WRITTEN = CONTENTS[:2]
"""What is there before the first step."""
TRIAL = 1 << 18
"""Bytes of a trial file: more than an empty file, which a full disk still takes, and soon written."""


def new_run_directory(chosen: str | None, name: str, may_exist: bool = False) -> tuple[Path, list[Path]]:
    """Return a new run's directory: the chosen one, which must not hold a run, or one named by date and time.

    Args:
        chosen: What was typed as ``--run_dir``.
        name: The recipe's name.
        may_exist: Whether the chosen one may hold a run.

    Returns:
        The directory, and what :func:`remove_traces` may remove: the files of a run that were not there before, and
        the folders that were made, the innermost first.

    Raises:
        UserError: If the chosen one holds a run, or none can be made.
    """
    if _RUN_DIR in os.environ and int(os.environ.get("LOCAL_RANK", 0)):
        return Path(os.environ[_RUN_DIR]), []
    directory = Path(chosen) if chosen else Path("runs") / name / time.strftime("%Y-%m-%d_%H-%M-%S")
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return directory, []
    stamp, count = directory, 1
    try:
        while True:
            made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
            try:
                directory.mkdir(parents=True, exist_ok=chosen is not None)
                break
            except FileExistsError:
                if chosen is not None:
                    raise
                count += 1
                directory = stamp.with_name(f"{stamp.name}-{count}")
        made = [*(directory / name for name in WRITTEN if not (directory / name).exists()), *made]
        if not may_exist and any((directory / name).exists() for name in CONTENTS):
            raise UserError(
                f"--run_dir {directory} holds a run already; name another directory, or go on with --resume auto"
            )
    except OSError as error:
        raise _not_writable(directory, error) from error
    try:
        check_writable(directory)
    except UserError:
        remove_traces(made)
        raise
    share(directory)
    return directory, made


def check_writable(directory: Path) -> None:
    """Refuse a directory on a disk that is full or read-only, before a run's first step.

    Raises:
        UserError: If a file of :data:`TRIAL` bytes cannot be written into it.
    """
    try:
        with replace_file(directory / ".writable") as file:
            file.write(bytes(TRIAL))
        (directory / ".writable").unlink()
    except OSError as error:
        raise _not_writable(directory, error) from error


def _not_writable(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"the run directory {directory} cannot be written: {error.strerror or error}; choose one by --run_dir"
    )


def share(directory: Path) -> None:
    """Tell the processes that Lightning starts which directory is theirs."""
    os.environ[_RUN_DIR] = str(directory.resolve())


def remove_traces(made: list[Path]) -> None:
    """Remove what a run that made no step has left, so that the same command can be given again.

    Args:
        made: Files and folders that were not there before the run.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return
    for path in made:
        with contextlib.suppress(OSError):  # not written yet; or somebody else's files are in the folder by now
            path.rmdir() if path.is_dir() else path.unlink()
