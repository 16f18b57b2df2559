"""Texts as rows of token numbers."""

import json

import numpy as np
import pytest

from tfprivacy_ft.errors import DatasetError, InvalidArgumentError
from tfprivacy_ft.tokens import Tokens, read_vocabulary

TEXTS = ["Good day to you!", "", "Call 0800 now", "call 0912 NOW now now"]


def test_a_text_becomes_the_same_row_beside_any_others():
    tokens = Tokens("note", length=4, buckets=50)
    rows = tokens.encode(TEXTS)
    assert rows.shape == (4, 4) and rows.dtype == np.int32 and not rows[1].any()
    np.testing.assert_array_equal(rows[2, :3], rows[3, :3])  # neither case nor digits count
    assert rows[2, 3] == 0 and rows[3, 3] == rows[3, 2]
    for text, row in zip(TEXTS, rows, strict=True):
        np.testing.assert_array_equal(tokens.encode([text])[0], row)


def test_tokens_stay_below_the_size_of_the_vocabulary():
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300)]
    rows = Tokens("note", length=1, buckets=7).encode(words)
    assert set(rows[:, 0]) == set(range(1, 8)) and Tokens("note", buckets=7).vocabulary_size == 8
    listed = Tokens("note", length=1, vocabulary=("good", "day"))
    assert set(listed.encode(["good", "day", "night", ""])[:, 0]) == set(range(listed.vocabulary_size))


def test_words_have_the_same_numbers_today_and_tomorrow():
    # Values that were written down once: models are kept, and the hash with them.
    assert Tokens("note", length=3).encode(["Good day!"]).tolist() == [[66, 2446, 3317]]


def test_what_is_known_survives_json():
    for tokens in (Tokens("note", 8, buckets=9), Tokens("note", vocabulary=["good", "day"])):
        assert Tokens.from_json(json.loads(json.dumps(tokens.to_json()))) == tokens


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "tokens={} is not allowed: it has column, length, buckets, vocabulary"),
        ({"column": "note", "size": 3}, "is not allowed: it has column"),
        ({"column": "note", "length": "3"}, "is not allowed: it has column"),
        ({"column": "note", "length": 0}, "length=0 is not allowed"),
        ({"column": "note", "buckets": True}, "buckets=True is not allowed"),
        ({"column": "note", "vocabulary": [1, 2]}, "vocabulary of column 'note' holds no words"),
    ],
)
def test_what_says_nothing_of_tokens_is_refused(values, says):
    with pytest.raises(InvalidArgumentError, match=says):
        Tokens.from_json(values)


def test_a_file_without_words_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"words.txt' cannot be read \(No such file"):
        read_vocabulary(tmp_path / "words.txt")
    (tmp_path / "words.txt").write_bytes(b"\n")
    with pytest.raises(DatasetError, match=r"holds no words"):
        read_vocabulary(tmp_path / "words.txt")
    (tmp_path / "words.txt").write_bytes(b"\xff")
    with pytest.raises(DatasetError, match=r"cannot be read \(no UTF-8\)"):
        read_vocabulary(tmp_path / "words.txt")
