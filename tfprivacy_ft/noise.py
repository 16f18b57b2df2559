"""The noise of the Gaussian mechanism, and where its randomness comes from. Knows no clipping and no accounts.

Every source is keyed from the operating system (`os.urandom`): no global seed, no checkpoint and no XLA compilation makes
two runs draw the same noise. There are two, with one interface: `GaussianNoise`, from a generator that is good for
statistics but is not a cryptographic one, and `DiscreteGaussianNoise`, from a cipher and on a grid; see the threat model.
"""

import math
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tfprivacy_ft import discrete_gaussian
from tfprivacy_ft.errors import UnsupportedModelError

AddNoise = Callable[[Sequence[tf.Tensor]], list[tf.Tensor]]

_PHILOX = 1  # TensorFlow's number for it; its counter is used here, and not its words

_in_this_process: weakref.WeakSet[Any] = weakref.WeakSet()


def _new_keys() -> None:
    """A forked process would go on with its parent's noise."""
    for noise in _in_this_process:
        noise.new_key()


os.register_at_fork(after_in_child=_new_keys)


class Noise(Protocol):
    """What both have."""

    def draw(self, values: Sequence[tf.Tensor], sensitivity: tf.Tensor | float, noise_multiplier: float) -> AddNoise:
        """Draws noise for one release of these sums together; needs their shapes only, and draws anew in each call.

        Args:
          values: float32 or float64, of fixed shapes, with at least one number in all.
          sensitivity: > 0, the most that one example moves them, in l2 norm over all together.
          noise_multiplier: > 0, standard deviation divided by `sensitivity`; what is added is never less.

        Returns:
          A function that takes sums of these shapes and returns them noisy, to be called once.
        """


class GaussianNoise:
    """Independent normal noise in float32, fresh in every process, also a forked one, and after every restore.

    The state lives in a variable that is created here and belongs to no model or optimizer checkpoint. The stream is
    Philox 4x32-10.

    Args:
      seed: an int >= 0, which makes the noise the same in every process, for tests only: whoever knows it can subtract
        the noise. None draws a key from the operating system.

    Example:
      >>> import tensorflow as tf
      >>> add_noise = GaussianNoise().draw([tf.zeros([3])], sensitivity=1.0, noise_multiplier=1.0)
      >>> bool(tf.reduce_any(add_noise([tf.zeros([3])])[0] != 0.0))
      True

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
    """

    def __init__(self, seed: int | None = None):
        state = _fresh_state() if seed is None else np.random.SeedSequence(seed).generate_state(3, np.uint64)
        with tf.init_scope():
            self._generator = tf.random.Generator.from_state(state.view(np.int64), alg="philox")
        if seed is None:
            _in_this_process.add(self)

    def new_key(self) -> None:
        """From now on the noise is that of another key."""
        self._generator.state.assign(_fresh_state())

    def draw(self, values: Sequence[tf.Tensor], sensitivity: tf.Tensor | float, noise_multiplier: float) -> AddNoise:
        """As in `Noise`."""
        drawn = self._like(values, sensitivity * noise_multiplier)
        return lambda sums: [total + tf.cast(n, total.dtype) for total, n in zip(sums, drawn, strict=True)]

    def _like(self, values: Sequence[tf.Tensor], stddev: tf.Tensor | float) -> list[tf.Tensor]:
        count = sum(_sizes(values))
        return _split(self._normal((count + 1) // 2, stddev)[:count], values)

    def _normal(self, pairs: int, stddev: tf.Tensor | float) -> tf.Tensor:
        """2 * `pairs` normal values, twice as fast as `Generator.normal` and with longer tails: to 6.6 from 5.7 stddev.

        Source: Box & Muller 1958, "A Note on the Generation of Random Normal Deviates".
        """
        bits = tf.cast(self._generator.uniform_full_int([2, pairs], tf.int32), tf.float32)  # in [-2^31, 2^31]
        uniform = tf.maximum(tf.abs(bits[0]), 0.5) * 2.0**-31
        radius = tf.sqrt(-2.0 * tf.math.log(uniform)) * tf.cast(stddev, tf.float32)
        angle = bits[1] * (math.pi * 2.0**-31)
        return tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], 0)


class DiscreteGaussianNoise:
    """Noise on a grid, from a cryptographic source, fresh in every process, also a forked one, and after every restore.

    Sums are rounded to multiples of a public number, the grid, and a discrete Gaussian is added in integer arithmetic.
    Only the outcome becomes floating point again, so which numbers can come out does not depend on the data, and nor
    does how likely each of them is, beyond what the discrete mechanism allows. The words come from ChaCha20, under a key
    of 256 bits from the operating system. How near the law is to what the accounts are for: see `discrete_gaussian`.

    It does not cover how the sums came about: clipped in floating point, they may be longer than the sensitivity by
    their rounding errors (Casacuberta et al. 2022, "Widespread Underestimation of Sensitivity in Differentially Private
    Libraries and How to Fix Them"). Nor does it cover the time a step takes, or who can read the process's memory.

    Example:
      >>> import tensorflow as tf
      >>> add_noise = DiscreteGaussianNoise().draw([tf.zeros([3])], sensitivity=1.0, noise_multiplier=1.0)
      >>> bool(tf.reduce_any(add_noise([tf.zeros([3])])[0] != 0.0))
      True

    Source: Canonne, Kamath & Steinke 2020, "The Discrete Gaussian for Differential Privacy"; Mironov 2012, "On
    Significance of the Least Significant Bits for Differential Privacy", for the attack.
    """

    def __init__(self):
        with tf.init_scope():
            self._key = tf.Variable(_fresh_key(), trainable=False, name="noise_key")
            self._counter = tf.Variable(tf.zeros([3], tf.int64), trainable=False, name="noise_blocks_used")
        _in_this_process.add(self)

    def new_key(self) -> None:
        """From now on the noise is that of another key."""
        self._key.assign(_fresh_key())

    def draw(self, values: Sequence[tf.Tensor], sensitivity: tf.Tensor | float, noise_multiplier: float) -> AddNoise:
        """As in `Noise`.

        Raises:
          UnsupportedModelError: for so many values and so much noise the grid is too coarse.
        """
        count = sum(_sizes(values))
        # Rounding moves each number by at most half a step of the grid, and the product before it, inexact for float64,
        # by less than 0.001 of one: two neighbouring sums come apart by that much more, and get that much more noise.
        steps_apart = 1.002 * math.sqrt(count)
        share = steps_apart * noise_multiplier / discrete_gaussian.STDDEV
        if share > 0.5:
            raise UnsupportedModelError(
                f"secure_noise with noise_multiplier={noise_multiplier} on {count} values is not allowed: its grid is made "
                f"for noise_multiplier < {noise_multiplier / share / 2:.4g} there; leave secure_noise out."
            )
        stddev = tf.cast(sensitivity, tf.float64) * (noise_multiplier / (1 - share))
        # 24 bits, so that its product with a float32 is exact, and never above what gives this much noise.
        steps_per_unit = tf.cast(tf.cast((1 - 2.0**-22) * discrete_gaussian.STDDEV / stddev, tf.float32), tf.float64)
        drawn = _split(self._integers(count), values)
        return lambda sums: [_on_grid(total, n, steps_per_unit) for total, n in zip(sums, drawn, strict=True)]

    def _integers(self, count: int) -> tf.Tensor:
        needed = discrete_gaussian.blocks(count)
        # One op reads the counter and moves it by 256 times `needed`, so that of two threads none gets the other's blocks.
        before = tf.raw_ops.RngReadAndSkip(resource=self._counter.handle, alg=_PHILOX, delta=tf.cast(needed, tf.uint64))
        return discrete_gaussian.discrete_gaussian(tf.bitcast(self._key, tf.uint32), before[0], count)


def _on_grid(total: tf.Tensor, noise: tf.Tensor, steps_per_unit: tf.Tensor) -> tf.Tensor:
    """`total` rounded to the grid, with `noise` steps of it added."""
    steps = tf.round(tf.cast(total, tf.float64) * steps_per_unit)
    # Bounds brings no two sums further apart, and without them a huge sum would be no integer.
    whole = tf.cast(tf.clip_by_value(steps, -(2.0**43), 2.0**43), tf.int64) + tf.cast(noise, tf.int64)
    return tf.cast(tf.cast(whole, tf.float64) / steps_per_unit, total.dtype)


def _fresh_state() -> np.ndarray:
    # 24 bytes: a counter of 16 and a key of 8. `from_non_deterministic_state` would know 32 bits of entropy only.
    return np.frombuffer(os.urandom(24), np.int64)


def _fresh_key() -> np.ndarray:
    return np.frombuffer(os.urandom(32), np.uint32).view(np.int32)


def _sizes(values: Sequence[tf.Tensor]) -> list[int]:
    return [value.shape.num_elements() for value in values]


def _split(flat: tf.Tensor, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return [tf.reshape(part, value.shape) for part, value in zip(tf.split(flat, _sizes(values)), values, strict=True)]
