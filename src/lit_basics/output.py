"""Standard streams that are there, and output that outlives its readers."""

import errno
import io
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EIO)
"""What a write says to a pipe that nobody reads any more, and to a terminal that is no more."""


class _Kept(io.FileIO):
    """A file that leads nowhere once nobody reads it: ``lit_basics fit | head`` trains to its end.

    Nor does it end with its terminal, as that of a connection that was closed.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Let no write to the process's own output fail because nobody reads it; nothing is read from a closed input."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next file to be opened would be in its place
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        old: Any = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):
            continue
        try:
            old.flush()
        except OSError as error:
            if error.errno not in GONE:
                raise
        kept: Any = _Kept(old.fileno(), "w", closefd=False)
        buffer = kept if isinstance(old.buffer, io.FileIO) else io.BufferedWriter(kept)  # python -u has none
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                buffer, old.encoding, old.errors, line_buffering=old.line_buffering, write_through=old.write_through
            ),
        )
