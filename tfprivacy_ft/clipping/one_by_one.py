"""The slow path: exact per-example gradients of any traced loss, one example after the other.

The ops from the batch to the loss are replayed inside a loop, with one example for the batch, and differentiated
there. What the forward pass drew at random (dropout masks) is fed like data, so that both see the same masks. What an
example contributes is by construction a function of that example alone.
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from tfprivacy_ft.clipping import graph as graphs
from tfprivacy_ft.clipping import probe
from tfprivacy_ft.clipping.layout import FREE, SIZE, Layouts
from tfprivacy_ft.clipping.sites import precision, split_rows, widened
from tfprivacy_ft.clipping.terms import Share
from tfprivacy_ft.errors import UnsupportedModelError

Weigh = Callable[[list[tf.Tensor]], list[tf.Tensor]]  # squared norms at each variable -> weight of each


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is differentiated for one example: its shares of the terms, or else the whole loss.

    Args:
      loss: the traced scalar loss.
      shares: what the loss is a sum of; None where that could not be told.
      data_independent: terms of the loss that belong to no example.
    """

    loss: tf.Tensor
    shares: list[Share] | None
    data_independent: list[tf.Tensor]

    def of_one(self, feed: list[tuple[tf.Tensor, tf.Tensor]], copies: int, graph) -> tf.Tensor:
        """The loss of one example alone, replayed in `graph` with `copies` copies of it for the batch."""
        if self.shares is None:
            zeros = [(t, tf.zeros(t.shape, t.dtype)) for t in self.data_independent]
            return graphs.replay([self.loss], feed + zeros, graph)[0]
        terms = graphs.replay([share.term for share in self.shares], feed, graph)
        inner = [Share(share.term, graph.capture(share.row)) for share in self.shares]
        parts = [tf.reduce_sum(t * share.spread(copies)) for t, share in zip(terms, inner, strict=True)]
        return tf.add_n(parts) / tf.cast(copies, parts[0].dtype)


def clipped_sum(
    objective: Objective,
    variables: list[tf.Variable | tf.Tensor],
    weigh: Weigh,
    data: list[tf.Tensor],
    layouts: Layouts,
    coupled: str,
    batch_size: tf.Tensor,
    real: tf.Tensor,
    loss_scale: float = 1.0,
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Sum over examples of clipped gradients of the loss that Keras gives each example alone.

    Args:
      objective: what to differentiate.
      variables: what to differentiate for.
      weigh: gives an example's weights from its squared norms.
      data: the tensors that hold the batch.
      layouts: the layouts of the trace.
      coupled: the sentence to fail with when run, where the examples of a batch turn out to see each other.
      batch_size: int32 scalar, examples in the batch.
      real: bool [B], False for what only fills the batch.
      loss_scale: what the loss is multiplied by while it is differentiated.

    Returns:
      Sums of the variables' shapes, float32 or float64, and the norms before the clip, [B].
    """
    draws = _random_draws(objective.loss, data, layouts)
    by_row = list(data) + [t for t in draws if layouts.has_rows(t)]
    shared = [t for t in draws if not layouts.has_rows(t)]  # one draw for all examples
    outside = graphs.outside(objective.loss, data)
    rows = tuple(split_rows(t, batch_size) for t in by_row)
    # Where the trace has the batch's size written into it, a batch is made of copies of the example.
    copies = layouts.batch if layouts.batch_is_static else 1
    allowed = [*rows, *shared, real, batch_size, *(share.row for share in objective.shares or [])]

    dtype = precision(variables)

    def body(index, total, norms, losses):
        example = [(t, tf.gather(r, index)) for t, r in zip(by_row, rows, strict=True)]
        grads, alone = _gradient_of_one(objective, variables, example, shared, outside, copies, loss_scale)
        check_isolated(tf.compat.v1.get_default_graph(), data, allowed)
        squares = [tf.cast(tf.reduce_sum(tf.square(g)), dtype) for g in grads]
        norm = tf.sqrt(tf.add_n(squares))
        good = tf.math.is_finite(norm) & tf.gather(real, index)
        total = [
            t + tf.where(good, tf.cast(w, g.dtype) * g, 0.0)
            for t, w, g in zip(total, weigh(squares), grads, strict=True)
        ]
        return index + 1, total, norms.write(index, norm), losses.write(index, tf.cast(alone, tf.float32))

    zeros = [tf.zeros(v.shape, precision([v])) for v in variables]
    numbers = [tf.TensorArray(kind, batch_size, element_shape=[]) for kind in (dtype, tf.float32)]
    _, total, norms, losses = tf.while_loop(
        lambda index, *_: index < batch_size,
        body,
        (0, zeros, *numbers),
        maximum_iterations=batch_size,
        parallel_iterations=1,
    )
    if objective.shares is None or not probe.can_look(objective.loss, objective.shares, layouts):
        return total, norms.stack()
    together = probe.losses_in_batch(objective.shares, batch_size)
    with tf.control_dependencies([probe.refusal(losses.stack(), together, real, objective.loss, coupled)]):
        return [tf.identity(t) for t in total], norms.stack()


def _gradient_of_one(
    objective, variables, example, shared, outside, copies: int, loss_scale: float
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Gradients of the loss of one example, float32 or float64, and that loss, inside the loop body that is being built."""
    body, loss = tf.compat.v1.get_default_graph(), objective.loss
    feed = [(t, tf.tile(row, [copies] + [1] * (row.shape.rank - 1))) for t, row in example]
    feed += [(t, body.capture(t)) for t in shared]
    feed += [(t, body.capture(t)) for t in outside]
    alone = objective.of_one(feed, copies, body)
    handles = [body.capture(loss.graph.capture(graphs.handle_of(v))) for v in variables]
    gradients = tf.gradients(alone, handles, grad_ys=tf.constant(loss_scale, alone.dtype))
    return [
        tf.zeros(v.shape, precision([v]))
        if g is None
        else tf.ensure_shape(widened(tf.convert_to_tensor(g)) / loss_scale, v.shape)
        for g, v in zip(gradients, variables, strict=True)
    ], alone


def real_examples(loss: tf.Tensor, batch_size: tf.Tensor) -> tf.Tensor:
    """[B] bool: False for what a sampler made to fill a batch, whose rows it marks by a weight of minus zero."""
    weights = graphs.padding_weights(loss)
    if weights is None:
        return tf.fill([batch_size], True)
    return tf.reduce_any(split_rows(tf.bitcast(weights, tf.int32) != tf.int32.min, batch_size), 1)


def check_isolated(body, data: list[tf.Tensor], allowed: list[tf.Tensor]) -> None:
    """A custom gradient is a Python function that may hold tensors of the whole batch; then it is no example's own."""
    fine = {id(t) for t in allowed}
    for outer, _ in body.captures:
        if id(outer) not in fine and graphs.depends_on(outer, data):
            raise UnsupportedModelError(
                f"layer {graphs.layer_of(outer.op)!r} has a custom gradient that reads the whole batch, so one example's "
                "gradient cannot be told apart: write it with ops that TensorFlow differentiates itself."
            )


def _random_draws(loss: tf.Tensor, data: list[tf.Tensor], layouts: Layouts) -> list[tf.Tensor]:
    """What the forward pass drew at random; refuses draws that are made of the batch, such as a shuffle of it."""
    found = []
    for op in graphs.ancestors([loss], stop=data):
        if not graphs.is_random(op):
            continue
        sizes = (FREE,) if op.type == "RandomShuffle" else (FREE, SIZE)
        if any(layouts.of(t) not in sizes for t in op.inputs):
            raise UnsupportedModelError(
                f"layer {graphs.layer_of(op)!r} ({op.type}) draws at random from the whole batch, which lets one example see "
                "the others: draw for each example from its own values, or shuffle before batches are made."
            )
        found.extend(op.outputs)
    return found
