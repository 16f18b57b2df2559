"""Features of a frozen backbone, computed once: in memory, or on disk where memory does not hold them.

A cache on the disk is a function of the private data, to be kept as they are. It is found again by what it was computed
from, inputs and weights, so a run that goes on does not compute it twice.
"""

import hashlib
import os
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

from tfprivacy_ft.errors import DatasetError
from tfprivacy_ft.sampling import nested_arrays

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
        features = np.empty(shape, np.float32)
        _fill(features, model, x)
        return features
    folder = pathlib.Path(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"features-{_digest(model, x)}.npy"
        if not file.exists():
            aside = file.with_suffix(f".{os.getpid()}.new")
            made = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=shape)
            _fill(made, model, x)
            made.flush()
            del made
            os.replace(aside, file)  # whole, or not there
        return np.load(file, mmap_mode="r")
    except OSError as error:
        raise DatasetError(
            f"the features cannot be kept in {str(folder)!r} ({error}): give Head(cache=...) a folder with room, or 'memory'."
        ) from error


def _fill(features: np.ndarray, model: Any, x: Any) -> None:
    forward = tf.function(lambda rows: model(rows, training=False), reduce_retracing=True)
    for start in range(0, len(features), _ROWS):
        rows = tf.nest.map_structure(lambda part, start=start: tf.constant(part[start : start + _ROWS]), x)
        features[start : start + _ROWS] = forward(rows)


def _digest(model: Any, x: Any) -> str:
    digest = hashlib.sha256(model.to_json().encode())
    for array in (*model.get_weights(), *tf.nest.flatten(x)):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]
