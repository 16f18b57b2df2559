"""Models of which several federated tests compare the training."""

from tfprivacy_ft import models

DIM, CLASSES = 6, 3


def own_builder():
    """A frozen layer, a weight regulariser, a layer that normalises."""
    import tensorflow as tf

    inputs = tf.keras.Input((DIM,))
    x = tf.keras.layers.Dense(8, activation="relu", trainable=False)(inputs)
    x = tf.keras.layers.Dense(4, kernel_regularizer=tf.keras.regularizers.L2(0.1))(x)
    x = tf.keras.layers.GroupNormalization(groups=2)(x)
    return tf.keras.Model(inputs, tf.keras.layers.Dense(CLASSES)(x))


def cnn():
    return models.build_model("cnn", (8, 8, 1), CLASSES, filters=(2, 4), hidden_units=(4,))
