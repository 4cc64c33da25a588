"""How parameters are named in metric keys."""

import weakref
from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from torch import nn

_Named = list[tuple[str, nn.Parameter]]

_named: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, list[int], _Named]] = weakref.WeakKeyDictionary()
"""For each optimizer: whose parameters it was asked for, their ids, and what was found."""


def trained_parameters(module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> _Named:
    """Return the parameters that ``optimizer`` trains, with their names in metric keys.

    A prefix that all parameters of the module share (``net.``) and torch.compile's are left out.
    """
    # walking through all modules takes longer than the norms of all gradients; this is asked at every step
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    whose, known, found = _named.get(optimizer, (0, [], []))
    if whose != id(module) or known != ids:
        parameters = list(module.named_parameters())
        names = short_names(name for name, _ in parameters)
        found = [(name, p) for name, (_, p) in zip(names, parameters, strict=True) if id(p) in ids]
        _named[optimizer] = (id(module), ids, found)
    return found


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
