"""CIFAR-10 from its binary archive: downloaded once, checked, and kept as arrays."""

import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from lit_basics.data.arrays import ArrayDataModule, ImageArrays
from lit_basics.data.download import download, file_lock
from lit_basics.errors import UserError, first_line
from lit_basics.files import replace_file

ARCHIVE = "cifar-10-binary.tar.gz"
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
ARCHIVE_SIZE = 170_052_171
CACHE = "cifar10-cache.npz"
FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
RECORDS = 10_000
"""Records of each file: a label and an image of 3 · 32 · 32 pixels, uint8."""
IMAGE = (3, 32, 32)
MIRRORS = (
    f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",
    f"https://cave.cs.toronto.edu/kriz/{ARCHIVE}",
)
"""The authors' own server, under its two addresses."""


class CIFAR10DataModule(ArrayDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32 by 32 pixels in ten classes.

    The data folder keeps one file, ``cifar10-cache.npz`` (185 MB, checksummed, no pickle). If it is missing
    or damaged, it is built from the binary archive, which is downloaded (170 MB) and then deleted. An archive
    ``cifar-10-binary.tar.gz`` that lies in the folder already is used, and kept. Processes and jobs may share
    the folder: one of them downloads.

    Args:
        data_dir: The data folder.
        mirrors: Addresses of the archive, tried in turn; whatever they send must have the archive's checksum.
        timeout: Seconds without data after which a mirror is given up.
        **kwargs: As :class:`~lit_basics.data.arrays.ArrayDataModule`.

    Raises:
        UserError: If ``timeout`` is not positive.
    """

    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    """Their names, in the order of the labels."""

    def __init__(
        self,
        data_dir: str = "data",
        *,
        mirrors: Sequence[str] = MIRRORS,
        timeout: float = 30.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not timeout > 0:
            raise UserError(f"timeout is {timeout}; it must be more than 0 seconds")
        self.data_dir = Path(data_dir).expanduser()
        self.mirrors = [mirrors] if isinstance(mirrors, str) else list(mirrors)
        self.timeout = timeout
        self._checked_arrays: ImageArrays | None = None

    def prepare_data(self) -> None:
        """Build the cache, unless there is a good one.

        Raises:
            UserError: If the archive cannot be downloaded or is not what it should be, or the data folder
                cannot be written.
        """
        if self._arrays is not None or self._checked_arrays is not None:
            return
        try:
            # first without the lock: a finished data folder may be read-only
            if self._is_prepared():
                return
            self.data_dir.mkdir(parents=True, exist_ok=True)
            with file_lock(self.data_dir / CACHE):
                if not self._is_prepared():
                    self._build_cache()
        except OSError as error:
            raise self._unusable(error) from error

    def load(self) -> ImageArrays:
        """Read the cache, unless ``prepare_data`` has just read it in this process.

        Raises:
            UserError: If there is none, as where preparing it failed in another process, or it is damaged.
        """
        if self._checked_arrays is not None:
            arrays, self._checked_arrays = self._checked_arrays, None
            return arrays
        try:
            return read_cache(self.data_dir / CACHE)
        except FileNotFoundError as error:
            raise UserError(
                f"there is no {CACHE} in {self.data_dir}: prepare_data has not run, or it failed in another process"
            ) from error
        except OSError as error:
            raise self._unusable(error) from error

    def _is_prepared(self) -> bool:
        try:
            self._checked_arrays = read_cache(self.data_dir / CACHE)
        except FileNotFoundError:
            return False
        except UserError as error:
            warnings.warn(f"{error}; it is built again", stacklevel=2)
            return False
        return True

    def _build_cache(self) -> None:
        archive = self.data_dir / ARCHIVE
        was_there = archive.exists()
        try:
            download(self.mirrors, archive, sha256=ARCHIVE_SHA256, size=ARCHIVE_SIZE, timeout=self.timeout)
        except UserError as error:
            raise UserError(
                f"{error}\nwithout a network, put {ARCHIVE} (the binary version) into {self.data_dir}, "
                "or use --data SyntheticCIFAR10 or --data NpzDataModule --data.path FILE.npz"
            ) from error
        arrays = read_archive(archive)
        with replace_file(self.data_dir / CACHE) as file:
            np.savez(file, **{name: array.numpy() for name, array in arrays._asdict().items()})
        if not was_there:
            archive.unlink()

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"the data folder {self.data_dir} cannot be used: {error.strerror or error}; "
            "name one that can be written with --data.data_dir"
        )


def read_archive(path: Path) -> ImageArrays:
    """Read the images and labels out of the binary archive; nothing is extracted to the disk.

    Args:
        path: The tar.gz file.

    Raises:
        UserError: If one of the six files is missing, twice there, a link or of a wrong size, or has a label
            above 9.
        OSError: If there is no such file.
    """
    records = np.empty((len(FILES), RECORDS, 1 + np.prod(IMAGE)), np.uint8)
    missing = set(FILES)
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:gz") as tar:
                for member in tar:
                    # the folder is of no interest: a name is only looked up, never written to
                    name = PurePosixPath(member.name).name
                    if name not in FILES:
                        continue
                    if name not in missing:
                        raise ValueError(f"{name} is there twice")
                    missing.remove(name)
                    records[FILES.index(name)] = _records(tar, member)
            if missing:
                raise ValueError(f"{min(missing)} is missing")
            images = records[..., 1:].reshape(-1, *IMAGE)
            labels = records[..., 0].reshape(-1).astype(np.int64)
            train = (len(FILES) - 1) * RECORDS
            return _checked(images[:train], labels[:train], images[train:], labels[train:])
        except Exception as error:  # gzip, tarfile and zlib raise a dozen kinds, plain OSError among them
            raise UserError(f"{path} is damaged: {first_line(error)}") from error


def _records(tar: tarfile.TarFile, member: tarfile.TarInfo) -> np.ndarray:
    shape = (RECORDS, 1 + int(np.prod(IMAGE)))
    # a link would be followed by extractfile
    file = tar.extractfile(member) if member.isreg() else None
    if file is None:
        raise ValueError(f"{member.name} is not a regular file")
    if member.size != np.prod(shape):
        raise ValueError(f"{member.name} has {member.size} bytes, not {np.prod(shape)}")
    with file:
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def read_cache(path: Path) -> ImageArrays:
    """Read the images and labels from the cache.

    Raises:
        UserError: If it is damaged: each array has a CRC in the file, and its shape and dtype are known.
        OSError: If there is no such file, or it may not be read.
    """
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return _checked(*(arrays[name] for name in ImageArrays._fields))
        except Exception as error:  # zipfile, zlib, struct and numpy raise a dozen kinds
            if isinstance(error, MemoryError) or getattr(error, "errno", None):  # of the machine, not of the file
                raise
            raise UserError(f"{path} is damaged: {first_line(error)}") from error


def _checked(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> ImageArrays:
    """Return the arrays as tensors.

    Raises:
        ValueError: If a shape, a dtype or a label is not CIFAR-10's.
    """
    classes = len(CIFAR10DataModule.classes)
    for x, y, count in ((x_train, y_train, (len(FILES) - 1) * RECORDS), (x_test, y_test, RECORDS)):
        if (x.shape, y.shape) != ((count, *IMAGE), (count,)) or x.dtype != np.uint8 or y.dtype != np.int64:
            raise ValueError(f"{x.dtype} images of shape {x.shape}, {y.dtype} labels of shape {y.shape}")
        if y.min() < 0 or y.max() >= classes:
            raise ValueError(f"labels from {y.min()} to {y.max()}; there are {classes} classes")
    return ImageArrays(*(torch.from_numpy(array) for array in (x_train, y_train, x_test, y_test)))
