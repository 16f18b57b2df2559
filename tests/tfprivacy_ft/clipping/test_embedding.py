"""Embedding tables: tokens that repeat, tables that are read in several places, and tied to an output projection."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_exact, labels

from tfprivacy_ft.clipping.embedding import Lookups, TiedTable
from tfprivacy_ft.clipping.products import matrices
from tfprivacy_ft.clipping.sites import keep_rows
from tfprivacy_ft.keras_compat import keras

layers = tf.keras.layers
LOGITS = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
VOCABULARY, WIDTH, LENGTH = 11, 5, 6


class Tied(keras.Model):
    """One table for reading tokens, perhaps twice, and for scoring them, perhaps twice."""

    def __init__(self, reads=1, scores=1, last_token_only=False):
        super().__init__()
        self.table, self.middle = layers.Embedding(VOCABULARY, WIDTH), layers.Dense(WIDTH, "tanh")
        self.reads, self.scores, self.last_token_only = reads, scores, last_token_only

    def call(self, tokens):
        hidden = self.table(tokens)
        for _ in range(self.reads - 1):
            hidden = hidden + 0.5 * self.table((tokens * 3 + 1) % VOCABULARY)
        hidden = self.middle(hidden[:, -1] if self.last_token_only else hidden)
        table = tf.convert_to_tensor(self.table.embeddings)
        scores = tf.matmul(hidden, table, transpose_b=True)
        for _ in range(self.scores - 1):
            scores = scores + tf.matmul(tf.square(hidden), table, transpose_b=True)
        return scores


@pytest.mark.parametrize(
    "options",
    [{}, {"reads": 2}, {"scores": 2}, {"reads": 2, "scores": 2}, {"last_token_only": True}],
    ids=["once", "read twice", "scored twice", "both twice", "last token"],
)
def test_a_tied_table_is_one_gradient(options):
    y = labels(classes=VOCABULARY, seed=3) if options.get("last_token_only") else labels(LENGTH, classes=VOCABULARY)
    assert_exact(Tied(**options), LOGITS, labels(LENGTH, classes=VOCABULARY, seed=4), y, fast=True)


def _table(random, batch, length, steps, vocabulary=40, width=30):
    """Lookups and products of a table, and what they add up to."""
    indices = random.integers(0, vocabulary // 4, (batch, length))  # so that some repeat
    gradient, inputs, outputs = (
        random.normal(size=(batch, *shape)) for shape in ((length, width), (steps, vocabulary), (steps, width))
    )
    each = np.einsum("bsv,bsd->bvd", inputs, outputs)
    for i in range(batch):
        np.add.at(each[i], indices[i], gradient[i])
    lookups = Lookups(tf.constant(indices, tf.int32), tf.constant(gradient, tf.float32), vocabulary, length)
    return lookups, matrices(tf.constant(inputs, tf.float32), tf.constant(outputs, tf.float32), steps), each


@pytest.mark.parametrize("products_first", [False, True])
def test_norms_and_sums_of_a_tied_table_are_those_of_the_formed_gradients(products_first):
    lookups, products, each = _table(np.random.default_rng(0), batch=5, length=7, steps=3)
    tied = products.added_to(lookups) if products_first else lookups.added_to(products)
    assert isinstance(tied, TiedTable)
    np.testing.assert_allclose(tied.squared_norms(), np.square(each).sum((1, 2)), rtol=1e-4)
    weights = tf.constant([0.5, 0.0, 1.0, 2.0, 0.1])
    expected = np.einsum("bvd,b->vd", each, weights)
    np.testing.assert_allclose(tied.weighted_sum(tied.parts(), weights), expected, rtol=1e-4, atol=1e-4)
    blanked = [keep_rows(part, tf.constant([True, True, True, False, True])) for part in tied.parts()]
    expected -= 2.0 * each[3]
    np.testing.assert_allclose(tied.weighted_sum(blanked, weights), expected, rtol=1e-4, atol=1e-4)


def test_a_table_far_too_large_to_be_formed_for_each_example():
    """32 gradients of it would take 6.5 GB."""
    batch, vocabulary, width, random = 32, 400_000, 128, np.random.default_rng(1)
    tokens = tf.constant(random.integers(0, vocabulary, (batch, 2)), tf.int32)
    gradient = tf.constant(random.normal(size=(batch, 2, width)), tf.float32)
    inputs = tf.one_hot(random.integers(0, vocabulary, (batch, 1)), vocabulary)
    outputs = tf.constant(random.normal(size=(batch, 1, width)), tf.float32)
    tied = Lookups(tokens, gradient, vocabulary, 2).added_to(matrices(inputs, outputs, 1))
    expected = np.square(gradient).sum((1, 2)) + np.square(outputs).sum((1, 2))  # no example names a row twice
    np.testing.assert_allclose(tied.squared_norms(), expected, rtol=1e-4)


def test_norms_of_a_tied_table_never_fall_below_where_its_uses_cancel():
    batch, vocabulary, width, random = 300, 50, 16, np.random.default_rng(2)
    token = random.integers(0, vocabulary, (batch, 1))
    gradient = random.normal(size=(batch, 1, width)).astype(np.float32)
    inputs = np.eye(vocabulary, dtype=np.float32)[token]
    outputs = (-gradient * (1 + 1e-4 * random.normal(size=gradient.shape))).astype(np.float32)
    tied = Lookups(tf.constant(token, tf.int32), tf.constant(gradient), vocabulary, 1).added_to(
        matrices(tf.constant(inputs), tf.constant(outputs), 1)
    )
    true = np.square(gradient.astype(np.float64) + outputs).sum((1, 2))
    assert (tied.squared_norms().numpy() >= true * (1 - 1e-4)).all()


@pytest.mark.parametrize("length", [1, 6, 300])
@pytest.mark.parametrize("known", [False, True])
def test_rows_that_an_example_names_several_times_are_added_up_first(length, known):
    random = np.random.default_rng(3)
    indices, gradient = random.integers(0, 9, (4, length)), random.normal(size=(4, length, 3))
    each = np.zeros((4, 9, 3))
    for i in range(4):
        np.add.at(each[i], indices[i], gradient[i])
    lookups = Lookups(tf.constant(indices, tf.int32), tf.constant(gradient, tf.float32), 9, length if known else None)
    np.testing.assert_allclose(lookups.squared_norms(), np.square(each).sum((1, 2)), rtol=1e-5)
