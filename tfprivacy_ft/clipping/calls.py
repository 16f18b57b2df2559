"""What a traced convolution computes: which entries of an image every position sees, and how filters are shared.

`find` looks at one op. Keras traces a grouped convolution as a call of a function that holds the convolution and a few
ops that move entries around it; such a function is opened. What is not certain is None.
"""

import dataclasses
import math
from collections.abc import Sequence

import tensorflow as tf

from tfprivacy_ft import keras_compat

CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_AXES = {
    "Conv2D": 2,
    "Conv3D": 3,
    "DepthwiseConv2dNative": 2,
    "Conv2DBackpropInput": 2,
    "Conv3DBackpropInputV2": 3,
}
DEPTHWISE = "DepthwiseConv2dNative"
TRANSPOSED = ("Conv2DBackpropInput", "Conv3DBackpropInputV2")
_INSIDE = frozenset(
    """Conv2D Conv3D Const Identity NoOp ReadVariableOp ExpandDims Squeeze SpaceToBatchND BatchToSpaceND
    _Arg _Retval Placeholder""".split()
)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """Along each axis, position p of the output sees entries p * stride + k * dilation - before of an image.

    Args:
      kernel: how many entries each position sees, axis by axis.
      strides: between positions.
      dilations: between the entries that one position sees.
      before: zeros put before the image; None for as many as "SAME" means, which depends on the image.
      channels: of the images.
      width: channels of the positions.
      groups: parts that channels are split into, each with its own filters.
      transposed: whether the op takes positions and makes images, rather than the other way round.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...] | None
    channels: int
    width: int
    groups: int
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Call:
    """An op that convolves its input number `data` with filters that are its input number `weight`.

    Args:
      op: the convolution, perhaps inside a function.
      data: index of the data.
      weight: index of the filters.
      lifts: how many axes of size one are put before the filters.
      ahead: ops inside the function between its data and the convolution, in order.
      after: ops inside the function between the convolution and its output, in order.
    """

    op: tf.Operation
    data: int
    weight: int
    lifts: int = 0
    ahead: tuple[tf.Operation, ...] = ()
    after: tuple[tf.Operation, ...] = ()

    @property
    def blocks(self) -> int:
        """How many rows `ahead` makes of one: all first rows, then all second rows, and so on."""
        return math.prod(block_count(op) or 0 for op in self.ahead if op.type == "SpaceToBatchND")

    def data_inside(self, data: tf.Tensor) -> tf.Tensor:
        """What the convolution is given, of the data that the call is given."""
        for op in self.ahead:
            data = _in_blocks(data, op) if op.type == "SpaceToBatchND" else tf.expand_dims(data, 1)
        return data

    def gradient_inside(self, gradient: tf.Tensor) -> tf.Tensor:
        """The gradient at the convolution's output, of the gradient at the call's output."""
        for op in reversed(self.after):
            gradient = _in_blocks(gradient, op) if op.type == "BatchToSpaceND" else tf.expand_dims(gradient, 1)
        return gradient

    def convolution(self, weight_shape: Sequence[int], channels: int) -> Convolution | None:
        """What is computed; None where that is not certain.

        Args:
          weight_shape: the shape of the filters as the call is given them.
          channels: how many channels the images have: the data, or the output where it is transposed.
        """
        op, axes = self.op, _AXES[self.op.type]
        shape = [1] * self.lifts + list(weight_shape)
        if op.get_attr("data_format") != (b"NHWC" if axes == 2 else b"NDHWC") or len(shape) != axes + 2:
            return None
        strides, dilations = list(op.get_attr("strides")), list(op.get_attr("dilations"))
        if [strides[0], strides[-1], dilations[0], dilations[-1]] != [1, 1, 1, 1]:
            return None
        padding = op.get_attr("padding")
        before: tuple[int, ...] | None = (0,) * axes
        if padding == b"SAME":
            before = None
        elif padding == b"EXPLICIT":
            before = tuple(op.get_attr("explicit_paddings")[2:-2:2])
        inward = 1 if op.type == DEPTHWISE else shape[-2]
        if None in shape or not inward or channels % inward or (op.type == DEPTHWISE and shape[-2] != channels):
            return None
        groups, transposed = channels // inward, op.type in TRANSPOSED
        if transposed and groups != 1:
            return None
        width = shape[-1] * (groups if op.type == DEPTHWISE else 1)
        return Convolution(
            kernel=tuple(shape[:axes]),
            strides=tuple(strides[1:-1]),
            dilations=tuple(dilations[1:-1]),
            before=before,
            channels=channels,
            width=width,
            groups=groups,
            transposed=transposed,
        )


def find(op: tf.Operation) -> Call | None:
    """The convolution that `op` is or calls, or None. Outputs but the first are what a call keeps for its gradient."""
    if op.type in _AXES:
        return Call(op, 2 if op.type in TRANSPOSED else 0, 1)
    body = opened(op)
    if body is None or len(body.inputs) != 2 or len(op.inputs) != 2:
        return None
    found = [o for o in body.get_operations() if o.type in _AXES]
    if len(found) != 1:
        return None
    ahead, data = _moves(found[0].inputs[0], ("ExpandDims", "SpaceToBatchND"))
    lifts, weight = _moves(found[0].inputs[1], ("ExpandDims",), through="ReadVariableOp")
    after, middle = _moves(body.outputs[0], ("Squeeze", "BatchToSpaceND"))
    places = {id(t): i for i, t in enumerate(body.inputs)}
    fine = (
        middle is found[0].outputs[0]
        and {id(data), id(weight)} == set(places)
        and all(_keeps_examples(o, _AXES[found[0].type]) for o in (*ahead, *after))
        and all(tf.get_static_value(o.inputs[1]) == 0 for o in lifts)
        and [_undone_by(o) for o in reversed(ahead)] == [_undone_by(o) for o in after]
        and len({o.type for o in ahead}) == len(ahead)
    )
    return (
        Call(found[0], places[id(data)], places[id(weight)], len(lifts), tuple(ahead), tuple(after)) if fine else None
    )


def block_count(op: tf.Operation) -> int | None:
    """How many rows SpaceToBatchND makes of one, or BatchToSpaceND makes one of; None where that is not known."""
    shape = tf.get_static_value(op.inputs[1])
    return None if shape is None else math.prod(int(size) for size in shape)


def opened(op: tf.Operation):
    """The graph of a function that is a convolution and ops that move entries around it; None for any other op."""
    if op.type not in CALLS:
        return None
    definition = keras_compat.function_definition(op.graph, op.get_attr("f").name)
    if definition is None or not {node.op for node in definition.node_def} <= _INSIDE:
        return None
    return keras_compat.function_body(definition)


def _moves(tensor: tf.Tensor, kinds: tuple[str, ...], through: str = "Identity") -> tuple[list, tf.Tensor]:
    """The ops of `kinds` that `tensor` is the last of, first op first, and what the first is given."""
    found: list[tf.Operation] = []
    while tensor.op.type in (*kinds, "Identity", through):
        found = [tensor.op, *found] if tensor.op.type in kinds else found
        tensor = tensor.op.inputs[0]
    return found, tensor


def _keeps_examples(op: tf.Operation, axes: int) -> bool:
    """Whether an axis is put in or out just behind the batch of a [B, 1, length, channels], or blocks are known."""
    if op.type == "ExpandDims":
        axis = tf.get_static_value(op.inputs[1])
        return axes == 2 and axis is not None and int(axis) in (1, -3)
    if op.type == "Squeeze":
        return axes == 2 and list(op.get_attr("squeeze_dims")) in ([1], [-3])
    return all(value is not None for value in _static(op.inputs[1:]))


def _undone_by(op: tf.Operation) -> list[int] | None:
    """What an op before the convolution has in common with the one behind it that undoes it."""
    return None if op.type in ("ExpandDims", "Squeeze") else tf.get_static_value(op.inputs[1]).tolist()


def _in_blocks(tensor: tf.Tensor, op: tf.Operation) -> tf.Tensor:
    return tf.space_to_batch(tensor, *_static(op.inputs[1:]))


def _static(tensors) -> list:
    return [tf.get_static_value(t) for t in tensors]
