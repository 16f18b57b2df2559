"""From a variable to the ops where it meets data, and back: weights that are computed from variables before their use.

A variable's value may be cast, reshaped, scaled, added to a frozen kernel, multiplied by another variable (a low-rank
pair), or be normalised, before any example sees it. What it is then is still the same for all examples, and each
example's gradient is pulled back to the variable: by matrix products where the way is linear, and else by the
vector-Jacobian product of that way, for all examples at once.
"""

import dataclasses
import functools
from collections.abc import Callable

import tensorflow as tf

from tfprivacy_ft.clipping import calls
from tfprivacy_ft.clipping import graph as graphs
from tfprivacy_ft.clipping.layout import FREE, Layouts
from tfprivacy_ft.clipping.sites import Contribution, Meeting, widened

_SAME_ENTRIES = frozenset("Identity Cast Reshape Squeeze ExpandDims".split())
_CALLS = frozenset(
    """While StatelessWhile If StatelessIf Case StatelessCase PartitionedCall StatefulPartitionedCall PyFunc EagerPyFunc
    PyFuncStateless SymbolicGradient""".split()
)


@dataclasses.dataclass(frozen=True)
class Use:
    """One op where a variable, or what was computed from it, meets data.

    Args:
      meeting: the op and the weight there.
      values: what the variable's value is called in the trace, once for each time it is read.
      is_value: whether `meeting.weight` is the value itself, perhaps cast or reshaped.
    """

    meeting: Meeting
    values: list[tf.Tensor]
    is_value: bool


def find_uses(
    variable: tf.Variable | tf.Tensor, loss: tf.Tensor, upstream: set[tf.Operation], layouts: Layouts
) -> tuple[list[Use], tf.Operation | None]:
    """The ops where `variable` meets data on its way to the per-example terms.

    Args:
      variable: a trainable variable, or an argument of the traced function that stands for one.
      loss: the traced loss.
      upstream: the ops that the per-example terms are computed from.
      layouts: the layouts of the trace.

    Returns:
      The uses, and None; or what was found so far and the op that has no rule.
    """
    shape = tuple(variable.shape.as_list())
    if graphs.handle_of(variable) is variable:
        values, uses = [variable], list[Use]()
    else:
        values, uses, stranger = _reads(variable, loss.graph, upstream, layouts)
        if stranger is not None:
            return uses, stranger
    pending = [(value, True) for value in values]
    seen = {id(value) for value in values}
    while pending:
        weight, is_value = pending.pop()
        for op in _distinct(weight.consumers()):
            if op not in upstream or op.type in graphs.SHAPE_OPS:
                continue
            if any(layouts.of(t) is not FREE for t in op.outputs):
                if sum(t is weight for t in op.inputs) > 1 or (not is_value and not weight.shape.is_fully_defined()):
                    return uses, op
                index = next(i for i, t in enumerate(op.inputs) if t is weight)
                wanted = shape if is_value else tuple(weight.shape.as_list())
                uses.append(Use(Meeting(op, index, weight, wanted, layouts), values, is_value))
                continue
            if not _can_be_pulled_back(op):
                return uses, op
            for output in op.outputs:
                if id(output) not in seen:
                    seen.add(id(output))
                    pending.append((output, is_value and op.type in _SAME_ENTRIES and op.inputs[0] is weight))
    return uses, None


def _reads(
    variable: tf.Variable, graph: tf.Graph, upstream: set[tf.Operation], layouts: Layouts
) -> tuple[list[tf.Tensor], list[Use], tf.Operation | None]:
    """The variable's value, once for each time it is read; uses of its handle; and an op that has no rule, or None."""
    values: list[tf.Tensor] = []
    uses: list[Use] = []
    handle, shape = _handle_in(graph, variable), tuple(variable.shape.as_list())
    for op in _distinct([] if handle is None else handle.consumers()):
        if op not in upstream:
            continue
        if op.type == "ReadVariableOp":
            values.append(op.outputs[0])
        elif op.type == "ResourceGather":
            uses.append(Use(Meeting(op, 0, op.inputs[0], shape, layouts), [], True))
        elif op.type in calls.CALLS and sum(t is handle for t in op.inputs) == 1:
            index = next(i for i, t in enumerate(op.inputs) if t is handle)
            uses.append(Use(Meeting(op, index, handle, shape, layouts), [], True))
        else:
            return values, uses, op
    return values, uses, None


def _can_be_pulled_back(op: tf.Operation) -> bool:
    random = graphs.is_random(op)
    return not (op.type in _CALLS or random or graphs.writes_state(op) or "_gradient_op_type" in op.node_def.attr)


def pulled_back(contribution: Contribution, use: Use) -> Contribution:
    """What each example adds to the variable's gradient, given what it adds to the weight's."""
    if use.is_value:
        return contribution
    steps = _steps_back(use)
    if steps is not None:
        for step in steps:
            contribution = step(contribution)
        return contribution
    return PulledBack(contribution, use)


_Step = Callable[[Contribution], Contribution]


def _steps_back(use: Use) -> list[_Step] | None:
    """The way from the weight back to a value, if it is one line of sums, scalings, reshapes and products."""
    behind = _depending_on(use.values, use.meeting.weight)
    tensor, steps = use.meeting.weight, list[_Step]()
    while not any(tensor is value for value in use.values):
        op = tensor.op
        sources = [t for t in op.inputs if id(t) in behind]
        if len(sources) != 1:
            return None
        source = sources[0]
        others = [t for t in op.inputs if t is not source]
        if (op.type in ("AddV2", "Add", "AddN") and source.shape == tensor.shape) or op.type == "Identity":
            pass
        elif op.type == "Mul" and source.shape == tensor.shape and others[0].shape.rank == 0:
            steps.append(functools.partial(_scaled, factor=others[0]))
        elif op.type == "MatMul":
            steps += _through_product(op, source is op.inputs[0], others[0])
        elif op.type == "Transpose" and source.shape.rank == 2 and _is_swap(op.inputs[1]):
            steps.append(lambda c: c.transposed())
        elif op.type == "Reshape" and source is op.inputs[0] and source.shape.is_fully_defined():
            steps.append(functools.partial(_reshaped, shape=tuple(source.shape.as_list())))
        else:
            return None
        tensor = source
    return steps


def _scaled(contribution: Contribution, factor: tf.Tensor) -> Contribution:
    return contribution.scaled(factor)


def _reshaped(contribution: Contribution, shape: tuple[int, ...]) -> Contribution:
    return contribution.reshaped(shape)


def _through_product(op: tf.Operation, left: bool, other: tf.Tensor) -> list[_Step]:
    """U = V M has dV = dU M^T; U = M V has dV = M^T dU = (dU^T M)^T."""
    flip_source, flip_other = (
        op.get_attr(n) for n in (("transpose_a", "transpose_b") if left else ("transpose_b", "transpose_a"))
    )
    matrix = tf.transpose(other) if flip_other else other
    if left:
        steps: list[_Step] = [lambda c: c.times(tf.transpose(matrix))]
    else:
        steps = [lambda c: c.times_left(matrix)]
    return steps + ([lambda c: c.transposed()] if flip_source else [])


def _is_swap(permutation: tf.Tensor) -> bool:
    order = tf.get_static_value(permutation)
    return order is not None and list(order) == [1, 0]


class PulledBack(Contribution):
    """Gradients of a weight, pulled back to the variable that it is computed from, for all examples at once."""

    def __init__(self, inner: Contribution, use: Use):
        self._inner, self._use = inner, use

    def per_example(self) -> tf.Tensor:
        each = self._inner.per_example()
        return tf.vectorized_map(self._one, each, fallback_to_while_loop=True)

    def parts(self) -> list[tf.Tensor]:
        return self._inner.parts()

    def weighted_sum(self, parts: list[tf.Tensor], weights: tf.Tensor) -> tf.Tensor:
        return self._one(self._inner.weighted_sum(parts, weights))

    def _one(self, upstream: tf.Tensor) -> tf.Tensor:
        graph, weight, values = tf.compat.v1.get_default_graph(), self._use.meeting.weight, self._use.values
        behind = _depending_on(values, weight)
        value = tf.identity(_captured(graph, values[0]))
        feed = [(v, value) for v in values]
        for op in graphs.ancestors([weight], stop=values):
            if any(id(t) in behind for t in op.outputs):
                feed += [(t, _captured(graph, t)) for t in op.inputs if id(t) not in behind]
        (copy,) = graphs.replay([weight], feed, graph)
        (gradient,) = tf.gradients(copy, value, grad_ys=tf.cast(tf.reshape(upstream, weight.shape), weight.dtype))
        return widened(tf.convert_to_tensor(gradient))


def _captured(graph, tensor: tf.Tensor) -> tf.Tensor:
    return tensor if tensor.graph is graph else graph.capture(tensor)


def _depending_on(values: list[tf.Tensor], weight: tf.Tensor) -> set[int]:
    """The tensors between `values` and `weight`, both included."""
    found = {id(v) for v in values}
    for op in graphs.ancestors([weight], stop=values):
        if any(id(t) in found for t in op.inputs):
            found.update(id(t) for t in op.outputs)
    return found


def _distinct(ops: list[tf.Operation]) -> list[tf.Operation]:
    """Each op once: one that reads a tensor twice is listed twice among its consumers."""
    return list(dict.fromkeys(ops))


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
