"""The self-test that users run on their own model: it passes where clipping holds, and says so where it does not."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, layers

from tfprivacy_ft.clipping import check, products
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.keras_compat import keras

random = np.random.default_rng(0)
X, Y = random.normal(size=(6, 6, 3)).astype(np.float32), random.integers(0, 4, 6)
LOSS = CrossEntropy(from_logits=True)


def model_of(*parts):
    return keras.Sequential([layers.Input((6, 3)), *parts, layers.Flatten(), layers.Dense(4)])


def test_a_table_names_each_variable_and_its_rule():
    model = model_of(layers.Conv1D(4, 3, activation="tanh"), layers.LayerNormalization())
    weights = model.get_weights()
    found = check(model, X, Y, LOSS)
    assert found.passed and all(line.fast for line in found.variables)
    assert {line.rule for line in found.variables} == {"Convolution", "Elementwise", "Product"}
    assert found.crosstalk < 1e-4 and 0.99 < found.longest <= 1 + 1e-4
    for line in found.variables:
        assert 0 <= line.difference < 1e-4 and line.name in str(found)
    assert str(found).splitlines()[-1].startswith("passed")
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_slow_layer_is_called_slow():
    found = check(model_of(layers.LSTM(3, return_sequences=True)), X, Y, LOSS)
    assert found.passed and not any(line.fast for line in found.variables)
    assert {line.rule for line in found.variables} == {"one by one"}


def test_a_model_that_draws_at_random_is_held_against_its_own_draws():
    found = check(model_of(layers.Dense(4), layers.Dropout(0.5)), X, Y, LOSS)
    assert found.passed and found.crosstalk is None
    assert "draws at random" in str(found)


def test_a_broken_rule_is_seen(monkeypatch):
    whole = products.Products.weighted_sum
    monkeypatch.setattr(products.Products, "weighted_sum", lambda self, *given: 1.5 * whole(self, *given))
    found = check(model_of(), X, Y, LOSS)
    assert not found.passed
    assert str(found).splitlines()[-1].startswith("FAILED")
    assert found.longest > 1.2


def test_names_of_losses_functions_and_several_inputs():
    one, two = layers.Input((3,)), layers.Input((2,))
    model = keras.Model([one, two], layers.Dense(1)(layers.Concatenate()([one, two])))
    x = [random.normal(size=(6, 3)).astype(np.float32), random.normal(size=(6, 2)).astype(np.float32)]
    y = random.normal(size=(6, 1)).astype(np.float32)
    assert check(model, x, y, "mse").passed
    assert check(model, x, y, lambda t, p: tf.abs(t - p), l2_norm_clip=0.1, examples=3).passed


def test_regularisers_and_terms_of_layers_are_part_of_the_loss():
    parts = layers.Dense(4, kernel_regularizer="l2", activity_regularizer="l2"), layers.Dense(3, bias_regularizer="l2")
    assert check(model_of(*parts), X, Y, LOSS).passed


def test_models_in_which_examples_meet_are_refused():
    with pytest.raises(UnsupportedModelError, match="meets"):
        check(model_of(layers.BatchNormalization(name="meets")), X, Y, LOSS)


@pytest.mark.parametrize("options", [{"l2_norm_clip": 0.0}, {"examples": 1}, {"examples": 2.5}])
def test_arguments_are_checked(options):
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        check(model_of(), X, Y, LOSS, **options)
