"""Model builders: the one place where architectures live, used by `model.fit` and by federated learning alike.

Promises: every call gives a fresh model, not compiled, that shares no weight with any earlier one; no layer mixes
the examples of a batch (no BatchNorm), so each example has a gradient of its own. Knows nothing of privacy, optimizers
or losses. TensorFlow is imported when a model is built, not before.
"""

import inspect
import weakref
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["build_model", "model_names", "register_model"]

# Called as builder(input_shape, num_outputs, **options).
Builder = Callable[..., "tf.keras.Model"]

_BUILDERS: dict[str, Builder] = {}
_BUILT_IN: set[str] = set()
# id -> model or variable, for as long as it lives: tells a fresh model from one that was handed out before.
_HANDED_OUT: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def build_model(
    name: str | Builder, input_shape: Sequence[int | None], num_outputs: int, **options: Any
) -> "tf.keras.Model":
    """Builds a fresh, uncompiled Keras model.

    The built-in models end in probabilities (softmax; sigmoid for one output), as the losses
    "sparse_categorical_crossentropy" and "binary_crossentropy" expect. `from_logits=True` leaves that activation out:
    for losses made with `from_logits=True`, and for regression.

    Args:
        name: "logistic", "mlp", "cnn", "text", a name registered with `register_model`, or a function
            `(input_shape, num_outputs, **options) -> model` that makes a new model with new weights at each call.
        input_shape: Shape of one example, without the batch axis: (28, 28, 1) for images, (30,) for rows of a table,
            (T,) or (None,) for texts of integer tokens.
        num_outputs: Classes, or values of a regression; >= 1. Two classes are 1 (sigmoid) or 2 (softmax).
        **options: Options of the builder:
            logistic: from_logits=False.
            mlp: hidden_units=(128,), activation="tanh", from_logits=False.
            cnn: filters=(16, 32), kernel_sizes and strides (by default (8, 4) and (2, 2), or for images with a side
                below 16 pixels (3, 3) and (1, 2)), hidden_units=(32,), activation="tanh", from_logits=False.
            text: vocabulary_size (required; tokens are 0 .. vocabulary_size - 1), embedding_dim=16, mask_zero=False
                (True: token 0 is padding and does not count; import `tfprivacy_ft.layers` before you load such a
                model), hidden_units=(), activation="tanh", from_logits=False.

    Returns:
        A `tf.keras.Model` with weights, not compiled.

    Raises:
        InvalidArgumentError: The name is unknown, or a shape, a size or an option is not allowed.
        UnsupportedModelError: A user's builder returned a model that is compiled, has no weights yet, does not fit
            input_shape and num_outputs, or shares weights with a model it returned before.

    Example:
        >>> model = build_model("mlp", input_shape=(30,), num_outputs=2, hidden_units=(8,))
        >>> model.count_params()
        266

    Source: the tanh CNN of Papernot et al., "Tempered Sigmoid Activations for Deep Learning with Differential
        Privacy", AAAI 2021, https://arxiv.org/abs/2007.14191.
    """
    shape = _shape_of_one_example(input_shape)
    _check.positive_integer(num_outputs=num_outputs)
    builder, label = _find(name)
    try:
        inspect.signature(builder).bind(shape, num_outputs, **options)
    except TypeError as error:
        raise InvalidArgumentError(
            f"Model {label} cannot be built with options {sorted(options)}: {error}; its arguments are "
            f"{inspect.signature(builder)}."
        ) from None
    model = builder(shape, num_outputs, **options)
    _refuse_unless_fresh(model, label, shape, num_outputs)
    return model


def register_model(name: str) -> Callable[[Builder], Builder]:
    """Registers a builder under a name, which then works wherever the name of a model is asked for.

    Args:
        name: The new name. A built-in name, or the name of another function, is refused; the same function may
            be registered again (as a notebook cell does that runs twice).

    Returns:
        A decorator that returns the function as it is.

    Raises:
        InvalidArgumentError: The name is taken or not a name, or what is decorated cannot be called.

    Example:
        >>> @register_model("two_towers")
        ... def two_towers(input_shape, num_outputs, width=8):
        ...     "Returns a new tf.keras.Model at each call."
    """
    if not (isinstance(name, str) and name):
        raise InvalidArgumentError(f"name={name!r} is not allowed: give the new model a name, like 'my_cnn'.")

    def register(builder: Builder) -> Builder:
        if not callable(builder):
            raise InvalidArgumentError(
                f"register_model({name!r}) was given {builder!r}: give a function "
                "(input_shape, num_outputs, **options) that returns a new model."
            )
        known = _BUILDERS.get(name)
        if known is not None and (name in _BUILT_IN or _origin(known) != _origin(builder)):
            raise InvalidArgumentError(f"The model name {name!r} is taken: choose one that is not in {model_names()}.")
        _BUILDERS[name] = builder
        return builder

    return register


def model_names() -> list[str]:
    """Names that `build_model` knows, sorted.

    Example:
        >>> {"cnn", "logistic", "mlp", "text"} <= set(model_names())
        True
    """
    return sorted(_BUILDERS)


@register_model("logistic")
def _logistic(input_shape, num_outputs, from_logits=False):
    """Logistic or softmax regression on the flattened input."""
    return _mlp(input_shape, num_outputs, hidden_units=(), from_logits=from_logits)


@register_model("mlp")
def _mlp(input_shape, num_outputs, hidden_units=(128,), activation="tanh", from_logits=False):
    """Dense layers on the flattened input. Bounded activations keep gradients small, so clipping costs less."""
    import tensorflow as tf

    _fixed(input_shape, "mlp and logistic")
    inputs = tf.keras.Input(shape=input_shape)
    x = tf.keras.layers.Flatten()(inputs) if len(input_shape) > 1 else inputs
    return tf.keras.Model(inputs, _top(x, num_outputs, hidden_units, activation, from_logits))


@register_model("cnn")
def _cnn(
    input_shape,
    num_outputs,
    filters=(16, 32),
    kernel_sizes=None,
    strides=None,
    hidden_units=(32,),
    activation="tanh",
    from_logits=False,
):
    """Convolutions, each followed by max-pooling 2x2 with stride 1; the first is padded, the others are not."""
    import tensorflow as tf

    if len(input_shape) != 3:
        raise InvalidArgumentError(
            f"input_shape={input_shape} is not allowed for cnn: give (height, width, channels), like (28, 28, 1)."
        )
    _fixed(input_shape, "cnn")
    # 8x8 and 4x4 with stride 2 leave nothing of an image under 13 pixels; from 16 on the second layer sees 4x4 or more.
    small = min(input_shape[:2]) < 16
    filters = _sizes("filters", filters)
    kernel_sizes = _sizes("kernel_sizes", kernel_sizes or ((3, 3) if small else (8, 4)))
    strides = _sizes("strides", strides or ((1, 2) if small else (2, 2)))
    if not (len(filters) == len(kernel_sizes) == len(strides) > 0):
        raise InvalidArgumentError(
            f"filters={filters}, kernel_sizes={kernel_sizes} and strides={strides} have different lengths: "
            "give one number of each per convolution."
        )
    _refuse_too_small(input_shape, kernel_sizes, strides)

    inputs = x = tf.keras.Input(shape=input_shape)
    for i, (count, kernel, stride) in enumerate(zip(filters, kernel_sizes, strides, strict=True)):
        padding = "same" if i == 0 else "valid"
        x = tf.keras.layers.Conv2D(count, kernel, strides=stride, padding=padding, activation=activation)(x)
        x = tf.keras.layers.MaxPool2D(pool_size=2, strides=1)(x)
    x = tf.keras.layers.Flatten()(x)
    return tf.keras.Model(inputs, _top(x, num_outputs, hidden_units, activation, from_logits))


@register_model("text")
def _text(
    input_shape,
    num_outputs,
    vocabulary_size,
    embedding_dim=16,
    mask_zero=False,
    hidden_units=(),
    activation="tanh",
    from_logits=False,
):
    """Mean of the tokens' embeddings, then dense layers."""
    import tensorflow as tf

    from tfprivacy_ft.layers import MaskedMean

    if len(input_shape) != 1:
        raise InvalidArgumentError(
            f"input_shape={input_shape} is not allowed for text: give (T,), or (None,) for texts of any length."
        )
    _check.positive_integer(vocabulary_size=vocabulary_size, embedding_dim=embedding_dim)
    inputs = tf.keras.Input(shape=input_shape, dtype="int32")
    x = tf.keras.layers.Embedding(vocabulary_size, embedding_dim, mask_zero=bool(mask_zero))(inputs)
    x = MaskedMean()(x) if mask_zero else tf.keras.layers.GlobalAveragePooling1D()(x)
    return tf.keras.Model(inputs, _top(x, num_outputs, hidden_units, activation, from_logits))


_BUILT_IN.update(_BUILDERS)


def _top(x, num_outputs, hidden_units, activation, from_logits):
    import tensorflow as tf

    for units in _sizes("hidden_units", hidden_units):
        x = tf.keras.layers.Dense(units, activation=activation)(x)
    probabilities = "sigmoid" if num_outputs == 1 else "softmax"
    return tf.keras.layers.Dense(num_outputs, activation=None if from_logits else probabilities)(x)


def _shape_of_one_example(input_shape: Any) -> tuple[int | None, ...]:
    shape = tuple(input_shape) if isinstance(input_shape, Sequence) and not isinstance(input_shape, str) else ()
    if not shape or not all(size is None or _is_size(size) for size in shape):
        raise InvalidArgumentError(
            f"input_shape={input_shape!r} is not allowed: give the shape of one example without the batch axis, "
            "like (28, 28, 1) or (30,)."
        )
    return tuple(None if size is None else int(size) for size in shape)


def _is_size(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _sizes(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(map(_is_size, values)):
        raise InvalidArgumentError(f"{name}={values!r} is not allowed: give a tuple of integers >= 1.")
    return tuple(values)


def _fixed(input_shape: tuple[int | None, ...], builder: str) -> None:
    if None in input_shape:
        raise InvalidArgumentError(
            f"input_shape={input_shape} is not allowed for {builder}: give every size; only text takes None."
        )


def _refuse_too_small(input_shape, kernel_sizes, strides) -> None:
    for side in input_shape[:2]:
        size = side
        for i, (kernel, stride) in enumerate(zip(kernel_sizes, strides, strict=True)):
            size = -(-size // stride) if i == 0 else (size - kernel) // stride + 1
            size -= 1  # max-pooling 2 with stride 1
            if size < 1:
                raise InvalidArgumentError(
                    f"input_shape={input_shape} is too small for kernel_sizes={kernel_sizes} and strides={strides}: "
                    f"nothing is left after convolution {i + 1}; give smaller ones or larger images."
                )


def _find(name: Any) -> tuple[Builder, str]:
    if isinstance(name, str):
        if name not in _BUILDERS:
            raise InvalidArgumentError(
                f"There is no model {name!r}: give one of {model_names()}, a function, or a name registered with "
                "register_model."
            )
        return _BUILDERS[name], repr(name)
    if not callable(name):
        raise InvalidArgumentError(
            f"name={name!r} is not allowed: give one of {model_names()}, or a function "
            "(input_shape, num_outputs, **options) that returns a new model."
        )
    return name, repr(getattr(name, "__qualname__", name))


def _origin(builder: Builder) -> tuple[str | None, str]:
    return getattr(builder, "__module__", None), getattr(builder, "__qualname__", repr(builder))


def _refuse_unless_fresh(model, label: str, shape: tuple[int | None, ...], num_outputs: int) -> None:
    import tensorflow as tf

    def refuse(fact: str, fix: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"Builder {label} {fact}: {fix}.")

    if not isinstance(model, tf.keras.Model):
        raise refuse(f"returned {type(model).__name__}", "let it return a tf.keras.Model")
    if _HANDED_OUT.get(id(model)) is model:
        raise refuse("returned the same model twice", "let it make a new model at each call")
    if getattr(model, "optimizer", None) is not None or getattr(model, "compiled", False):
        raise refuse("returned a compiled model", "leave compile() to the caller")
    if not model.built or not model.weights:
        raise refuse("returned a model without weights", f"start it with tf.keras.Input({shape})")
    if _fits(model, shape, num_outputs) is False:
        raise refuse(
            f"returned a model from {model.input_shape} to {model.output_shape}",
            f"use its arguments input_shape={shape} and num_outputs={num_outputs}",
        )
    for weight in model.weights:
        if _HANDED_OUT.get(id(weight)) is weight:
            name = getattr(weight, "path", None) or getattr(weight, "name", "")
            fact = f"returned a model that shares weight {name!r} with an earlier one"
            raise refuse(fact, "make its layers inside the builder")
    for item in (model, *model.weights):
        _HANDED_OUT[id(item)] = item


def _fits(model, shape: tuple[int | None, ...], num_outputs: int) -> bool | None:
    """Whether shapes agree; None for a model with several inputs or outputs, or one that does not know its shapes."""
    given, returned = getattr(model, "input_shape", None), getattr(model, "output_shape", None)
    if not (isinstance(given, tuple) and isinstance(returned, tuple)):
        return None
    if any(isinstance(size, tuple) for size in (*given, *returned)):
        return None
    same = len(given) == len(shape) + 1 and all(
        have is None or want is None or have == want for have, want in zip(given[1:], shape, strict=True)
    )
    return same and returned[-1] in (None, num_outputs)
