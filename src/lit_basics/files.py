"""Files that are whole or not there, and their checksums."""

import errno
import glob
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lit_basics.errors import UserError


def local_path(path: str | Path) -> Path:
    """Return a path of this machine, with ``~`` expanded as Lightning does.

    Raises:
        UserError: If it is remote (``s3://…``), of which ``Path`` would make a local folder ``s3:``.
    """
    if re.match(r"\w+:/", str(path)):  # a Path has one of its slashes only
        raise UserError(f"{path} is remote, and checkpoints are written to local files only: mount it, or copy them")
    return Path(os.path.expanduser(path))  # Path.expanduser raises for a user that is not known


@contextmanager
def replace_file(path: Path, before: Callable[[Path], object] = lambda staged: None) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name only when it is complete and on the disk.

    It is staged beside its target (the temporary folder may be another file system, where a rename is a copy),
    synchronised, and renamed. If the body raises, the old file stays. One process at a time may write a file.

    Args:
        path: The file; its folder is made if need be.
        before: Called with the staged file when it is on the disk, before it is renamed; it may refuse it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(name_beside(path))}.????????"):  # by a write that was killed
        left.unlink(missing_ok=True)
    staged = path.with_name(f".{name_beside(path)}.{secrets.token_hex(4)}")
    file = staged.open("xb")  # unlike one of tempfile's, with the mode of new files
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        before(staged)
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def name_beside(path: Path) -> str:
    """Return what the names of the files beside begin with: in ``hpc_ckpt_1.ckpt.sha256`` Lightning reads 1256."""
    return path.name.replace("hpc_ckpt_", "hpc-")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk: a rename is not durable before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file system that cannot do this
            raise
    finally:
        os.close(descriptor)
