"""Rows that two data sets share are counted; what only looks alike is not."""

import warnings

import numpy as np
import pytest

from tfprivacy_ft.errors import DatasetError
from tfprivacy_ft.overlap import PublicOverlapWarning, shared_rows, warn_of_shared_rows

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, [300, 6, 6, 1], dtype=np.uint8)


def test_images_are_counted_once_for_each_private_row_whatever_the_float():
    private = np.concatenate([IMAGES[:5], IMAGES[:5], RNG.integers(0, 256, [20, 6, 6, 1], dtype=np.uint8)])
    assert shared_rows(IMAGES, private) == 10
    scaled = private.astype(np.float32) / np.float32(255)
    assert shared_rows(IMAGES / 255, scaled) == shared_rows(IMAGES / 255, scaled[..., 0]) == 10
    assert shared_rows(IMAGES, scaled) == 0  # other numbers
    assert shared_rows(IMAGES, private.astype(float)) == 10


def test_rounding_is_relative_and_has_one_zero_and_one_nan():
    table = RNG.normal(size=[50, 4]) * np.array([1e-6, 1.0, 39.0, 1e6])
    assert shared_rows(table, table.astype(np.float32)) == 50
    assert shared_rows(table, table * (1 + 1e-3)) == 0
    assert shared_rows([[0.0, np.nan]], [[-0.0, -np.nan], [np.inf, np.nan]]) == 1
    assert (
        shared_rows([[np.inf]], [[np.inf], [-np.inf], [np.finfo(np.float32).max]]) <= 2
    )  # the largest float rounds up


def test_whole_numbers_are_exact():
    tokens = np.arange(1_000_000, 1_000_100).reshape(50, 2)
    assert shared_rows(tokens, tokens + 1) == 0
    assert shared_rows(tokens.astype(np.int32), tokens[:7]) == 7


def test_text_and_mixed_tables():
    assert shared_rows(["yes", "no"], np.array(["no", "No", "no "], object)) == 1
    assert shared_rows(np.array([b"caf\xc3\xa9"]), ["café"]) == 1
    table = np.array([["a", 39, 0.1], ["b", 40, 0.2]], object)
    assert shared_rows(table, np.array([["a", 39.0, np.float32(0.1)], ["a", 40, 0.2]], object)) == 1
    assert shared_rows(np.array([["a", "b"]]), np.array([["a\0b", ""]])) == 0
    assert shared_rows(["1"], [1.0]) == 0


def test_nested_inputs_have_to_agree_in_all_their_parts():
    public = {"a": np.arange(5.0), "b": IMAGES[:5]}
    assert shared_rows(public, {"b": IMAGES[:5], "a": np.array([0, 1, 2, 9, 9.0])}) == 3
    assert shared_rows((public["a"], public["b"]), (public["a"], public["b"])) == 5


def test_rows_of_other_sizes_and_no_rows_share_nothing():
    assert shared_rows(np.ones([3, 4]), np.ones([3, 5])) == 0
    assert shared_rows(np.ones([0, 4]), np.ones([3, 4])) == shared_rows(np.ones([3, 4]), np.ones([0, 4])) == 0
    with pytest.raises(DatasetError, match="a single value"):
        shared_rows(1.0, np.ones([2]))
    with pytest.raises(DatasetError, match=r"parts of \[2, 3\] rows"):
        shared_rows((np.ones(2), np.ones(3)), np.ones([2, 2]))


def test_a_warning_is_one_sentence_with_the_name_and_only_where_rows_are_shared():
    with pytest.warns(PublicOverlapWarning, match="4 of 9 private rows are among the public data 'web'") as caught:
        assert warn_of_shared_rows("web", IMAGES[:4], IMAGES[:9]) == 4
    assert str(caught[0].message).count(". ") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_of_shared_rows("web", IMAGES[:4], IMAGES[4:9]) == 0
