"""A clip that follows the gradients: it moves to a quantile of their norms, found privately while training.

Each step also releases, with noise of its own, how many examples have gradients within the clip. Sum and count together
are one Gaussian mechanism with the optimizer's noise multiplier: the count's share is paid for by a little more noise on
the sum, so that the accounts need to know nothing of it.
"""

from typing import Any

import tensorflow as tf

from tfprivacy_ft import _check
from tfprivacy_ft.clipping import Flat
from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.keras_compat import keras

_FARTHEST = 1e6  # the most that a clip moves away from where it began, as a factor


@keras.utils.register_keras_serializable(package="tfprivacy_ft")
class Adaptive(Flat):
    """One clip over all variables, which moves to a quantile of the examples' gradient norms.

    `l2_norm_clip` is where it begins. What one example adds is never longer than the clip of its step, and the noise on
    the sum follows that clip.

    Args:
      target_quantile: in (0, 1), the share of examples whose gradients are to be within the clip.
      learning_rate: > 0; the clip is multiplied by exp(-learning_rate * (share within it - target_quantile)).
      count_stddev: standard deviation of the noise on the count, more than half the noise multiplier; None for a twentieth
        of the expected batch size, but at least five times the noise multiplier.

    Raises:
      InvalidArgumentError: an argument is outside its range.

    Source: Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", Algorithm 1 and Theorem 1.
    """

    def __init__(self, target_quantile: float = 0.5, learning_rate: float = 0.2, count_stddev: float | None = None):
        _check.open_unit_interval(target_quantile=target_quantile)
        _check.positive(learning_rate=learning_rate)
        if count_stddev is not None:
            _check.positive(count_stddev=count_stddev)
        self.target_quantile, self.learning_rate, self.count_stddev = target_quantile, learning_rate, count_stddev

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {
            "target_quantile": self.target_quantile,
            "learning_rate": self.learning_rate,
            "count_stddev": self.count_stddev,
        }


def noise_on_sum(noise_multiplier: float, count_stddev: float) -> float:
    """The noise multiplier of the sum, such that sum and count together cost what `noise_multiplier` says.

    Args:
      noise_multiplier: z >= 0, of both together.
      count_stddev: > z / 2, of the noise on a count to which one example adds 1/2 or takes 1/2 away.

    Raises:
      InvalidArgumentError: the count alone would cost as much, or more.

    Example:
      >>> round(noise_on_sum(1.0, 1.0), 4)
      1.1547

    Source: Andrew et al. 2021, Theorem 1.
    """
    if noise_multiplier == 0:
        return 0.0
    if count_stddev <= noise_multiplier / 2:
        raise InvalidArgumentError(
            f"count_stddev={count_stddev} is not allowed: give more than half of noise_multiplier={noise_multiplier}."
        )
    return (noise_multiplier**-2 - (2 * count_stddev) ** -2) ** -0.5


def usual_count_stddev(noise_multiplier: float, expected_batch_size: float) -> float:
    """Standard deviation of the noise on the count where a rule does not say: a twentieth of the batch, or enough.

    Example:
      >>> usual_count_stddev(1.0, 1000.0)
      50.0
    """
    return max(expected_batch_size / 20, 5 * noise_multiplier)


def moved(rule: Adaptive, clip: tf.Tensor, noisy_votes_of_one: tf.Tensor, *, start: float) -> tf.Tensor:
    """The clip of the next step.

    Args:
      rule: where it is to move, and how fast.
      clip: float32 scalar, of this step.
      noisy_votes_of_one: float32 scalar, the noised votes over the expected size of the batch.
      start: > 0, where the clip began, of which it stays within a factor of a million.
    """
    excess = noisy_votes_of_one + 0.5 - rule.target_quantile
    factor = tf.exp(-rule.learning_rate * tf.clip_by_value(excess, -1.0, 1.0))
    after = tf.clip_by_value(clip * factor, start / _FARTHEST, start * _FARTHEST)
    return tf.where(tf.math.is_finite(after), after, clip)


class MovingClip:
    """The clip of one optimizer under `Adaptive`. In no checkpoint of its model: restoring one leaves it where it is.

    Args:
      rule: where it is to move, and how fast.
      start: > 0, where it begins.
      noise_multiplier: >= 0, of the whole step.
      expected_batch_size: > 0; None only where the rule has a `count_stddev`.

    Raises:
      InvalidArgumentError: the noise on the count cannot be told, or is too small.
    """

    def __init__(self, rule: Adaptive, start: float, noise_multiplier: float, expected_batch_size: float | None):
        self._rule, self._start = rule, start
        stddev = rule.count_stddev
        if stddev is None:
            if expected_batch_size is None:
                raise InvalidArgumentError("Adaptive() needs expected_batch_size, or count_stddev: give one of them.")
            stddev = usual_count_stddev(noise_multiplier, expected_batch_size)
        self.count_stddev = stddev if noise_multiplier else 0.0
        self.noise_multiplier = noise_on_sum(noise_multiplier, stddev)
        with tf.init_scope():
            self._clip = tf.Variable(start, dtype=tf.float32, trainable=False, name="moving_clip")

    def value(self) -> tf.Tensor:
        """The clip as it is now."""
        return self._clip.read_value()

    def go_on_from(self, value: float) -> None:
        """Puts the clip where an earlier process had it, which is what a run that goes on has to do.

        Args:
          value: > 0, what `value` gave then.
        """
        _check.positive(value=value)
        self._clip.assign(value)

    def votes(self, norms: tf.Tensor, real: tf.Tensor) -> tf.Tensor:
        """Sum over examples of 1/2 where the gradient is within the clip and -1/2 where it is not; float32 scalar.

        Args:
          norms: float32 [B], norms before the clip; what is not finite is not within it.
          real: bool [B], False for what only fills the batch and has no vote.
        """
        within = tf.where(tf.cast(norms, tf.float32) <= self._clip.read_value(), 0.5, -0.5)
        return tf.reduce_sum(tf.where(real, within, 0.0))

    def move(self, noisy_votes: tf.Tensor, batch_size: tf.Tensor, allowed: tf.Tensor) -> None:
        """Adds to the graph: the clip moves, where the step was let through."""
        clip = self._clip.read_value()
        after = moved(self._rule, clip, noisy_votes / batch_size, start=self._start)
        self._clip.assign(tf.where(allowed, after, clip), read_value=False)
