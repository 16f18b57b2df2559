"""A wide discrete Gaussian, drawn in integer arithmetic from the words of a cipher. Knows no clipping and no accounts.

The law: the integer y has probability proportional to exp(-y^2 / (2 STDDEV^2)).

How near it is drawn. Two narrow discrete Gaussians of standard deviation s = 2 sqrt(K^2 + 1) give y = K x1 + x2. By Poisson's
summation formula the probability of each y is right but for a factor within 1 +- 2.1 exp(-2 pi^2 4), which is
1 +- 1.1e-34. Each narrow one is drawn from a table of whole multiples of 2^-112 with 65536 rows, which ends at 12.8 s: a
statistical distance of less than 2^-96. Together less than 2^-94 for one value, and 1e-18 for 10^10 values, which is what
would have to be added to delta, times 1 + exp(epsilon).

How near the law is to a normal one. A normal value rounded to an integer is post-processing of the Gaussian mechanism, so
all that is proved of that one, amplification by sampling too, holds for it. The probability of y = t STDDEV differs from
it by a factor whose logarithm is (t^2 - 1) / (24 STDDEV^2), but for terms of order STDDEV^-4. For 10^10 values the sum of
these is below 6e-9, except with probability 3e-21 (Laurent & Massart 2000, Lemma 1). So the accounts of the normal
mechanism hold with an epsilon larger by 1.2e-8.
"""

import decimal
import functools

import numpy as np
import tensorflow as tf

from tfprivacy_ft.chacha import WORDS_PER_BLOCK, chacha20

__all__ = ["STDDEV", "blocks", "discrete_gaussian"]

_K = 1280
STDDEV = 2 * (_K**2 + 1)  # sqrt(K^2 + 1) times that of the narrow ones: 3276802

_ROWS = 2**16
_OFFSET = _ROWS // 2  # row i stands for the value i - _OFFSET
_ROW_BITS = 96  # each row is drawn with probability 2^-16, and then itself with a probability in units of 2^-96
_LOW_BITS = 64  # of these, so many are looked at only where the first 32 do not decide

_CHUNK = 2**12  # values drawn at once, so that memory does not grow with the model and the caches are used


def discrete_gaussian(key: tf.Tensor, first_block: tf.Tensor, size: int) -> tf.Tensor:
    """Independent values of a discrete Gaussian with standard deviation `STDDEV`.

    Args:
      key: uint32 [8], of `chacha20`.
      first_block: int64 scalar, from which block of its stream on; `blocks(size)` are used up.
      size: >= 1, how many values.

    Returns:
      int32 [size].

    Example:
      >>> import tensorflow as tf
      >>> discrete_gaussian(tf.zeros([8], tf.uint32), tf.constant(0, tf.int64), 3).shape
      TensorShape([3])

    Source: Canonne, Kamath & Steinke 2020, "The Discrete Gaussian for Differential Privacy"; Micciancio & Walter 2017,
    "Gaussian Sampling over the Integers", section 3, for the sum of two narrow ones; Walker 1977, "An Efficient Method for
    Generating Discrete Random Variables with General Distributions", for the table.
    """
    return _compiled(key, first_block, size, _tables())


def blocks(size: int) -> int:
    """Blocks of the cipher that `size` values use up."""
    chunks, chunk = _chunks(size)
    return chunks * sum(_blocks_of_chunk(chunk))


def _chunks(size: int) -> tuple[int, int]:
    chunk = min(size, _CHUNK)
    return -(-size // chunk), chunk


def _blocks_of_chunk(chunk: int) -> tuple[int, int]:
    """For the first words, and for those that are seldom looked at."""
    return -(-3 * chunk // WORDS_PER_BLOCK), -(-4 * chunk // WORDS_PER_BLOCK)


@tf.function(jit_compile=True)  # also where the training step is not compiled: op by op it is five times slower
def _compiled(key: tf.Tensor, first_block: tf.Tensor, size: int, tables: list[tf.Tensor]) -> tf.Tensor:
    chunks, chunk = _chunks(size)
    starts = first_block + sum(_blocks_of_chunk(chunk)) * tf.range(chunks, dtype=tf.int64)
    values = tf.map_fn(
        lambda start: _chunk_of_values(key, start, chunk, tables),
        starts,
        fn_output_signature=tf.TensorSpec([chunk], tf.int32),
    )
    return tf.reshape(values, [-1])[:size]


def _chunk_of_values(key: tf.Tensor, start: tf.Tensor, size: int, tables: list[tf.Tensor]) -> tf.Tensor:
    first, more = _blocks_of_chunk(size)
    words = tf.reshape(tf.reshape(chacha20(key, start, first), [-1])[: 3 * size], [3, size])
    rows = tf.stack([tf.bitwise.right_shift(words[0], 16), words[0] & 0xFFFF])

    def low_words() -> tf.Tensor:
        drawn = tf.reshape(chacha20(key, start + first, more), [-1])[: 4 * size]
        high, low = tf.unstack(tf.cast(tf.reshape(drawn, [2, 2, size]), tf.uint64))
        return tf.bitwise.left_shift(high, 32) | low

    narrow = _narrow(tf.cast(rows, tf.int32), words[1:], low_words, tables)
    return _K * narrow[0] + narrow[1]


def _narrow(rows, high_words, low_words, tables: list[tf.Tensor]) -> tf.Tensor:
    """Values of the narrow discrete Gaussian, by Walker's method.

    Args:
      rows: int32, each uniform in [0, 65536).
      high_words: uint32, of the same shape, uniform.
      low_words: gives uint64, of the same shape, uniform; called only where a high word is that of the threshold.
      tables: what `_tables` returns.
    """
    high, low, others = tables
    threshold = tf.gather(high, rows)
    tied = high_words == threshold
    keeps = tf.cond(
        tf.reduce_any(tied),
        lambda: (high_words < threshold) | (tied & (low_words() < tf.gather(low, rows))),
        lambda: high_words < threshold,
    )
    return tf.where(keeps, rows, tf.gather(others, rows)) - _OFFSET


@functools.cache
def _tables() -> list[tf.Tensor]:
    """For each row: when it stands for itself (uint32 and uint64, together 96 bits), and for whom else (int32)."""
    thresholds, others = _walker(_narrow_weights())
    with tf.init_scope():
        return [
            tf.constant(np.array([t >> _LOW_BITS for t in thresholds], np.uint32)),
            tf.constant(np.array([t & (2**_LOW_BITS - 1) for t in thresholds], np.uint64)),
            tf.constant(np.array(others, np.int32)),
        ]


def _narrow_weights() -> list[int]:
    """The probabilities of -32768 ... 32767 in units of 2^-112; they add up to 2^112."""
    with decimal.localcontext(prec=60):
        # exp(-x^2 / (2 s^2)) for x = 0, 1, ...: from one to the next by a factor that shrinks by a constant one.
        shrink = (decimal.Decimal(-1) / (4 * (_K**2 + 1))).exp()
        factor, weights = shrink.sqrt(), [decimal.Decimal(1)]
        for _ in range(_OFFSET):
            weights.append(weights[-1] * factor)
            factor *= shrink
        unit = (_ROWS << _ROW_BITS) / (2 * sum(weights) - weights[0] - weights[-1])
        whole = [round(weights[abs(x)] * unit) for x in range(-_OFFSET, _OFFSET)]
    whole[_OFFSET] += (_ROWS << _ROW_BITS) - sum(whole)  # what rounding left, 1e-29 of the largest at most
    return whole


def _walker(weights: list[int]) -> tuple[list[int], list[int]]:
    """Rows of equal weight, each shared by itself and one other; exact."""
    left, full = list(weights), 2**_ROW_BITS
    # A row that is never topped up stands for itself either way.
    thresholds, others = [0] * len(left), list(range(len(left)))
    small = [row for row, weight in enumerate(left) if weight < full]
    large = [row for row, weight in enumerate(left) if weight >= full]
    while small:
        row, giver = small.pop(), large[-1]
        thresholds[row], others[row] = left[row], giver
        left[giver] -= full - left[row]
        if left[giver] < full:
            small.append(large.pop())
    return thresholds, others
