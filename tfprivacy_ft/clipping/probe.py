"""Whether examples see each other, found by looking: the loss of an example in the batch against its loss alone.

Where every op has a rule the proof in `layout` holds for every batch, and nothing is looked at. On the slow path each
example is replayed alone, so that the clip holds whatever the model does; but a model in which examples see each other
would then be trained on another loss than its author wrote, without a word. This compares the two losses of every example
of every batch, which costs next to nothing there.
"""

import tensorflow as tf

from tfprivacy_ft.clipping import graph as graphs
from tfprivacy_ft.clipping.layout import COUPLED, Layouts
from tfprivacy_ft.clipping.sites import split_rows
from tfprivacy_ft.clipping.terms import Share

_RELATIVE, _RELATIVE_HALF = 1e-2, 1e-1  # what rounding may do in float32, and where something is computed in 16 bits
_OF_LARGEST = 1e-3


def can_look(loss: tf.Tensor, shares: list[Share], layouts: Layouts) -> bool:
    """Whether the two losses can be compared.

    Not where a term is one number for the whole batch, where running an op twice gives two results, or where a sum over
    the batch is known of: a mask's normaliser is one that is meant to differ; all others have been refused by rule.
    """
    if not all(share.term.shape.rank for share in shares):
        return False
    behind = graphs.ancestors([share.term for share in shares])
    summed = any(layouts.of(t) is COUPLED for op in behind for t in op.outputs)
    return not summed and not any(graphs.draws_inside(op) for op in graphs.ancestors([loss]))


def losses_in_batch(shares: list[Share], batch_size: tf.Tensor) -> tf.Tensor:
    """What each example adds to the loss of the batch, weighed as in its loss alone: [B]."""
    parts = []
    for share in shares:
        rows = split_rows(share.term, batch_size) * share.row
        parts.append(tf.reduce_sum(tf.reshape(tf.cast(rows, tf.float32), tf.stack([batch_size, -1])), 1))
    return tf.add_n(parts)


def refusal(alone: tf.Tensor, together: tf.Tensor, real: tf.Tensor, loss: tf.Tensor, sentence: str) -> tf.Operation:
    """Adds an op that fails with `sentence` when run, if the two losses of an example differ.

    Args:
      alone: [B], each example's loss from a batch that holds it alone.
      together: [B], the same from the batch.
      real: [B] bool, False for rows that only fill the batch.
      loss: the traced loss.
      sentence: says which layer it is, and what to do.
    """
    half = any(t.dtype in (tf.bfloat16, tf.float16) for op in graphs.ancestors([loss]) for t in op.outputs)
    seen = real & tf.math.is_finite(alone) & tf.math.is_finite(together)
    size = tf.where(seen, tf.maximum(tf.abs(alone), tf.abs(together)), 0.0)
    allowed = (_RELATIVE_HALF if half else _RELATIVE) * size + _OF_LARGEST * tf.reduce_max(size)
    alike = tf.reduce_all(~seen | (tf.abs(alone - together) <= allowed))
    return tf.debugging.Assert(alike, [sentence])
