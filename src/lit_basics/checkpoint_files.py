"""The files of a checkpoint: itself, the one before it and their checksums, written and read so that one is good."""

import functools
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lit_basics.errors import UserError, first_line, printable
from lit_basics.files import file_sha256, name_beside, replace_file

VERSION = "lit_basics_version"
"""Key of a checkpoint: the version that wrote it."""


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


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; at every moment it or its previous one is whole and has its checksum.

    Raises:
        OSError: If it cannot be written or reads back differently; the old file stays.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
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
        if path.suffix == ".pth":
            raise UserError(f"{path} holds weights only; a run goes on from a .ckpt, such as checkpoints/best.ckpt")
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
