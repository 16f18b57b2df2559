"""Where the batch is in every tensor of a traced loss: a proof, op by op, that examples do not see each other.

`Layouts.of(tensor)` says one of
  FREE      it does not depend on the batch (constants, variables, random draws),
  SIZE      it depends on the batch's shape only,
  Rows      axis `axis` holds the batch, `fold` rows for each example, one example after the other; every row is
            computed from its own example alone,
  Blocks    axis 0 holds such rows several times over, all first ones before all second ones (SpaceToBatchND),
  COUPLED   an op that is known to mix examples made it (a sum over the batch),
  UNKNOWN   an op without a rule made it, so nothing is claimed.
A wrong `Rows` would be a privacy bug, so an op has a rule or is UNKNOWN. The shapes that the rules need are found by
tracing the loss once more, in a graph that is thrown away, with a batch of a large prime number of examples; a batch size
that the trace has written into it is kept.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import tensorflow as tf

from tfprivacy_ft import keras_compat
from tfprivacy_ft.clipping import calls
from tfprivacy_ft.clipping import graph as graphs

_BATCHES = (10_007, 10_009)  # primes that no layer's width is a multiple of, by any likelihood; both have to agree
_LENGTHS = (61, 67)  # stand for every other unknown dimension, one after the other: both have to agree


@dataclasses.dataclass(frozen=True)
class Rows:
    """Axis `axis` has size batch * fold, ordered by example; `fold` is None where it depends on an unknown length."""

    axis: int
    fold: int | None = 1


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Axis 0 holds `blocks` times over what `Rows(0, fold)` says, one block after the other."""

    blocks: int
    fold: int | None = 1


@dataclasses.dataclass(frozen=True)
class _Word:
    name: str

    def __repr__(self):
        return self.name


FREE, SIZE, COUPLED, UNKNOWN = _Word("FREE"), _Word("SIZE"), _Word("COUPLED"), _Word("UNKNOWN")
Layout = Rows | Blocks | _Word

_UNARY = frozenset(
    """Identity Cast Tanh Relu Relu6 Elu Selu LeakyRelu Sigmoid Softplus Softsign Exp Expm1 Log Log1p Neg Square
    Sqrt Rsqrt Reciprocal Inv Abs Sign Erf Erfc Sin Cos Tan Sinh Cosh Asinh Acosh Atanh Atan Floor Ceil
    Round Rint LogicalNot IsNan IsFinite IsInf StopGradient PreventGradient CheckNumerics OnesLike ZerosLike
    Snapshot""".split()
)
ELEMENTWISE = frozenset(
    """Add AddV2 AddN Sub Mul MulNoNan RealDiv Div DivNoNan Xdivy Xlogy Maximum Minimum Pow SquaredDifference
    Greater GreaterEqual Less LessEqual Equal NotEqual LogicalAnd LogicalOr SelectV2 FloorDiv FloorMod Mod
    Atan2 ClipByValue""".split()
)
_REDUCTIONS = frozenset(["Sum", "Mean", "Max", "Min", "Prod", "All", "Any", "EuclideanNorm"])
_SAME_SHAPE_LAST_AXIS = frozenset(["Softmax", "LogSoftmax"])
_RESHAPES = frozenset(["Reshape", "Squeeze", "ExpandDims"])
_IMAGE = frozenset(
    """Conv2D Conv3D DepthwiseConv2dNative MaxPool MaxPoolV2 AvgPool MaxPool3D AvgPool3D ResizeBilinear
    ResizeNearestNeighbor ResizeBicubic""".split()
)
_BY_ROW = _UNARY | _RESHAPES | _IMAGE | set(calls.TRANSPOSED)
_SHAPED_BY = {  # ops whose named inputs only say a shape, a size or a position
    "Reshape": {1},
    "ExpandDims": {1},
    "Fill": {0},
    "BroadcastTo": {1},
    "Tile": {1},
    "OneHot": {1},
    "StridedSlice": {1, 2, 3},
    "Slice": {1, 2},
    "Transpose": {1},
    "SpaceToBatchND": {1, 2},
    "BatchToSpaceND": {1, 2},
    "Conv2DBackpropInput": {0},
    "Conv3DBackpropInputV2": {0},
}


def axis_after_reshape(before: list[int], after: list[int], rows: Rows) -> Rows | None:
    """Where the batch is after a row-major reshape, or None where rows of two examples could share one.

    Elements of one example lie together only if everything before the batch axis has size 1; they stay whole rows if
    what follows the new axis divides what belongs to one example.

    Example:
      >>> axis_after_reshape([7, 6, 4], [42, 4], Rows(0))
      Rows(axis=0, fold=6)
    """
    if math.prod(before[: rows.axis]) != 1:
        return None
    assert rows.fold is not None
    per_example = rows.fold * math.prod(before[rows.axis + 1 :])
    for axis, size in enumerate(after):
        if size != 1:
            inner = math.prod(after[axis + 1 :])
            return Rows(axis, per_example // inner) if inner and per_example % inner == 0 else None
    return None


class Layouts:
    """The layouts of all tensors that a traced scalar loss is computed from.

    Args:
      loss: the scalar loss, inside the graph of a training step.
      data: the tensors that hold the step's batch, batch first.
      rows_per_example: consecutive rows of the data that are one example.
    """

    def __init__(self, loss: tf.Tensor, data: list[tf.Tensor], rows_per_example: int = 1):
        # A trace for one example is looked at with many, too: where nothing is wider than 1, no axis can be followed.
        self.rows_per_example = rows_per_example
        self.batch_is_static = all(t.shape[0] not in (None, rows_per_example) for t in data)
        batches = (data[0].shape[0] // rows_per_example,) if self.batch_is_static else _BATCHES
        self.batch = batches[0]
        lengths_are_known = all(t.shape[1:].is_fully_defined() for t in data)
        sizes = [(batch, _LENGTHS[0]) for batch in batches] + [
            (self.batch, n) for n in _LENGTHS[1:] if not lengths_are_known
        ]
        looks = [_Look(loss, data, batch, self.batch_is_static, length, rows_per_example) for batch, length in sizes]
        first = looks[0]
        self._shapes = first.shapes
        self._layouts = dict(first.layouts)
        for look in looks[1:]:
            grown = look.length == first.length  # then only the batch differs
            for key, layout in self._layouts.items():
                same = not grown or first.shapes.get(key) == look.shapes.get(key)
                self._layouts[key] = _agreed(layout, look.layouts[key] if same or layout is not FREE else UNKNOWN)
        self.first_coupling, self.first_unknown = first.first_coupling, first.first_unknown

    def of(self, tensor: tf.Tensor) -> Layout:
        return self._layouts.get(id(tensor), FREE)

    def shape(self, tensor: tf.Tensor) -> list[int] | None:
        """The tensor's shape for a batch of `self.batch` examples, or None where it is not known."""
        return self._shapes.get(id(tensor))

    def reaches_loss(self, tensor: tf.Tensor) -> bool:
        """Whether the loss is computed from `tensor`."""
        return any(id(t) in self._layouts for op in tensor.consumers() for t in op.outputs)

    def has_rows(self, tensor: tf.Tensor) -> bool:
        """Whether by its shape the tensor has rows for each example, isolated or not."""
        shape = self.shape(tensor)
        return shape is not None and len(shape) > 0 and shape[0] % self.batch == 0


def _agreed(one: Layout, other: Layout) -> Layout:
    """What two looks with different unknown lengths both say."""
    if isinstance(one, Rows) and isinstance(other, Rows) and one.axis == other.axis:
        return one if one.fold == other.fold else Rows(one.axis, None)
    if isinstance(one, Blocks) and isinstance(other, Blocks) and one.blocks == other.blocks:
        return one if one.fold == other.fold else Blocks(one.blocks, None)
    return one if one is other else UNKNOWN


class _Look:
    """One walk over the ops of a loss, with every dimension a number."""

    def __init__(
        self, loss: tf.Tensor, data: list[tf.Tensor], batch: int, batch_is_static: bool, length: int, fold: int
    ):
        self.layouts: dict[int, Layout] = {id(t): Rows(0, fold) for t in data}
        self.batch, self._batch_is_static, self.length = batch, batch_is_static, length
        self.shapes = _shapes(loss, data, batch * fold, length)
        self.first_coupling: tf.Operation | None = None
        self.first_unknown: tf.Operation | None = None
        for op in graphs.ancestors([loss], stop=data):
            self._visit(op)

    def of(self, tensor: tf.Tensor) -> Layout:
        return self.layouts.get(id(tensor), FREE)

    def shape(self, tensor: tf.Tensor) -> list[int] | None:
        return self.shapes.get(id(tensor))

    def _dims(self, tensor: tf.Tensor) -> list[int]:
        """The shape of an input of an op that a rule looks at, which is known."""
        return self.shapes[id(tensor)]

    def _visit(self, op: tf.Operation) -> None:
        layouts = [self.of(t) for t in op.inputs]
        result = self._rule(op, layouts)
        for index, tensor in enumerate(op.outputs):
            layout = result[index] if isinstance(result, list) else result
            self.layouts[id(tensor)] = self._checked(tensor, layout)
        made = self.of(op.outputs[0]) if op.outputs else FREE
        if made is COUPLED and COUPLED not in layouts:
            self.first_coupling = self.first_coupling or op
        if made is UNKNOWN and UNKNOWN not in layouts:
            self.first_unknown = self.first_unknown or op

    def _checked(self, tensor: tf.Tensor, layout: Layout) -> Layout:
        shape = self.shape(tensor)
        if isinstance(layout, Blocks):
            fine = shape and shape[0] == self.batch * (layout.fold or 0) * layout.blocks
            return layout if fine else UNKNOWN
        if not isinstance(layout, Rows):
            return layout
        if shape is None or layout.axis >= len(shape) or shape[layout.axis] != self.batch * (layout.fold or 0):
            return UNKNOWN
        return layout

    def _rule(self, op: tf.Operation, layouts: list[Layout]) -> Layout | list[Layout]:
        if op.type in graphs.SHAPE_OPS:
            return FREE if all(layout is FREE for layout in layouts) else SIZE
        if self._is_known_size(op):
            return FREE
        if all(layout is FREE for layout in layouts):
            return FREE
        if graphs.is_random(op) and op.type != "RandomShuffle":
            return self._shaped(op.outputs[0]) if all(layout in (FREE, SIZE) for layout in layouts) else UNKNOWN
        shape_inputs = _SHAPED_BY.get(op.type, set())
        values = [FREE if i in shape_inputs and v is SIZE else v for i, v in enumerate(layouts)]
        if all(layout is FREE for layout in values):
            return self._shaped(op.outputs[0])
        if all(layout in (FREE, SIZE) for layout in values):
            return SIZE
        if UNKNOWN in values:
            return UNKNOWN
        if COUPLED in values:
            return COUPLED
        if SIZE in values:
            return UNKNOWN
        return self._data_rule(op, values)

    def _is_known_size(self, op: tf.Operation) -> bool:
        """Whether `op` picks, from the shape of a tensor, sizes that are written into the trace and not the batch's."""
        source = op.inputs[0].op if op.inputs else None
        if source is None or source.type != "Shape" or op.type not in ("StridedSlice", "GatherV2"):
            return False
        shape, rows = source.inputs[0].shape, self.of(source.inputs[0])
        inputs = [tf.get_static_value(t) for t in op.inputs[1:]]
        if shape.rank is None or not isinstance(rows, Rows) or any(i is None for i in inputs):
            return False
        axes = np.arange(shape.rank)
        if op.type == "GatherV2":
            picked = axes[inputs[0]]
        else:
            (begin,), (end,), (stride,) = inputs
            if op.get_attr("ellipsis_mask") or op.get_attr("new_axis_mask"):
                return False
            if op.get_attr("shrink_axis_mask"):
                picked = axes[begin]
            else:
                picked = axes[
                    None if op.get_attr("begin_mask") else begin : None if op.get_attr("end_mask") else end : stride
                ]
        return all(axis != rows.axis and shape[int(axis)] is not None for axis in np.ravel(picked))

    def _shaped(self, tensor: tf.Tensor) -> Layout:
        """A value that is independent of the batch but for its shape: rows for each example, or nothing of it."""
        if self._batch_is_static:
            return FREE  # sizes of the batch are part of the trace then, and public
        shape = self.shape(tensor)
        axes = [i for i, size in enumerate(shape or []) if size % self.batch == 0]
        if shape is None or len(axes) > 1:
            return UNKNOWN
        return Rows(axes[0], shape[axes[0]] // self.batch) if axes else FREE

    def _data_rule(self, op: tf.Operation, layouts: list[Layout]) -> Layout | list[Layout]:
        """The rule of an op whose inputs are FREE or Rows, at least one of them Rows."""
        kind = op.type
        if "_gradient_op_type" in op.node_def.attr and not keras_compat.is_swish(op):
            return UNKNOWN  # its gradient is not the one that its type says
        if any(self.shape(t) is None for t in op.inputs):
            return UNKNOWN
        if any(isinstance(layout, Blocks) for layout in layouts):
            return self._blocks(op, layouts)
        if kind in _UNARY:
            return layouts[0]
        if kind in ELEMENTWISE:
            return self._broadcast(op, layouts)
        if kind == "Select":
            return self._broadcast(op, layouts) if len({len(self._dims(t)) for t in op.inputs}) == 1 else UNKNOWN
        if kind == "BroadcastTo":
            return self._broadcast(op, layouts[:1])
        rule = getattr(self, f"_rule_{kind}", None)
        if kind in _REDUCTIONS:
            rule = self._reduction
        elif kind in _SAME_SHAPE_LAST_AXIS:
            rule = self._along_last_axis
        elif kind in _RESHAPES:
            rule = self._reshape
        elif kind in _IMAGE:
            rule = self._image
        return (
            UNKNOWN
            if rule is None or (isinstance(layouts[0], _Word) and kind not in _DATA_NOT_FIRST)
            else rule(op, layouts)
        )

    def _broadcast(self, op: tf.Operation, layouts: list[Layout]) -> Layout:
        """All data operands must hold the batch at the same place, counted from the last axis."""
        rank = op.outputs[0].shape.rank
        places = set()
        for tensor, layout in zip(op.inputs, layouts, strict=False):
            if isinstance(layout, Rows):
                places.add((layout.axis - len(self._dims(tensor)), layout.fold))
        if rank is None or len(places) != 1:
            return UNKNOWN
        place, fold = places.pop()
        return Rows(rank + place, fold)

    def _reduction(self, op: tf.Operation, layouts: list[Any]) -> Layout:
        rows, axes = layouts[0], tf.get_static_value(op.inputs[1])
        rank = op.inputs[0].shape.rank
        if axes is None or rank is None:
            return UNKNOWN
        axes = {int(a) % rank for a in axes.reshape(-1)}
        if rows.axis in axes:
            return COUPLED
        kept = rows.axis if op.get_attr("keep_dims") else rows.axis - sum(a < rows.axis for a in axes)
        return Rows(kept, rows.fold)

    def _along_last_axis(self, op: tf.Operation, layouts: list[Any]) -> Layout:
        return layouts[0] if layouts[0].axis != len(self._dims(op.inputs[0])) - 1 else COUPLED

    def _reshape(self, op: tf.Operation, layouts: list[Any]) -> Layout:
        before, after = self.shape(op.inputs[0]), self.shape(op.outputs[0])
        if before is None or after is None:
            return UNKNOWN
        return axis_after_reshape(before, after, layouts[0]) or UNKNOWN

    def _image(self, op: tf.Operation, layouts: list[Any]) -> Layout:
        alone = layouts[0].axis == 0 and all(layout is FREE for layout in layouts[1:])
        channels_last = graphs.attribute(op, "data_format", b"NHWC") in (b"NHWC", b"NDHWC")
        windows = [graphs.attribute(op, name, [1])[0] for name in ("ksize", "strides")]
        return layouts[0] if alone and channels_last and windows == [1, 1] else UNKNOWN

    def _rule_Conv2DBackpropInput(self, op, layouts):
        rows, known = layouts[2], op.outputs[0].shape.rank and op.outputs[0].shape[1:].is_fully_defined()
        apart = known or (op.inputs[0].op.type == "Pack" and all(map(self._avoids_batch, op.inputs[0].op.inputs[1:])))
        fine = isinstance(rows, Rows) and rows.axis == 0 and layouts[:2] == [FREE, FREE] and apart
        channels_last = graphs.attribute(op, "data_format", b"NHWC") in (b"NHWC", b"NDHWC")
        return rows if fine and channels_last and op.get_attr("strides")[0] == 1 else UNKNOWN

    _rule_Conv3DBackpropInputV2 = _rule_Conv2DBackpropInput

    def _rule_PartitionedCall(self, op, layouts):
        """A grouped convolution, which is traced as a function."""
        data = [i for i, layout in enumerate(layouts) if layout is not FREE]
        call = calls.find(op) if len(data) == 1 else None
        if call is None or call.data != data[0] or layouts[data[0]].axis != 0:
            return UNKNOWN
        return [layouts[data[0]]] + [UNKNOWN] * (len(op.outputs) - 1)

    _rule_StatefulPartitionedCall = _rule_PartitionedCall

    def _rule_SpaceToBatchND(self, op, layouts):
        blocks, rows = calls.block_count(op), layouts[0]
        fine = rows.axis == 0 and self._avoids_batch(op.inputs[2])
        return Blocks(blocks, rows.fold) if blocks and fine else UNKNOWN

    def _blocks(self, op: tf.Operation, layouts: list[Any]) -> Layout:
        """Between SpaceToBatchND and its way back only ops are followed that treat every row alike."""
        blocks = layouts[0] if isinstance(layouts[0], Blocks) else layouts[-1]
        if op.type == "BatchToSpaceND":
            whole = calls.block_count(op) == blocks.blocks and self._avoids_batch(op.inputs[2])
            return Rows(0, blocks.fold) if whole and layouts[0] == blocks else UNKNOWN
        if layouts.count(blocks) != 1 or op.type not in _BY_ROW:
            return UNKNOWN
        rows = Rows(0, blocks.blocks * (blocks.fold or 0))
        kept = self._data_rule(op, [rows if v == blocks else v for v in layouts])
        return blocks if kept == rows else UNKNOWN

    def _avoids_batch(self, size: tf.Tensor) -> bool:
        """Whether a size that is computed when run is made of lengths of axes other than the batch's."""
        stack = [size]
        while stack:
            tensor = stack.pop()
            if self.of(tensor) is FREE:
                continue
            followed = self._sliced(tensor.op) if tensor.op.type == "StridedSlice" else None
            if followed is not None:
                stack.extend(followed)
                continue
            if tensor.op.type in graphs.SHAPE_OPS or not tensor.op.inputs:
                return False
            stack.extend(tensor.op.inputs)
        return True

    def _sliced(self, op: tf.Operation) -> list[tf.Tensor] | None:
        """Of a slice of a shape or of stacked sizes, the sizes that it takes, less those of axes behind the batch's."""
        source, begin, end = op.inputs[0].op, *(tf.get_static_value(t) for t in op.inputs[1:3])
        if begin is None or end is None or begin[0] < 0 or any(map(op.get_attr, _MASKS)):
            return None
        if source.type == "Pack" and source.get_attr("axis") == 0:
            return list(source.inputs[begin[0] : None if op.get_attr("end_mask") & 1 else end[0]])
        if source.type != "Shape":
            return None
        rows = self.of(source.inputs[0])
        behind = isinstance(rows, Rows | Blocks) and begin[0] > (rows.axis if isinstance(rows, Rows) else 0)
        return [] if behind else None

    def _rule_BiasAdd(self, op, layouts):
        channels = 1 if graphs.attribute(op, "data_format", b"NHWC") == b"NCHW" else len(self._dims(op.inputs[0])) - 1
        return layouts[0] if layouts[1] is FREE and layouts[0].axis != channels else UNKNOWN

    def _rule_MatMul(self, op, layouts):
        fine = layouts[0].axis == 0 and layouts[1] is FREE and not op.get_attr("transpose_a")
        return layouts[0] if fine else UNKNOWN

    def _rule_BatchMatMulV2(self, op, layouts):
        rank = op.outputs[0].shape.rank
        inner = [
            isinstance(v, Rows) and v.axis >= len(self._dims(t)) - 2 for t, v in zip(op.inputs, layouts, strict=True)
        ]
        if any(inner) or rank is None:
            rows, matrix_rows = layouts[0], len(self._dims(op.inputs[0])) - 2
            fine = (
                layouts[1] is FREE and isinstance(rows, Rows) and rows.axis == matrix_rows and not op.get_attr("adj_x")
            )
            return Rows(rank - 2, rows.fold) if fine and rank is not None else UNKNOWN
        return self._broadcast(op, layouts)

    def _rule_Einsum(self, op, layouts):
        operands, _, output = op.get_attr("equation").decode().partition("->")
        labels = operands.split(",")
        if "." in operands or "." in output:
            return UNKNOWN
        batch = {(terms[v.axis], v.fold) for terms, v in zip(labels, layouts, strict=True) if isinstance(v, Rows)}
        if len(batch) != 1:
            return UNKNOWN
        label, fold = batch.pop()
        if any(label in terms for terms, v in zip(labels, layouts, strict=True) if v is FREE):
            return UNKNOWN
        return Rows(output.index(label), fold) if label in output else COUPLED

    def _rule_Transpose(self, op, layouts):
        order = tf.get_static_value(op.inputs[1])
        return UNKNOWN if order is None else Rows(list(order).index(layouts[0].axis), layouts[0].fold)

    def _rule_Pad(self, op, layouts):
        widths = tf.get_static_value(op.inputs[1])
        return layouts[0] if widths is not None and not widths[layouts[0].axis].any() else UNKNOWN

    _rule_PadV2 = _rule_MirrorPad = _rule_Pad

    def _rule_ConcatV2(self, op, layouts):
        axis, rank = tf.get_static_value(op.inputs[-1]), op.outputs[0].shape.rank
        rows = {v for v in layouts if isinstance(v, Rows)}
        if axis is None or rank is None or len(rows) != 1:
            return UNKNOWN
        row = rows.pop()
        return row if row.axis != int(axis) % rank else UNKNOWN

    def _rule_Pack(self, op, layouts):
        rows = {v for v in layouts if isinstance(v, Rows)}
        rank = op.outputs[0].shape.rank
        if rank is None or len(rows) != 1:
            return UNKNOWN
        row, axis = rows.pop(), op.get_attr("axis") % rank
        return Rows(row.axis + (axis <= row.axis), row.fold)

    def _rule_Unpack(self, op, layouts):
        axis = op.get_attr("axis") % len(self._dims(op.inputs[0]))
        rows = layouts[0]
        return UNKNOWN if axis == rows.axis else Rows(rows.axis - (axis < rows.axis), rows.fold)

    def _rule_Split(self, op, layouts):
        axis = tf.get_static_value(op.inputs[0])
        rows = layouts[1]
        return UNKNOWN if axis is None or int(axis) % len(self._dims(op.inputs[1])) == rows.axis else rows

    def _rule_SplitV(self, op, layouts):
        axis = tf.get_static_value(op.inputs[2])
        return UNKNOWN if axis is None or int(axis) % len(self._dims(op.inputs[0])) == layouts[0].axis else layouts[0]

    def _rule_StridedSlice(self, op, layouts):
        rank, strides = len(self._dims(op.inputs[0])), tf.get_static_value(op.inputs[3])
        kept = None if strides is None else _sliced_axes(op, rank, [int(n) for n in strides])
        return (
            UNKNOWN
            if kept is None or layouts[0].axis not in kept
            else Rows(kept.index(layouts[0].axis), layouts[0].fold)
        )

    def _rule_Slice(self, op, layouts):
        begin, size = (tf.get_static_value(t) for t in op.inputs[1:])
        whole = begin is not None and size is not None and begin[layouts[0].axis] == 0 and size[layouts[0].axis] == -1
        return layouts[0] if whole else UNKNOWN

    def _rule_Tile(self, op, layouts):
        """By a number that is known; more copies of the batch itself would not stand example by example."""
        rows, times = layouts[0], tf.get_static_value(op.inputs[1])
        if times is None and self.of(op.inputs[1]) is FREE and self.shape(op.outputs[0]) is not None:
            # `tf.repeat` computes a number that only TensorFlow's own shapes know.
            return rows if self._dims(op.outputs[0])[rows.axis] == self._dims(op.inputs[0])[rows.axis] else UNKNOWN
        return rows if times is not None and times[rows.axis] == 1 else UNKNOWN

    def _rule_Cumsum(self, op, layouts):
        axis = tf.get_static_value(op.inputs[1])
        return (
            layouts[0] if axis is not None and int(axis) % len(self._dims(op.inputs[0])) != layouts[0].axis else UNKNOWN
        )

    _rule_Cumprod = _rule_Cumsum

    def _rule_ReverseV2(self, op, layouts):
        axes = tf.get_static_value(op.inputs[1])
        rank = len(self._dims(op.inputs[0]))
        return UNKNOWN if axes is None or any(int(a) % rank == layouts[0].axis for a in axes) else layouts[0]

    def _rule_ArgMax(self, op, layouts):
        axis = tf.get_static_value(op.inputs[1])
        if axis is None:
            return UNKNOWN
        axis = int(axis) % len(self._dims(op.inputs[0]))
        return COUPLED if axis == layouts[0].axis else Rows(layouts[0].axis - (axis < layouts[0].axis), layouts[0].fold)

    _rule_ArgMin = _rule_ArgMax

    def _rule_MatrixBandPart(self, op, layouts):
        return layouts[0] if layouts[0].axis < len(self._dims(op.inputs[0])) - 2 else UNKNOWN

    def _rule_GatherV2(self, op, layouts):
        axis = tf.get_static_value(op.inputs[2])
        if axis is None or op.get_attr("batch_dims"):
            return UNKNOWN
        axis = int(axis) % len(self._dims(op.inputs[0]))
        table, indices = layouts[0], layouts[1]
        if table is FREE and isinstance(indices, Rows):
            return Rows(axis + indices.axis, indices.fold)
        if isinstance(table, Rows) and indices is FREE and table.axis != axis:
            return Rows(table.axis + (axis < table.axis) * (op.inputs[1].shape.rank - 1), table.fold)
        return UNKNOWN

    def _rule_ResourceGather(self, op, layouts):
        return UNKNOWN if op.get_attr("batch_dims") or layouts[0] is not FREE else layouts[1]

    def _rule_OneHot(self, op, layouts):
        return layouts[0] if op.get_attr("axis") == -1 and layouts[2] is FREE and layouts[3] is FREE else UNKNOWN

    def _rule_SparseSoftmaxCrossEntropyWithLogits(self, op, layouts):
        fine = layouts[0] == layouts[1] and layouts[0].axis == 0
        return layouts[0] if fine else UNKNOWN

    _rule_SoftmaxCrossEntropyWithLogits = _rule_SparseSoftmaxCrossEntropyWithLogits

    def _rule_FusedBatchNormV3(self, op, layouts):
        """Inference scales each row alone; training takes moments over every axis but the channels."""
        rows = layouts[0]
        channels = 1 if op.get_attr("data_format") == b"NCHW" else len(self._dims(op.inputs[0])) - 1
        by_channel = (FREE, Rows(0, rows.fold)) if rows.axis == channels else (FREE,)
        if not all(layout in by_channel for layout in layouts[1:]):
            return UNKNOWN
        if not op.get_attr("is_training"):
            return rows if rows.axis != channels else UNKNOWN
        if rows.axis != channels:
            return COUPLED
        return [rows] + [Rows(0, rows.fold)] * 4 + [UNKNOWN] * (len(op.outputs) - 5)

    def _rule_IdentityN(self, op, layouts):
        return list(layouts) if keras_compat.is_swish(op) else UNKNOWN

    def _rule_L2Loss(self, op, layouts):
        return COUPLED


_DATA_NOT_FIRST = frozenset(
    """ConcatV2 Pack Split GatherV2 ResourceGather BatchMatMulV2 Einsum Conv2DBackpropInput Conv3DBackpropInputV2
    PartitionedCall StatefulPartitionedCall""".split()
)


_MASKS = ("begin_mask", "ellipsis_mask", "new_axis_mask")


def _sliced_axes(op: tf.Operation, rank: int, strides: list[int]) -> list[int | None] | None:
    """For each axis of a slice, the input's axis that it holds in whole; None for a new or a cut axis.

    None altogether where the slice cannot be read. Slices of one entry leave no axis.
    """
    masks = {name: op.get_attr(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    kept: list[int | None] = []
    axis, named = 0, len(strides)
    for place in range(named):
        bit = 1 << place
        if masks["ellipsis"] & bit:
            later = sum(1 for i in range(place + 1, named) if not masks["new_axis"] >> i & 1)
            kept += range(axis, rank - later)
            axis = rank - later
        elif masks["new_axis"] & bit:
            kept.append(None)
        elif masks["shrink_axis"] & bit:
            axis += 1
        else:
            whole = masks["begin"] & bit and masks["end"] & bit and strides[place] == 1
            kept.append(axis if whole else None)
            axis += 1
    return kept + list(range(axis, rank)) if axis <= rank else None


def _shapes(loss: tf.Tensor, data: list[tf.Tensor], batch: int, length: int) -> dict[int, list[int]]:
    """Every tensor's full shape for a batch of `batch` rows, from a second trace with all dimensions known."""
    scratch = tf.__internal__.FuncGraph("shapes")
    with scratch.as_default():
        feed = []
        for tensor in data:
            dims = [batch] + [length if d is None else d for d in tensor.shape.as_list()[1:]]
            feed.append((tensor, tf.compat.v1.placeholder(tensor.dtype, dims)))
        feed += [(t, scratch.capture(t)) for t in graphs.outside(loss, data)]
        fed = {id(old) for old, _ in feed}
        inside = [t for op in graphs.ancestors([loss], stop=data) for t in op.outputs if id(t) not in fed]
        try:
            copies = graphs.replay(inside, feed, scratch, calls.opened)
        except (ValueError, tf.errors.OpError):  # shapes that fit no other batch: then nothing is claimed
            return {}
    pairs = feed + list(zip(inside, copies, strict=True))
    return {id(old): new.shape.as_list() for old, new in pairs if new.shape.is_fully_defined()}
