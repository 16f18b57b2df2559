"""Matrix products: Dense on any rank, EinsumDense, attention projections, everything written as MatMul or Einsum.

An op is read as an Einsum, and its axes are sorted by what they do: `shared` ones are in data, weight and output,
`inner` ones in data and weight, `outer` ones in weight and output, and all others of an example (time) are summed
over. Each example's gradient is then, for each shared index, a product inputs^T [inner, T] @ outputs [T, outer].
"""

import dataclasses
import functools
import math

import numpy as np
import tensorflow as tf

from tfprivacy_ft.clipping.layout import Rows
from tfprivacy_ft.clipping.sites import (
    Arrangement,
    Contribution,
    Instantiated,
    Meeting,
    UseSite,
    dots,
    flatten,
    lengths,
    squares,
    widened,
)

# Of what rows of one direction would give: what rounding can hide of a squared norm where rows cancel.
ROUNDING = {tf.float32: 2.0**-20, tf.float64: 2.0**-49}


@dataclasses.dataclass(frozen=True)
class Labels:
    """An op as an Einsum of data and a weight: a letter for each axis, the batch being `batch`."""

    data: str
    weight: str
    output: str
    batch: str

    @property
    def shared(self) -> str:
        return "".join(c for c in self.weight if c in self.data and c in self.output)

    @property
    def inner(self) -> str:
        return "".join(c for c in self.weight if c in self.data and c not in self.output)

    @property
    def outer(self) -> str:
        return "".join(c for c in self.weight if c not in self.data)

    @property
    def time(self) -> str:
        return "".join(c for c in self.data if c in self.output and c not in self.weight + self.batch)


class ProductSite(UseSite):
    """A MatMul, BatchMatMul or Einsum of data and a weight without a batch axis."""

    def __init__(self, meeting: Meeting, labels: Labels):
        super().__init__(meeting)
        self._labels = labels

    @classmethod
    def match(cls, meeting: Meeting) -> "ProductSite | None":
        labels = _labels(meeting)
        return None if labels is None or not meeting.weight.shape.is_fully_defined() else cls(meeting, labels)

    def at(self, gradient: tf.Tensor, batch_size: tf.Tensor) -> Contribution:
        meeting, labels = self.meeting, self._labels
        sizes = dict(zip(labels.weight, meeting.weight.shape.as_list(), strict=True))
        data, rows = meeting.other(), meeting.layouts.of(meeting.other())
        assert isinstance(rows, Rows)
        unused = [i for i, c in enumerate(labels.data) if c not in labels.weight + labels.output]
        inputs = tf.reduce_sum(widened(data), unused) if unused else widened(data)
        kept = "".join(c for i, c in enumerate(labels.data) if i not in unused)
        known = dict(zip(labels.data, data.shape.as_list(), strict=True))
        time = [rows.fold, *(known[c] for c in labels.time)]
        steps = None if None in time else math.prod(time)
        inputs = _by_example(inputs, kept, labels, labels.inner, sizes, rows.fold, batch_size)
        outputs = _by_example(widened(gradient), labels.output, labels, labels.outer, sizes, rows.fold, batch_size)
        return Products(inputs, outputs, steps, _arrangement(labels, sizes, meeting.variable_shape))


def _labels(meeting: Meeting) -> Labels | None:
    """The op's axes, or None where it is no product of data and weight with a single batch axis."""
    op, place = meeting.op, meeting.layouts.of(meeting.output)
    if len(op.inputs) != 2 or not isinstance(place, Rows):
        return None
    data = meeting.layouts.of(meeting.other())
    terms = _letters(op)
    if terms is None or not isinstance(data, Rows):
        return None
    labels = Labels(terms[1 - meeting.index], terms[meeting.index], terms[2], terms[2][place.axis])
    # Each axis once in each; the batch in data and output, at the same place; no axis that is the weight's alone.
    once = all(len(set(t)) == len(t) for t in terms)
    of_batch = labels.data[data.axis] == labels.batch and labels.batch not in labels.weight and data.fold == place.fold
    used = all(c in labels.data + labels.output for c in labels.weight)
    made = all(c in labels.data + labels.weight for c in labels.output)
    return labels if once and of_batch and used and made else None


def _letters(op: tf.Operation) -> tuple[str, str, str] | None:
    """The axes of the two inputs and of the output."""
    if op.type == "Einsum":
        operands, _, output = op.get_attr("equation").decode().partition("->")
        left, _, right = operands.partition(",")
        return None if "." in operands + output else (left, right, output)
    if op.type == "MatMul":
        left = "ba" if op.get_attr("transpose_a") else "ab"
        return left, "cb" if op.get_attr("transpose_b") else "bc", "ac"
    if op.type not in ("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"):
        return None
    ranks = [t.shape.rank for t in op.inputs]
    if None in ranks or ranks[0] - 2 > 20 or min(ranks) < 2:
        return None
    # Axes before the matrices count from the last one; a weight that has them broadcasts unless sizes agree.
    shapes = [t.shape.as_list()[:-2] for t in op.inputs]
    if len(shapes[0]) and len(shapes[1]):
        aligned = zip(reversed(shapes[0]), reversed(shapes[1]), strict=False)
        if any(a is None or a != b for a, b in aligned):
            return None
    outside = "defghijklmnopqrstuvwxyz"[: max(ranks) - 2]
    left, right = (outside[len(outside) - (rank - 2) :] for rank in ranks)
    left += "ba" if op.get_attr("adj_x") else "ab"
    right += "cb" if op.get_attr("adj_y") else "bc"
    return left, right, outside + "ac"


def _by_example(tensor, axes: str, labels: Labels, last: str, sizes: dict[str, int], fold, batch_size) -> tf.Tensor:
    """[..., B * fold, ...] -> [B, (shared,) time, last], the time with the fold; (shared) where there is such an axis."""
    order = [
        axes.index(labels.batch),
        *(axes.index(c) for c in labels.time),
        *(axes.index(c) for c in labels.shared + last),
    ]
    width = math.prod(sizes[c] for c in last)
    if labels.shared:
        # Rows of one example lie behind one another only with the batch in front: first split it from its fold.
        front = _transposed(tensor, order)
        shared = math.prod(sizes[c] for c in labels.shared)
        apart = tf.reshape(front, tf.stack([batch_size, -1, shared, width]))
        return tf.transpose(apart, [0, 2, 1, 3])
    if fold is None:
        return tf.reshape(_transposed(tensor, order), tf.stack([batch_size, -1, width]))
    time = [tensor.shape[axes.index(c)] for c in labels.time]
    steps = -1 if None in time else fold * math.prod(time)
    return tf.ensure_shape(
        tf.reshape(_transposed(tensor, order), tf.stack([batch_size, steps, width])),
        [None, None if steps == -1 else steps, width],
    )


def _transposed(tensor: tf.Tensor, order: list[int]) -> tf.Tensor:
    return tensor if order == sorted(order) else tf.transpose(tensor, order)


def _arrangement(labels: Labels, sizes: dict[str, int], shape: tuple[int, ...]) -> Arrangement:
    """How gradients [shared, inner, outer] become the weight's own shape."""
    axes = labels.shared + labels.inner + labels.outer
    return Arrangement(tuple(sizes[c] for c in axes), tuple(axes.index(c) for c in labels.weight), shape)


class Products(Contribution):
    """Example i's gradient is inputs[i]^T @ outputs[i]: a sum over time of outer products.

    Args:
      inputs: [B, T, P] or, with shared axes, [B, S, T, P].
      outputs: [B, T, Q] or [B, S, T, Q].
      steps: T where it is known.
      arrangement: from [S, P, Q] to the weight's shape.
    """

    def __init__(self, inputs: tf.Tensor, outputs: tf.Tensor, steps: int | None, arrangement: Arrangement):
        self.inputs, self.outputs, self._steps, self._arrangement = inputs, outputs, steps, arrangement
        width, height = inputs.shape[-1], outputs.shape[-1]
        self._by_pairs = steps == 1 or (steps is not None and steps * (width + height) <= width * height)

    @functools.cached_property
    def _formed(self) -> Instantiated:
        return Instantiated(tf.matmul(self.inputs, self.outputs, transpose_a=True), self._arrangement)

    def squared_norms(self) -> tf.Tensor:
        if not self._by_pairs:
            return self._formed.squared_norms()
        return _norms_by_pairs(self.inputs, self.outputs, one_row=self._steps == 1)

    def reach(self) -> tf.Tensor:
        """What no example's gradient is longer than, [B]: were all its rows of one direction."""
        return tf.reduce_sum(flatten(lengths(self.inputs) * lengths(self.outputs)), 1)

    def parts(self) -> list[tf.Tensor]:
        return [self.inputs, self.outputs] if self._by_pairs else self._formed.parts()

    def weighted_sum(self, parts: list[tf.Tensor], weights: tf.Tensor) -> tf.Tensor:
        if not self._by_pairs:
            return self._formed.weighted_sum(parts, weights)
        inputs, outputs = parts
        weights = tf.reshape(tf.cast(weights, inputs.dtype), [-1] + [1] * (inputs.shape.rank - 1))
        if inputs.shape[-1] < outputs.shape[-1]:
            inputs = inputs * weights
        else:
            outputs = outputs * weights
        if inputs.shape.rank == 4:
            return self._arrangement.apply(tf.einsum("bstp,bstq->spq", inputs, outputs), examples=False)
        inputs, outputs = (tf.reshape(t, [-1, t.shape[-1]]) for t in (inputs, outputs))
        return self._arrangement.apply(tf.matmul(inputs, outputs, transpose_a=True), examples=False)

    def per_example(self) -> tf.Tensor:
        return self._formed.per_example()

    def joined(self, other: Contribution) -> Contribution | None:
        """A kernel that is applied twice is applied to twice the time, however its axes are called."""
        if not isinstance(other, Products):
            return None
        mine, theirs = (c.as_matrices() or c for c in (self, other))
        if mine._arrangement != theirs._arrangement or mine.inputs.shape.rank != 3 or theirs.inputs.shape.rank != 3:
            return None
        steps = None if mine._steps is None or theirs._steps is None else mine._steps + theirs._steps
        inputs = tf.concat([mine.inputs, theirs.inputs], 1)
        return Products(inputs, tf.concat([mine.outputs, theirs.outputs], 1), steps, mine._arrangement)

    def scaled(self, factor: tf.Tensor) -> Contribution:
        scaled = self.outputs * tf.cast(factor, self.outputs.dtype)
        return Products(self.inputs, scaled, self._steps, self._arrangement)

    def transposed(self) -> Contribution:
        mine = self.as_matrices()
        return super().transposed() if mine is None else matrices(mine.outputs, mine.inputs, mine._steps)

    def times(self, matrix: tf.Tensor) -> Contribution:
        mine, matrix = self.as_matrices(), tf.cast(matrix, self.outputs.dtype)
        if mine is not None:
            return matrices(mine.inputs, tf.matmul(mine.outputs, matrix), mine._steps)
        heads = self._heads()
        if heads is None:
            return super().times(matrix)
        width, rank = matrix.shape
        apart = tf.reshape(tf.matmul(tf.reshape(self.outputs, [-1, width]), matrix), [-1, heads * rank])
        outputs = tf.reshape(apart, tf.concat([tf.shape(self.outputs)[:2], [heads * rank]], 0))
        sizes = (self.inputs.shape[-1], heads * rank)
        return Products(
            self.inputs, outputs, self._steps, Arrangement(sizes, (0, 1), (self._arrangement.shape[0], rank))
        )

    def times_left(self, matrix: tf.Tensor) -> Contribution:
        mine, matrix = self.as_matrices(), tf.cast(matrix, self.inputs.dtype)
        if mine is not None:
            return matrices(tf.matmul(mine.inputs, matrix), mine.outputs, mine._steps)
        heads = self._heads()
        if heads is None:
            return super().times_left(matrix)
        rank, width = matrix.shape[-1], self._arrangement.shape[-1]
        steps = None if self._steps is None else self._steps * heads
        flat = tf.reshape(self.inputs, [-1, self.inputs.shape[-1]])
        inputs = tf.matmul(flat, tf.reshape(matrix, [-1, heads * rank]))
        return matrices(self._in_steps(inputs, steps, rank), self._in_steps(self.outputs, steps, width), steps)

    def reshaped(self, shape: tuple[int, ...]) -> Contribution:
        return Products(self.inputs, self.outputs, self._steps, dataclasses.replace(self._arrangement, shape=shape))

    def _heads(self) -> int | None:
        """How many rows of the weight, a matrix as it lies, are what one of the inputs has in all outputs; None if it is none.

        So lies a kernel [P, heads, width] that is multiplied along its last axis: as [P * heads, width].
        """
        shape, order = self._arrangement.shape, list(self._arrangement.order)
        rows = self.inputs.shape[-1]
        if self.inputs.shape.rank != 3 or len(shape) != 2 or order != sorted(order) or shape[0] % rows:
            return None
        return shape[0] // rows

    def _in_steps(self, tensor: tf.Tensor, steps: int | None, width: int) -> tf.Tensor:
        """[..., n * width] -> [B, steps, width]."""
        together = tf.reshape(tensor, tf.stack([tf.shape(self.inputs)[0], -1 if steps is None else steps, width]))
        return tf.ensure_shape(together, [None, steps, width])

    def as_matrices(self) -> "Products | None":
        """The same with gradients that are [rows, columns] of the weight as it lies, or None if it is no such matrix."""
        flat = (self.inputs.shape[-1], self.outputs.shape[-1])
        if self.inputs.shape.rank != 3 or len(self._arrangement.shape) != 2:
            return None
        if list(self._arrangement.order) == sorted(self._arrangement.order) and flat == self._arrangement.shape:
            return self
        if self._arrangement.order == (1, 0) and flat[::-1] == self._arrangement.shape:
            return matrices(self.outputs, self.inputs, self._steps)
        return None


def matrices(inputs: tf.Tensor, outputs: tf.Tensor, steps: int | None) -> Products:
    """Gradients inputs[i]^T @ outputs[i] of a weight [P, Q]; inputs [B, T, P], outputs [B, T, Q]."""
    shape = (inputs.shape[-1], outputs.shape[-1])
    return Products(inputs, outputs, steps, Arrangement(shape, (0, 1), shape))


def _norms_by_pairs(inputs: tf.Tensor, outputs: tf.Tensor, one_row: bool) -> tf.Tensor:
    """|sum_t a_t g_t^T|^2 = sum_{s,t} (a_s . a_t) (g_s . g_t), rounded upward (Bu et al. 2022, ghost norm).

    Between 1e-12 and 1e12 the lengths of rows do not matter; beyond, it is an upper bound, or not finite.
    """
    if one_row:
        rows_in, rows_out = lengths(inputs), lengths(outputs)  # [B, (S,) T]
        squared = squares(rows_in * rows_out)
    else:
        pairs_in, pairs_out = (tf.matmul(t, t, transpose_b=True) for t in (inputs, outputs))
        rows_in, rows_out = (tf.sqrt(tf.linalg.diag_part(pairs)) for pairs in (pairs_in, pairs_out))
        alone = squares(tf.reduce_sum(rows_in * rows_out, -1, keepdims=True))  # did no two rows of an example cancel
        squared = tf.maximum(dots(pairs_in, pairs_out), 0.0) + ROUNDING[alone.dtype] * alone
    # Entries whose square is no normal number may count as zero.
    hidden = math.sqrt(float(np.finfo(squared.dtype.as_numpy_dtype).tiny) * inputs.shape[-1] * outputs.shape[-1])
    unseen = hidden * tf.reduce_sum(flatten(rows_in + rows_out + hidden), 1)
    return tf.square(tf.sqrt(squared) + unseen)
