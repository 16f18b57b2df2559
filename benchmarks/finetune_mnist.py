"""MNIST at epsilon 3: a private linear head on scattering features; target accuracy 0.985 within 5 minutes all told.

The scattering transform is a fixed cascade of wavelets, by Kymatio (`pip install kymatio`); nothing of it is learnt. Its 81
channels are normalised in 27 groups within each image, as Tramer and Boneh do ("Differentially Private Learning Needs Better
Features (or Much More Data)", ICLR 2021). MNIST is read from the folder in the environment variable TFPRIVACY_FT_DATA, or
from ../shared/data.
"""

import concurrent.futures
import multiprocessing
import os
import warnings

import _finetune
import numpy as np

from tfprivacy_ft import datasets
from tfprivacy_ft.finetune import Head

RECIPE = Head(norm_groups=27)


def scatter(images):
    """Scattering features [n, 7, 7, 81] of images in [0, 1]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kymatio.numpy import Scattering2D

    return np.moveaxis(Scattering2D(J=2, shape=images.shape[1:])(images).astype(np.float32), 1, -1)


def features(images):
    """`scatter`, on all cores."""
    pieces = np.array_split((images[..., 0] + 1) / 2, max(1, len(images) // 250))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as workers:
        return np.concatenate(list(workers.map(scatter, pieces)))


def splits(runs):
    import kymatio  # noqa: F401

    data = datasets.load("mnist")
    x, x_test = features(data.x_train), features(data.x_test)
    return [_finetune.Split(x, data.y_train, x_test, data.y_test, data.num_classes, recipe=RECIPE)] * runs


if __name__ == "__main__":
    _finetune.main(__doc__, splits, measure="accuracy", target_epsilon=3.0, target=0.985)
