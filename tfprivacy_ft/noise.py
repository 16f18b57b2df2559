"""The noise of the Gaussian mechanism, and where its randomness comes from. Knows no clipping and no accounts.

Every source is keyed from the operating system (`os.urandom`): no global seed, no checkpoint and no XLA compilation makes
two runs draw the same noise. The stream is Philox 4x32-10 (Salmon et al. 2011), a counter-based generator that is good
for statistics but is not a cryptographic one; see the threat model.
"""

import os

import numpy as np
import tensorflow as tf


class GaussianNoise:
    """Independent normal noise, fresh in every process and after every restore.

    The state lives in a variable that is created here and belongs to no model or optimizer checkpoint.

    Example:
      >>> import tensorflow as tf
      >>> bool(tf.reduce_any(GaussianNoise().like(tf.zeros([3]), 1.0) != 0.0))
      True
    """

    def __init__(self):
        # 24 bytes: a counter of 16 and a key of 8. `from_non_deterministic_state` would know 32 bits of entropy only.
        state = np.frombuffer(os.urandom(24), np.int64)
        with tf.init_scope():
            self._generator = tf.random.Generator.from_state(state, alg="philox")

    def like(self, value: tf.Tensor, stddev: tf.Tensor | float) -> tf.Tensor:
        """Noise of the shape of `value`, float32, with standard deviation `stddev`; each call draws anew."""
        return self._generator.normal(tf.shape(value)) * tf.cast(stddev, tf.float32)
