"""Models with BatchNormalization, made fit for private training: copies, and what is the same in them."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_exact, rows

from tfprivacy_ft import batch_norm
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.keras_compat import IS_KERAS_3

layers = tf.keras.layers


@pytest.fixture(scope="module")
def trained():
    """A compiled model whose statistics have moved, with one of its BatchNormalizations in a model within it."""
    tf.keras.utils.set_random_seed(0)
    inputs = layers.Input((4, 4, 3))
    x = layers.Conv2D(16, 3, padding="same", name="first")(inputs)
    x = layers.BatchNormalization(name="norm", epsilon=1e-2, gamma_initializer="random_uniform")(x)
    inner = tf.keras.Sequential(
        [layers.Input((4, 4, 16)), layers.Conv2D(4, 1), layers.BatchNormalization(name="inner_norm", scale=False)],
        name="inner",
    )
    last = layers.Dense(4, name="last")
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(inner(x) * 2.0))
    model = tf.keras.Model(inputs, layers.Add()([last(x), last(last(x))]), name="whole")
    model.compile("sgd", "mse")
    model.fit(10 * rows(4, 4, 3), rows(4), epochs=2, verbose=0)
    return model


def _find(model, name):
    return next(layer for layer in model._flatten_layers() if layer.name == name)


def _output_in_training(model, x):
    weights = model.get_weights()
    output = model(x, training=True).numpy()
    model.set_weights(weights)
    return output


def _same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_names_of_what_trains(trained):
    assert batch_norm.trainable_batch_norms(trained) == ["norm", "inner_norm"]
    with pytest.raises(UnsupportedModelError, match=r"'norm' is a BatchNormalization.*1 more.*fix_batchnorm"):
        batch_norm.refuse_trainable(trained)


@pytest.fixture(scope="module")
def frozen(trained):
    return batch_norm.fix_batchnorm(trained, "freeze")


def test_frozen_it_computes_what_it_computed(trained, frozen):
    x = rows(4, 4, 3)
    assert batch_norm.trainable_batch_norms(frozen) == []
    np.testing.assert_array_equal(frozen(x), trained(x))
    np.testing.assert_array_equal(frozen(x, training=True), frozen(x))
    assert np.abs(_output_in_training(trained, x) - trained(x)).max() > 1e-3  # the case is one in which it matters
    assert frozen.name == "whole" and getattr(frozen, "optimizer", None) is None
    assert batch_norm.trainable_batch_norms(trained) == ["norm", "inner_norm"]


def test_frozen_and_then_trained_it_keeps_its_statistics(trained, frozen):
    before = {name: _find(frozen, name).get_weights() for name in ("norm", "inner_norm")}
    _same(before["norm"], _find(trained, "norm").get_weights())
    first = _find(frozen, "first").get_weights()[0]
    assert_exact(frozen, "mse", rows(4, 4, 3), rows(4), fast=True)
    for name, weights in before.items():
        _same(weights, _find(frozen, name).get_weights())
    assert np.abs(first - _find(frozen, "first").get_weights()[0]).max() > 0


def test_group_normalization_takes_gamma_and_beta(trained):
    model = batch_norm.fix_batchnorm(trained, "groupnorm")
    norm, inner = _find(model, "norm"), _find(model, "inner_norm")
    assert isinstance(norm, layers.GroupNormalization) and isinstance(inner, layers.GroupNormalization)
    assert (norm.groups, inner.groups, norm.epsilon, inner.scale) == (2, 1, 1e-2, False)
    _same(norm.get_weights(), _find(trained, "norm").get_weights()[:2])
    _same(inner.get_weights(), _find(trained, "inner_norm").get_weights()[:1])
    for name in ("first", "last"):
        _same(_find(model, name).get_weights(), _find(trained, name).get_weights())
    x = rows(4, 4, 3)
    hidden = tf.keras.Model(model.input, norm.output)(x).numpy()
    before = _find(model, "first")(x).numpy().reshape(len(x), 16, 2, 8)
    mean, variance = before.mean((1, 3), keepdims=True), before.var((1, 3), keepdims=True)
    gamma, beta = norm.get_weights()
    expected = ((before - mean) / np.sqrt(variance + 1e-2)).reshape(hidden.shape) * gamma + beta
    np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-4)


def test_what_is_frozen_already_is_left_alone():
    model = tf.keras.Sequential([layers.Input((3,)), layers.BatchNormalization(trainable=False), layers.Dense(2)])
    for how in ("freeze", "groupnorm"):
        assert batch_norm.fix_batchnorm(model, how) is model
    inner = tf.keras.Sequential([layers.Input((3,)), layers.BatchNormalization(name="frozen"), layers.Dense(2)])
    inner.trainable = False
    model = tf.keras.Sequential([layers.Input((3,)), inner, layers.BatchNormalization(), layers.Dense(2, name="last")])
    fixed = batch_norm.fix_batchnorm(model, "groupnorm")
    assert isinstance(_find(fixed, "frozen"), layers.BatchNormalization)
    assert len(fixed.trainable_weights) == 4 and len(model.trainable_weights) == 4


def test_any_layer_with_moving_statistics_counts():
    class OwnNorm(layers.Layer):
        def build(self, shape):
            self.moving_mean = self.add_weight(name="moving_mean", shape=shape[-1:], trainable=False)

        def call(self, x):
            return x - self.moving_mean

    model = tf.keras.Sequential([layers.Input((3,)), OwnNorm(name="own"), layers.Dense(2)])
    assert batch_norm.trainable_batch_norms(model) == ["own"]
    with pytest.raises(UnsupportedModelError, match="'own'"):
        batch_norm.fix_batchnorm(model, "groupnorm")


def test_a_batch_normalization_in_a_wrapper_can_be_frozen_only():
    wrapped = layers.TimeDistributed(layers.BatchNormalization(name="wrapped"))
    model = tf.keras.Sequential([layers.Input((2, 3)), wrapped, layers.Dense(2)])
    fixed = batch_norm.fix_batchnorm(model, "freeze")
    np.testing.assert_array_equal(fixed(rows(2, 3), training=True), model(rows(2, 3)))
    with pytest.raises(UnsupportedModelError, match="'wrapped'"):
        batch_norm.fix_batchnorm(model, "groupnorm")


@pytest.mark.parametrize(
    ("shape", "options"), [((1,), {}), ((4, 3), {"axis": [1, 2]})], ids=["a single number", "several axes"]
)
def test_what_no_group_normalization_does_is_refused(shape, options):
    if IS_KERAS_3 and options:
        pytest.skip("Keras 3 has no BatchNormalization of several axes")
    model = tf.keras.Sequential(
        [layers.Input(shape), layers.BatchNormalization(name="odd", **options), layers.Dense(2)]
    )
    with pytest.raises(UnsupportedModelError, match="'odd'"):
        batch_norm.fix_batchnorm(model, "groupnorm")


def test_a_subclassed_model_is_refused_with_the_way_out():
    class Own(tf.keras.Model):
        def __init__(self):
            super().__init__(name="mine")
            self.norm = layers.BatchNormalization(name="norm")

        def call(self, x, training=False):
            return self.norm(x, training=training)

    model = Own()
    model(rows(3))
    with pytest.raises(UnsupportedModelError, match=r"'mine' cannot be copied.*trainable=False.*'norm'"):
        batch_norm.fix_batchnorm(model, "freeze")


def test_an_unknown_way_is_refused(trained):
    with pytest.raises(InvalidArgumentError, match="how='drop'"):
        batch_norm.fix_batchnorm(trained, "drop")
