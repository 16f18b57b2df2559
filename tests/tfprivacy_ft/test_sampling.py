"""The sampler's law, and what its edge cases do to a training step. False alarms: at most 1e-6 for each test."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, compile_for_sum, global_norm, layers, trainable_values

from tfprivacy_ft import arrays, sampling
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError
from tfprivacy_ft.sampling import UNKNOWN, Sampling, poisson_batches, repeats_before_batching


def drawn(dataset):
    return [(x.numpy(), y.numpy(), w.numpy()) for x, y, w in dataset]


def test_each_example_takes_part_with_the_same_probability_and_independently():
    n, q, steps = 40, 0.3, 5000
    taken = np.zeros([steps, n], int)
    for step, (x, _, weight) in enumerate(
        drawn(poisson_batches(np.arange(n), np.zeros(n), batch_size=q * n, steps=steps))
    ):
        taken[step, x[weight > 0].astype(int)] += 1
    assert taken.max() == 1
    standard_error = np.sqrt(q * (1 - q) / steps)
    assert np.abs(taken.mean(0) - q).max() < 5.7 * standard_error  # 40 looks at 1.2e-8 each
    variance = taken.sum(1).var() / (n * q * (1 - q))
    assert abs(variance - 1) < 5.5 * np.sqrt(2 / steps)  # a fixed batch size would give 0
    pairs = np.corrcoef(taken.T) - np.eye(n)
    assert np.abs(pairs).max() < 6.5 / np.sqrt(steps)  # 780 pairs at 8e-11 each


def test_every_pass_draws_anew_and_global_seeds_do_not_reach_it():
    batches = []
    for _ in range(2):
        tf.keras.utils.set_random_seed(1)
        dataset = poisson_batches(np.arange(1000), np.zeros(1000), batch_size=500, steps=1)
        batches += [set(x.tolist()) for x, _, _ in drawn(dataset)] + [set(x.tolist()) for x, _, _ in drawn(dataset)]
    assert len({frozenset(b) for b in batches}) == 4


def test_rows_stay_together_in_nested_data():
    x = {"a": np.arange(50), "b": (np.arange(50) * 2.0, np.arange(100).reshape(50, 2))}
    for batch, y, w in poisson_batches(x, np.arange(50) * 3, batch_size=20, steps=5, sample_weight=np.arange(50)):
        a = batch["a"].numpy()
        np.testing.assert_array_equal(batch["b"][0].numpy(), 2 * a)
        np.testing.assert_array_equal(batch["b"][1].numpy(), np.stack([2 * a, 2 * a + 1], 1))
        np.testing.assert_array_equal(y.numpy(), 3 * a)
        np.testing.assert_array_equal(w.numpy(), a)


def test_lists_of_arrays_are_several_inputs_and_padding_is_marked():
    batches = poisson_batches([np.ones([20, 2]), np.ones([20, 3])], np.ones(20), batch_size=10, steps=5, pad_to=16)
    for (a, b), _, weight in batches:
        assert a.shape[1:] == [2] and b.shape[1:] == [3]
        filled = weight.numpy() == 0
        assert np.signbit(weight.numpy()[filled]).all() and not a.numpy()[filled].any()
    zero = poisson_batches(np.ones(9), np.ones(9), batch_size=9, steps=1, sample_weight=np.zeros(9))
    assert not any(np.signbit(w).any() for _, _, w in drawn(zero))  # the user's own zeros are no padding
    with pytest.raises(DatasetError, match="None"):
        poisson_batches(np.ones(9), None, batch_size=3)


@pytest.mark.parametrize(
    "rows",
    [
        np.arange(24).reshape(8, 3).astype("uint8"),
        np.arange(24.0).reshape(3, 8).T,  # not in one piece
        np.arange(48.0).reshape(8, 6)[::-1, ::2],
        np.arange(8) % 2 == 1,
        np.array(["a", "bb", "ccc", "", "d", "e", "f", "g"]),
        np.array([b"a", b"bb", b"ccc", b"", b"d", b"e", b"f", b"g"], object),
    ],
    ids=["uint8", "transposed", "strided", "bool", "text", "objects"],
)
def test_rows_of_every_kind_are_drawn_as_they_are_and_padded_with_nothing(rows):
    order = np.arange(8)
    ((x, index, weight),) = drawn(poisson_batches(rows, order, batch_size=8, steps=1, pad_to=11))
    np.testing.assert_array_equal(index[:8], order)
    np.testing.assert_array_equal(x[:8].astype(rows.dtype), rows)
    assert len(x) == 11 and not weight[8:].any() and not x[8:].any()


def test_tensorflow_reads_a_batch_where_it_was_drawn(monkeypatch):
    """Copies of rows as long as features cost more than a step on them."""
    taken, take = [], sampling.take_rows
    monkeypatch.setattr(sampling, "take_rows", lambda *args, **kwargs: taken.append(take(*args, **kwargs)) or taken[-1])
    x, _, _ = next(iter(poisson_batches(np.ones([300, 50], np.float32), np.ones(300), batch_size=150)))
    taken[0][...] = 7.0
    assert (x.numpy() == 7.0).all()


def test_batches_that_somebody_holds_stay_as_they_were_drawn():
    x = np.arange(4000, dtype=np.float32)[:, None] * np.ones([1, 500], np.float32)
    held = []
    for step, (rows, labels, _) in enumerate(poisson_batches(x, np.arange(4000), batch_size=1000, steps=30)):
        if step % 6 == 0:  # a tensor, or a part of an array
            held.append((rows if step % 12 else rows.numpy()[3:, 7], labels.numpy()[0 if step % 12 else 3 :]))
    for rows, labels in held:
        np.testing.assert_array_equal(np.reshape(rows, [len(labels), -1])[:, 0], labels)


def unchanged(row, seed):
    return row


def inputs_alone(x, y, sample_weight):
    return x


@pytest.mark.parametrize("augment", [None, unchanged])
@pytest.mark.parametrize("read", [iter, lambda batches: iter(batches.map(inputs_alone)), lambda b: b.take(2)])
def test_arrays_live_as_long_as_what_reads_them_and_no_longer(read, augment):
    x = np.ones([100, 3], np.float32)
    seen = weakref.ref(x)
    reader = read(poisson_batches(x, np.ones(100), batch_size=50, augment=augment))
    del x
    gc.collect()
    assert len(list(reader)) == 2
    del reader
    gc.collect()
    assert seen() is None


def test_an_empty_draw_is_one_row_of_weight_zero():
    batches = drawn(poisson_batches(np.ones([10, 3]), np.ones(10), batch_size=1e-9, steps=4))
    assert len(batches) == 4
    for x, _, weight in batches:
        assert x.shape == (1, 3) and not x.any()
        assert weight.tolist() == [0.0]


def test_padding_never_cuts():
    for x, _, weight in drawn(poisson_batches(np.ones([100, 2]), np.ones(100), batch_size=50, steps=20, pad_to=48)):
        assert len(x) % 48 == 0
        assert x[weight > 0].all() and not x[weight == 0].any()
    sizes = [int(w.sum()) for _, _, w in drawn(poisson_batches(np.ones(100), np.ones(100), batch_size=100, pad_to=8))]
    assert sizes == [100]


@pytest.mark.parametrize("pad_to", [None, 16])
def test_fit_on_padded_batches_moves_as_without_padding(pad_to):
    x, y = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32), np.arange(20) % 3
    model = tf.keras.Sequential([layers.Input((4,)), layers.Dense(3, kernel_initializer="ones")])
    compile_for_sum(model, CrossEntropy(from_logits=True), 0.1)
    before = trainable_values(model)
    model.fit(poisson_batches(x, y, batch_size=20, steps=1, pad_to=pad_to), verbose=0)
    released = [b - a for b, a in zip(before, trainable_values(model), strict=True)]
    other = tf.keras.Sequential([layers.Input((4,)), layers.Dense(3, kernel_initializer="ones")])
    compile_for_sum(other, CrossEntropy(from_logits=True), 0.1)
    other.fit(x, y, batch_size=20, verbose=0)
    for r, b, a in zip(released, before, trainable_values(other), strict=True):
        np.testing.assert_allclose(r, b - a, atol=1e-5)


def test_an_empty_draw_is_a_step_that_moves_nothing_but_by_noise():
    model = tf.keras.Sequential([layers.Input((4,)), layers.Dense(3)])
    compile_for_sum(model, CrossEntropy(from_logits=True), 0.1)
    before = trainable_values(model)
    model.fit(poisson_batches(np.ones([5, 4], "float32"), np.ones(5), batch_size=1e-9, steps=3), verbose=0)
    assert global_norm([b - a for b, a in zip(before, trainable_values(model), strict=True)]) == 0
    assert model.optimizer.privacy_steps == 3


@pytest.mark.parametrize(
    ("x", "y", "error", "sentence"),
    [
        (np.ones([3, 2]), np.ones(4), DatasetError, r"\[3, 4\] examples"),
        (np.ones([0, 2]), np.ones(0), DatasetError, "no examples"),
        (np.float32(1.0), np.ones(1), DatasetError, "first axis"),
    ],
)
def test_bad_data_gets_one_sentence(x, y, error, sentence):
    with pytest.raises(error, match=sentence):
        poisson_batches(x, y, batch_size=1)


@pytest.mark.parametrize("arguments", [{"batch_size": 11}, {"batch_size": 0}, {"batch_size": float("nan")}])
def test_bad_batch_sizes_get_one_sentence(arguments):
    with pytest.raises(InvalidArgumentError, match="batch_size="):
        poisson_batches(np.ones(10), np.ones(10), **arguments)
    with pytest.raises(InvalidArgumentError, match="pad_to=0"):
        poisson_batches(np.ones(10), np.ones(10), batch_size=2, pad_to=0)
    with pytest.raises(InvalidArgumentError, match="steps=0"):
        poisson_batches(np.ones(10), np.ones(10), batch_size=2, steps=0)


def test_names_in_the_accounts():
    common = {"noise_multiplier": 1.0, "l2_norm_clip": 1.0}
    poisson = Sampling("poisson", 100, 0.1).event(7, **common)
    assert (poisson.sampler, poisson.sampling_probability, poisson.count) == ("poisson", 0.1, 7)
    shuffled = Sampling("shuffled", 100, pass_length=10).event(25, **common)
    assert (shuffled.count, shuffled.participations) == (25, 3)
    assert UNKNOWN.event(5, **common).participations == 5


ROWS = tf.data.Dataset.from_tensor_slices((np.ones([20, 2]), np.ones(20)))


@pytest.mark.parametrize(
    ("repeats", "dataset"),
    [
        (True, ROWS.repeat().shuffle(10).batch(5)),
        (True, ROWS.shuffle(10).repeat(3).batch(5).prefetch(1)),
        (True, ROWS.repeat().batch(5, num_parallel_calls=2).map(lambda *row: row).take(3)),
        (True, ROWS.repeat().padded_batch(5)),
        (True, ROWS.batch(4).repeat().unbatch().batch(5)),
        (True, tf.data.Dataset.zip((ROWS, ROWS.repeat())).batch(5)),
        (True, ROWS.batch(4).concatenate(ROWS.repeat().batch(4))),
        (False, ROWS.shuffle(10).batch(5).repeat()),
        (False, ROWS.batch(5).repeat().with_options(tf.data.Options()).prefetch(1)),
        (False, ROWS.batch(5).cache().map(lambda *row: row)),
        (False, poisson_batches(np.ones([10, 2]), np.ones(10), batch_size=2).repeat()),
    ],
)
def test_rows_that_are_repeated_before_they_are_batched_are_seen(repeats, dataset):
    assert repeats_before_batching(dataset) == repeats


def test_a_batch_of_everybody_is_the_array_itself_and_training_leaves_it_as_it_is():
    x = arrays.aligned(np.dtype(np.float32), (32, 3))
    x[:] = np.random.default_rng(0).normal(size=x.shape)
    before = x.copy()
    ((batch, _, _),) = poisson_batches(x, np.zeros(32), batch_size=32)
    assert np.asarray(memoryview(batch)).ctypes.data == x.ctypes.data  # no copy of what may be a gigabyte
    forget = tf.function(lambda rows: tf.nn.relu(rows * 0.0) + 1.0)  # which would do for an operation in place
    forget(batch)
    np.testing.assert_array_equal(x, before)
    (batch,) = poisson_batches(x, np.zeros(32), batch_size=32).map(lambda rows, y, w: rows * 0.0)
    np.testing.assert_array_equal(batch, 0 * before)
    np.testing.assert_array_equal(x, before)
