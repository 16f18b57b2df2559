"""Features of a frozen backbone, computed once: in memory, or on disk where memory does not hold them.

A cache on the disk is a function of the private data, to be kept as they are. It is found again by what it was computed
from, inputs and weights, so a run that goes on does not compute it twice.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import tensorflow as tf

from tfprivacy_ft import _own_files
from tfprivacy_ft.arrays import aligned, nested_arrays
from tfprivacy_ft.errors import DatasetError
from tfprivacy_ft.finetune.checkpoints import digest

_ROWS = 128  # computed at once


def compute(model: Any, x: Any, *, cache: str | os.PathLike[str] = "memory") -> np.ndarray:
    """What `model.predict` gives of every row, in the order of the rows.

    Args:
      model: a Keras model with one output, [batch, features].
      x: an array [n, ...], or a tuple or dictionary of them.
      cache: `"memory"`, or a folder in which a .npy file is made, or found, if it was made of the same inputs and weights.

    Returns:
      float32, [n, features]; mapped from the file where there is one.

    Raises:
      DatasetError: the folder cannot be written.

    Example:
      >>> import numpy as np
      >>> from tfprivacy_ft import models
      >>> compute(models.build_model("logistic", (4,), 3), np.zeros([5, 4])).shape
      (5, 3)
    """
    x = nested_arrays(x)
    shape = (len(tf.nest.flatten(x)[0]), int(model.output_shape[-1]))
    if cache == "memory":
        features = aligned(np.dtype(np.float32), shape)
        for number, rows in enumerate(_in_parts(model, x, len(features))):
            features[number * _ROWS : (number + 1) * _ROWS] = rows
        return features
    folder = pathlib.Path(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"features-{_digest(model, x)}.npy"
        if not file.exists():
            aside = file.with_suffix(f".{os.getpid()}.new")
            _own_files.replace(file, lambda writer: _write(writer, model, x, shape), aside=aside)
        return np.load(file, mmap_mode="r")
    except OSError as error:
        raise DatasetError(
            f"the features cannot be kept in {str(folder)!r} ({error}): give Head(cache=...) a folder with room, or 'memory'."
        ) from error


def _write(writer: BinaryIO, model: Any, x: Any, shape: tuple[int, int]) -> None:
    """A .npy file, part by part. Not by a mapped file, which ends the process where the disk is full."""
    header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(writer, header)
    for rows in _in_parts(model, x, shape[0]):
        writer.write(rows.tobytes())


def _in_parts(model: Any, x: Any, size: int) -> Iterator[np.ndarray]:
    """What the model gives, float32, `_ROWS` rows at once."""
    specs = tf.nest.map_structure(lambda part: tf.TensorSpec([None, *part.shape[1:]], part.dtype), x)
    traced = tf.function(lambda rows: tf.cast(model(rows, training=False), tf.float32))
    forward = traced.get_concrete_function(specs)  # called by itself, each model's would seem one function traced again
    for start in range(0, size, _ROWS):
        rows = tf.nest.map_structure(lambda part, start=start: tf.constant(part[start : start + _ROWS]), x)
        yield forward(rows).numpy()


def _digest(model: Any, x: Any) -> str:
    arrays = (*model.get_weights(), *tf.nest.flatten(x))
    return hashlib.sha256("".join([model.to_json(), *map(digest, arrays)]).encode()).hexdigest()[:32]
