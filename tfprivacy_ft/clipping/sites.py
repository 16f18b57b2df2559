"""Use sites: the ops where a variable meets data, and what each example's gradient is there.

At a use site, the gradient at the op's output and the op's other input hold everything about the gradient of the
variable, example by example. A family of ops has one small file with a subclass of `UseSite`; `SITES` lists them.
"""

import abc
import dataclasses

import tensorflow as tf

from tfprivacy_ft.clipping import calls
from tfprivacy_ft.clipping import graph as graphs
from tfprivacy_ft.clipping.layout import FREE, Layouts, Rows


@dataclasses.dataclass(frozen=True)
class Meeting:
    """An op whose input number `index` is `weight`, a variable's value perhaps reshaped; the rest is data."""

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
    the gradient at the op's output by `at`. All results are float32.
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
    def keep(self, rows: tf.Tensor) -> "Contribution":
        """The same with examples where `rows` ([B], bool) is False replaced by zeros, NaN or not."""

    def squared_norms(self) -> tf.Tensor:
        """Squared l2 norm of each example's gradient, [B]."""
        each = self.per_example()
        return tf.reduce_sum(tf.square(flatten(each)), 1)

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Sum over examples of weight times gradient, of the variable's shape. `weights` is [B]."""
        each = self.per_example()
        return tf.reshape(tf.linalg.matvec(flatten(each), weights, transpose_a=True), tf.shape(each)[1:])


class Instantiated(Contribution):
    """All examples' gradients, formed: [B, *shape]."""

    def __init__(self, each: tf.Tensor):
        self._each = each

    def per_example(self) -> tf.Tensor:
        return self._each

    def keep(self, rows: tf.Tensor) -> Contribution:
        return Instantiated(keep_rows(self._each, rows))


def flatten(each: tf.Tensor) -> tf.Tensor:
    """[B, ...] -> [B, n]."""
    size = each.shape[1:].num_elements()
    return tf.reshape(each, [-1, size] if size is not None else [tf.shape(each)[0], -1])


def keep_rows(tensor: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """`tensor` ([B, ...]) with zeros where `rows` ([B], bool) is False; what stood there does not matter."""
    mask = tf.reshape(rows, [-1] + [1] * (tensor.shape.rank - 1))
    return tf.where(mask, tensor, tf.zeros([], tensor.dtype))


def by_example(tensor: tf.Tensor, rows: Rows, batch_size: tf.Tensor) -> tf.Tensor:
    """[B * fold, ...] -> float32 [B, fold, ...]; fails when run if the rows are not the batch times `fold`."""
    return split_rows(tf.cast(tensor, tf.float32), batch_size, rows.fold)


def split_rows(tensor: tf.Tensor, batch_size: tf.Tensor, fold: int | None = None) -> tf.Tensor:
    """[B * fold, ...] -> [B, fold, ...]; without `fold`, by the number of rows that there are."""
    shape = tf.shape(tensor)
    return tf.reshape(
        tensor, tf.concat([tf.stack([batch_size, shape[0] // batch_size if fold is None else fold]), shape[1:]], 0)
    )


def find_meetings(
    variable: tf.Variable, loss: tf.Tensor, upstream: set[tf.Operation], layouts: Layouts
) -> tuple[list[Meeting], tf.Operation | None]:
    """The ops where `variable` meets data on its way to the per-example terms.

    Args:
      variable: a trainable variable.
      loss: the traced loss.
      upstream: the ops that the per-example terms are computed from.
      layouts: the layouts of the trace.

    Returns:
      The meetings, and None; or what was found so far and the op that has no rule.
    """
    handle = _handle_in(loss.graph, variable)
    if handle is None:
        return [], None
    meetings: list[Meeting] = []
    shape = tuple(variable.shape.as_list())
    values: list[tf.Tensor] = []
    for op in handle.consumers():
        if op not in upstream:
            continue
        if op.type == "ReadVariableOp":
            values.append(op.outputs[0])
        elif op.type == "ResourceGather":
            meetings.append(Meeting(op, 0, op.inputs[0], shape, layouts))
        elif op.type in calls.CALLS:
            index = next(i for i, t in enumerate(op.inputs) if t is handle)
            meetings.append(Meeting(op, index, handle, shape, layouts))
        else:
            return meetings, op
    while values:
        value = values.pop()
        for op in value.consumers():
            if op not in upstream or op.type in graphs.SHAPE_OPS:
                continue
            index = next(i for i, t in enumerate(op.inputs) if t is value)
            if any(layouts.of(t) is not FREE for t in op.outputs):
                meetings.append(Meeting(op, index, value, shape, layouts))
            elif op.type in ("Identity", "Cast", "Reshape", "Squeeze", "ExpandDims") and index == 0:
                values.append(op.outputs[0])  # moves no entry to another example and changes no length
            else:
                return meetings, op
    return meetings, None


def _handle_in(graph: tf.Graph, variable: tf.Variable) -> tf.Tensor | None:
    """The tensor by which `graph` knows the variable's handle; None where it does not use the variable."""
    if not any(outer is variable.handle for outer, _ in _captures_through(graph)):
        return None
    return graph.capture(variable.handle)


def _captures_through(graph: tf.Graph):
    """Captures of `graph`, each also followed through the graphs around it to where it comes from."""
    for outer, inner in graph.captures:
        source = outer
        while True:
            holder = getattr(source, "graph", None)
            further = next((o for o, i in getattr(holder, "captures", ()) if i is source), None)
            if further is None:
                break
            source = further
        yield source, inner
