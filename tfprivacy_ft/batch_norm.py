"""BatchNormalization: which of a model's layers let examples see each other, and what to do about it.

Promises: where a model is changed it is copied, without what it was compiled with, and the one that was given stays as it
is; weights of all other layers are bit-identical. Layers that mix examples in other ways are no matter of this module:
the clipping engine refuses them in the first step, by name.
"""

from typing import Any

import tensorflow as tf

from tfprivacy_ft import keras_compat
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError

__all__ = ["fix_batchnorm", "refuse_trainable", "trainable_batch_norms"]

_MOST_GROUPS = 32
_CHANNELS_PER_GROUP = 8  # at least: a group of one channel at one place is always normalised to zero


def trainable_batch_norms(model: tf.keras.Model) -> list[str]:
    """Names of the layers that normalise by statistics of the batch while the model is trained.

    Those are every BatchNormalization, and every other layer with a moving mean, that is not frozen: with
    `trainable=False` Keras normalises by the moving statistics, by which no example sees another.

    Args:
        model: A Keras model with weights, which may hold other models.

    Returns:
        Names of layers, in the model's order.

    Example:
        >>> layers = [tf.keras.Input((3,)), tf.keras.layers.BatchNormalization(name="norm"), tf.keras.layers.Dense(2)]
        >>> trainable_batch_norms(tf.keras.Sequential(layers))
        ['norm']
    """
    return [layer.name for layer in model._flatten_layers() if _mixes_examples(layer)]


def refuse_trainable(model: tf.keras.Model) -> None:
    """Raises an error that names the first of `trainable_batch_norms` and says what to do.

    Raises:
        UnsupportedModelError: There is one.
    """
    names = trainable_batch_norms(model)
    if names:
        more = f" (as are {len(names) - 1} more layers)" if names[1:] else ""
        raise UnsupportedModelError(
            f"layer {names[0]!r} is a BatchNormalization that trains{more}, and its statistics mix the examples of a batch: "
            "use GroupNormalization, set trainable=False on it, or call tfprivacy_ft.batch_norm.fix_batchnorm(model, how) "
            "with how='freeze' or 'groupnorm'."
        )


def fix_batchnorm(model: tf.keras.Model, how: str) -> tf.keras.Model:
    """The same model without BatchNormalization in training mode.

    Args:
        model: A functional or sequential Keras model with weights, which may hold others of these kinds.
        how: "freeze": those layers keep their statistics, gamma and beta, and are not trained: outputs stay what
            they are in inference. "groupnorm": each becomes a GroupNormalization of the same name, with the same gamma
            and beta, and the pretrained statistics are dropped: what the model has learned has to be trained again in
            part. Groups are as many as divide the channels, up to 32, of 8 channels or more. Layers that are
            frozen already are left alone.

    Returns:
        A new model that is not compiled, or `model` itself where nothing is to be fixed.

    Raises:
        InvalidArgumentError: `how` is neither.
        UnsupportedModelError: Keras cannot copy the model, or a layer cannot be replaced; the text names it.

    Example:
        >>> layers = [tf.keras.Input((3,)), tf.keras.layers.BatchNormalization(name="norm"), tf.keras.layers.Dense(2)]
        >>> trainable_batch_norms(fix_batchnorm(tf.keras.Sequential(layers), "freeze"))
        []

    Source: Y. Wu & K. He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494.
    """
    if how not in ("freeze", "groupnorm"):
        raise InvalidArgumentError(f"how={how!r} is not allowed: give 'freeze' or 'groupnorm'.")
    if not trainable_batch_norms(model):
        return model
    copier = _Copier(replaces=how == "groupnorm")
    copy = copier.copy(model)
    copier.carry_over_weights()
    if how == "freeze":
        for layer in copy._flatten_layers():
            if _mixes_examples(layer):
                layer.trainable = False
    refuse_trainable(copy)
    return copy


def _mixes_examples(layer: Any) -> bool:
    is_batch_norm = isinstance(layer, tf.keras.layers.BatchNormalization) or hasattr(layer, "moving_mean")
    return is_batch_norm and layer.trainable


class _Copier:
    """Copies models layer by layer. Each layer is copied once, wherever it is used."""

    def __init__(self, replaces: bool):
        self._replaces = replaces
        self._copies: dict[int, tuple[Any, Any]] = {}

    def copy(self, model: tf.keras.Model) -> tf.keras.Model:
        """A model of new layers, not compiled."""
        try:
            sequential = isinstance(model, tf.keras.Sequential)
            copy = self._copy_of_sequence(model) if sequential else keras_compat.clone_model(model, self._copy_layer)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"model {model.name!r} cannot be copied ({error}), as it is neither functional nor a Sequential that starts "
                "with an Input, or has a layer without get_config: set trainable=False on its layers "
                f"{trainable_batch_norms(model)} before it is compiled."
            ) from error
        if not model.trainable:
            copy.trainable = False
        return copy

    def carry_over_weights(self) -> None:
        """Gives each new layer the weights of the old one."""
        for old, new in self._copies.values():
            if isinstance(new, tf.keras.Model) or not isinstance(new, tf.keras.layers.Layer):
                continue  # what a model holds has been copied itself, and operations have no weights
            if type(new) is not type(old):
                new.set_weights([w.numpy() for w in (old.gamma, old.beta) if w is not None])
            else:
                new.set_weights(old.get_weights())

    def _copy_of_sequence(self, model: tf.keras.Sequential) -> tf.keras.Sequential:
        (given,) = model.inputs
        start = tf.keras.Input(given.shape[1:], batch_size=given.shape[0], dtype=given.dtype)
        return tf.keras.Sequential([start, *map(self._copy_layer, model.layers)], name=model.name)

    def _copy_layer(self, layer: Any) -> Any:
        if id(layer) not in self._copies:
            self._copies[id(layer)] = (layer, self._new(layer))
        return self._copies[id(layer)][1]

    def _new(self, layer: Any) -> Any:
        if isinstance(layer, tf.keras.Model):
            return self.copy(layer)
        if self._replaces and isinstance(layer, tf.keras.layers.BatchNormalization) and layer.trainable:
            return _group_norm(layer)
        return type(layer).from_config(layer.get_config())


def _group_norm(layer: Any) -> Any:
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    channels = int(layer.moving_mean.shape[-1])
    if len(axes) > 1 or (channels == 1 and layer.input_spec.ndim == 2):
        raise UnsupportedModelError(
            f"layer {layer.name!r} is a BatchNormalization of several axes, or of a single number, for which there is no "
            "GroupNormalization: use how='freeze'."
        )
    most = max(1, min(_MOST_GROUPS, channels // _CHANNELS_PER_GROUP))
    groups = max(count for count in range(1, most + 1) if channels % count == 0)
    known = tf.keras.layers.GroupNormalization(groups).get_config()
    config = {key: value for key, value in layer.get_config().items() if key in known}
    return tf.keras.layers.GroupNormalization.from_config({**config, "groups": groups, "axis": axes[0]})
