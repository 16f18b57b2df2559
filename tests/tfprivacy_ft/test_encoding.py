"""Columns as numbers by what the user lists."""

import json

import numpy as np
import pytest

from tfprivacy_ft.encoding import Encoding
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError

TABLE = {
    "age": np.array([30, 60, 90]),
    "city": np.array(["Rome", "Oslo", "Bonn"]),
    "note": np.array(["Good day to you", "a day", "..."]),
}
KNOWN = Encoding(bounds={"age": (0, 120)}, categories={"city": ("Oslo", "Rome")}, text=("note",), text_features=64)


def test_columns_lie_side_by_side_in_the_order_of_the_features():
    x = KNOWN.encode(TABLE, ["city", "note", "age"])
    assert x.shape == (3, 2 + 64 + 1) and x.dtype == np.float32
    assert x[:, :2].tolist() == [[0, 1], [1, 0], [0, 0]]
    assert x[:, -1].tolist() == [-0.5, 0, 0.5]
    np.testing.assert_allclose(np.linalg.norm(x[:, 2:-1], axis=1), [1, 1, 0], rtol=1e-6)  # the last note has no words


def test_a_row_is_encoded_the_same_beside_any_others():
    whole = KNOWN.encode(TABLE, list(TABLE))
    for row in range(2):
        alone = KNOWN.encode({name: column[row : row + 1] for name, column in TABLE.items()}, list(TABLE))
        np.testing.assert_array_equal(alone[0], whole[row])


def test_words_have_the_same_places_today_and_tomorrow():
    # A value that was written down once: models are kept, and the hash with them.
    x = Encoding(text=("note",), text_features=16).encode({"note": ["Good day"]}, ["note"])
    assert np.flatnonzero(x[0]).tolist() == [1, 3, 9]


def test_what_is_known_survives_json():
    again = Encoding.from_json(json.loads(json.dumps(KNOWN.to_json())))
    np.testing.assert_array_equal(again.encode(TABLE, list(TABLE)), KNOWN.encode(TABLE, list(TABLE)))
    for_all = Encoding.from_json({"bounds": {"*": [0, 100]}})
    assert for_all.encode({"age": [0, 100]}, ["age"]).tolist() == [[-1], [1]]


def test_images_stay_images():
    x = np.arange(24, dtype=np.uint8).reshape(2, 3, 4, 1)
    assert Encoding().encode({"x": x}, ["x"]) is x


@pytest.mark.parametrize(
    ("known", "features", "says"),
    [
        (Encoding(), ["age", "height"], "column 'height' is not in the table: it has age, city, note"),
        (Encoding(), ["age", "city"], "column 'city' holds text where numbers are needed"),
        (KNOWN, ["city", "note", "height", "age"], "column 'height' is not in the table"),
        (Encoding(categories={"age": ("old", "young")}), ["age"], "column 'age' holds numbers, and old, young are not"),
        (Encoding(text=("age",)), ["age"], "column 'age' holds something else where text is needed"),
        (Encoding(text=("city",)), ["age"], r"columns \['city'\] are encoded but no features: these are age"),
    ],
)
def test_what_does_not_fit_is_one_sentence(known, features, says):
    with pytest.raises((DatasetError, InvalidArgumentError), match=says):
        known.encode(TABLE, features)


def test_a_missing_number_is_refused_and_a_missing_category_is_none_of_those_listed():
    table = {"age": [np.nan, 1.0], "city": np.array([None, "Rome"], object)}
    with pytest.raises(DatasetError, match="column 'age' lacks 1 of 2 values"):
        KNOWN.encode({**table, "note": ["a", "b"]}, ["age", "city", "note"])
    assert Encoding(categories={"city": ("Oslo", "Rome")}).encode(table, ["city"]).tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"bounds": {"age": [5, 5]}}, "low below high"),
        ({"bounds": {"age": "0:5"}}, "two numbers"),
        ({"categories": {"city": ["Rome"]}}, "list two or more"),
        ({"categories": {"city": ["Rome", "Rome"]}}, "each once"),
        ({"categories": {"city": ["a", "b"]}, "text": ["city"]}, "given twice"),
        ({"text_features": 0}, "text_features=0"),
        ({"text": "note"}, "text='note' is not allowed"),
        ({"colour": 1}, "colour=1 is not allowed in an encoding"),
    ],
)
def test_what_is_no_encoding_is_refused(values, says):
    with pytest.raises(InvalidArgumentError, match=says):
        Encoding.from_json(values)


def test_categories_that_no_row_has_are_refused_for_training():
    KNOWN.refuse_unused_categories(TABLE)
    with pytest.raises(DatasetError, match="column 'city' holds none of oslo, rome"):
        Encoding(categories={"city": ("oslo", "rome")}).refuse_unused_categories(TABLE)
