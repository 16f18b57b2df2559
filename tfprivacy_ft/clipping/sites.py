"""Use sites: the ops where a variable meets data, and what each example's gradient is there.

At a use site, the gradient at the op's output and the op's other input hold everything about the gradient of the
variable, example by example. A family of ops has one small file with a subclass of `UseSite`; `SITES` lists them.
"""

import abc
import dataclasses
from collections.abc import Iterable

import tensorflow as tf

from tfprivacy_ft import keras_compat
from tfprivacy_ft.clipping.layout import Layouts, Rows


@dataclasses.dataclass(frozen=True)
class Meeting:
    """An op whose input number `index` is `weight`, a variable's value or computed from it; the rest is data.

    Args:
      op: the op where the two meet.
      index: which of its inputs the weight is.
      weight: the weight as the op sees it.
      variable_shape: of the gradients to form: the variable's where `weight` is its value, perhaps reshaped; else that
        of `weight`.
      layouts: the layouts of the trace.
    """

    op: tf.Operation
    index: int
    weight: tf.Tensor
    variable_shape: tuple[int, ...]
    layouts: Layouts

    @property
    def output(self) -> tf.Tensor:
        return self.op.outputs[0]

    def other(self) -> tf.Tensor:
        """The op's data input (of an op with two inputs)."""
        return self.op.inputs[1 - self.index]

    def batch_first(self, tensor: tf.Tensor) -> bool:
        """Whether the first axis of `tensor` holds the batch."""
        layout = self.layouts.of(tensor)
        return isinstance(layout, Rows) and layout.axis == 0

    def rows(self, tensor: tf.Tensor) -> Rows:
        """Where the batch is in `tensor`, for which `batch_first` holds."""
        layout = self.layouts.of(tensor)
        assert isinstance(layout, Rows)
        return layout


class UseSite(abc.ABC):
    """Each example's gradient of one variable at one op.

    Subclasses are made by `match`, which returns None for an op that they have no exact rule for, and then are given
    the gradient at the op's output by `at`. All results are float32, or float64 where the
    model is.
    """

    def __init__(self, meeting: Meeting):
        self.meeting = meeting

    @classmethod
    @abc.abstractmethod
    def match(cls, meeting: Meeting) -> "UseSite | None":
        """A site for this op, or None where the rule would not be exact."""

    @abc.abstractmethod
    def at(self, gradient: tf.Tensor, batch_size: tf.Tensor) -> "Contribution":
        """The examples' gradients, given the gradient at the op's output for the sum of all examples' losses."""


class Contribution(abc.ABC):
    """What every example adds to one variable's gradient: [B, *shape], perhaps never formed."""

    @abc.abstractmethod
    def per_example(self) -> tf.Tensor:
        """All examples' gradients, [B, *variable shape]."""

    @abc.abstractmethod
    def parts(self) -> list[tf.Tensor]:
        """What `weighted_sum` is computed from, [B, ...] each; zeros in an example's entries make its gradient zero."""

    @abc.abstractmethod
    def weighted_sum(self, parts: list[tf.Tensor], weights: tf.Tensor) -> tf.Tensor:
        """Sum over examples of weight times gradient, of the variable's shape.

        Args:
          parts: what `parts()` gave, perhaps with zeros for some examples.
          weights: [B].
        """

    def squared_norms(self) -> tf.Tensor:
        """Squared l2 norm of each example's gradient, [B]."""
        return squares(self.per_example())

    def added_to(self, other: "Contribution") -> "Contribution":
        """The sum of the two, example by example: a variable that is used twice."""
        together = self.joined(other) or other.joined(self)
        return Instantiated(self.per_example() + other.per_example()) if together is None else together

    def joined(self, other: "Contribution") -> "Contribution | None":
        """The sum of the two where this kind knows it without forming gradients."""
        return None

    def scaled(self, factor: tf.Tensor) -> "Contribution":
        """Every gradient times a scalar that belongs to no example."""
        return Instantiated(self.per_example() * tf.cast(factor, self.per_example().dtype))

    def transposed(self) -> "Contribution":
        """For gradients that are matrices: G^T."""
        return Instantiated(tf.transpose(self.per_example(), [0, 2, 1]))

    def times(self, matrix: tf.Tensor) -> "Contribution":
        """For gradients that are matrices: G @ matrix."""
        each = self.per_example()
        return Instantiated(tf.matmul(each, tf.cast(matrix, each.dtype)))

    def times_left(self, matrix: tf.Tensor) -> "Contribution":
        """For gradients that are matrices: matrix^T @ G."""
        return self.transposed().times(matrix).transposed()

    def reshaped(self, shape: tuple[int, ...]) -> "Contribution":
        """The same entries in the same order, in another shape."""
        return Instantiated(tf.reshape(self.per_example(), [-1, *shape]))


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How the entries of a gradient lie, and how they become a weight's.

    Args:
      sizes: of the axes along which they lie.
      order: of those axes in the weight.
      shape: of the weight.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def apply(self, gradient: tf.Tensor, examples: bool) -> tf.Tensor:
        """Of one gradient, or of [B, ...] gradients."""
        front = [-1] if examples else []
        if list(self.order) != sorted(self.order):
            gradient = tf.reshape(gradient, front + list(self.sizes))
            gradient = tf.transpose(gradient, [0, *(i + 1 for i in self.order)] if examples else self.order)
        return tf.reshape(gradient, front + list(self.shape))


class Instantiated(Contribution):
    """All examples' gradients, formed: [B, ...], of the variable's shape or arranged otherwise."""

    def __init__(self, each: tf.Tensor, arrangement: Arrangement | None = None):
        self._each, self._arrangement = each, arrangement

    def squared_norms(self) -> tf.Tensor:
        return squares(self._each)

    def per_example(self) -> tf.Tensor:
        return self._each if self._arrangement is None else self._arrangement.apply(self._each, examples=True)

    def parts(self) -> list[tf.Tensor]:
        return [self._each]

    def weighted_sum(self, parts: list[tf.Tensor], weights: tf.Tensor) -> tf.Tensor:
        (each,) = parts
        total = tf.linalg.matvec(flatten(each), tf.cast(weights, each.dtype), transpose_a=True)
        if self._arrangement is not None:
            return self._arrangement.apply(total, examples=False)
        return tf.reshape(total, tf.shape(each)[1:])


def flatten(each: tf.Tensor) -> tf.Tensor:
    """[B, ...] -> [B, n]."""
    size = each.shape[1:].num_elements()
    return tf.reshape(each, [-1, size] if size is not None else [tf.shape(each)[0], -1])


def dots(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Each example's sum of left * right over all its entries, [B, ...] -> [B], as a product, which needs no memory."""
    left, right = (flatten(t)[:, None] for t in (left, right))
    return tf.matmul(left, right, transpose_b=True)[:, 0, 0]


def squares(each: tf.Tensor) -> tf.Tensor:
    """Squared l2 norm of each example's entries, [B, ...] -> [B]."""
    return tf.square(lengths(flatten(each)))


def lengths(rows: tf.Tensor) -> tf.Tensor:
    """The l2 norm along the last axis."""
    if keras_compat.inside_xla():  # which does not know the other, and makes one pass of this
        return tf.sqrt(tf.reduce_sum(tf.square(rows), -1))
    return tf.math.reduce_euclidean_norm(rows, -1)  # needs no memory; on CPUs several times faster than a product


def keep_rows(tensor: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """`tensor` ([B, ...]) with zeros where `rows` ([B], bool) is False; what stood there does not matter."""
    mask = tf.reshape(rows, [-1] + [1] * (tensor.shape.rank - 1))
    return tf.where(mask, tensor, tf.zeros([], tensor.dtype))


def by_example(tensor: tf.Tensor, rows: Rows, batch_size: tf.Tensor) -> tf.Tensor:
    """[B * fold, ...] -> float32 or float64 [B, fold, ...]; fails when run if the rows are not the batch times `fold`."""
    return split_rows(widened(tensor), batch_size, rows.fold)


def widened(tensor: tf.Tensor) -> tf.Tensor:
    """In float32, or in float64 if it is that already."""
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)


def precision(tensors: Iterable[tf.Tensor | tf.Variable]) -> tf.DType:
    """What norms over all of `tensors` are taken in: float64 if one of them is that, or else float32."""
    return tf.float64 if any(t.dtype == tf.float64 for t in tensors) else tf.float32


def split_rows(tensor: tf.Tensor, batch_size: tf.Tensor, fold: int | None = None) -> tf.Tensor:
    """[B * fold, ...] -> [B, fold, ...]; without `fold`, by the number of rows that there are."""
    shape = tf.shape(tensor)
    return tf.reshape(
        tensor, tf.concat([tf.stack([batch_size, shape[0] // batch_size if fold is None else fold]), shape[1:]], 0)
    )
