"""Gradient accumulation: clipped sums of k micro-batches are added up and released once, as one logical batch.

Promise: what is released holds micro-batches of one logical batch only. In a pass that was announced, the logical
batches begin where the sampler began them, whatever else used the optimizer in between; micro-batches that are left over
are dropped, never added to other data. Nothing here is in a checkpoint. Knows no clipping, no noise and no accounts.
"""

import dataclasses

import tensorflow as tf

_UNLIMITED = tf.int64.max
_NOTHING = -1


@dataclasses.dataclass(frozen=True)
class Whole:
    """What has been added up so far.

    Args:
      sums: float32 or float64, one tensor for each variable.
      rows: float32 scalar, examples in all of it.
      votes: float32 scalar, the votes on the clip of all of it.
      complete: bool scalar, whether this was the last micro-batch of a logical batch.
      announced: bool scalar, whether all of it belongs to an execution that was announced.
    """

    sums: list[tf.Tensor]
    rows: tf.Tensor
    votes: tf.Tensor
    complete: tf.Tensor
    announced: tf.Tensor


class Accumulator:
    """Adds up `steps` micro-batches.

    Without a recorder every micro-step counts as announced. With one (`attach`), those that were not announced by
    `announce` begin logical batches of their own.

    Args:
      steps: k >= 2, micro-batches in a logical batch.
    """

    def __init__(self, steps: int):
        self._steps = steps
        with tf.init_scope():
            self._position = tf.Variable(0, dtype=tf.int64, trainable=False, name="micro_batches_passed")
            self._open = tf.Variable(_UNLIMITED, dtype=tf.int64, trainable=False, name="micro_batches_announced")
            self._held = tf.Variable(_NOTHING, dtype=tf.int64, trainable=False, name="micro_batches_held")
        self._sets: dict[tuple, tuple[int, list[tf.Variable]]] = {}
        self._passed = self._announced = 0  # micro-steps of this pass, and of the execution that runs

    def add(self, sums: list[tf.Tensor], rows: tf.Tensor, votes: tf.Tensor, variables: list[tf.Variable]) -> Whole:
        """Adds to the graph under construction: one more micro-batch, and where in its logical batch it is."""
        parts = [*sums, rows, votes]
        number, slots = self._slots(variables, parts)
        announced = self._open > 0
        # What is held was made for other variables or by another kind of step where this mark differs.
        mark = 2 * tf.constant(number, tf.int64) + tf.cast(announced, tf.int64)
        other = self._held.read_value() != mark
        position = tf.where(other & ~announced, tf.zeros([], tf.int64), self._position.read_value())
        fresh = other | (position == 0)
        totals = [
            s.assign(tf.where(fresh, part, s.read_value() + part), read_value=True)
            for s, part in zip(slots, parts, strict=True)
        ]
        complete = position + 1 >= self._steps
        self._open.assign_sub(tf.cast(announced, tf.int64), read_value=False)
        self._position.assign(tf.where(complete, tf.zeros([], tf.int64), position + 1), read_value=False)
        self._held.assign(mark, read_value=False)
        return Whole(totals[:-2], totals[-2], totals[-1], complete, announced)

    def attach(self) -> None:
        """From now on micro-steps have to be announced."""
        self._open.assign(0)
        self.start_pass()

    def start_pass(self) -> None:
        """Drops what is held: a pass over the data begins."""
        self._passed = 0
        self._move_to(0)

    def announce(self, micro_steps: int) -> int:
        """The next `micro_steps` go on with this pass; returns how many logical batches they complete."""
        position = self._passed % self._steps
        if int(self._position) != position:
            self._move_to(position)
        self._open.assign(micro_steps)
        self._announced = micro_steps
        return (position + micro_steps) // self._steps

    def finished(self) -> None:
        """Takes back what the announced execution did not use."""
        self._passed += self._announced - int(self._open)
        self._announced = 0
        self._open.assign(0)

    def _move_to(self, position: int) -> None:
        self._position.assign(position)
        self._held.assign(_NOTHING)

    def _slots(self, variables: list[tf.Variable], parts: list[tf.Tensor]) -> tuple[int, list[tf.Variable]]:
        """The number of this set of variables, and its sums; rows and votes come last."""
        key = tuple(v.ref() for v in variables)
        if key not in self._sets:
            with tf.init_scope():
                kinds = [(part.shape, part.dtype) for part in parts]
                slots = [tf.Variable(tf.zeros(*kind), trainable=False, name="clipped_sum") for kind in kinds]
            self._sets[key] = (len(self._sets), slots)
        return self._sets[key]
