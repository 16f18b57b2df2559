"""Tables: what is read from files, and what is refused."""

import sys

import numpy as np
import pytest
from table_files import write_table

from tfprivacy_ft.errors import DatasetError, MissingDependencyError
from tfprivacy_ft.tables import class_labels, members, parse_bounds, read_table, scaled, texts

TABLE = {
    "age": np.array([61.0, 47.5, 23.25]),
    "city": np.array(["Rome", "Oslo", "Rome"]),
    "ill": np.array([1, 0, 1]),
}


def write(folder, ending="npz", table=TABLE):
    return write_table(folder, table, ending)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "tsv", "parquet", "npz"])
def test_a_table_reads_the_same_from_every_kind_of_file(ending, tmp_path):
    table = read_table(write(tmp_path, ending))
    assert list(table.keys()) == list(TABLE)
    for name, column in TABLE.items():
        assert np.asarray(table[name]).tolist() == column.tolist()


@pytest.mark.parametrize("ending", ["csv", "parquet", "npz"])
def test_a_damaged_file_is_one_sentence(ending, tmp_path):
    path = tmp_path / f"table.{ending}"
    path.write_bytes(b"\xff\xfe,\x00nothing" if ending != "csv" else b"")
    with pytest.raises(DatasetError, match=rf"cannot be read \(no .{ending} file of columns\)"):
        read_table(path)


def test_spaces_around_the_names_of_columns_do_not_count(tmp_path):
    (tmp_path / "table.csv").write_text("\ufeffage , city\n20,Rome\n", encoding="utf-8")
    assert list(read_table(tmp_path / "table.csv").keys()) == ["age", "city"]


@pytest.mark.parametrize("rows", ["1,2,3\n4,5,6\n", "1,2\n4,5,6\n", '1,"2\n'])
def test_rows_with_more_values_than_names_are_refused_and_not_moved(rows, tmp_path):
    (tmp_path / "table.csv").write_text(f"a,b\n{rows}")
    with pytest.raises(DatasetError, match=r"rows have more values than the first line has names, or quotes"):
        read_table(tmp_path / "table.csv")


def test_without_pandas_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it were not installed
    with pytest.raises(MissingDependencyError, match=r"pip install 'tfprivacy_ft\[tables\]'"):
        read_table(tmp_path / "table.csv")


@pytest.mark.parametrize(
    ("column", "classes", "says"),
    [
        ([0, 1, 2], 2, "'ill' holds labels other than the whole numbers from 0 to 1"),
        ([0.0, 0.5, 1.0], 2, "'ill' holds labels other than the whole numbers"),
        ([1, 1, 1], 2, "'ill' holds one class only"),
        (["yes", "yes"], ["no", "yes"], "'ill' holds one class only"),
        (["yes", "no", "maybe", None], ["no", "yes"], "has 2 of 4 labels that are none of the classes no, yes"),
        ([0.0, np.nan], 2, "'ill' lacks 1 of 2 values"),
        (["no", "yes"], 2, "'ill' holds text where numbers are needed"),
        ([0, 1], ["no", "yes"], "'ill' holds numbers, and no, yes are not"),
    ],
)
def test_labels_are_of_the_classes_given_or_refused(column, classes, says):
    with pytest.raises(DatasetError, match=says):
        class_labels({"ill": column}, "ill", classes)


def test_labels_become_the_numbers_of_their_classes():
    assert class_labels({"y": [" >50K", "<=50K"]}, "y", ["<=50K", ">50K"]).tolist() == [1, 0]
    assert class_labels({"y": [7, 3, 7]}, "y", ["3", "7"]).tolist() == [1, 0, 1]
    assert class_labels({"y": np.array([[0], [1]], np.uint8)}, "y", 2).tolist() == [0, 1]  # as MedMNIST keeps them


def test_a_value_that_is_not_listed_belongs_to_nothing():
    column = {"city": np.array(["Rome ", None, "Bonn"], object), "stage": np.array([1, np.nan, 3])}
    assert members(column, "city", ["Oslo", "Rome"]).tolist() == [[False, True], [False, False], [False, False]]
    assert members(column, "stage", ["3", "1"]).tolist() == [[False, True], [False, False], [True, False]]


def test_text_is_text():
    assert texts({"message": ["hi", "bye"]}, "message") == ["hi", "bye"]
    with pytest.raises(DatasetError, match="'age' holds something else where text is needed"):
        texts({"age": [1, 2]}, "age")


def test_bounds_of_all_and_of_one():
    columns = scaled({"age": [20, 80, 200], "pulse": [50.0, 60.0, 70.0]}, parse_bounds(["age=20:80", "0:100"]))
    assert columns["age"].tolist() == [-1, 1, 1]
    np.testing.assert_allclose(columns["pulse"], [0, 0.2, 0.4], atol=1e-6)
