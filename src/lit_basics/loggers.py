"""The logger that every run has: ``metrics.csv``."""

import csv
import io
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

from lit_basics.files import replace_file


class MetricsCSV(Logger):
    """Appends each row of metrics to a CSV file as it comes.

    The first column is ``step``, the number of completed optimizer steps; a metric that a row lacks is empty.
    Metrics of the same step share a row: the last row is rewritten in place when more of its step comes. A
    key that is new adds a column, for which the file is rewritten once.

    Args:
        path: The file.
        resume: Whether to go on in a file that is there; :meth:`cut_back` it first.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        super().__init__()
        self._resume = resume
        self.path = path
        self._keys: list[str] = []
        self._file: TextIO | None = None
        self._step: int | None = None
        self._row: dict[str, float] = {}
        self._offset = 0

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def version(self) -> str:
        """Always empty: a run has one file."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row, or add to the last one if it is of the same step."""
        row = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        if self._file is not None and step == self._step:
            row = self._row | row
            self._file.seek(self._offset)
            self._file.truncate()
        self._add_columns([key for key in row if key not in self._keys])
        assert self._file is not None
        self._step, self._row, self._offset = step, row, self._file.tell()
        csv.writer(self._file, lineterminator="\n").writerow([step, *(row.get(key, "") for key in self._keys)])
        self._file.flush()

    @rank_zero_only
    def cut_back(self, step: int) -> None:
        """Drop the rows after ``step`` of a file that was to be resumed: they are made again."""
        if not self._resume or not self.path.is_file():
            return
        with self.path.open(newline="") as file:
            header, *rows = [*csv.reader(file)] or [["step"]]
        self._keys = header[1:]
        # a kill may have left half a row at the end
        rows = [row for row in rows if len(row) == len(header) and row[0].isdigit() and int(row[0]) <= step]
        self._rewrite(rows)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's ``config.yaml`` holds them."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add_columns(self, new: list[str]) -> None:
        if self._file is not None and not new:
            return
        rows: list[list[str]] = []
        if self._keys:
            self.finalize("")
            with self.path.open(newline="") as file:
                rows = list(csv.reader(file))[1:]
        self._keys += new
        self._rewrite([[*row, *[""] * len(new)] for row in rows])

    def _rewrite(self, rows: list[list[str]]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", *self._keys])
        writer.writerows(rows)
        with replace_file(self.path) as staged:
            staged.write(text.getvalue().encode())
        self._file = self.path.open("a", newline="")
