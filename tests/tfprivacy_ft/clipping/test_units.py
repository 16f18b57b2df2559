"""Several rows that are one example: one clip for the gradient of the loss that Keras gives them together."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, assert_same, compile_for_sum, global_norm, layers, released_sum, trainable_values

from tfprivacy_ft.clipping import reference
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer
from tfprivacy_ft.plan import PrivacyPlan
from tfprivacy_ft.sampling import poisson_batches

keras = tf.keras
LOGITS = CrossEntropy(from_logits=True)
K, UNITS = 3, 4
TOGETHER = {"rows_per_example": K}


def rows(*shape):
    return np.random.default_rng(0).normal(size=(K * UNITS, *shape)).astype(np.float32)


def labels(*shape, classes=4):
    return np.random.default_rng(1).integers(0, classes, (K * UNITS, *shape))


def model_of(shape, *parts):
    return keras.Sequential([layers.Input(shape), *parts])


CASES = {
    "dense": (lambda: model_of((5,), layers.Dense(6, "tanh"), layers.Dense(4)), rows(5), labels()),
    "over_time": (
        lambda: model_of((6, 3), layers.Dense(5, "tanh"), layers.LayerNormalization(), layers.Dense(4)),
        rows(6, 3), labels(6),
    ),
    "images": (
        lambda: model_of((8, 8, 1), layers.Conv2D(4, 3, activation="tanh"), layers.Flatten(), layers.Dense(4)),
        rows(8, 8, 1), labels(),
    ),
    "tokens": (
        lambda: model_of((6,), layers.Embedding(9, 3), layers.GlobalAveragePooling1D(), layers.Dense(4)),
        labels(6, classes=9), labels(),
    ),
    "slow": (lambda: model_of((6, 3), layers.LSTM(5), layers.Dense(4)), rows(6, 3), labels()),
}  # fmt: skip


def by_unit(model, loss, x, y, weights=None):
    """The gradient of each K rows' loss."""
    result = []
    for start in range(0, len(y), K):
        part = slice(start, start + K)
        with tf.GradientTape() as tape:
            value = loss(y[part], model(x[part], training=True), None if weights is None else weights[part])
        result.append(tape.gradient(value, model.trainable_variables))
    return [[tf.convert_to_tensor(g) for g in each] for each in result]


@pytest.mark.parametrize("static_batch", [False, True], ids=["any_batch", "static_batch"])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_examples_of_several_rows(name, static_batch):
    build, x, y = CASES[name]
    model = build()
    each = by_unit(model, LOGITS, x, y)
    clip = float(np.median([reference.norm(g) for g in each]))
    released = released_sum(model, LOGITS, x, y, clip, static_batch=static_batch, private=TOGETHER)
    assert_same(released, reference.clipped_sum(each, clip))


@pytest.mark.parametrize("name", ["dense", "slow"])
def test_one_example_moves_the_sum_by_at_most_the_clip(name):
    build, x, y = CASES[name]

    def huge(true, predicted):
        return 1e6 * keras.losses.sparse_categorical_crossentropy(true, predicted, from_logits=True)

    released = released_sum(build(), huge, x[:K], y[:K], 0.5, private=TOGETHER)
    assert 0.4 < global_norm(released) <= 0.5 * (1 + 1e-4)


def test_weights_and_the_denominator():
    build, x, y = CASES["dense"]
    model = build()
    weights = np.linspace(0, 2, K * UNITS).astype(np.float32)
    each = by_unit(model, LOGITS, x, y, weights)
    clip = float(np.median([reference.norm(g) for g in each]))
    settings = {**TOGETHER, "expected_batch_size": None}
    released = released_sum(model, LOGITS, x, y, clip, sample_weight=weights, private=settings)
    assert_same([UNITS * r for r in released], reference.clipped_sum(each, clip))


def test_under_xla():
    build, x, y = CASES["dense"]
    model = build()
    each = by_unit(model, LOGITS, x, y)
    released = released_sum(model, LOGITS, x, y, 0.3, private=TOGETHER, jit_compile=True)
    assert_same(released, reference.clipped_sum(each, 0.3))


@pytest.mark.parametrize("name", ["dense", "slow"])
def test_a_part_of_an_example_is_refused(name):
    build, x, y = CASES[name]
    model = compile_for_sum(build(), LOGITS, 1.0, private=TOGETHER)
    batches = tf.data.Dataset.from_generator(
        lambda: [(x[: K + 1], y[: K + 1])],
        output_signature=(tf.TensorSpec([None, *x.shape[1:]]), tf.TensorSpec([None], tf.int64)),
    )
    before = trainable_values(model)
    with pytest.raises(tf.errors.InvalidArgumentError, match="rows_per_example=3"):
        model.fit(batches, verbose=0)
    fresh = compile_for_sum(build(), LOGITS, 1.0, private=TOGETHER)
    with pytest.raises(UnsupportedModelError, match="the batch has 4 rows"):
        fresh.fit(tf.data.Dataset.from_tensors((x[: K + 1], y[: K + 1])), verbose=0)
    for now, then in zip(trainable_values(model), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_the_sampler_draws_whole_examples():
    x, y = np.arange(60), np.repeat(np.arange(20), K)
    for a, b, w in poisson_batches(x, y, batch_size=5, rows_per_example=K, accumulation_steps=2, pad_to=4):
        assert len(a) % (4 * K) == 0
        drawn = a.numpy()[w.numpy() > 0]
        np.testing.assert_array_equal(drawn, np.add.outer(K * np.unique(drawn // K), np.arange(K)).reshape(-1))
        np.testing.assert_array_equal(b.numpy()[w.numpy() > 0], drawn // K)
    assert int(poisson_batches(x, y, batch_size=5, rows_per_example=K).cardinality()) == 4
    with pytest.raises(DatasetError, match="59 rows, which is no multiple of rows_per_example=3"):
        poisson_batches(x[1:], y[1:], batch_size=5, rows_per_example=K)


def test_a_plan_counts_examples_and_refuses_to_tear_them_apart():
    settings = {"num_examples": 20, "batch_size": 5, "epochs": 1, "delta": 1e-3, "noise_multiplier": 2.0}
    plan = PrivacyPlan(**settings, rows_per_example=K)
    model = model_of((2,), layers.Dense(3))
    model.compile(plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0), LOGITS)
    x, y = np.ones([60, 2], np.float32), np.zeros(60)
    model.fit(plan.batches(x, y), callbacks=plan.callbacks(), verbose=0)
    (event,) = plan.ledger.events()
    assert (event.count, event.sampling_probability, event.population) == (4, 0.25, 20)
    with pytest.raises(InvalidArgumentError, match=r"plan\.batches"):
        model.fit(x, y, callbacks=plan.callbacks(), verbose=0)
    with pytest.raises(InvalidArgumentError, match="rows_per_example=1 and the plan rows_per_example=3"):
        plan.attach(DPKerasSGDOptimizer(1.0, 2.0))
    with pytest.raises(InvalidArgumentError, match="rows_per_example=0"):
        DPKerasSGDOptimizer(1.0, 2.0, rows_per_example=0)
