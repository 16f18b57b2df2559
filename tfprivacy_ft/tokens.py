"""Text as rows of token numbers, for models that read words in their order: by a fixed hash, or by a public list of words.

Promises: what a text becomes depends on that text alone: no vocabulary is taken from the texts, since that would be a
release. So later texts become the same numbers; `Tokens.to_json` and `from_json` keep how.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tfprivacy_ft import _check
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError

__all__ = ["Tokens", "read_vocabulary"]

PADDING = 0
_UNKNOWN, _FIRST_WORD = 1, 2  # with a list of words; a hash knows every word
_WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")
_DIGIT = re.compile(r"\d")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How the texts of a column become rows of token numbers.

    Words are compared in lower case, and with 0 for each digit; signs are words of their own. Token 0 is padding.

    Args:
        column: Name of the column.
        length: Tokens of a row, >= 1: longer texts are cut off there, shorter ones padded at their end.
        buckets: With `vocabulary=None`, how many numbers words are hashed to, 1 .. buckets; >= 1.
        vocabulary: Public words in their order, numbered from 2; all others are 1. None for the hash.

    Raises:
        InvalidArgumentError: A number is outside its range, or the vocabulary holds something else than words.

    Example:
        >>> Tokens("note", length=4, vocabulary=("good", "day")).encode(["Good day!"]).tolist()
        [[2, 3, 1, 0]]

    Source: the hash is MurmurHash3, by scikit-learn; K. Weinberger et al., "Feature Hashing for Large Scale Multitask
        Learning", ICML 2009.
    """

    column: str
    length: int = 64
    buckets: int = 4096
    vocabulary: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check.positive_integer(length=self.length, buckets=self.buckets)
        if self.vocabulary is not None:
            if isinstance(self.vocabulary, str) or not all(isinstance(word, str) for word in self.vocabulary):
                raise InvalidArgumentError(
                    f"vocabulary of column {self.column!r} holds no words: give a list of texts."
                )
            object.__setattr__(self, "vocabulary", tuple(self.vocabulary))

    @property
    def vocabulary_size(self) -> int:
        """Tokens are 0 .. vocabulary_size - 1, as `models.build_model` takes them."""
        return self.buckets + 1 if self.vocabulary is None else len(self.vocabulary) + _FIRST_WORD

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """The texts as rows of tokens.

        Returns:
            int32 (n, length), in 0 .. vocabulary_size - 1.
        """
        number = self._number()
        rows = [[number(word) for word in _words(text)[: self.length]] for text in texts]
        encoded = np.full((len(rows), self.length), PADDING, np.int32)
        for i, row in enumerate(rows):
            encoded[i, : len(row)] = row
        return encoded

    def to_json(self) -> dict[str, Any]:
        """The same as values that JSON has."""
        if self.vocabulary is None:
            return {"column": self.column, "length": self.length, "buckets": self.buckets}
        return {"column": self.column, "length": self.length, "vocabulary": list(self.vocabulary)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Tokens":
        """What `to_json` returned; what is left out is as by default.

        Raises:
            InvalidArgumentError: It is something else.

        Example:
            >>> Tokens.from_json({"column": "note", "length": 8}).buckets
            4096
        """
        kinds = {"column": str, "length": int, "buckets": int, "vocabulary": list}
        fits = isinstance(values.get("column"), str) and values.keys() <= kinds.keys()
        if not fits or not all(isinstance(value, kinds[name]) for name, value in values.items()):
            raise InvalidArgumentError(f"tokens={dict(values)!r} is not allowed: it has {', '.join(kinds)}.")
        return cls(**values)

    def _number(self) -> Any:
        """A function from a word to its token."""
        if self.vocabulary is None:
            from sklearn.utils import murmurhash3_32

            return lambda word: 1 + murmurhash3_32(word, seed=0, positive=True) % self.buckets
        numbers: dict[str, int] = {}
        for number, word in enumerate(self.vocabulary, start=_FIRST_WORD):
            numbers.setdefault(_plain(word), number)
        return lambda word: numbers.get(word, _UNKNOWN)


def read_vocabulary(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The words of a text file, one in each line.

    Raises:
        DatasetError: The file cannot be read, or holds no words.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "words.txt"
        >>> _ = path.write_text("good\\nday\\n")
        >>> read_vocabulary(path)
        ('good', 'day')
    """
    try:
        words = tuple(pathlib.Path(path).read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise DatasetError(
            f"vocabulary={str(path)!r} cannot be read ({why}): give a file of words, one a line."
        ) from error
    if not any(words):
        raise DatasetError(f"vocabulary={str(path)!r} holds no words: give a file of words, one a line.")
    return words


def _words(text: str) -> list[str]:
    return _WORD_OR_SIGN.findall(_plain(text))


def _plain(text: str) -> str:
    return _DIGIT.sub("0", text.lower().strip())
