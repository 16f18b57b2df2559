"""The models whose steps `step_time.py` times, each with random data of its kind."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfprivacy_ft.models import build_model

layers = tf.keras.layers
WORDS, LENGTH, WIDTH = 20_000, 64, 128


class Work(NamedTuple):
    """A model, and what a batch of it looks like."""

    title: str
    build: Callable[[], Any]
    inputs: Callable[[np.random.Generator, int], np.ndarray]
    targets: dict[int, float]  # batch size -> the most that a private step may take, in plain ones


class LowRank(layers.Layer):
    """A frozen kernel and a trained pair of rank 8 beside it (LoRA, Hu et al. 2021), on both versions of Keras."""

    def __init__(self, units, rank=8):
        super().__init__()
        self.units, self.rank = units, rank

    def build(self, shape):
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1], self.units), trainable=False)
        self.down = self.add_weight(name="down", shape=(shape[-1], self.rank))
        self.up = self.add_weight(name="up", shape=(self.rank, self.units))

    def call(self, inputs):
        kernel, down, up = (tf.convert_to_tensor(v) for v in (self.kernel, self.down, self.up))
        return tf.nn.relu(tf.matmul(inputs, kernel + tf.matmul(down, up)))


def images(*shape):
    return lambda random, batch: random.uniform(-1, 1, (batch, *shape)).astype(np.float32)


def tokens(random, batch):
    return random.integers(0, WORDS, (batch, LENGTH)).astype(np.int32)


def mlp(width=512, depth=2):
    return lambda: build_model("mlp", (784,), 10, hidden_units=(width,) * depth)


def transformer():
    inputs = layers.Input((LENGTH,), dtype="int32")
    hidden = layers.Embedding(1000, WIDTH)(inputs)
    hidden = layers.LayerNormalization()(hidden + layers.MultiHeadAttention(4, WIDTH // 4)(hidden, hidden))
    inner = layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, "relu")(hidden))
    hidden = layers.LayerNormalization()(hidden + inner)
    return tf.keras.Model(inputs, layers.Dense(10, "softmax")(layers.GlobalAveragePooling1D()(hidden)))


def embedding():
    inputs = layers.Input((LENGTH,), dtype="int32")
    hidden = layers.GlobalAveragePooling1D()(layers.Embedding(WORDS, 16)(inputs))
    return tf.keras.Model(inputs, layers.Dense(10, "softmax")(hidden))


def head():
    model = build_model("cnn", (28, 28, 1), 10)
    for layer in model.layers[:-1]:
        layer.trainable = False
    return model


def low_rank():
    inputs = layers.Input((784,))
    hidden = LowRank(512)(LowRank(512)(inputs))
    frozen = layers.Dense(10, "softmax", trainable=False)
    return tf.keras.Model(inputs, frozen(hidden))


WORKS = {
    "mlp": Work("MLP 784-512-512-10", mlp(), images(784), {256: 1.7, 1024: 1.2}),
    "cnn": Work("CNN", lambda: build_model("cnn", (28, 28, 1), 10), images(28, 28, 1), {256: 1.6, 1024: 1.5}),
    "transformer": Work(
        "transformer block, T=64, d=128",
        transformer,
        lambda random, batch: tokens(random, batch) % 1000,
        {256: 1.3, 1024: 1.25},
    ),
    "embedding": Work("embedding 20k x 16, mean, dense", embedding, tokens, {256: 2.0, 1024: 1.5}),
    "head": Work("frozen CNN, trained head", head, images(28, 28, 1), {256: 1.1, 1024: 1.1}),
    "low_rank": Work("frozen MLP, pairs of rank 8", low_rank, images(784), {256: 1.1, 1024: 1.1}),
}
