"""The sampler's tables are exact, and its draws follow them. False alarms: at most 1e-6 for each test."""

import decimal
import functools

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from tfprivacy_ft import discrete_gaussian
from tfprivacy_ft.discrete_gaussian import STDDEV, blocks

K, OFFSET, TOTAL = 1280, 32768, 2**112
KEY = tf.constant(np.frombuffer(b"a key that the tests always use.", np.uint32))
D = decimal.Decimal


@functools.cache
def weights():
    """The exact weights by which the tables draw -32768 ... 32767, read back from them."""
    high, low, others = (table.numpy().tolist() for table in discrete_gaussian._tables())
    drawn = [0] * 65536
    for row, (h, lo, other) in enumerate(zip(high, low, others, strict=True)):
        threshold = (h << 64) | lo
        drawn[row] += threshold
        drawn[other] += 2**96 - threshold
    return drawn


def gaussian(x, variance):
    """Proportional to the probability of x, to 50 digits."""
    return (-(D(x) ** 2) / (2 * D(variance))).exp()


@pytest.fixture(autouse=True)
def fifty_digits():
    with decimal.localcontext(prec=50):
        yield


def test_the_tables_hold_the_narrow_law_to_112_bits():
    assert sum(weights()) == TOTAL
    variance = 4 * (K**2 + 1)
    total = sum(gaussian(x, variance) for x in range(-OFFSET, OFFSET))
    for x in [0, *range(1, 40), *range(100, 32768, 331), 32767, -1, -777, -32768]:
        exact = TOTAL * gaussian(x, variance) / total
        allowed = 32768 if x == 0 else 1  # what rounding left is at zero
        assert abs(weights()[x + OFFSET] - exact) <= allowed


def test_the_variance_is_exact():
    of_narrow = sum(weight * (row - OFFSET) ** 2 for row, weight in enumerate(weights()))
    assert sum(weight * (row - OFFSET) for row, weight in enumerate(weights())) == -weights()[0] * OFFSET
    assert D((K**2 + 1) * of_narrow) / D(TOTAL * STDDEV**2) == pytest.approx(D(1), rel=D("1e-23"))


@pytest.mark.parametrize("y", [0, 1, 639, 640, 641, -1280, 12_345_678, 23_000_000])
def test_two_narrow_ones_make_the_wide_law(y):
    near = round(y / K)
    sums = sum(
        D(weights()[x + OFFSET]) * D(weights()[y - K * x + OFFSET]) / D(TOTAL) ** 2
        for x in range(near - 25, near + 25)
        if abs(y - K * x) < OFFSET
    )
    exact = gaussian(y, STDDEV**2) / (
        D(STDDEV) * (2 * D("3.14159265358979323846264338327950288419716939937511")).sqrt()
    )
    assert abs(sums / exact - 1) < D("1e-16" if abs(y) > 2e7 else "1e-20" if y > 1e6 else "1e-28")


def test_a_tie_is_decided_by_the_low_words():
    rows = tf.range(65536)
    high, low, others = tables = discrete_gaussian._tables()
    narrow = tf.function(lambda h, lo: discrete_gaussian._narrow(rows, h, lambda: lo, tables), jit_compile=True)

    def rows_kept(high_words, low_words):
        return narrow(tf.constant(high_words), tf.constant(low_words)).numpy() + OFFSET == rows.numpy()

    high, low, others = high.numpy(), low.numpy(), others.numpy()
    shared = others != rows.numpy()
    zeros, ones = np.zeros(65536, np.uint64), np.full(65536, 2**64 - 1, np.uint64)
    np.testing.assert_array_equal(rows_kept(high, low)[shared], False)  # the threshold itself is the other's
    below = low > 0
    assert rows_kept(high, np.where(below, low - np.uint64(1), 0).astype(np.uint64))[below].all()
    above = (high < 2**32 - 1) & shared
    assert not rows_kept(np.where(above, high + np.uint32(1), high).astype(np.uint32), zeros)[above].any()
    under = high > 0
    assert rows_kept(np.where(under, high - np.uint32(1), 0).astype(np.uint32), ones)[under].all()


@functools.cache
def draws():
    return discrete_gaussian.discrete_gaussian(KEY, tf.constant(0, tf.int64), 1_000_003).numpy()


def test_the_draws_follow_the_law():
    assert scipy.stats.kstest(draws() / STDDEV, "norm").pvalue > 1e-7
    # 5 standard errors: 6e-7; the variance's tails are a little heavier.
    assert abs(draws().mean()) < 5 * STDDEV / 1000
    assert abs(draws().astype(float).var() / STDDEV**2 - 1) < 5.3 * np.sqrt(2e-6)


@pytest.mark.parametrize("divisor", [256, 1280])
def test_the_last_digits_are_uniform(divisor):
    observed = np.bincount(draws() % divisor, minlength=divisor)
    assert scipy.stats.chisquare(observed).pvalue > 1e-6


def test_values_side_by_side_and_in_the_next_chunk_are_independent():
    for apart in (1, 16, 4096):
        for values in (draws(), np.abs(draws())):
            correlation = np.corrcoef(values[:-apart], values[apart:])[0, 1]
            assert abs(correlation) < 5.3 / 1000  # 1.2e-7 for each of six


def test_no_block_is_used_twice():
    assert len(np.unique(draws()[:4096])) > 4000  # of a law this wide, one pair in 4096 values is chance
    first = discrete_gaussian.discrete_gaussian(KEY, tf.constant(0, tf.int64), 5000).numpy()
    after = discrete_gaussian.discrete_gaussian(KEY, tf.constant(blocks(5000), tf.int64), 5000).numpy()
    assert len(np.intersect1d(first, after)) < 50


@pytest.mark.parametrize("size", [1, 7, 4096, 4097])
def test_any_number_of_values(size):
    drawn = discrete_gaussian.discrete_gaussian(KEY, tf.constant(5, tf.int64), size)
    assert drawn.shape == [size] and drawn.dtype == tf.int32
    assert blocks(size) >= 7 * size / 16
