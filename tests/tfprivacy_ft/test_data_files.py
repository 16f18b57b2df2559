"""Inputs and labels from files and folders, by a schema."""

import json

import numpy as np
import pytest
import tensorflow as tf

from tfprivacy_ft.data_files import Schema, read
from tfprivacy_ft.encoding import Encoding
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError

RNG = np.random.default_rng(0)


def write(folder, **table):
    np.savez(folder / "table.npz", **table)
    return folder / "table.npz"


def write_image(path, shape):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tf.io.encode_png(RNG.integers(0, 256, shape, dtype=np.uint8)).numpy())


@pytest.mark.parametrize("names", ["x y x_test y_test", "train_images train_labels test_images test_labels"])
def test_arrays_are_found_by_their_usual_names(names, tmp_path):
    images, labels = RNG.integers(0, 256, (9, 4, 5), dtype=np.uint8), np.arange(9)[:, np.newaxis] % 3
    path = write(tmp_path, **dict(zip(names.split(), (images, labels, images[:4], labels[:4]), strict=True)))
    rows = read(path, Schema(classes=3))
    assert rows.are_pixels and rows.x.shape == (9, 4, 5, 1) and rows.y.tolist() == labels[:, 0].tolist()
    assert rows.test[0].shape == (4, 4, 5, 1) and rows.test[1].shape == (4,)
    larger = read(path, Schema(classes=3, image_size=(8, 10), channels=3))
    assert larger.x.shape == (9, 8, 10, 3) and larger.test[0].shape == (4, 8, 10, 3)


def test_arrays_of_other_names_are_a_table(tmp_path):
    path = write(tmp_path, age=[1, 2], ill=[0, 1])
    with pytest.raises(DatasetError, match="has the arrays age, ill, and not x and y: name the labels by --label"):
        read(path, Schema(classes=2))
    assert read(path, Schema(classes=2, label="ill")).x.tolist() == [[1], [2]]


def test_images_come_from_sub_folders_or_by_a_column_of_names(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        write_image(tmp_path / "images" / name, (4, 4, 3))
    rows = read(tmp_path / "images", Schema())
    assert rows.y.tolist() == [0, 0, 1]
    assert rows.schema == Schema(classes=("cat", "dog"), image_size=(4, 4), channels=3)
    assert Schema.from_json(json.loads(json.dumps(rows.schema.to_json()))) == rows.schema
    path = write(tmp_path, path=["images/dog/1.png", "images/cat/2.png"], kind=["dog", "cat"])
    by_name = read(path, Schema(label="kind", classes=("cat", "dog"), image_column="path"))
    assert by_name.y.tolist() == [1, 0]
    np.testing.assert_array_equal(by_name.x, rows.x[[2, 1]])


def test_what_was_read_says_how_to_read_later_rows(tmp_path):
    path = write(tmp_path, age=[30, 60], city=["Rome", "Oslo"], ill=["no", "yes"])
    encoding = Encoding(bounds={"age": (0, 120)}, categories={"city": ("Oslo", "Rome")})
    rows = read(path, Schema(label="ill", classes=("no", "yes"), encoding=encoding))
    again = Schema.from_json(json.loads(json.dumps(rows.schema.to_json())))
    assert again.features == ("age", "city")
    np.testing.assert_array_equal(read(path, again).x, rows.x)
    assert rows.x.tolist() == [[-0.5, 0, 1], [0, 1, 0]]


def test_held_out_rows_are_the_same_ones_each_time_and_not_trained_on(tmp_path):
    path = write(tmp_path, number=np.arange(100.0), ill=np.arange(100) % 2)
    first, again = (read(path, Schema(label="ill", classes=2)).hold_out(0.2) for _ in range(2))
    np.testing.assert_array_equal(first.x, again.x)
    assert len(first.test[0]) == 20 and sorted([*first.x[:, 0], *first.test[0][:, 0]]) == list(range(100))
    with pytest.raises(InvalidArgumentError, match=r"held_out=0.1 is not allowed where the data have test rows"):
        first.hold_out(0.1)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lable": "ill"}, "lable='ill' is not allowed in a schema: it has label, classes"),
        ({"classes": 1}, "classes=1 is not allowed"),
        ({"classes": True}, "classes=True is not allowed"),
        ({"image_size": "8"}, "give HEIGHTxWIDTH in pixels"),
        ({"features": ["a"], "image_column": "b"}, "stands for all features"),
        ({"bounds": {"a": [1, 0]}}, "low below high"),
    ],
)
def test_what_is_no_schema_is_refused(values, says):
    with pytest.raises(InvalidArgumentError, match=says):
        Schema.from_json(values)


def test_a_folder_has_no_columns(tmp_path):
    with pytest.raises(InvalidArgumentError, match="is a folder of images, whose sub-folders are the classes"):
        read(tmp_path, Schema(label="ill"))
