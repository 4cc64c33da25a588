"""The running loss, printed and logged as the tutorials print it."""

import weakref
from typing import Any, Literal

import lightning.pytorch as pl
from tqdm import tqdm

from lit_basics.errors import UserError
from lit_basics.recording import StepRecorder, recorder_of


class LossReport(pl.Callback):
    """Prints the mean (or sum) of ``train/loss`` over every n steps, or over every epoch.

    ================================= ============================================================
    key                               value
    ================================= ============================================================
    ``train/loss_<reduction>_<n>``    mean or sum over n steps, counted from the start of the epoch
    ``train/loss_<reduction>_epoch``  the same over an epoch, without ``every_n_steps``
    ================================= ============================================================

    Args:
        every_n_steps: Steps of a report; None for the whole epoch.
        reduction: ``mean`` or ``sum``.

    Raises:
        UserError: If ``every_n_steps`` is below 1, or ``reduction`` is neither.
    """

    def __init__(self, every_n_steps: int | None = None, reduction: Literal["mean", "sum"] = "mean") -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"every_n_steps is {every_n_steps}; it must be at least 1")
        if reduction not in ("mean", "sum"):
            raise UserError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")
        self.every_n_steps, self.reduction = every_n_steps, reduction
        self.key = f"train/loss_{reduction}_{every_n_steps or 'epoch'}"
        self._losses: list[float] = []
        self._first_step = 0
        self._recorder: StepRecorder | None = None

    @property
    def state_key(self) -> str:
        """The key of its state in a checkpoint: reports of other keys have their own."""
        return self._generate_state_key(key=self.key)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to the rows of the recorder."""
        self._recorder = recorder_of(trainer)
        # the recorder must not keep them alive: Lightning gives each callback the module's log
        me, known = weakref.proxy(self), weakref.proxy(trainer)
        self._recorder.listeners["loss report " + self.key] = lambda step, row: me._add(known, step, row)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen no longer."""
        if self._recorder is not None:
            self._recorder.listeners.pop("loss report " + self.key, None)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a new report."""
        self._losses, self._first_step = [], trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the epoch's report."""
        recorder_of(trainer).flush()
        if self.every_n_steps is None and self._losses:
            self._report(trainer, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses of the report under way."""
        if self._recorder is not None:
            self._recorder.flush_finished()
        return {"losses": list(self._losses), "first_step": self._first_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with that report."""
        self._losses, self._first_step = list(state_dict["losses"]), int(state_dict["first_step"])

    def _add(self, trainer: pl.Trainer, step: int, row: dict[str, float]) -> None:
        if "train/loss" in row:
            self._losses.append(row["train/loss"])
            if len(self._losses) == self.every_n_steps:
                self._report(trainer, step)

    def _report(self, trainer: pl.Trainer, step: int) -> None:
        total = sum(self._losses)
        value = total / len(self._losses) if self.reduction == "mean" else total
        self._losses = []
        assert self._recorder is not None
        self._recorder.write({self.key: value}, step)
        if trainer.is_global_zero:
            # tqdm's write does not tear a progress bar; without one it prints
            tqdm.write(f"[{trainer.current_epoch + 1}, {step - self._first_step:5d}] loss: {value:.3f}")
