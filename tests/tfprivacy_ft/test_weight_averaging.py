"""Averages of weights, against the sums that define them."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import layers

from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer
from tfprivacy_ft.plan import PrivacyPlan
from tfprivacy_ft.weight_averaging import WeightAveraging

keras = tf.keras
X = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=24).astype(np.float32)


class Way(keras.callbacks.Callback):
    """The trainable weights as they are after every call, and while the model is validated."""

    def on_train_begin(self, logs=None):
        self.weights, self.validated = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append([w.numpy() for w in self.model.trainable_variables])

    def on_test_batch_end(self, batch, logs=None):
        self.validated.append([w.numpy() for w in self.model.trainable_variables])


def small_model(**options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.3), "mse", **options)
    return model


def fit(model, *callbacks, epochs=1, **options):
    """24 rows in 6 batches, in their order."""
    way = Way()
    model.fit(X, Y, batch_size=4, shuffle=False, epochs=epochs, verbose=0, callbacks=[way, *callbacks], **options)
    return way


def mean(way, shares):
    shares = np.asarray(shares) / np.sum(shares)
    return [sum(s * w for s, w in zip(shares, each, strict=True)) for each in zip(*way, strict=True)]


def assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_a_decay_weights_the_steps_by_its_powers_without_bias():
    averaging = WeightAveraging(0.7)
    model = small_model()
    way = fit(model, averaging)
    assert averaging.steps == len(way.weights) == 6
    assert_close(averaging.averages, mean(way.weights, 0.7 ** np.arange(6)[::-1]))
    assert_close([w.numpy() for w in model.trainable_variables], averaging.averages)


def test_without_a_decay_late_steps_count_by_a_polynomial():
    averaging = WeightAveraging()
    way = fit(small_model(), averaging)
    i = np.arange(1, 7)
    assert_close(averaging.averages, mean(way.weights, i * (i + 1) * (i + 2)))  # i^3, roughly: rising factorials


@pytest.mark.parametrize("decay", [0.7, None])
def test_steps_that_run_at_once_count_as_many(decay):
    averaging = WeightAveraging(decay)
    way = fit(small_model(steps_per_execution=4), averaging)
    i = np.arange(1, 7)
    each = i * (i + 1) * (i + 2) if decay is None else decay ** np.arange(6)[::-1]
    assert len(way.weights) == 2 and averaging.steps == 6
    assert_close(averaging.averages, mean(way.weights, [each[:4].sum(), each[4:].sum()]))


def test_validation_sees_the_averages_and_training_goes_on_with_the_weights():
    plain, averaging = fit(small_model(), epochs=2), WeightAveraging(0.9)
    way = fit(small_model(), averaging, epochs=2, validation_data=(X, Y), validation_batch_size=24)
    assert_close([w for step in way.weights for w in step], [w for step in plain.weights for w in step])
    first, second = way.validated
    assert_close(first, mean(way.weights[:6], 0.9 ** np.arange(6)[::-1]))
    assert_close(second, averaging.averages)


def test_without_use_the_model_is_left_alone_until_asked():
    averaging = WeightAveraging(0.9, use_averages=False)
    model = small_model()
    way = fit(model, averaging, validation_data=(X, Y), validation_batch_size=24)
    assert_close([w.numpy() for w in model.trainable_variables], way.weights[-1])
    assert_close(way.validated[0], way.weights[-1])
    averaging.apply()
    assert_close([w.numpy() for w in model.trainable_variables], averaging.averages)


def test_a_saved_state_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = WeightAveraging(0.8)
    fit(small_model(), whole, epochs=2)
    first = WeightAveraging(0.8, use_averages=False)
    model = small_model()
    fit(model, first)
    np.savez(tmp_path / "state.npz", **first.state())
    second, other = WeightAveraging(0.8), small_model()
    other.set_weights(model.get_weights())
    with np.load(tmp_path / "state.npz") as state:
        second.load_state(state)
    fit(other, second)
    assert second.steps == 12
    assert_close(second.averages, whole.averages)
    fit(other, second)  # the state was used up: a new average begins
    assert second.steps == 6


def test_states_that_do_not_fit_are_refused():
    averaging = WeightAveraging()
    for wrong in ({}, {"steps": -1}, {"steps": 3, "other": np.ones(2)}, {"average_0": np.ones(2)}):
        with pytest.raises(InvalidArgumentError, match=r"give what state\(\)"):
            averaging.load_state(wrong)
    averaging.load_state({"steps": 3, "average_0": np.ones(2)})
    with pytest.raises(InvalidArgumentError, match="same layers frozen"):
        fit(small_model(), averaging)
    for decay in (0.0, 1.0, "0.9"):
        with pytest.raises(InvalidArgumentError, match="decay="):
            WeightAveraging(decay)


def test_models_without_weights_yet_frozen_layers_and_short_floats():
    late = keras.Sequential([layers.Dense(4, dtype="bfloat16"), layers.Dense(1)])
    late.compile(keras.optimizers.SGD(0.3), "mse")
    averaging = WeightAveraging(0.9)
    fit(late, averaging)
    assert averaging.steps == 6 and [a.dtype for a in averaging.averages] == [np.float32] * 4
    frozen = small_model()
    frozen.layers[0].trainable = False
    frozen.compile(keras.optimizers.SGD(0.3), "mse")
    before = frozen.layers[0].get_weights()
    fit(frozen, averaging)
    assert len(averaging.averages) == 2
    for now, then in zip(frozen.layers[0].get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_only_private_steps_that_happened_count():
    plan = PrivacyPlan(24, 12, 2, 1e-3, 1.0, target_epsilon=4.0, steps_per_block=1, accumulation_steps=2)
    model = small_model()
    model.compile(plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0), "mse")
    averaging, way = WeightAveraging(0.9), Way()
    callbacks = [way, averaging, *plan.callbacks()]
    model.fit(plan.batches(X, Y), epochs=2, callbacks=callbacks, verbose=0)
    done = model.optimizer.privacy_steps
    assert averaging.steps == done and 1 < done < 4  # the budget ends first
    moved = way.weights[1 : 2 * done : 2]  # each second micro-batch is a step
    assert_close(averaging.averages, mean(moved, 0.9 ** np.arange(done)[::-1]))
