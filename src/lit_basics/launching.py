"""The processes that Lightning starts for other ranks: they leave after the one that starts them, and with it."""

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LAUNCHER = "LIT_BASICS_LAUNCHER"
"""Carries the process number of rank 0 to the processes that Lightning starts."""
LAUNCHER_SECONDS = 180.0
"""How long a process waits for the one that has started it to leave first, which may have to finish a W&B run."""


@contextmanager
def ending_with_launcher() -> Iterator[None]:
    """Within the body, end this process if rank 0 has started it and has gone before the ranks were connected.

    It would wait half an hour for a rank 0 that was killed. Once they are connected, the next exchange fails.

    At the body's end, unless it failed, the ranks are disconnected: Lightning leaves gloo's threads to Python's exit,
    which they now and then turn into an abort.
    """
    connected = torch.distributed.is_initialized()
    first = not int(os.environ.get("LOCAL_RANK", 0))
    if first:
        os.environ[_LAUNCHER] = str(os.getpid())
    launcher, over = int(os.environ.get(_LAUNCHER, os.getpid())), threading.Event()

    def watch() -> None:
        while not over.wait(0.5) and not torch.distributed.is_initialized():
            if os.getppid() != launcher:
                os.kill(os.getpid(), signal.SIGTERM)

    if launcher != os.getpid():
        threading.Thread(target=watch, daemon=True).start()
    whole = False
    try:
        yield
        whole = True
    except SystemExit:  # all ranks leave, stopped by a signal or a guard
        whole = True
        raise
    finally:
        over.set()
        if first:
            del os.environ[_LAUNCHER]  # what this process starts later has another launcher
        if whole and torch.distributed.is_initialized() and not connected:
            gc.collect()  # a module in DistributedDataParallel holds the group
            torch.distributed.destroy_process_group()


def let_launcher_leave(world_size: int) -> None:
    """Wait until the rank that has started this process has left, if one has.

    Lightning's launcher kills its own process when one that it has started ends with a code other than 0. All ranks
    must be here.
    """
    ranks: list[Any] = [0] * world_size
    torch.distributed.all_gather_object(ranks, os.getpid())
    launcher, deadline = os.getppid(), time.monotonic() + LAUNCHER_SECONDS
    while launcher in ranks and os.getppid() == launcher and time.monotonic() < deadline:
        time.sleep(0.02)
