"""Reading and copying the ops of a traced loss: data, random draws, captures, replays. Knows no clipping.

A Keras training step is traced once into a TensorFlow graph. What varies by example enters it through a few tensors
(the step's data); everything else is a constant, a variable, or a random draw.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

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


def attribute(op: tf.Operation, name: str, default):
    """An attribute of `op`, or `default` where ops of its type have none of that name."""
    return op.get_attr(name) if name in op.node_def.attr else default


def layer_of(op: tf.Operation) -> str:
    """The name scope that `op` was made in, which Keras builds from the names of model and layer."""
    return scope_of(op) or op.name


def handle_of(weight: tf.Variable | tf.Tensor) -> tf.Tensor:
    """What a graph knows a weight by: a variable's handle, or the tensor itself."""
    return getattr(weight, "handle", weight)


def arguments(loss: tf.Tensor, tensors: Iterable[tf.Variable | tf.Tensor]) -> list[tf.Tensor]:
    """Those of `tensors` that are no variables: arguments of the function that was traced, the same for all examples.

    Raises:
      UnsupportedModelError: one is something else, such as a value that the function computes.
    """
    found = [t for t in tensors if handle_of(t) is t]
    for tensor in found:
        if getattr(tensor, "graph", None) is not loss.graph or tensor.op.type != "Placeholder":
            raise UnsupportedModelError(
                f"the weight {tensor!r} is neither a variable nor an argument of the function that computes the loss: give "
                "that function its weights as arguments, as `clipped_sum_of_function` does."
            )
    return found


def data_tensors(loss: tf.Tensor, arguments: Iterable[tf.Tensor] = ()) -> list[tf.Tensor]:
    """What the loss reads that differs between examples: the step's own batch, each with the batch as first axis.

    Args:
      loss: the traced loss.
      arguments: tensors of the trace that are the same for all examples.

    Raises:
      UnsupportedModelError: a part of the batch has no batch axis (a scalar, a sparse or a ragged tensor), or the
        loss reads tensors of an outer function, of which nothing is known.
    """
    captured = {id(inner): outer for outer, inner in loss.graph.captures}
    found: list[tf.Tensor] = []
    for op in ancestors([loss], stop=arguments):
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


def outside(loss: tf.Tensor, data: list[tf.Tensor]) -> list[tf.Tensor]:
    """What enters the trace and is the same for all examples: handles of variables, constants, weights as arguments."""
    return [op.outputs[0] for op in ancestors([loss], stop=data) if op.type == "Placeholder"]


def reads_weight(op: tf.Operation, arguments: Iterable[tf.Tensor]) -> bool:
    """Whether `op` reads a variable, or is one of the arguments that stand for variables."""
    return op.type in ("ReadVariableOp", "ResourceGather") or any(op is t.op for t in arguments)


def has_own_gradient(tensor: tf.Tensor) -> bool:
    """Whether a Python function is part of the gradient of `tensor`, other than that of swish."""
    return any("_gradient_op_type" in op.node_def.attr and not keras_compat.is_swish(op) for op in ancestors([tensor]))


def depends_on(tensor: tf.Tensor, sources: Iterable[tf.Tensor]) -> bool:
    """Whether one of `sources` is among what `tensor` is computed from, or is `tensor` itself."""
    wanted = {id(t) for t in sources}
    return id(tensor) in wanted or any(id(t) in wanted for op in ancestors([tensor]) for t in op.outputs)


def scope_of(op: tf.Operation) -> str:
    """The name scope of the layer that made `op`; empty for what a training step does outside of its model."""
    parts = [p for p in op.name.split("/")[:-1] if not re.fullmatch(r"(while|cond|gradient_tape)(_\d+)?", p)]
    return "/".join(parts[:2])


def writes_state(op: tf.Operation) -> bool:
    """Whether `op` changes a variable, itself or in a function that it calls; what cannot be read is taken to."""
    return _does(op, _is_write)


def draws_inside(op: tf.Operation) -> bool:
    """Whether a function that `op` calls draws random numbers, so that running it twice gives two results."""
    return not is_random(op) and _does(op, _is_draw)


_WRITES = ("Assign", "ResourceScatter", "ResourceStridedSliceAssign", "ResourceApply", "ResourceSparseApply")


def _is_write(kind: str) -> bool:
    return kind.startswith(_WRITES)


def _is_draw(kind: str) -> bool:
    return "Random" in kind or kind in ("Multinomial", "StatelessMultinomial")


def _does(op: tf.Operation, wanted: Callable[[str], bool]) -> bool:
    return wanted(op.type) or any(_function_does(op.graph, name, wanted, set()) for name in _called(op.node_def))


def _called(node) -> list[str]:
    names = [value.func.name for value in node.attr.values() if value.HasField("func")]
    return names + [f.name for value in node.attr.values() for f in value.list.func]


def _function_does(graph: tf.Graph, name: str, wanted: Callable[[str], bool], seen: set[str]) -> bool:
    if name in seen:
        return False
    seen.add(name)
    definition = keras_compat.function_definition(graph, name)
    if definition is None:
        return True  # what cannot be read is taken for the worst
    nodes = definition.node_def
    return any(wanted(n.op) or any(_function_does(graph, f, wanted, seen) for f in _called(n)) for n in nodes)


def padding_weights(loss: tf.Tensor) -> tf.Tensor | None:
    """The step's sample weights, in which a sampler may have marked padding by minus zero; None where there are none."""
    inner = {id(t) for _, t in loss.graph.captures}
    parts = [t for t in getattr(loss.graph, "inputs", []) if id(t) not in inner and t.dtype != tf.resource]
    for op in ancestors([loss]):
        if op.type == "IteratorGetNext":
            parts = list(op.outputs)
    last = parts[-1] if len(parts) >= 3 else None
    return last if last is not None and last.dtype == tf.float32 and last.shape.rank == 1 else None


def is_random(op: tf.Operation) -> bool:
    """Whether `op` draws random numbers, so that running it twice gives two results."""
    return _is_draw(op.type)


def replay(
    targets: list[tf.Tensor],
    feed: list[tuple[tf.Tensor, tf.Tensor]],
    graph: tf.Graph,
    opened: Callable[[tf.Operation], Any] = lambda op: None,
) -> list[tf.Tensor]:
    """Copies the ops that lead to `targets` into `graph`, with the tensors of `feed` replaced.

    Args:
      targets: tensors of a traced graph.
      feed: pairs (tensor of that graph, its replacement in `graph`).
      graph: the graph under construction.
      opened: gives the body of an op that calls a function, to be copied in its place, or None.

    Returns:
      The counterpart of each target.
    """
    done = {id(old): new for old, new in feed}
    for op in ancestors(targets, stop=[old for old, _ in feed]):
        if all(id(t) in done for t in op.outputs):
            continue
        body = opened(op)
        if body is not None:
            inputs = zip(body.inputs, [done[id(t)] for t in op.inputs], strict=True)
            for old, new in zip(op.outputs, replay(body.outputs, list(inputs), graph), strict=True):
                done.setdefault(id(old), new)
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
