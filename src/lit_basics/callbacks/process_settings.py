"""Switches of the whole process, set for one run and put back after it."""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt, see its manual page."""
KEEP = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_MAX: 0}
USUAL = {M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25, M_MMAP_MAX: 65536}
"""Where glibc's own thresholds end in a process that frees large tensors: they rise with what is freed, and any call of
mallopt ends that, so that those of its start would stay."""


class ProcessSettings(pl.Callback):
    """Switches of the whole process that make a CPU run faster, set before the first step and put back after the run.

    ``onednn`` may change how results round; ``keep_memory`` changes no result.

    Args:
        onednn: Whether oneDNN computes convolutions; for small nets torch's own can be faster. None: as it is.
        keep_memory: Whether freed memory is kept by the process instead of given back to the system, which has to
            clear it when it is asked for again. Linux with glibc only.
    """

    def __init__(self, onednn: bool | None = None, keep_memory: bool = False) -> None:
        self.onednn, self.keep_memory = onednn, keep_memory
        self._undo: list[Callable[[], None]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set them."""
        if self.onednn is not None:
            mkldnn: Any = torch.backends.mkldnn  # torch's stub does not know that it can be set
            before = mkldnn.enabled
            self._undo.append(lambda: setattr(mkldnn, "enabled", before))
            mkldnn.enabled = self.onednn
        if self.keep_memory:
            try:
                libc = ctypes.CDLL("libc.so.6")
                set_malloc(libc, KEEP)
            except (OSError, AttributeError):
                rank_zero_warn(f"keep_memory is for glibc; it does nothing on {sys.platform}")
            else:
                self._undo.append(lambda: set_malloc(libc, USUAL))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put them back."""
        while self._undo:
            self._undo.pop()()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put them back."""
        self.teardown(trainer, pl_module, "")


def set_malloc(libc: ctypes.CDLL, values: dict[int, int]) -> None:
    """Call mallopt; and give back what the process holds beyond the new limit."""
    for parameter, value in values.items():
        libc.mallopt(parameter, value)
    libc.malloc_trim(0)
