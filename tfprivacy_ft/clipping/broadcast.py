"""Elementwise ops of data and a weight that is broadcast over the examples: biases, scales, shifts, slopes, positions.

The gradient at each place where the weight is used is that of an op of numbers; what the broadcast repeated is added up,
for each example apart.
"""

import tensorflow as tf

from tfprivacy_ft.clipping import graph as graphs
from tfprivacy_ft.clipping.layout import ELEMENTWISE, Rows
from tfprivacy_ft.clipping.sites import Contribution, Instantiated, Meeting, UseSite, split_rows, widened

_REPEATS = frozenset(["BroadcastTo", "Tile"])


class ElementwiseSite(UseSite):
    """An elementwise op, or a repetition of the weight for each example, with the batch on any axis of the output."""

    @classmethod
    def match(cls, meeting: Meeting) -> "ElementwiseSite | None":
        op, place = meeting.op, meeting.layouts.of(meeting.output)
        if not isinstance(place, Rows) or not meeting.weight.shape.is_fully_defined():
            return None
        if op.type not in ELEMENTWISE | _REPEATS | {"BiasAdd"} or "_gradient_op_type" in op.node_def.attr:
            return None
        rank, weight = meeting.output.shape.rank, meeting.weight.shape
        if rank is None or weight.rank > rank or any(t.shape.rank is None for t in op.inputs):
            return None
        if op.type == "BiasAdd" and meeting.index != 1:
            return None
        aligned = _aligned(meeting)
        if aligned[place.axis] != 1:
            return None  # a weight with its own row for every row of the batch
        made = meeting.output.shape.as_list()
        if op.type == "Tile" and any(w not in (1, m) for w, m in zip(aligned, made, strict=True)):
            return None  # blocks, which a broadcast does not make
        return cls(meeting)

    def at(self, gradient: tf.Tensor, batch_size: tf.Tensor) -> Contribution:
        rows, rank = self.meeting.layouts.of(self.meeting.output), self.meeting.output.shape.rank
        assert isinstance(rows, Rows)
        weight = _aligned(self.meeting)
        order = [rows.axis, *(i for i in range(rank) if i != rows.axis)]
        full = self._before_the_sum(gradient)
        full = split_rows(full if rows.axis == 0 else tf.transpose(full, order), batch_size, rows.fold)
        # `full` is [B, fold, d1, ..., dn]: sum over fold and over the axes where the weight has size 1 or no axis.
        repeated = [1] + [i + 1 for i, axis in enumerate(order) if i and weight[axis] == 1]
        each = tf.reduce_sum(full, repeated)
        return Instantiated(tf.reshape(each, [-1, *self.meeting.variable_shape]))

    def _before_the_sum(self, gradient: tf.Tensor) -> tf.Tensor:
        """d loss / d weight at each place of the output."""
        op, index = self.meeting.op, self.meeting.index
        if op.type in ("BiasAdd", "Add", "AddV2", "AddN") or op.type in _REPEATS:
            return widened(gradient)
        if op.type == "Sub":
            return -widened(gradient) if index == 1 else widened(gradient)
        if op.type == "Mul":
            return widened(gradient) * widened(self.meeting.other())
        weight = tf.broadcast_to(self.meeting.weight, tf.shape(self.meeting.output))
        feed = [(t, weight if i == index else t) for i, t in enumerate(op.inputs)]
        (copy,) = graphs.replay([self.meeting.output], feed, op.graph)
        (slope,) = tf.gradients(copy, weight, grad_ys=gradient)
        return widened(tf.convert_to_tensor(slope))


def _aligned(meeting: Meeting) -> list[int]:
    """The weight's size along each axis of the output; 1 where it is repeated."""
    rank, weight = meeting.output.shape.rank, meeting.weight.shape.as_list()
    if meeting.op.type == "BiasAdd" and graphs.attribute(meeting.op, "data_format", b"NHWC") == b"NCHW":
        return [1, *weight] + [1] * (rank - 2)
    return [1] * (rank - len(weight)) + weight
