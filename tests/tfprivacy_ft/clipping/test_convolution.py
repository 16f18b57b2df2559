"""Convolutions: patches are moved, not computed, and the sums are those of one example after the other."""

import itertools
import warnings

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, assert_same, compile_for_sum, global_norm, layers, released_sum, trainable_values

from tfprivacy_ft.clipping import SlowClippingWarning, filters, reference
from tfprivacy_ft.clipping.calls import Convolution
from tfprivacy_ft.clipping.patches import axes_of, pad, patches, shifts
from tfprivacy_ft.keras_compat import IS_KERAS_3

EXAMPLES = 5
LOGITS = CrossEntropy(from_logits=True)
KERNELS = [(1, 1), (3, 2), (1, 5), (5, 6), (8, 8), (9, 1)]
WAYS = [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 3), (1, 1)), ((3, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 1), (2, 3))]


@pytest.mark.parametrize("shape", [(9, 8, 1), (10, 11, 3), (9, 9, 16), (1, 12, 2), (13, 9, 8)])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_patches_are_what_the_windows_of_a_convolution_see(shape, padding):
    images = tf.random.stateless_normal([3, *shape], [1, 2])
    for kernel, (strides, dilations) in itertools.product(KERNELS, WAYS):
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        if padding == "VALID" and (reach[0] > shape[0] or reach[1] > shape[1]):
            continue
        size = kernel[0] * kernel[1] * shape[2]
        identity = np.eye(size, dtype=np.float32).reshape([*kernel, shape[2], size])
        outputs = tf.nn.conv2d(images, identity, strides, padding, dilations=dilations)
        expected = tf.reshape(outputs, [3, -1, size])
        before = None if padding == "SAME" else (0, 0)
        axes = axes_of(Convolution(kernel, strides, dilations, before, shape[2], size, 1), images, outputs)
        label = f"kernel {kernel}, strides {strides}, dilations {dilations}"
        np.testing.assert_array_equal(patches(images, axes), expected, err_msg=label)
        one_by_one = tf.stack([tf.reshape(pad(images, axes)[s], [3, -1, shape[2]]) for s in shifts(axes)], 2)
        np.testing.assert_array_equal(tf.reshape(one_by_one, expected.shape), expected, err_msg=label)


def head(hidden, tokens=False):
    return layers.Dense(4)(hidden if tokens else layers.Flatten()(hidden))


def around(*parts, shape, pool=None):
    """A model whose first layer has weights and an activation too, so that gradients pass through what is tested."""
    inputs = layers.Input(shape)
    hidden = layers.Dense(shape[-1], "tanh")(inputs)
    for part in parts:
        hidden = part(hidden)
    hidden = hidden if pool is None else pool()(hidden)
    return tf.keras.Model(inputs, head(hidden))


def twice(layer, shape):
    """A layer that meets the data and then what it made of them, so that its two gradients are added up."""
    inputs = layers.Input(shape)
    return tf.keras.Model(inputs, head(layer(layer(inputs))))


LINE, SQUARE, CUBE = (8, 6), (7, 6, 4), (4, 5, 4, 4)
# name: (layer, shape of an example)
KINDS = {
    "1d": (lambda: layers.Conv1D(3, 3, padding="same"), LINE),
    "1d_strided": (lambda: layers.Conv1D(3, 4, strides=2, padding="same"), LINE),
    "1d_valid_strided": (lambda: layers.Conv1D(9, 3, strides=3), LINE),
    "1d_dilated": (lambda: layers.Conv1D(3, 3, dilation_rate=2, padding="same"), LINE),
    "1d_causal": (lambda: layers.Conv1D(3, 3, padding="causal"), LINE),
    "1d_causal_dilated": (lambda: layers.Conv1D(3, 3, padding="causal", dilation_rate=3), LINE),
    "1d_grouped": (lambda: layers.Conv1D(4, 3, groups=2), LINE),
    "1d_grouped_dilated": (lambda: layers.Conv1D(4, 3, groups=2, dilation_rate=2), LINE),
    "1d_depthwise": (lambda: layers.DepthwiseConv1D(3, padding="same"), LINE),
    "1d_depthwise_strided": (lambda: layers.DepthwiseConv1D(3, strides=2, depth_multiplier=2), LINE),
    "1d_separable": (lambda: layers.SeparableConv1D(3, 3, padding="same"), LINE),
    "1d_separable_dilated": (lambda: layers.SeparableConv1D(3, 2, dilation_rate=2), LINE),
    "1d_transposed": (lambda: layers.Conv1DTranspose(3, 3, strides=2, padding="same"), LINE),
    "1d_transposed_dilated": (lambda: layers.Conv1DTranspose(3, 3, dilation_rate=2), LINE),
    "2d": (lambda: layers.Conv2D(3, 3, padding="same"), SQUARE),
    "2d_one_by_one": (lambda: layers.Conv2D(3, 1), SQUARE),
    "2d_strided": (lambda: layers.Conv2D(3, (3, 2), strides=(2, 3), padding="same"), SQUARE),
    "2d_pixels_left_out": (lambda: layers.Conv2D(3, 2, strides=3), SQUARE),
    "2d_wide": (lambda: layers.Conv2D(40, 3), SQUARE),
    "2d_dilated": (lambda: layers.Conv2D(3, 3, dilation_rate=2), SQUARE),
    "2d_dilated_one_way": (lambda: layers.Conv2D(3, (2, 3), dilation_rate=(3, 1), padding="same"), SQUARE),
    "2d_grouped": (lambda: layers.Conv2D(6, 3, groups=2, strides=2, padding="same"), SQUARE),
    "2d_grouped_dilated": (lambda: layers.Conv2D(6, 3, groups=2, dilation_rate=2), SQUARE),
    "2d_channel_by_channel": (lambda: layers.Conv2D(8, 3, groups=4), SQUARE),
    "2d_depthwise": (lambda: layers.DepthwiseConv2D(3), SQUARE),
    "2d_depthwise_multiplied": (lambda: layers.DepthwiseConv2D((2, 3), strides=2, depth_multiplier=3), SQUARE),
    "2d_depthwise_dilated": (lambda: layers.DepthwiseConv2D(3, dilation_rate=2, padding="same"), SQUARE),
    "2d_separable": (lambda: layers.SeparableConv2D(3, 3, depth_multiplier=2, padding="same"), SQUARE),
    "2d_separable_dilated": (lambda: layers.SeparableConv2D(3, 2, dilation_rate=2), SQUARE),
    "2d_transposed": (lambda: layers.Conv2DTranspose(3, 3, strides=2, padding="same"), SQUARE),
    "2d_transposed_valid": (lambda: layers.Conv2DTranspose(9, (2, 3), strides=(3, 2)), SQUARE),
    "2d_transposed_padded": (lambda: layers.Conv2DTranspose(3, 3, strides=3, output_padding=2), SQUARE),
    "2d_transposed_dilated": (lambda: layers.Conv2DTranspose(3, 3, dilation_rate=2), SQUARE),
    "3d": (lambda: layers.Conv3D(3, 2, padding="same"), CUBE),
    "3d_strided": (lambda: layers.Conv3D(3, 3, strides=2, padding="same"), CUBE),
    "3d_dilated": (lambda: layers.Conv3D(3, 2, dilation_rate=2), CUBE),
    "3d_grouped": (lambda: layers.Conv3D(4, 2, groups=2), CUBE),
    "3d_transposed": (lambda: layers.Conv3DTranspose(3, 2, strides=2), CUBE),
}
# name: (model, shape of an example, whether there is a fast rule)
MODELS = {name: (lambda k=kind, s=shape: around(k(), shape=s), shape, True) for name, (kind, shape) in KINDS.items()}
MODELS |= {
    "over_time": (
        lambda: around(layers.TimeDistributed(layers.Conv2D(3, 3)), shape=(2, *SQUARE)), (2, *SQUARE), True,
    ),
    "over_time_dilated": (
        lambda: around(layers.TimeDistributed(layers.Conv2D(3, 3, dilation_rate=2)), shape=(2, *SQUARE)), (2, *SQUARE), True,
    ),
    "over_time_depthwise": (
        lambda: around(layers.TimeDistributed(layers.DepthwiseConv2D(3)), shape=(2, *SQUARE)), (2, *SQUARE), True,
    ),
    "over_time_transposed": (
        lambda: around(layers.TimeDistributed(layers.Conv1DTranspose(3, 3, strides=2)), shape=(2, *LINE)), (2, *LINE), True,
    ),
    "twice": (lambda: twice(layers.Conv2D(4, 3, padding="same", activation="tanh"), SQUARE), SQUARE, True),
    "twice_dilated": (lambda: twice(layers.Conv2D(4, 2, dilation_rate=2, activation="tanh"), SQUARE), SQUARE, True),
    "twice_depthwise": (lambda: twice(layers.DepthwiseConv2D(3, activation="tanh"), SQUARE), SQUARE, True),
    "twice_grouped": (lambda: twice(layers.Conv2D(4, 3, groups=2, activation="tanh"), SQUARE), SQUARE, True),
    "twice_transposed": (lambda: twice(layers.Conv2DTranspose(4, 3, activation="tanh"), SQUARE), SQUARE, True),
    "one_channel": (lambda: around(layers.Conv2D(3, 3), shape=(7, 6, 1)), (7, 6, 1), True),
}  # fmt: skip
UNKNOWN = {
    "1d": (lambda: layers.Conv1D(3, 3, strides=2, padding="same"), LINE, True),
    "1d_causal_dilated": (lambda: layers.Conv1D(3, 3, padding="causal", dilation_rate=2), LINE, True),
    "1d_dilated": (lambda: layers.Conv1D(3, 3, padding="same", dilation_rate=2), LINE, True),
    "1d_depthwise": (lambda: layers.DepthwiseConv1D(3), LINE, True),
    "1d_grouped": (lambda: layers.Conv1D(4, 3, groups=2), LINE, True),
    "1d_transposed": (lambda: layers.Conv1DTranspose(3, 3, strides=2), LINE, False),
    "2d": (lambda: layers.Conv2D(3, (3, 2), strides=(2, 1), padding="same"), SQUARE, True),
    "2d_dilated": (lambda: layers.Conv2D(3, 3, dilation_rate=2), SQUARE, True),
    "2d_separable": (lambda: layers.SeparableConv2D(3, 3), SQUARE, True),
    "2d_grouped": (lambda: layers.Conv2D(4, 3, groups=2), SQUARE, True),
    "2d_transposed": (lambda: layers.Conv2DTranspose(3, 3, strides=2, padding="same"), SQUARE, True),
    "3d": (lambda: layers.Conv3D(3, 2, strides=2, padding="same"), CUBE, True),
}
POOLS = {2: layers.GlobalAveragePooling1D, 3: layers.GlobalAveragePooling2D, 4: layers.GlobalAveragePooling3D}


def rows_and_labels(shape):
    random = np.random.default_rng(3)
    return random.normal(size=[EXAMPLES, *shape]).astype(np.float32), random.integers(0, 4, EXAMPLES)


def median_norm(model, x, y):
    each = reference.per_example_gradients(model, LOGITS, x, y)
    return each, float(np.median([reference.norm(g) for g in each]))


def step(model, x, y, clip, static_batch, **options):
    """What one step of `fit` released, and the warnings of a slow path."""
    compile_for_sum(model, LOGITS, clip, **options)
    before = trainable_values(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(EXAMPLES, drop_remainder=static_batch), verbose=0)
    slow = [str(w.message) for w in caught if issubclass(w.category, SlowClippingWarning)]
    return [b - a for b, a in zip(before, trainable_values(model), strict=True)], slow


@pytest.mark.parametrize("static_batch", [False, True], ids=["any_batch", "static_batch"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_a_loop_over_examples(name, static_batch):
    build, shape, fast = MODELS[name]
    model, (x, y) = build(), rows_and_labels(shape)
    each, clip = median_norm(model, x, y)
    released, slow = step(model, x, y, clip, static_batch)
    assert_same(released, reference.clipped_sum(each, clip))
    assert bool(slow) != fast, slow


@pytest.mark.parametrize("static_batch", [False, True], ids=["any_batch", "static_batch"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_equals_a_loop_over_examples_of_unknown_size(name, static_batch):
    layer, shape, fast = UNKNOWN[name]
    model = around(layer(), shape=(*[None] * (len(shape) - 1), shape[-1]), pool=POOLS[len(shape)])
    x, y = rows_and_labels(shape)
    each, clip = median_norm(model, x, y)
    compile_for_sum(model, LOGITS, clip)
    batch = EXAMPLES if static_batch else None
    signature = (tf.TensorSpec([batch, *[None] * (len(shape) - 1), shape[-1]]), tf.TensorSpec([batch], tf.int64))
    before = trainable_values(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(tf.data.Dataset.from_generator(lambda: [(x, y)], output_signature=signature), verbose=0)
    released = [b - a for b, a in zip(before, trainable_values(model), strict=True)]
    assert_same(released, reference.clipped_sum(each, clip))
    assert bool([w for w in caught if issubclass(w.category, SlowClippingWarning)]) != fast
