"""Builders for texts of integer tokens, and for series of measurements."""

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

    from tfprivacy_ft.layers import MaskedMean

    _refuse_unless_text(input_shape, "text")
    _check.positive_integer(vocabulary_size=vocabulary_size, embedding_dim=embedding_dim)
    inputs = tf.keras.Input(shape=input_shape, dtype="int32")
    x = tf.keras.layers.Embedding(vocabulary_size, embedding_dim, mask_zero=bool(mask_zero))(inputs)
    x = MaskedMean()(x) if mask_zero else tf.keras.layers.GlobalAveragePooling1D()(x)
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

    from tfprivacy_ft.layers import LearnedPositions, MaskedMean

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
    x = LearnedPositions()(x)
    for _ in range(blocks):
        normalised = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(num_heads, embedding_dim // num_heads)
        x = layers.Add()([x, attention(normalised, normalised)])
        hidden = layers.Dense(feed_forward_units, activation=activation)(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(embedding_dim)(hidden)])
    x = layers.LayerNormalization()(x)
    x = MaskedMean()(x) if mask_zero else layers.GlobalAveragePooling1D()(x)
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


def _refuse_unless_text(input_shape: tuple[int | None, ...], builder: str) -> None:
    if len(input_shape) != 1:
        raise InvalidArgumentError(
            f"input_shape={input_shape} is not allowed for {builder}: give (T,) for texts of T tokens."
        )
