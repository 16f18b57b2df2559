"""Augmented rows: made of one example each, kept together, averaged before the clip. Seeds are fixed where draws are counted."""

import warnings

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, assert_same, global_norm, layers, released_sum, trainable_values

from tfprivacy_ft.augmentation import Chain, RandomFlip, RandomShift, augmented_rows
from tfprivacy_ft.clipping import reference
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer
from tfprivacy_ft.plan import PrivacyPlan
from tfprivacy_ft.sampling import PADDING, poisson_batches

keras = tf.keras
LOGITS = CrossEntropy(from_logits=True)
K, N = 3, 6
X = np.random.default_rng(0).normal(size=(N, 6, 5, 1)).astype(np.float32)
Y = np.arange(N) % 4


def jitter(example, seed):
    return example + tf.random.stateless_normal(tf.shape(example), seed)


def small_model():
    return keras.Sequential([layers.Input(X.shape[1:]), layers.Flatten(), layers.Dense(3, "tanh"), layers.Dense(4)])


def images_by(augment, image, count=200):
    return augmented_rows(image[np.newaxis], [0], augment, count, seed=7)[0]


def test_a_shift_is_one_of_all_windows_of_the_mirrored_image():
    image = X[0]
    wide = np.pad(image, [(1, 1), (1, 1), (0, 0)], mode="symmetric")
    windows = [wide[i : i + 6, j : j + 5] for i in range(3) for j in range(3)]
    found = [[np.array_equal(made, window) for window in windows] for made in images_by(RandomShift(1), image)]
    assert {sum(each) for each in found} == {1} and np.any(found, 0).all()


def test_a_flip_mirrors_some_and_a_chain_draws_for_each_of_its_steps():
    image = X[0]
    flipped = [np.array_equal(made, image[:, ::-1]) for made in images_by(RandomFlip(), image, 40)]
    kept = [np.array_equal(made, image) for made in images_by(RandomFlip(), image, 40)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True)) and 5 < sum(flipped) < 35
    # With one seed for both steps the second would always undo the first.
    assert any(np.array_equal(m, image[:, ::-1]) for m in images_by(Chain((RandomFlip(), RandomFlip())), image, 20))
    chained = images_by(Chain((jitter, RandomFlip(), jitter)), image, 20)
    assert len(np.unique(chained)) == chained.size  # a function in a chain has draws of its own for each row
    single = RandomShift(2)(tf.constant(image), tf.constant([1, 2], tf.int64))
    assert single.shape == image.shape and set(np.unique(single)) <= set(np.unique(image))


def test_rows_of_an_example_stay_together_and_are_made_of_it_alone():
    shapes = []

    def augment(example, seed):
        shapes.append((tuple(example["a"].shape), tuple(seed.shape)))
        return {"a": example["a"] + tf.random.stateless_uniform([2], seed, dtype=tf.float64), "b": example["b"]}

    x = {"a": np.repeat(100.0 * np.arange(400)[:, None], 2, 1), "b": np.arange(400, dtype=np.uint8)}
    rows, labels = augmented_rows(x, (np.arange(400), -np.arange(400)), augment, K, seed=1)
    np.testing.assert_array_equal(rows["a"] // 100, np.repeat(np.repeat(np.arange(400), K)[:, None], 2, 1))
    np.testing.assert_array_equal(rows["b"], np.repeat(x["b"], K))
    np.testing.assert_array_equal(labels[0], -labels[1])
    np.testing.assert_array_equal(labels[0], np.repeat(np.arange(400), K))
    assert len(np.unique(rows["a"])) == 2 * 400 * K and set(shapes) == {((2,), (2,))}
    assert (rows["a"].dtype, rows["b"].dtype) == (np.float64, np.uint8)


def test_a_seed_makes_the_same_rows_and_none_makes_others():
    def rows(seed):
        return augmented_rows(X, Y, jitter, K, seed=seed)[0]

    np.testing.assert_array_equal(rows(5), rows(5))
    assert not np.array_equal(rows(5), rows(6)) and not np.array_equal(rows(None), rows(None))


def test_batches_are_augmented_anew_in_every_step():
    weights = np.linspace(1, 2, N)
    batches = poisson_batches(
        X, Y, batch_size=3, steps=8, sample_weight=weights, rows_per_example=K, pad_to=4, augment=jitter
    )
    assert int(batches.cardinality()) == 8
    seen = []
    for x, y, weight in batches:
        x, y, weight = x.numpy(), y.numpy().reshape(-1, K), weight.numpy().reshape(-1, K)
        assert len(y) % 4 == 0 and (y == y[:, :1]).all() and (weight == weight[:, :1]).all()
        real = weight[:, 0] > 0
        assert np.signbit(weight[~real]).all() and (weight[~real] == PADDING).all()
        drawn = np.searchsorted(weights.astype(np.float32), weight[real, 0])
        np.testing.assert_array_equal(y[real, 0], Y[drawn])
        noise = x.reshape(-1, K, *X.shape[1:])[real] - X[drawn][:, None]
        seen += list(noise.reshape(-1))
    assert len(np.unique(np.round(seen, 5))) > 0.97 * len(seen)  # no row has the seed of another


def test_ready_made_ones_draw_anew_in_every_step_too():
    batches = poisson_batches(X, Y, batch_size=N, steps=3, augment=RandomShift(2))
    assert len({x.numpy().tobytes() for x, _, _ in batches}) == 3  # by chance fewer: 3 pairs at 25^-6 each


def test_an_example_is_clipped_once_over_the_mean_of_its_rows():
    model = small_model()
    (x, y, _), *_ = poisson_batches(X, Y, batch_size=N, steps=1, rows_per_example=K, augment=jitter)
    each = reference.per_example_gradients(model, LOGITS, x.numpy(), y.numpy())
    means = [[sum(parts) / K for parts in zip(*each[i : i + K], strict=True)] for i in range(0, N * K, K)]
    clip = float(np.median([reference.norm(mean) for mean in means]))
    released = released_sum(model, LOGITS, x.numpy(), y.numpy(), clip, private={"rows_per_example": K})
    assert_same(released, reference.clipped_sum(means, clip))


def test_a_plan_draws_augments_and_accounts_for_examples():
    def wild(example, seed):
        return 1e4 * jitter(example, seed)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no noise
        plan = PrivacyPlan(1, 1, 1, 1e-3, 0.0, rows_per_example=K)
    model = small_model()
    model.compile(plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=0.5, learning_rate=1.0), LOGITS)
    before = trainable_values(model)
    model.fit(plan.batches(X[:1], Y[:1], augment=wild), callbacks=plan.callbacks(), verbose=0)
    moved = [b - a for b, a in zip(before, trainable_values(model), strict=True)]
    assert 0.4 < global_norm(moved) <= 0.5 * (1 + 1e-4)
    (event,) = plan.ledger.events()
    assert (event.sampler, event.population, event.count) == ("poisson", 1, 1)
    with pytest.raises(InvalidArgumentError, match="x holds 2 examples"):
        plan.batches(X[:2], Y[:2], augment=wild)


def test_bad_arguments_get_one_sentence():
    with pytest.raises(InvalidArgumentError, match="pixels=0"):
        RandomShift(0)
    with pytest.raises(InvalidArgumentError, match="pixels=6 is not allowed: give at most the image's smaller side=5"):
        augmented_rows(X, Y, RandomShift(6), 2)
    for rows, shape in ((X[..., 0], r"the shape \[6, 5\]"), ({"a": X}, "several parts")):
        with pytest.raises(InvalidArgumentError, match=f"RandomFlip is for images .* and an example has {shape}"):
            augmented_rows(rows, Y, RandomFlip(), 2)
    with pytest.raises(InvalidArgumentError, match=r"augment='flip' .* such as RandomShift"):
        augmented_rows(X, Y, "flip", 2)
    with pytest.raises(InvalidArgumentError, match=r"makes float32\[30\] of an example that is float32\[6, 5, 1\]"):
        poisson_batches(X, Y, batch_size=2, augment=lambda image, seed: tf.reshape(image, [-1]))
    with pytest.raises(InvalidArgumentError, match="augmentations=0"):
        augmented_rows(X, Y, RandomFlip(), 0)
    with pytest.raises(DatasetError):
        augmented_rows(X, Y[1:], RandomFlip(), 2)
