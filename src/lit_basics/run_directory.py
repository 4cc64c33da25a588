"""Where a run writes: a directory of its own, the same on all processes."""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from lit_basics.errors import UserError

_RUN_DIR = "LIT_BASICS_RUN_DIR"
"""Carries the run's directory from rank 0 to the processes that Lightning starts."""


CONTENTS = ("config.yaml", "metrics.csv", "checkpoints", "best.pth")
"""What a run leaves in its directory, next to its loggers' files."""
PATIENCE = 15.0
"""Seconds that a resumed run waits for the directory: of one that was killed, workers may still be leaving."""
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
                if chosen is not None or not directory.parent.is_dir():  # a link to what is gone
                    raise
                count += 1
                directory = stamp.with_name(f"{stamp.name}-{count}")
        # what is there before the first step
        made = [
            *(directory / name for name in ("config.yaml", "metrics.csv") if not (directory / name).exists()),
            *made,
        ]
        if not may_exist and any((directory / name).exists() for name in CONTENTS):
            raise UserError(
                f"--run_dir {directory} holds a run already; name another directory, or go on with --resume auto"
            )
    except OSError as error:
        raise _not_writable(directory, error, "choose one by --run_dir") from error
    try:
        check_writable(directory)
    except UserError:
        remove_traces(made)
        raise
    share(directory)
    return directory, made


def launched_directory() -> str | None:
    """Return the run's directory, if this is a process that Lightning has started for another rank."""
    return os.environ.get(_RUN_DIR) if int(os.environ.get("LOCAL_RANK", 0)) else None


@contextlib.contextmanager
def held(directory: Path, patience: float = 0.0) -> Iterator[bool]:
    """Let no other process of this machine train in a run's directory, until this one ends, however it does.

    Args:
        directory: The run's directory.
        patience: Seconds to wait for another process that trains there.

    Yields:
        Whether there was one: it may have saved since.

    Raises:
        UserError: If one still does.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        yield False
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        waited, end = False, time.monotonic() + patience
        while not _lock(descriptor):
            if time.monotonic() > end:
                raise UserError(f"another process trains in {directory}; name another --run_dir, or wait for its end")
            time.sleep(0.1)
            waited = True
        yield waited
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may have the descriptor too
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def check_writable(directory: Path, advice: str = "choose one by --run_dir") -> None:
    """Refuse a directory on a disk that is full or read-only, before a run's first step.

    Args:
        directory: The run's directory.
        advice: What else to do.

    Raises:
        UserError: If a file of :data:`TRIAL` bytes cannot be written into it.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".writable.") as file:
            file.write(bytes(TRIAL))
            file.flush()
            os.fsync(file.fileno())  # some disks are full only then
    except OSError as error:
        raise _not_writable(directory, error, advice) from error


def _not_writable(directory: Path, error: OSError, advice: str) -> UserError:
    return UserError(f"the run directory {directory} cannot be written: {error.strerror or error}; {advice}")


def share(directory: Path) -> None:
    """Tell the processes that Lightning starts which directory is theirs."""
    os.environ[_RUN_DIR] = str(directory.resolve())


def unshare() -> None:
    """Forget it: what this process starts after the run, such as torchrun, has a run of its own."""
    if launched_directory() is None:
        os.environ.pop(_RUN_DIR, None)


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
