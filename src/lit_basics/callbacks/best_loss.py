"""The checkpoint of the lowest loss."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_basics.callbacks.last import MIN_SECONDS
from lit_basics.checkpoint_io import DurableCheckpointIO, copied
from lit_basics.files import local_path, replace_file
from lit_basics.recording import recorder_of
from lit_basics.steps import ends_after_batch

BY_COMMAND = "(by command: --trainer.callbacks+ BestLossCheckpoint --trainer.callbacks.monitor KEY)"


class BestLossCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt``, the whole state at the lowest loss, and ``best.pth``, the plain net's weights.

    ``best.pth`` is the ``state_dict`` of ``module.net`` if there is one, else of the module; it loads in bare
    torch. The loss is a mean over the validation set, or, without validation, over the epoch's training
    steps; never that of one batch. A loss that is NaN or infinite is never the best. What is kept is a copy,
    taken when the loss falls: it cannot change with the live weights. ``best.pth`` is written at most every ten
    seconds, before any other checkpoint and at the end. The record goes on when a run is resumed, in another
    directory as well. A fit that begins anew, such as the next fold's, has a record of its own; in the same directory
    its files replace those of the fit before.

    Args:
        dirpath: Folder of ``best.ckpt``; ModelCheckpoint's default (under the logger's folder) if None.
        weights_path: The file of the plain weights; ``best.pth`` in ``dirpath`` by default.
        monitor: Key of the loss: by default ``val/loss`` where there are validation batches, else
            ``train/loss``. Where the validation logs no ``val/loss``, one warning says what it logs, and ``train/loss``
            decides; where neither is logged, or the key of each step alone, nothing is kept.

    Raises:
        UserError: If ``dirpath`` or ``weights_path`` is remote.
    """

    def __init__(self, dirpath: str | None = None, weights_path: str | None = None, monitor: str | None = None) -> None:
        for path in filter(None, (dirpath, weights_path)):
            local_path(path)
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor or "val/loss",
            mode="min",
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        if type(self).on_train_batch_end is ModelCheckpoint.on_train_batch_end:
            # it saves at no step, and Lightning passes over what cannot be called
            self.on_train_batch_end = None  # type: ignore[assignment,method-assign]
        self._chosen_monitor = monitor
        self._weights_path = weights_path
        self._held: dict[str, Tensor] | None = None
        self._written_at = float("-inf")
        self._saving = False
        self.record_of: str | None = None
        """Which monitor the best score is of."""
        self.record_goes_on = True
        """Whether a run that begins with a checkpoint takes over its record; a new run by command does not."""
        self._missed = False  # a validation came without val/loss
        self._off = False
        self._sharded = False  # it was told that there is no file of plain weights
        self._resumed_within: int | None = None  # the epoch whose first batches were in another run

    @property
    def state_key(self) -> str:
        """A key that does not change when the monitor is chosen."""
        return f"{type(self).__qualname__}{{'monitor': {self._chosen_monitor!r}}}"

    @property
    def weights_path(self) -> Path:
        """The file of the plain weights."""
        assert self.dirpath is not None
        return local_path(self._weights_path or Path(self.dirpath) / "best.pth")

    def default_to(self, dirpath: str, weights_path: str) -> None:
        """Write there, if no ``dirpath`` was given."""
        if self.dirpath is None:
            self.dirpath, self._weights_path = dirpath, self._weights_path or weights_path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose what to monitor, now that the validation batches are known."""
        super().on_train_start(trainer, pl_module)
        if isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO):
            trainer.strategy.checkpoint_io.begin()
        if trainer.fit_loop.total_batch_idx < 0:  # another fit, and no resume
            self._forget_record()
            self.best_model_path, self.record_of = "", None
        if self._chosen_monitor is None:
            # without a sanity check the batches may not have been counted yet
            validated = trainer.enable_validation and (trainer.val_dataloaders is None or any(trainer.num_val_batches))
            self.monitor = "val/loss" if validated else "train/loss"
        self._missed = self._off = False
        self._resumed_within = trainer.current_epoch if trainer.fit_loop.restarted_mid_epoch else None

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Return whether ``current`` is finite and lower than the best."""
        finite = current is not None and bool(torch.isfinite(current))
        # all ranks, of which each may have a value of its own: only together do they go on
        return trainer.strategy.reduce_boolean_decision(finite) and super().check_monitor_top_k(trainer, current)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if the validation's loss is the lowest."""
        if self._off or (self._chosen_monitor is None and self.monitor not in trainer.callback_metrics):
            self._missed = not trainer.sanity_checking  # the epoch's mean of train/loss may still come
            return
        with self._own_saves(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if the epoch's training loss is the lowest and is what is monitored."""
        if self._chosen_monitor is None:
            self._choose_training_loss(trainer)
        elif self._lacks_epoch_value(trainer):
            return
        if not self._off and not self._is_of_the_rest(trainer):
            with self._own_saves(trainer):
                super().on_train_epoch_end(trainer, pl_module)

    def _choose_training_loss(self, trainer: pl.Trainer) -> None:
        """Monitor ``train/loss`` where no validation has ``val/loss``, and nothing where that is missing too."""
        # a run resumed within an epoch may have had its last validation before
        if self._off or self.record_of == self.monitor or self._is_logged(trainer):
            return
        # Lightning's private name, of an interval that is a time
        every = None if getattr(trainer, "_val_check_time_interval", None) else trainer.check_val_every_n_epoch
        ends = ends_after_batch(trainer) or trainer.current_epoch + 1 == trainer.max_epochs
        if self._missed or ends or (every and (trainer.current_epoch + 1) % every == 0):
            self.monitor = "train/loss"  # max_steps came before the first validation, or it has no val/loss
        self._off = self.monitor == "train/loss" and not self._is_logged(trainer)
        if self._off:
            rank_zero_warn(
                "BestLossCheckpoint keeps nothing in this run: its module logs neither val/loss nor the epoch's "
                f"train/loss; it logs {_listed(trainer.callback_metrics)}; monitor= takes another key {BY_COMMAND}"
            )
        elif self.monitor == "train/loss" and self._missed:
            there = _listed(key for key, of_epoch in _logged(trainer)[1].items() if of_epoch)
            rank_zero_warn(
                f"BestLossCheckpoint goes by train/loss: the validation logs {there}, and no val/loss; "
                f"monitor= takes another key {BY_COMMAND}"
            )

    def _lacks_epoch_value(self, trainer: pl.Trainer) -> bool:
        """Return whether what is there of a chosen training metric is of a step, or of another epoch."""
        of_epoch = _logged(trainer)[0].get(self.monitor or "") if self._is_of_training(trainer) else None
        if of_epoch is None or self._is_logged(trainer):
            return False
        if not of_epoch and not self._off:
            self._off = True
            rank_zero_warn(
                f"BestLossCheckpoint keeps nothing in this run: {self.monitor} is logged of each step alone; log "
                "it with on_epoch=True"
            )
        return True

    def _is_of_the_rest(self, trainer: pl.Trainer) -> bool:
        """Return whether a training metric is the mean of the rest of an epoch: Lightning keeps none of its begin."""
        if trainer.current_epoch != self._resumed_within or not self._is_of_training(trainer):
            return False
        return self.monitor not in recorder_of(trainer).epoch_means()  # which is restored

    def _is_of_training(self, trainer: pl.Trainer) -> bool:
        """Return whether the training alone logs the monitor, whose value is complete at the epoch's end."""
        if self.monitor == "train/loss":
            return True
        training, validation = _logged(trainer)
        validates = trainer.enable_validation and any(trainer.num_val_batches)
        known = bool(validation) or not validates  # before the first validation nobody knows what it logs
        return known and self.monitor in training and self.monitor not in validation

    def _is_logged(self, trainer: pl.Trainer) -> bool:
        """Return whether the monitor is there; of the training its mean, not what the last batch has logged."""
        metrics = trainer.callback_metrics
        if self.monitor not in metrics or not self._is_of_training(trainer):
            return self.monitor in metrics
        newest = metrics.pop(self.monitor)
        of_epoch = self.monitor in trainer.callback_metrics  # at an epoch's end Lightning fills in its values alone
        metrics.setdefault(self.monitor, newest)
        return of_epoch

    def _should_save_on_train_epoch_end(self, trainer: pl.Trainer) -> bool:
        # Lightning's private name: it would take train/loss at validations, where it is of a step or of another epoch
        return self._is_of_training(trainer) or super()._should_save_on_train_epoch_end(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write what is held before another checkpoint holds its record: a resumed run must find it.

        The plain weights are those of the checkpoint: another callback may have put averages there.
        """
        if self._saving:
            if trainer.is_global_zero:  # under FSDP the others have nothing, and net.state_dict() would wait for rank 0
                self._hold_weights(pl_module, checkpoint["state_dict"])
        else:
            self._write_weights()
            if isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO):
                trainer.strategy.checkpoint_io.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write weights that are held."""
        super().on_train_end(trainer, pl_module)
        self._write_weights()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write weights that are held."""
        super().on_exception(trainer, pl_module, exception)
        try:
            self._write_weights()
        except Exception as error:  # of a full disk: the callbacks behind have their turn
            rank_zero_warn(f"{self.weights_path} could not be written: {type(error).__name__}: {error}")

    @contextmanager
    def _own_saves(self, trainer: pl.Trainer) -> Iterator[None]:
        """Let a record of another metric be forgotten, and the weights of a new one be kept."""
        if self.monitor in trainer.callback_metrics and self.record_of not in (None, self.monitor):
            self._forget_record()
        self._last_global_step_saved = -1  # a lower loss is another state: of another fit, or global_step stays 0
        before, held, self._saving = self.best_model_score, self._held, True
        try:
            yield
        except BaseException:
            self._held = held  # best.ckpt is the one before, too
            raise
        finally:
            self._saving = False
        if self.best_model_score is not before:
            self.record_of = self.monitor
        # also what an earlier validation has found: there may be no better one for hours
        if time.monotonic() - self._written_at >= MIN_SECONDS:
            self._write_weights()
        if isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO):
            trainer.strategy.checkpoint_io.write_due()

    def _forget_record(self) -> None:
        self.best_model_score, self.best_k_models, self.kth_value = None, {}, torch.tensor(torch.inf)

    def _hold_weights(self, pl_module: pl.LightningModule, state: dict[str, Any]) -> None:
        if any(hasattr(value, "to_local") or hasattr(value, "local_shards") for value in state.values()):
            if not self._sharded:
                rank_zero_warn(f"no {self.weights_path.name}: the weights are saved in shards; best.ckpt has them")
            self._sharded = True
            return
        if isinstance(net := getattr(pl_module, "net", None), nn.Module):
            of_net = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
            state = of_net or net.state_dict()  # it may be in the module under another name
        self._held = copied({name.replace("_orig_mod.", ""): value for name, value in state.items()})

    def _write_weights(self) -> None:
        if self._held is None:
            return
        with replace_file(self.weights_path) as file:
            torch.save(self._held, file)
        self._held, self._written_at = None, time.monotonic()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the record; Lightning forgets it when the directory changes."""
        self.record_of = state_dict["monitor"] if state_dict["best_model_score"] is not None else None
        if not self.record_goes_on:
            return
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})
        here = Path(self.dirpath or "") / Path(self.best_model_path).name
        if self.dirpath and self.best_model_path and here.is_file():  # the run was moved, or copied
            self.best_k_models = {str(here): score for score in self.best_k_models.values()}
            self.best_model_path = self.kth_best_model_path = str(here)


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)) or "nothing"


def _logged(trainer: pl.Trainer) -> tuple[dict[str, bool], dict[str, bool]]:
    """Return the keys that the training and the validation log, each with whether it has an epoch's value."""
    loop: Any = trainer.fit_loop.epoch_loop
    training: dict[str, bool] = {}
    validation: dict[str, bool] = {}
    # Lightning's private names
    for found, results in ((training, loop._results), (validation, loop.val_loop._results)):
        for result in results.values():
            name, of_step = results._forked_name(result, on_step=True)
            _, of_epoch = results._forked_name(result, on_step=False)
            for key, reduced in ((of_step, False), (of_epoch, result.meta.on_epoch), (name, result.meta.on_epoch)):
                found[key] = found.get(key, False) or reduced
    return training, validation
