"""Embedding: rows of a table looked up by each example, with repeated rows added up before the norm."""

import tensorflow as tf

from tfprivacy_ft.clipping.sites import Contribution, Meeting, UseSite, by_example, keep_rows, squares


class EmbeddingSite(UseSite):
    """`table [V, d]` gathered at integer indices [B * fold, ...]."""

    @classmethod
    def match(cls, meeting: Meeting) -> "EmbeddingSite | None":
        op = meeting.op
        if op.type not in ("ResourceGather", "GatherV2") or op.get_attr("batch_dims") or meeting.index != 0:
            return None
        if op.type == "GatherV2":
            by_rows = tf.get_static_value(op.inputs[2]) == 0
            if not by_rows or tuple(meeting.weight.shape.as_list()) != meeting.variable_shape:
                return None
        return cls(meeting) if len(meeting.variable_shape) == 2 and meeting.batch_first(op.inputs[1]) else None

    def at(self, gradient: tf.Tensor, batch_size: tf.Tensor) -> Contribution:
        source = self.meeting.op.inputs[1]
        indices, rows, length = tf.cast(source, tf.int32), self.meeting.rows(source), None
        if rows.fold == 1 and source.shape[1:].is_fully_defined():
            length = source.shape[1:].num_elements()
        vocabulary, width = self.meeting.variable_shape
        tokens = -1 if length is None else length
        indices = tf.reshape(indices, tf.stack([batch_size, tokens]))
        gradient = by_example(gradient, rows, batch_size)
        gradient = tf.reshape(gradient, tf.stack([batch_size, tokens, width]))
        return _Lookups(indices, gradient, vocabulary, length)


class _Lookups(Contribution):
    """Example i adds gradient[i, t] to row indices[i, t] of the table."""

    def __init__(self, indices: tf.Tensor, gradient: tf.Tensor, vocabulary: int, length: int | None):
        self._indices, self._gradient, self._vocabulary, self._length = indices, gradient, vocabulary, length

    def squared_norms(self) -> tf.Tensor:
        return squares(self._gradient if self._length == 1 else self._totals())

    def _totals(self) -> tf.Tensor:
        """What each example adds to each row that it names, [B, T, d]; zeros follow where it names fewer than T."""
        batch_size, length = tf.unstack(tf.shape(self._indices))
        firsts = length * tf.range(batch_size)[:, None]
        indices, order = tf.math.top_k(self._indices, length)
        gradient = tf.gather(tf.reshape(self._gradient, [batch_size * length, -1]), tf.reshape(firsts + order, [-1]))
        changes = tf.cast(indices[:, 1:] != indices[:, :-1], tf.int32)
        runs = firsts + tf.pad(tf.cumsum(changes, axis=1), [[0, 0], [1, 0]])
        totals = tf.math.unsorted_segment_sum(gradient, tf.reshape(runs, [-1]), batch_size * length)
        return tf.reshape(totals, tf.shape(self._gradient))

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        weighted = self._gradient * tf.cast(weights, self._gradient.dtype)[:, None, None]
        return tf.math.unsorted_segment_sum(weighted, self._indices, self._vocabulary)

    def per_example(self) -> tf.Tensor:
        places = tf.one_hot(self._indices, self._vocabulary, dtype=self._gradient.dtype)
        return tf.matmul(places, self._gradient, transpose_a=True)

    def keep(self, rows: tf.Tensor) -> Contribution:
        return _Lookups(self._indices, keep_rows(self._gradient, rows), self._vocabulary, self._length)
