"""The state of every random generator of every process, in the checkpoint."""

import math
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lit_basics.callbacks.last import go_behind
from lit_basics.loaders import check_shared_out, load_loaders, states_of_loaders

CPU = torch.device("cpu")


class RandomState(pl.Callback):
    """Saves the state of Python's, NumPy's and torch's generators, and of the device's; restores it on a resume.

    Lightning saves none. Each process gets its own back, and that of its GPU, whichever that is now. Works in any
    Lightning project. Where a fit begins, it seeds torch in each process but the first by its rank, so that dropout
    and torchvision's transforms differ among them. Python's and NumPy's generators stay as they are: what processes
    have to draw alike, such as the order of files, may come from those. It also keeps Lightning 2.6 from ending an
    epoch a second time, and leaving one out, when a run with ``max_steps`` is resumed at an epoch's end, gives our
    loaders their place where ``configure_optimizers`` read ``trainer.estimated_stepping_batches``, which makes
    Lightning forget it, lets a ``GradientAccumulationScheduler`` go on within an epoch, and warns if the number of
    threads, or the kind of device, is another.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._loader_states: list[dict[str, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Go behind a ``GradientAccumulationScheduler``, whose ``on_train_start`` refuses a number other than 1."""
        if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):  # type: ignore[attr-defined]
            go_behind(trainer, self)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the states of all ranks into the checkpoint; every rank must be here, as in any save."""
        own = generator_states(trainer.strategy.root_device)
        states = [own]
        # world_size stays after a training in processes that were spawned, and the processes do not
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            states = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(states, own)
        checkpoint["random_state"] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep this rank's state until training starts: what comes before it draws too."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        states = checkpoint.get("random_state", [])
        self._loaded = states[trainer.global_rank] if len(states) == trainer.world_size else None
        self._loader_states = states_of_loaders(checkpoint)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore this rank's state after a resume, or seed by its rank.

        Raises:
            UserError: If the training loader is not shared out over the processes.
        """
        check_shared_out(trainer, trainer.train_dataloader)
        states, self._loader_states = self._loader_states, []
        load_loaders(trainer, states)
        loaders = CombinedLoader(trainer.train_dataloader).flattened
        if math.isinf(trainer.num_training_batches) and any(hasattr(loader, "loads_state_late") for loader in loaders):
            rank_zero_warn(
                "beside a loader without a length, Lightning draws one batch ahead, which a run that is resumed within "
                "an epoch leaves out: give it __len__, or limit_train_batches a number"
            )
        if trainer.fit_loop.restarted_mid_epoch:  # Lightning then calls no on_train_epoch_start
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # public, but set dynamically
                if isinstance(callback, GradientAccumulationScheduler):
                    callback.on_train_epoch_start(trainer)
        state, self._loaded = self._loaded, None
        if state is not None:
            self._restore_last(trainer.strategy, state)
            if state["threads"] != torch.get_num_threads():
                rank_zero_warn(
                    f"the run had {state['threads']} threads, here are {torch.get_num_threads()}: sums may round "
                    f"differently; OMP_NUM_THREADS={state['threads']} gives the same"
                )
        # of those that share out the data: within a tensor-parallel group all draw the same
        elif rank := (trainer.distributed_sampler_kwargs or {}).get("rank", 0):
            seed_by_rank(rank)
        loop = trainer.fit_loop
        if loop.restarted_on_epoch_end:  # with max_steps only; without, Lightning itself begins the next epoch
            loop.epoch_progress.increment_completed()
            loop.reset_restart_stage()
            loop.epoch_loop.restarting = False

    def _restore_last(self, strategy: Strategy, state: dict[str, Any]) -> None:
        """Set a state after the ``on_train_start`` of the module, which may draw there; the strategy's comes last."""

        def on_train_start() -> None:
            del vars(strategy)["on_train_start"]
            strategy.on_train_start()
            set_generator_states(state, strategy.root_device)

        vars(strategy)["on_train_start"] = on_train_start

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the state if nothing was left to train: it is not that of the next fit."""
        self._loaded, self._loader_states = None, []
        vars(trainer.strategy).pop("on_train_start", None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Forget the state of a fit that failed before it trained."""
        self.on_fit_end(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the state now if a ``Tuner``, whose searches end without the hooks above, has put it back."""
        if self._loaded is not None:
            set_generator_states(self._loaded, trainer.strategy.root_device)
        self.on_fit_end(trainer, pl_module)


def seed_by_rank(rank: int) -> None:
    """Seed torch's generators, also those of the devices, from their seed, which the processes share, and the rank."""
    state = np.random.SeedSequence((torch.initial_seed(), rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


def generator_states(device: torch.device = CPU) -> dict[str, Any]:
    """Return the states of this process's generators, as tensors and primitives, and its number of threads.

    Args:
        device: The device that it trains on.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "device": (device.type, _device_state(device)),
        "threads": torch.get_num_threads(),
    }


def set_generator_states(states: dict[str, Any], device: torch.device = CPU) -> None:
    """Set what :func:`generator_states` returned.

    Args:
        states: What it returned.
        device: The device that this process trains on.
    """
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, words, *rest = states["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    kind, state = states["device"]
    if kind != device.type:
        rank_zero_warn(f"the run was on {kind}, here it is on {device.type}, which draws other random numbers")
    elif state is not None:
        getattr(torch, kind).set_rng_state(state.cpu(), device)


def _device_state(device: torch.device) -> Tensor | None:
    # not where CUDA is merely available: it would be initialised, and processes could not be forked any more
    if device.type == "mps" or (device.type == "cuda" and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        state: Tensor = getattr(torch, device.type).get_rng_state(device)
        return state
    return None
