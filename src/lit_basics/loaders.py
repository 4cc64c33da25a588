"""The loaders of a running Trainer: whether the processes share them out, and their places on a resume."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader

from lit_basics.data.loader import GlobalBatches
from lit_basics.data.order import EpochOrder
from lit_basics.errors import UserError


def check_shared_out(trainer: Any, loaders: Any) -> None:
    """Refuse loaders whose order was made for another process than this, or another number of them.

    Args:
        trainer: A Trainer that is running.
        loaders: A loader, or a collection of some.

    Raises:
        UserError: If there is one, unless ``use_distributed_sampler=False`` says that it is shared out in another way.
    """
    # Lightning's private name of that argument; the kwargs are None on one device
    if not trainer._accelerator_connector.use_distributed_sampler:
        return
    shares = trainer.distributed_sampler_kwargs or {}
    rank, processes = shares.get("rank", 0), shares.get("num_replicas", 1)
    for loader in CombinedLoader(loaders).flattened:
        sampler: Any = getattr(loader, "sampler", None)
        order = sampler.order if isinstance(sampler, GlobalBatches) else sampler
        if not isinstance(order, EpochOrder):
            continue
        way_out = "give it rank and world_size, or the DataModule to the Trainer"
        if order is not sampler:  # it counts all processes, those of a tensor-parallel group too
            way_out = "take a torch.utils.data.DataLoader"
        wrong = (order.rank, order.world_size) != (rank, processes)
        if trainer.strategy.reduce_boolean_decision(wrong, all=False):  # one rank alone would let the others wait
            raise UserError(
                f"the loader's EpochOrder is of rank {order.rank} and world_size {order.world_size} on rank {rank} of "
                f"{processes} that share out the data: {way_out} (use_distributed_sampler=False leaves it as it is)"
            )


def states_of_loaders(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the states of the training loaders that Lightning has saved."""
    loops = checkpoint.get("loops") or {"fit_loop": {"state_dict": {}}}  # weights only: there are none
    states: list[dict[str, Any]] = loops["fit_loop"]["state_dict"].get("combined_loader", [])
    return states


def load_loaders(trainer: pl.Trainer, states: list[dict[str, Any]]) -> None:
    """Give our training loaders their states, as Lightning does only where it sets them up after the restore.

    A second time, by another callback or after Lightning, changes nothing.
    """
    if not states or not trainer.fit_loop.restarting:
        return
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    kept = [loader for loader in loaders if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")]
    for loader, state in zip(kept, states, strict=True):
        if getattr(loader, "loads_state_late", False):
            loader.load_state_dict(state)
