"""Models by name: builds them, registers those of a user, and refuses builders that do not make a fresh model."""

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.models._parts import is_size

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["build_model", "model_names", "register_model"]

# Called as builder(input_shape, num_outputs, **options).
Builder = Callable[..., "tf.keras.Model"]

_BUILDERS: dict[str, Builder] = {}
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
        name: "logistic", "mlp", "cnn", "resnet", "squeezenet", "text", "transformer", "lstm", a name registered with
            `register_model`, or a function `(input_shape, num_outputs, **options) -> model` that makes a new model with
            new weights at each call.
        input_shape: Shape of one example, without the batch axis: (28, 28, 1) for images, (30,) for rows of a table,
            (T,) for texts of integer tokens, or (None,) for text and lstm; (T, measurements) for lstm, where T may be None.
        num_outputs: Classes, or values of a regression; >= 1. Two classes are 1 (sigmoid) or 2 (softmax).
        **options: Options of the builder:
            logistic: from_logits=False.
            mlp: hidden_units=(128,), activation="tanh", from_logits=False.
            cnn: filters=(16, 32), kernel_sizes and strides (by default (8, 4) and (2, 2), or for images with a side
                below 16 pixels (3, 3) and (1, 2)), hidden_units=(32,), activation="tanh", from_logits=False.
            resnet: blocks=(1, 1, 1) and filters=(16, 32, 64), one number of each per stage; groups=8, a divisor of each
                of filters; activation="relu", from_logits=False.
            squeezenet: include_top=True, from_logits=False. Images of 31 pixels or more in each direction; height and
                width may be None. include_top=False gives the mean over the image of the last layer's 512 features
                (num_outputs=512). `weights.load_backbone` loads weights of ImageNet into it, and says how images have to
                be prepared for them.
            text: vocabulary_size (required; tokens are 0 .. vocabulary_size - 1), embedding_dim=16, mask_zero=False
                (True: token 0 is padding and does not count), hidden_units=(), activation="tanh", from_logits=False.
            transformer: vocabulary_size (required), embedding_dim=32, blocks=1, num_heads=2, feed_forward_units=64,
                mask_zero=False (as for text), activation="gelu", from_logits=False.
            lstm: vocabulary_size (required for tokens, left out for measurements), embedding_dim=16, units=32,
                mask_zero=False (for tokens), hidden_units=(), activation="tanh", from_logits=False. Private gradients of
                an LSTM are exact, but have no fast rule: each example is taken alone, which is slow.

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

    Source: cnn: Papernot et al., "Tempered Sigmoid Activations for Deep Learning with Differential Privacy", AAAI 2021,
        https://arxiv.org/abs/2007.14191. resnet: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016,
        https://arxiv.org/abs/1603.05027, with Wu & He, "Group Normalization", ECCV 2018,
        https://arxiv.org/abs/1803.08494. squeezenet: Iandola et al., 2016, https://arxiv.org/abs/1602.07360 (version
        1.1). transformer: Xiong et al., "On Layer Normalization in the Transformer Architecture", ICML 2020,
        https://arxiv.org/abs/2002.04745.
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
        if known is not None and _origin(known) != _origin(builder):
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


def _shape_of_one_example(input_shape: Any) -> tuple[int | None, ...]:
    shape = tuple(input_shape) if isinstance(input_shape, Sequence) and not isinstance(input_shape, str) else ()
    if not shape or not all(size is None or is_size(size) for size in shape):
        raise InvalidArgumentError(
            f"input_shape={input_shape!r} is not allowed: give the shape of one example without the batch axis, "
            "like (28, 28, 1) or (30,)."
        )
    return tuple(None if size is None else int(size) for size in shape)


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
