"""How columns become numbers: bounds, listed categories, and text by a fixed hash.

Promises: what a row becomes depends on that row and on what the user lists, never on other rows: no mean, no range, no
vocabulary and no list of categories is taken from the data, since that would be a release. So the same encoding serves the
rows that a model meets later; `Encoding.to_json` and `from_json` keep it.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tfprivacy_ft import _check, tables
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError

__all__ = ["Encoding", "parse_categories"]

_FOR_ALL = "*"  # stands for "all columns without bounds of their own" in JSON, whose keys are text


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What is publicly known of columns.

    Args:
        bounds: Lowest and highest value of columns of numbers, by name; None for all without bounds of their own. Values
            are cut off there and scaled to -1 .. 1. Columns without bounds are taken as they are.
        categories: The categories of columns, by name: each becomes a column of 0 and 1. A value that is not listed, or is
            missing, has 0 in all of them.
        text: Columns of text: the lower-case words and pairs of neighbouring words are counted under their hashes, and each
            row is scaled to unit l2 norm.
        text_features: Numbers that a column of text becomes, >= 1.

    Raises:
        InvalidArgumentError: Bounds are no two numbers, low below high, categories are fewer than two or listed twice, or a
            column is given in two ways.

    Example:
        >>> known = Encoding(bounds={"age": (0, 120)}, categories={"city": ("Oslo", "Rome")})
        >>> known.encode({"age": [30, 90], "city": ["Rome", "Bonn"]}, ["age", "city"]).tolist()
        [[-0.5, 0.0, 1.0], [0.5, 0.0, 0.0]]

    Source: the hash of text is MurmurHash3, by scikit-learn's HashingVectorizer; K. Weinberger et al., "Feature Hashing for
        Large Scale Multitask Learning", ICML 2009.
    """

    bounds: Mapping[str | None, tuple[float, float]] = dataclasses.field(default_factory=dict)
    categories: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    text: Sequence[str] = ()
    text_features: int = 4096

    def __post_init__(self) -> None:
        _check.positive_integer(text_features=self.text_features)
        for name, pair in self.bounds.items():
            if not (_is_pair_of_numbers(pair) and pair[0] < pair[1]):
                raise InvalidArgumentError(
                    f"bounds={pair!r} of column {_FOR_ALL if name is None else name!r} are not allowed: give two numbers, low "
                    "below high."
                )
        for name, listed in self.categories.items():
            if isinstance(listed, str) or len(listed) < 2 or len(set(map(str, listed))) < len(listed):
                raise InvalidArgumentError(
                    f"categories={listed!r} of column {name!r} are not allowed: list two or more, each once."
                )
        ways = [*(name for name in self.bounds if name is not None), *self.categories, *self.text]
        if twice := sorted({name for name in ways if ways.count(name) > 1}):
            raise InvalidArgumentError(
                f"columns {twice} are given twice: name each under bounds, categories or text, once."
            )

    def encode(self, table: Mapping[str, Any], features: Sequence[str]) -> np.ndarray:
        """The columns as numbers, side by side in their order.

        Args:
            table: A mapping from names to columns of n values, such as a pandas.DataFrame.
            features: Names of the columns.

        Returns:
            float32 (n, numbers); a single feature that holds arrays (n, ...), such as images, with its own shape.

        Raises:
            DatasetError: A column is not there, lacks values, or holds text where numbers are needed, or numbers where text is.
            InvalidArgumentError: Something is known of a column that is no feature.
        """
        known = {name for name in (*self.bounds, *self.categories, *self.text) if name is not None}
        if unknown := sorted(known - set(features)):
            shown = ", ".join(map(str, features))
            raise InvalidArgumentError(f"columns {unknown} are encoded but no features: these are {shown}.")
        columns = {name: tables.column(table, name) for name in features}
        plain = [name for name in columns if name not in self.categories and name not in self.text]
        columns |= tables.scaled({name: columns[name] for name in plain}, self.bounds)
        if plain == list(features):
            return tables.features(columns, plain)
        parts = [self._part(columns, name) for name in columns]
        if lengths := {len(part) for part in parts if len(part) != len(parts[0])}:
            raise DatasetError(f"columns have {len(parts[0])} and {min(lengths)} rows: give one value per row in each.")
        return np.concatenate(parts, axis=1)

    def refuse_unused_categories(self, table: Mapping[str, Any]) -> None:
        """Refuses a table to train on in which a column has none of the categories that are listed for it.

        Raises:
            DatasetError: There is such a column; the text names it.
        """
        for name, listed in self.categories.items():
            if not tables.members(table, name, listed).any():
                shown = ", ".join(map(str, listed))
                raise DatasetError(
                    f"column {name!r} holds none of {shown}: list its categories as they are spelt there."
                )

    def to_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        return {
            "bounds": {_FOR_ALL if name is None else name: list(pair) for name, pair in self.bounds.items()},
            "categories": {name: list(listed) for name, listed in self.categories.items()},
            "text": list(self.text),
            "text_features": self.text_features,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Encoding":
        """What `to_json` returned; what is left out is as by default.

        Raises:
            InvalidArgumentError: It is something else.

        Example:
            >>> Encoding.from_json(Encoding(text=("message",)).to_json()).text
            ('message',)
        """
        kinds = {"bounds": dict, "categories": dict, "text": list, "text_features": int}
        for name, value in values.items():
            if name not in kinds or not isinstance(value, kinds[name]):
                allowed = ", ".join(f"{each} ({kind.__name__})" for each, kind in kinds.items())
                raise InvalidArgumentError(f"{name}={value!r} is not allowed in an encoding: it has {allowed}.")
        bounds = {
            None if name == _FOR_ALL else name: tuple(pair) if isinstance(pair, list) else pair
            for name, pair in values.get("bounds", {}).items()
        }
        return cls(**{**values, "bounds": bounds, "text": tuple(values.get("text", ()))})

    def _part(self, columns: Mapping[str, Any], name: str) -> np.ndarray:
        if name in self.text:
            return self._hashed(tables.texts(columns, name))
        if name not in self.categories:
            return tables.features(columns, [name])
        return tables.members(columns, name, self.categories[name]).astype(np.float32)

    def _hashed(self, texts: Iterable[str]) -> np.ndarray:
        from sklearn.feature_extraction.text import HashingVectorizer

        # Signs that alternate are for sums of many features; counts stay positive, as the words are.
        vectorizer = HashingVectorizer(
            n_features=self.text_features, ngram_range=(1, 2), alternate_sign=False, norm="l2"
        )
        return vectorizer.transform(texts).toarray().astype(np.float32)


def parse_categories(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`"COLUMN=CATEGORY,CATEGORY"` by column.

    Raises:
        InvalidArgumentError: A text is something else, or a column comes twice.

    Example:
        >>> parse_categories(["city=Oslo,Rome"])
        {'city': ('Oslo', 'Rome')}
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        if not (name and listed) or name in found:
            raise InvalidArgumentError(
                f"categories={text!r} is not allowed: give COLUMN=CATEGORY,CATEGORY,... once per column, or categories "
                "that contain commas by a schema file."
            )
        found[name] = tuple(each.strip() for each in listed.split(","))
    return found


def _is_pair_of_numbers(pair: Any) -> bool:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        return False
    return all(isinstance(each, int | float) and np.isfinite(each) for each in pair)
