"""Standard output and error that outlive their readers."""

import contextlib
import io
import os
import sys
from typing import Any


class _Kept(io.FileIO):
    """A file that leads nowhere once nobody reads it: ``lit_basics fit | head`` trains to its end."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Let no write to the process's own output fail because the other end of a pipe is closed."""
    for name in ("stdout", "stderr"):
        old: Any = getattr(sys, name)
        if old is None or old is not getattr(sys, f"__{name}__"):
            continue
        with contextlib.suppress(BrokenPipeError):
            old.flush()
        kept: Any = _Kept(old.fileno(), "w", closefd=False)
        buffer = kept if isinstance(old.buffer, io.FileIO) else io.BufferedWriter(kept)  # python -u has none
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                buffer, old.encoding, old.errors, line_buffering=old.line_buffering, write_through=old.write_through
            ),
        )
