"""Convolutions: patches are moved, not computed, and the sums are those of one example after the other."""

import itertools
import warnings

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, assert_same, compile_for_sum, global_norm, layers, trainable_values

from tfprivacy_ft.clipping import SlowClippingWarning, filters, reference
from tfprivacy_ft.clipping.calls import Convolution
from tfprivacy_ft.clipping.patches import axes_of, pad, patches, shifts

EXAMPLES = 5
LOGITS = CrossEntropy(from_logits=True)
KERNELS = [(1, 1), (3, 2), (1, 5), (5, 6), (8, 8), (9, 1)]
WAYS = [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 3), (1, 1)), ((3, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 1), (2, 3))]


def windows(images, kernel, strides, dilations, padding):
    """[N, rows, columns, kernel * channels]: what every position sees, by slices."""
    starts, widths = [], [(0, 0)]
    for size, k, s, d in zip(images.shape[1:3], kernel, strides, dilations, strict=True):
        reach = (k - 1) * d + 1
        positions = -(-size // s) if padding == "SAME" else (size - reach) // s + 1
        missing = max((positions - 1) * s + reach - size, 0)
        starts.append(range(0, positions * s, s))
        widths.append((missing // 2, missing - missing // 2))
    padded = np.pad(images, [*widths, (0, 0)])
    seen = [
        padded[
            :,
            row : row + kernel[0] * dilations[0] : dilations[0],
            column : column + kernel[1] * dilations[1] : dilations[1],
        ]
        for row, column in itertools.product(*starts)
    ]
    return np.stack([w[:, : kernel[0], : kernel[1]].reshape(len(images), -1) for w in seen], 1).reshape(
        len(images), *map(len, starts), -1
    )


@pytest.mark.parametrize("shape", [(9, 8, 1), (10, 11, 3), (9, 9, 16), (1, 12, 2), (13, 9, 8)])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_patches_are_what_the_windows_of_a_convolution_see(shape, padding):
    images = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)
    for kernel, (strides, dilations) in itertools.product(KERNELS, WAYS):
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        if padding == "VALID" and (reach[0] > shape[0] or reach[1] > shape[1]):
            continue
        size = kernel[0] * kernel[1] * shape[2]
        seen = windows(images, kernel, strides, dilations, padding)
        outputs, expected = tf.constant(seen), seen.reshape(3, -1, size)
        before = None if padding == "SAME" else (0, 0)
        axes = axes_of(Convolution(kernel, strides, dilations, before, shape[2], size, 1), tf.constant(images), outputs)
        label = f"kernel {kernel}, strides {strides}, dilations {dilations}"
        np.testing.assert_array_equal(patches(tf.constant(images), axes), expected, err_msg=label)
        padded = pad(tf.constant(images), axes)
        one_by_one = tf.stack([tf.reshape(padded[s], [3, -1, shape[2]]) for s in shifts(axes)], 2)
        np.testing.assert_array_equal(tf.reshape(one_by_one, expected.shape), expected, err_msg=label)


LINE, SQUARE, CUBE = (8, 6), (7, 6, 4), (4, 5, 4, 4)
POOLS = {2: layers.GlobalAveragePooling1D, 3: layers.GlobalAveragePooling2D, 4: layers.GlobalAveragePooling3D}
# What one model holds, branch by branch. Names tell variables apart in what a failing test says.
KNOWN = {
    "line": (
        LINE,
        lambda: [
            layers.Conv1D(3, 3, padding="same", name="plain"),
            layers.Conv1D(3, 4, strides=2, padding="same", name="strided"),
            layers.Conv1D(9, 3, strides=3, name="valid_strided"),
            layers.Conv1D(3, 3, dilation_rate=2, padding="same", name="dilated"),
            layers.Conv1D(3, 3, padding="causal", name="causal"),
            layers.Conv1D(3, 3, padding="causal", dilation_rate=3, name="causal_dilated"),
            layers.Conv1D(4, 3, groups=2, name="grouped"),
            layers.Conv1D(4, 3, groups=2, dilation_rate=2, name="grouped_dilated"),
            layers.DepthwiseConv1D(3, padding="same", name="depthwise"),
            layers.DepthwiseConv1D(3, strides=2, depth_multiplier=2, name="depthwise_strided"),
            layers.SeparableConv1D(3, 3, padding="same", name="separable"),
            layers.SeparableConv1D(3, 2, dilation_rate=2, name="separable_dilated"),
            layers.Conv1DTranspose(3, 3, strides=2, padding="same", name="transposed"),
        ],
    ),
    "square": (
        SQUARE,
        lambda: [
            layers.Conv2D(3, 3, padding="same", name="plain"),
            layers.Conv2D(3, 1, name="one_by_one"),
            layers.Conv2D(3, (3, 2), strides=(2, 3), padding="same", name="strided"),
            layers.Conv2D(3, 2, strides=3, name="pixels_left_out"),
            layers.Conv2D(40, 3, name="wide"),
            layers.Conv2D(3, 3, dilation_rate=2, name="dilated"),
            layers.Conv2D(3, (2, 3), dilation_rate=(3, 1), padding="same", name="dilated_one_way"),
            layers.Conv2D(6, 3, groups=2, strides=2, padding="same", name="grouped"),
            layers.Conv2D(6, 3, groups=2, dilation_rate=2, name="grouped_dilated"),
            layers.Conv2D(8, 3, groups=4, name="channel_by_channel"),
        ],
    ),
    "square_depthwise_or_transposed": (
        SQUARE,
        lambda: [
            layers.DepthwiseConv2D(3, name="depthwise"),
            layers.DepthwiseConv2D((2, 3), strides=2, depth_multiplier=3, name="depthwise_multiplied"),
            layers.DepthwiseConv2D(3, dilation_rate=2, padding="same", name="depthwise_dilated"),
            layers.SeparableConv2D(3, 3, depth_multiplier=2, padding="same", name="separable"),
            layers.SeparableConv2D(3, 2, dilation_rate=2, name="separable_dilated"),
            layers.Conv2DTranspose(3, 3, strides=2, padding="same", name="transposed"),
            layers.Conv2DTranspose(9, (2, 3), strides=(3, 2), name="transposed_valid"),
            layers.Conv2DTranspose(3, 3, strides=3, output_padding=2, name="transposed_padded"),
        ],
    ),
    "cube": (
        CUBE,
        lambda: [
            layers.Conv3D(3, 2, padding="same", name="plain"),
            layers.Conv3D(3, 3, strides=2, padding="same", name="strided"),
            layers.Conv3D(3, 2, dilation_rate=2, name="dilated"),
            layers.Conv3D(4, 2, groups=2, name="grouped"),
            layers.Conv3DTranspose(3, 2, strides=2, name="transposed"),
        ],
    ),
    "over_time": (
        (2, *SQUARE),
        lambda: [
            layers.TimeDistributed(layer)
            for layer in (
                layers.Conv2D(3, 3, name="plain"),
                layers.Conv2D(3, 3, dilation_rate=2, name="dilated"),
                layers.DepthwiseConv2D(3, name="depthwise"),
                layers.Conv2DTranspose(3, 3, strides=2, name="transposed"),
            )
        ],
    ),
    "twice": (
        SQUARE,
        lambda: [
            Twice(layer)
            for layer in (
                layers.Conv2D(4, 3, padding="same", activation="tanh", name="plain"),
                layers.Conv2D(4, 2, dilation_rate=2, activation="tanh", name="dilated"),
                layers.Conv2D(4, 3, groups=2, activation="tanh", name="grouped"),
                layers.DepthwiseConv2D(3, activation="tanh", name="depthwise"),
                layers.Conv2DTranspose(4, 3, activation="tanh", name="transposed"),
            )
        ],
    ),
    "one_channel": ((7, 6, 1), lambda: [layers.Conv2D(3, 3), layers.DepthwiseConv2D(3), layers.Conv2D(2, (7, 2))]),
}
UNKNOWN = {
    "line": (
        LINE,
        lambda: [
            layers.Conv1D(3, 3, strides=2, padding="same", name="strided"),
            layers.Conv1D(3, 3, padding="causal", dilation_rate=2, name="causal_dilated"),
            layers.Conv1D(3, 3, padding="same", dilation_rate=2, name="dilated"),
            layers.Conv1D(4, 3, groups=2, name="grouped"),
            layers.DepthwiseConv1D(3, name="depthwise"),
        ],
    ),
    "square": (
        SQUARE,
        lambda: [
            layers.Conv2D(3, (3, 2), strides=(2, 1), padding="same", name="strided"),
            layers.Conv2D(3, 3, dilation_rate=2, name="dilated"),
            layers.Conv2D(4, 3, groups=2, name="grouped"),
            layers.SeparableConv2D(3, 3, name="separable"),
            layers.Conv2DTranspose(3, 3, strides=2, padding="same", name="transposed"),
        ],
    ),
    "cube": (CUBE, lambda: [layers.Conv3D(3, 2, strides=2, padding="same", name="strided")]),
}


class Twice(layers.Layer):
    """A layer that meets the data and then what it made of them, so that its two gradients are added up."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs):
        return self.layer(self.layer(inputs))


def branches(parts, shape):
    """A model that is the sum of what `parts` make of its inputs; a layer ahead of them gets gradients through them."""
    inputs = layers.Input(shape)
    hidden = layers.Dense(shape[-1], "tanh", name="ahead")(inputs)
    end = layers.Flatten if None not in shape else POOLS[len(shape)]
    outputs = [layers.Dense(4)(end()(layers.Activation("tanh")(part(hidden)))) for part in parts]
    return tf.keras.Model(inputs, layers.add(outputs) if len(outputs) > 1 else outputs[0])


def rows_and_labels(shape):
    random = np.random.default_rng(3)
    return random.normal(size=[EXAMPLES, *shape]).astype(np.float32), random.integers(0, 4, EXAMPLES)


def median_norm(model, x, y):
    each = reference.per_example_gradients(model, LOGITS, x, y)
    return each, float(np.median([reference.norm(g) for g in each]))


def one_step(model, x, y, clip, *, signature=None, loss=LOGITS, **options):
    """What one step of `fit` released, and the warnings of a slow path."""
    signature = signature or (tf.TensorSpec([None, *x.shape[1:]]), tf.TensorSpec([None], tf.int64))
    compile_for_sum(model, loss, clip, **options)
    before = trainable_values(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(tf.data.Dataset.from_generator(lambda: [(x, y)], output_signature=signature), verbose=0)
    slow = [str(w.message) for w in caught if issubclass(w.category, SlowClippingWarning)]
    return [b - a for b, a in zip(before, trainable_values(model), strict=True)], slow


def assert_same_by_variable(model, released, expected, rtol=1e-4):
    for variable, a, e in zip(model.trainable_variables, released, expected, strict=True):
        label = getattr(variable, "path", variable.name)
        np.testing.assert_allclose(a, e, atol=rtol * np.abs(e).max(), rtol=rtol, err_msg=label)


@pytest.mark.parametrize("name", KNOWN)
def test_equals_a_loop_over_examples(name):
    shape, parts = KNOWN[name]
    check_against_a_loop(branches(parts(), shape), shape, shape)


@pytest.mark.parametrize("name", UNKNOWN)
def test_equals_a_loop_over_examples_of_unknown_size(name):
    shape, parts = UNKNOWN[name]
    traced = (*[None] * (len(shape) - 1), shape[-1])
    check_against_a_loop(branches(parts(), traced), shape, traced)


def check_against_a_loop(model, shape, traced):
    """For batches of any size, and of one size."""
    x, y = rows_and_labels(shape)
    each, clip = median_norm(model, x, y)
    expected, weights = reference.clipped_sum(each, clip), model.get_weights()
    for batch in (None, EXAMPLES):
        model.set_weights(weights)
        signature = (tf.TensorSpec([batch, *traced]), tf.TensorSpec([batch], tf.int64))
        released, slow = one_step(model, x, y, clip, signature=signature)
        assert_same_by_variable(model, released, expected)
        assert not slow


def small():
    """One convolution of every kind that TensorFlow has an op for."""
    return branches(
        [
            layers.Conv2D(3, 3, strides=2, padding="same", name="strided"),
            layers.Conv2D(3, 2, dilation_rate=2, name="dilated"),
            layers.Conv2D(4, 2, groups=2, name="grouped"),
            layers.SeparableConv2D(3, 2, name="separable"),
            layers.Conv2DTranspose(3, 2, strides=2, name="transposed"),
        ],
        SQUARE,
    )


def test_equals_a_loop_over_examples_when_compiled_by_xla():
    model, (x, y) = small(), rows_and_labels(SQUARE)
    each, clip = median_norm(model, x, y)
    released, slow = one_step(model, x, y, clip, jit_compile=True)
    assert_same_by_variable(model, released, reference.clipped_sum(each, clip))
    assert not slow


def test_a_bad_example_contributes_nothing_and_spoils_no_other():
    model, (x, y) = small(), rows_and_labels(SQUARE)
    each, clip = median_norm(model, x[1:], y[1:])
    x[0] = np.nan
    released, slow = one_step(model, x, y, clip)
    assert_same_by_variable(model, released, reference.clipped_sum(each, clip))
    assert not slow


def test_one_example_moves_the_sum_by_at_most_the_clip():
    model, (x, y) = small(), rows_and_labels(SQUARE)
    released, slow = one_step(model, x[:1], y[:1], 0.5, loss=lambda t, p: 1e6 * LOGITS.call(t, p))
    assert 0.5 * (1 - 1e-4) < global_norm(released) <= 0.5 * (1 + 1e-4)
    assert not slow


@pytest.mark.parametrize("dtype", ["float64", "mixed_bfloat16"])
def test_other_dtypes_are_measured_in_float32(dtype):
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy(dtype)
    try:
        model = branches([layers.Conv2D(3, 3), layers.DepthwiseConv2D(3), layers.Conv2DTranspose(3, 2)], SQUARE)
    finally:
        tf.keras.mixed_precision.set_global_policy(before)
    x, y = rows_and_labels(SQUARE)
    each, clip = median_norm(model, x, y)
    released, slow = one_step(model, x, y, clip)
    assert_same(released, reference.clipped_sum(each, clip), rtol=1e-4 if dtype == "float64" else 0.05)
    assert not slow


@pytest.mark.parametrize(("channels", "width"), [(1, 3), (6, 2), (16, 40)])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_one_entry_of_the_kernel_at_a_time_gives_the_same_as_patches(channels, width, padding):
    """For large images patches would take too much memory."""
    kernel = (3, 2)
    for strides, dilations in WAYS:
        images = tf.random.stateless_normal([6, 9, 8, channels], [1, 2])
        filters_shape = (*kernel, channels, width)
        positions = tf.nn.conv2d(images, tf.zeros(filters_shape), strides, padding, dilations=dilations).shape
        outputs = tf.random.stateless_normal(positions, [3, 4])
        before = None if padding == "SAME" else (0, 0)
        convolution = Convolution(kernel, strides, dilations, before, channels, width, 1)
        few, many = (
            filters.filter_gradients(images, outputs, convolution, filters_shape, tf.constant(3), rows).per_example()
            for rows in (6, 10**9)
        )
        np.testing.assert_allclose(few, many, atol=1e-4)
        np.testing.assert_allclose(tf.reduce_sum(few, 0), gradient_of_filters(images, outputs, convolution), atol=1e-4)


def gradient_of_filters(images, outputs, convolution):
    padding = "SAME" if convolution.before is None else "VALID"
    with tf.GradientTape() as tape:
        weights = tf.zeros([*convolution.kernel, convolution.channels, convolution.width])
        tape.watch(weights)
        made = tf.nn.convolution(images, weights, convolution.strides, padding, dilations=convolution.dilations)
    return tape.gradient(made, weights, outputs)


class Shared(layers.Layer):
    """A function of a convolution that also gives what it was made of."""

    def build(self, shape):
        self.kernel = self.add_weight(name="kernel", shape=(3, 3, shape[-1], 3))

    @tf.function
    def both(self, inputs, kernel):
        return tf.nn.conv2d(inputs, kernel, 1, "SAME"), tf.identity(kernel)

    def call(self, inputs):
        made, kernel = self.both(inputs, tf.convert_to_tensor(self.kernel))
        return made * kernel[0, 0, 0]


def test_a_function_whose_weight_reaches_the_loss_twice_is_exact():
    model, (x, y) = branches([Shared()], SQUARE), rows_and_labels(SQUARE)
    each, clip = median_norm(model, x, y)
    released, _ = one_step(model, x, y, clip)
    assert_same_by_variable(model, released, reference.clipped_sum(each, clip))


class PaddedByBatchSize(layers.Layer):
    """Zeros around an image, as many as there are examples."""

    def call(self, inputs):
        size = tf.shape(inputs)[0]
        blocks = tf.space_to_batch(inputs, [1, 1], [[size, 0], [0, 0]])
        return tf.reshape(tf.reduce_sum(tf.batch_to_space(blocks, [1, 1], [[0, 0], [0, 0]]), [1, 2]), [-1, 4])


def test_a_padding_that_tells_the_batch_size_is_not_followed():
    model, (x, y) = branches([PaddedByBatchSize()], SQUARE), rows_and_labels(SQUARE)
    model(x[:1])
    _, slow = one_step(model, x, y, 1.0)
    assert slow
