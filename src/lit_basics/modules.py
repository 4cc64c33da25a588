"""The LightningModules: :class:`LitSupervised` owns the training step, its leaves name a net.

The way of a batch: the loader's (inputs, targets) → ``training_step`` → ``compute_loss`` → the update, made
by Lightning in automatic optimization and by ``_manual_step`` in manual optimization, bit for bit alike.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lit_basics import nets
from lit_basics.data.arrays import no_batches
from lit_basics.errors import UserError
from lit_basics.execution import only_optimizer, step_schedulers_of_batch
from lit_basics.hooks import TrainingHooks
from lit_basics.optim import LeanSGD, LRSchedulerCallable, OptimizerCallable
from lit_basics.recording import recorder_of, steps_between_rows
from lit_basics.steps import accumulating
from lit_basics.tracebacks import own_frames

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""Modes of torch.compile."""

AUTOMATIC_ONLY = {
    "training_step": "override compute_loss",
    "optimizer_step": "give a scheduler",
    "optimizer_zero_grad": "use automatic optimization",
}
"""What a subclass overrides for automatic optimization alone, and what it can do instead."""
_PRIMITIVES = (bool, int, float, str, type(None))


def _name_default_optimizer(kind: "type[LitSupervised]") -> None:
    """Let pickle find the lambda that is the default of ``optimizer``: ``ddp_spawn`` sends the module to its processes.

    A lambda it must be, or the command line could not show its arguments and change one of them.
    """
    parameter = inspect.signature(kind.__init__).parameters.get("optimizer")
    default: Any = parameter and parameter.default
    if getattr(default, "__qualname__", "").endswith("<lambda>"):
        default.__qualname__ = f"{kind.__qualname__}._default_optimizer"
        kind._default_optimizer = staticmethod(default)  # type: ignore[attr-defined]


class LitSupervised(pl.LightningModule):
    """Trains ``net`` on (inputs, targets) batches with ``criterion``.

    Subclass it and override :meth:`compute_loss`; the rest (both optimization modes, accumulation, clipping,
    schedulers, metrics) stays as it is. Overriding ``training_step`` works too, in automatic optimization.

    Logged: ``train/loss`` and ``lr`` (``lr/<group>`` with several groups) every ``log_every_n_steps`` steps,
    ``train/loss_epoch``, and ``val/…`` and ``test/…`` for the loss and each metric. The step is the number of
    completed optimizer steps. The epoch's mean is in ``trainer.callback_metrics["train/loss"]`` before any
    epoch-end hook runs, so that ``EarlyStopping`` and ``ReduceLROnPlateau`` can monitor it.

    Args:
        net: Maps a batch of inputs to predictions.
        criterion: Maps (predictions, targets) to a scalar loss, a mean over the batch.
        metrics: torchmetrics by name, evaluated in validation and test and logged as ``val/<name>``.
        optimizer: Makes the optimizer from the parameters; by default SGD with learning rate 0.01, as a
            :class:`~lit_basics.optim.LeanSGD`.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer.
        lr_interval: Whether the scheduler steps every ``epoch`` or every optimizer ``step``.
        lr_monitor: What a ``ReduceLROnPlateau`` watches.
        automatic_optimization: False for manual optimization: the weights are the same bit for bit, and
            ``Trainer(gradient_clip_val=…, accumulate_grad_batches=…)`` and schedulers work as well.
        steps_per_execution: Optimizer steps for each batch that Lightning handles; above 1 they are made in manual
            optimization. It changes the speed of small nets only.
        compile_net: Whether ``net.compile()`` comes before training (torch.compile, in place: names in checkpoints
            stay), or its mode; with "reduce-overhead" torch captures forward and backward as CUDA graphs on a GPU. It
            takes a while and a compiler, and rounds differently.

    Raises:
        UserError: If ``steps_per_execution`` is below 1; if a subclass overrides ``training_step``, ``optimizer_step``
            or ``optimizer_zero_grad`` and optimization is manual, which ``steps_per_execution`` above 1 implies; if one
            of ``metrics`` is no ``Metric`` or called ``loss``; or if ``lr_interval`` or ``compile_net`` is none of its
            values.
    """

    def __init__(
        self,
        net: nn.Module,
        criterion: nn.Module,
        metrics: Mapping[str, Metric] | None = None,
        *,
        optimizer: OptimizerCallable = lambda params: LeanSGD(params, lr=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "epoch",
        lr_monitor: str = "train/loss",
        automatic_optimization: bool = True,
        steps_per_execution: int = 1,
        compile_net: bool | CompileMode = False,
    ) -> None:
        super().__init__()
        if steps_per_execution < 1:
            raise UserError(f"steps_per_execution is {steps_per_execution}; it must be at least 1")
        if lr_interval not in ("epoch", "step"):
            raise UserError(f"lr_interval is {lr_interval!r}; it must be 'epoch' or 'step'")
        if not isinstance(compile_net, bool) and compile_net not in get_args(CompileMode):
            modes = ", ".join(get_args(CompileMode))
            raise UserError(f"compile_net is {compile_net!r}; it must be True, False or a mode: {modes}")
        self.own_training_step = is_overridden("training_step", self, LitSupervised)
        self.own_optimizers = is_overridden("configure_optimizers", self, LitSupervised)
        several = steps_per_execution > 1
        manual = f"steps_per_execution={steps_per_execution}" if several else "automatic_optimization=False"
        for name, instead in AUTOMATIC_ONLY.items():
            if (several or not automatic_optimization) and is_overridden(name, self, LitSupervised):
                raise UserError(f"{type(self).__name__} overrides {name}, so {manual} cannot apply: {instead} instead")
        self.save_hyperparameters(_Arguments(_primitive_arguments(self)))
        self.net = net
        self.criterion = criterion
        self.steps_per_execution = steps_per_execution
        self.compile_net = compile_net
        self.automatic_optimization = automatic_optimization and not several
        self._optimizer = optimizer
        self._made_optimizer = False
        """Whether ``optimizer`` and ``lr_scheduler`` were made, not others by a subclass."""
        self._lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.lr_monitor = lr_monitor
        self.usual_dtype = torch.get_default_dtype()  # outside of the precision's context
        metrics = metrics or {}
        if "loss" in metrics:
            raise UserError("metrics: 'loss' is the criterion's mean, as val/loss and test/loss; give it another name")
        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                kind = type(metric).__name__
                raise UserError(f"metrics: {name} is a {kind}, not a Metric; one of several goes in by their names")
        # private: a subclass may have a val_metrics of its own
        self._val_metrics = nn.ModuleDict({name: metric.clone() for name, metric in metrics.items()})
        self._test_metrics = nn.ModuleDict({name: metric.clone() for name, metric in metrics.items()})
        self._val_metrics["loss"], self._test_metrics["loss"] = MeanLoss(), MeanLoss()

    # what to override

    def forward(self, x: Tensor) -> Tensor:
        """Return the net's predictions for inputs ``x``."""
        predictions: Tensor = self.net(x)
        return predictions

    def compute_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the scalar training loss of a batch; the override point of subclasses.

        Args:
            batch: The pair (inputs, targets).
            batch_idx: Index of the batch in its epoch.
        """
        x, y = self._pair(batch, "compute_loss")
        loss: Tensor = self.criterion(self(x), y)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and the scheduler that were given as callables."""
        self._made_optimizer = True
        parameters = self.trained_parameters()
        try:
            optimizer = self._optimizer(parameters)
        except (TypeError, ValueError) as error:
            raise UserError(f"the optimizer cannot train {type(self.net).__name__}: {error}") from error
        if self._lr_scheduler is None:
            return optimizer
        try:
            scheduler: dict[str, Any] = {"scheduler": self._lr_scheduler(optimizer), "interval": self.lr_interval}
        except (TypeError, ValueError, ZeroDivisionError) as error:
            # one that asks for the number of steps has the data loaded
            if isinstance(error, UserError) or any(f.name.endswith("_dataloader") for f in own_frames(error)):
                raise
            raise UserError(f"lr_scheduler cannot be made: {error}") from error
        if self.automatic_optimization:  # in manual optimization Lightning ignores it, with a warning
            scheduler["monitor"] = self.lr_monitor
        return {"optimizer": optimizer, "lr_scheduler": scheduler}  # type: ignore[return-value]

    def trained_parameters(self) -> Any:
        """Return the parameters, or groups of them, that the optimizer is made from; all of the module by default."""
        return self.parameters()

    def record(self, name: str, value: Tensor) -> None:
        """Log a scalar of this training step without a host sync; ``<name>_epoch`` gets its mean.

        To be called once a step, from ``compute_loss`` or ``training_step``; in a validation and without a Trainer it
        does nothing.

        Args:
            name: The metric's key, such as ``train/acc``.
            value: A scalar tensor.

        Raises:
            UserError: If it is no scalar.
        """
        if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (float, int))):
            what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
            whose = ", which compute_loss returns," if name == "train/loss" else ""
            raise UserError(f"{type(self).__name__}: {name}{whose} is {what}; it must be a scalar tensor")
        trainer = self._trainer  # Lightning's private name: ``trainer`` raises where there is none, as by Fabric
        # trainer.training compares without regard to case, which takes longer than all the rest
        if trainer is not None and trainer.state.stage is RunningStage.TRAINING:
            part, every = trainer.fit_loop.batch_idx, steps_between_rows(trainer)
            recorder_of(trainer).put(trainer.global_step + 1, name, value, part=part, every=every)

    # training

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """Compute and record the loss; in manual optimization, make the update too."""
        if self.automatic_optimization:
            loss = self.compute_loss(batch, batch_idx)
            if not self.own_training_step:  # of a subclass that calls this, what it returns is recorded
                self.record("train/loss", loss)
            return loss
        return self._manual_step(batch, batch_idx)

    def _manual_step(self, batch: Any, batch_idx: int) -> Tensor:
        accumulate = self.trainer.accumulate_grad_batches
        only_optimizer(self)
        optimizer: Any = self.optimizers()
        losses: list[Tensor] = []

        def closure() -> Tensor:
            # LBFGS evaluates several times within this step: cached casts of the weights would be stale
            torch.clear_autocast_cache()
            with self.trainer.precision_plugin.train_step_context():
                loss = self.compute_loss(batch, batch_idx)
            self.record("train/loss", loss)
            if batch_idx % accumulate == 0:
                optimizer.zero_grad()
            losses[:] = [loss / accumulate]
            self.manual_backward(losses[0])
            return losses[0]

        # automatic optimization runs backward and the update outside the precision's context, where training_step is
        with torch.autocast(self.device.type, enabled=False), default_dtype(self.usual_dtype):
            if accumulating(self.trainer):
                with optimizer.toggle_model(sync_grad=False):
                    closure()
                return losses[0].detach()
            optimizer.step(closure)
        step_schedulers_of_batch(self)
        return losses[0].detach()

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes each hook that it calls in an attribute, some forty times a step
        if (value is None or type(value) is str) and name in vars(self):
            vars(self)[name] = value  # no parameter: nn.Module need not look for one
        else:
            super().__setattr__(name, value)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _name_default_optimizer(cls)

    # evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the validation loss and metrics."""
        self._evaluate(batch, self._val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the test loss and metrics."""
        self._evaluate(batch, self._test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the predictions for a batch's inputs."""
        predictions: Tensor = self(batch[0] if isinstance(batch, (list, tuple)) else batch)
        return predictions

    def _evaluate(self, batch: Any, metrics: nn.ModuleDict, predict: Callable[[Tensor], Tensor] | None = None) -> None:
        x, y = self._pair(batch, "validation_step and test_step")
        predictions = (predict or self)(x)
        for metric in metrics.values():
            if isinstance(metric, MeanLoss):
                metric.update(self.criterion(predictions, y), size_of(x, y))
            elif isinstance(metric, Metric):
                metric.update(predictions, y)

    def _pair(self, batch: Any, name: str) -> tuple[Any, Any]:
        several = isinstance(batch, (list, tuple))
        # a tensor would be taken apart along its first dimension, a dict into keys
        if len(batch) < 2 if several else isinstance(batch, (Tensor, Mapping, str)):
            what = f"a {type(batch).__name__}" + (f" of {len(batch)}" if several else "")
            raise UserError(f"a batch is {what}, not (inputs, targets): override {name} of {type(self).__name__}")
        x, y, *_ = batch
        return x, y

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return what works around the steps; a subclass that overrides this adds ``super()``'s."""
        return [TrainingHooks(self)]


_name_default_optimizer(LitSupervised)
# Lightning asks for it at every batch, and would have it made anew
LitSupervised.training_step.__signature__ = inspect.signature(LitSupervised.training_step)  # type: ignore[attr-defined]


class LitClassifier(LitSupervised):
    """Trains any net that returns logits (N, num_classes), with cross-entropy and accuracy.

    Args:
        net: Maps inputs to logits (N, num_classes).
        num_classes: Number of classes; targets are int64 in [0, num_classes).
        criterion: Another loss of (logits, targets); cross-entropy by default.
        metrics: As of :class:`LitSupervised`, beside the accuracy ``acc``.
        **kwargs: As :class:`LitSupervised`.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int = 10,
        criterion: nn.Module | None = None,
        metrics: Mapping[str, Metric] | None = None,
        **kwargs: Any,
    ) -> None:
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        super().__init__(
            net=net,
            criterion=criterion or nn.CrossEntropyLoss(),
            metrics={"acc": accuracy, **(metrics or {})},
            **kwargs,
        )
        self.num_classes = num_classes


class LitLeNet5(LitClassifier):
    """LeNet-5; by default SGD with learning rate 0.01 and momentum 0.9.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        activation: Name of the activation; the paper's is a scaled ``tanh``.
        pooling: ``avg``, the paper's but for what it trains, or ``max``.
        optimizer: Makes the optimizer from the parameters.
        **kwargs: As :class:`LitClassifier`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        activation: nets.Activation = "tanh",
        pooling: nets.Pooling = "avg",
        *,
        optimizer: OptimizerCallable = lambda params: LeanSGD(params, lr=0.01, momentum=0.9),
        **kwargs: Any,
    ) -> None:
        net = nets.LeNet5(num_classes, in_channels, activation, pooling)
        super().__init__(net=net, num_classes=num_classes, optimizer=optimizer, **kwargs)


class LitBlitzNet(LitClassifier):
    """The four-step image classifier; by default SGD with learning rate 0.001 and momentum 0.9.

    Args:
        num_classes: Number of classes.
        optimizer: Makes the optimizer from the parameters.
        **kwargs: As :class:`LitClassifier`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        optimizer: OptimizerCallable = lambda params: LeanSGD(params, lr=0.001, momentum=0.9),
        **kwargs: Any,
    ) -> None:
        net = nets.BlitzNet(num_classes)
        super().__init__(net=net, num_classes=num_classes, optimizer=optimizer, **kwargs)


class LitConvNet3(LitClassifier):
    """Three convolutions and two linear layers; by default SGD with learning rate 0.01.

    Args:
        num_classes: Number of classes.
        **kwargs: As :class:`LitClassifier`.
    """

    def __init__(self, num_classes: int = 10, **kwargs: Any) -> None:
        super().__init__(net=nets.ConvNet3(num_classes), num_classes=num_classes, **kwargs)


class LitLinearRegression(LitSupervised):
    """w·x + b from w = 1 and b = 0, by mean squared error; by default SGD with learning rate 0.01.

    Args:
        **kwargs: As :class:`LitSupervised`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(net=nets.Line(), criterion=nn.MSELoss(), **kwargs)


class LitEmbedding(LitSupervised):
    """A table of numbers looked up by index, by mean squared error: its gradients are sparse.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Numbers in a row.
        optimizer: Makes the optimizer; one that takes sparse gradients (SparseAdam, SGD, Adagrad).
        **kwargs: As :class:`LitSupervised`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int = 1,
        *,
        optimizer: OptimizerCallable = torch.optim.SparseAdam,
        **kwargs: Any,
    ) -> None:
        net = nn.Embedding(num_embeddings, embedding_dim, sparse=True)
        super().__init__(net=net, criterion=nn.MSELoss(), optimizer=optimizer, **kwargs)


class LitObjective(LitSupervised):
    """Minimises a module whose forward takes nothing and returns a scalar; one step an epoch, no data.

    Args:
        objective: The function, its parameters the variables.
        **kwargs: As :class:`LitSupervised`, without ``metrics``.
    """

    def __init__(self, objective: nn.Module, **kwargs: Any) -> None:
        super().__init__(net=objective, criterion=nn.Identity(), **kwargs)

    def forward(self) -> Tensor:  # type: ignore[override]
        """Return the objective's value, a scalar."""
        value: Tensor = self.net()
        return value

    def compute_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the objective's value; there is no batch."""
        value: Tensor = self()
        return value

    def train_dataloader(self) -> list[int]:
        """Return one empty batch: an epoch is one evaluation."""
        return [0]

    def val_dataloader(self) -> list[int]:
        """Return nothing to validate on."""
        return no_batches()


class MeanLoss(Metric):
    """The mean loss of all samples, from the mean of each batch and its size; on all ranks together.

    Not torchmetrics' MeanMetric: it drops a NaN, or (``nan_strategy="disable"``, torchmetrics 1.9) the weights.
    """

    total: Tensor
    count: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        # float64: the same mean however the samples are shared out; MPS has none
        self._wide = torch.float32 if torch.backends.mps.is_available() else torch.float64
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=self._wide), dist_reduce_fx="sum")

    def update(self, loss: Tensor, size: int) -> None:
        """Add a batch of ``size`` samples with mean ``loss``."""
        # not in place: a validation before the fit has reset them in inference mode; "bf16-true" has rounded them
        self.total = self.total.to(self._wide) + loss.detach().to(self._wide) * size
        self.count = self.count.to(self._wide) + size

    def compute(self) -> Tensor:
        """Return the mean over the samples, a float64 scalar (float32 where there is MPS)."""
        return self.total / self.count


def size_of(inputs: Any, targets: Any) -> int:
    """Return the number of samples of a batch, whose targets may be several tensors: one a task, or one a sample."""
    if isinstance(targets, Mapping):
        targets = list(targets.values())
    if isinstance(targets, (list, tuple)) and all(isinstance(part, Tensor) and part.ndim for part in targets):
        if isinstance(inputs, Tensor):
            return len(inputs)
        if len({len(part) for part in targets}) == 1:
            return len(targets[0])
    return len(targets)


def _primitive_arguments(module: LitSupervised) -> dict[str, Any]:
    """Return the arguments that the outermost ``__init__`` of ``module`` got, without the non-primitive ones.

    Nets, optimizers and the like would make the checkpoint unreadable under ``weights_only``; arguments that
    a subclass passes on to its base must not be handed to the subclass again when it is reloaded.
    """
    frame = inspect.currentframe()
    arguments: dict[str, Any] = {}
    while frame is not None and (frame := frame.f_back) is not None:
        values, inner = inspect.getargvalues(frame), arguments
        if frame.f_code.co_name != "__init__" or not values.args or values.locals[values.args[0]] is not module:
            break
        code = frame.f_code
        names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        arguments = {name: values.locals[name] for name in names}
        if values.varargs:  # passed on to the base, whose names they have
            passed = zip(inner.items(), values.locals[values.varargs], strict=False)
            arguments |= {name: value for (name, value), argument in passed if value is argument}
        if values.keywords:
            arguments |= values.locals[values.keywords]
    plain = {name: _plain(value) for name, value in arguments.items()}
    return {name: value for name, value in plain.items() if _is_primitive(value)}


class _Arguments(dict[str, Any]):
    """A dict that never equals an array: Lightning compares it with each argument, and needs one truth value."""

    __array_ufunc__ = None


def _plain(value: Any) -> Any:
    """Return Python's own number for NumPy's, which no checkpoint can hold."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: _plain(part) for key, part in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the body, let new floating-point tensors be of a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _is_primitive(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_primitive(v) for v in [*value, *value.values()])
    if isinstance(value, (list, tuple)):
        return all(_is_primitive(v) for v in value)
    return type(value) in _PRIMITIVES
