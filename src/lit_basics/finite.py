"""Whether tensors hold NaN or infinity: tensors of every dtype and layout, and many of them quickly."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_USUAL = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_ONE = torch.ones(1, dtype=torch.float32, device="cpu")


def norms_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the norm of each tensor, without a host sync. In float64 no float32 tensor's norm overflows."""
    plain = plain_parts(tensors)
    if not plain:
        return torch.zeros(0)
    device = plain[0].device
    norms = torch._foreach_norm(plain, 2, dtype=torch.float32 if device.type == "mps" else torch.float64)
    return torch.stack([norm.to(device) for norm in norms])


def are_finite(tensors: Iterable[Tensor], quickly: bool = False) -> bool:
    """Return whether all tensors are finite; False may be wrong for numbers beyond 1e154.

    Args:
        tensors: Tensors of any kind.
        quickly: Whether those on the CPU are looked at in the quickest way, which writes each number as it is.
    """
    plain = plain_parts(tensors)
    if not quickly or not plain or not all(value.is_cpu for value in plain):
        return bool(torch.isfinite(norms_of(plain)).all())
    # the GradScaler's kernel: a third of the time of the norms
    found = torch.zeros(1, dtype=torch.float32, device="cpu")
    torch._amp_foreach_non_finite_check_and_unscale_(plain, found, _ONE)
    return not found.item()


def is_finite(value: Tensor | None) -> bool:
    """Return whether all numbers of a tensor are finite; a gradient that is not there has none."""
    return value is None or all(bool(torch.isfinite(part).all()) for part in plain_parts([value]))


def holds(value: Tensor, what: Callable[[Tensor], Tensor]) -> bool:
    """Return whether ``what``, such as ``torch.isnan``, is true of a number of a tensor."""
    return any(bool(what(part).any()) for part in plain_parts([value]))


def plain_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return floating-point tensors as dense, local, real ones; the others hold nothing non-finite."""
    plain = []
    for value in tensors:
        if value.dtype in _USUAL and type(value) is Tensor and not value.requires_grad and not value.is_sparse:
            plain.append(value)  # nearly always: what follows takes ten times as long
            continue
        value = value.detach()
        value = value.to_local() if hasattr(value, "to_local") else value
        value = value.coalesce().values() if value.is_sparse else value
        value = torch.view_as_real(value) if value.is_complex() else value
        if value.is_floating_point():
            plain.append(value.float() if value.dtype.itemsize == 1 else value)
    return plain
