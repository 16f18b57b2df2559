"""Builders for rows of a table, which take inputs of any fixed shape."""

from tfprivacy_ft.models._parts import fixed, top
from tfprivacy_ft.models.registry import register_model


@register_model("logistic")
def _logistic(input_shape, num_outputs, from_logits=False):
    """Logistic or softmax regression on the flattened input."""
    return _mlp(input_shape, num_outputs, hidden_units=(), from_logits=from_logits)


@register_model("mlp")
def _mlp(input_shape, num_outputs, hidden_units=(128,), activation="tanh", from_logits=False):
    """Dense layers on the flattened input. Bounded activations keep gradients small, so clipping costs less."""
    import tensorflow as tf

    fixed(input_shape, "mlp and logistic")
    inputs = tf.keras.Input(shape=input_shape)
    x = tf.keras.layers.Flatten()(inputs) if len(input_shape) > 1 else inputs
    return tf.keras.Model(inputs, top(x, num_outputs, hidden_units, activation, from_logits))
