"""Columns of a table as arrays of numbers, or one sentence on what keeps one from being that.

Promises: nothing is encoded, scaled, filled in or left out, since a code, a mean or a range that is taken from private
rows is a release; no value of the table is shown in an error. A table is a mapping from names to columns, which a
pandas.DataFrame is, too; pandas is not imported.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfprivacy_ft.errors import DatasetError

_NAMES_SHOWN = 20


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
