"""Convolutions: patches are moved, not computed, and the sums are those of one example after the other."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, assert_same, layers, released_sum

from tfprivacy_ft.clipping import reference
from tfprivacy_ft.clipping.convolution import _patches

KERNELS = [(1, 1), (3, 2), (1, 5), (5, 6), (8, 8), (9, 1)]
STRIDES = [(1, 1), (2, 2), (1, 3), (3, 1)]


@pytest.mark.parametrize("shape", [(9, 8, 1), (10, 11, 3), (9, 9, 16), (1, 12, 2), (13, 9, 8)])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_patches_are_what_the_windows_of_a_convolution_see(shape, padding):
    images = tf.random.stateless_normal([3, *shape], [1, 2])
    for kernel, strides in itertools.product(KERNELS, STRIDES):
        if padding == "VALID" and (kernel[0] > shape[0] or kernel[1] > shape[1]):
            continue
        size = kernel[0] * kernel[1] * shape[2]
        identity = np.eye(size, dtype=np.float32).reshape([*kernel, shape[2], size])
        expected = tf.reshape(tf.nn.conv2d(images, identity, strides, padding), [3, -1, size])
        patches = _patches(images, list(kernel), list(strides), padding.encode())
        np.testing.assert_array_equal(patches, expected, err_msg=f"kernel {kernel}, strides {strides}")


def one_layer_twice(filters):
    """A convolution that meets the images and then what it made of them, so that its two gradients are added up."""
    inputs = layers.Input((7, 7, 8))
    convolution = layers.Conv2D(8, 3, padding="same", activation="tanh")
    hidden = layers.Conv2D(filters, 3, strides=2, activation="tanh")(convolution(convolution(inputs)))
    return tf.keras.Model(inputs, layers.Dense(4)(layers.Flatten()(hidden)))


@pytest.mark.parametrize("bad", [None, np.nan])
@pytest.mark.parametrize("filters", [2, 40])
def test_few_and_many_filters_give_the_same_sum_as_one_by_one(filters, bad):
    random = np.random.default_rng(3)
    x, y = random.normal(size=[6, 7, 7, 8]).astype(np.float32), random.integers(0, 4, 6)
    loss = CrossEntropy(from_logits=True)
    model = one_layer_twice(filters)
    good = slice(0 if bad is None else 1, None)
    each = reference.per_example_gradients(model, loss, x[good], y[good])
    clip = float(np.median([reference.norm(g) for g in each]))
    if bad is not None:
        x[0] = bad
    assert_same(released_sum(model, loss, x, y, clip), reference.clipped_sum(each, clip))
