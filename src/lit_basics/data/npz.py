"""Images from an ``.npz`` file with the keys of Keras' ``mnist.npz``."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_basics.data.arrays import ArrayDataModule, ImageArrays
from lit_basics.errors import UserError, first_line

KEYS = ("x_train", "y_train", "x_test", "y_test")


class NpzDataModule(ArrayDataModule):
    """Images of any size from one ``.npz`` file.

    The file holds ``x_train`` and ``x_test``, uint8 of shape (N, H, W, 3), or (N, H, W) or (N, H, W, 1) for
    grey images, and ``y_train`` and ``y_test``, integers of shape (N,) or (N, 1) from 0 on.

    Args:
        path: The file.
        **kwargs: As :class:`~lit_basics.data.arrays.ArrayDataModule`.

    Raises:
        UserError: If there is no such file.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise UserError(f"data.path: there is no file {path}")

    def load(self) -> ImageArrays:
        """Read and check the file.

        Raises:
            UserError: If it cannot be read, is damaged, lacks a key, or holds arrays of a wrong kind.
        """
        try:
            # a file of our own: np.load leaves its one open where the content is not a zip
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                missing = [key for key in KEYS if key not in file]
                if missing:
                    has = ", ".join(file) or "nothing"
                    raise UserError(f"{self.path} lacks the key {missing[0]}; it has {has}")
                arrays = {key: np.asarray(file[key]) for key in KEYS}  # a member that is no array comes as bytes
        except UserError:
            raise
        except Exception as error:  # numpy, zipfile and zlib raise many kinds
            reason = first_line(error)
            if "pickle" in reason.lower():
                reason = "it holds pickled objects, which are never loaded"
            of_machine = isinstance(error, MemoryError) or getattr(error, "errno", None)  # and not of the file
            what = "cannot be read" if of_machine else "is damaged or not an .npz file"
            raise UserError(f"{self.path} {what}: {reason}") from error
        x_train, x_test = self._images(arrays, "x_train"), self._images(arrays, "x_test")
        if x_train.shape[1:] != x_test.shape[1:]:
            raise UserError(
                f"{self.path}: x_train has images of shape {tuple(arrays['x_train'].shape[1:])}, "
                f"but x_test of {tuple(arrays['x_test'].shape[1:])}"
            )
        return ImageArrays(x_train, self._labels(arrays, "train"), x_test, self._labels(arrays, "test"))

    def _images(self, arrays: dict[str, np.ndarray], key: str) -> Tensor:
        images = arrays[key]
        if images.dtype != np.uint8:
            raise UserError(f"{self.path}: {key} has dtype {images.dtype}; it must be uint8")
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
            raise UserError(
                f"{self.path}: {key} has shape {arrays[key].shape}; it must be (N, H, W, 3), (N, H, W) or (N, H, W, 1)"
            )
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def _labels(self, arrays: dict[str, np.ndarray], split: str) -> Tensor:
        key, labels = f"y_{split}", arrays[f"y_{split}"]
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"{self.path}: {key} has dtype {labels.dtype}; it must be an integer type")
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        count = len(arrays[f"x_{split}"])
        if labels.shape != (count,):
            raise UserError(f"{self.path}: {key} has shape {arrays[key].shape}; x_{split} has {count} images")
        if labels.min() < 0 or int(labels.max()) >= 2**31:
            raise UserError(f"{self.path}: {key} has labels from {labels.min()} to {labels.max()}; they start at 0")
        return torch.from_numpy(labels.astype(np.int64))
