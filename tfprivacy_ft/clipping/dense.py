"""MatMul: Dense on any rank (rows may fold time into the batch) and everything else that multiplies by a matrix."""

import tensorflow as tf

from tfprivacy_ft.clipping.sites import Contribution, Instantiated, Meeting, UseSite, by_example, keep_rows


class MatMulSite(UseSite):
    """`data [B * fold, d] @ weight [d, h]`, or the weight transposed."""

    @classmethod
    def match(cls, meeting: Meeting) -> "MatMulSite | None":
        op = meeting.op
        if op.type != "MatMul" or meeting.index != 1 or op.get_attr("transpose_a"):
            return None
        return cls(meeting) if meeting.batch_first(meeting.other()) else None

    def at(self, gradient: tf.Tensor, batch_size: tf.Tensor) -> Contribution:
        rows = self.meeting.rows(self.meeting.other())
        inputs = by_example(self.meeting.other(), rows, batch_size)
        outputs = by_example(gradient, rows, batch_size)
        if self.meeting.op.get_attr("transpose_b"):
            inputs, outputs = outputs, inputs
        if rows.fold == 1:
            return OuterProduct(inputs[:, 0], outputs[:, 0], self.meeting.variable_shape)
        each = tf.matmul(inputs, outputs, transpose_a=True)
        return Instantiated(tf.reshape(each, [-1, *self.meeting.variable_shape]))


class OuterProduct(Contribution):
    """Example i's gradient is the outer product of a_i and g_i, whose norm is |a_i| |g_i| (Goodfellow 2015)."""

    def __init__(self, inputs: tf.Tensor, outputs: tf.Tensor, shape: tuple[int, ...]):
        self._inputs, self._outputs, self._shape = inputs, outputs, shape

    def squared_norms(self) -> tf.Tensor:
        # Squaring one factor alone would underflow where the product does not, and a norm of 0 would not be clipped.
        return tf.square(_norms(self._inputs) * _norms(self._outputs))

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        total = tf.matmul(self._inputs, self._outputs * weights[:, None], transpose_a=True)
        return tf.reshape(total, self._shape)

    def per_example(self) -> tf.Tensor:
        return tf.reshape(self._inputs[:, :, None] * self._outputs[:, None, :], [-1, *self._shape])

    def keep(self, rows: tf.Tensor) -> Contribution:
        return OuterProduct(keep_rows(self._inputs, rows), keep_rows(self._outputs, rows), self._shape)


def _norms(rows: tf.Tensor) -> tf.Tensor:
    """The l2 norm of each row of [B, n], of whatever magnitude."""
    largest = tf.reduce_max(tf.abs(rows), 1)
    scale = tf.where(largest > 0, largest, 1.0)
    return scale * tf.sqrt(tf.reduce_sum(tf.square(rows / scale[:, None]), 1))
