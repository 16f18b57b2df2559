"""Local training on clients, many of them in one computation.

Promises: each client gets exactly the update that TFF's own federated averaging gives it (to rounding), whatever the
sizes of the other clients. Padding rows weigh nothing, padding batches change nothing. Knows nothing of noise, cohorts
or accounting.

TFF spends its time starting small operations, once per client and step. Here the clients of a group train side by
side, each variable with a leading client axis.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from federated import side_by_side
from federated.stateless import StatelessModel
from tfprivacy_ft.errors import InvalidArgumentError

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["per_example_loss", "train_side_by_side"]

Weights = tuple[Any, ...]


def per_example_loss(loss: Any) -> Callable[["tf.Tensor", "tf.Tensor"], "tf.Tensor"]:
    """Any Keras loss as a function (labels, outputs) -> (b,), its mean over the other axes for each example.

    Steps that a Keras mask leaves out count as zero in that mean.

    Args:
        loss: A name, a function (labels, outputs), or a `tf.keras.losses.Loss` of any reduction.

    Raises:
        InvalidArgumentError: Keras knows no such loss.
    """
    import tensorflow as tf

    try:
        found = tf.keras.losses.get(loss)
    except (ValueError, TypeError):
        found = None
    if found is None:
        raise InvalidArgumentError(
            f"loss={loss!r} is not a Keras loss: give a name like 'sparse_categorical_crossentropy', a function "
            "(labels, outputs), or a tf.keras.losses.Loss."
        )
    if isinstance(found, tf.keras.losses.Loss):
        unreduced = copy.copy(found)
        unreduced.reduction = "none"
    else:
        unreduced = _wrap(found)

    def each(labels, outputs):
        if outputs.shape.rank == labels.shape.rank + 1 and outputs.shape[-1] == 1:
            labels = labels[..., tf.newaxis]  # one label, one output: not a mean over every pair of them
        values = tf.cast(unreduced(labels, outputs), tf.float32)
        if values.shape.rank == 0:
            raise InvalidArgumentError(
                "the loss returns one number for a whole batch, of which nobody can tell what fills it up: return one for each "
                "example."
            )
        return values if values.shape.rank == 1 else tf.reduce_mean(values, axis=list(range(1, values.shape.rank)))

    return each


def train_side_by_side(
    model: StatelessModel,
    loss: Callable[["tf.Tensor", "tf.Tensor"], "tf.Tensor"],
    learning_rate: "tf.Tensor | float",
    trainable: Weights,
    non_trainable: Weights,
    x: "tf.Tensor",
    y: "tf.Tensor",
    rows: "tf.Tensor",
    proximal_strength: float = 0.0,
) -> tuple["tf.Tensor", ...]:
    """Trains k clients from the same weights by SGD, each on its own batches.

    Args:
        model: The model.
        loss: From `per_example_loss`.
        learning_rate: Of the clients, > 0.
        trainable, non_trainable: The server's weights.
        x, y: Examples and labels (n, ...).
        rows: int32 (k, steps, b): which examples each client takes in each step. A negative number -r - 1 is padding
            and stands for a row r of the same client. A client with nothing but padding in a step skips it.
        proximal_strength: mu >= 0: each client's loss also has mu/2 times the squared distance from the server's weights.

    Returns:
        One tensor (k, ...) per trainable variable: the server's weights minus the client's.
    """
    import tensorflow as tf

    def step(args):
        weights, x_rows, y_rows, row_weights = args
        with tf.GradientTape() as tape:
            tape.watch(weights)
            outputs, penalty = model(weights, non_trainable, x_rows)
            examples = tf.reduce_sum(row_weights)
            mean = tf.reduce_sum(loss(y_rows, outputs) * row_weights) / tf.maximum(examples, 1.0)
            objective = mean + penalty
        gradients = tape.gradient(objective, weights, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return tuple(
            tf.where(examples > 0, w - tf.cast(learning_rate, w.dtype) * pulled(tf.convert_to_tensor(g), w, server), w)
            for w, g, server in zip(weights, gradients, trainable, strict=True)
        )

    def pulled(gradient, weight, server):
        return (
            gradient + tf.cast(proximal_strength, weight.dtype) * (weight - server) if proximal_strength else gradient
        )

    def body(i, weights):
        now = rows[:, i]
        real = now >= 0
        now = tf.where(real, now, -now - 1)
        stepped = side_by_side.map_clients(
            step, (weights, tf.gather(x, now), tf.gather(y, now), tf.cast(real, tf.float32))
        )
        return i + 1, tuple(tf.ensure_shape(w, shape) for w, shape in zip(stepped, shapes, strict=True))

    steps = tf.reduce_sum(tf.cast(tf.reduce_any(rows >= 0, axis=[0, 2]), tf.int32))
    start = tuple(tf.tile(w[tf.newaxis], [tf.shape(rows)[0]] + [1] * w.shape.rank) for w in trainable)
    shapes = tuple(tf.TensorShape([None]).concatenate(w.shape) for w in trainable)
    _, trained = tf.while_loop(
        lambda i, _: i < steps, body, (tf.constant(0), start), shape_invariants=(tf.TensorShape([]), shapes)
    )
    return tuple(w[tf.newaxis] - after for w, after in zip(trainable, trained, strict=True))


def _wrap(function: Callable[..., Any]) -> "tf.keras.losses.Loss":
    import tensorflow as tf

    class Wrapped(tf.keras.losses.Loss):
        def call(self, y_true, y_pred):
            return function(y_true, y_pred)

    return Wrapped(reduction="none")
