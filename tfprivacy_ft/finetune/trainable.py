"""Which weights of a model are trained: the biases alone, the last layers, or any that are named; all others are frozen.

Promises: a weight that is not among them is left bit-identical by training. BatchNormalization stays frozen, in which
state Keras runs it on its stored statistics: trained, it would mix the examples of a batch. Keras files hold `trainable`
for whole layers only, so call these functions again on a model that was loaded. Knows nothing of privacy.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from tfprivacy_ft import _check, keras_compat
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.keras_compat import keras

__all__ = ["last_layer", "train_all", "train_last_layers", "train_only", "train_only_biases", "trained_by_keras"]


def train_only_biases(model: Any, also_last: bool = True) -> Any:
    """Freezes all but the biases, the offsets of normalisations among them, and the last layer: BiTFiT.

    Train the model that this returns: Keras freezes whole layers, so it is another model around the same layers, which trains
    some of their weights. `model` thereby holds what was trained and is the one to save; `save` of the other writes it, too.

    Args:
        model: A built functional or Sequential Keras model; its other layers are frozen in place.
        also_last: Whether to train the whole last layer with weights, too.

    Returns:
        The model to compile and to train.

    Raises:
        UnsupportedModelError: The model has no weights yet, has no bias, or is subclassed.

    Example:
        >>> from tfprivacy_ft import models
        >>> model = models.build_model("mlp", input_shape=(4,), num_outputs=3, hidden_units=(8,))
        >>> [tuple(v.shape) for v in train_only_biases(model).trainable_variables]
        [(8,), (8, 3), (3,)]

    Source: Ben Zaken et al., "BitFit", ACL 2022, https://arxiv.org/abs/2106.10199; with differential privacy: Bu et al.,
        "Differentially Private Bias-Term Fine-tuning of Foundation Models", ICML 2024, https://arxiv.org/abs/2210.00036.
    """
    _check.boolean(also_last=also_last)
    _refuse_unbuilt(model)
    wanted = [weight for weight in trained_by_keras([model]) if _is_bias(keras_compat.short_name(weight))]
    if not wanted:
        raise UnsupportedModelError(f"Model {model.name!r} has no bias that could be trained: use another recipe.")
    wanted += trained_by_keras([last_layer(model)]) if also_last else []
    train_only(model, wanted)
    return _trained_in_part(model, wanted)


def train_last_layers(model: Any, count: int = 1) -> Any:
    """Freezes all but the last `count` layers that have weights; layers of models inside the model count one by one.

    Args:
        model: A built Keras model, changed in place.
        count: How many layers to train, >= 1. BatchNormalization is passed over, and a layer made of others, such as
            MultiHeadAttention, is one.

    Returns:
        The same model.

    Raises:
        InvalidArgumentError: The model has fewer such layers.
        UnsupportedModelError: The model has no weights yet.

    Example:
        >>> from tfprivacy_ft import models
        >>> model = models.build_model("mlp", input_shape=(4,), num_outputs=3, hidden_units=(8, 8))
        >>> len(train_last_layers(model, 2).trainable_variables)
        4
    """
    _check.positive_integer(count=count)
    layers = _layers_with_weights(model)
    if count > len(layers):
        raise InvalidArgumentError(
            f"count={count} is not allowed: the model has {len(layers)} layers with weights, so give a number up to that."
        )
    train_only(model, trained_by_keras(layers[-count:]))
    return model


def train_all(model: Any) -> Any:
    """Makes every weight trainable again, but for those of BatchNormalization, which is frozen.

    On Keras 3 `model.trainable = True` does nothing where the model itself was not frozen, whatever its layers are.

    Args:
        model: A built Keras model, changed in place.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: The model has no weights yet.

    Example:
        >>> from tfprivacy_ft import models
        >>> model = models.build_model("mlp", input_shape=(4,), num_outputs=3, hidden_units=(8, 8))
        >>> len(train_all(train_last_layers(model)).trainable_variables)
        6
    """
    _refuse_unbuilt(model)
    train_only(model, trained_by_keras([model]))
    return model


def trained_by_keras(layers: list[Any]) -> list[Any]:
    """What Keras trains of these layers where nothing is frozen, but for BatchNormalization."""
    found = []
    for layer in layers:
        for part in [layer, *keras_compat.layers_inside(layer)]:
            if not _is_batch_norm(part):
                found += keras_compat.own_trainable_weights(part)
    return found


def last_layer(model: Any) -> Any:
    """The last layer with weights: the head, where the model is a classifier."""
    return _layers_with_weights(model)[-1]


def train_only(model: Any, wanted: Iterable[Any]) -> None:
    """Freezes every layer that holds none of these weights, and no other layer.

    Args:
        model: A built Keras model, changed in place.
        wanted: Weights of the model that Keras could train.
    """
    kept = {id(weight) for weight in wanted}
    for layer in [model, *keras_compat.layers_inside(model)]:  # from the outside in: each sets those inside it
        if layer.weights:
            layer.trainable = any(id(weight) in kept for weight in layer.weights)


def _is_bias(name: str) -> bool:
    return name.endswith("bias") or name == "beta"


def _is_batch_norm(layer: Any) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)


def _layers_with_weights(model: Any) -> list[Any]:
    """Layers with weights that can be trained, from input to output, each once."""
    _refuse_unbuilt(model)
    found = {id(layer): layer for layer in _leaves(model) if layer.weights and not _is_batch_norm(layer)}
    if not found:
        raise UnsupportedModelError(f"Model {model.name!r} has no layer with weights: there is nothing to train.")
    return list(found.values())


def _leaves(model: Any) -> Iterator[Any]:
    """The layers of a model and of the models inside it."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _leaves(layer)
        else:
            yield layer


def _refuse_unbuilt(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise InvalidArgumentError(f"model={model!r} is not allowed: give a Keras model.")
    if not model.built or not model.weights:
        raise UnsupportedModelError(f"Model {model.name!r} has no weights yet: build it, or call it on a batch first.")


class _TrainedInPart(keras.Model):
    """A functional model that trains some of the weights of its layers. A file of it holds a plain model."""

    trained: frozenset[int] | None = None  # ids of weights; None for all

    @property
    def trainable_weights(self):
        everything = super().trainable_weights
        return [weight for weight in everything if self.trained is None or id(weight) in self.trained]

    @property
    def non_trainable_weights(self):
        trained = {id(weight) for weight in self.trainable_weights}
        return [weight for weight in self.weights if id(weight) not in trained]

    @property
    def trainable_variables(self):
        return self.trainable_weights

    @property
    def non_trainable_variables(self):
        trained = {id(weight) for weight in self.trainable_weights}
        return [variable for variable in self.variables if id(variable) not in trained]

    def save(self, *args, **kwargs):
        """Saves a plain model of the same layers."""
        keras.Model(self.input, self.output, name=self.name).save(*args, **kwargs)


def _trained_in_part(model: Any, wanted: list[Any]) -> Any:
    if not getattr(model, "inputs", None):
        raise UnsupportedModelError(
            f"Model {model.name!r} is subclassed, and single weights of it cannot be frozen: give a functional or Sequential "
            "model."
        )
    one = isinstance(model, keras.Sequential)  # which knows lists of one
    ends = (model.inputs[0], model.outputs[0]) if one else (model.input, model.output)
    part = _TrainedInPart(*ends, name=model.name)
    part.trained = frozenset(id(weight) for weight in wanted)
    return part
