"""Scales and shifts: BiasAdd, Add, Sub and Mul with a variable that is broadcast over the examples."""

import abc

import tensorflow as tf

from tfprivacy_ft.clipping.sites import Contribution, Instantiated, Meeting, UseSite, by_example


class _BroadcastSite(UseSite):
    """An elementwise op of data [B * fold, ...] and a weight without a batch axis."""

    kinds: frozenset[str]

    @classmethod
    def match(cls, meeting: Meeting) -> "UseSite | None":
        weight = meeting.weight.shape
        known = meeting.batch_first(meeting.output) and weight.is_fully_defined()
        if meeting.op.type not in cls.kinds or not known:
            return None
        rank = meeting.output.shape.rank
        if rank is None or (weight.rank == rank and weight[0] != 1):
            return None  # a weight with its own row for every row of the batch
        return cls(meeting) if rank == meeting.other().shape.rank else None

    @abc.abstractmethod
    def gradient_times_slope(self, gradient: tf.Tensor) -> tf.Tensor:
        """d loss / d weight before the sum over the axes that the weight is broadcast along."""

    def at(self, gradient: tf.Tensor, batch_size: tf.Tensor) -> Contribution:
        rows = self.meeting.rows(self.meeting.output)
        full = by_example(self.gradient_times_slope(tf.cast(gradient, tf.float32)), rows, batch_size)
        # `full` is [B, fold, d1, ..., dn]: sum over fold and over the axes where the weight has size 1 or no axis.
        rank = full.shape.rank - 2
        weight = self.meeting.weight.shape.as_list()[-rank:] if rank else []
        weight = [1] * (rank - len(weight)) + weight
        axes = [1] + [i + 2 for i, size in enumerate(weight) if size == 1]
        each = tf.reduce_sum(full, axes)
        return Instantiated(tf.reshape(each, [-1, *self.meeting.variable_shape]))


class ShiftSite(_BroadcastSite):
    """data + weight, data - weight, weight - data."""

    kinds = frozenset({"BiasAdd", "Add", "AddV2", "Sub"})

    def gradient_times_slope(self, gradient: tf.Tensor) -> tf.Tensor:
        return -gradient if self.meeting.op.type == "Sub" and self.meeting.index == 1 else gradient


class ScaleSite(_BroadcastSite):
    """data * weight."""

    kinds = frozenset({"Mul"})

    def gradient_times_slope(self, gradient: tf.Tensor) -> tf.Tensor:
        return gradient * tf.cast(self.meeting.other(), tf.float32)
