"""A model taken apart into a backbone and a head, and put together again with a new head.

Promises: the model that is given is never changed, since what is trained is a copy of it; whatever is trained, the
result is one plain Keras model from inputs to probabilities, of Keras's own layers and those of the model given. Knows
nothing of privacy.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.keras_compat import IS_KERAS_3, copy_of_layer, is_saved_model, keras, layers_inside

_ENDS = {"softmax", "sigmoid"}

# Features of an image that a head takes place by place: 64 KiB a row.
_MOST_FEATURES = 1 << 14


class Classifier:
    """A model whose last `head_layers` layers are its head.

    Args:
      model: a functional or sequential Keras model that ends in probabilities, [batch, outputs], or in what a loss of
        the user's own expects. No other model has used its layers.
      head_layers: how many of its layers are the head, >= 1; they are a chain.

    Attributes:
      model: the whole.
      features: the model from the inputs to what the head reads; shares its layers with `model`.
      head: the model from there to the output; shares its layers with `model`.
    """

    def __init__(self, model: Any, head_layers: int):
        self.model, self.head_layers = model, head_layers
        layers = model.layers[-head_layers:]
        between = layers[0].input
        # A name of its own, by which features that were kept are found again.
        self.features = keras.Model(model.input, between, name="features")
        output = inputs = keras.Input(between.shape[1:], dtype=between.dtype)
        for layer in layers:  # from here on a layer has two outputs, so whoever asks for its one has to come before
            output = layer(output)
        self.head = keras.Model(inputs, output)

    @property
    def outputs(self) -> int | None:
        """Values that the model gives for an example; None where they are not one axis."""
        shape = self.model.output_shape
        return shape[-1] if isinstance(shape, tuple) and len(shape) == 2 else None


def copy_of(model: Any) -> Any:
    """A functional copy that shares no weight with `model`, and has its name, its values and its frozen layers.

    Raises:
      UnsupportedModelError: it is no functional or sequential model with known shapes, or Keras cannot copy a layer.

    Example:
      >>> from tfprivacy_ft import models
      >>> len(copy_of(models.build_model("logistic", (4,), 3)).get_weights())
      2
    """
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no inputs of known shape: give a functional or sequential Keras model, built for its "
            "input shape."
        )
    try:
        # Left to itself, Keras copies models inside the model, too, but no SavedModel.
        options = {"clone_function": copy_of_layer} if any(map(is_saved_model, model.layers)) else {}
        copy = keras.models.clone_model(model, **options)
        _enable_adapters(model, copy)
        copy.set_weights(model.get_weights())
        set_trainable_flags(copy, trainable_flags(model))
    except Exception as error:  # a layer's own constructor can raise anything
        raise UnsupportedModelError(
            f"the model {model.name!r} cannot be copied ({error}): give each layer of your own a get_config with which Keras "
            "can make it again."
        ) from error
    # On Keras 3 a sequential model has no one input and output.
    is_sequential = isinstance(copy, keras.Sequential)
    return keras.Model(copy.inputs[0], copy.outputs[0], name=copy.name) if is_sequential else copy


def with_new_head(
    backbone: Any, num_classes: int, hidden_units: Sequence[int] = (), norm_groups: int | None = None
) -> Classifier:
    """A copy of a backbone, its features scaled to unit length, and a new head.

    Feature maps become one row for each example, place by place, or averaged over the places where these are of unknown number
    or make a long row; sequences are averaged. The output layer starts at zero, so that every class is as likely as any other.

    Args:
      backbone: a functional or sequential model; its output has an axis of examples, then places if any, then features.
      num_classes: >= 2; two are one sigmoid, more are a softmax.
      hidden_units: sizes of tanh layers between features and output.
      norm_groups: as in `unit_features`.

    Raises:
      InvalidArgumentError: a number is outside its range.
      UnsupportedModelError: the backbone has no features to put a head on, or cannot be copied.

    Example:
      >>> from tfprivacy_ft import models
      >>> with_new_head(models.build_model("logistic", (4,), 3), num_classes=2).model.output_shape
      (None, 1)
    """
    _check.positive_integer(num_classes=num_classes)
    if num_classes < 2:
        raise InvalidArgumentError(f"num_classes={num_classes} is not allowed: give at least 2.")
    copy = copy_of(backbone)
    features = unit_features(copy, norm_groups)
    output = features
    for number, units in enumerate(hidden_units, start=1):
        output = keras.layers.Dense(units, "tanh", name=_unused(copy, f"head_hidden_{number}"))(output)
    outputs, activation = (1, "sigmoid") if num_classes == 2 else (num_classes, "softmax")
    last = keras.layers.Dense(outputs, activation, kernel_initializer="zeros", name=_unused(copy, "head"))
    return Classifier(keras.Model(copy.input, last(output), name=copy.name), head_layers=1 + len(hidden_units))


def unit_features(backbone: Any, norm_groups: int | None = None) -> Any:
    """The backbone's output as one row of unit l2 norm for each example: a symbolic tensor, [batch, features].

    Private heads learn from rows of one length at one learning rate and clip, whatever the backbone is.

    Args:
      backbone: a model with one output, whose last axis are channels.
      norm_groups: how many groups of channels, each with all its places, first get mean 0 and variance 1 within each
        example; a divisor of the channels. None leaves the features as they are.

    Raises:
      InvalidArgumentError: `norm_groups` does not divide the channels.
      UnsupportedModelError: the output is not one tensor of two to five axes.

    Source: Tramer & Boneh 2021, section 2, for what scaling features does to private linear models; docs/starting_values.md
      for what a mean over places costs.
    """
    output = backbone.output
    rank = len(output.shape) if hasattr(output, "shape") else 0
    pooling = {
        3: keras.layers.GlobalAveragePooling1D,
        4: keras.layers.GlobalAveragePooling2D,
        5: keras.layers.GlobalAveragePooling3D,
    }
    if rank != 2 and rank not in pooling:
        raise UnsupportedModelError(
            f"the model {backbone.name!r} ends in {backbone.output_shape}, which is no row of features for each example: give "
            "one that ends in features, feature maps or a sequence of features."
        )
    if norm_groups is not None:
        if output.shape[-1] is None or output.shape[-1] % norm_groups:
            raise InvalidArgumentError(
                f"norm_groups={norm_groups} does not divide the {output.shape[-1]} channels of the features: give a divisor."
            )
        norm = keras.layers.GroupNormalization
        output = norm(norm_groups, epsilon=1e-5, center=False, scale=False, name=_unused(backbone, "normalized"))(
            output
        )
    size = tf.TensorShape(output.shape[1:]).num_elements()
    if rank == 4 and size is not None and size <= _MOST_FEATURES:
        output = keras.layers.Flatten(name=_unused(backbone, "places"))(output)
    elif rank != 2:
        output = pooling[rank](name=_unused(backbone, "pooled"))(output)
    return keras.layers.UnitNormalization(name=_unused(backbone, "unit_features"))(output)


def with_own_head(model: Any, *, probabilities: bool = True) -> Classifier:
    """A copy of a whole classifier; its head is its last layer with weights and what comes after that.

    Args:
      model: a functional or sequential model with one output.
      probabilities: whether to put a softmax (for one output, a sigmoid) at its end, if it ends in logits.

    Raises:
      UnsupportedModelError: the model does not end in a chain of layers, one of which has weights, or cannot be copied.

    Example:
      >>> from tfprivacy_ft import models
      >>> with_own_head(models.build_model("mlp", (4,), 3)).head_layers
      1
    """
    copy = copy_of(model)
    if len(tf.nest.flatten(copy.output)) != 1:
        raise UnsupportedModelError(f"the model {model.name!r} has several outputs: give one with a single output.")
    layers = _length_of_head(copy)
    if not probabilities or _ends_in_probabilities(copy):
        return Classifier(copy, layers)
    shape = copy.output_shape
    end = keras.layers.Activation("sigmoid" if shape[-1] == 1 else "softmax", name=_unused(copy, "probabilities"))
    return Classifier(keras.Model(copy.input, end(copy.output), name=copy.name), layers + 1)


def _length_of_head(model: Any) -> int:
    """How many of the last layers are a chain that begins with the last layer that has weights."""
    below = model.output
    for length, layer in enumerate(reversed(model.layers), start=1):
        if layer.output is not below:
            break
        if layer.weights:
            return length
        below = layer.input
    raise UnsupportedModelError(
        f"the model {model.name!r} does not end in a chain of layers with weights: give num_classes to put a new head on it."
    )


def _ends_in_probabilities(model: Any) -> bool:
    last = model.layers[-1]
    activation = getattr(last, "activation", None)
    return getattr(activation, "__name__", type(last).__name__).lower() in _ENDS


class TrainableFlags(NamedTuple):
    """What of a model is trainable.

    Args:
      layers: in the order of `layers_inside`.
      variables: in the order of the model's; on Keras 3 a kernel with an adapter is frozen, and its layer is not.
    """

    layers: list[bool]
    variables: list[bool]


def trainable_flags(model: Any) -> TrainableFlags:
    """Which layers and which variables are trainable."""
    variables = [variable.trainable for variable in model.weights] if IS_KERAS_3 else []
    return TrainableFlags([layer.trainable for layer in layers_inside(model)], variables)


def set_trainable_flags(model: Any, flags: TrainableFlags) -> None:
    """Makes layers and variables trainable or not, as `trainable_flags` said of a model of the same architecture."""
    for layer, flag in zip(layers_inside(model), flags.layers, strict=True):
        layer.trainable = flag  # an outer layer comes before those in it, whose flags it sets, too
    for variable, flag in zip(model.weights if IS_KERAS_3 else [], flags.variables, strict=True):
        variable.trainable = flag


def _enable_adapters(model: Any, copy: Any) -> None:
    """Gives the layers of a copy the adapters of Keras 3 that are inside other layers, which no config mentions."""
    for layer, twin in zip(layers_inside(model), layers_inside(copy), strict=True):
        if getattr(layer, "lora_enabled", False) and not twin.lora_enabled:
            twin.enable_lora(layer.lora_rank, lora_alpha=layer.lora_alpha)


def _unused(model: Any, name: str) -> str:
    """The name, or one like it that no layer of `model` has."""
    taken = {layer.name for layer in model.layers}
    number, unused = 1, name
    while unused in taken:
        number += 1
        unused = f"{name}_{number}"
    return unused
