"""What several builders share: checks of sizes, and the layers that end a model."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from tfprivacy_ft.errors import InvalidArgumentError


def top(x, num_outputs, hidden_units, activation, from_logits):
    import tensorflow as tf

    for units in sizes("hidden_units", hidden_units):
        x = tf.keras.layers.Dense(units, activation=activation)(x)
    probabilities = "sigmoid" if num_outputs == 1 else "softmax"
    return tf.keras.layers.Dense(num_outputs, activation=None if from_logits else probabilities)(x)


def is_size(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def sizes(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(map(is_size, values)):
        raise InvalidArgumentError(f"{name}={values!r} is not allowed: give a tuple of integers >= 1.")
    return tuple(values)


def fixed(input_shape: tuple[int | None, ...], builder: str) -> None:
    if None in input_shape:
        raise InvalidArgumentError(
            f"input_shape={input_shape} is not allowed for {builder}: give every size, without None."
        )
