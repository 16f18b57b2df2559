"""Weights that are computed from variables before they meet data: low-rank pairs, normalised and split kernels."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, assert_exact, labels, layers, rows

from tfprivacy_ft.clipping import weights
from tfprivacy_ft.keras_compat import IS_KERAS_3, keras

LOGITS = CrossEntropy(from_logits=True)


class Computed(keras.Model):
    """Inputs times a kernel that `kernel(a, b)` makes of two variables, then a head."""

    def __init__(self, kernel, shape_a, shape_b, multiply=tf.matmul):
        super().__init__()
        self.kernel, self.shapes, self.multiply = kernel, (shape_a, shape_b), multiply
        self.frozen = tf.constant(np.random.default_rng(5).normal(size=(5, 6)).astype(np.float32))
        self.head = layers.Dense(4)

    def build(self, shape):
        normal = keras.initializers.RandomNormal(seed=3)
        self.a = self.add_weight(name="a", shape=self.shapes[0], initializer=normal)
        self.b = self.add_weight(name="b", shape=self.shapes[1], initializer=normal)

    def call(self, inputs):
        made = self.kernel(self.frozen, tf.convert_to_tensor(self.a), tf.convert_to_tensor(self.b))
        return self.head(tf.tanh(self.multiply(inputs, made)))


KERNELS = {
    "low_rank": (lambda w, a, b: w + 2.0 * tf.matmul(a, b), (5, 2), (2, 6)),
    "low_rank_of_transposes": (lambda w, a, b: w + tf.matmul(a, b, transpose_a=True, transpose_b=True), (2, 5), (6, 2)),
    "transposed_product": (lambda w, a, b: tf.transpose(tf.matmul(b, a)) + w, (2, 5), (6, 2)),
    "normalised": (lambda w, a, b: a / tf.norm(a, axis=0, keepdims=True) * b, (5, 6), (6,)),
    "of_itself": (lambda w, a, b: tf.matmul(a, a, transpose_b=True) @ w + b, (5, 5), (6,)),
    "split": (lambda w, a, b: tf.split(a, 2, axis=1)[1] + b[0], (5, 12), (1,)),
    "joined": (lambda w, a, b: tf.concat([a, b], 1), (5, 4), (5, 2)),
    "of_three_products": (lambda w, a, b: tf.matmul(tf.matmul(a, tf.tanh(b)), tf.transpose(a)) @ w, (5, 2), (2, 2)),
}


class Heads(Computed):
    """A projection to two heads whose kernel is multiplied along its last axis, before it is added up to one of three axes."""

    def __init__(self):
        def kernel(w, a, b):
            return tf.reshape(w[:, :6], (5, 2, 3)) + 2.0 * tf.tensordot(a, b, 1)

        super().__init__(kernel, (5, 2, 2), (2, 3), lambda x, w: tf.reduce_mean(tf.einsum("btd,dhk->bthk", x, w), 2))


def test_a_low_rank_projection_to_heads_forms_no_gradient_of_the_kernel(monkeypatch):
    formed = []
    monkeypatch.setattr(weights, "PulledBack", lambda *arguments: formed.append(arguments))
    assert_exact(Heads(), LOGITS, rows(3, 5), labels(3), fast=True)
    assert not formed


@pytest.mark.parametrize("static_batch", [False, True], ids=["any_batch", "static_batch"])
@pytest.mark.parametrize("name", KERNELS)
def test_equals_a_loop_over_examples(name, static_batch):
    assert_exact(Computed(*KERNELS[name]), LOGITS, rows(5), labels(), fast=True, static_batch=static_batch)


def test_a_variable_that_is_used_as_it_is_and_in_a_product():
    def both(inputs, made):
        return tf.matmul(inputs, made) + tf.reduce_sum(made) * inputs[:, :1]

    model = Computed(lambda w, a, b: tf.matmul(a, b), (5, 2), (2, 6), both)
    assert_exact(model, LOGITS, rows(5), labels(), fast=True)


def test_a_variable_that_one_op_reads_twice():
    def chosen(inputs, made):
        return tf.where(inputs[:, :1] > 0, made, made)

    model = Computed(lambda w, a, b: tf.identity(b), (5, 2), (6,), chosen)
    assert_exact(model, LOGITS, rows(5), labels(), fast=False)


def test_over_time_by_xla():
    shape = (5, 2), (2, 6)
    model = Computed(lambda w, a, b: w + tf.matmul(a, b), *shape, lambda x, k: tf.reduce_mean(x @ k, 1))
    assert_exact(model, LOGITS, rows(3, 5), labels(), fast=True, jit_compile=True)


def test_an_embedding_with_a_low_rank_pair():
    table = Computed(
        lambda w, a, b: 0.5 * tf.matmul(a, b), (9, 2), (2, 6), lambda x, k: tf.reduce_sum(tf.gather(k, x), 1)
    )
    assert_exact(table, LOGITS, labels(6, classes=9), labels(), fast=True)


def test_the_frozen_part_of_a_low_rank_pair_stays():
    model = Computed(*KERNELS["low_rank"])
    before = model.frozen.numpy()
    assert_exact(model, LOGITS, rows(5), labels(), fast=True)
    np.testing.assert_array_equal(model.frozen.numpy(), before)


ADAPTED = {
    "dense": (layers.Dense(5, "tanh"), rows(5)),
    "dense_over_time": (layers.Dense(5, "tanh"), rows(6, 3)),
    "einsum_dense": (layers.EinsumDense("abc,cde->abde", (6, 2, 5)), rows(6, 3)),
    "embedding": (layers.Embedding(9, 5), labels(6, classes=9)),
    "convolution": (layers.Conv2D(4, 3), rows(6, 6, 2)),
}


@pytest.mark.skipif(not IS_KERAS_3, reason="enable_lora is of Keras 3")
@pytest.mark.parametrize("name", ADAPTED)
def test_keras_own_low_rank_pairs(name):
    layer, x = ADAPTED[name]
    inputs = layers.Input(x.shape[1:], dtype=x.dtype)
    model = keras.Model(inputs, layers.Dense(4)(layers.Flatten()(layer(inputs))))
    layer.enable_lora(2)
    random = np.random.default_rng(1)
    for variable in layer.trainable_variables:  # one of each pair begins as zeros, where nothing would be learned
        variable.assign(random.normal(size=variable.shape))
    assert_exact(model, LOGITS, x, labels(), fast=True)
