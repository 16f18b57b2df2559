"""Layers of text models that were saved before `models` built these of Keras's own layers. Imports TensorFlow.

To load such a file, import this module first: `from tfprivacy_ft import layers`. What is built now loads without it.
"""

import tensorflow as tf


@tf.keras.utils.register_keras_serializable("tfprivacy_ft")
class MaskedMean(tf.keras.layers.Layer):
    """Mean over time of the steps that the mask keeps; zeros where it keeps none.

    Keras's GlobalAveragePooling1D answers NaN for a row of nothing but padding, and under differential privacy
    one NaN example spoils the sum of its whole batch.

    Example:
        >>> MaskedMean()(tf.constant([[[2.0], [4.0], [9.0]]]), mask=tf.constant([[True, True, False]])).numpy()
        array([[3.]], dtype=float32)
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs, mask=None):
        if mask is None:
            return tf.reduce_mean(inputs, axis=1)
        weights = tf.cast(mask, inputs.dtype)[:, :, tf.newaxis]
        count = tf.reduce_sum(weights, axis=1)
        return tf.reduce_sum(inputs * weights, axis=1) / tf.maximum(count, 1)

    def compute_mask(self, inputs, mask=None):
        return None

    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[2])


@tf.keras.utils.register_keras_serializable("tfprivacy_ft")
class LearnedPositions(tf.keras.layers.Layer):
    """Adds a learned vector to each step of time: [batch, T, d] to the same shape, where T is fixed.

    Example:
        >>> LearnedPositions()(tf.zeros([2, 3, 4])).shape
        TensorShape([2, 3, 4])
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, input_shape):
        self.vectors = self.add_weight(name="vectors", shape=input_shape[1:], initializer="uniform")
        self.built = True

    def call(self, inputs):
        return inputs + tf.cast(self.vectors, inputs.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape
