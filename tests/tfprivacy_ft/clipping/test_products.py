"""Products: every way of writing a matrix product, with norms by pairs of rows or by formed gradients."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, assert_exact, assert_same, global_norm, labels, layers, released_sum, rows

from tfprivacy_ft.clipping.products import matrices
from tfprivacy_ft.errors import UnsupportedModelError
from tfprivacy_ft.keras_compat import keras

LOGITS = CrossEntropy(from_logits=True)


def functional(shape, function):
    inputs = layers.Input(shape)
    return keras.Model(inputs, function(inputs))


class Einsum(layers.Layer):
    """A kernel of any shape in an Einsum of one's own."""

    def __init__(self, equation, shape, kernel_first=False, **options):
        super().__init__(**options)
        self.equation, self.shape_of_kernel, self.kernel_first = equation, shape, kernel_first

    def build(self, shape):
        self.kernel = self.add_weight(name="kernel", shape=self.shape_of_kernel)

    def call(self, inputs):
        kernel = tf.convert_to_tensor(self.kernel)
        return tf.einsum(self.equation, *((kernel, inputs) if self.kernel_first else (inputs, kernel)))


class TimeFirst(Einsum):
    """The data with its time first, then the batch."""

    def call(self, inputs):
        return super().call(tf.transpose(inputs, [1, 0, 2]))


def flat(hidden):
    return layers.Dense(4)(layers.Flatten()(hidden))


def cross_attention(inputs):
    memory = layers.Dense(5, "tanh")(inputs[:, :3])
    return flat(layers.MultiHeadAttention(2, 4, value_dim=3)(inputs, memory))


def masked_attention(inputs):
    mask = tf.keras.layers.Lambda(lambda t: t[:, None, :, 0] > 0)(inputs)
    return flat(layers.MultiHeadAttention(2, 4)(inputs, inputs, attention_mask=mask))


def causal_attention(inputs):
    return flat(layers.MultiHeadAttention(2, 4)(inputs, inputs, use_causal_mask=True))


def transformer_block(inputs):
    hidden = layers.Dense(8)(inputs)
    hidden = layers.LayerNormalization()(hidden + layers.MultiHeadAttention(2, 4)(hidden, hidden))
    inner = layers.Dense(8)(layers.Dense(12, "gelu")(hidden))
    return layers.Dense(4)(layers.GlobalAveragePooling1D()(layers.LayerNormalization()(hidden + inner)))


def used_twice(layer, between=lambda t: t):
    return lambda inputs: flat(layer(between(layer(inputs))))


CASES = {
    "einsum_dense": ((6, 3), lambda t: flat(layers.EinsumDense("abc,cd->abd", (6, 5), bias_axes="d")(t))),
    "einsum_dense_of_heads": (
        (6, 3),
        lambda t: flat(layers.EinsumDense("abc,cde->abde", (6, 2, 5), bias_axes="de")(t)),
    ),
    "einsum_dense_over_time": ((6, 3), lambda t: flat(layers.EinsumDense("abc,bd->adc", (5, 3))(t))),
    "bias_ahead_of_the_last_axis": (
        (6, 3),
        lambda t: flat(layers.EinsumDense("abc,bd->adc", (5, 3), bias_axes="d", activation="tanh")(t)),
    ),
    "a_matrix_for_each_head": ((2, 6, 3), lambda t: flat(Einsum("bhtd,hde->bhte", (2, 3, 5))(t))),
    "a_matrix_for_each_head_and_one_row": ((2, 3), lambda t: flat(Einsum("bhd,hed->bhe", (2, 5, 3))(t))),
    "kernel_first": ((6, 3), lambda t: flat(Einsum("cd,btc->btd", (3, 5), kernel_first=True)(t))),
    "batch_not_first": ((6, 3), lambda t: flat(TimeFirst("tbd,de->bte", (3, 5))(t))),
    "axis_summed_in_the_data": ((6, 3), lambda t: flat(Einsum("btd,de->be", (3, 5))(t))),
    "elementwise_by_einsum": ((6, 3), lambda t: flat(Einsum("btd,d->btd", (3,))(t))),
    "repeated": ((3,), lambda t: flat(layers.Dense(2, "tanh")(layers.RepeatVector(3)(t)))),
    "long_and_narrow": ((40, 3), lambda t: flat(layers.Dense(2)(t))),
    "short_and_wide": ((2, 30), lambda t: flat(layers.Dense(20)(t))),
    "attention": ((6, 3), lambda t: flat(layers.MultiHeadAttention(2, 4)(t, t))),
    "cross_attention": ((6, 3), cross_attention),
    "masked_attention": ((6, 3), masked_attention),
    "causal_attention": ((6, 3), causal_attention),
    "transformer_block": ((6, 3), transformer_block),
    "kernel_used_twice": ((6, 3), used_twice(layers.Dense(3, "tanh"))),
    "heads_used_twice": ((6, 3), used_twice(layers.EinsumDense("abc,cde->abde", (6, 1, 3)), layers.Reshape((6, 3)))),
}


@pytest.mark.parametrize("static_batch", [False, True], ids=["any_batch", "static_batch"])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_examples(name, static_batch):
    shape, function = CASES[name]
    assert_exact(functional(shape, function), LOGITS, rows(*shape), labels(), fast=True, static_batch=static_batch)


class TiedAutoencoder(keras.Model):
    """One matrix, there and back, by a transposed product or by a transposed matrix."""

    def __init__(self, by_transpose):
        super().__init__()
        self.by_transpose = by_transpose

    def build(self, shape):
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1], 4))
        self.head = layers.Dense(4)
        self.head.build((None, shape[-1]))

    def call(self, inputs):
        kernel = tf.convert_to_tensor(self.kernel)
        hidden = tf.tanh(tf.matmul(inputs, kernel))
        if self.by_transpose:
            return self.head(tf.matmul(hidden, tf.transpose(kernel)))
        return self.head(tf.matmul(hidden, kernel, transpose_b=True))


@pytest.mark.parametrize("width", [4, 6], ids=["square", "oblong"])
@pytest.mark.parametrize("by_transpose", [False, True])
def test_a_tied_matrix_is_one_gradient(by_transpose, width):
    assert_exact(TiedAutoencoder(by_transpose), LOGITS, rows(width), labels(), fast=True)


def test_an_einsum_over_the_batch_is_refused():
    def decorrelated(inputs):
        centred = layers.Lambda(lambda t: t @ tf.einsum("bc,bd->cd", t, t), name="decorrelated")
        return layers.Dense(4)(centred(inputs))

    with pytest.raises(UnsupportedModelError, match="decorrelated"):
        released_sum(functional((3,), decorrelated), LOGITS, rows(3), labels(), 1.0)


@pytest.mark.parametrize("name", ["attention", "a_matrix_for_each_head", "transformer_block"])
def test_an_example_that_is_not_finite_adds_nothing(name):
    shape, function = CASES[name]
    model, x, y = functional(shape, function), rows(*shape), labels()
    without = released_sum(model, LOGITS, x[1:], y[1:], 0.3)
    model.set_weights([w + s for w, s in zip(model.get_weights(), without, strict=True)])  # as before that step
    x[0] = np.nan
    assert_same(released_sum(model, LOGITS, x, y, 0.3), without)


@pytest.mark.parametrize("name", ["attention", "transformer_block", "short_and_wide"])
def test_a_huge_loss_stays_within_the_clip(name):
    shape, function = CASES[name]
    released = released_sum(
        functional(shape, function), lambda t, p: 1e6 * LOGITS.call(t, p), rows(*shape)[:1], labels()[:1], 0.5
    )
    assert 0.4999 <= global_norm(released) <= 0.5 * (1 + 1e-4)


def test_equals_a_loop_when_compiled_by_xla():
    shape, function = CASES["transformer_block"]
    assert_exact(functional(shape, function), LOGITS, rows(*shape), labels(), fast=True, jit_compile=True)


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_norms_by_pairs_are_those_of_the_formed_gradients(steps, scale):
    random = np.random.default_rng(0)
    inputs, outputs = random.normal(size=(4, steps, 40)), random.normal(size=(4, steps, 50))
    inputs[1], outputs[2] = 0.0, 0.0
    by_pairs = matrices(tf.constant(inputs * scale, tf.float32), tf.constant(outputs / scale, tf.float32), steps)
    assert by_pairs._by_pairs
    expected = np.square(np.einsum("btp,btq->bpq", inputs, outputs)).sum((1, 2))
    # An upper bound: of a gradient that is zero it is what could hide below the smallest square.
    np.testing.assert_allclose(by_pairs.squared_norms(), expected, rtol=1e-5, atol=1e-7)


def test_norms_by_pairs_never_fall_below_where_rows_cancel():
    random = np.random.default_rng(1)
    inputs = np.repeat(random.normal(size=(300, 1, 64)), 2, axis=1).astype(np.float32)
    outputs = random.normal(size=(300, 1, 64)) * np.array([1.0, -1.0])[None, :, None]
    outputs = (outputs * (1 + 1e-4 * random.normal(size=outputs.shape))).astype(np.float32)
    contribution = matrices(tf.constant(inputs), tf.constant(outputs), 2)
    assert contribution._by_pairs
    true = np.square(np.einsum("btp,btq->bpq", inputs.astype(np.float64), outputs.astype(np.float64))).sum((1, 2))
    assert (contribution.squared_norms().numpy() >= true * (1 - 1e-4)).all()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e-18, 1e-15, 1e15, 1e18, 1e25, 1e35])
def test_norms_by_pairs_of_any_magnitude_are_upper_bounds_or_not_finite(steps, scale):
    """Squares may vanish or overflow where the product does neither; an example that is not finite adds nothing."""
    random = np.random.default_rng(2)
    scales = np.full((steps, 1), scale)
    scales[-1] = 1 / scale if steps > 1 else scale  # the last row is long where the others are short
    inputs = (random.normal(size=(4, steps, 40)) * scales).astype(np.float32)
    outputs = (random.normal(size=(4, steps, 50)) / scales).astype(np.float32)
    contribution = matrices(tf.constant(inputs), tf.constant(outputs), steps)
    assert contribution._by_pairs
    true = np.square(np.einsum("btp,btq->bpq", inputs.astype(np.float64), outputs.astype(np.float64))).sum((1, 2))
    found = contribution.squared_norms().numpy()
    assert (~np.isfinite(found) | (found >= true * (1 - 1e-4))).all()


def test_a_row_beyond_all_measure_does_not_move_the_norms_of_others():
    random = np.random.default_rng(2)
    inputs, outputs = (random.normal(size=(3, 5, width)).astype(np.float32) for width in (40, 50))

    def others():
        return matrices(tf.constant(inputs), tf.constant(outputs), 5).squared_norms()[:2].numpy()

    before = others()
    for extreme in (1e15, 1e30, np.inf, np.nan):
        inputs[2] = extreme
        np.testing.assert_array_equal(others(), before)
