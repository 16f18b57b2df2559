"""Tables: files of columns, and their columns as arrays of numbers, or one sentence on what keeps one from being that.

Promises: nothing is encoded, scaled, filled in or left out by what the rows hold, since a code, a mean or a range that is
taken from private rows is a release; no value of the table is shown in an error. A table is a mapping from names to
columns, which a pandas.DataFrame is, too; pandas is imported only to read a file.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfprivacy_ft import datasets
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError, MissingDependencyError

_NAMES_SHOWN = 20
_READERS = (".csv", ".parquet", ".npz")


def read_table(path: str | os.PathLike[str]) -> Mapping[Any, Any]:
    """Reads a file of columns.

    Args:
        path: Ends in .csv or .parquet, which come as a `pandas.DataFrame`, or in .npz, which comes as arrays by name.

    Raises:
        DatasetError: The file is not there, cannot be read, or ends in something else.
        MissingDependencyError: pandas, or for .parquet pyarrow, is not installed.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "table.npz"
        >>> np.savez(path, owner=["ann", "bob"], age=[61, 47])
        >>> sorted(read_table(path))
        ['age', 'owner']
    """
    path = pathlib.Path(path)
    check_suffix(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        import pandas

        return (
            pandas.read_csv(path, float_precision="round_trip") if path.suffix == ".csv" else pandas.read_parquet(path)
        )
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {path.suffix} files needs pandas and pyarrow: install them by pip install 'tfprivacy_ft[tables]'."
        ) from error
    except Exception as error:  # what these readers raise on a damaged file is of every kind
        why = error.strerror if isinstance(error, OSError) and error.strerror else f"no {path.suffix} file of columns"
        raise DatasetError(f"data={str(path)!r} cannot be read ({why}): give a file that can.") from error


def names(table: Any) -> list[Any]:
    """The names of the columns.

    Raises:
        DatasetError: It is no table, or has no columns.
    """
    if not (hasattr(table, "keys") and hasattr(table, "__getitem__")):
        raise DatasetError(
            f"table is a {type(table).__name__}: give a pandas.DataFrame, or a dictionary from names to columns."
        )
    found = list(table.keys())
    if not found:
        raise DatasetError("the table has no columns: give one for the owner, one for the label and some features.")
    return found


def keys(table: Any, name: Any) -> np.ndarray:
    """A column of keys, such as who owns a row, (n,)."""
    values = _column(table, name)
    if values.ndim != 1:
        raise DatasetError(f"column {name!r} has shape {values.shape}: give one key per row.")
    return values


def numbers(table: Any, name: Any) -> np.ndarray:
    """A column of finite numbers, (n, ...)."""
    values = _column(table, name)
    if values.dtype.kind == "O" and all(isinstance(value, int | float | np.number | np.bool_) for value in values.flat):
        values = np.array(values.tolist())
    if values.dtype.kind not in "biuf":
        kind = {"M": "dates", "m": "durations", "U": "text", "S": "text", "O": "text or other objects"}
        raise DatasetError(
            f"column {name!r} holds {kind.get(values.dtype.kind, str(values.dtype))} where numbers are needed: encode it "
            "beforehand, by a list that you know without looking at the rows, or leave it out of the features."
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DatasetError(f"column {name!r} holds infinite values: replace them, or leave these rows out.")
    return values


def features(table: Any, chosen: Sequence[Any]) -> np.ndarray:
    """Columns side by side, float32 (n, features); a single one that holds arrays, (n, ...), as it is."""
    if not chosen:
        raise DatasetError("there are no features: give at least one column besides those of the owner and the label.")
    parts = {name: numbers(table, name) for name in chosen}
    if len(parts) < len(chosen):
        raise DatasetError(f"features={list(chosen)} names a column twice: give each once.")
    if len(parts) == 1 and parts[chosen[0]].ndim > 1:
        return parts[chosen[0]]
    for name, part in parts.items():
        if part.shape != (len(parts[chosen[0]]),):
            raise DatasetError(
                f"column {name!r} has shape {part.shape}, where {chosen[0]!r} has {parts[chosen[0]].shape}: give one number per "
                "row in each, or columns of arrays as the only feature."
            )
    return np.stack(list(parts.values()), axis=1).astype(np.float32)


def labels(table: Any, name: Any) -> np.ndarray:
    """A column of labels: int32 where all are whole numbers, else float32."""
    values = numbers(table, name)
    whole = np.all(values == np.trunc(values)) and np.all(np.abs(values.astype(float)) < 2**31)
    return values.astype(np.int32 if whole else np.float32)


def _column(table: Any, name: Any) -> np.ndarray:
    known = names(table)
    if name not in known:
        shown = ", ".join(str(each) for each in known[:_NAMES_SHOWN])
        more = f" and {len(known) - _NAMES_SHOWN} more" if len(known) > _NAMES_SHOWN else ""
        raise DatasetError(f"column {name!r} is not in the table: it has {shown}{more}.")
    if known.count(name) > 1:
        raise DatasetError(
            f"column {name!r} is {known.count(name)} times in the table: give each column a name of its own."
        )
    values = np.asarray(table[name])
    if values.ndim == 0:
        raise DatasetError(f"column {name!r} is one value: give one per row.")
    if missing := count_missing(values):
        raise DatasetError(
            f"column {name!r} lacks {missing} of {values.size} values: leave these rows out, or fill them with a constant that "
            "you know without looking at the others."
        )
    return values


def count_missing(values: np.ndarray) -> int:
    """How many are None, not a number, no date, or missing to pandas."""
    if values.dtype.kind == "O":
        return sum(map(_is_missing, values.flat))
    if values.dtype.kind in "fcmM":
        return int(np.count_nonzero(values != values))
    return 0


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA says neither yes nor no
        return True


def scaled(columns: Mapping[str, Any], bounds: Sequence[str]) -> dict[str, Any]:
    """Columns cut off at their bounds and scaled to -1 .. 1; those without as they are."""
    limits = [_limits(text) for text in bounds]
    for_all = [pair for name, pair in limits if name is None]
    by_name = {name: pair for name, pair in limits if name is not None}
    if len(for_all) > 1 or len(by_name) + len(for_all) < len(limits):
        raise InvalidArgumentError(f"bounds={list(bounds)} bounds something twice: give each column one pair.")
    if unknown := set(by_name) - set(columns):
        raise InvalidArgumentError(
            f"bounds={sorted(unknown)} are no features: these are {', '.join(map(str, columns))}."
        )
    result = dict(columns)
    for name in columns:
        pair = by_name.get(name, for_all[0] if for_all else None)
        if pair is not None:
            low, high = pair
            values = numbers(columns, name).astype(np.float64)
            result[name] = (2 * (np.clip(values, low, high) - low) / (high - low) - 1).astype(np.float32)
    return result


def _limits(text: str) -> tuple[str | None, tuple[float, float]]:
    name, _, pair = text.rpartition("=")
    low, _, high = pair.partition(":")
    try:
        limits = (float(low), float(high))
    except ValueError:
        limits = (0.0, 0.0)
    if not (np.isfinite(limits).all() and limits[0] < limits[1]):
        raise InvalidArgumentError(
            f"bounds={text!r} is not allowed: give COLUMN=LOW:HIGH with two numbers, LOW below HIGH."
        )
    return name or None, limits


def check_suffix(path: pathlib.Path) -> None:
    if path.suffix not in _READERS:
        raise DatasetError(
            f"data={str(path)!r} is neither a file that ends in {', '.join(_READERS)} nor one of the data sets "
            f"{', '.join(datasets.names())}: give one of these."
        )
