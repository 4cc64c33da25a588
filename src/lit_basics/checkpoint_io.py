"""Checkpoints that survive a crash while they are written, and damage afterwards."""

import contextlib
import copy
import io
import itertools
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lit_basics.checkpoint_files import VERSION, checksum_path, installed, load_checked, previous_path, write_state
from lit_basics.files import local_path
from lit_basics.nested import tensors_in

MOST = 10
"""The most entries that a warning each names."""
LOOK_SECONDS = 60.0
"""A save this long after the last look is looked at for what no load would take, beside the 1st, 2nd, 4th, 8th, …"""
PRIMITIVES = (bool, int, float, str, type(None))


class DurableCheckpointIO(CheckpointIO):
    """Lightning's CheckpointIO, made so that one good checkpoint is there at every moment.

    A checkpoint is staged beside its target, synchronised to the disk, read back, and renamed. The one before
    it stays as ``<name>.previous``, and ``<name>.sha256`` holds the checksums of both. A load checks them: a
    damaged file is named and the previous one used. Nothing in a file is ever run (``weights_only``, whatever is asked
    for); a warning names hyper-parameters and other entries with which no load would take the file: at the first save,
    or soon after they appear.

    Usable alone: ``Trainer(plugins=[DurableCheckpointIO()])``.

    Args:
        min_seconds: A file that was written less than this ago is not written again yet: its newest state is
            held in memory until a later save, :meth:`write_due` or the end of the run.
        asynchronous: Whether a thread writes, one save at a time, from a copy in memory: the training waits only
            for that copy, whose memory is kept for the next until the end of the run. An error is raised at the next
            save or at the end.

    After the end of a run each save is made at once; ``LastCheckpoint`` and ``BestLossCheckpoint`` call :meth:`begin`
    when another begins.
    """

    def __init__(self, min_seconds: float = 0.0, asynchronous: bool = False) -> None:
        self.min_seconds = min_seconds
        self.asynchronous = asynchronous
        self._pool: ThreadPoolExecutor | None = None
        self._in_flight: Future[None] | None = None
        self._at_once = False  # the run is over: nothing would write later, or tell of an error
        self._process = os.getpid()
        self._saves = 0
        self._looked_at = float("-inf")  # for what no load would take
        self._refused = False  # such a thing was found
        self._held: dict[Path, dict[str, Any]] = {}
        self._memory: dict[str, Tensor] = {}  # of the last copy that the thread was given
        self._written: dict[Path, float] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, or hold it if the file is too young.

        Args:
            checkpoint: What to save; tensors and primitives.
            path: A local file.
            storage_options: Must be None.

        Raises:
            OSError: If it cannot be written; the file before it stays.
            TypeError: If ``storage_options`` are given.
            UserError: If ``path`` is remote.
        """
        if storage_options is not None:
            raise TypeError("DurableCheckpointIO takes no storage_options")
        self._leave_to_parent()
        target, state = local_path(path), dict(checkpoint)
        if "state_dict" in state:  # ddp_spawn sends the weights alone from process to process
            state[VERSION] = installed("lit_basics")
        self._look_at(state)
        if self._is_young(target):
            self._held[target] = copied(state)
        else:
            self._held.pop(target, None)
            if self.asynchronous and not self._at_once:  # the live weights may change from here on
                if self._in_flight is not None and not self._in_flight.done():
                    self._memory = {}  # the thread still reads it
                state = copied(state, self._memory)
            self._write(target, state)

    def _look_at(self, state: dict[str, Any]) -> None:
        """Warn of what no load would take; a learning rate, or a list of losses, may hold it only later."""
        self._saves += 1
        due = self._saves.bit_count() == 1 or time.monotonic() - self._looked_at >= LOOK_SECONDS
        if self._refused or not due:
            return
        self._looked_at = time.monotonic()
        for keys, value in itertools.islice(refused_in(state, set()), MOST):
            self._refused = True
            what, advice = described(keys, value)
            rank_zero_warn(
                f"{what}, a {type(value).__name__}, makes every checkpoint one that cannot be loaded, since a load "
                f"runs no code: {advice}"
            )

    def _is_young(self, path: Path) -> bool:
        age = time.monotonic() - self._written.get(path, float("-inf"))
        return age < self.min_seconds and not self._at_once

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        self._written[path] = time.monotonic()
        if not self.asynchronous:
            write_state(path, state)
            return
        try:
            self._finish_write()
        finally:  # the newest state is written though the one before it was not
            if self._at_once:
                write_state(path, state)
            else:
                self._pool = self._pool or ThreadPoolExecutor(1)
                self._in_flight = self._pool.submit(write_state, path, state)

    def _leave_to_parent(self) -> None:
        """Forget, in a process that was forked, what its parent has begun: threads stay there."""
        if self._process != os.getpid():
            self.__dict__.update(self.__getstate__(), _process=os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process may have."""
        return {**self.__dict__, "_pool": None, "_in_flight": None, "_held": {}, "_memory": {}}

    def _finish_write(self) -> None:
        self._leave_to_parent()
        if self._in_flight is not None:
            wait([self._in_flight])  # after an interrupt here it is in flight as before
            future, self._in_flight = self._in_flight, None
            future.result()

    def write_due(self) -> None:
        """Write what is held, but where the file is too young still."""
        self._leave_to_parent()
        for path in [path for path in self._held if not self._is_young(path)]:
            self._write(path, self._held.pop(path))

    def flush(self) -> None:
        """Write what is held, each though another cannot be, and wait until all is on the disk."""
        self._leave_to_parent()
        with contextlib.ExitStack() as all_of_it:
            all_of_it.callback(self._finish_write)
            while self._held:
                all_of_it.callback(self._write, *self._held.popitem())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint in ``path`` or, if that is damaged, the one before it.

        Raises:
            UserError: If there is no such file, neither is good, or ``path`` is remote.
        """
        self._finish_write()
        return load_checked(local_path(path), map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint with the one before it; where a thread is writing, it does so if its write succeeds."""
        self._leave_to_parent()
        path = local_path(path)
        self._held.pop(path, None)
        self._written.pop(path, None)
        if self._in_flight is None:
            _remove(path)
        else:
            assert self._pool is not None
            self._in_flight = self._pool.submit(_remove, path, self._in_flight)

    def begin(self) -> None:
        """Let saves be held, or made by the thread, until :meth:`teardown`: a run begins."""
        self._at_once = False

    def teardown(self) -> None:
        """Write what is held; called by the Trainer at its end, also after an exception."""
        try:
            self.flush()
        finally:
            self._at_once, self._memory = True, {}


def _remove(path: Path, after: Future[None] | None = None) -> None:
    if after is not None:
        after.result()  # raises what the write has raised
    for file in (path, previous_path(path), checksum_path(path)):
        if file.is_dir():  # which a strategy has saved in shards, past this
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)


def _is_loadable(value: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # pickle and torch raise many kinds
        return False
    return True


def refused_in(value: Any, seen: set[int], keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield what no load under ``weights_only`` would take within nested dicts, lists and tuples, with its keys.

    >>> [keys for keys, _ in refused_in({"groups": [{"lr": 0.1, "at": Path("a")}], Path("b"): None}, set())]
    [('groups', 0, 'at'), (PosixPath('b'),)]

    Args:
        value: What to look at.
        seen: The ids of what has been looked at: a container may contain itself.
        keys: Those that lead to ``value``.
    """
    if isinstance(value, Tensor) or type(value) in PRIMITIVES or id(value) in seen:
        return
    seen.add(id(value))
    if type(value) in (dict, OrderedDict):
        for key, part in value.items():
            yield from refused_in(key, seen, (*keys, key))
            yield from refused_in(part, seen, (*keys, key))
    elif type(value) in (list, tuple):
        for index, part in enumerate(value):
            yield from refused_in(part, seen, (*keys, index))
    elif not _is_loadable(value):
        yield keys, value


def described(keys: tuple[Any, ...], value: Any) -> tuple[str, str]:
    """Return how to name an entry of a checkpoint, and what to write instead."""
    if keys[0] in ("hyper_parameters", "datamodule_hyper_parameters") and keys[1:]:
        return f"the hyper-parameter {keys[1]}", f"save_hyperparameters(ignore=[{keys[1]!r}]), or save its str()"
    what = "".join(f"[{key!r}]" for key in keys[1:])
    if isinstance(value, np.generic):
        return f"{keys[0]}{what}", f"write {type(value.item()).__name__}({keys[-1]})"
    return f"{keys[0]}{what}", "keep numbers, text and tensors there, in lists and dicts"


def copied(state: dict[str, Any], memory: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Return a copy on the CPU; tensors that share their memory, such as tied weights, do so in the copy.

    Args:
        state: Nested dicts and lists of tensors and primitives.
        memory: Tensors of a copy that nobody reads any more, by their names. The new copy is made in them where
            they fit, several times as fast as in new memory; then they are those of the new copy.
    """
    memory = {} if memory is None else memory
    made: dict[str, Tensor] = {}
    sources: list[Tensor] = []
    targets: list[Tensor] = []

    def copy_of(where: str, tensor: Tensor) -> Tensor:
        old = memory.get(where)
        fits = old is not None and (old.dtype, old.shape, old.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        if old is None or not fits or old.is_inference() or where in made:  # two places may have one name
            old = torch.empty_like(tensor, device="cpu")
        made[where] = old
        sources.append(tensor)
        targets.append(old)
        return old

    copies: dict[int, Any] = {}
    shared: dict[tuple[Any, ...], Tensor] = {}
    alone: dict[int, tuple[str, Tensor] | None] = {}
    for where, tensor in tensors_in(state):
        if tensor.is_cpu and not tensor.requires_grad and not tensor.is_nested:
            if type(tensor) is Tensor and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                pointer = storage.data_ptr()
                whole = storage.nbytes() == tensor.nbytes and pointer not in alone
                alone[pointer] = (where, tensor) if whole else None
            continue
        plain = tensor.detach()  # deepcopy stays on the device, or refuses one in a graph
        if type(plain) is not Tensor or plain.layout != torch.strided or plain.is_nested:
            copies[id(tensor)] = plain.to("cpu", copy=True)
            continue
        # tied weights are several tensors in a state_dict
        same = (plain.device, plain.untyped_storage().data_ptr(), plain.storage_offset())
        key = (*same, plain.dtype, plain.shape, plain.stride())
        shared[key] = copies[id(tensor)] = shared[key] if key in shared else copy_of(where, plain)
    # deepcopy takes ten times as long for a tensor
    copies |= {id(tensor): copy_of(where, tensor) for where, tensor in filter(None, alone.values())}
    if sources:
        torch._foreach_copy_(targets, sources)  # in half the time of a copy_ for each
    copy_: dict[str, Any] = _deep_copy(state, copies)
    memory.clear()
    memory.update(made)
    return copy_


def _deep_copy(value: Any, copies: dict[int, Any]) -> Any:
    """Do what ``copy.deepcopy`` does, in half its time for what checkpoints are made of."""
    kind = type(value)
    if kind in PRIMITIVES:
        return value
    if id(value) in copies:
        return copies[id(value)]
    made: Any
    if kind is list:
        made = copies[id(value)] = [_deep_copy(part, copies) for part in value]
        return made
    if kind is not dict and kind is not OrderedDict:
        return copy.deepcopy(value, copies)
    made = copies[id(value)] = kind((key, _deep_copy(part, copies)) for key, part in value.items())
    if kind is OrderedDict:  # a module's has versions beside it
        vars(made).update(_deep_copy(vars(value), copies))
    return made
