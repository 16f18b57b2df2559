"""Layers of files saved before: these load, and compute what models of Keras's own layers compute now."""

import numpy as np
import tensorflow as tf
from helpers import layers

from tfprivacy_ft import models
from tfprivacy_ft.layers import LearnedPositions, MaskedMean

STEPS, WORDS, SIZE = 4, 9, 4


def _transformer_of_old():
    inputs = tf.keras.Input((STEPS,), dtype="int32")
    x = LearnedPositions()(layers.Embedding(WORDS, SIZE, mask_zero=True)(inputs))
    normalised = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.MultiHeadAttention(2, SIZE // 2)(normalised, normalised)])
    hidden = layers.Dense(3, "gelu")(layers.LayerNormalization()(x))
    x = layers.LayerNormalization()(layers.Add()([x, layers.Dense(SIZE)(hidden)]))
    return tf.keras.Model(inputs, layers.Dense(2, "softmax")(MaskedMean()(x)))


def test_a_transformer_saved_with_them_loads_and_the_new_one_computes_the_same(tmp_path):
    _transformer_of_old().save(tmp_path / "old.keras")
    old = tf.keras.models.load_model(tmp_path / "old.keras")
    sizes = {"vocabulary_size": WORDS, "embedding_dim": SIZE, "feed_forward_units": 3}
    new = models.build_model("transformer", (STEPS,), 2, mask_zero=True, **sizes)
    tokens, positions, *rest = new.get_weights()
    old.set_weights([tokens, positions[1:], *rest])  # padding has a vector of its own now, which nothing reads
    texts = np.array([[3, 4, 5, 6], [3, 4, 0, 0], [0, 0, 0, 0]], "int32")
    np.testing.assert_allclose(new(texts), old(texts), rtol=1e-5)
