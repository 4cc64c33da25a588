"""The logger that every run has: ``metrics.csv``."""

import bisect
import contextlib
import csv
import errno
import io
import os
from io import FileIO
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

from lit_basics.files import replace_file

TAIL = 256
"""Rows that can still be added to."""


class MetricsCSV(Logger):
    """Writes each row of metrics to a CSV file as it comes; a file that is there is replaced.

    The first column is ``step``, the number of completed optimizer steps; a metric that a row lacks is empty.
    Metrics of the same step share a row, and rows stand in the order of their steps: the end of the file is
    written again when something comes late. A new key adds a column: the whole file is then rewritten.
    (What a module logs by Lightning's ``log`` has Lightning's number, one less than the step it belongs to.)

    It is of one run: a step that is older than the newest 256 rows gets a row before them, which the end of the run
    puts in its place. Where several optimizers step for each batch, what Lightning's ``log`` brings is of that kind.

    Args:
        path: The file.
        resume: Whether to go on in a file that is there instead; before a fit, call :meth:`cut_back` with the
            checkpoint's ``global_step``, as the command line does.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        super().__init__()
        self._resume = resume
        self.path = Path(path)
        self._keys: list[str] = []
        self._file: FileIO | None = None
        self._end = 0  # the file's length
        self._late = False  # some row is not in its place
        self._tail: list[tuple[int, dict[str, float], int]] = []  # (step, row, offset) of the newest rows

    @property
    def name(self) -> str:
        """Empty: a callback that asks for a folder gets that of the file."""
        return ""

    @property
    def version(self) -> str:
        """Empty: a run has one file."""
        return ""

    @property
    def save_dir(self) -> str:
        """The file's folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write one row, or add to the row of that step."""
        row = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        step = step or 0
        self._add_columns([key for key in row if key not in self._keys])
        assert self._file is not None
        place = bisect.bisect_left(self._tail, step, key=lambda row: row[0])
        start = self._tail[place][2] if place < len(self._tail) else self._end
        later = self._tail[place:]
        self._late |= place == 0 and len(later) == TAIL and step < later[0][0]
        del self._tail[place:]
        if later and later[0][0] == step:
            row = later.pop(0)[1] | row
        lines, end, self._end = [], self._end, start
        for number, values in [(step, row), *((s, r) for s, r, _ in later)]:
            self._tail.append((number, values, self._end))
            cells = [repr(values[key]) if key in values else "" for key in self._keys]  # numbers need no quotes
            lines.append(",".join([str(number), *cells]) + "\n")
            self._end += len(lines[-1])
        text = "".join(lines).encode()
        try:
            if start < end:  # not a new row at the end: the rows from it on are written again
                self._file.seek(start)
                if self._end < end:  # else they are written over, so that a kill leaves what was there
                    self._file.truncate(start)
            if self._file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:  # the disk is full: leave only whole rows
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
            os.truncate(self.path, start)
            raise
        del self._tail[:-TAIL]

    @rank_zero_only
    def cut_back(self, step: int) -> None:
        """Drop the rows after ``step`` of a file that was to be resumed: they are made again."""
        if self._resume and self.path.is_file():
            self._rewrite([row for row in self._read() if int(row[0]) <= step])

    @rank_zero_only
    def synchronize(self) -> None:
        """Bring the rows to the disk: those of steps that a checkpoint counts as done are not made again."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's ``config.yaml`` holds them."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Put rows that came late in their places, and close the file."""
        if self._late:
            self._rewrite(self._read())
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add_columns(self, new: list[str]) -> None:
        if self._file is not None and not new:
            return
        rows: list[list[str]] = []
        if self._keys or (self._resume and self.path.is_file()):  # somebody may log before it is cut back
            rows = self._read()
        new = [key for key in new if key not in self._keys]
        self._keys += new
        self._rewrite([[*row, *[""] * len(new)] for row in rows])

    def _read(self) -> list[list[str]]:
        """Return the file's rows in order, one for each step; its keys are from now on the logger's."""
        with self.path.open(newline="") as file:
            # a kill may have left half a row at the end, or half a number
            header, *rows = [*csv.reader(line for line in file if line.endswith("\n"))] or [["step"]]
        self._keys = header[1:]
        steps: dict[int, list[str]] = {}
        for row in rows:
            if len(row) == len(header) and row[0].isdigit():
                there = steps.get(int(row[0]), row)
                steps[int(row[0])] = [new or old for new, old in zip(row, there, strict=True)]
        return [steps[step] for step in sorted(steps)]

    def _rewrite(self, rows: list[list[str]]) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._late = None, False
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", *self._keys])
        writer.writerows(rows[:-TAIL])
        wide = len(text.getvalue().encode()) - text.tell()  # a key may have letters of several bytes
        self._tail = []
        for row in rows[-TAIL:]:
            values = {key: float(value) for key, value in zip(self._keys, row[1:], strict=True) if value != ""}
            self._tail.append((int(row[0]), values, wide + text.tell()))
            writer.writerow(row)
        content = text.getvalue().encode()
        with replace_file(self.path) as staged:
            staged.write(content)
        self._end = len(content)
        # each row in one write: a kill leaves whole rows
        self._file = FileIO(self.path, "r+")
        self._file.seek(self._end)
