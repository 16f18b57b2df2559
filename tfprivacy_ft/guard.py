"""A step that was not reserved changes nothing, also inside a compiled training function.

The guard counts the private steps of one optimizer. Steps are reserved in blocks before they run; who reserves them (a
plan with its ledger) is handed in as a function. Without one, every step is allowed and only counted. The counters
belong to the process, not to the model: they are in no checkpoint, and never go back.
"""

from collections.abc import Callable

import tensorflow as tf

from tfprivacy_ft import keras_compat

_UNLIMITED = tf.int64.max


class StepGuard:
    """Counts steps, and lets one happen only while `done < reserved`."""

    def __init__(self):
        with tf.init_scope():
            self._done = tf.Variable(0, dtype=tf.int64, trainable=False, name="private_steps_done")
            self._reserved = tf.Variable(_UNLIMITED, dtype=tf.int64, trainable=False, name="private_steps_reserved")
            # Whether the limit holds for steps that were not announced, too.
            self._for_all = tf.Variable(True, trainable=False, name="private_steps_for_all")
            self._refused = tf.Variable(0, dtype=tf.int64, trainable=False, name="private_steps_refused")
        self._reserve: Callable[[int], int] | None = None

    @property
    def done(self) -> int:
        """Private steps that were released."""
        return int(self._done)

    def take_refused(self) -> int:
        """Steps that were not let through since this was last asked."""
        refused = int(self._refused)
        self._refused.assign_sub(refused)
        return refused

    def attach(self, reserve: Callable[[int], int]) -> None:
        """From now on steps need a reservation.

        Args:
          reserve: called with the steps done when they reach the limit; returns the new limit once the steps up to it
            are on disk, or raises.
        """
        self._reserve = reserve
        self._reserved.assign(self._done)

    def allow_until(self, limit: int) -> None:
        """Moves the limit: steps up to `limit` have been reserved, for steps that were announced."""
        self._reserved.assign(limit, read_value=False)
        self._for_all.assign(False, read_value=False)

    def enter(self, due: tf.Tensor | bool = True, announced: tf.Tensor | bool = True) -> tf.Tensor:
        """Adds to the graph under construction: reserve if needed, then count; a bool, whether the step may happen.

        What a step releases has to be zero where this is False. It is counted here, before anything of it is computed
        that others could take: a gradient that is never applied is a release, too.

        Args:
          due: bool scalar, whether there is a step at all: False in the midst of a logical batch.
          announced: bool scalar, whether it may use what was reserved for steps that were announced.
        """
        due, announced = tf.convert_to_tensor(due), tf.convert_to_tensor(announced)
        if not keras_compat.inside_xla():  # Python cannot be called from compiled code: there a callback reserves
            tf.cond(due & ~self._is_open(announced), self._reserve_more, tf.no_op)
        allowed = due & self._is_open(announced)
        counted = self._done.assign_add(tf.cast(allowed, tf.int64), read_value=False)
        refused = self._refused.assign_add(tf.cast(due & ~allowed, tf.int64), read_value=False)
        with tf.control_dependencies([counted, refused]):
            return tf.identity(allowed)

    def _is_open(self, announced: tf.Tensor) -> tf.Tensor:
        return (self._done < self._reserved) & (announced | self._for_all.read_value())

    def _reserve_more(self) -> tf.Operation:
        limit = tf.py_function(self._call_reserve, [self._done.read_value()], tf.int64)
        self._reserved.assign(tf.ensure_shape(limit, []))
        with tf.control_dependencies([limit]):  # the function moves the limit itself, for announced steps, on its way
            self._for_all.assign(True)
        return tf.no_op()

    def _call_reserve(self, done: tf.Tensor) -> int:
        return self._reserve(int(done)) if self._reserve else _UNLIMITED
