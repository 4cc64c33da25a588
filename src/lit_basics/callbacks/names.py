"""How parameters are named in metric keys."""

from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from torch import nn


def trained_parameters(module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that ``optimizer`` trains, with their names in metric keys.

    A prefix that all parameters of the module share (``net.``) and torch.compile's are left out.
    """
    parameters = list(module.named_parameters())
    names = short_names(name for name, _ in parameters)
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, (_, p) in zip(names, parameters, strict=True) if id(p) in ids]


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
