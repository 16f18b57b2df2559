"""Audits of real trainings: a right one is not contradicted, and a broken one is.

The score of a canary that was in is normal with mean T q and variance T (z^2 + q (1 - q)), in units of the clip; of one
that was out, with mean 0 and variance T z^2: nothing else moves its weight. So how many guesses are right can be
simulated without a training, and how likely each assertion fails by chance is known.
"""

import dataclasses
import warnings

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, layers, released_sum
from scipy import stats

from tfprivacy_ft import DPKerasSGDOptimizer, PrivacyPlan, datasets, models, noise, optimizers
from tfprivacy_ft.audit import AuditResult, Canaries, epsilon_lower_bound
from tfprivacy_ft.clipping import SlowClippingWarning
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError

CANARIES, GUESSES, STEPS, NOISE, DELTA = 4000, 600, 20, 2.632, 1e-5  # epsilon 4.0, for batches of a half
DIGITS = datasets.load("digits")
X, Y = DIGITS.x_train[:200], DIGITS.y_train[:200]


def small_model(**options):
    return tf.keras.Sequential([layers.Input((5,)), layers.Dense(4, activation="tanh", **options), layers.Dense(3)])


def small_data(rows=40):
    random = np.random.default_rng(0)
    return random.normal(size=(rows, 5)).astype(np.float32), random.integers(0, 3, rows)


def audited_digits():
    canaries = Canaries(
        models.build_model("mlp", input_shape=(8, 8, 1), num_outputs=10), X, Y, num_canaries=CANARIES, guesses=GUESSES
    )
    size = canaries.num_examples
    plan = PrivacyPlan(size, size // 2, STEPS // 2, DELTA, NOISE)
    optimizer = plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0, learning_rate=0.5)
    canaries.model.compile(optimizer, "sparse_categorical_crossentropy")
    canaries.model.fit(canaries.batches(plan), epochs=plan.epochs, callbacks=plan.callbacks(), verbose=0)
    assert optimizer.privacy_steps == STEPS
    return canaries.result(plan)


def test_a_right_training_is_not_contradicted_and_much_of_its_epsilon_is_found():
    """Of 600 guesses, 505.6 are right on average (standard deviation 8.9, by simulation as above).

    The bound passes a fifth of epsilon from 434 on, and epsilon itself from 595 on. Given the scores, guesses are right
    independently of each other, so that the binomial tails beyond are bounds (Hoeffding 1956): 4e-14 and 4e-37.
    """
    result = audited_digits()
    assert result.reported_epsilon == pytest.approx(4.0, abs=0.01)
    assert result.reported_epsilon < result.ceiling  # so that it could have failed
    assert result.holds
    assert result.epsilon_lower_bound >= 0.2 * result.reported_epsilon
    assert "not contradicted" in str(result)
    assert (result.num_canaries, result.guesses, result.delta) == (CANARIES, GUESSES, DELTA)
    assert result.epsilon_lower_bound == epsilon_lower_bound(CANARIES, GUESSES, result.correct, DELTA, 0.95)


def a_tenth_of_the_noise(monkeypatch):
    draw = noise.GaussianNoise.draw
    monkeypatch.setattr(
        noise.GaussianNoise, "draw", lambda self, values, clip, multiplier: draw(self, values, clip, multiplier / 10)
    )


def ten_times_the_clip(monkeypatch):
    summed = optimizers.clipped_sum
    monkeypatch.setattr(optimizers, "clipped_sum", lambda loss, v, clip, *a, **k: summed(loss, v, 10 * clip, *a, **k))


@pytest.mark.parametrize("sabotage", [a_tenth_of_the_noise, ten_times_the_clip])
def test_a_broken_training_is_contradicted(monkeypatch, sabotage):
    """By simulation 0.003 of the 600 guesses are wrong on average; six have to be, which is far rarer than 1e-6."""
    sabotage(monkeypatch)
    result = audited_digits()
    assert result.reported_epsilon == pytest.approx(4.0, abs=0.01)  # the ledger believes what it was told
    assert not result.holds
    assert "contradicted" in str(result) and "not contradicted" not in str(result)


def one_noiseless_step(canaries, clip=0.7, **settings):
    """What each canary's coordinate got, by the clip, the model's own sum, and the plan."""
    size = canaries.num_examples
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no noise, and no privacy
        plan = PrivacyPlan(size, size, 1, 1e-5, 0.0, **settings.pop("plan", {}))
    optimizer = plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=clip, learning_rate=float(size))
    canaries.model.compile(optimizer, CrossEntropy(from_logits=True), **settings)
    batches = canaries.batches(plan)  # of all: each takes part with probability 1
    own = canaries.model._model.trainable_variables
    before = [v.numpy() for v in own]
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowClippingWarning)
        canaries.model.fit(batches, verbose=0, callbacks=plan.callbacks())
    after = [v.numpy() for v in own]
    assert len(canaries.model.trainable_variables) == len(own) + 1
    return canaries.model.scores() / clip, [b - a for b, a in zip(before, after, strict=True)], plan


@pytest.mark.parametrize("clip", [0.7, 100.0])
def test_a_canary_adds_the_clip_along_its_own_coordinate_and_the_others_add_what_they_did(clip):
    model, (x, y) = small_model(), small_data()
    copy = tf.keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    alone = released_sum(copy, CrossEntropy(from_logits=True), x, y, clip)
    canaries = Canaries(model, x, y, num_canaries=50)
    moved, own, _ = one_noiseless_step(canaries, clip)
    np.testing.assert_allclose(moved, canaries.included, rtol=1e-5)
    for mine, theirs in zip(own, alone, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * clip)


@pytest.mark.parametrize(
    "settings",
    [{"jit_compile": True}, {"plan": {"accumulation_steps": 2}}],
    ids=["jit", "accumulation"],
)
def test_it_is_the_ordinary_engine_with_all_its_settings(settings):
    canaries = Canaries(small_model(), *small_data(), num_canaries=20)
    moved, *_ = one_noiseless_step(canaries, **settings)
    np.testing.assert_allclose(moved, canaries.included, rtol=1e-5)


def test_examples_of_several_rows_and_weights_are_kept():
    x, y = small_data()
    canaries = Canaries(
        small_model(), x, y.tolist(), num_canaries=20, rows_per_example=2, sample_weight=np.linspace(0, 1, 40)
    )
    assert canaries.num_examples == 40
    moved, *_ = one_noiseless_step(canaries, plan={"rows_per_example": 2})
    np.testing.assert_allclose(moved, canaries.included, rtol=1e-5)


class TwoInputs(tf.keras.Model):
    """A subclass that Keras cannot look into before it runs, with a regulariser that depends on the data."""

    def __init__(self):
        super().__init__()
        self.left, self.right = layers.Dense(3), layers.Dense(3, activity_regularizer="l2")

    def call(self, inputs, training=None):
        return self.left(inputs["left"]) + self.right(inputs["right"])


def test_models_with_several_inputs_and_losses_of_their_own():
    x, y = small_data()
    canaries = Canaries(TwoInputs(), {"left": x, "right": x[:, :2]}, y, num_canaries=20)
    canaries.model({"rows": {"left": x[:1], "right": x[:1, :2]}, "canary": np.zeros(1, np.int32)})
    moved, *_ = one_noiseless_step(canaries)
    np.testing.assert_allclose(moved, canaries.included, rtol=1e-5)


def test_coins_are_fair_and_fresh():
    """20 000 coins outside of +-5.3 standard deviations: one of 10^7; two sets of them alike: one of 2^20000."""
    tosses = []
    for _ in range(2):
        tf.keras.utils.set_random_seed(1)
        tosses.append(Canaries(small_model(), *small_data(), num_canaries=20_000).included)
    for included in tosses:
        low, high = stats.binom.ppf([5e-8, 1 - 5e-8], 20_000, 0.5)
        assert low <= included.sum() <= high
    assert (tosses[0] != tosses[1]).any()
    assert 0.4 < np.mean(tosses[0] == tosses[1]) < 0.6  # nor is one the other's opposite: 28 standard deviations


def test_how_many_examples_there_are_does_not_depend_on_the_coins():
    for _ in range(5):
        canaries = Canaries(small_model(), *small_data(), num_canaries=20)
        assert canaries.num_examples == 60
        with pytest.raises(InvalidArgumentError, match="num_examples=40"):
            canaries.batches(PrivacyPlan(40, 20, 1, 1e-5, 1.0))


def test_guesses_are_the_ends_of_the_order():
    canaries = Canaries(small_model(), *small_data(), num_canaries=20)
    assert canaries.guesses == 4
    *_, plan = one_noiseless_step(canaries)
    for guesses in (1, 7, 20):
        canaries.guesses = guesses
        result = canaries.result(plan)
        high, low = guesses - guesses // 2, guesses // 2
        assert result.correct == min(high, canaries.included.sum()) + min(low, (~canaries.included).sum())
        assert result.holds and result.reported_epsilon == np.inf


def test_other_optimizers_are_scored_too():
    """Adam: of 100 guesses 97.1 are right on average, by simulation; fewer than 85, by the binomial tail: 3e-8."""
    canaries = Canaries(small_model(), *small_data(), num_canaries=500, guesses=100)
    plan = PrivacyPlan(540, 270, 10, 1e-5, 0.5)
    canaries.model.compile(plan.optimizer(tf.keras.optimizers.Adam, l2_norm_clip=1.0), CrossEntropy(from_logits=True))
    canaries.model.fit(canaries.batches(plan), epochs=10, verbose=0)  # accounted for without amplification
    result = canaries.result(plan)
    assert result.correct >= 85
    assert result.holds


def test_nothing_trained_is_no_audit():
    canaries, plan = Canaries(small_model(), *small_data(), num_canaries=20), PrivacyPlan(60, 30, 1, 1e-5, 1.0)
    canaries.model.compile(plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0), CrossEntropy(from_logits=True))
    with pytest.raises(InvalidArgumentError, match="did not move"):
        canaries.result(plan)


class OwnStep(tf.keras.Model):
    def train_step(self, data):
        return {}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"num_canaries": 0}, "num_canaries=0"),
        ({"guesses": 0}, "guesses=0"),
        ({"guesses": 21}, "num_canaries=20"),
        ({"rows_per_example": 0}, "rows_per_example=0"),
        ({"model": "mlp"}, "give a Keras model"),
    ],
)
def test_what_is_out_of_range_is_refused(change, sentence):
    arguments = {"model": small_model(), "num_canaries": 20, **change}
    with pytest.raises(InvalidArgumentError, match=sentence):
        Canaries(arguments.pop("model"), *small_data(), **arguments)


def test_models_that_train_themselves_are_refused():
    with pytest.raises(UnsupportedModelError, match="OwnStep has a train_step of its own"):
        Canaries(OwnStep(), *small_data(), num_canaries=20)


def test_the_statement_says_what_was_found_and_what_that_is_worth():
    result = AuditResult(2.3459, 4.0, 1e-5, 1000, 300, 270, 0.95)
    assert result.holds
    assert str(result).startswith("epsilon >= 2.345 at delta = 1e-05, with 0.95 confidence; reported: 4.")
    assert "proves nothing" in str(result)
    assert "270 of 300 guesses were right" in str(result)
    assert "could not have" in str(dataclasses.replace(result, reported_epsilon=8.0))
    broken = dataclasses.replace(result, reported_epsilon=2.0)
    assert not broken.holds
    assert "is contradicted" in str(broken) and "one audit in 20" in str(broken)
