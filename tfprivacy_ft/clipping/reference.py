"""The definition, as a loop: what the engine must equal. Slow, eager, and trusted; used by tests and self-checks."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf


def per_example_gradients(
    model: Any,
    loss: Callable[..., tf.Tensor],
    x: Any,
    y: Any,
    sample_weight: np.ndarray | None = None,
) -> list[list[np.ndarray]]:
    """Each example's gradients, from a batch that holds that example alone.

    Args:
      model: a Keras model; called with `training=True`, so it should draw nothing at random.
      loss: a Keras loss object, reducing to a scalar.
      x: inputs, examples first: an array or a structure of arrays.
      y: labels, examples first, likewise.
      sample_weight: [n] weights, or None.

    Returns:
      For each example a list of float64 arrays, one for each trainable variable.
    """
    result = []
    for i in range(len(tf.nest.flatten(x)[0])):
        weight = {} if sample_weight is None else {"sample_weight": sample_weight[i : i + 1]}
        with tf.GradientTape() as tape:
            value = loss(row(y, i), model(row(x, i), training=True), **weight)
        gradients = tape.gradient(value, model.trainable_variables)
        result.append(
            [
                np.zeros(v.shape) if g is None else tf.convert_to_tensor(g).numpy().astype(np.float64)
                for g, v in zip(gradients, model.trainable_variables, strict=True)
            ]
        )
    return result


def row(part: Any, index: int) -> Any:
    """The batch that holds one example alone."""
    return tf.nest.map_structure(lambda a: a[index : index + 1], part)


def norm(gradients: Sequence[np.ndarray]) -> float:
    """The l2 norm over all variables together.

    Example:
      >>> norm([np.array([3.0]), np.array([4.0])])
      5.0
    """
    return float(np.sqrt(sum(np.square(g).sum() for g in gradients)))


def clipped_sum(each: Sequence[Sequence[np.ndarray]], l2_norm_clip: float) -> list[np.ndarray]:
    """Sum over examples of gradients scaled down to norm `l2_norm_clip`.

    Example:
      >>> clipped_sum([[np.array([3.0, 4.0])], [np.array([6.0, 8.0])]], 1.0)
      [array([1.2, 1.6])]
    """
    scales = [min(1.0, l2_norm_clip / max(norm(g), 1e-30)) for g in each]
    return [
        sum((scale * g[k] for scale, g in zip(scales, each, strict=True)), np.zeros_like(each[0][k]))
        for k in range(len(each[0]))
    ]
