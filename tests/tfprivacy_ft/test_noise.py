"""The law of the noise, and that nothing makes it come twice. False alarms: at most 1e-6 for each test."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from helpers import CrossEntropy, layers, trainable_values

from tfprivacy_ft.noise import GaussianNoise
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer

CLIP, MULTIPLIER, EXPECTED = 0.5, 2.0, 4.0


def noise_only_model(**compile_options):
    """A model that is trained on rows of weight 0, so that each step adds nothing but noise."""
    model = tf.keras.Sequential([layers.Input((50,)), layers.Dense(40), layers.Dense(30)])
    optimizer = DPKerasSGDOptimizer(CLIP, MULTIPLIER, None, 1.0, expected_batch_size=EXPECTED)
    model.compile(optimizer, CrossEntropy(from_logits=True), **compile_options)
    return model


def noise_of_steps(model, steps):
    x, y, weight = np.zeros([steps, 50], np.float32), np.zeros(steps, int), np.zeros(steps, np.float32)
    before = trainable_values(model)
    model.fit(x, y, batch_size=1, sample_weight=weight, verbose=0, shuffle=False)
    return [b - a for b, a in zip(before, trainable_values(model), strict=True)]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("steps", [1, 9])
def test_standard_deviation_is_clip_times_multiplier_over_expected_batch(jit, steps):
    released = np.concatenate([r.ravel() for r in noise_of_steps(noise_only_model(jit_compile=jit), steps)])
    stddev = CLIP * MULTIPLIER / EXPECTED * np.sqrt(steps)
    count = released.size
    # The mean of n normal values is off by 5 standard errors with probability 6e-7, their variance likewise.
    assert abs(released.mean()) < 5 * stddev / np.sqrt(count)
    assert abs(released.var() / stddev**2 - 1) < 5.5 * np.sqrt(2 / count)


def test_noise_is_on_every_trainable_variable_used_or_not():
    released = noise_of_steps(noise_only_model(), 1)
    assert all(np.abs(r).min() > 0 for r in released)


def test_untouched_embedding_rows_get_noise():
    model = tf.keras.Sequential([layers.Input((2,)), layers.Embedding(1000, 4), layers.Flatten(), layers.Dense(3)])
    model.compile(DPKerasSGDOptimizer(1.0, 1.0), CrossEntropy(from_logits=True))
    before = model.layers[0].get_weights()[0]
    model.fit(np.zeros([2, 2], int), np.zeros(2, int), verbose=0)
    assert np.all(model.layers[0].get_weights()[0] != before)


def test_no_value_comes_twice():
    noise = GaussianNoise()
    draws = np.concatenate([noise.like([tf.zeros([1000])], 1.0)[0].numpy() for _ in range(20)])
    # 20000 values of 2^23 or more floats: a handful of equal ones is chance, a repeated draw would be 1000.
    assert len(np.unique(draws)) > 19_000


def test_the_law_is_normal_also_in_its_tails():
    draws = GaussianNoise().like([tf.zeros([1000, 1001])], 1.0)[0].numpy().ravel()
    assert scipy.stats.kstest(draws, "norm").pvalue > 1e-6
    for bound in (3.0, 4.0):
        expected = draws.size * 2 * scipy.stats.norm.sf(bound)
        beyond = np.sum(np.abs(draws) > bound)
        assert scipy.stats.poisson.cdf(beyond, expected) > 2e-7
        assert scipy.stats.poisson.sf(beyond - 1, expected) > 2e-7
    assert 4.0 < np.abs(draws).max() < 8.0
    halves = np.corrcoef(np.abs(draws[: draws.size // 2]), np.abs(draws[draws.size - draws.size // 2 :]))[0, 1]
    assert abs(halves) < 5 / np.sqrt(draws.size // 2)  # values drawn as pairs are independent


def test_variables_of_equal_shape_get_different_noise():
    model = tf.keras.Sequential([layers.Input((20,)), layers.Dense(20), layers.Dense(20)])
    model.compile(DPKerasSGDOptimizer(1.0, 1.0, None, 1.0), CrossEntropy(from_logits=True))
    before = trainable_values(model)
    weight = np.zeros(1, np.float32)
    model.fit(np.zeros([1, 20], np.float32), np.zeros(1, int), sample_weight=weight, verbose=0)
    first, _, second, _ = [b - a for b, a in zip(before, trainable_values(model), strict=True)]
    assert np.abs(first - second).max() > 0.01


def test_global_seeds_do_not_reach_it():
    results = []
    for _ in range(2):
        tf.keras.utils.set_random_seed(7)
        model = noise_only_model()
        results.append((trainable_values(model)[0], noise_of_steps(model, 1)[0]))
    np.testing.assert_array_equal(results[0][0], results[1][0])  # the seed did reach the initial weights
    assert np.abs(results[0][1] - results[1][1]).max() > 0.01


PROCESS = """
import numpy as np, sys
sys.path[:0] = {path!r}
from test_noise import noise_of_steps, noise_only_model
np.save(sys.stdout.buffer, noise_of_steps(noise_only_model(jit_compile={jit}), 1)[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
def test_two_fresh_processes_draw_different_noise(jit, tmp_path):
    import io
    import pathlib

    here = pathlib.Path(__file__).parent
    code = PROCESS.format(path=[str(here), str(here.parent)], jit=jit)
    drawn = []
    for _ in range(2):
        ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, timeout=600, check=True)
        drawn.append(np.load(io.BytesIO(ran.stdout)))
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01


def test_the_noises_of_several_tensors_are_independent():
    shapes = [[3, 7], [], [501], [2, 2, 9]]
    drawn = GaussianNoise().like([tf.zeros(shape) for shape in shapes], 2.0)
    assert [noise.shape.as_list() for noise in drawn] == shapes
    values = np.concatenate([noise.numpy().ravel() for noise in drawn])
    assert len(np.unique(values)) == len(values)
    assert 1.8 < values.std() < 2.2


FORK = """
import os, sys, numpy as np, tensorflow as tf
from tfprivacy_ft.noise import GaussianNoise
noise = GaussianNoise()
noise.like([tf.zeros([4])], 1.0)[0]
child = os.fork()
drawn = noise.like([tf.zeros([4])], 1.0)[0].numpy().tolist()
if child:
    os.waitpid(child, 0)
os.write(1, (repr(drawn) + chr(10)).encode())
os._exit(0)
"""


@pytest.mark.slow
def test_a_forked_process_draws_its_own_noise():
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=600)
    first, second = ran.stdout.split("\n")[:2]
    assert first and second and first != second


@pytest.mark.parametrize("jit", [False, True])
def test_a_restored_checkpoint_draws_new_noise(jit, tmp_path):
    model = noise_only_model(jit_compile=jit)
    noise_of_steps(model, 1)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = checkpoint.save(str(tmp_path / "at"))
    weights = trainable_values(model)
    first = noise_of_steps(model, 1)
    checkpoint.restore(path).assert_existing_objects_matched()
    for restored, saved in zip(trainable_values(model), weights, strict=True):
        np.testing.assert_array_equal(restored, saved)
    second = noise_of_steps(model, 1)
    assert np.abs(first[0] - second[0]).max() > 0.01
    names = " ".join(name for name, _ in tf.train.list_variables(path))
    assert "rng" not in names.lower() and "state_var" not in names and "private_steps" not in names
