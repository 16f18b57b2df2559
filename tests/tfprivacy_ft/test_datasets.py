"""Data sets: what is in them, the same each time, and clear refusals."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfprivacy_ft import datasets
from tfprivacy_ft.errors import DatasetError

BESIDE_THE_CHECKOUT = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def mnist_folder(monkeypatch):
    if not os.environ.get("TFPRIVACY_FT_DATA"):
        monkeypatch.setenv("TFPRIVACY_FT_DATA", str(BESIDE_THE_CHECKOUT))
    folder = Path(os.environ["TFPRIVACY_FT_DATA"])
    if not any((folder / path).is_file() for path in ("mnist/mnist.npz", "mnist.npz")):
        pytest.skip(f"no MNIST: set TFPRIVACY_FT_DATA to a folder with mnist/mnist.npz (looked in {folder})")


def _check(data, train_rows, test_rows):
    for x, y, rows in ((data.x_train, data.y_train, train_rows), (data.x_test, data.y_test, test_rows)):
        assert x.shape == (rows, *data.input_shape) and x.dtype == np.float32
        assert y.shape == (rows,) and y.dtype == np.int32
        assert x.min() >= -1 and x.max() <= 1
        assert set(np.unique(y)) == set(range(data.num_classes))
    assert data.x_train.min() == -1 and data.x_train.max() == 1


@pytest.mark.parametrize(
    ("name", "shape", "classes", "rows"),
    [("digits", (8, 8, 1), 10, (1437, 360)), ("breast_cancer", (30,), 2, (455, 114))],
)
def test_bundled_sets(name, shape, classes, rows):
    data = datasets.load(name)
    assert (data.name, data.input_shape, data.num_classes) == (name, shape, classes)
    _check(data, *rows)
    again = datasets.load(name)
    np.testing.assert_array_equal(data.x_test, again.x_test)
    train, test = ({row.tobytes() for row in x} for x in (data.x_train, data.x_test))
    assert not train & test


def test_the_split_is_frozen():
    assert datasets.load("digits").y_test[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]
    assert datasets.load("breast_cancer").y_test[:10].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("name", "least"), [("digits", 0.94), ("breast_cancer", 0.94)])
def test_a_linear_model_learns_them(name, least):
    from sklearn.linear_model import LogisticRegression

    data = datasets.load(name)
    x_train, x_test = (x.reshape(len(x), -1) for x in (data.x_train, data.x_test))
    assert LogisticRegression(max_iter=1000).fit(x_train, data.y_train).score(x_test, data.y_test) > least


def test_mnist(mnist_folder):
    data = datasets.load("mnist")
    assert (data.input_shape, data.num_classes) == ((28, 28, 1), 10)
    _check(data, 60_000, 10_000)
    assert data.y_train[:5].tolist() == [5, 0, 4, 1, 9]


def test_unknown_name_lists_the_names():
    with pytest.raises(DatasetError, match=r"no data set 'cifar'.*'breast_cancer', 'digits', 'mnist'"):
        datasets.load("cifar")


def test_no_folder_set(monkeypatch):
    monkeypatch.delenv("TFPRIVACY_FT_DATA", raising=False)
    with pytest.raises(DatasetError, match="set the environment variable TFPRIVACY_FT_DATA"):
        datasets.load("mnist")


def test_missing_and_damaged_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TFPRIVACY_FT_DATA", str(tmp_path))
    with pytest.raises(DatasetError, match=r"no mnist/mnist\.npz"):
        datasets.load("mnist")
    (tmp_path / "mnist.npz").write_bytes(b"half a download")
    with pytest.raises(DatasetError, match="is damaged or another file"):
        datasets.load("mnist")


def test_importing_the_module_needs_no_tensorflow():
    code = "import sys, tfprivacy_ft.datasets; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0
