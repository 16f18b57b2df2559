"""Clipping rules: by how much each example's gradient is shortened, given its norm at every variable.

Promise, kept for every rule by `weights_of`: what one example adds has l2 norm at most `l2_norm_clip`, over all variables
together. A rule sees norms of one example at a time, so that its weights depend on that example alone.
"""

import abc
import math
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.keras_compat import keras

_SMALLEST = 1e-30  # of what is divided by
_LEAST_STABILITY = 1e-6  # far above norms whose squares float32 takes for zero


class ClippingRule(abc.ABC):
    """How one example's gradient is weighted, variable by variable. Subclass it for a rule of your own."""

    @property
    def total(self) -> float | None:
        """The sensitivity that the rule's own numbers add up to; None where it takes any `l2_norm_clip`."""
        return None

    @abc.abstractmethod
    def weights(self, squared_norms: list[tf.Tensor], layers: list[str], clip: tf.Tensor) -> list[tf.Tensor]:
        """What the gradients of one example, or of each of B examples, are multiplied by.

        Args:
          squared_norms: for each variable the squared norm of the gradient, of shape [] or [B]; float32 or float64.
          layers: for each variable the path of its layer.
          clip: scalar of the same dtype, `l2_norm_clip`.

        Returns:
          For each variable a weight >= 0 of the shape of its norms. Gradients that are still too long are shortened.

        Raises:
          UnsupportedModelError: the rule does not fit the model.
        """

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ClippingRule":
        """A rule from its arguments."""
        return cls(**config)


def weights_of(
    rule: ClippingRule, squared_norms: list[tf.Tensor], layers: list[str], clip: tf.Tensor
) -> list[tf.Tensor]:
    """The weights of `rule`, made smaller where what an example adds would be longer than `clip`.

    Norms have to be finite; where they are not, so are the weights, and the caller leaves the example out.
    """
    weights = rule.weights(squared_norms, layers, clip)
    alike: dict[int, list[tf.Tensor]] = {}  # variables that share a weight are measured together
    for weight, squares in zip(weights, squared_norms, strict=True):
        alike.setdefault(id(weight), []).append(squares)
    by_id = {id(w): w for w in weights}
    added = [tf.square(by_id[key] * tf.sqrt(tf.add_n(squares))) for key, squares in alike.items()]
    shortened = tf.minimum(clip / tf.maximum(tf.sqrt(tf.add_n(added)), _SMALLEST), 1.0)
    result = {key: weight * shortened for key, weight in by_id.items()}
    return [result[id(w)] for w in weights]


def check(rule: Any, l2_norm_clip: float | None) -> float:
    """The sensitivity of `rule` with this `l2_norm_clip`, which may be None where the rule has a total of its own.

    Raises:
      InvalidArgumentError: `rule` is no rule, the clip is outside its range, or contradicts the rule.
    """
    if not isinstance(rule, ClippingRule):
        raise InvalidArgumentError(
            f"clipping={rule!r} is not a clipping rule: give Flat(), PerLayer(), Automatic(), Adaptive() or another ClippingRule."
        )
    if l2_norm_clip is None and rule.total is not None:
        return rule.total
    _check.positive(l2_norm_clip=l2_norm_clip)
    assert l2_norm_clip is not None
    if rule.total is not None and not math.isclose(rule.total, l2_norm_clip, rel_tol=1e-6):
        raise InvalidArgumentError(
            f"l2_norm_clip={l2_norm_clip} is not allowed: the clips given add up to {rule.total} (the square root of the "
            "sum of their squares), so give that, or None."
        )
    return float(l2_norm_clip)


def to_config(rule: ClippingRule) -> dict[str, Any]:
    """Plain values from which `from_config` makes the rule again."""
    return {"rule": keras.utils.get_registered_name(type(rule)), "arguments": rule.get_config()}


def from_config(config: Any, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """The rule that `to_config` described; anything else as it is.

    Raises:
      InvalidArgumentError: the rule's class is not registered with Keras.
    """
    if not isinstance(config, Mapping):
        return config
    found = keras.utils.get_registered_object(config["rule"], custom_objects=custom_objects)
    if found is None:
        raise InvalidArgumentError(
            f"the clipping rule {config['rule']!r} is not known here: import the module that registers it by "
            "keras.utils.register_keras_serializable, or load with compile=False."
        )
    return found.from_config(dict(config["arguments"]))


_serializable = keras.utils.register_keras_serializable(package="tfprivacy_ft")


@_serializable
class Flat(ClippingRule):
    """One clip over all variables together: gradients that are longer are shortened to it.

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.
    """

    def weights(self, squared_norms: list[tf.Tensor], layers: list[str], clip: tf.Tensor) -> list[tf.Tensor]:
        """Ones: `weights_of` does the rest."""
        return [tf.ones_like(squared_norms[0])] * len(squared_norms)


@_serializable
class PerLayer(ClippingRule):
    """Each layer's gradient is clipped to a clip of its own, C_k; the sensitivity is sqrt(sum of C_k^2).

    Args:
      clips: layer name -> C_k > 0, with a name for every layer that is trained. Layers whose path runs through a named
        one, as that of an LSTM's cell, share its clip; where several names fit, the longest counts. None gives each of K
        layers l2_norm_clip / sqrt(K).

    Raises:
      InvalidArgumentError: a clip is outside its range.

    Example:
      >>> PerLayer({"body": 0.6, "head": 0.8}).total
      1.0

    Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", section 3.
    """

    def __init__(self, clips: Mapping[str, float] | None = None):
        if clips is not None:
            if not clips:
                raise InvalidArgumentError("clips={} is not allowed: name at least one layer, or give None.")
            _check.positive(**{f"the clip of {name!r}": clip for name, clip in clips.items()})
        self._clips = None if clips is None else {name: float(clip) for name, clip in clips.items()}

    @property
    def total(self) -> float | None:
        """sqrt(sum of C_k^2) of the clips given."""
        return None if self._clips is None else math.hypot(*self._clips.values())

    def weights(self, squared_norms: list[tf.Tensor], layers: list[str], clip: tf.Tensor) -> list[tf.Tensor]:
        """min(1, C_k / norm over the variables of layer k)."""
        groups = layers if self._clips is None else [self._name_of(layer) for layer in layers]
        shares = self._shares(groups)
        factors = {}
        for group, share in shares.items():
            norm = tf.sqrt(tf.add_n([s for s, g in zip(squared_norms, groups, strict=True) if g == group]))
            factors[group] = tf.minimum(share * clip / tf.maximum(norm, _SMALLEST), 1.0)
        return [factors[group] for group in groups]

    def _shares(self, groups: list[str]) -> dict[str, float]:
        """C_k / l2_norm_clip for each group that is there."""
        if self._clips is None:
            return dict.fromkeys(groups, 1 / math.sqrt(len(set(groups))))
        assert self.total is not None
        return {group: self._clips[group] / self.total for group in groups}

    def _name_of(self, layer: str) -> str:
        assert self._clips is not None
        fitting = [name for name in self._clips if f"/{name}/" in f"/{layer}/"]
        if not fitting:
            raise UnsupportedModelError(
                f"layer {layer!r} is trained and PerLayer has no clip for it, only for {', '.join(sorted(self._clips))}: "
                "name it, or freeze it with `trainable=False`."
            )
        return max(fitting, key=len)

    def get_config(self) -> dict[str, Any]:
        """The clips."""
        return {"clips": self._clips}


@_serializable
class Automatic(ClippingRule):
    """Every gradient is scaled to nearly the same length: times l2_norm_clip / (norm + stability).

    The clip then only scales the learning rate, so there is none to search for.

    Args:
      stability: >= 1e-6; gradients much shorter than it stay short.

    Raises:
      InvalidArgumentError: `stability` is outside its range.

    Source: Bu et al. 2023, "Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger" (AUTO-S).
    """

    def __init__(self, stability: float = 0.01):
        _check.positive(stability=stability)
        if stability < _LEAST_STABILITY:
            raise InvalidArgumentError(
                f"stability={stability} is not allowed: give a number of at least {_LEAST_STABILITY}."
            )
        self._stability = float(stability)

    def weights(self, squared_norms: list[tf.Tensor], layers: list[str], clip: tf.Tensor) -> list[tf.Tensor]:
        """clip / (norm over all variables + stability)."""
        weight = clip / (tf.sqrt(tf.add_n(squared_norms)) + self._stability)
        return [weight] * len(squared_norms)

    def get_config(self) -> dict[str, Any]:
        """The stability."""
        return {"stability": self._stability}
