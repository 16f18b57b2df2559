"""Per-example clipping for models that are functions of their weights, as in federated and functional programs.

Promise: the same as `engine`'s, for tensors in place of variables. The loss is traced in a function of its own, whose
arguments are told apart: weights, constants and the batch; what else it reads is refused, since nobody knows whose it is.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf

from tfprivacy_ft.clipping.engine import ClippedSum, clipped_sum
from tfprivacy_ft.clipping.rules import ClippingRule
from tfprivacy_ft.errors import InvalidArgumentError


@tf.autograph.experimental.do_not_convert  # what is traced here is written with ops throughout
def clipped_sum_of_function(
    loss: Callable[..., tf.Tensor],
    weights: Sequence[tf.Tensor],
    batch: Sequence[tf.Tensor],
    l2_norm_clip: tf.Tensor | float,
    rule: ClippingRule | None = None,
    *,
    constants: Sequence[tf.Tensor] = (),
    real: tf.Tensor | None = None,
    rows_per_example: int = 1,
    loss_scale: float | None = None,
    one_by_one_only: bool = False,
) -> ClippedSum:
    """Sum over examples of the gradient of each example's loss by the weights, clipped to norm `l2_norm_clip`.

    Works in a graph of any kind, inside the body of a `tf.while_loop` too. Each call traces `loss`; so call it inside a
    `tf.function` (or another graph), not once for every batch.

    Args:
      loss: called as loss(weights, constants, *batch) with lists of tensors like those given; returns the scalar loss of
        the batch, of which each example's is what the same function gives the example alone.
      weights: what to differentiate for: float tensors of known shapes. Each counts as a layer for rules like `PerLayer`.
      batch: tensors [B * rows_per_example, ...], B >= 1.
      l2_norm_clip: scalar, > 0; the bound on the norm over all weights together.
      rule: how gradients are shortened to that; None for `Flat()`.
      constants: tensors that the loss reads, are the same for all examples, and are not trained.
      real: bool [B], False for examples that only fill the batch: they add nothing. None for no such examples.
      rows_per_example, loss_scale, one_by_one_only: as in `clipped_sum`.

    Returns:
      A `ClippedSum`, with a sum for each of `weights`.

    Raises:
      InvalidArgumentError: a weight's shape is not known.
      UnsupportedModelError: examples see each other, or `loss` reads a tensor that it is not given.

    Example:
      >>> def squared(weights, constants, x, y):
      ...     return tf.reduce_mean(tf.square(tf.linalg.matvec(x, weights[0]) - y))
      >>> batch = tf.constant([[3.0, 4.0], [0.1, 0.0]]), tf.constant([-1.0, -1.0])
      >>> print(clipped_sum_of_function(squared, [tf.zeros([2])], batch, l2_norm_clip=1.0).sums[0].numpy().round(3))
      [0.8 0.8]

    Source: as for `clipped_sum`.
    """
    weights, constants, batch = ([tf.convert_to_tensor(t) for t in part] for part in (weights, constants, batch))
    for weight in weights:
        if not weight.shape.is_fully_defined():
            raise InvalidArgumentError(
                f"a weight has shape {weight.shape}, of which a part is not known: set it by tf.ensure_shape first."
            )
    specs = [tf.TensorSpec(t.shape, t.dtype) for t in (*weights, *constants)]
    specs += [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in batch]
    rules = []  # no tensors, so they leave the function another way

    @tf.function(autograph=False, input_signature=specs)
    def traced(*tensors):
        arguments = list(tensors)
        given, arguments = arguments[: len(weights)], arguments[len(weights) :]
        others, rows = arguments[: len(constants)], arguments[len(constants) :]
        every = tf.fill([tf.shape(rows[0])[0] // rows_per_example], True)
        found = clipped_sum(
            loss(given, others, *rows),
            given,
            l2_norm_clip,
            rule,
            rows_per_example=rows_per_example,
            loss_scale=loss_scale,
            one_by_one_only=one_by_one_only,
            constants=others,
            real=every if real is None else real,
        )
        rules.append(found.rules)
        return found.sums, found.data_independent, found.norms, found.real, found.batch_size

    sums, independent, norms, is_real, batch_size = traced(*weights, *constants, *batch)
    return ClippedSum(sums, independent, norms, is_real, batch_size, rules[-1])
