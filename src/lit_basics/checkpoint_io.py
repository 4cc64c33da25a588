"""Checkpoints that survive a crash while they are written, and damage afterwards."""

import contextlib
import copy
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import time
import traceback
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lit_basics.errors import UserError, first_line, printable
from lit_basics.files import file_sha256, local_path, name_beside, replace_file
from lit_basics.nested import tensors_in

VERSION = "lit_basics_version"
"""Key of a checkpoint: the version that wrote it."""
LARGE = 1 << 16
"""Bytes of a tensor from which new memory takes longer than to look for memory that is there."""
MOST = 10
"""The most entries that a warning each names."""


class DurableCheckpointIO(CheckpointIO):
    """Lightning's CheckpointIO, made so that one good checkpoint is there at every moment.

    A checkpoint is staged beside its target, synchronised to the disk, read back, and renamed. The one before
    it stays as ``<name>.previous``, and ``<name>.sha256`` holds the checksums of both. A load checks them: a
    damaged file is named and the previous one used. Nothing in a file is ever run (``weights_only``, whatever is asked
    for); at the first save a warning names hyper-parameters and other entries with which no load would take the file.

    Usable alone: ``Trainer(plugins=[DurableCheckpointIO()])``.

    Args:
        min_seconds: A file that was written less than this ago is not written again yet: its newest state is
            held in memory until a later save, :meth:`write_due` or the end of the run.
        asynchronous: Whether a thread writes, one save at a time, from a copy in memory: the training waits only
            for that copy, whose memory is kept for the next until the end of the run. An error is raised at the next
            save or at the end.
    """

    def __init__(self, min_seconds: float = 0.0, asynchronous: bool = False) -> None:
        self.min_seconds = min_seconds
        self.asynchronous = asynchronous
        self._pool: ThreadPoolExecutor | None = None
        self._in_flight: Future[None] | None = None
        self._process = os.getpid()
        self._looked = False  # for what no load would take
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
        if not self._looked:
            self._looked = True
            for keys, value in itertools.islice(refused_in(state, set()), MOST):
                what, advice = described(keys, value)
                rank_zero_warn(
                    f"{what}, a {type(value).__name__}, makes every checkpoint one that cannot be loaded, since a load "
                    f"runs no code: {advice}"
                )
        if self._is_young(target):
            self._held[target] = copied(state)
        else:
            self._held.pop(target, None)
            if self.asynchronous:  # the live weights may change from here on
                if self._in_flight is not None and not self._in_flight.done():
                    self._memory = {}  # the thread still reads it
                state = copied(state, self._memory)
            self._write(target, state)

    def _is_young(self, path: Path) -> bool:
        return time.monotonic() - self._written.get(path, float("-inf")) < self.min_seconds

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        self._written[path] = time.monotonic()
        if not self.asynchronous:
            write_state(path, state)
            return
        try:
            self._finish_write()
        finally:  # the newest state is written though the one before it was not
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
        """Remove a checkpoint with the one before it."""
        self._held.pop(Path(path), None)
        self._written.pop(Path(path), None)
        self._finish_write()
        for file in (Path(path), previous_path(Path(path)), checksum_path(Path(path))):
            file.unlink(missing_ok=True)

    def teardown(self) -> None:
        """Write what is held; called by the Trainer at its end, also after an exception."""
        self.flush()
        self._memory = {}


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
    if isinstance(value, Tensor) or type(value) in (bool, int, float, str, type(None)) or id(value) in seen:
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


def previous_path(path: Path) -> Path:
    """Return where the checkpoint before ``path`` is kept."""
    return path.with_name(name_beside(path) + ".previous")


def checksum_path(path: Path) -> Path:
    """Return where the checksums of ``path`` and of the one before it are kept."""
    return path.with_name(name_beside(path) + ".sha256")


def is_there(path: Path) -> bool:
    """Return whether there is a checkpoint ``path``, or the one before it."""
    return path.exists() or previous_path(path).exists()


def free_name(path: Path) -> Path:
    """Return the first of ``last-1.ckpt``, ``last-2.ckpt``, … that no checkpoint has."""
    return next(p for n in itertools.count(1) if not is_there(p := path.with_stem(f"{path.stem}-{n}")))


def move_aside(path: Path) -> None:
    """Give a checkpoint and what lies beside it, if they are there, the next :func:`free_name`."""
    aside = free_name(path)
    for name in (Path, previous_path, checksum_path):
        if name(path).exists():
            name(path).rename(name(aside))


def copied(state: dict[str, Any], memory: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Return a copy on the CPU; tensors that share their memory, such as tied weights, do so in the copy.

    Args:
        state: Nested dicts and lists of tensors and primitives.
        memory: Tensors of a copy that nobody reads any more, by their names. The new copy is made in them where
            they fit, several times as fast as in new memory; then they are those of the new copy.
    """
    memory = {} if memory is None else memory
    made: dict[str, Tensor] = {}

    def copy_of(where: str, tensor: Tensor) -> Tensor:
        tensor, old = tensor.detach(), memory.get(where)
        if type(tensor) is not Tensor or tensor.layout != torch.strided:
            return tensor.to("cpu", copy=True)
        fits = old is not None and (old.dtype, old.shape, old.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        if old is None or not fits or old.is_inference() or where in made:  # two places may have one name
            made[where] = tensor.to("cpu", copy=True)
        else:
            made[where] = old.copy_(tensor)
        return made[where]

    copies: dict[int, Any] = {}
    alone: dict[int, tuple[str, Tensor] | None] = {}
    for where, tensor in tensors_in(state):
        if tensor.device.type != "cpu" or tensor.requires_grad:  # deepcopy stays on the device, or refuses
            copies[id(tensor)] = copy_of(where, tensor)
        elif type(tensor) is Tensor and tensor.layout == torch.strided:
            pointer = tensor.untyped_storage().data_ptr()
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            alone[pointer] = (where, tensor) if whole and pointer not in alone else None
    # deepcopy takes ten times as long for a small tensor
    for where, tensor in filter(None, alone.values()):
        copies[id(tensor)] = tensor.clone() if tensor.nbytes < LARGE else copy_of(where, tensor)
    copy_ = copy.deepcopy(state, copies)
    memory.clear()
    memory.update(made)
    return copy_


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; at every moment it or its previous one is whole and has its checksum.

    Raises:
        OSError: If it cannot be written or reads back differently; the old file stays.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for left in path.parent.glob(f".{glob.escape(name_beside(path))}.*"):  # by a save that was killed
        left.unlink(missing_ok=True)
    known = known_digests(path)
    good, digest = _good_digest(path, known), hashlib.sha256(buffer.getbuffer()).hexdigest()

    def check_and_keep(staged: Path) -> None:
        if file_sha256(staged) != digest:
            raise OSError(f"{path} could not be written: the disk returns other bytes")
        # before the files change: whichever of them a crash leaves, and however many crashes, their sums are listed
        stays = good or _good_digest(previous_path(path), known)
        with replace_file(checksum_path(path)) as sums:
            sums.write(json.dumps(list(dict.fromkeys([digest, *filter(None, [stays]), *known]))[:4]).encode())
        if good:  # a damaged file must not take the place of the good one before it
            _keep_as_previous(path)

    with replace_file(path, check_and_keep) as file:
        file.write(buffer.getbuffer())


def _good_digest(path: Path, known: list[str]) -> str | None:
    """Return the SHA-256 of a file if it is known, or if none is; None if it is damaged or not there."""
    digest = file_sha256(path) if path.is_file() else None
    return digest if digest in known or not known else None


def _keep_as_previous(path: Path) -> None:
    link = path.with_name(f".{name_beside(path)}.link")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, link)
    os.replace(link, previous_path(path))
    link.unlink(missing_ok=True)  # a rename onto the same file does nothing


def known_digests(path: Path) -> list[str]:
    """Return the SHA-256 sums kept beside ``path``, the newest first; none if there are none."""
    try:
        return [str(digest) for digest in json.loads(checksum_path(path).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def load_checked(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the checkpoint in ``path`` or, if that is damaged, the one before it; no code is run.

    Raises:
        UserError: If there is no such file or neither is good.
    """
    if not is_there(path):
        raise UserError(f"there is no checkpoint {path}")
    reasons = []
    for file in (path, previous_path(path)):
        if file == previous_path(path) and not file.exists():
            break
        try:
            checkpoint = _load(file, known_digests(path), map_location)
        except UserError as error:
            reasons.append(str(error))
        except Exception as error:  # torch.load raises many kinds
            reasons.append(f"{file} is damaged or not a checkpoint: {printable(first_line(error))[:150]}")
        else:
            check_versions(checkpoint, file)
            if reasons:
                rank_zero_warn(f"{reasons[0]}; going on from {file}")
            return checkpoint
    raise UserError(reasons[0])


def _load(path: Path, digests: list[str], map_location: Any) -> dict[str, Any]:
    if not path.is_file():
        raise OSError("a folder" if path.is_dir() else "no such file")
    if digests and file_sha256(path) not in digests:
        raise ValueError("its SHA-256 is not the one that was written")
    if not zipfile.is_zipfile(path):
        raise ValueError("no archive of torch.save")
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()  # torch.load does not look at the checksums
    if broken is not None:
        raise ValueError(f"the checksum of {broken} is wrong")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        names = ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
        if not names:
            raise
        raise UserError(
            f"{path} holds objects that a safe load refuses: {printable(names)[:150]}; "
            "torch.serialization.add_safe_globals allows those that you trust"
        ) from error
    if not isinstance(checkpoint, dict) or not ("state_dict" in checkpoint or digests):
        raise ValueError("it has no state_dict")
    return checkpoint


def is_whole(path: Path) -> bool:
    """Return whether a file has the checksum that was written with it."""
    return path.is_file() and file_sha256(path) in known_digests(path)


def check_versions(checkpoint: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint that a newer lit_basics or Lightning wrote: it may hold what this one would drop.

    Raises:
        UserError: If the major version (before 1.0 the minor one too) is higher than the one installed.
    """
    for name, wrote, here in (
        ("lit_basics", checkpoint.get(VERSION), installed("lit_basics")),
        ("lightning", checkpoint.get("pytorch-lightning_version"), installed("lightning")),
    ):
        if isinstance(wrote, str) and _series(wrote) > _series(here):
            raise UserError(f"{path} was written by a newer {name}, {wrote}; here is {here}: upgrade {name} to use it")


@functools.cache  # the look-up takes as long as a tenth of a small save
def installed(package: str) -> str:
    """Return the version of an installed package."""
    return version(package)


def _series(number: str) -> tuple[int, int]:
    major, minor, *_ = [*(int(part) for part in re.findall(r"\d+", number)), 0, 0]
    return major, 0 if major else minor


def load_weights(model: pl.LightningModule, path: Path) -> bool:
    """Load a checkpoint's weights, but not into a module that is not complete yet, which Lightning does later.

    Returns:
        Whether they are loaded.

    Raises:
        UserError: If the file is no checkpoint, is damaged, or is of another model.
    """
    checkpoint = load_checked(path)
    if any(is_overridden(hook, model) for hook in ("configure_model", "setup", "on_load_checkpoint")):
        return False  # layers, or the checkpoint's names, may be made there
    try:
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise of_another_model(path, model, error) from error
    return True


def is_restoring(error: Exception) -> bool:
    """Return whether an error came from within the functions of Lightning that give a state back."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(
        f.name in ("_restore_modules_and_callbacks", "restore_training_state", "load_state_dict") for f in frames
    )


def of_another_model(path: Path, model: pl.LightningModule, error: Exception) -> UserError:
    """Return what to say where a checkpoint's weights do not fit."""
    head, *keys = str(error).splitlines() or [""]
    reason = keys[0].strip()[:150] if keys else head
    return UserError(f"{path} is a checkpoint of another model than {type(model).__name__}: {reason}")
