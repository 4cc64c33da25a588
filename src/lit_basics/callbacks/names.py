"""How parameters are named in metric keys."""

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import nn


class _Named(NamedTuple):
    module: "weakref.ref[nn.Module]"
    ids: list[int]
    parameters: list[tuple[str, nn.Parameter]]


# a walk through a small module costs as much as its step
_known: "weakref.WeakKeyDictionary[torch.optim.Optimizer, _Named]" = weakref.WeakKeyDictionary()


def parameters_by_name(module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that ``optimizer`` trains, with their names in metric keys.

    A prefix that all parameters of the module share (``net.``) and torch.compile's are left out.
    """
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    known = _known.get(optimizer)
    if known is None or known.ids != ids or known.module() is not module:
        wanted, parameters = set(ids), list(module.named_parameters())
        names = short_names(name for name, _ in parameters)
        trained = [(name, p) for name, (_, p) in zip(names, parameters, strict=True) if id(p) in wanted]
        known = _known[optimizer] = _Named(weakref.ref(module), ids, trained)
    return known.parameters


def short_names(names: Iterable[str]) -> list[str]:
    """Return parameter names without the first component if all share it: the attribute that holds the net.

    >>> short_names(["net.conv.weight", "net.conv.bias", "net.head.weight"])
    ['conv.weight', 'conv.bias', 'head.weight']
    >>> short_names(["net._orig_mod.weight", "net._orig_mod.bias"])
    ['weight', 'bias']
    >>> short_names(["weight"])
    ['weight']
    """
    parts = [[p for p in name.split(".") if p != "_orig_mod"] for name in names]
    if all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return [".".join(p) for p in parts]
