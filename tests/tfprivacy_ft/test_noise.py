"""The law of the noise, and that nothing makes it come twice. False alarms: at most 1e-6 for each test."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from helpers import CrossEntropy, layers, trainable_values

from tfprivacy_ft import discrete_gaussian
from tfprivacy_ft.errors import UnsupportedModelError
from tfprivacy_ft.noise import DiscreteGaussianNoise, GaussianNoise
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer

CLIP, MULTIPLIER, EXPECTED = 0.5, 2.0, 4.0
EITHER = pytest.mark.parametrize("make", [GaussianNoise, DiscreteGaussianNoise])
SETTINGS = [(False, False), (False, True), (True, False)]  # secure noise, XLA
SECURE_OR_JIT = pytest.mark.parametrize("secure, jit", SETTINGS)


def draw(noise, shapes, stddev):
    """Nothing but noise, as NumPy arrays."""
    zeros = [tf.zeros(shape) for shape in shapes]
    return [n.numpy() for n in noise.draw(zeros, 1.0, stddev)(zeros)]


def noise_only_model(secure=False, **compile_options):
    """A model that is trained on rows of weight 0, so that each step adds nothing but noise."""
    model = tf.keras.Sequential([layers.Input((50,)), layers.Dense(40), layers.Dense(30)])
    optimizer = DPKerasSGDOptimizer(CLIP, MULTIPLIER, None, 1.0, expected_batch_size=EXPECTED, secure_noise=secure)
    model.compile(optimizer, CrossEntropy(from_logits=True), **compile_options)
    return model


def noise_of_steps(model, steps):
    x, y, weight = np.zeros([steps, 50], np.float32), np.zeros(steps, int), np.zeros(steps, np.float32)
    before = trainable_values(model)
    model.fit(x, y, batch_size=1, sample_weight=weight, verbose=0, shuffle=False)
    return [b - a for b, a in zip(before, trainable_values(model), strict=True)]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("secure, steps", [(False, 1), (False, 9), (True, 9)])
def test_standard_deviation_is_clip_times_multiplier_over_expected_batch(jit, secure, steps):
    released = np.concatenate([r.ravel() for r in noise_of_steps(noise_only_model(secure, jit_compile=jit), steps)])
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


@EITHER
def test_two_threads_get_different_noise(make):
    noise = make()
    draw = tf.function(lambda: noise.draw([tf.zeros([3])], 1.0, 1.0)([tf.zeros([3])])[0])
    draw()
    drawn = []

    def steps():
        for _ in range(1500):
            drawn.append(draw().numpy().tobytes())

    threads = [threading.Thread(target=steps) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Three values of 2^23 or more each: two equal draws would be chance once in 10^14 runs.
    assert len(set(drawn)) == len(drawn) == 3000


@EITHER
def test_no_value_comes_twice(make):
    noise = make()
    draws = np.concatenate([draw(noise, [[1000]], 1.0)[0] for _ in range(20)])
    # 20000 values of 2^23 or more floats or points of the grid: a few equal ones are chance, a repeated draw would be 1000.
    assert len(np.unique(draws)) > 19_000


@EITHER
def test_the_law_is_normal_also_in_its_tails(make):
    draws = draw(make(), [[1000, 1001]], 1.0)[0].ravel()
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


@pytest.mark.parametrize("secure", [False, True])
def test_global_seeds_do_not_reach_it(secure):
    results = []
    for _ in range(2):
        tf.keras.utils.set_random_seed(7)
        model = noise_only_model(secure)
        results.append((trainable_values(model)[0], noise_of_steps(model, 1)[0]))
    np.testing.assert_array_equal(results[0][0], results[1][0])  # the seed did reach the initial weights
    assert np.abs(results[0][1] - results[1][1]).max() > 0.01


PROCESS = """
import numpy as np, sys
sys.path[:0] = {path!r}
from test_noise import SETTINGS, noise_of_steps, noise_only_model
np.save(sys.stdout.buffer, [noise_of_steps(noise_only_model(s, jit_compile=j), 1)[0] for s, j in SETTINGS])
"""


@pytest.mark.slow
def test_two_fresh_processes_draw_different_noise():
    """Each setting in turn, since a process takes longer to start than to train."""
    import io
    import pathlib

    here = pathlib.Path(__file__).parent
    code = PROCESS.format(path=[str(here), str(here.parent)])
    drawn = []
    for _ in range(2):
        ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, timeout=600, check=True)
        drawn.append(np.load(io.BytesIO(ran.stdout)))
    for setting, one, other in zip(SETTINGS, *drawn, strict=True):
        assert np.abs(one - other).max() > 0.01, setting


@EITHER
def test_the_noises_of_several_tensors_are_independent(make):
    shapes = [[3, 7], [], [501], [2, 2, 9]]
    drawn = draw(make(), shapes, 2.0)
    assert [list(noise.shape) for noise in drawn] == shapes
    values = np.concatenate([noise.ravel() for noise in drawn])
    assert len(np.unique(values)) > len(values) - 5  # of about ten million, one pair in 559 is chance: one time in 70
    assert 1.8 < values.std() < 2.2


FORK = """
import json, os, sys, numpy as np, tensorflow as tf
from tfprivacy_ft.noise import DiscreteGaussianNoise, GaussianNoise
noise, secure, zeros = GaussianNoise(), DiscreteGaussianNoise(), [tf.zeros([4])]
noise.draw(zeros, 1.0, 1.0)(zeros)
secure.draw(zeros, 1.0, 1.0)(zeros)
child = os.fork()
# The key only of the second: TensorFlow's threads are not forked, and what it runs on them waits for ever.
drawn = [noise.draw(zeros, 1.0, 1.0)(zeros)[0].numpy().tolist(), secure._key.numpy().tolist()]
if child:
    os.waitpid(child, 0)
os.write(1, (json.dumps(drawn) + chr(10)).encode())
os._exit(0)
"""


@pytest.mark.slow
def test_a_forked_process_draws_its_own_noise():
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=600)
    first, second = map(json.loads, ran.stdout.split("\n")[:2])
    for one, other in zip(first, second, strict=True):
        assert one and other and one != other


@SECURE_OR_JIT
def test_a_restored_checkpoint_draws_new_noise(secure, jit, tmp_path):
    model = noise_only_model(secure, jit_compile=jit)
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
    assert (
        "rng" not in names.lower()
        and "noise_" not in names
        and "state_var" not in names
        and "private_steps" not in names
    )


SHAPES = [[30, 4], [], [7]]
COUNT = 128


def grid_noise(integers=None):
    """Noise on a grid; with known integers in place of the drawn ones where given."""
    noise = DiscreteGaussianNoise()
    if integers is not None:
        noise._integers = lambda count: tf.constant(integers[:count], tf.int32)
    return noise


def grid_of(sensitivity, multiplier):
    """The step of the grid, seen from outside: what the integer 1 adds to sums of these shapes that are zero."""
    zeros = [tf.zeros(shape, tf.float64) for shape in SHAPES]
    added = grid_noise(np.ones(COUNT)).draw(zeros, sensitivity, multiplier)(zeros)
    return added[0].numpy()[0, 0]


def random_sums(seed, scale=1.0, dtype=np.float64):
    random = np.random.default_rng(seed)
    return [tf.constant(scale * random.normal(size=shape), dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_outcomes_are_on_the_same_grid_whatever_the_data(dtype, scale):
    grid, noise = grid_of(CLIP, MULTIPLIER), grid_noise()
    for seed in (1, 2):
        sums = random_sums(seed, scale, dtype)
        for out in noise.draw(sums, CLIP, MULTIPLIER)(sums):
            steps = out.numpy().astype(np.float64) / grid
            # What comes out is a point of the grid, rounded to the type.
            off = np.abs(steps - np.round(steps))
            assert np.all(off <= np.abs(steps) * (2.0**-24 if dtype == np.float32 else 2.0**-51))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_rounded_to_the_nearest_point_of_the_grid_and_moved_by_whole_steps(dtype):
    grid, integers = grid_of(CLIP, MULTIPLIER), np.arange(COUNT) * 1000 - 64_000
    sums = random_sums(3, 1.0, dtype)
    out = grid_noise(integers).draw(sums, CLIP, MULTIPLIER)(sums)
    flat, exact = (np.concatenate([np.ravel(part).astype(np.float64) for part in parts]) for parts in (out, sums))
    assert np.abs(flat / grid - integers - exact / grid).max() <= 0.5 + (1.0 if dtype == np.float32 else 1e-6)
    if dtype == np.float64:
        np.testing.assert_allclose(flat / grid - integers, np.round(exact / grid), atol=1e-6)


@pytest.mark.parametrize("sensitivity, multiplier", [(0.5, 2.0), (1.0, 0.01), (3.7, 55.0), (1e-4, 1.1), (1.0, 1e4)])
def test_noise_is_never_less_than_rounding_calls_for(sensitivity, multiplier):
    grid = grid_of(sensitivity, multiplier)
    stddev = grid * discrete_gaussian.STDDEV
    with_rounding = sensitivity + grid * np.sqrt(COUNT)  # half a step for either of two sums
    assert with_rounding * multiplier <= stddev <= with_rounding * multiplier * 1.001


def test_a_sum_beyond_all_measure_stays_finite():
    sums = [tf.constant([1e30, -1e30, 3.0])]
    out = DiscreteGaussianNoise().draw(sums, 1.0, 1.0)(sums)[0].numpy()
    assert np.all(np.isfinite(out)) and out[0] > 1e6 and out[1] < -1e6 and abs(out[2]) < 100


def test_a_grid_that_would_be_too_coarse_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"noise_multiplier < 1\.635e\+04 there"):
        DiscreteGaussianNoise().draw([tf.zeros([10_000])], 1.0, 1e5)


@EITHER
def test_under_xla_every_call_draws_anew(make):
    noise, zeros = make(), [tf.zeros([1000])]
    compiled = tf.function(lambda: noise.draw(zeros, 1.0, 1.0)(zeros)[0], jit_compile=True)
    first, second = compiled().numpy(), compiled().numpy()
    assert np.mean(first != second) > 0.99


def test_a_seed_makes_the_same_noise_and_another_seed_another():
    first, again, other = (GaussianNoise(seed=seed) for seed in (5, 5, 6))
    for _ in range(2):
        drawn = [draw(noise, [[100]], 1.0)[0] for noise in (first, again, other)]
        np.testing.assert_array_equal(drawn[0], drawn[1])
        assert np.abs(drawn[0] - drawn[2]).max() > 0.1
    assert np.abs(draw(GaussianNoise(seed=5), [[100]], 1.0)[0] - drawn[0]).max() > 0.1  # the second draw is another
