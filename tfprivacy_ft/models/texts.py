"""Builders for texts of integer tokens, and for series of measurements.

Promises: all layers are Keras's own, so a saved model loads without this library.
"""

from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.models._parts import fixed, top
from tfprivacy_ft.models.registry import register_model


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

    _refuse_unless_text(input_shape, "text")
    _check.positive_integer(vocabulary_size=vocabulary_size, embedding_dim=embedding_dim)
    inputs = tf.keras.Input(shape=input_shape, dtype="int32")
    x = tf.keras.layers.Embedding(vocabulary_size, embedding_dim, mask_zero=bool(mask_zero))(inputs)
    x = _masked_mean(x, _kept(inputs)) if mask_zero else tf.keras.layers.GlobalAveragePooling1D()(x)
    return tf.keras.Model(inputs, top(x, num_outputs, hidden_units, activation, from_logits))


@register_model("transformer")
def _transformer(
    input_shape,
    num_outputs,
    vocabulary_size,
    embedding_dim=32,
    blocks=1,
    num_heads=2,
    feed_forward_units=64,
    mask_zero=False,
    activation="gelu",
    from_logits=False,
):
    """An encoder whose blocks normalise first (Xiong et al. 2020), with learned positions; the mean of its outputs."""
    import tensorflow as tf

    _refuse_unless_text(input_shape, "transformer")
    fixed(input_shape, "transformer")  # there is one vector for each position
    _check.positive_integer(vocabulary_size=vocabulary_size, embedding_dim=embedding_dim, blocks=blocks)
    _check.positive_integer(num_heads=num_heads, feed_forward_units=feed_forward_units)
    if embedding_dim % num_heads:
        raise InvalidArgumentError(
            f"num_heads={num_heads} does not divide embedding_dim={embedding_dim}: give a divisor of it."
        )
    layers = tf.keras.layers
    inputs = tf.keras.Input(shape=input_shape, dtype="int32")
    x = layers.Embedding(vocabulary_size, embedding_dim, mask_zero=bool(mask_zero))(inputs)
    kept = _kept(inputs) if mask_zero else None
    x = layers.Add()([x, _positions(inputs, embedding_dim, kept)])
    for _ in range(blocks):
        normalised = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(num_heads, embedding_dim // num_heads)
        x = layers.Add()([x, attention(normalised, normalised)])
        hidden = layers.Dense(feed_forward_units, activation=activation)(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(embedding_dim)(hidden)])
    x = layers.LayerNormalization()(x)
    x = layers.GlobalAveragePooling1D()(x) if kept is None else _masked_mean(x, kept)
    return tf.keras.Model(inputs, top(x, num_outputs, (), activation, from_logits))


@register_model("lstm")
def _lstm(
    input_shape,
    num_outputs,
    vocabulary_size=None,
    embedding_dim=16,
    units=32,
    mask_zero=False,
    hidden_units=(),
    activation="tanh",
    from_logits=False,
):
    """The last state of an LSTM over tokens, or over rows of measurements, then dense layers."""
    import tensorflow as tf

    _check.positive_integer(embedding_dim=embedding_dim, units=units)
    if vocabulary_size is None:
        if len(input_shape) != 2 or input_shape[1] is None or mask_zero:
            raise InvalidArgumentError(
                f"input_shape={input_shape} with mask_zero={mask_zero} is not allowed for lstm without vocabulary_size: "
                "give (T, measurements) without a mask, or vocabulary_size for texts of tokens."
            )
        inputs = x = tf.keras.Input(shape=input_shape)
    else:
        _refuse_unless_text(input_shape, "lstm")
        _check.positive_integer(vocabulary_size=vocabulary_size)
        inputs = tf.keras.Input(shape=input_shape, dtype="int32")
        x = tf.keras.layers.Embedding(vocabulary_size, embedding_dim, mask_zero=bool(mask_zero))(inputs)
    x = tf.keras.layers.LSTM(units)(x)
    return tf.keras.Model(inputs, top(x, num_outputs, hidden_units, activation, from_logits))


def _kept(tokens):
    """0 for padding and 1 for every other token: [batch, T], in float32 also where the model computes in float16."""
    import tensorflow as tf

    as_numbers = tf.keras.layers.Rescaling(1.0, dtype="float32")(tokens)
    return tf.keras.layers.ReLU(max_value=1.0, dtype="float32")(as_numbers)


def _positions(tokens, size, kept):
    """A learned vector for each step of time: [batch, T, size], masked where `kept` is 0."""
    import tensorflow as tf

    steps = tokens.shape[1]
    if kept is None:
        numbers = tf.keras.layers.Rescaling(0.0, offset=list(range(steps)), dtype="float32")(tokens)
        return tf.keras.layers.Embedding(steps, size)(numbers)
    # Keras adds two tensors and keeps their mask only where both have one: padding is step 0 here, too.
    numbers = tf.keras.layers.Rescaling(list(range(1, steps + 1)), dtype="float32")(kept)
    return tf.keras.layers.Embedding(steps + 1, size, mask_zero=True)(numbers)


def _masked_mean(x, kept):
    """Mean over the steps that are kept: [batch, size]; zeros where none is.

    GlobalAveragePooling1D answers NaN for a row of nothing but padding. The squares of a unit vector of n equal values are
    1 / n each, and a vector of zeros stays as it is.
    """
    import tensorflow as tf

    unit = tf.keras.layers.UnitNormalization(axis=1, dtype="float32")(kept)
    shares = tf.keras.layers.Multiply(dtype="float32")([unit, unit])
    return tf.keras.layers.Dot(axes=1)([shares, x])


def _refuse_unless_text(input_shape: tuple[int | None, ...], builder: str) -> None:
    if len(input_shape) != 1:
        raise InvalidArgumentError(
            f"input_shape={input_shape} is not allowed for {builder}: give (T,) for texts of T tokens."
        )
