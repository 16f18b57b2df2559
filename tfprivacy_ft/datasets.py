"""Real data to try things on: two sets bundled with scikit-learn, and MNIST from a local folder.

Promises: the same rows, split and scaling at each call and on each machine; nothing is downloaded; a file that is not
byte for byte the expected one is refused. Inputs are scaled by published constants, never by statistics of the rows
that are loaded: with data of your own, scale by bounds that you know without looking, or pay for them with epsilon.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tfprivacy_ft import _local_files
from tfprivacy_ft.errors import DatasetError

__all__ = ["DataSet", "load", "names"]

_MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
# The same arrays in two files: rebuilt from the canonical images, and the one that Keras downloads.
_MNIST_SHA256 = (
    "06af5dfe73b70e3bc1c36439982b18a8d76803db9b544f6fdf838a37fbb01b64",
    "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
)

# Least and largest value of each column of breast_cancer, from the table in the data set's published description.
_BREAST_CANCER_LOW = (
    *(6.981, 9.71, 43.79, 143.5, 0.053, 0.019, 0.0, 0.0, 0.106, 0.05),
    *(0.112, 0.36, 0.757, 6.802, 0.002, 0.002, 0.0, 0.0, 0.008, 0.001),
    *(7.93, 12.02, 50.41, 185.2, 0.071, 0.027, 0.0, 0.0, 0.156, 0.055),
)
_BREAST_CANCER_HIGH = (
    *(28.11, 39.28, 188.5, 2501.0, 0.163, 0.345, 0.427, 0.201, 0.304, 0.097),
    *(2.873, 4.885, 21.98, 542.2, 0.031, 0.135, 0.396, 0.053, 0.079, 0.03),
    *(36.04, 49.54, 251.2, 4254.0, 0.223, 1.058, 1.252, 0.291, 0.664, 0.208),
)


@dataclass(frozen=True, eq=False)
class DataSet:
    """Rows to train and to test on.

    Attributes:
        name: Name it was loaded by.
        x_train: float32 inputs in [-1, 1], shape (rows, *input_shape).
        y_train: int32 labels in 0 .. num_classes - 1, shape (rows,).
        x_test: Like x_train.
        y_test: Like y_train.
        num_classes: Number of classes.
        input_shape: Shape of one example, as `models.build_model` takes it.
    """

    name: str
    x_train: np.ndarray = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    num_classes: int
    input_shape: tuple[int, ...]


def load(name: str) -> DataSet:
    """Loads a data set by name.

    Args:
        name: One of
            "digits": 1437 + 360 images of handwritten digits, 8x8x1, 10 classes; bundled with scikit-learn.
            "breast_cancer": 455 + 114 rows of 30 measurements of cell nuclei, label 0 malignant, 1 benign; bundled
                with scikit-learn. Scaled by the ranges in its published description.
            "mnist": 60000 + 10000 images of handwritten digits, 28x28x1, 10 classes; from mnist/mnist.npz or mnist.npz
                in the folder that the environment variable TFPRIVACY_FT_DATA names.

    Returns:
        A `DataSet`. The bundled sets are split once and for all, at random, one row in five for testing.

    Raises:
        DatasetError: The name is unknown, or the file is missing or not the expected one.

    Example:
        >>> load("digits")
        DataSet(name='digits', num_classes=10, input_shape=(8, 8, 1))

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998; W. Wolberg, O. Mangasarian,
        N. Street, W. Street, "Breast Cancer Wisconsin (Diagnostic)", UCI, 1995; Y. LeCun, C. Cortes, C. Burges, "The
        MNIST database of handwritten digits", 1998.
    """
    if name not in _LOADERS:
        raise DatasetError(f"There is no data set {name!r}: give one of {names()}.")
    return _LOADERS[name]()


def names() -> list[str]:
    """Names that `load` knows, sorted.

    Example:
        >>> names()
        ['breast_cancer', 'digits', 'mnist']
    """
    return sorted(_LOADERS)


def _digits() -> DataSet:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _split("digits", x.reshape(-1, 8, 8, 1) / 8 - 1, y, 10)  # pixels are 0 .. 16


def _breast_cancer() -> DataSet:
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    low, high = np.array(_BREAST_CANCER_LOW), np.array(_BREAST_CANCER_HIGH)
    # The table is rounded, so a few values lie a hair outside.
    return _split("breast_cancer", np.clip(2 * (x - low) / (high - low) - 1, -1, 1), y, 2)


def _mnist() -> DataSet:
    content = _read_checked("mnist.npz", "mnist", _MNIST_SHA256, _MNIST_URL)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        x_train, y_train, x_test, y_test = (arrays[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    return _data_set("mnist", _scale_pixels(x_train), y_train, _scale_pixels(x_test), y_test, 10)


_LOADERS: dict[str, Callable[[], DataSet]] = {"breast_cancer": _breast_cancer, "digits": _digits, "mnist": _mnist}


def _scale_pixels(images: np.ndarray) -> np.ndarray:
    """0 .. 255 to -1 .. 1, with a channel axis; in float32 throughout, as float64 would need twice the memory."""
    return images[..., np.newaxis] / np.float32(127.5) - np.float32(1)


def _split(name: str, x: np.ndarray, y: np.ndarray, num_classes: int) -> DataSet:
    # RandomState, not default_rng: its stream is frozen, so the split outlives NumPy's versions.
    order = np.random.RandomState(0).permutation(len(x))
    test, train = np.split(order, [-(-len(x) // 5)])
    return _data_set(name, x[train], y[train], x[test], y[test], num_classes)


def _data_set(name: str, x_train, y_train, x_test, y_test, num_classes: int) -> DataSet:
    return DataSet(
        name=name,
        x_train=x_train.astype(np.float32, copy=False),
        y_train=y_train.astype(np.int32),
        x_test=x_test.astype(np.float32, copy=False),
        y_test=y_test.astype(np.int32),
        num_classes=num_classes,
        input_shape=x_train.shape[1:],
    )


def _read_checked(file_name: str, name: str, sha256: tuple[str, ...], url: str) -> bytes:
    """Content of a data set's file in the local folder."""
    what = f"Data set {name!r}"
    return _local_files.read_checked(what, f"{name}/{file_name}", sha256, url, DatasetError)
