"""Tables: what is read from files, and what is refused."""

import sys

import numpy as np
import pytest

from tfprivacy_ft.errors import DatasetError, MissingDependencyError
from tfprivacy_ft.tables import read_table

TABLE = {
    "age": np.array([61.0, 47.5, 23.25]),
    "city": np.array(["Rome", "Oslo", "Rome"]),
    "ill": np.array([1, 0, 1]),
}


def write(folder, ending="npz", table=TABLE):
    path = folder / f"table.{ending}"
    if ending == "npz":
        np.savez(path, **table)
    else:
        pandas = pytest.importorskip("pandas", reason="needs the extra 'tables'")
        frame = pandas.DataFrame(table)
        frame.to_csv(path, index=False) if ending == "csv" else frame.to_parquet(path)
    return path


@pytest.mark.parametrize("ending", ["csv", "parquet", "npz"])
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


def test_without_pandas_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it were not installed
    with pytest.raises(MissingDependencyError, match=r"pip install 'tfprivacy_ft\[tables\]'"):
        read_table(tmp_path / "table.csv")
