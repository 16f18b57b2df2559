"""A histogram of the examples' gradient norms before the clip, for choosing the clip; a release without noise.

It is kept only where an optimizer was asked to, and read out between epochs. Knows no ledger's file: what it gives is
one of the ledger's records.
"""

import math

import tensorflow as tf

from tfprivacy_ft.ledger import GradientNorms

_DECADES, _PER_DECADE = 2, 8  # bins on each side of the clip


class NormHistogram:
    """Counts norms in bins of equal width in the logarithm, from a hundredth of the clip to a hundred times it.

    Args:
      l2_norm_clip: > 0, where the clip is, or begins where it moves: the edge in the middle.
    """

    def __init__(self, l2_norm_clip: float):
        count = _DECADES * _PER_DECADE
        self._edges = [l2_norm_clip * 10 ** (i / _PER_DECADE) for i in range(-count, count + 1)]
        with tf.init_scope():
            shape = [2 * count]
            self._counts = tf.Variable(tf.zeros(shape, tf.int64), trainable=False, name="gradient_norms")
            self._clipped = tf.Variable(0, dtype=tf.int64, trainable=False, name="gradients_clipped")

    def add(self, norms: tf.Tensor, real: tf.Tensor, clip: tf.Tensor | float) -> None:
        """Adds to the graph: counts a batch.

        Args:
          norms: float32 or float64 [B]; what is not finite counts as longer than the clip.
          real: bool [B], False for what is not to be counted.
          clip: what a norm is clipped to now.
        """
        size = tf.cast(norms, tf.float32)
        size = tf.where(tf.math.is_finite(size), size, math.inf)
        inner = tf.constant(self._edges[1:-1], tf.float32)  # the outermost bins have no end
        into = tf.one_hot(tf.reduce_sum(tf.cast(size[:, None] >= inner, tf.int32), axis=1), len(self._edges) - 1)
        counted = tf.cast(real, tf.float32)
        self._counts.assign_add(tf.cast(tf.linalg.matvec(into, counted, transpose_a=True), tf.int64), read_value=False)
        longer = tf.cast(size > tf.cast(clip, tf.float32), tf.float32)
        self._clipped.assign_add(tf.cast(tf.reduce_sum(longer * counted), tf.int64), read_value=False)

    def take(self) -> GradientNorms | None:
        """What was counted since this was last asked; None if nothing was."""
        counts, clipped = self._counts.numpy(), self._clipped.numpy()
        self._counts.assign_sub(counts)
        self._clipped.assign_sub(clipped)
        if not counts.any():
            return None
        return GradientNorms(tuple(self._edges), tuple(int(n) for n in counts), int(clipped))
