"""The engine against its definition, a loop over examples, and against the ways that clipping is known to break."""

import contextlib
import warnings

import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    EXAMPLES,
    CrossEntropy,
    assert_exact,
    assert_same,
    compile_for_sum,
    global_norm,
    labels,
    layers,
    released_sum,
    rows,
    trainable_values,
)

from tfprivacy_ft.clipping import RoundedClipWarning, SlowClippingWarning, reference
from tfprivacy_ft.errors import UnsupportedModelError
from tfprivacy_ft.keras_compat import IS_KERAS_3
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer
from tfprivacy_ft.sampling import PADDING

LOGITS = CrossEntropy(from_logits=True)


def sequential(*parts):
    return tf.keras.Sequential([layers.Input(parts[0]), *parts[1:]])


def shared_layer():
    inputs, layer = layers.Input((5,)), layers.Dense(5, "tanh")
    return tf.keras.Model(inputs, layers.Dense(4)(layer(layer(inputs))))


def attention():
    inputs = layers.Input((6, 3))
    return tf.keras.Model(inputs, layers.Dense(4)(layers.MultiHeadAttention(2, 4)(inputs, inputs)))


class GatheredVariable(tf.keras.Model):
    """A table read by `tf.gather`."""

    def build(self, shape):
        self.table = self.add_weight(name="table", shape=(9, 4))

    def call(self, tokens):
        return tf.reduce_sum(tf.gather(tf.convert_to_tensor(self.table), tokens), 1)


class TiedEmbedding(tf.keras.Model):
    """One table for reading tokens and for scoring them."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(9, 5)
        self.middle = layers.Dense(5, "tanh")

    def call(self, tokens):
        return tf.matmul(self.middle(self.table(tokens)), self.table.embeddings, transpose_b=True)


def nested():
    inner = sequential((3,), layers.Dense(5, "tanh"), layers.Dense(4, "tanh"))
    inputs = layers.Input((6, 3))
    hidden = layers.Flatten()(layers.TimeDistributed(inner)(inputs))
    return tf.keras.Model(inputs, layers.Dense(4)(hidden))


# name: (builder, x, y, loss, whether every variable has a fast rule)
CASES = {
    "dense": (
        lambda: sequential((6, 3), layers.Flatten(), layers.Dense(5, "tanh"), layers.Dense(4)),
        rows(6, 3), labels(), LOGITS, True,
    ),
    "dense_over_time": (
        lambda: sequential((6, 3), layers.Dense(5, "tanh"), layers.LayerNormalization(), layers.Dense(4)),
        rows(6, 3), labels(6), LOGITS, True,
    ),
    "unknown_length": (
        lambda: sequential((None, 3), layers.Dense(5, "tanh"), layers.LayerNormalization(), layers.Dense(4)),
        rows(6, 3), labels(6), LOGITS, True,
    ),
    "one_channel_images": (
        lambda: sequential(
            (9, 9, 1), layers.Conv2D(4, 3, strides=2, padding="same", activation="tanh"), layers.MaxPool2D(2, 1),
            layers.Conv2D(3, 2, activation="tanh"), layers.Flatten(), layers.Dense(4, "softmax"),
        ),
        rows(9, 9, 1), labels(), "sparse_categorical_crossentropy", True,
    ),
    "coloured_images": (
        lambda: sequential(
            (9, 8, 3), layers.Conv2D(4, (3, 2), strides=2, padding="same", activation="relu"), layers.GroupNormalization(2),
            layers.Conv2D(3, 2, padding="same", activation="elu"), layers.GlobalAveragePooling2D(), layers.Dense(4),
        ),
        rows(9, 8, 3), labels(), LOGITS, True,
    ),
    "conv1d": (
        lambda: sequential((6, 3), layers.Conv1D(4, 3, padding="same"), layers.Flatten(), layers.Dense(4)),
        rows(6, 3), labels(), LOGITS, True,
    ),
    "images_over_time": (
        lambda: sequential((2, 9, 9, 3), layers.TimeDistributed(layers.Conv2D(4, 3)), layers.Flatten(), layers.Dense(4)),
        rows(2, 9, 9, 3), labels(), LOGITS, True,
    ),
    "masked_embedding": (
        lambda: sequential((6,), layers.Embedding(9, 3, mask_zero=True), layers.GlobalAveragePooling1D(), layers.Dense(4)),
        labels(6, classes=9), labels(), LOGITS, True,
    ),
    "embedding_of_unknown_length": (
        lambda: sequential((None,), layers.Embedding(9, 3, mask_zero=True), layers.GlobalAveragePooling1D(), layers.Dense(4)),
        labels(6, classes=9), labels(), LOGITS, True,
    ),
    "long_text": (
        lambda: sequential((300,), layers.Embedding(9, 3), layers.GlobalAveragePooling1D(), layers.Dense(4)),
        labels(300, classes=9), labels(), LOGITS, True,
    ),
    "gathered_variable": (GatheredVariable, labels(6, classes=9), labels(), LOGITS, True),
    "layer_called_twice": (shared_layer, rows(5), labels(), LOGITS, True),
    "sigmoid": (
        lambda: sequential((5,), layers.Dense(3, "relu"), layers.Dense(1, "sigmoid")),
        rows(5), labels(1, classes=2), tf.keras.losses.BinaryCrossentropy(), True,
    ),
    "regression": (lambda: sequential((5,), layers.Dense(2)), rows(5), rows(2, seed=4), tf.keras.losses.Huber(), True),
    "summed_loss": (
        lambda: sequential((6, 3), layers.Dense(4)), rows(6, 3), labels(6), CrossEntropy(from_logits=True, reduction="sum"), True,
    ),
    "nested": (nested, rows(6, 3), labels(), LOGITS, True),
    "masked_sequence_loss": (
        lambda: sequential((6,), layers.Embedding(9, 3, mask_zero=True), layers.Dense(4)),
        np.maximum(labels(6, classes=9) - 2, 0), labels(6), LOGITS, True,
    ),
    "attention": (attention, rows(6, 3), labels(6), LOGITS, True),
    "masked_lstm": (
        lambda: sequential((6,), layers.Embedding(9, 3, mask_zero=True), layers.LSTM(4, return_sequences=True), layers.Dense(4)),
        np.maximum(labels(6, classes=9) - 2, 0), labels(6), LOGITS, False,
    ),
    "lstm": (lambda: sequential((6, 3), layers.LSTM(5), layers.Dense(4)), rows(6, 3), labels(), LOGITS, False),
    "depthwise": (
        lambda: sequential((9, 8, 3), layers.DepthwiseConv2D(3), layers.Flatten(), layers.Dense(4)),
        rows(9, 8, 3), labels(), LOGITS, True,
    ),
    "dilated": (
        lambda: sequential((9, 8, 3), layers.Conv2D(4, 3, dilation_rate=2), layers.Flatten(), layers.Dense(4)),
        rows(9, 8, 3), labels(), LOGITS, True,
    ),
}  # fmt: skip
SLOW_IF_STATIC = {"masked_sequence_loss"}


def median_norm(model, loss, x, y, sample_weight=None):
    """A clip that shortens about half of the examples' gradients; builds the model too."""
    model(x[:1])
    each = reference.per_example_gradients(model, tf.keras.losses.get(loss), x, y, sample_weight)
    return each, float(np.median([reference.norm(g) for g in each]))


@pytest.mark.parametrize("static_batch", [False, True], ids=["any_batch", "static_batch"])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_examples(name, static_batch):
    build, x, y, loss, fast = CASES[name]
    assert_exact(
        build(), loss, x, y, fast=fast and not (static_batch and name in SLOW_IF_STATIC), static_batch=static_batch
    )


@pytest.mark.parametrize("name", ["dense", "one_channel_images", "masked_embedding", "dense_over_time", "lstm"])
def test_equals_a_loop_when_compiled_by_xla(name):
    build, x, y, loss, _ = CASES[name]
    model = build()
    each, clip = median_norm(model, loss, x, y)
    assert_same(released_sum(model, loss, x, y, clip, jit_compile=True), reference.clipped_sum(each, clip))


def test_tied_embedding_is_one_gradient_per_example():
    model, x, y = TiedEmbedding(), labels(6, classes=9), labels(6, classes=9, seed=3)
    each, clip = median_norm(model, LOGITS, x, y)
    assert_same(released_sum(model, LOGITS, x, y, clip), reference.clipped_sum(each, clip))


def test_sample_weight_counts_before_the_clip():
    build, x, y, loss, _ = CASES["dense"]
    weights = np.array([0.0, 1e6, 1.0, 2.0, 0.5, 1.0, 3.0], np.float32)
    model = build()
    each, clip = median_norm(model, loss, x, y, weights)
    assert_same(released_sum(model, loss, x, y, clip, sample_weight=weights), reference.clipped_sum(each, clip))


@pytest.mark.parametrize("static_batch", [False, True])
def test_two_outputs_with_loss_weights(static_batch):
    inputs = layers.Input((5,))
    hidden = layers.Dense(4, "tanh")(inputs)
    model = tf.keras.Model(inputs, [layers.Dense(3, name="a")(hidden), layers.Dense(1, name="b")(hidden)])
    x, a, b = rows(5), labels(classes=3), rows(1, seed=5)
    mean_square = tf.keras.losses.MeanSquaredError(reduction="sum")

    def joint(y, outputs):
        return 0.5 * LOGITS(y[:, :1], outputs[0]) + 2.0 * mean_square(y[:, 1:], outputs[1])

    each = reference.per_example_gradients(model, joint, x, np.concatenate([a[:, None], b], 1).astype(np.float32))
    clip = float(np.median([reference.norm(g) for g in each]))
    compile_for_sum(model, [LOGITS, mean_square], clip, loss_weights=[0.5, 2.0])
    before = trainable_values(model)
    batches = tf.data.Dataset.from_tensor_slices((x, (a, b))).batch(EXAMPLES, drop_remainder=static_batch)
    model.fit(batches, verbose=0)
    released = [p - q for p, q in zip(before, trainable_values(model), strict=True)]
    assert_same(released, reference.clipped_sum(each, clip))


@pytest.mark.parametrize(
    "layer", [lambda **k: layers.Dense(4, **k), lambda **k: layers.LSTM(4, **k)], ids=["fast", "slow"]
)
def test_weight_regulariser_is_outside_the_clip(layer):
    x = rows(6, 3) if "LSTM" in str(layer().__class__) else rows(5)
    factor, clip = 0.3, 1e-6
    model = sequential(x.shape[1:], layer(kernel_regularizer=tf.keras.regularizers.L2(factor)))
    model(x[:1])
    kernel = model.layers[0].trainable_variables[0].numpy()
    released = released_sum(model, LOGITS, x, labels(), clip)
    assert_same([released[0]], [2 * factor * kernel], rtol=1e-4)


def test_activity_regulariser_is_inside_the_clip():
    model = sequential((5,), layers.Dense(4, activity_regularizer=tf.keras.regularizers.L2(1e6)))
    released = released_sum(model, LOGITS, rows(5), labels(), 0.1)
    assert global_norm(released) <= EXAMPLES * 0.1 * (1 + 1e-4)
    assert global_norm(released) > 0.1


@pytest.mark.parametrize("name", CASES)
def test_one_example_moves_the_sum_by_at_most_the_clip(name):
    build, x, y, _, _ = CASES[name]
    clip = 0.5
    model = build()
    huge = (
        (lambda t, p: 1e6 * tf.reduce_mean(tf.square(tf.cast(t, tf.float32) - p), -1))
        if name in ("sigmoid", "regression")
        else (lambda t, p: 1e6 * tf.keras.losses.sparse_categorical_crossentropy(t, p, from_logits=True))
    )
    released = released_sum(model, huge, x[:1], y[:1], clip)
    assert 0.5 * clip < global_norm(released) <= clip * (1 + 1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_clip_holds_under_dropout_and_masks_differ(seed):
    tf.keras.utils.set_random_seed(seed)
    model = sequential((5,), layers.Dense(50, "relu"), layers.Dropout(0.5), layers.Dense(4))
    x = np.repeat(rows(5)[:1], 4, 0)
    y = np.zeros(4, int)
    one = released_sum(model, lambda t, p: 1e6 * LOGITS.call(t, p), x[:1], y[:1], 1.0)
    assert global_norm(one) <= 1 + 1e-4
    four = released_sum(model, lambda t, p: 1e6 * LOGITS.call(t, p), x, y, 1.0)
    assert global_norm(four) < 4 * (1 - 1e-3)  # equal masks would give four equal gradients


@pytest.mark.parametrize("name", ["dense", "one_channel_images", "lstm"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_example_contributes_nothing(name, bad):
    build, x, y, loss, _ = CASES[name]
    model = build()
    each, clip = median_norm(model, loss, x[1:], y[1:])
    spoiled = x.copy()
    spoiled[0] = bad
    assert_same(released_sum(model, loss, spoiled, y, clip), reference.clipped_sum(each, clip))


@pytest.mark.parametrize("name", ["dense", "masked_embedding", "lstm"])
def test_weight_zero_contributes_nothing_even_when_nan(name):
    build, x, y, loss, _ = CASES[name]
    model = build()
    each, clip = median_norm(model, loss, x[1:], y[1:])
    spoiled = x.copy()
    if np.issubdtype(x.dtype, np.floating):
        spoiled[0] = np.nan
    weights = np.array([0.0] + [1.0] * (EXAMPLES - 1), np.float32)
    assert_same(released_sum(model, loss, spoiled, y, clip, sample_weight=weights), reference.clipped_sum(each, clip))


@pytest.mark.parametrize("name", ["dense", "coloured_images", "dense_over_time", "attention"])
def test_one_example_does_not_move_anothers_gradient(name):
    build, x, y, loss, _ = CASES[name]
    model = build()
    clip = 0.05
    alone = released_sum(model, loss, x[:1], y[:1], clip)
    model = build_again(build, model, alone)
    with_others = released_sum(model, loss, x[:3], y[:3], clip)
    model = build_again(build, model, with_others)
    others = released_sum(model, loss, x[1:3], y[1:3], clip)
    assert_same([w - o for w, o in zip(with_others, others, strict=True)], alone, rtol=1e-3)


def build_again(build, model, released):
    """A fresh model with the weights from before the step that released `released`."""
    fresh = build()
    fresh.set_weights(model.get_weights())
    for variable, change in zip(fresh.trainable_variables, released, strict=True):
        variable.assign_add(change)
    return fresh


@pytest.mark.parametrize(
    "parts",
    [
        ((5,), layers.Dense(4), layers.BatchNormalization(name="norm"), layers.Dense(4)),
        ((5,), layers.BatchNormalization(name="norm"), layers.Dense(4)),
        ((8, 8, 1), layers.Conv2D(4, 3), layers.BatchNormalization(name="norm"), layers.Flatten(), layers.Dense(4)),
        ((5,), layers.Dense(4), layers.BatchNormalization(name="norm", scale=False, center=False)),
    ],
)
def test_batch_normalization_in_training_mode_is_refused_by_name(parts):
    with pytest.raises(UnsupportedModelError, match=r"norm.*GroupNormalization.*trainable=False"):
        released_sum(sequential(*parts), LOGITS, rows(*parts[0]), labels(), 1.0)


def test_frozen_batch_normalization_is_exact():
    model = sequential((5,), layers.Dense(4), layers.BatchNormalization(trainable=False), layers.Dense(4))
    x, y = rows(5), labels()
    each, clip = median_norm(model, LOGITS, x, y)
    assert_same(released_sum(model, LOGITS, x, y, clip), reference.clipped_sum(each, clip))


def test_mean_over_the_batch_inside_the_model_is_refused():
    inputs = layers.Input((5,))
    centred = layers.Lambda(lambda t: t - tf.reduce_mean(t, 0, keepdims=True), name="centre")(inputs)
    model = tf.keras.Model(inputs, layers.Dense(4)(centred))
    with pytest.raises(UnsupportedModelError, match="centre"):
        released_sum(model, LOGITS, rows(5), labels(), 1.0)


def test_a_term_that_tells_the_batch_size_is_clipped_with_the_example():
    model = sequential((5,), layers.Dense(4))

    def loss(t, p):
        size = tf.cast(tf.shape(p)[0], tf.float32)
        return tf.reduce_sum(LOGITS.call(t, p)) + 3.0 * size * tf.reduce_sum(model.trainable_variables[0])

    x, y = rows(5), labels()
    each = reference.per_example_gradients(model, loss, x, y)
    released = released_sum(model, loss, x, y, 0.1)
    assert_same(released, reference.clipped_sum(each, 0.1))
    assert global_norm(released) > 0.5  # all point the way of the term that they share


def lambda_between(function):
    return sequential((5,), layers.Dense(4), layers.Lambda(function, name="unusual"), layers.Dense(4))


@tf.custom_gradient
def reversed_gradient(t):
    return tf.identity(t), lambda upstream: -upstream


@tf.custom_gradient
def squared_with_own_gradient(t):
    return tf.square(t), lambda upstream: upstream * 2.0 * t


@pytest.mark.parametrize("static_batch", [False, True])
@pytest.mark.parametrize(
    ("function", "slow"),
    [
        (tf.nn.silu, False),
        (lambda t: tf.nn.silu(t) + tf.linalg.norm(tf.linalg.diag(t), axis=-1), True),
        (reversed_gradient, True),
    ],
    ids=["swish", "unknown_op", "own_gradient"],
)
def test_unusual_ops_are_exact(function, slow, static_batch):
    model, x, y = lambda_between(function), rows(5), labels()
    each, clip = median_norm(model, LOGITS, x, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compile_for_sum(model, LOGITS, clip)
        before = trainable_values(model)
        model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(EXAMPLES, drop_remainder=static_batch), verbose=0)
    released = [b - a for b, a in zip(before, trainable_values(model), strict=True)]
    assert_same(released, reference.clipped_sum(each, clip))
    assert slow == any("unusual" in str(w.message) for w in caught if w.category is SlowClippingWarning)


@pytest.mark.parametrize("static_batch", [False, True])
def test_a_custom_gradient_that_reads_the_batch_is_refused(static_batch):
    model = lambda_between(squared_with_own_gradient)
    with pytest.raises(UnsupportedModelError, match="custom gradient"):
        released_sum(model, LOGITS, rows(5), labels(), 1.0, static_batch=static_batch)


def test_frozen_then_unfrozen_layers_follow_each_compile():
    model = sequential((5,), layers.Dense(4, "tanh"), layers.Dense(4))
    model.layers[0].trainable = False
    frozen = model.layers[0].get_weights()[0]
    compile_for_sum(model, LOGITS, 0.1).fit(rows(5), labels(), verbose=0)
    np.testing.assert_array_equal(frozen, model.layers[0].get_weights()[0])
    model.layers[0].trainable = True
    compile_for_sum(model, LOGITS, 0.1).fit(rows(5), labels(), verbose=0)
    assert np.abs(frozen - model.layers[0].get_weights()[0]).max() > 0


def test_golden_case_of_tensorflow_privacy():
    """Gradients [3, 4] and [6, 8] with clip 1 point in direction (0.6, 0.8), the clip being over all variables."""
    model = sequential((2,), layers.Dense(1, use_bias=False, kernel_initializer="zeros"))
    x = np.array([[3.0, 4.0], [6.0, 8.0]], np.float32)
    released = released_sum(model, lambda t, p: tf.squeeze(p, -1), x, np.zeros(2), 1.0)
    np.testing.assert_allclose(released[0].ravel(), [1.2, 1.6], rtol=1e-5)


@pytest.mark.parametrize("name", ["dense_over_time", "one_channel_images", "masked_embedding", "summed_loss", "lstm"])
def test_a_batch_of_one_is_exact(name):
    build, x, y, loss, _ = CASES[name]
    model = build()
    each, _ = median_norm(model, loss, x[:1], y[:1])
    clip = 0.6 * reference.norm(each[0])
    released = released_sum(model, loss, x[:1], y[:1], clip, static_batch=True)
    assert_same(released, reference.clipped_sum(each, clip))


def test_batch_normalization_is_refused_for_a_batch_of_one():
    model = sequential((5,), layers.Dense(4), layers.BatchNormalization(name="norm"), layers.Dense(4))
    with pytest.raises(UnsupportedModelError, match="norm"):
        released_sum(model, LOGITS, rows(5)[:1], labels()[:1], 1.0, static_batch=True)


def test_a_static_batch_needs_no_more_than_the_fast_rules():
    model = sequential((5,), layers.Dense(4), layers.LayerNormalization(), layers.Dense(4))
    compile_for_sum(model, LOGITS, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowClippingWarning)
        for size in (1, 2, 7):
            model.train_on_batch(rows(5)[:size], labels()[:size])


class RunningMean(layers.Layer):
    """Centres by a mean that each batch moves: examples reach others through the variable."""

    def __init__(self, how, **options):
        super().__init__(**options)
        self.how = how

    def build(self, shape):
        self.mean = self.add_weight(name="mean", shape=(8, shape[-1]), trainable=False)

    def call(self, inputs):
        mean = tf.reduce_mean(inputs, 0)
        if self.how == "assign":
            self.mean.assign(tf.tile(mean[None], [8, 1]))
        elif self.how == "scatter":
            self.mean.scatter_nd_update([[0]], mean[None])
        elif self.how == "slice":
            self.mean[0].assign(mean)
        elif self.how == "cond":
            tf.cond(mean[0] > 0, lambda: self.mean.assign(0.0 * self.mean + mean), lambda: self.mean)
        elif self.how == "function":
            tf.function(lambda m: self.mean.assign_add(0.0 * self.mean + m))(mean)
        elif self.how == "kept":  # nothing reads it, but it stays in the model's weights
            self.mean.assign(tf.tile(mean[None], [8, 1]))
            return inputs
        return inputs - tf.reduce_mean(self.mean, 0)


@pytest.mark.skipif(IS_KERAS_3, reason="the ways of writing are those of Keras 2 variables")
@pytest.mark.parametrize("how", ["assign", "scatter", "slice", "cond", "function", "kept"])
def test_a_layer_that_writes_the_batch_to_a_variable_is_refused(how):
    model = sequential((5,), RunningMean(how, name="running"), layers.Dense(4))
    with pytest.raises(UnsupportedModelError, match="running"):
        released_sum(model, LOGITS, rows(5), labels(), 1.0)


class LearnedWeight(tf.keras.Model):
    """A loss weighted by a variable that is also added to it (Kendall, Gal & Cipolla 2018)."""

    def build(self, shape):
        self.log_variance = self.add_weight(name="log_variance", shape=(), initializer="zeros")
        self.head = layers.Dense(4)

    def call(self, inputs):
        return self.head(inputs)


@pytest.mark.parametrize("static_batch", [False, True])
def test_a_learned_weight_of_the_loss_is_no_regulariser(static_batch):
    model, x, y = LearnedWeight(), rows(5), labels()
    model(x[:1])

    def loss(t, p):
        shared = tf.squeeze(tf.convert_to_tensor(model.log_variance))
        return tf.reduce_mean(tf.exp(-shared) * 1e3 * LOGITS.call(t, p)) + shared

    each = reference.per_example_gradients(model, loss, x, y)
    released = released_sum(model, loss, x, y, 0.1, static_batch=static_batch)
    assert_same(released, reference.clipped_sum(each, 0.1))


@tf.custom_gradient
def hidden_statistic(t):
    return tf.identity(t), lambda upstream: upstream * tf.reduce_mean(tf.square(t))


@pytest.mark.parametrize("static_batch", [False, True])
def test_a_custom_gradient_with_a_statistic_of_its_own_is_refused(static_batch):
    with pytest.raises(UnsupportedModelError, match="custom gradient"):
        released_sum(lambda_between(hidden_statistic), LOGITS, rows(5), labels(), 1.0, static_batch=static_batch)


@pytest.mark.parametrize(
    "mixing",
    [
        lambda t: 0.7 * t + 0.3 * tf.random.shuffle(t),
        lambda t: tf.gather(t, tf.random.shuffle(tf.range(tf.shape(t)[0]))),
        lambda t: t + tf.stop_gradient(tf.random.poisson([], tf.reduce_max(tf.abs(t)))),
    ],
    ids=["mixup", "permutation", "rate"],
)
def test_random_draws_from_the_batch_are_refused(mixing):
    with pytest.raises(UnsupportedModelError, match="unusual"):
        released_sum(lambda_between(mixing), LOGITS, rows(5), labels(), 1.0)


@pytest.mark.parametrize("length", [8, 67, 130])
def test_lengths_that_are_unknown_when_traced_do_not_make_rows_examples(length):
    """A window as long as the lengths that the proof tries, after which one row looks like one example."""
    inputs = layers.Input((None, 3))
    hidden = layers.AveragePooling1D(67, padding="same")(inputs)
    model = tf.keras.Model(inputs, layers.GlobalAveragePooling1D()(layers.Dense(4, use_bias=False)(hidden)))
    x = np.random.default_rng(0).normal(size=(1, length, 3)).astype(np.float32)
    batches = tf.data.Dataset.from_generator(
        lambda: [(x, np.ones(1))], output_signature=(tf.TensorSpec([None, None, 3]), tf.TensorSpec([None]))
    )
    compile_for_sum(model, lambda t, p: 1e6 * LOGITS.call(t, p), 0.5)
    before = trainable_values(model)
    with contextlib.suppress(tf.errors.InvalidArgumentError):  # refused when run, which releases nothing
        model.fit(batches, verbose=0)
    moved = global_norm([b - a for b, a in zip(before, trainable_values(model), strict=True)])
    assert moved <= 0.5 * (1 + 1e-4)


@pytest.mark.parametrize(("x", "y"), [(1e19, -4e-20), (5e-20, 5e18)])
def test_norms_do_not_underflow(x, y):
    model = sequential((100,), layers.Dense(100, kernel_initializer="zeros", use_bias=False))

    def loss(t, p):
        return tf.reduce_sum(tf.square(p - t), -1)

    released = released_sum(model, loss, np.full((1, 100), x, "float32"), np.full((1, 100), y, "float32"), 0.01)
    assert global_norm(released) <= 0.01 * (1 + 1e-4)


def test_the_batch_size_does_not_leak_through_tiled_variables():
    class Tiled(tf.keras.Model):
        def build(self, shape):
            self.offset = self.add_weight(name="offset", shape=(5,), initializer="ones")
            self.head = layers.Dense(4)

        def call(self, inputs):
            tiled = tf.tile(tf.convert_to_tensor(self.offset)[None], [tf.shape(inputs)[0], 1])
            self.add_loss(tf.reduce_sum(tf.square(tiled)))
            return self.head(inputs + tiled)

    released = released_sum(Tiled(), LOGITS, rows(5), labels(), 1e-6)
    assert global_norm(released) <= EXAMPLES * 1e-6 * (1 + 1e-4)


@pytest.mark.parametrize("layer", [layers.Dense, layers.LSTM], ids=["fast", "slow"])
def test_rows_that_a_sampler_filled_in_contribute_nothing_at_all(layer):
    shape = (6, 3) if layer is layers.LSTM else (5,)
    layer = layer(4, activity_regularizer=tf.keras.regularizers.L2(1e3), bias_initializer="ones")
    model, marks = sequential(shape, layer), np.full(EXAMPLES, PADDING, np.float32)
    assert global_norm(released_sum(model, LOGITS, rows(*shape), labels(), 0.1, sample_weight=marks)) == 0


@pytest.mark.parametrize("static_batch", [False, True])
def test_a_summed_loss_on_the_slow_path_is_each_examples_own(static_batch):
    model, x, y = sequential((6, 3), layers.LSTM(5), layers.Dense(4)), rows(6, 3), labels()
    loss = CrossEntropy(from_logits=True, reduction="sum")
    each, clip = median_norm(model, loss, x, y)
    released = released_sum(model, loss, x, y, clip, static_batch=static_batch)
    assert_same(released, reference.clipped_sum(each, clip))


def test_eager_loss_is_refused():
    model = sequential((5,), layers.Dense(4))
    model.compile(DPKerasSGDOptimizer(1.0, 0.0), LOGITS, run_eagerly=True)
    with pytest.raises(UnsupportedModelError, match="run_eagerly"):
        model.fit(rows(5), labels(), verbose=0)


def test_steps_per_execution_equals_single_steps():
    x, y = np.concatenate([rows(5), rows(5, seed=9)]), np.concatenate([labels(), labels(seed=8)])
    weights = None
    results = []
    for together in (1, 2):
        model = sequential((5,), layers.Dense(4, "tanh"), layers.Dense(4))
        weights = weights or model.get_weights()
        model.set_weights(weights)
        compile_for_sum(model, LOGITS, 0.1, steps_per_execution=together)
        model.fit(x, y, batch_size=EXAMPLES, shuffle=False, verbose=0)
        results.append(trainable_values(model))
    assert_same(results[1], results[0], rtol=1e-5)


@pytest.mark.parametrize("static_batch", [False, True])
@pytest.mark.parametrize(
    "mixing",
    [
        lambda t: t + tf.roll(t, 1, 0),
        lambda t: t + tf.sort(t, 0),
        lambda t: tf.matmul(tf.matmul(t, t, transpose_b=True), t),
        lambda t: t[::-1],
    ],
    ids=["roll", "sort", "products", "reversed"],
)
def test_what_no_rule_knows_to_mix_examples_is_found_by_looking(mixing, static_batch):
    model = lambda_between(mixing)
    before = model.get_weights()
    with pytest.raises((tf.errors.InvalidArgumentError, UnsupportedModelError), match=r"unusual.*see the others"):
        released_sum(model, LOGITS, rows(5), labels(), 1.0, static_batch=static_batch)
    for was, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)


def test_a_loss_that_compares_examples_is_refused():
    def contrastive(t, p):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.range(tf.shape(p)[0]), tf.matmul(p, p, transpose_b=True)
        )

    with pytest.raises((tf.errors.InvalidArgumentError, UnsupportedModelError), match="see the others"):
        released_sum(sequential((5,), layers.Dense(4)), contrastive, rows(5), labels(), 1.0)


def test_draws_inside_a_function_are_no_sign_of_coupling():
    noisy = tf.function(lambda t: t + tf.random.normal(tf.shape(t)))
    model = sequential((5,), layers.Dense(4), layers.Lambda(noisy), layers.Dense(4))
    assert global_norm(released_sum(model, LOGITS, rows(5), labels(), 0.1)) <= EXAMPLES * 0.1 * (1 + 1e-4)


@pytest.mark.parametrize(
    ("gpus", "rounded", "warned"), [(["GPU:0"], True, True), (["GPU:0"], False, False), ([], True, False)]
)
def test_products_that_a_gpu_rounds_are_warned_of(monkeypatch, gpus, rounded, warned):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: gpus if kind == "GPU" else [])
    monkeypatch.setattr(tf.config.experimental, "tensor_float_32_execution_enabled", lambda: rounded)
    model = compile_for_sum(sequential((5,), layers.Dense(4)), LOGITS, 1.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.fit(rows(5), labels(), verbose=0)
    assert any(w.category is RoundedClipWarning for w in seen) == warned
