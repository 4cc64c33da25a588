"""What a :class:`~lit_basics.modules.LitSupervised` does around its steps.

It is a callback of the module's own (``configure_callbacks``), not hooks of the module: a subclass that
overrides a hook without ``super()`` takes nothing away.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

from lit_basics.data.arrays import ArrayDataModule
from lit_basics.errors import UserError
from lit_basics.execution import (
    BATCH_HOOKS,
    Counters,
    StepsInBetween,
    carry_steps,
    datamodule_of,
    leave_alone,
    put_between,
    step_schedulers_of_batch,
)
from lit_basics.loaders import check_shared_out, load_loaders, states_of_loaders
from lit_basics.recording import NEVER, FlushesRows, recorder_of, steps_between_rows
from lit_basics.steps import accumulating, validation_follows

if TYPE_CHECKING:
    from lit_basics.modules import LitSupervised


class TrainingHooks(FlushesRows):
    """Records losses and learning rates, logs the means, and makes up for what manual optimization lacks.

    Args:
        module: The module whose callback this is; its Trainer is about to run.
    """

    def __init__(self, module: LitSupervised) -> None:
        self.module = module
        trainer = module.trainer
        # a training_step of the subclass's own makes the updates by Lightning's rules
        self._manual = not (module.automatic_optimization or module.own_training_step)
        self._several = self._manual and module.steps_per_execution > 1
        self._own_clipping = is_overridden("configure_gradient_clipping", module)
        self._settings: Any = (trainer.gradient_clip_val, trainer.accumulate_grad_batches)
        # those of a fit before, of which Lightning would say that they are overridden
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, TrainingHooks)]  # type: ignore[attr-defined]
        if self._manual and trainer.state.fn == TrainerFn.FITTING:
            # Lightning forbids both in manual optimization; it asks for callbacks just before that check
            trainer.gradient_clip_val, trainer.accumulate_grad_batches = None, 1
            trainer.callbacks = [ComesFirst(self), *trainer.callbacks]  # type: ignore[attr-defined]
        self._means_logged = False
        self._resumed: dict[str, Any] | None = None
        self._loader_states: list[dict[str, Any]] = []
        self._plateaus: list[tuple[Any, int]] = []  # configurations of schedulers, with their frequencies
        self._waiting = 0  # the counter of a batch, if they are stepped after its validation
        self._left: list[int] = []  # the places of those that Lightning steps after all

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look whether the parts fit together.

        Raises:
            UserError: If an ``ArrayDataModule`` has more classes than a ``LitClassifier``, or a checkpoint is to be
                saved by time that Lightning never saves.
        """
        if pl_module is not self.module:  # left over: the Trainer has trained another module before
            trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
            return
        from lit_basics.modules import LitClassifier  # which imports this file

        data = datamodule_of(trainer)
        if isinstance(data, ArrayDataModule) and isinstance(pl_module, LitClassifier):
            there, known = data.num_classes, pl_module.num_classes
            if there is not None and there > known:
                raise UserError(f"the labels go up to {there - 1}, but num_classes is {known}")
        if isinstance(trainer.precision_plugin, DoublePrecision):
            pl_module.double()  # Lightning does it after a checkpoint's numbers were rounded to float32
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # public, but set dynamically
            if type(callback).__module__.startswith(("lit_basics.", "lightning.")):  # another may call its hooks itself
                skip_empty_hooks(callback)
        if stage != TrainerFn.FITTING:
            return
        # Lightning's private name, of what its callback does in automatic optimization alone
        if self._manual and any(getattr(c, "_train_time_interval", None) for c in trainer.checkpoint_callbacks):
            raise UserError(
                "ModelCheckpoint(train_time_interval=...) saves nothing in manual optimization, to which several steps "
                "per execution belong: every_n_train_steps does, and LastCheckpoint every five minutes"
            )
        if self._manual and (trainer.gradient_clip_val or self._own_clipping):
            vars(pl_module)["on_before_optimizer_step"] = partial(hook_and_clip, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compile the net, which the module's own ``setup`` or ``configure_model`` may have made."""
        if self.module.compile_net:
            mode = self.module.compile_net
            self.module.net.compile(mode=None if mode is True else mode)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the rows, or restore what :meth:`on_save_checkpoint` saved; Lightning has cleared the gradients before.

        Raises:
            UserError: If ``configure_optimizers`` is the module's own and made a ``ReduceLROnPlateau``, in manual mode,
                or the training loader is not shared out over the processes, or not the only one where steps are to
                be made in between.
        """
        check_shared_out(trainer, trainer.train_dataloader)
        load_loaders(trainer, self._loader_states)
        recorder_of(trainer).clear()
        if self._several and not isinstance(trainer.train_dataloader, StepsInBetween):
            steps = self.module.steps_per_execution
            raise UserError(f"steps_per_execution is {steps}: it takes one training loader, by itself")
        self.module.usual_dtype = torch.get_default_dtype()
        # in manual optimization Lightning steps none
        self._left = [] if self._resumed is None or self._manual else list(self._resumed["left_to_lightning"])
        stepped_here = self._manual or self.module.automatic_optimization
        self._plateaus = [
            (config, config.frequency)
            for number, config in enumerate(trainer.lr_scheduler_configs)
            if stepped_here and isinstance(config.scheduler, ReduceLROnPlateau) and number not in self._left
        ]
        if self._manual and self.module.own_optimizers and self._plateaus:
            raise UserError(
                f"{type(pl_module).__name__}.configure_optimizers returns a ReduceLROnPlateau, whose monitor Lightning "
                "drops in manual optimization: give it as lr_scheduler= and lr_monitor= instead"
            )
        for config, _ in self._plateaus:
            config.frequency = NEVER
        if self._resumed is None:
            return
        state, self._resumed = self._resumed, None
        every = steps_between_rows(trainer)
        recorder_of(trainer).load_state_dict(state["recorder"], trainer.global_step + 1, every)
        for name, gradient in state["gradients"].items():
            parameter = pl_module.get_parameter(name)
            parameter.grad = gradient.to(parameter.device)
        metrics = state["metrics"]  # of a validation earlier in the epoch
        trainer.callback_metrics.update({n: torch.tensor(value, dtype=torch.float64) for n, value in metrics.items()})

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin new epoch means."""
        recorder_of(trainer).start_epoch()
        self._means_logged = False

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record the learning rate."""
        step = trainer.global_step + 1
        if step % steps_between_rows(trainer) == 0:
            groups = optimizer.param_groups
            for index, group in enumerate(groups):
                name = "lr" if len(groups) == 1 else f"lr/{group.get('name', index)}"
                recorder_of(trainer).put_host(step, name, float(group["lr"]))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Flush the recorder when it is due, and the epoch's means after its last batch."""
        recorder = recorder_of(trainer)
        stepped = not accumulating(trainer)
        if self._manual and batch is None and stepped:  # Lightning passes over it, but steps the schedulers
            step_schedulers_of_batch(self.module)
        if self.module.own_training_step:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if isinstance(loss, torch.Tensor):
                step, every = trainer.global_step + (0 if stepped else 1), steps_between_rows(trainer)
                # Lightning has divided the loss by the number of accumulated batches
                whole = loss * trainer.accumulate_grad_batches
                recorder.put(step, "train/loss", whole, part=batch_idx, every=every)
        if trainer.is_last_batch:
            self._log_epoch_means(trainer)
        else:
            recorder.flush_if_due()
        if stepped and self._plateaus:
            if validation_follows(trainer):  # which logs what they may watch
                self._waiting = 1 + batch_idx
                _ = trainer.callback_metrics  # keeps what this batch logged: a validation reads its own only
            else:
                self._step_plateaus(trainer, "step", 1 + batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the epoch's means if ``max_steps`` or the module cut the epoch short, and step a plateau scheduler."""
        if not self._means_logged:
            if self._manual and Counters(trainer).left:
                step_schedulers_of_batch(self.module)
            self._log_epoch_means(trainer)
        if trainer.is_last_batch:
            self._step_plateaus(trainer, "epoch", 1 + trainer.current_epoch)

    def _step_plateaus(self, trainer: pl.Trainer, interval: str, counter: int) -> None:
        """Step each ``ReduceLROnPlateau`` of an interval, before checkpoints are saved.

        Lightning does so after them, and not at all in an epoch that is resumed.

        Raises:
            UserError: In manual optimization, if one watches what was not logged.
        """
        for config, frequency in list(self._plateaus):
            monitor = self.module.lr_monitor if self._manual else config.monitor
            if config.interval != interval or counter % frequency:
                continue
            value = trainer.callback_metrics.get(monitor)
            if value is not None:
                self.module.lr_scheduler_step(config.scheduler, value)
            elif self._manual:
                raise UserError(
                    f"ReduceLROnPlateau monitors {monitor!r} (lr_monitor), which is not there; "
                    f"there is {', '.join(trainer.callback_metrics) or 'nothing yet'}"
                )
            else:  # the module's own on_train_epoch_end may log it: then it is Lightning's turn
                config.frequency = frequency
                self._plateaus.remove((config, frequency))
                self._left.append(trainer.lr_scheduler_configs.index(config))

    def _log_epoch_means(self, trainer: pl.Trainer) -> None:
        self._means_logged = True
        recorder = recorder_of(trainer)
        means = recorder.epoch_means()
        recorder.write({f"{name}_epoch": mean for name, mean in means.items()}, trainer.global_step)
        # for callback_metrics only: EarlyStopping, checkpoints and plateau schedulers read them there
        several = trainer.world_size > 1
        for name, mean in means.items():
            self.module.log(name, mean, on_step=False, on_epoch=True, logger=False, batch_size=1, sync_dist=several)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether the loaders are shared out over the processes, and begin the metrics.

        A validation before, in inference mode, has left them states that cannot be added to in place; one that failed,
        a part of its sums.
        """
        check_shared_out(trainer, trainer.val_dataloaders)
        _reset(self.module._val_metrics)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether the loaders are shared out over the processes, and begin the metrics, as for a validation."""
        check_shared_out(trainer, trainer.test_dataloaders)
        _reset(self.module._test_metrics)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log ``val/loss`` and ``val/<metric>``."""
        self._log_evaluation(trainer, "val", self.module._val_metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step a plateau scheduler of steps whose turn is at the batch before."""
        counter, self._waiting = self._waiting, 0
        if counter:
            self._step_plateaus(trainer, "step", counter)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log ``test/loss`` and ``test/<metric>``."""
        self._log_evaluation(trainer, "test", self.module._test_metrics)

    def _log_evaluation(self, trainer: pl.Trainer, stage: str, modules: nn.ModuleDict) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        # a validation_step of a subclass's own may not fill them; a rank whose share is empty computes with the others
        filled = trainer.strategy.reduce_boolean_decision
        metrics = {n: m for n, m in modules.items() if isinstance(m, Metric) and filled(m.update_called, all=False)}
        with warnings.catch_warnings():
            # a Trainer may have no logger
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric|You called `self.log")
            values = {f"{stage}/{name}": metric.compute() for name, metric in metrics.items()}
            for name, value in values.items():
                try:
                    values[name] = float(value)
                except (TypeError, ValueError, RuntimeError) as error:
                    what = f"{name} is {value}, not one number: metrics= takes torchmetrics that give one"
                    raise UserError(what) from error
            for name, metric in metrics.items():
                # in a fit the rows go to the loggers below, with the number of completed steps
                self.module.log(f"{stage}/{name}", metric, logger=not fitting)
        if fitting and not trainer.sanity_checking:
            recorder = recorder_of(trainer)
            recorder.flush_finished()  # the rows of earlier steps come first
            recorder.write(values, trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the epoch's means and metrics so far, and the gradients of a step that is being accumulated."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        gradients = {}
        if accumulating(trainer):
            # ranks have their own until the step; their mean makes the same step
            gradients = {
                name: trainer.strategy.reduce(parameter.grad.clone(), reduce_op="mean")
                for name, parameter in pl_module.named_parameters()
                if parameter.grad is not None
            }
        checkpoint["lit_basics"] = {
            "recorder": recorder_of(trainer).state_dict(),
            "gradients": gradients,
            "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
            "left_to_lightning": list(self._left),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep it until training starts; count the steps for this mode of optimization."""
        self._resumed = checkpoint.get("lit_basics")
        self._loader_states = states_of_loaders(checkpoint)
        carry_steps(checkpoint, self.module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the Trainer as it was."""
        leave_alone(trainer)
        vars(self.module).pop("on_before_optimizer_step", None)
        for config, frequency in self._plateaus:
            config.frequency = frequency

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the Trainer as it was, and flush the rows."""
        self._put_settings_back(trainer)  # an earlier setup may have failed, as of the data
        self.teardown(trainer, pl_module, "")
        super().on_exception(trainer, pl_module, exception)

    def _put_settings_back(self, trainer: pl.Trainer) -> None:
        if self._settings is not None:
            trainer.gradient_clip_val, trainer.accumulate_grad_batches = self._settings
            self._settings = None


def _reset(metrics: nn.ModuleDict) -> None:
    for metric in metrics.values():
        assert isinstance(metric, Metric)
        metric.reset()


class ComesFirst(pl.Callback):
    """What a module in manual optimization does before other callbacks' ``setup``, which may ask for the steps to come.

    Args:
        hooks: The module's.
    """

    def __init__(self, hooks: TrainingHooks) -> None:
        self._hooks = hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the settings back, as Lightning's check is over, and the steps in between; then leave the Trainer."""
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        if stage != TrainerFn.FITTING or pl_module is not self._hooks.module:  # left over: a fit has failed before this
            return
        self._hooks._put_settings_back(trainer)
        if self._hooks._several:
            put_between(self._hooks.module)


def hook_and_clip(module: LitSupervised, optimizer: torch.optim.Optimizer) -> None:
    """Call the module's ``on_before_optimizer_step``, then clip the gradients: as in automatic optimization."""
    trainer = module.trainer
    type(module).on_before_optimizer_step(module, optimizer)
    algorithm = trainer.gradient_clip_algorithm or "norm"
    module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, algorithm)


def skip_empty_hooks(callback: pl.Callback) -> None:
    """Take away the hooks of a batch that a callback does not override.

    Lightning enters its profiler for each, about 2 µs, but passes over what cannot be called: with ten callbacks
    that is a tenth of a millisecond a step.
    """
    for name in BATCH_HOOKS:
        if getattr(type(callback), name) is getattr(pl.Callback, name) and name not in vars(callback):
            setattr(callback, name, None)
