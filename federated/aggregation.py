"""What the server may see of its clients: their clipped updates, summed, with noise.

Promises: one client moves the sum by at most the clip, in the l2 or l1 norm over all variables together, whatever it sends
(a non-finite update counts as zero); noise comes from a key of the operating system, that gives its noise once. Knows
nothing of models, cohorts or accounting.
"""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["add_noise", "blank_noise_key", "clip_scale", "clipped_sum", "fresh_noise_key", "noised_sum"]

KEY_WORDS = 3  # of 64 bits: Philox takes one as its key and two as its starting counter
_PHILOX = 1


def clip_scale(updates: Sequence["tf.Tensor"], clip: "tf.Tensor | float", order: int = 2) -> tuple["tf.Tensor", ...]:
    """What to multiply each of k updates with, for a norm of at most `clip` over all variables together.

    Args:
        updates: One float tensor (k, ...) per variable, k >= 0.
        clip: Largest norm of one client's update, > 0; infinite for no clip.
        order: 2 for the l2 norm, 1 for the l1 norm.

    Returns:
        Factors float32 (k,), in [0, 1], 0 where the norm is not finite; and bool (k,), whether the norm was within the clip.
    """
    import tensorflow as tf

    size = tf.square if order == 2 else tf.abs
    sizes = [
        tf.reduce_sum(size(tf.cast(update, tf.float32)), axis=list(range(1, update.shape.rank))) for update in updates
    ]
    norm = tf.sqrt(tf.add_n(sizes)) if order == 2 else tf.add_n(sizes)
    finite = tf.math.is_finite(norm)
    scale = tf.where(finite, tf.minimum(1.0, tf.cast(clip, tf.float32) / tf.maximum(norm, 1e-30)), 0.0)
    return scale, finite & (norm <= clip)


def clipped_sum(
    updates: Sequence["tf.Tensor"],
    l2_norm_clip: "tf.Tensor | float",
    *,
    order: int = 2,
    weights: "tf.Tensor | None" = None,
) -> tuple["tf.Tensor", ...]:
    """Sums the updates of k clients, each scaled down to norm at most `l2_norm_clip`.

    The norm is taken over all variables together, in float32. A client whose norm is not finite adds zero.

    Args:
        updates: One tensor (k, ...) per variable, k >= 0.
        l2_norm_clip: Largest norm of one client's update, > 0.
        order: 2, or 1 for a clip of the l1 norm.
        weights: float32 (k,), by which clients count after the clip; None for 1 each.

    Returns:
        One tensor (...) per variable: without weights, of sensitivity `l2_norm_clip` to adding or removing one client.

    Example:
        >>> import tensorflow as tf
        >>> updates = tf.constant([[3.0, 4.0], [0.3, 0.4], [float("nan"), 1.0]])
        >>> [round(float(value), 3) for value in clipped_sum([updates], l2_norm_clip=1.0)[0]]
        [0.9, 1.2]
    """
    import tensorflow as tf

    scale, _ = clip_scale(updates, l2_norm_clip, order)
    if weights is not None:
        scale *= weights
    return tuple(
        # 0 * NaN is NaN, so what is not finite has to go before the product.
        tf.cast(tf.tensordot(scale, _finite(tf.cast(update, tf.float32)), axes=1), update.dtype)
        for update in updates
    )


def noised_sum(
    updates: Sequence["tf.Tensor"],
    clip: "tf.Tensor | float",
    *,
    present: "tf.Tensor",
    key: "tf.Tensor",
    noise_multiplier: float,
    order: int = 2,
) -> tuple["tf.Tensor", ...]:
    """Sums what k clients report, each of which has clipped its update and added noise to every number of it.

    Args:
        updates: One tensor (k, ...) per variable.
        clip: > 0, of each client's update.
        present: bool (k,): who is there; nobody else adds anything, not even noise.
        key: uint64 (3,), from `fresh_noise_key`.
        noise_multiplier: > 0: standard deviation of Gaussian noise (scale of Laplace noise, for order 1) over `clip`.
        order: 2 for a clip of the l2 norm and Gaussian noise, 1 for the l1 norm and Laplace noise.
    """
    import tensorflow as tf

    scale, _ = clip_scale(updates, clip, order)
    count = tf.shape(scale)[0]
    width = sum(update.shape[1:].num_elements() for update in updates)
    noise = tf.reshape(_unit_noise(key, count * width, order), [count, width])
    noise = tf.where(present[:, tf.newaxis], tf.cast(clip, tf.float32) * noise_multiplier * noise, 0.0)
    reported = []
    for update, part in zip(updates, tf.split(tf.reduce_sum(noise, axis=0), _widths(updates)), strict=True):
        total = tf.tensordot(scale * tf.cast(present, tf.float32), _finite(tf.cast(update, tf.float32)), axes=1)
        reported.append(tf.cast(total + tf.reshape(part, update.shape[1:]), update.dtype))
    return tuple(reported)


def fresh_noise_key() -> np.ndarray:
    """A key for the noise of one round: 192 bits from the operating system, as 3 numbers of 64 bits."""
    while True:
        key = np.frombuffer(os.urandom(8 * KEY_WORDS), dtype=np.uint64)
        if key.any():
            return key


def blank_noise_key() -> np.ndarray:
    """The key that no round accepts; states hold it between rounds, so that a checkpoint tells nothing of the noise."""
    return np.zeros(KEY_WORDS, np.uint64)


def add_noise(
    values: Sequence["tf.Tensor"], key: "tf.Tensor", scales: Sequence["tf.Tensor | float"], *, order: int = 2
) -> list["tf.Tensor"]:
    """Adds independent noise to every number, drawn in one stream: no value is used twice.

    TensorFlow's own random numbers are not used: all that one process draws, a TFF worker for one, comes from 32 bits.
    Philox, which turns the key into noise, is a statistical generator, not a cryptographic one.

    Args:
        values: Float tensors of static shape.
        key: uint64 (3,), from `fresh_noise_key`; the blank key is refused when the graph runs.
        scales: For each tensor its noise's standard deviation, or for order 1 its scale; >= 0.
        order: 2 for Gaussian noise, 1 for Laplace noise.

    Returns:
        Tensors like `values`.
    """
    import tensorflow as tf

    sizes = [math.prod(value.shape) for value in values]
    noise = _unit_noise(key, sum(sizes), order)
    return [
        value + tf.cast(tf.cast(scale, tf.float32) * tf.reshape(part, value.shape), value.dtype)
        for value, scale, part in zip(values, scales, tf.split(noise, sizes), strict=True)
    ]


def add_gaussian_noise(values: Sequence["tf.Tensor"], key: "tf.Tensor", stddev: float) -> list["tf.Tensor"]:
    """Adds independent N(0, stddev²) to every coordinate, as `add_noise` does."""
    return add_noise(values, key, [stddev] * len(values))


def _unit_noise(key: "tf.Tensor", count: "tf.Tensor | int", order: int) -> "tf.Tensor":
    """`count` numbers, of standard deviation 1 (order 2) or of scale 1 (order 1)."""
    import tensorflow as tf

    refuse_blank = tf.debugging.Assert(
        tf.reduce_any(tf.not_equal(key, 0)), ["the noise key is blank: put fresh_noise_key() in the state"]
    )
    with tf.control_dependencies([refuse_blank]):
        key, counter = tf.identity(key[:1]), tf.identity(key[1:])
    if order == 2:
        return tf.raw_ops.StatelessRandomNormalV2(
            shape=[count], key=key, counter=counter, alg=_PHILOX, dtype=tf.float32
        )
    # The difference of two exponential draws. Uniform numbers of 52 bits, for a tail that ends beyond e^-36.
    uniform = tf.raw_ops.StatelessRandomUniformV2(
        shape=tf.stack([2, count]), key=key, counter=counter, alg=_PHILOX, dtype=tf.float64
    )
    exponential = -tf.math.log1p(-uniform)
    return tf.cast(exponential[0] - exponential[1], tf.float32)


def _finite(update: "tf.Tensor") -> "tf.Tensor":
    import tensorflow as tf

    return tf.where(tf.math.is_finite(update), update, 0.0)


def _widths(updates: Sequence["tf.Tensor"]) -> list[int]:
    return [math.prod(update.shape[1:]) for update in updates]
