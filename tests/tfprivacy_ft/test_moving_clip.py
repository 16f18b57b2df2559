"""The moving clip: where it goes, what it costs, and that noise and bound follow it."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import global_norm, layers, trainable_values

from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.moving_clip import Adaptive, noise_on_sum
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer
from tfprivacy_ft.plan import PrivacyPlan
from tfprivacy_ft.sampling import PADDING

keras = tf.keras
# Each row is its own gradient; their norms are 1 to 100.
X = np.zeros([100, 4], np.float32)
X[np.arange(100), np.arange(100) % 4] = np.arange(1, 101)
Y = np.zeros(100, np.float32)


def linear_model(optimizer, width=4, outputs=1, **options):
    model = keras.Sequential([layers.Input((width,)), layers.Dense(outputs, use_bias=False)])
    model.compile(optimizer, lambda true, predicted: tf.reduce_sum(predicted, -1), **options)
    return model


def optimizer_with(rule, clip, noise=0.5, **arguments):
    arguments = {"learning_rate": 1.0, "expected_batch_size": 100, **arguments}
    return DPKerasSGDOptimizer(clip, noise, clipping=rule, **arguments)


@pytest.mark.parametrize(("start", "jit"), [(1.0, False), (1000.0, False), (1000.0, True)])
def test_the_clip_goes_to_the_target_quantile_from_either_side(start, jit):
    optimizer = optimizer_with(Adaptive(target_quantile=0.3, learning_rate=0.5), start)
    model = linear_model(optimizer, jit_compile=jit)
    for _ in range(120):
        model.train_on_batch(X, Y)
    # Around 30 the clip's logarithm has a standard deviation of 0.05
    assert 20 < optimizer.l2_norm_clip < 45
    assert optimizer.privacy_steps == 120


@pytest.mark.parametrize("steps", [1, 2])
def test_without_noise_a_step_moves_the_clip_by_the_formula(steps):
    optimizer = optimizer_with(Adaptive(0.5, 0.2), 40.0, noise=0.0, accumulation_steps=steps)
    model = linear_model(optimizer)
    clips = []
    for _ in range(2 * steps):
        rows = slice(0, 100) if steps == 1 else slice(len(clips) % 2, 100, 2)
        clips.append(optimizer.l2_norm_clip)
        model.train_on_batch(X[rows], Y[rows])
    first = 40 * np.exp(-0.2 * (0.40 - 0.5))
    second = first * np.exp(-0.2 * (int(first) / 100 - 0.5))
    assert optimizer.l2_norm_clip == pytest.approx(second, rel=1e-5)
    assert clips[:steps] == [40.0] * steps


def test_bound_and_noise_are_those_of_the_current_clip():
    optimizer = optimizer_with(Adaptive(0.5, 1.0), 8.0, noise=0.0, expected_batch_size=1)
    model = linear_model(optimizer)
    for _ in range(4):
        clip, before = optimizer.l2_norm_clip, trainable_values(model)
        model.train_on_batch(X[-1:], Y[-1:])
        moved = global_norm([b - a for b, a in zip(before, trainable_values(model), strict=True)])
        assert moved == pytest.approx(min(clip, 100.0), rel=1e-4)
    noisy = optimizer_with(Adaptive(0.5, 1.0, count_stddev=0.6), 8.0, noise=1.0, expected_batch_size=10)
    model = linear_model(noisy, width=200, outputs=200)
    x, y, nothing = np.zeros([10, 200], np.float32), np.zeros(10, np.float32), np.zeros(10, np.float32)
    for _ in range(3):
        clip, before = noisy.l2_norm_clip, trainable_values(model)
        model.train_on_batch(x, y, sample_weight=nothing)
        moved = np.concatenate([(b - a).ravel() for b, a in zip(before, trainable_values(model), strict=True)])
        # 40 000 values: 5 standard errors are a relative error of 0.018, probability 6e-7
        assert moved.std() == pytest.approx(clip * noise_on_sum(1.0, 0.6) / 10, rel=0.018)
    assert noisy.l2_norm_clip < 8.0  # gradients of zero are within any clip


def test_sum_and_count_together_cost_the_noise_multiplier():
    for z, stddev in ((1.0, 0.6), (2.0, 5.0), (0.7, 30.0)):
        of_sum = noise_on_sum(z, stddev)
        assert of_sum > z
        # One example moves the sum by a clip and the count by 1/2: the shift in units of the noise is that of z alone.
        assert np.hypot(1 / of_sum, 0.5 / stddev) == pytest.approx(1 / z)
    with pytest.raises(InvalidArgumentError, match=r"count_stddev=0\.5.*half of noise_multiplier=1\.0"):
        noise_on_sum(1.0, 0.5)


@pytest.mark.parametrize("secure", [False, True])
def test_the_count_is_noisy(secure):
    moves = []
    for _ in range(2):
        optimizer = optimizer_with(Adaptive(0.5, 0.2, count_stddev=20.0), 40.0, noise=1.0, secure_noise=secure)
        linear_model(optimizer).train_on_batch(X, Y)
        moves.append(np.log(optimizer.l2_norm_clip / 40))
    assert moves[0] != moves[1]
    assert all(abs(move - 0.02) < 0.2 * 0.2 * 6 for move in moves)  # six standard deviations, probability 4e-9


def test_what_fills_a_batch_has_no_vote_and_a_bad_example_is_not_within():
    for x, weight, expected in (
        (X[:10], PADDING, 0.5),  # nobody votes
        (X[:10], 1.0, 1.0),
        (np.full_like(X[:10], np.nan), 1.0, 0.0),
    ):
        optimizer = optimizer_with(Adaptive(0.5, 0.2), 50.0, noise=0.0, expected_batch_size=10)
        model = linear_model(optimizer)
        model.train_on_batch(x, Y[:10], sample_weight=np.full(10, weight, np.float32))
        assert optimizer.l2_norm_clip == pytest.approx(50.0 * np.exp(-0.2 * (expected - 0.5)), rel=1e-5)


def test_the_clip_is_in_no_checkpoint_and_goes_on_in_a_saved_model(tmp_path):
    optimizer = optimizer_with(Adaptive(0.3, 0.5), 1.0)
    model = keras.Sequential([layers.Input((4,)), layers.Dense(1, use_bias=False)])
    model.compile(optimizer, "mean_squared_error")
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    model.train_on_batch(X, Y)
    path = checkpoint.save(str(tmp_path / "at"))
    for _ in range(5):
        model.train_on_batch(X, Y)
    clip = optimizer.l2_norm_clip
    checkpoint.restore(path)
    assert optimizer.l2_norm_clip == clip != 1.0
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert loaded.l2_norm_clip == pytest.approx(clip)
    assert loaded.mechanism.clipping.get_config() == optimizer.mechanism.clipping.get_config()


def test_the_accounts_are_those_of_the_noise_multiplier():
    plan = PrivacyPlan(num_examples=100, batch_size=25, epochs=2, delta=1e-3, noise_multiplier=2.0)
    optimizer = plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0, clipping=Adaptive())
    model = linear_model(optimizer)
    model.fit(plan.batches(X, Y), epochs=2, callbacks=plan.callbacks(), verbose=0)
    assert {(e.sampler, e.noise_multiplier, e.l2_norm_clip) for e in plan.ledger.events()} == {("poisson", 2.0, None)}
    assert sum(e.count for e in plan.ledger.events()) == 8
    assert optimizer.l2_norm_clip != 1.0


def test_a_step_that_was_not_let_through_leaves_the_clip():
    plan = PrivacyPlan(num_examples=100, batch_size=25, epochs=2, delta=1e-3, noise_multiplier=2.0)
    optimizer = plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0, clipping=Adaptive())
    model = linear_model(optimizer, jit_compile=True)
    model.train_on_batch(X, Y)  # compiled, and no callback to reserve it
    assert (optimizer.privacy_steps, optimizer.l2_norm_clip) == (0, 1.0)


@pytest.mark.parametrize(
    ("rule", "arguments", "sentence"),
    [
        (lambda: Adaptive(target_quantile=1.0), {}, r"target_quantile=1\.0"),
        (lambda: Adaptive(learning_rate=-0.2), {}, r"learning_rate=-0\.2"),
        (lambda: Adaptive(count_stddev=0), {}, "count_stddev=0"),
        (lambda: Adaptive(count_stddev=0.2), {}, r"half of noise_multiplier=0\.5"),
        (Adaptive, {"expected_batch_size": None}, "needs expected_batch_size"),
    ],
)
def test_bad_settings_get_one_sentence(rule, arguments, sentence):
    with pytest.raises(InvalidArgumentError, match=sentence):
        optimizer_with(rule(), 1.0, **arguments)
