"""Models with every kind of layer that fine-tuning looks at, for several tests."""

from tfprivacy_ft.keras_compat import keras

layers = keras.layers


def attention_model():
    """From [5, 6] to 4 probabilities."""
    inputs = keras.Input((5, 6))
    x = layers.Add()([inputs, layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)])
    x = layers.Dense(7, "gelu", name="wide")(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(4, "softmax", name="head")(layers.GlobalAveragePooling1D()(x)))


def nested_model(norm=None):
    """From [6, 6, 2] to 4 probabilities, with a model inside that has a normalisation."""
    norm = norm or layers.GroupNormalization(2)
    body = [keras.Input((6, 6, 2)), layers.Conv2D(4, 3, activation="tanh", name="filters"), norm]
    backbone = keras.Sequential([*body, layers.Flatten(), layers.Dense(5, "tanh", name="top")], name="backbone")
    inputs = keras.Input((6, 6, 2))
    return keras.Model(inputs, layers.Dense(4, "softmax", name="head")(backbone(inputs)))
