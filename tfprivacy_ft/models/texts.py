"""Builders for texts of integer tokens."""

from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.models._parts import top
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

    if len(input_shape) != 1:
        raise InvalidArgumentError(
            f"input_shape={input_shape} is not allowed for text: give (T,), or (None,) for texts of any length."
        )
    _check.positive_integer(vocabulary_size=vocabulary_size, embedding_dim=embedding_dim)
    inputs = tf.keras.Input(shape=input_shape, dtype="int32")
    x = tf.keras.layers.Embedding(vocabulary_size, embedding_dim, mask_zero=bool(mask_zero))(inputs)
    x = MaskedMean()(x) if mask_zero else tf.keras.layers.GlobalAveragePooling1D()(x)
    return tf.keras.Model(inputs, top(x, num_outputs, hidden_units, activation, from_logits))
