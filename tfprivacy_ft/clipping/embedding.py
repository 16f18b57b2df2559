"""Embedding: rows of a table looked up by each example, with repeated rows added up before the norm."""

import tensorflow as tf

from tfprivacy_ft.clipping.products import ROUNDING, Products
from tfprivacy_ft.clipping.sites import (
    Contribution,
    Meeting,
    UseSite,
    by_example,
    dots,
    lengths,
    squares,
)


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
        return Lookups(indices, gradient, vocabulary, length)


class Lookups(Contribution):
    """Example i adds gradient[i, t] to row indices[i, t] of the table."""

    def __init__(self, indices: tf.Tensor, gradient: tf.Tensor, vocabulary: int, length: int | None):
        self.indices, self.gradient, self._vocabulary, self._length = indices, gradient, vocabulary, length

    def squared_norms(self) -> tf.Tensor:
        return squares(self.gradient if self._length == 1 else self._totals())

    def _totals(self) -> tf.Tensor:
        """What each example adds to each row that it names, [B, T, d]; zeros follow where it names fewer than T."""
        batch_size, length = tf.unstack(tf.shape(self.indices))
        firsts = length * tf.range(batch_size)[:, None]
        indices, order = tf.math.top_k(self.indices, length)
        gradient = tf.gather(tf.reshape(self.gradient, [batch_size * length, -1]), tf.reshape(firsts + order, [-1]))
        changes = tf.cast(indices[:, 1:] != indices[:, :-1], tf.int32)
        runs = firsts + tf.pad(tf.cumsum(changes, axis=1), [[0, 0], [1, 0]])
        totals = tf.math.unsorted_segment_sum(gradient, tf.reshape(runs, [-1]), batch_size * length)
        return tf.reshape(totals, tf.shape(self.gradient))

    def reach(self) -> tf.Tensor:
        """What no example's gradient is longer than, [B]: were all that it adds of one direction."""
        return tf.reduce_sum(lengths(self.gradient), 1)

    def joined(self, other: Contribution) -> Contribution | None:
        if isinstance(other, Lookups):
            return self.and_more(other)
        matrix = other.as_matrices() if isinstance(other, Products) else None
        return None if matrix is None else TiedTable(self, matrix)

    def and_more(self, other: "Lookups") -> "Lookups":
        """The table is looked up at both: at so many more tokens."""
        length = None if self._length is None or other._length is None else self._length + other._length
        indices = tf.concat([self.indices, other.indices], 1)
        return Lookups(indices, tf.concat([self.gradient, other.gradient], 1), self._vocabulary, length)

    def parts(self) -> list[tf.Tensor]:
        return [self.gradient]

    def weighted_sum(self, parts: list[tf.Tensor], weights: tf.Tensor) -> tf.Tensor:
        (gradient,) = parts
        weighted = gradient * tf.cast(weights, gradient.dtype)[:, None, None]
        return tf.math.unsorted_segment_sum(weighted, self.indices, self._vocabulary)

    def per_example(self) -> tf.Tensor:
        places = tf.one_hot(self.indices, self._vocabulary, dtype=self.gradient.dtype)
        return tf.matmul(places, self.gradient, transpose_a=True)


class TiedTable(Contribution):
    """A table that is looked up, and multiplied with elsewhere, such as by an output projection: never formed.

    Args:
      lookups: what the lookups add.
      products: what the matrix products add, as matrices of the table's shape.
    """

    def __init__(self, lookups: Lookups, products: Products):
        self._lookups, self._products = lookups, products

    def squared_norms(self) -> tf.Tensor:
        """|L + P|^2 = |L|^2 + |P|^2 + 2 L . P, rounded upward."""
        separate = self._lookups.squared_norms() + self._products.squared_norms()
        hidden = ROUNDING[separate.dtype] * tf.square(self._lookups.reach() + self._products.reach())
        return tf.maximum(separate + 2 * self._in_common(), 0.0) + hidden

    def _in_common(self) -> tf.Tensor:
        """L . P: with L = sum_t e_{i_t} g_t^T and P = sum_s a_s h_s^T, the sum over s and t of a_s[i_t] (h_s . g_t)."""
        inputs, outputs = self._products.inputs, self._products.outputs
        entries = tf.gather(inputs, self._lookups.indices, axis=2, batch_dims=1)
        return dots(entries, tf.matmul(outputs, self._lookups.gradient, transpose_b=True))

    def joined(self, other: Contribution) -> Contribution | None:
        if isinstance(other, Lookups):
            return TiedTable(self._lookups.and_more(other), self._products)
        products = self._products.joined(other)
        return TiedTable(self._lookups, products) if isinstance(products, Products) else None

    def parts(self) -> list[tf.Tensor]:
        return [*self._lookups.parts(), *self._products.parts()]

    def weighted_sum(self, parts: list[tf.Tensor], weights: tf.Tensor) -> tf.Tensor:
        looked_up, *multiplied = parts
        return self._lookups.weighted_sum([looked_up], weights) + self._products.weighted_sum(multiplied, weights)

    def per_example(self) -> tf.Tensor:
        return self._lookups.per_example() + self._products.per_example()
