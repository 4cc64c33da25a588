"""Files that are whole or not there, and their checksums."""

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lit_basics.errors import UserError


def local_path(path: str | Path) -> Path:
    """Return a path of this machine.

    Raises:
        UserError: If it is remote (``s3://…``), of which ``Path`` would make a local folder ``s3:``.
    """
    if re.match(r"\w+:/", str(path)):  # a Path has one of its slashes only
        raise UserError(f"{path} is remote, and checkpoints are written to local files only: mount it, or copy them")
    return Path(path)


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name only when it is complete and on the disk.

    It is staged beside its target (the temporary folder may be another file system, where a rename is a copy),
    synchronised, and renamed. If the body raises, the old file stays.

    Args:
        path: The file; its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, staged = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        make_public(staged)
        os.replace(staged, path)
    except BaseException:
        os.unlink(staged)
        raise
    sync_folder(path.parent)


_UMASK = threading.Lock()
"""It can only be read by being set, in all threads."""


def make_public(path: str) -> None:
    """Give a file of mkstemp's, which is private, the mode that new files have."""
    with _UMASK:
        mask = os.umask(0)
        os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk: a rename is not durable before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
