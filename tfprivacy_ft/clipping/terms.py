"""What the scalar loss is a sum of: terms of single examples, and terms that do not depend on data (regularisers).

Keras reduces per-example losses to one scalar, by a mean, a sum, loss weights, several outputs. Walking back from the
scalar through ops that are linear finds the per-example terms; how much of the scalar belongs to one example *alone* is
read from the graph by replaying that linear tail for a batch of one. Gradients of the sum over examples of "the loss
Keras gives this example alone" follow without ever guessing a factor: a wrong factor is a wrong clip.
"""

import dataclasses
import math
from collections.abc import Iterable

import tensorflow as tf

from tfprivacy_ft.clipping import graph as graphs
from tfprivacy_ft.clipping.layout import FREE, SIZE, Layouts, Rows
from tfprivacy_ft.clipping.sites import split_rows

_LINEAR = frozenset(
    """Identity Cast Neg Add AddV2 AddN Sub Sum Mean Pack Reshape Squeeze ExpandDims StopGradient""".split()
)
_SHAPE_INPUTS = {"Sum": (1,), "Mean": (1,), "Reshape": (1,), "ExpandDims": (1,)}


@dataclasses.dataclass(frozen=True)
class Terms:
    """The parts of a scalar loss.

    Args:
      per_example: tensors whose entries each belong to one example, or scalars that are sums of such; None where the
        scalar is not a data-independent linear combination of them.
      data_independent: scalars that depend on variables only, such as weight regularisers.
      weighed_by_data: whether data weighs the per-example terms in the scalar, as a mask does that is normalised by how
        much of the batch it leaves; then each example has a share of its own.
    """

    per_example: list[tf.Tensor] | None
    data_independent: list[tf.Tensor]
    weighed_by_data: bool = False


def find_terms(
    loss: tf.Tensor, layouts: Layouts, arguments: Iterable[tf.Tensor] = (), *, one_by_one: bool = False
) -> Terms:
    """Splits the scalar `loss` into terms of single examples and data-independent terms.

    Args:
      loss: the scalar loss.
      layouts: the layouts of the trace.
      arguments: tensors of the trace that stand for variables.
      one_by_one: whether examples will be replayed alone, so that a tensor with rows for each example needs no proof
        that the rows do not see each other.
    """
    per_example: list[tf.Tensor] = []
    independent: list[tf.Tensor] = []
    stopped: list[tf.Tensor] = []
    told_apart, weighed = True, False
    seen: set[tuple[int, bool]] = set()
    stack = [(loss, False)]
    while stack:
        tensor, scaled_by_size = stack.pop()
        if (id(tensor), scaled_by_size) in seen:
            continue
        seen.add((id(tensor), scaled_by_size))
        layout = layouts.of(tensor)
        if layout is FREE and not scaled_by_size:
            independent.append(tensor)
        elif layout in (FREE, SIZE):
            told_apart = False  # a regulariser times the number of examples would tell that number
        elif isinstance(layout, Rows) or (one_by_one and layouts.has_rows(tensor)):
            told_apart = told_apart and (not isinstance(layout, Rows) or layout.axis == 0)
            per_example.append(tensor)
        elif _is_sum_of_squares(tensor, layouts):
            per_example.append(tensor)
        else:
            parts, sized = _linear_parts(tensor.op, layouts)
            if parts is None and not one_by_one and not layouts.batch_is_static:
                parts = _weighed_part(tensor.op, arguments)
                weighed = weighed or parts is not None
            told_apart = told_apart and parts is not None
            stopped += [tensor] if parts is None else []
            stack.extend((part, scaled_by_size or sized) for part in parts or [])
    # A term that data terms are made of too (a learned weight of the loss) is no regulariser, nor is one whose gradient
    # is a Python function, which may look at the batch: they stay with the examples, inside the clip.
    behind = {id(t) for op in graphs.ancestors([*per_example, *stopped]) for t in op.outputs}
    separate = [t for t in independent if id(t) not in behind and not graphs.has_own_gradient(t)]
    told_apart = told_apart and len(separate) == len(independent)
    return Terms(per_example if told_apart and per_example else None, separate, weighed)


def _is_sum_of_squares(tensor: tf.Tensor, layouts: Layouts) -> bool:
    return tensor.op.type == "L2Loss" and isinstance(layouts.of(tensor.op.inputs[0]), Rows)


def _linear_parts(op: tf.Operation, layouts: Layouts) -> tuple[list[tf.Tensor] | None, bool]:
    """The inputs that `op` is linear in, and whether it scales them by a size.

    None where what multiplies them depends on data or variables.
    """
    if op.type in _LINEAR:
        skip = _SHAPE_INPUTS.get(op.type, ())
        return [t for i, t in enumerate(op.inputs) if i not in skip], False
    if op.type not in ("Mul", "RealDiv", "DivNoNan", "Div"):
        return None, False
    data = [t for t in op.inputs if layouts.of(t) not in (FREE, SIZE)]
    factors = [t for t in op.inputs if layouts.of(t) in (FREE, SIZE)]
    if len(data) != 1 or len(factors) != 1 or (op.type != "Mul" and data[0] is not op.inputs[0]):
        return None, False
    if any(o.type in ("ReadVariableOp", "Placeholder", "ResourceGather") for o in _value_ops(factors[0])):
        return None, False
    return data, layouts.of(factors[0]) is SIZE


def _weighed_part(op: tf.Operation, arguments: Iterable[tf.Tensor]) -> list[tf.Tensor] | None:
    """What `op` multiplies by a weight that is made of data alone, or None if it does no such thing."""
    if op.type not in ("Mul", "MulNoNan", "RealDiv", "Div", "DivNoNan"):
        return None
    behind = [_value_ops(t) for t in op.inputs]
    learned = [any(graphs.reads_weight(o, arguments) for o in ops) for ops in behind]
    if any(graphs.is_random(o) for ops, is_learned in zip(behind, learned, strict=True) if not is_learned for o in ops):
        return None
    if learned == [True, False] or (learned == [False, True] and op.type == "Mul"):
        return [op.inputs[learned.index(True)]]
    return None


def _value_ops(tensor: tf.Tensor) -> list[tf.Operation]:
    """The ops that the value of `tensor` comes from; sizes are not looked behind."""
    sizes = [t for op in graphs.ancestors([tensor]) if op.type in graphs.SHAPE_OPS for t in op.outputs]
    return [op for op in graphs.ancestors([tensor], stop=sizes) if op.type not in graphs.SHAPE_OPS]


@dataclasses.dataclass(frozen=True)
class Share:
    """How much the entries of one example in `term` weigh in the loss of that example alone.

    Args:
      term: a per-example term of the loss.
      row: d(loss of one example alone) / d(that example's rows of `term`), [fold, ...]; a scalar for a scalar term.
      differs: whether every example has a row of its own: [B, fold, ...].
    """

    term: tf.Tensor
    row: tf.Tensor
    differs: bool = False

    def spread(self, examples: tf.Tensor) -> tf.Tensor:
        """`row` for each of `examples` examples, of the shape that `term` then has."""
        if self.differs:
            return tf.reshape(self.row, tf.shape(self.term))
        if self.term.shape.rank == 0:
            return self.row
        return tf.tile(self.row, tf.concat([[examples], tf.ones([self.term.shape.rank - 1], tf.int32)], 0))


def find_shares(
    loss: tf.Tensor, terms: Terms, layouts: Layouts, data: list[tf.Tensor], batch_size: tf.Tensor
) -> list[Share]:
    """The share of one example in the loss of that example alone, for each term that reaches the loss.

    The tail of the loss, from the terms on, is replayed for a batch of one. It is linear in the terms with factors that
    depend on sizes only, so the derivative is all there is to know; where data weighs the terms, it is taken for each
    example with that example's data.

    Args:
      loss: the scalar loss.
      terms: what `find_terms` gave, with per-example terms.
      layouts: the layouts of the trace.
      data: the tensors that hold the batch.
      batch_size: scalar int32, examples in this batch.
    """
    parts = terms.per_example or []
    feed = [(t, _of_one_example(t, layouts, batch_size)) for t in parts]
    rows = layouts.batch * layouts.rows_per_example
    counts = {rows} | {math.prod(layouts.shape(t) or [0]) for t in parts}
    used: list[tf.Tensor] = []
    for op in graphs.ancestors([loss], stop=[*parts, *data]):
        if op.type in graphs.SHAPE_OPS and op.type != "Rank" and isinstance(layouts.of(op.inputs[0]), Rows):
            feed.extend((out, _size_alone(op, out, layouts, batch_size)) for out in op.outputs)
        elif op.type in ("Placeholder", "ReadVariableOp") or graphs.is_random(op):
            feed.extend((out, out) for out in op.outputs)
        elif op.type == "Const" and layouts.batch_is_static:
            feed.append((op.outputs[0], _constant_alone(op.outputs[0], layouts.batch, rows, counts)))
        used.extend(op.inputs)
    if not terms.weighed_by_data:
        feed += [(t, t) for t in data]
        alone = _shares_of(loss, feed, parts)
        return [Share(t, row) for t, row in zip(parts, alone, strict=True) if row is not None]
    weights = [t for t in data if any(t is other for other in used)]

    def of_one(examples: list[tf.Tensor]) -> list[tf.Tensor]:
        body = tf.compat.v1.get_default_graph()
        inside = [(old, body.capture(new)) for old, new in feed] + list(zip(weights, examples, strict=True))
        given = _shares_of(loss, inside, parts, body)
        return [tf.zeros_like(zero) if row is None else row for row, (_, zero) in zip(given, inside, strict=False)]

    each = tf.vectorized_map(of_one, [split_rows(t, batch_size) for t in weights])
    return [Share(t, row, differs=True) for t, row in zip(parts, each, strict=True)]


def _shares_of(
    loss: tf.Tensor, feed: list[tuple[tf.Tensor, tf.Tensor]], terms: list[tf.Tensor], graph=None
) -> list[tf.Tensor | None]:
    """The derivatives of the replayed loss by what stands for each term; None where it does not reach the loss."""
    replacement = {id(old): new for old, new in feed}
    (loss_alone,) = graphs.replay([loss], feed, graph or loss.graph)
    return tf.gradients(loss_alone, [replacement[id(t)] for t in terms])


def _of_one_example(term: tf.Tensor, layouts: Layouts, batch_size: tf.Tensor) -> tf.Tensor:
    """Zeros with the shape that `term` has in a batch of one example."""
    if term.shape.rank == 0:
        return tf.zeros([], term.dtype)
    shape = tf.shape(term)
    return tf.zeros(tf.concat([[shape[0] // batch_size], shape[1:]], 0), term.dtype)


def _size_alone(op: tf.Operation, out: tf.Tensor, layouts: Layouts, batch_size: tf.Tensor) -> tf.Tensor:
    """What a `Shape` or `Size` op would say in a batch of one example."""
    batch = tf.cast(batch_size, out.dtype)
    if op.type == "Size":
        return out // batch
    rows = layouts.of(op.inputs[0])
    assert isinstance(rows, Rows)
    axis = rows.axis
    return tf.concat([out[:axis], out[axis : axis + 1] // batch, out[axis + 1 :]], 0)


def _constant_alone(constant: tf.Tensor, batch: int, rows: int, counts: set[int]) -> tf.Tensor:
    """What an integer constant would be in a batch of one, where the trace has sizes of the batch written into it.

    Taking another constant for a size would scale every example's loss alike: another clip than meant, never a wrong
    bound.
    """
    value = tf.get_static_value(constant)
    if value is None or not constant.dtype.is_integer:
        return constant
    if value.ndim == 0 and int(value) in counts:
        return tf.constant(int(value) // batch, constant.dtype)
    if value.ndim == 1 and value.size and value[0] == rows:
        return tf.constant([rows // batch, *value[1:]], constant.dtype)
    return constant
