"""Tables: files of columns, and their columns as arrays of numbers, or one sentence on what keeps one from being that.

Promises: nothing is encoded, scaled, filled in or left out by what the rows hold, since a code, a mean or a range that is
taken from private rows is a release; no value of the table is shown in an error. A table is a mapping from names to
columns, which a pandas.DataFrame is, too; pandas is imported only to read a file.
"""

import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfprivacy_ft import datasets
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError, MissingDependencyError

__all__ = [
    "check_classes",
    "check_suffix",
    "class_labels",
    "column",
    "count_missing",
    "features",
    "keys",
    "labels",
    "members",
    "names",
    "numbers",
    "parse_bounds",
    "read_table",
    "scaled",
    "texts",
]

_NAMES_SHOWN = 20
_READERS = (".csv", ".csv.gz", ".tsv", ".parquet", ".npz")


def read_table(path: str | os.PathLike[str]) -> Mapping[Any, Any]:
    """Reads a file of columns.

    Args:
        path: Ends in .csv, .csv.gz, .tsv or .parquet, which come as a `pandas.DataFrame`, or in .npz, which comes as arrays by
            name.

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

        if path.suffix == ".parquet":
            return pandas.read_parquet(path)
        return _read_text(path, "\t" if path.suffix == ".tsv" else ",")
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {path.suffix} files needs pandas and pyarrow: install them by pip install 'tfprivacy_ft[tables]'."
        ) from error
    except Exception as error:  # what these readers raise on a damaged file is of every kind
        why = f"no {path.suffix} file of columns"
        if isinstance(error, OSError) and error.strerror:
            why = error.strerror
        elif type(error).__name__ in ("ParserError", "ParserWarning"):
            why = "rows have more values than the first line has names, or quotes that do not end"
        raise DatasetError(f"data={str(path)!r} cannot be read ({why}): give a file that can.") from error


def _read_text(path: pathlib.Path, separator: str) -> Any:
    """A file of text as a `pandas.DataFrame`; spaces around the names of columns do not count."""
    import pandas

    with warnings.catch_warnings():
        # Values without a name would move those of all columns, or be dropped.
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        table = pandas.read_csv(path, sep=separator, float_precision="round_trip", index_col=False)
    return table.rename(columns=str.strip)


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


def column(table: Any, name: Any) -> np.ndarray:
    """A column as it is, with what is missing, (n, ...).

    Raises:
        DatasetError: The column is not in the table, or twice, or is no column.
    """
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
    return values


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
    """A column that lacks nothing."""
    values = column(table, name)
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


def _spelt(value: Any) -> str:
    return str(value).strip()


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA says neither yes nor no
        return True


def class_labels(table: Any, name: Any, classes: int | Sequence[Any]) -> np.ndarray:
    """A column of labels as the numbers of their classes, int32 (n,).

    Args:
        table: A mapping from names to columns.
        name: The column.
        classes: How many there are, for whole numbers from 0, or all of them by name, in their order. They are given and not
            looked up, since which labels there are is a release.

    Raises:
        DatasetError: The column is not there, lacks values, has other labels, or has one class only.

    Example:
        >>> class_labels({"ill": ["no", "yes", "no"]}, "ill", ["no", "yes"]).tolist()
        [0, 1, 0]
    """
    if isinstance(classes, int):
        y = labels(table, name)
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        check_classes(name, y, classes)
    else:
        member = members(table, name, classes)
        y = np.argmax(member, axis=1).astype(np.int32)
        if strangers := int(np.sum(~member.any(axis=1))):
            raise DatasetError(
                f"column {name!r} has {strangers} of {len(y)} labels that are none of the classes "
                f"{', '.join(map(str, classes))}: give all classes, as they are spelt there, or leave these rows out."
            )
    if len(np.unique(y)) < 2:
        raise DatasetError(f"column {name!r} holds one class only: give rows of two classes or more.")
    return y


def check_classes(name: Any, y: np.ndarray, classes: int) -> None:
    """Refuses labels that are not the whole numbers from 0 to classes - 1, one per row."""
    if y.ndim != 1 or y.dtype.kind != "i" or not len(y) or y.min() < 0 or y.max() >= classes:
        raise DatasetError(
            f"column {name!r} holds labels other than the whole numbers from 0 to {classes - 1}: number them so, or give "
            "another --classes."
        )


def members(table: Any, name: Any, listed: Sequence[Any]) -> np.ndarray:
    """Which of the listed values each row has, bool (n, listed): none where it has another one, or a missing one.

    Text is compared without the spaces around it, numbers are compared as numbers.

    Raises:
        DatasetError: The column is not there, or holds numbers where text is listed.
    """
    values = column(table, name)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DatasetError(f"column {name!r} has shape {values.shape}: give one value per row.")
    if values.dtype.kind in "iuf":
        try:
            return values[:, np.newaxis] == np.array([float(each) for each in listed])
        except ValueError:
            raise DatasetError(
                f"column {name!r} holds numbers, and {', '.join(map(str, listed))} are not: list numbers."
            ) from None
    text = np.array(["" if _is_missing(value) else _spelt(value) for value in values.tolist()], dtype=object)
    return text[:, np.newaxis] == np.array([_spelt(each) for each in listed], dtype=object)


def texts(table: Any, name: Any) -> list[str]:
    """A column of text.

    Raises:
        DatasetError: The column is not there, lacks values, or holds something else.
    """
    values = _column(table, name)
    if values.ndim != 1 or not all(isinstance(value, str) for value in values.tolist()):
        raise DatasetError(f"column {name!r} holds something else where text is needed: take it out of --text.")
    return values.tolist()


def parse_bounds(bounds: Sequence[str]) -> dict[str | None, tuple[float, float]]:
    """`"COLUMN=LOW:HIGH"` and `"LOW:HIGH"` as numbers; the key None is for all columns without bounds of their own.

    Raises:
        InvalidArgumentError: A text is something else, or a column has two pairs.

    Example:
        >>> parse_bounds(["age=0:120", "-1:1"])
        {'age': (0.0, 120.0), None: (-1.0, 1.0)}
    """
    pairs = [_limits(text) for text in bounds]
    if len({name for name, _ in pairs}) < len(pairs):
        raise InvalidArgumentError(f"bounds={list(bounds)} bounds something twice: give each column one pair.")
    return dict(pairs)


def scaled(columns: Mapping[str, Any], bounds: Mapping[str | None, tuple[float, float]]) -> dict[str, Any]:
    """Columns cut off at their bounds and scaled to -1 .. 1; those without as they are.

    Args:
        columns: The columns by name.
        bounds: As `parse_bounds` returns them.

    Raises:
        InvalidArgumentError: Bounds are those of no column.
        DatasetError: A column with bounds is not one of finite numbers.

    Example:
        >>> scaled({"age": [30, 150]}, {"age": (0, 120)})["age"].tolist()
        [-0.5, 1.0]
    """
    if unknown := sorted(name for name in bounds if name is not None and name not in columns):
        raise InvalidArgumentError(f"bounds={unknown} are no features: these are {', '.join(map(str, columns))}.")
    result = dict(columns)
    for name in columns:
        pair = bounds.get(name, bounds.get(None))
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
    if not path.name.endswith(_READERS):
        raise DatasetError(
            f"data={str(path)!r} is neither a file that ends in {', '.join(_READERS)} nor one of the data sets "
            f"{', '.join(datasets.names())}: give one of these."
        )
