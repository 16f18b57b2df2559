"""Arrays of examples: one or several, counted, with rows taken out of them into memory that is used again."""

import contextlib
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfprivacy_ft.errors import DatasetError

__all__ = ["Memory", "aligned", "nested_arrays", "number_of_examples", "take_rows"]

_LARGE = 2**20  # bytes, from where on memory comes from the system each time

_ALIGNMENT = 64  # bytes, of the memory in which TensorFlow keeps a tensor


def nested_arrays(part: Any) -> Any:
    """Data as arrays in tuples and dictionaries: lists of arrays become tuples, a plain list of numbers one array."""
    if isinstance(part, dict):
        return {name: nested_arrays(value) for name, value in part.items()}
    if isinstance(part, tuple) or (isinstance(part, list) and part and all(hasattr(p, "shape") for p in part)):
        return tuple(nested_arrays(p) for p in part)
    return np.asarray(part)


def number_of_examples(x: Any, y: Any, sample_weight: Any = None, *, rows_per_example: int = 1) -> int:
    """The examples in arrays x, y and sample_weight of one length: that length divided by `rows_per_example`.

    Raises:
      DatasetError: there are no examples, a part of one, or the lengths differ.

    Example:
      >>> number_of_examples([[1], [2]], [0, 1])
      2
    """
    if x is None or y is None:
        raise DatasetError("x or y is None: give arrays for both (an autoencoder's labels are its inputs).")
    weights = () if sample_weight is None else np.asarray(sample_weight)
    parts = tf.nest.map_structure(_length, (nested_arrays(x), nested_arrays(y), weights))
    lengths = set(tf.nest.flatten(parts))
    if len(lengths) != 1:
        raise DatasetError(f"x, y and sample_weight hold {sorted(lengths)} examples: give the same number in each.")
    size = lengths.pop()
    if size == 0:
        raise DatasetError("x and y hold no examples: give at least one.")
    if size % rows_per_example:
        raise DatasetError(
            f"x and y hold {size} rows, which is no multiple of rows_per_example={rows_per_example}: fill every example up, "
            "with rows of weight 0 if need be."
        )
    return size // rows_per_example


def _length(part: Any) -> int:
    shape = np.shape(part)
    if not shape:
        raise DatasetError(f"{part!r} is one value: give arrays whose first axis is the examples.")
    return int(shape[0])


def take_rows(
    array: np.ndarray,
    chosen: np.ndarray,
    rows: int,
    empty: Callable[[np.dtype, tuple[int, ...]], np.ndarray],
    fill: float | None = None,
) -> np.ndarray:
    """The chosen rows, then rows of `fill`, or of zeros (empty strings), in an array that `empty` makes."""
    if len(chosen) == len(array) == rows:
        return array  # all of them, in their order
    batch = empty(array.dtype, (rows, *array.shape[1:]))
    # Every index is of a row, and with the mode "raise" NumPy would gather into a buffer of its own first.
    np.take(array, chosen, axis=0, out=batch[: len(chosen)], mode="clip")
    nothing = b"" if array.dtype.hasobject else np.zeros([], array.dtype)  # objects are texts to TensorFlow
    batch[len(chosen) :] = nothing if fill is None else fill
    return batch


def aligned(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An array without values, which TensorFlow takes as it is if it holds numbers: one that begins elsewhere is copied."""
    if dtype.hasobject:
        return np.empty(shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


class Memory:
    """Memory for one batch after another, used again once nobody holds an array in it.

    The system takes about as long to hand out a large piece of fresh memory as it takes to fill it.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def array(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """An array without values, as `aligned` makes it."""
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or size < _LARGE:
            return aligned(dtype, shape)
        block = self._block(size)
        # Whatever is a view of `whole` keeps it alive, since its own memory belongs to no array.
        whole = np.frombuffer(block.data, np.uint8)
        weakref.finalize(whole, self._free.append, block).atexit = False
        return whole[:size].view(dtype).reshape(shape)

    def _block(self, size: int) -> np.ndarray:
        with contextlib.suppress(IndexError):  # none is left, perhaps since another thread took it
            while len(block := self._free.pop()) < size:
                pass  # what has become too small is given back
            return block
        return aligned(np.dtype(np.uint8), (size + size // 8,))
