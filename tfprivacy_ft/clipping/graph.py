"""Reading and copying the ops of a traced loss: data, random draws, captures, replays. Knows no clipping.

A Keras training step is traced once into a TensorFlow graph. What varies by example enters it through a few tensors
(the step's data); everything else is a constant, a variable, or a random draw.
"""

from collections.abc import Iterable

import tensorflow as tf

from tfprivacy_ft import keras_compat
from tfprivacy_ft.errors import UnsupportedModelError

SHAPE_OPS = frozenset({"Shape", "ShapeN", "Size", "Rank"})


def ancestors(tensors: Iterable[tf.Tensor], stop: Iterable[tf.Tensor] = ()) -> list[tf.Operation]:
    """The ops that `tensors` are computed from, inputs before users; does not look behind `stop`."""
    stopped = {id(t) for t in stop}
    order: list[tf.Operation] = []
    entered: set[tf.Operation] = set()
    stack = [(t.op, False) for t in tensors if id(t) not in stopped]
    while stack:
        op, inputs_done = stack.pop()
        if inputs_done:
            order.append(op)
        elif op not in entered:
            entered.add(op)
            stack.append((op, True))
            stack.extend((t.op, False) for t in op.inputs if id(t) not in stopped)
    return order


def layer_of(op: tf.Operation) -> str:
    """The name scope that `op` was made in, which Keras builds from the names of model and layer."""
    scope = op.name.rpartition("/")[0] or op.name
    parts = [part for part in scope.split("/") if part not in ("while", "cond", "gradient_tape")]
    return "/".join(parts[:2]) if parts else op.name


def data_tensors(loss: tf.Tensor) -> list[tf.Tensor]:
    """What the loss reads that differs between examples: the step's own batch, each with the batch as first axis.

    Raises:
      UnsupportedModelError: a part of the batch has no batch axis (a scalar, a sparse or a ragged tensor), or the
        loss reads tensors of an outer function, of which nothing is known.
    """
    captured = {id(inner): outer for outer, inner in loss.graph.captures}
    found: list[tf.Tensor] = []
    for op in ancestors([loss]):
        if op.type == "IteratorGetNext":
            found.extend(t for t in op.outputs if t.consumers())
        elif op.type == "Placeholder":
            tensor = op.outputs[0]
            outer = captured.get(id(tensor))
            if outer is None:
                if tensor.dtype not in (tf.resource, tf.variant):
                    found.append(tensor)
            elif tensor.dtype not in (tf.resource, tf.variant) and not isinstance(outer, _EAGER):
                raise UnsupportedModelError(
                    f"the loss reads {tensor.name!r} from outside the traced training step, where its examples cannot "
                    "be told apart: compute the loss inside `train_step` from the step's own batch."
                )
    for tensor in found:
        if tensor.dtype == tf.variant or tensor.shape.rank in (None, 0):
            raise UnsupportedModelError(
                f"the batch holds {tensor.name!r} of dtype {tensor.dtype.name} and shape {tensor.shape}, which has no "
                "batch axis: give dense tensors whose first axis is the batch."
            )
    if not found:
        raise UnsupportedModelError("the loss does not depend on the step's batch: nothing can be trained privately.")
    return found


_EAGER = type(tf.constant(0))


def is_random(op: tf.Operation) -> bool:
    """Whether `op` draws random numbers, so that running it twice gives two results."""
    return "Random" in op.type or op.type in ("Multinomial", "StatelessMultinomial")


def replay(targets: list[tf.Tensor], feed: list[tuple[tf.Tensor, tf.Tensor]], graph: tf.Graph) -> list[tf.Tensor]:
    """Copies the ops that lead to `targets` into `graph`, with the tensors of `feed` replaced.

    Args:
      targets: tensors of a traced graph.
      feed: pairs (tensor of that graph, its replacement in `graph`).
      graph: the graph under construction.

    Returns:
      The counterpart of each target.
    """
    done = {id(old): new for old, new in feed}
    for op in ancestors(targets, stop=[old for old, _ in feed]):
        if all(id(t) in done for t in op.outputs):
            continue
        attributes = {k: v for k, v in op.node_def.attr.items() if k != "_class"}
        copy = graph._create_op_internal(
            op.type,
            [done[id(t)] for t in op.inputs],
            [t.dtype for t in op.outputs],
            attrs=attributes,
            op_def=op.op_def,
        )
        if keras_compat.is_swish(op):
            copy._clear_attr("_gradient_op_type")  # its Python gradient looks at the tensors of the original trace
        copy._gradient_function = op._gradient_function  # recurrent layers are differentiated by it
        for old, new in zip(op.outputs, copy.outputs, strict=True):
            done.setdefault(id(old), new)
    return [done[id(t)] for t in targets]
