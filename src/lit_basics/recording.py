"""Scalars of the training steps, kept on the device and brought to the loggers in one transfer a flush.

``LightningModule.log`` walks through all of a metric's attributes at every call and, on the progress bar, waits
for the device at every step. A ``StepRecorder`` writes each scalar into a preallocated device row instead (one
copy, no wait), and hands full rows to the Trainer's loggers. Each Trainer has one recorder, shared by the module
and the callbacks, so that everything known of step n arrives in one row.
"""

import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

ROWS = 100
"""Steps between two flushes; a slower run flushes every second (in one process)."""

NEVER = 2**62
"""More steps than any run has."""

_SECONDS = 1.0


class StepRecorder:
    """Rows of scalars, one row an optimizer step, in a float64 buffer on the training device.

    Args:
        trainer: The Trainer whose loggers receive the rows.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer: pl.Trainer = weakref.proxy(trainer)  # the recorder must not keep it alive
        self._device = trainer.strategy.root_device
        # MPS has no float64; everywhere else it keeps a float64 net's losses exact
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._on_host = self._device.type == "cpu"
        self._buffer = self._zeros(0)
        self._cells: Any = None
        self._resize(16)
        self._columns: dict[str, int] = {}
        self._looked_up: tuple[Sequence[str], slice | Tensor, dict[int, tuple[int, int]]] = ((), slice(0), {})
        self._every: list[int] = []
        self._averaged: set[str] = set()
        self._steps: list[int] = []
        self._filled: list[dict[int, tuple[int, int]]] = []
        self._host: list[dict[str, float]] = []
        self._sums: dict[str, tuple[float, int]] = {}
        self._broken: dict[str, dict[int, float]] = {}  # by name and step, NaN and infinities: a step may be left out
        self._left_out: set[int] = set()
        self._last_flush = time.monotonic()
        self.latest: dict[str, float] = {}
        """The newest flushed value of each key, for progress bars."""
        self.listeners: dict[str, Callable[[int, dict[str, float]], None]] = {}
        """Functions of (step, every value of the step), called in order of steps at a flush."""

    def put(self, step: int, name: str, value: Tensor | float, *, part: int = 0, every: int = 1) -> None:
        """Record one scalar of a step and count it towards the epoch's mean.

        A second value for the same ``step``, ``name`` and ``part`` is ignored (LBFGS evaluates a step many
        times; the first evaluation is the loss that the step started from). Values of other parts are
        averaged: these are the micro-batches of one accumulated step.

        Args:
            step: The optimizer step that this value belongs to, from 1.
            name: The metric's key.
            value: A scalar; a tensor stays on its device.
            part: Index of the micro-batch within the step.
            every: Only steps divisible by this reach the loggers; the epoch's mean counts all.
        """
        row = self._row(step)
        column = self._column(name, every)
        self._averaged.add(name)
        count, last = self._filled[row].get(column, (0, -1))
        if count and last == part:
            return
        if isinstance(value, Tensor):
            value = value.item() if self._on_host else value.detach()
        self._cells[row, column] = self._cells[row, column] + value if count else value
        self._filled[row][column] = (count + 1, part)

    def put_all(self, step: int, names: Sequence[str], values: Tensor | Sequence[float]) -> None:
        """Record several scalars of a step at once.

        Args:
            step: The optimizer step, from 1.
            names: The metrics' keys; the same object at every call is looked up once.
            values: Tensor of shape (len(names),), or as many numbers.
        """
        row = self._row(step)
        if names is not self._looked_up[0]:
            columns = [self._column(name, 1) for name in names]
            first, last = columns[0], columns[-1]
            # a parameter that had no gradient at first has its column elsewhere
            side_by_side = columns == list(range(first, last + 1))
            place = slice(first, last + 1) if side_by_side else torch.tensor(columns)
            if isinstance(place, Tensor):  # names may change with each step, and no step waits
                pinned = place.pin_memory() if self._device.type == "cuda" else place
                place = pinned.to(self._device, non_blocking=True)
            self._looked_up = names, place, dict.fromkeys(columns, (1, 0))
        _, place, filled = self._looked_up
        if isinstance(values, Tensor):
            values = values.double().tolist() if self._on_host else values.detach()
        elif not self._on_host:  # gradients that are kept on the host
            values = torch.tensor(values, dtype=self._dtype)
        if isinstance(place, slice):
            self._cells[row, place] = values
        else:
            self._buffer[row].index_copy_(0, place, torch.as_tensor(values, dtype=self._dtype, device=self._device))
        self._filled[row].update(filled)

    def put_host(self, step: int, name: str, value: float) -> None:
        """Record a number that is already on the host, such as the learning rate."""
        self._host[self._row(step)][name] = value

    def has(self, step: int, name: str) -> bool:
        """Return whether ``name`` was recorded for ``step`` since the last flush."""
        return bool(self._steps) and self._steps[-1] == step and self._columns.get(name, -1) in self._filled[-1]

    def flush_if_due(self) -> None:
        """Flush the finished steps once the rows are full or, in one process, once a second."""
        slow = time.monotonic() - self._last_flush >= _SECONDS
        # ranks flush together, because a flush averages over them: only the row count is the same on all
        if len(self._steps) >= ROWS or (slow and self._trainer.world_size == 1):
            self.flush_finished()

    def flush_finished(self) -> None:
        """Flush all steps but the one whose micro-batches are still being accumulated."""
        unfinished = bool(self._steps) and self._steps[-1] > self._trainer.global_step
        self._flush(len(self._steps) - unfinished)

    def flush(self) -> None:
        """Flush all rows, also that of an unfinished step."""
        self._flush(len(self._steps))

    def _flush(self, count: int) -> None:
        """Move ``count`` rows to the host in one transfer, add them to the epoch's sums, write to the loggers."""
        self._last_flush = time.monotonic()
        if not count:
            return
        rows = self._buffer[:count]
        if self._trainer.world_size > 1:
            compute_logged(self._trainer)
            rows = self._trainer.strategy.reduce(rows.clone(), reduce_op="mean")
        written = list(zip(self._steps[:count], rows.tolist(), self._filled, self._host, strict=False))
        self._buffer[: len(self._steps) - count] = self._buffer[count : len(self._steps)].clone()
        del self._steps[:count], self._filled[:count], self._host[:count]
        names = list(self._columns)
        for step, values, filled, host in written:
            metrics, every_value = {}, {}
            for column, (parts, _) in filled.items():
                name, value = names[column], values[column] / parts
                every_value[name] = value
                if name in self._averaged:
                    total, n = self._sums.get(name, (0.0, 0))
                    broken = self._broken.setdefault(name, {})
                    # enough to know that the mean is not finite; a run of NaN must not fill the memory
                    if not math.isfinite(value) and len(broken) < 10 * ROWS:
                        broken[step] = value
                    elif step not in self._left_out:
                        total, n = total + value, n + 1
                    self._sums[name] = total, n
                if step % self._every[column] == 0:
                    metrics[name] = value
            self._write_row(metrics | host, step)
            self.latest.update(every_value)
            if step not in self._left_out:
                for listener in self.listeners.values():
                    listener(step, every_value)
        self._save()

    def write(self, metrics: dict[str, float], step: int) -> None:
        """Give one row to each of the Trainer's loggers.

        Args:
            metrics: Host numbers by key; an empty row is not written.
            step: Completed optimizer steps.
        """
        self._write_row(metrics, step)
        self._save()

    def _write_row(self, metrics: dict[str, float], step: int) -> None:
        if metrics:
            for logger in self._trainer.loggers:
                logger.log_metrics(metrics, step)

    def _save(self) -> None:
        """Let loggers that keep rows write them, as Lightning does after each row."""
        for logger in self._trainer.loggers:
            logger.save()

    def epoch_means(self) -> dict[str, float]:
        """Return the mean over the epoch's steps of everything given to :meth:`put`; flushes first."""
        self.flush()
        means = {}
        for name, (total, n) in self._sums.items():
            broken = self._not_left_out(name).values()
            means[name] = (total + sum(broken)) / (n + len(broken)) if n + len(broken) else math.nan
        return means

    def leave_out(self, first: int, last: int) -> None:
        """Leave steps that broke out of the epoch's means; their rows stay.

        What is finite of a step that was flushed already, by :meth:`flush_if_due`, is in the mean even so.
        """
        self._left_out.update(range(first, last + 1))

    def _not_left_out(self, name: str) -> dict[int, float]:
        return {step: value for step, value in self._broken.get(name, {}).items() if step not in self._left_out}

    def clear(self) -> None:
        """Forget all rows: those of steps before training starts, as a search for a learning rate makes."""
        self._steps, self._filled, self._host = [], [], []

    def start_epoch(self) -> None:
        """Forget the sums of the last epoch."""
        self._sums, self._broken = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch's sums and the row of a step that is being accumulated; flushes the others."""
        self.flush_finished()
        unfinished = {}
        if self._steps:
            names, row = list(self._columns), self._buffer[0]
            if self._trainer.world_size > 1:  # the file is one rank's, which all of them load
                row = self._trainer.strategy.reduce(row.clone(), reduce_op="mean")
            values = row.tolist()
            unfinished = {names[column]: (values[column], *state) for column, state in self._filled[0].items()}
        broken = {name: self._not_left_out(name) for name in self._broken}
        left_out = [step for step in self._left_out if step > self._trainer.global_step]
        return {"sums": dict(self._sums), "broken": broken, "left_out": left_out, "unfinished": unfinished}

    def load_state_dict(self, state: dict[str, Any], step: int, every: int) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: The state.
            step: The step of an unfinished row.
            every: As in :meth:`put`.
        """
        self._sums = {name: (float(total), int(n)) for name, (total, n) in state["sums"].items()}
        self._broken = {name: dict(values) for name, values in state["broken"].items()}
        self._left_out = set(state["left_out"])
        for name, (value, count, part) in state["unfinished"].items():
            self.put(step, name, value, every=every)
            self._filled[self._row(step)][self._column(name, every)] = (count, part)

    def _row(self, step: int) -> int:
        if not self._steps or self._steps[-1] != step:
            if len(self._steps) >= ROWS:
                self.flush()
            self._steps.append(step)
            self._filled.append({})
            self._host.append({})
        return len(self._steps) - 1

    def _column(self, name: str, every: int) -> int:
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = len(self._columns)
            self._every.append(every)
            if column >= self._buffer.shape[1]:
                self._resize(2 * self._buffer.shape[1])
        return column

    def _zeros(self, columns: int) -> Tensor:
        with torch.inference_mode(False):  # a validation may come first
            return torch.zeros(ROWS, columns, dtype=self._dtype, device=self._device)

    def _resize(self, columns: int) -> None:
        old = self._buffer
        self._buffer = self._zeros(columns)
        self._buffer[:, : old.shape[1]] = old
        # on the CPU there is nothing to wait for, and numpy takes a tenth of the time for one number
        self._cells = self._buffer.numpy() if self._on_host else self._buffer


_recorders: weakref.WeakKeyDictionary[pl.Trainer, StepRecorder] = weakref.WeakKeyDictionary()


def recorder_of(trainer: pl.Trainer) -> StepRecorder:
    """Return the Trainer's recorder, made at the first call."""
    recorder = _recorders.get(trainer)
    if recorder is None:
        recorder = _recorders[trainer] = StepRecorder(trainer)
    return recorder


def steps_between_rows(trainer: pl.Trainer) -> int:
    """Return the number of steps between two rows of the Trainer's loggers."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # public, but set dynamically
    return every or NEVER  # 0: no rows, as of a barebones Trainer


class FlushesRows(pl.Callback):
    """Brings the recorder's rows to the loggers: after an epoch, before a checkpoint, and when a run fails."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Flush the epoch's last rows."""
        recorder_of(trainer).flush()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Flush: a resumed run does not make them again."""
        if trainer.state.fn == TrainerFn.FITTING:
            recorder_of(trainer).flush_finished()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Flush: they are what one looks at then."""
        if trainer.world_size > 1:  # a flush averages over the ranks, which may not all be here
            return
        try:
            recorder_of(trainer).flush()
        except Exception as error:  # of a lost device or a logger: the first exception is what matters
            rank_zero_warn(f"the last rows could not be logged: {type(error).__name__}: {error}")


def compute_logged(trainer: pl.Trainer) -> None:
    """Compute what was logged in an epoch; at its end to be called before ranks send each other anything.

    A mean over the ranks is computed when it is first read. Rank 0's progress bar reads it at the end of the epoch,
    where the others have none: it would wait for them while they wait for it elsewhere.
    """
    if trainer.world_size > 1:
        _ = trainer.callback_metrics
