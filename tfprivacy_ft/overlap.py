"""Rows that public and private data share: what a model learned of them from the public copy, no epsilon covers.

Rows are compared by hashes, so that it takes one pass over each. Finds exact copies, up to the rounding of floats; not
crops, rescaled images, other spellings, or other rows of the same person. Needs no TensorFlow.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np

from tfprivacy_ft.errors import DatasetError

__all__ = ["PublicOverlapWarning", "shared_rows", "warn_of_shared_rows"]

_AT_ONCE = 4096  # rows of which copies are made
_DROPPED = 8  # of the 23 bits of a float32 behind its leading one


class PublicOverlapWarning(UserWarning):
    """Rows of the private data are in data that were called public, too: no epsilon covers what was learned there."""


def shared_rows(public: Any, private: Any) -> int:
    """How many rows of the private data are in the public data, too.

    Numbers are equal if they are to about five digits, whatever their dtypes, and whole numbers of whole dtypes if they
    are exactly; text if it is to the letter. Both have to be as a model takes them: an image in 0 .. 255 is another one
    than the same in 0 .. 1.

    Args:
      public: inputs, without labels: an array [m, ...] of numbers or text, or a tuple or dictionary of such.
      private: likewise, [n, ...].

    Returns:
      A number in 0 .. n; 0 where rows have other sizes. It is a figure of private data, without noise.

    Raises:
      DatasetError: the parts of one of them have different lengths, or one is a single value.

    Example:
      >>> shared_rows(np.eye(3), np.eye(3, dtype=np.float32)[[0, 0, 2]])
      3
    """
    theirs, ours = _parts(public), _parts(private)
    if [_width(part) for part in theirs] != [_width(part) for part in ours]:
        return 0
    # Numbers are exact where both sides are whole: token numbers, not measurements.
    whole = [a.dtype.kind in "iub" and b.dtype.kind in "iub" for a, b in zip(theirs, ours, strict=True)]
    known = set(_hashes(theirs, whole))
    return sum(row in known for row in _hashes(ours, whole)) if known else 0


def warn_of_shared_rows(name: str, public: Any, private: Any) -> int:
    """As `shared_rows`, and warns if there are any.

    Args:
      name: what the public data are called.
      public, private: as in `shared_rows`.

    Example:
      >>> warn_of_shared_rows("web images", np.zeros([3, 2]), np.ones([4, 2]))
      0
    """
    count = shared_rows(public, private)
    if count:
        total = len(_parts(private)[0])
        warnings.warn(
            f"{count:,} of {total:,} private rows are among the public data {name!r}, too, and no epsilon covers what a model "
            "learned of them there: train on public data without them, or treat them as public.",
            PublicOverlapWarning,
            stacklevel=2,
        )
    return count


def _parts(data: Any) -> list[np.ndarray]:
    """The arrays of nested data, those of dictionaries by their names."""
    if isinstance(data, Mapping):
        parts = [part for name in sorted(data) for part in _parts(data[name])]
    elif isinstance(data, tuple):
        parts = [part for each in data for part in _parts(each)]
    else:
        parts = [np.asarray(data)]
    if any(not part.shape for part in parts):
        raise DatasetError("one of the data sets holds a single value: give arrays whose first axis is the rows.")
    if len({len(part) for part in parts}) != 1:
        raise DatasetError(
            f"one of the data sets has parts of {sorted({len(p) for p in parts})} rows: give equally many."
        )
    return parts


def _width(part: np.ndarray) -> int:
    return int(np.prod(part.shape[1:]))


def _hashes(parts: list[np.ndarray], whole: list[bool]) -> Iterator[bytes]:
    """16 bytes for each row; that any two of a billion rows collide has a probability of 2e-21."""
    for start in range(0, len(parts[0]), _AT_ONCE):
        columns = [_as_bytes(p[start : start + _AT_ONCE], exact) for p, exact in zip(parts, whole, strict=True)]
        for row in zip(*columns, strict=True):
            yield hashlib.blake2b(b"".join(row), digest_size=16).digest()


def _as_bytes(rows: np.ndarray, exact: bool) -> list[bytes]:
    rows = rows.reshape(len(rows), -1)
    if rows.dtype.kind in "biuf":
        numbers = rows.astype(np.int64) if exact else _rounded(rows)
        return [row.tobytes() for row in np.ascontiguousarray(numbers)]
    return ["\0".join(map(_cell, row)).encode("utf-8", "surrogatepass") for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return f"{float(value):.5g}" if isinstance(value, Real) else str(value)


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest with 15 bits behind the leading one; one zero, and one NaN."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32) + np.float32(0)  # -0 + 0 is 0
    single[np.isnan(single)] = np.nan
    bits = single.view(np.uint32).astype(np.uint64)
    half = np.uint64(1 << (_DROPPED - 1))
    return (((bits + half) >> np.uint64(_DROPPED)) << np.uint64(_DROPPED)).astype(np.uint32)
