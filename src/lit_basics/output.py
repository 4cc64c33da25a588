"""Standard streams that are there, and output that outlives its readers."""

import errno
import io
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EIO)
"""What a write says to a pipe that nobody reads any more, and to a terminal that is no more."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What it says to a file on a disk that is full, or where the user may write no more."""


class _Kept(io.FileIO):
    """A file that leads nowhere once nobody reads it: ``lit_basics fit | head`` trains to its end.

    Nor does it end with its terminal, as that of a connection that was closed, nor with the disk of its log.
    """

    passed_over: tuple[int, ...] = GONE

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self.passed_over:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def outlive_readers(trains: bool) -> None:
    """Let no write to the process's own output fail because nobody reads it; nothing is read from a closed input.

    Args:
        trains: Whether none is to fail because the disk is full or the encoding lacks a letter, either: what a training
            prints is not its result.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next file to be opened would be in its place
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    passed_over = GONE + FULL if trains else GONE
    for name in ("stdout", "stderr"):
        old: Any = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):
            continue
        try:
            old.flush()
        except OSError as error:
            if error.errno not in passed_over:
                raise
        kept: Any = _Kept(old.fileno(), "w", closefd=False)
        kept.passed_over = passed_over
        buffer = kept if isinstance(old.buffer, io.FileIO) else io.BufferedWriter(kept)  # python -u has none
        lines = {"line_buffering": old.line_buffering, "write_through": old.write_through}
        errors = "backslashreplace" if trains and old.errors == "strict" else old.errors
        setattr(sys, name, io.TextIOWrapper(buffer, old.encoding, errors, **lines))
