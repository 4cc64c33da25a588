"""What a run did, step by step, and where another run of the same training departs from it."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.parameter import is_lazy

from lit_basics.callbacks.random_state import generator_states
from lit_basics.execution import StepsInBetween
from lit_basics.finite import are_finite, norms_of
from lit_basics.modules import LitSupervised
from lit_basics.nested import tensors_in
from lit_basics.steps import at_step_boundary

State = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The first place where two runs differ."""

    step: int
    """The optimizer step, from 1, after which they do; 0 is the end of the training."""
    name: str
    """The parameter, buffer or optimizer state."""
    largest: float
    """The largest absolute difference of its elements; infinite for another shape."""

    def __str__(self) -> str:
        return f"{f'at step {self.step}' if self.step else 'at the end'}: {self.name} by {self.largest:.3g}"


@dataclass
class Trace:
    """What one run leaves: its states in ``folder``, and digests of what went into each batch."""

    folder: Path
    steps: int = 0
    batches: dict[int, str] = field(default_factory=dict)
    """Digest of each training batch, by its number in the run."""
    random: dict[int, str] = field(default_factory=dict)
    """Digest of the random generators before each training batch."""
    checkpoints: list[Path] = field(default_factory=list)
    diverged: int = 0
    """The first step after which a trained parameter was not finite, in a run without a reference; 0 if all were."""
    moved: bool = False
    """Whether a parameter, or a buffer of a module without an optimizer, changed in a run without a reference."""
    compared: int = 0
    """Tensors compared with the reference."""
    difference: Difference | None = None
    loader: str = ""
    """The class of the training loader that has no state, or ""."""
    halfway: bool = False
    """Whether an epoch ended amid the batches of a step that the module accumulates by itself."""
    ahead: bool = False
    """Whether a training loader has a state and no length."""

    def compare(self, step: int, state: State, reference: "Trace") -> None:
        """Compare the state after a step with the reference's, and keep the first difference."""
        if self.difference is not None or step > reference.steps:
            return
        expected: State = torch.load(reference.folder / f"{step}.pt", weights_only=True)
        for name in [*expected, *(name for name in state if name not in expected)]:
            self.compared += 1
            largest = largest_difference(state.get(name), expected.get(name))
            if largest:
                self.difference = Difference(step, name, largest)
                return


class Onlooker(Checkpoint):
    """Comes after all other callbacks, and reads as the user's checkpoint callback does before its first save."""

    best_model_path = last_model_path = ""
    best_model_score = dirpath = None


class Tracer(Onlooker):
    """Keeps the state after every optimizer step, or compares it with a reference's.

    Args:
        trace: What to fill.
        reference: What to compare with; without it the states are kept.
        save_to: Saves a checkpoint into this folder wherever a resume is exact, a new file each time.
        last: Saves a checkpoint to this one file instead.
        report: Called with the number of completed steps after each save.
    """

    def __init__(
        self,
        trace: Trace,
        reference: Trace | None = None,
        *,
        save_to: Path | None = None,
        last: Path | None = None,
        report: Any = None,
    ) -> None:
        self.trace, self.reference = trace, reference
        self.save_to, self.last, self.report = save_to, last, report
        self._halfway = False
        self._initial: dict[str, Tensor | None] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where the run starts, with which weights, and whether the loader has a state."""
        self.trace.steps = trainer.global_step
        if self.reference is None:
            fitted: dict[str, Tensor] = dict(pl_module.named_parameters())
            if not any(group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups):
                fitted |= pl_module.named_buffers()  # the module fits them itself
            self._initial = {name: None if is_lazy(value) else comparable(value) for name, value in fitted.items()}
        loaders = CombinedLoader(trainer.train_dataloader).flattened
        loaders = [loader.loader if isinstance(loader, StepsInBetween) else loader for loader in loaders]
        stateless = [type(loader).__name__ for loader in loaders if not hasattr(loader, "state_dict")]
        self.trace.loader = stateless[0] if stateless else ""
        self.trace.ahead = any(hasattr(loader, "state_dict") and sized_len(loader) is None for loader in loaders)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep digests of the batch and of the random state."""
        number = trainer.fit_loop.total_batch_idx
        self.trace.batches[number] = digest(batch)
        self.trace.random[number] = random_digest()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep or compare the state, if an optimizer step was made."""
        stepped = trainer.global_step > self.trace.steps
        # of other modules, Lightning keeps no gradients that are accumulated half-way
        ours = isinstance(pl_module, LitSupervised)
        self._halfway = not (ours or stepped or pl_module.automatic_optimization) and has_gradients(pl_module)
        if stepped:
            self.trace.steps = trainer.global_step
            if self.reference is None and not (self.trace.diverged or finite(pl_module)):
                self.trace.diverged = self.trace.steps
            self.look(self.trace.steps, trainer)
        if at_step_boundary(trainer, halfway=ours) and not self._halfway:
            self._save(trainer, f"batch{trainer.fit_loop.total_batch_idx + 1}.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a checkpoint."""
        self.trace.halfway |= self._halfway and has_gradients(pl_module)  # a validation has dropped them
        self._save(trainer, f"batch{trainer.fit_loop.total_batch_idx + 1}.ckpt")

    def look(self, step: int, trainer: pl.Trainer) -> None:
        """Keep or compare the state after a step, or, as step 0, at the end."""
        state = training_state(trainer.lightning_module, trainer.optimizers)
        if self.reference is None:
            self.trace.moved |= any(largest_difference(state.get(n), before) for n, before in self._initial.items())
            torch.save(state, self.trace.folder / f"{step}.pt")
        elif step or self.trace.steps == self.reference.steps:
            self.trace.compare(step, state, self.reference)

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        path = self.save_to / name if self.save_to else self.last
        # from the end of the run there is nothing to continue
        if path is not None and not (self.reference and trainer.global_step >= self.reference.steps):
            path.parent.mkdir(exist_ok=True)
            trainer.save_checkpoint(path)
            self.trace.checkpoints.append(path)
        if self.report is not None:
            self.report(trainer.global_step)


def training_state(module: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> State:
    """Return copies of parameters, buffers and optimizer state, by name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    held = {**module.state_dict(), **dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: comparable(value) for name, value in held.items() if isinstance(value, Tensor)}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            of = names.get(id(parameter), "a parameter")
            state |= {f"{key} of {of}": comparable(value) for key, value in tensors_in(values)}
    return state


def finite(module: torch.nn.Module) -> bool:
    """Return whether all trained parameters are finite; buffers, such as masks, need not be."""
    return are_finite(p for p in module.parameters() if p.requires_grad)


def has_gradients(module: torch.nn.Module) -> bool:
    """Return whether a gradient is not zero."""
    return bool(norms_of(p.grad for p in module.parameters() if p.grad is not None).any())


def comparable(value: Tensor) -> Tensor:
    """Return a copy that can be compared: of a sparse tensor, for which ``torch.equal`` is not made, a dense one."""
    value = value.detach()
    return value.clone() if value.layout == torch.strided else value.to_dense()


def largest_difference(value: Tensor | None, expected: Tensor | None) -> float:
    """Return the largest absolute difference; 0 only for equal tensors, infinity for another shape or dtype."""
    if value is None or expected is None or value.shape != expected.shape or value.dtype != expected.dtype:
        return float("inf")
    if torch.equal(value, expected):
        return 0.0
    if value.is_complex():
        value, expected = (torch.view_as_real(one.resolve_conj()) for one in (value, expected))
    if not value.is_floating_point():
        return float((value.long() - expected.long()).abs().max())
    difference = (value.double() - expected.double()).abs()
    equal = (value == expected) | (value.isnan() & expected.isnan())  # infinities too, whose difference is NaN
    return float(torch.where(equal, 0.0, difference).nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def rounding(value: Tensor, steps: int) -> float:
    """Return by how much rounding alone can make two runs differ in a tensor, after as many updates of it."""
    if not value.numel() or not (value.is_floating_point() or value.is_complex()):
        return 0.0
    magnitude = float(value.abs().nan_to_num(nan=0.0, posinf=0.0).max())
    # half an eps for weight decay and half an eps for the update, in both runs
    return 2 * steps * torch.finfo(value.dtype).eps * magnitude


def digest(batch: Any) -> str:
    """Return a digest of all tensors and numbers in a batch."""
    total = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> Any:
        if isinstance(value, Tensor):
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if isinstance(value, Tensor) and value.layout == torch.strided:
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(repr(value).encode())
        return value  # of it a container of the same type is made, as a PackedSequence of tensors alone

    apply_to_collection(batch, (Tensor, str, int, float, bool), add)
    return total.hexdigest()


def tensors_of(batch: Any, passed_over: tuple[type, ...] = ()) -> list[Tensor]:
    """Return the tensors in a batch that have a first dimension, but for those in objects of some types."""
    found: list[Any] = []

    def add(value: Any) -> Any:
        found.append(value)
        return value

    apply_to_collection(batch, (Tensor, *passed_over), add)
    return [value for value in found if isinstance(value, Tensor) and value.ndim]


def random_digest() -> str:
    """Return a digest of the states of Python's, NumPy's and torch's generators."""
    return digest(generator_states())
