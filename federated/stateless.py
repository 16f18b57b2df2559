"""A Keras model as a function of its weights, of which many clients can have different ones.

Promises: nothing is shared between calls, and no two draw the same dropout; a layer that would keep something of a batch
is refused by name. Keras 3 calls a model without its state; for Keras 2 it is built anew where it is called, with tensors
in place of variables.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tfprivacy_ft.errors import UnsupportedModelError

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["StatelessModel", "stateless_model"]

Weights = tuple[Any, ...]
Apply = Callable[[Weights, Weights, Any], tuple[Any, list[Any]]]
Prepare = Callable[["tf.keras.Model"], "tf.keras.Model"]


@dataclasses.dataclass(frozen=True)
class StatelessModel:
    """A Keras model as a function of its weights.

    Args:
        trainable: Initial values in the order of `model.trainable_weights`.
        non_trainable: Initial values in the order of `model.non_trainable_weights`.
        apply: Trainable weights, others and examples -> the output in training mode, and a list of regularisers.
    """

    trainable: tuple[np.ndarray, ...]
    non_trainable: tuple[np.ndarray, ...]
    apply: Apply

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

        output, penalties = self.apply(trainable, non_trainable, x)
        return output, tf.add_n([tf.cast(penalty, tf.float32) for penalty in penalties] or [tf.constant(0.0)])


def stateless_model(
    build: Callable[[], "tf.keras.Model"], prepare: Prepare = lambda model: model
) -> tuple[StatelessModel, "tf.keras.Model"]:
    """Reads a model builder.

    Args:
        build: Called without arguments; returns a new Keras model with weights, the same architecture at each call.
        prepare: Changes how layers of a model compute, and not what, as `side_by_side.prepare`.

    Returns:
        The model as a function of its weights, and one Keras model it was read from.

    Raises:
        UnsupportedModelError: It is not a builder of fresh Keras models, or a layer mixes the examples of a batch.
    """
    from tfprivacy_ft.keras_compat import IS_KERAS_3

    model, again = _build(build), _build(build)
    if {id(variable) for variable in model.variables} & {id(variable) for variable in again.variables}:
        raise UnsupportedModelError(
            "the model builder returned weights it had returned before: build new layers at each call, like "
            "`lambda: models.build_model('cnn', (28, 28, 1), 10)`."
        )
    _refuse_unsupported_layers(model)
    apply = _by_keras(prepare(again)) if IS_KERAS_3 else _by_building(build, prepare, _creation_order(build))
    return StatelessModel(_values(model.trainable_weights), _values(model.non_trainable_weights), apply), model


def _values(variables: list[Any]) -> tuple[np.ndarray, ...]:
    return tuple(variable.numpy() for variable in variables)


def _by_keras(model: Any) -> Apply:
    """For Keras 3, which calls models with weights of one's choice."""
    import tensorflow as tf

    places = {id(variable): i for i, variable in enumerate(model.non_trainable_weights)}
    strays = [v.path for v in model.non_trainable_variables if id(v) not in places and not _is_seed(v)]
    if strays:
        raise UnsupportedModelError(
            f"the model has variables that are no weights of it ({strays}): keep only layers whose variables are weights."
        )

    def apply(trainable, non_trainable, x):
        # A seed is drawn for each call: the model's own would give every client and step the same dropout.
        others = [
            non_trainable[places[id(v)]]
            if id(v) in places
            else tf.cast(tf.random.uniform(v.shape, maxval=2**31 - 1, dtype=tf.int32), v.dtype)
            for v in model.non_trainable_variables
        ]
        output, _, penalties = model.stateless_call(list(trainable), others, x, training=True, return_losses=True)
        return output, penalties

    return apply


def _is_seed(variable: Any) -> bool:
    return variable.path.endswith("seed_generator_state")


def _by_building(
    build: Callable[[], "tf.keras.Model"], prepare: Prepare, creation_order: list[tuple[bool, int]]
) -> Apply:
    """For Keras 2: a new model wherever it is called.

    Args:
        build, prepare: As in `stateless_model`.
        creation_order: For each variable as the builder makes it: (is it trainable, its place among those).
    """
    import tensorflow as tf

    def apply(trainable, non_trainable, x):
        # TensorFlow reads a variable wherever it is used, so a tensor does as well; a new one for each new model.
        weights = iter(
            [tf.identity((trainable if is_trainable else non_trainable)[i]) for is_trainable, i in creation_order]
        )
        with tf.variable_creator_scope(lambda _, **__: next(weights)):
            model = prepare(build())
        output = model(x, training=True)
        return output, model.losses

    return apply


def _creation_order(build: Callable[[], "tf.keras.Model"]) -> list[tuple[bool, int]]:
    import tensorflow as tf

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
    return [places[id(variable)] for variable in created]


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
    from tfprivacy_ft import batch_norm

    batch_norm.refuse_trainable(model)
    for layer in model._flatten_layers(include_self=False):
        if getattr(layer, "activity_regularizer", None) is not None:
            raise UnsupportedModelError(
                f"layer {layer.name!r} has an activity_regularizer, which mixes the examples of a batch: put the "
                "term in the loss."
            )
    if not model.trainable_weights:
        raise UnsupportedModelError("the model has no trainable weights: set `trainable=True` on a layer.")
