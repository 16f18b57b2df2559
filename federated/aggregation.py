"""What the server may see of its clients: their clipped updates, summed, with noise.

Promises: one client moves the sum by at most `l2_norm_clip` in L2 norm over all variables together, whatever it sends
(a non-finite update counts as zero); Gaussian noise of standard deviation `l2_norm_clip * noise_multiplier` is added
to the sum once; the denominator is a constant. Knows nothing of models, cohorts or accounting.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from federated import runtime

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["blank_noise_key", "build_gaussian_mean", "clipped_sum", "fresh_noise_key"]

_KEY_WORDS = 3  # of 64 bits: Philox takes one as its key and two as its starting counter
_PHILOX = 1


def clipped_sum(updates: Sequence["tf.Tensor"], l2_norm_clip: float) -> tuple["tf.Tensor", ...]:
    """Sums the updates of k clients, each scaled down to norm at most `l2_norm_clip`.

    The norm is taken over all variables together, in float32. A client whose norm is not finite adds zero.

    Args:
        updates: One tensor (k, ...) per variable, k >= 0.
        l2_norm_clip: Largest norm of one client's update, > 0.

    Returns:
        One tensor (...) per variable: sensitivity `l2_norm_clip` to adding or removing one client.

    Example:
        >>> import tensorflow as tf
        >>> updates = tf.constant([[3.0, 4.0], [0.3, 0.4], [float("nan"), 1.0]])
        >>> [round(float(value), 3) for value in clipped_sum([updates], l2_norm_clip=1.0)[0]]
        [0.9, 1.2]
    """
    import tensorflow as tf

    exact = [tf.cast(update, tf.float32) for update in updates]
    squares = [tf.reduce_sum(tf.square(update), axis=list(range(1, update.shape.rank))) for update in exact]
    norm = tf.sqrt(tf.add_n(squares))
    scale = tf.where(tf.math.is_finite(norm), tf.minimum(1.0, l2_norm_clip / tf.maximum(norm, 1e-30)), 0.0)
    return tuple(
        # 0 * NaN is NaN, so what is not finite has to go before the product.
        tf.cast(tf.tensordot(scale, tf.where(tf.math.is_finite(each), each, 0.0), axes=1), update.dtype)
        for each, update in zip(exact, updates, strict=True)
    )


def fresh_noise_key() -> np.ndarray:
    """A key for the noise of one round: 192 bits from the operating system, as 3 numbers of 64 bits."""
    while True:
        key = np.frombuffer(os.urandom(8 * _KEY_WORDS), dtype=np.uint64)
        if key.any():
            return key


def blank_noise_key() -> np.ndarray:
    """The key that no round accepts; states hold it between rounds, so that a checkpoint tells nothing of the noise."""
    return np.zeros(_KEY_WORDS, np.uint64)


def build_gaussian_mean(value_type: Any, *, l2_norm_clip: float, noise_multiplier: float, denominator: float) -> Any:
    """Builds the aggregation: (sum of what the clients send + noise) / denominator.

    The state is the noise key. A key gives its noise once: `next` returns the blank key, and fails on the blank key.
    Who calls `next` puts `fresh_noise_key()` in the state before. TFF's own random numbers are not used: all that its
    worker draws comes from 32 bits. Philox, which turns the key into noise, is a statistical generator, not a
    cryptographic one.

    Args:
        value_type: TFF type of what one client sends, a struct of float tensors, already clipped.
        l2_norm_clip: Sensitivity of the sum to one unit of privacy, > 0.
        noise_multiplier: Standard deviation of the noise divided by the clip; 0 adds none and needs no key.
        denominator: Constant > 0, the expected number of clients.

    Returns:
        A `tff.templates.AggregationProcess` whose weights are ignored: a weighted mean has another sensitivity.

    Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018,
        https://arxiv.org/abs/1710.06963, section 3, the fixed-denominator estimator.
    """
    tff = runtime.require_tff()
    import tensorflow as tf

    stddev = l2_norm_clip * noise_multiplier
    # The type of the state by its own container; a NumPy array would arrive as a tensor all the same.
    key_type = tff.TensorType(np.uint64, [_KEY_WORDS])

    @tff.tensorflow.computation(value_type, key_type)
    def noised_mean(total, key):
        flat = tf.nest.flatten(total)
        if stddev > 0:
            flat = add_gaussian_noise(flat, key, stddev)
        return tf.nest.pack_sequence_as(total, [value / tf.cast(denominator, value.dtype) for value in flat])

    @tff.tensorflow.computation()
    def blank():
        return tf.constant(blank_noise_key())

    @tff.federated_computation()
    def initialize():
        return tff.federated_eval(blank, tff.SERVER)

    @tff.federated_computation(
        initialize.type_signature.result,
        tff.FederatedType(value_type, tff.CLIENTS),
        tff.FederatedType(np.float32, tff.CLIENTS),
    )
    def next_round(key, value, weight):
        del weight
        mean = tff.federated_map(noised_mean, (tff.federated_sum(value), key))
        no_measurements = tff.federated_value((), tff.SERVER)
        return tff.templates.MeasuredProcessOutput(tff.federated_eval(blank, tff.SERVER), mean, no_measurements)

    return tff.templates.AggregationProcess(initialize, next_round)


def add_gaussian_noise(values: Sequence["tf.Tensor"], key: "tf.Tensor", stddev: float) -> list["tf.Tensor"]:
    """Adds independent N(0, stddev²) to every coordinate, drawn in one stream: no value is used twice.

    Args:
        values: Float tensors of static shape.
        key: uint64 (3,), from `fresh_noise_key`; the blank key is refused when the graph runs.
        stddev: Standard deviation, > 0.

    Returns:
        Tensors like `values`.
    """
    import tensorflow as tf

    refuse_blank = tf.debugging.Assert(
        tf.reduce_any(tf.not_equal(key, 0)), ["the noise key is blank: put fresh_noise_key() in the state"]
    )
    sizes = [value.shape.num_elements() for value in values]
    with tf.control_dependencies([refuse_blank]):
        noise = tf.raw_ops.StatelessRandomNormalV2(
            shape=[sum(sizes)], key=key[:1], counter=key[1:], alg=_PHILOX, dtype=tf.float32
        )
    return [
        value + tf.cast(tf.reshape(stddev * part, value.shape), value.dtype)
        for value, part in zip(values, tf.split(noise, sizes), strict=True)
    ]
