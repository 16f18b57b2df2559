"""Local training on clients, many of them in one computation.

Promises: each client gets exactly the update that TFF's own federated averaging gives it (to rounding), whatever the
sizes of the other clients. Padding rows weigh nothing, padding batches change nothing. Knows nothing of noise, cohorts
or accounting.

TFF spends its time starting small operations, once per client and step. Here the clients of a group train side by
side, each variable with a leading client axis.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from federated import aggregation, side_by_side
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["StatelessModel", "per_example_loss", "stateless_model", "train_side_by_side"]

Weights = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class StatelessModel:
    """A Keras model as a function of its weights.

    Args:
        build: Makes a fresh Keras model.
        trainable: Initial values in the order of `model.trainable_weights`.
        non_trainable: Initial values in the order of `model.non_trainable_weights`.
        creation_order: For each variable as the builder makes it: (is it trainable, its place among those).
    """

    build: Callable[[], "tf.keras.Model"]
    trainable: tuple[np.ndarray, ...]
    non_trainable: tuple[np.ndarray, ...]
    creation_order: tuple[tuple[bool, int], ...]

    @property
    def num_parameters(self) -> int:
        """Trainable numbers in the model."""
        return sum(value.size for value in self.trainable)

    def __call__(self, trainable: Weights, non_trainable: Weights, x: "tf.Tensor") -> tuple["tf.Tensor", "tf.Tensor"]:
        """Runs the model in training mode, in a graph only.

        Returns:
            Its output and the sum of its weight regularisers.
        """
        import tensorflow as tf

        # TensorFlow reads a variable wherever it is used, so a tensor does as well; a new one for each new model.
        weights = iter(
            [tf.identity((trainable if is_trainable else non_trainable)[i]) for is_trainable, i in self.creation_order]
        )
        with tf.variable_creator_scope(lambda _, **__: next(weights)):
            model = side_by_side.prepare(self.build())
        output = model(x, training=True)
        return output, tf.add_n([tf.cast(loss, tf.float32) for loss in model.losses] or [tf.constant(0.0)])


def stateless_model(build: Callable[[], "tf.keras.Model"]) -> tuple[StatelessModel, "tf.keras.Model"]:
    """Reads a model builder.

    Args:
        build: Called without arguments; returns a new Keras model with weights, the same architecture at each call.

    Returns:
        The model as a function of its weights, and one Keras model it was read from.

    Raises:
        UnsupportedModelError: It is not a builder of fresh Keras models, or a layer mixes the examples of a batch.
    """
    import tensorflow as tf

    model, again = _build(build), _build(build)
    if {id(variable) for variable in model.variables} & {id(variable) for variable in again.variables}:
        raise UnsupportedModelError(
            "the model builder returned weights it had returned before: build new layers at each call, like "
            "`lambda: models.build_model('cnn', (28, 28, 1), 10)`."
        )
    _refuse_unsupported_layers(model)
    created: list[Any] = []

    def record(next_creator, **kwargs):
        created.append(next_creator(**kwargs))
        return created[-1]

    try:
        with tf.Graph().as_default(), tf.variable_creator_scope(record):
            copy_in_graph = _build(build)
    except Exception as error:
        raise UnsupportedModelError(
            f"the model builder fails inside a TensorFlow graph ({error}): let it only make layers, and give weights that "
            "exist already to `process.start_from(model)`."
        ) from error
    places: dict[int, tuple[bool, int]] = {}
    for is_trainable, variables in (
        (True, copy_in_graph.trainable_weights),
        (False, copy_in_graph.non_trainable_weights),
    ):
        places.update({id(variable): (is_trainable, i) for i, variable in enumerate(variables)})
    strays = [variable.name for variable in created if id(variable) not in places]
    if strays or len(created) != len(places):
        raise UnsupportedModelError(
            f"the model builder makes variables that are no weights of its model ({strays or 'of unknown names'}): "
            "keep only layers whose variables are weights."
        )
    return (
        StatelessModel(
            build=build,
            trainable=tuple(variable.numpy() for variable in model.trainable_weights),
            non_trainable=tuple(variable.numpy() for variable in model.non_trainable_weights),
            creation_order=tuple(places[id(variable)] for variable in created),
        ),
        model,
    )


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
        return values if values.shape.rank == 1 else tf.reduce_mean(values, axis=list(range(1, values.shape.rank)))

    return each


def train_side_by_side(
    model: StatelessModel,
    loss: Callable[["tf.Tensor", "tf.Tensor"], "tf.Tensor"],
    learning_rate: float,
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


def build_client_work(
    model: StatelessModel,
    loss: Any,
    *,
    learning_rate: float,
    l2_norm_clip: float,
    example_spec: tuple["tf.TensorSpec", "tf.TensorSpec"],
    proximal_strength: float = 0.0,
) -> tuple[Any, Any]:
    """Builds the TFF client work: groups of clients in, their clipped sum out.

    Args:
        model: The model.
        loss: A Keras loss.
        learning_rate: Of the clients, > 0.
        l2_norm_clip: Largest norm of one client's update, > 0.
        example_spec: Shape and type of one example and of one label, without the batch axis.
        proximal_strength: As in `train_side_by_side`.

    Returns:
        A `tff.learning.templates.ClientWorkProcess`, and the TFF type of the model's weights. Its data are sequences
        of one element (x, y, rows) as in `train_side_by_side`, with rows (groups, k, steps, b): one group trains after
        the other. It reports no metrics: in clear they are releases without noise.
    """
    from federated import runtime

    tff = runtime.require_tff()
    import tensorflow as tf

    each_loss = per_example_loss(loss)
    weights_type = tff.to_type(
        tff.learning.models.ModelWeights(
            *(
                # Lists, as in TFF's own algorithms.
                [tff.TensorType(value.dtype, value.shape) for value in values]
                for values in (model.trainable, model.non_trainable)
            )
        )
    )
    x_spec, y_spec = example_spec
    element = (
        tff.TensorType(x_spec.dtype.as_numpy_dtype, [None, *x_spec.shape]),
        tff.TensorType(y_spec.dtype.as_numpy_dtype, [None, *y_spec.shape]),
        tff.TensorType(np.int32, [None, None, None, None]),
    )
    data_type = tff.SequenceType(tff.StructWithPythonType(element, tuple))

    @tff.tensorflow.computation(weights_type, data_type)
    def shard_update(weights, data):
        @tf.function(autograph=False)
        def train(trainable, non_trainable, x, y, rows):
            def add_group(i, total):
                updates = train_side_by_side(
                    model, each_loss, learning_rate, trainable, non_trainable, x, y, rows[i], proximal_strength
                )
                clipped = aggregation.clipped_sum(updates, l2_norm_clip)
                return i + 1, tuple(a + b for a, b in zip(total, clipped, strict=True))

            zero = tuple(tf.zeros_like(w) for w in trainable)
            return tf.while_loop(lambda i, _: i < tf.shape(rows)[0], add_group, (tf.constant(0), zero))[1]

        # One element: iterating over a data set makes TensorFlow set the function up anew in every round.
        total = train(tuple(weights.trainable), tuple(weights.non_trainable), *data.get_single_element())
        return tff.learning.templates.ClientResult(update=list(total), update_weight=tf.constant(1.0))

    @tff.federated_computation()
    def initialize():
        return tff.federated_value((), tff.SERVER)

    @tff.federated_computation(
        initialize.type_signature.result,
        tff.FederatedType(weights_type, tff.CLIENTS),
        tff.FederatedType(data_type, tff.CLIENTS),
    )
    def next_round(state, weights, data):
        result = tff.federated_map(shard_update, (weights, data))
        return tff.templates.MeasuredProcessOutput(state, result, tff.federated_value((), tff.SERVER))

    return tff.learning.templates.ClientWorkProcess(initialize, next_round), weights_type


def _build(build: Any) -> "tf.keras.Model":
    import tensorflow as tf

    if isinstance(build, tf.keras.Model) or not callable(build):
        raise UnsupportedModelError(
            f"{type(build).__name__} is not a model builder: give a function without arguments that returns a new "
            "Keras model, like `lambda: models.build_model('cnn', (28, 28, 1), 10)`."
        )
    model = build()
    if not isinstance(model, tf.keras.Model):
        raise UnsupportedModelError(f"the model builder returned {type(model).__name__}: return a tf.keras.Model.")
    if not model.built:
        raise UnsupportedModelError("the model builder returned a model without weights: give it an input shape.")
    return model


def _refuse_unsupported_layers(model: "tf.keras.Model") -> None:
    import tensorflow as tf

    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            raise UnsupportedModelError(
                f"layer {layer.name!r} is a BatchNormalization, whose statistics leave the client without noise: use "
                "GroupNormalization."
            )
        if getattr(layer, "activity_regularizer", None) is not None:
            raise UnsupportedModelError(
                f"layer {layer.name!r} has an activity_regularizer, which mixes the examples of a batch: put the "
                "term in the loss."
            )
    if not model.trainable_weights:
        raise UnsupportedModelError("the model has no trainable weights: set `trainable=True` on a layer.")


def _wrap(function: Callable[..., Any]) -> "tf.keras.losses.Loss":
    import tensorflow as tf

    class Wrapped(tf.keras.losses.Loss):
        def call(self, y_true, y_pred):
            return function(y_true, y_pred)

    return Wrapped(reduction="none")
