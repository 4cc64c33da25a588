"""Tensors within dicts, lists and tuples, as states are."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def tensors_in(value: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a nested value, each with its keys.

    >>> import torch
    >>> [where for where, _ in tensors_in({"step": torch.tensor(1), "old": {"d": [torch.ones(2), None, 0.5]}})]
    ['step', 'old.d[0]']
    """
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors_in(part, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from tensors_in(part, f"{where}[{index}]")
