import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from federated import aggregation


def norms(total):
    return float(np.sqrt(sum(np.sum(np.square(part)) for part in total)))


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4, 1e15])
def test_one_client_adds_at_most_the_clip_over_all_variables(size):
    rng = np.random.default_rng(0)
    for _ in range(20):
        updates = [size * rng.normal(size=shape).astype(np.float32) for shape in [(1, 3, 4), (1, 5), (1,)]]
        total = aggregation.clipped_sum([tf.constant(update) for update in updates], 0.5)
        assert norms(total) <= 0.5 * (1 + 1e-6)
        if size == 1e-6:
            np.testing.assert_allclose(total[0], updates[0][0], rtol=1e-6)
        if size >= 1e4:
            assert norms(total) >= 0.5 * (1 - 1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_a_non_finite_client_adds_zero_and_spoils_nobody(bad):
    updates = np.ones((2, 4), np.float32)
    updates[1, 2] = bad
    total = aggregation.clipped_sum([tf.constant(updates)], 100.0)[0]
    np.testing.assert_array_equal(total, np.ones(4))


def test_no_clients_add_zero():
    assert aggregation.clipped_sum([tf.zeros((0, 3))], 1.0)[0].numpy().tolist() == [0.0, 0.0, 0.0]


def test_half_precision_is_clipped_in_single():
    total = aggregation.clipped_sum([tf.fill((1, 10_000), tf.constant(10.0, tf.float16))], 1.0)[0]
    assert total.dtype == tf.float16 and np.all(np.isfinite(total))
    np.testing.assert_allclose(norms([total.numpy().astype(np.float32)]), 1.0, rtol=1e-3)


def test_keys_are_new_each_time_and_never_blank():
    keys = {tuple(aggregation.fresh_noise_key()) for _ in range(1000)}
    assert len(keys) == 1000 and tuple(aggregation.blank_noise_key()) not in keys


def test_noise_is_one_stream_of_standard_normals_over_all_variables():
    values = [tf.zeros((300, 200)), tf.zeros((300, 200)), tf.zeros(())]
    key = aggregation.fresh_noise_key()
    noise = [part.numpy() for part in aggregation.add_gaussian_noise(values, key, 3.0)]
    again = [part.numpy() for part in aggregation.add_gaussian_noise(values, key, 3.0)]
    np.testing.assert_array_equal(noise[0], again[0])  # all of the randomness is in the key
    # Kolmogorov-Smirnov and correlation, each with a false alarm of 1e-7.
    assert stats.kstest(np.concatenate([part.ravel() for part in noise]) / 3.0, "norm").pvalue > 1e-7
    assert stats.pearsonr(noise[0].ravel(), noise[1].ravel()).pvalue > 1e-7


def test_a_blank_key_is_refused():
    with pytest.raises(tf.errors.InvalidArgumentError, match="blank"):
        aggregation.add_gaussian_noise([tf.zeros(3)], tf.constant(aggregation.blank_noise_key()), 1.0)
