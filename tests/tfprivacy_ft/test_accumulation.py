"""Gradient accumulation: k micro-batches are one step, with one noise, one count, and no data of any other step."""

import warnings

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, assert_same, compile_for_sum, layers, trainable_values

from tfprivacy_ft.errors import BudgetExceededError, InvalidArgumentError
from tfprivacy_ft.events import Event
from tfprivacy_ft.optimizers import DPKerasAdamOptimizer, DPKerasSGDOptimizer
from tfprivacy_ft.plan import PrivacyPlan
from tfprivacy_ft.sampling import poisson_batches

keras = tf.keras
LOGITS = CrossEntropy(from_logits=True)
N, BATCH, DELTA, CLIP = 120, 20, 1e-4, 0.5
X = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, N)


def make_model():
    return keras.Sequential([layers.Input((5,)), layers.Dense(4, "tanh", kernel_regularizer="l2"), layers.Dense(3)])


def make_plan(**changes):
    settings = {
        "num_examples": N, "batch_size": BATCH, "epochs": 3, "delta": DELTA, "noise_multiplier": 2.0, "accumulation_steps": 2,
    }  # fmt: skip
    return PrivacyPlan(**{**settings, **changes})


def planned_model(plan, **compile_options):
    model = make_model()
    model.compile(plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=CLIP, learning_rate=0.1), LOGITS, **compile_options)
    return model


def quiet_model(plan_of=make_plan, **plan_options):
    """A plan without noise, and a model whose steps subtract clipped sums divided by the batch size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = plan_of(noise_multiplier=0.0, **plan_options)
    return plan, planned_model(plan)


def after_whole_batches(start, *batches):
    """The weights after ordinary steps on these slices of the data."""
    model = make_model()
    model.set_weights(start)
    model.compile(DPKerasSGDOptimizer(CLIP, 0.0, learning_rate=0.1, expected_batch_size=BATCH), LOGITS)
    for part in batches:
        model.train_on_batch(X[part], Y[part])
    return trainable_values(model)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("expected", [None, 17.0])
def test_micro_batches_equal_the_whole_batch(jit, expected):
    start, results = make_model().get_weights(), []
    for size, steps in ((24, 1), (8, 3)):
        model = make_model()
        model.set_weights(start)
        optimizer = DPKerasAdamOptimizer(
            CLIP, 0.0, learning_rate=0.01, expected_batch_size=expected, accumulation_steps=steps
        )
        model.compile(optimizer, LOGITS, jit_compile=jit)
        model.fit(X[:72], Y[:72], batch_size=size, shuffle=False, verbose=0)
        assert int(optimizer.iterations) == optimizer.privacy_steps == 3
        results.append(trainable_values(model))
    assert_same(results[1], results[0], rtol=1e-5)


def test_nothing_moves_before_the_logical_batch_is_complete():
    model = make_model()
    compile_for_sum(model, LOGITS, CLIP, private={"accumulation_steps": 3})
    before = trainable_values(model)
    for done in (0, 0, 1):
        for now, then in zip(trainable_values(model), before, strict=True):
            np.testing.assert_array_equal(now, then)
        model.train_on_batch(X[:8], Y[:8])
        assert model.optimizer.privacy_steps == int(model.optimizer.iterations) == done
    assert any(np.abs(a - b).max() > 0 for a, b in zip(trainable_values(model), before, strict=True))


def test_noise_is_drawn_once_for_a_logical_batch():
    model = keras.Sequential([layers.Input((100,)), layers.Dense(200, use_bias=False)])
    optimizer = DPKerasSGDOptimizer(0.5, 3.0, learning_rate=1.0, expected_batch_size=10, accumulation_steps=4)
    model.compile(optimizer, LOGITS)
    before = trainable_values(model)[0]
    zeros = np.zeros([2, 100], np.float32), np.zeros(2)
    for _ in range(4):
        model.train_on_batch(*zeros, sample_weight=np.zeros(2, np.float32))
    moved = trainable_values(model)[0] - before
    # 20 000 values: a relative error of 5 in 200 of the standard deviation has probability 6e-7
    assert moved.std() == pytest.approx(0.5 * 3.0 / 10, rel=0.025)


def test_each_draw_comes_in_micro_batches_of_one_size():
    steps, k = 200, 3
    batches = list(poisson_batches(np.arange(N), Y, batch_size=30, steps=steps, accumulation_steps=k))
    assert len(batches) == steps * k
    sizes = []
    for start in range(0, steps * k, k):
        parts = batches[start : start + k]
        assert len({len(x) for x, _, _ in parts}) == 1
        weights = np.concatenate([w for _, _, w in parts])
        assert np.signbit(weights[weights == 0]).all()
        real = np.concatenate([x for x, _, _ in parts])[weights > 0]
        assert len(set(real.tolist())) == len(real)
        sizes.append(len(real))
    # The sum of 200 binomials: mean 30, standard deviation 4.74; 5 standard errors, probability 6e-7
    assert abs(np.mean(sizes) - 30) < 5 * np.sqrt(N * 0.25 * 0.75 / steps)
    assert len({len(x) for x, _, _ in batches}) <= 2


def test_a_large_draw_is_never_cut():
    for pad_to, rows in ((None, 34), (8, 40)):
        parts = list(poisson_batches(X[:100], Y[:100], batch_size=100, steps=1, accumulation_steps=3, pad_to=pad_to))
        assert [len(x) for x, _, _ in parts] == [rows] * 3
        assert sum(int(np.sum(w)) for _, _, w in parts) == 100
    everything = poisson_batches(X[:9], Y[:9], batch_size=8.999999, steps=1, accumulation_steps=2)  # usually all nine
    assert sum(len(x) for x, _, _ in everything) >= 9
    empty = list(poisson_batches(X, Y, batch_size=1e-9, steps=2, accumulation_steps=3))
    assert len(empty) == 6 and all(not np.any(w) and len(x) >= 1 for x, _, w in empty)


@pytest.mark.parametrize(("jit", "together"), [(False, 1), (True, 1), (False, 3)])
def test_the_ledger_counts_logical_steps(tmp_path, jit, together):
    plan = make_plan()
    model = planned_model(plan, jit_compile=jit, steps_per_execution=together)
    for epochs in (1, 2):
        model.fit(plan.batches(X, Y), epochs=epochs, callbacks=plan.callbacks(tmp_path), verbose=0)
    plan.settle()
    (event,) = plan.ledger.events()[:1]
    assert {(e.sampler, e.noise_multiplier) for e in plan.ledger.events()} == {("poisson", 2.0)}
    assert sum(e.count for e in plan.ledger.events()) == 18 == model.optimizer.privacy_steps
    assert int(model.optimizer.iterations) == 18
    assert event.sampling_probability == BATCH / N


@pytest.mark.parametrize(("jit", "together"), [(False, 1), (True, 3), (False, 3)])
def test_the_budget_stops_between_logical_batches(jit, together):
    from tfprivacy_ft.accounting import epsilon

    target = epsilon(Event.poisson(count=8, noise_multiplier=2.0, sampling_probability=BATCH / N), DELTA) + 1e-3
    plan = make_plan(target_epsilon=target)
    model = planned_model(plan, jit_compile=jit, steps_per_execution=together)
    weights = {}

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            weights.setdefault(self.model.optimizer.privacy_steps, trainable_values(self.model))

    model.fit(plan.batches(X, Y), epochs=3, callbacks=[*plan.callbacks(), Keep()], verbose=0)
    assert model.optimizer.privacy_steps == int(model.optimizer.iterations) == 8
    for now, then in zip(trainable_values(model), weights[8], strict=True):
        np.testing.assert_array_equal(now, then)
    assert plan.epsilon() <= target
    with pytest.raises(BudgetExceededError):
        model.fit(plan.batches(X, Y), callbacks=plan.callbacks(), verbose=0)


def test_batches_that_nobody_vouches_for_count_each_example_in_every_micro_batch():
    plan = make_plan(accumulation_steps=3)
    model = planned_model(plan)
    for _ in range(7):
        model.train_on_batch(X[:5], Y[:5])
    own = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)  # 6 batches
    model.fit(own, callbacks=plan.callbacks(), verbose=0)
    plan.settle()
    assert {(e.sampler, e.noise_multiplier) for e in plan.ledger.events()} == {("unknown", 2.0 / 3)}
    assert sum(e.count for e in plan.ledger.events()) == 4 == model.optimizer.privacy_steps


def test_steps_that_nobody_announced_are_reserved_in_blocks():
    plan = make_plan(steps_per_block=4)
    model = planned_model(plan)
    for _ in range(8):
        model.train_on_batch(X[:5], Y[:5])
    assert [(e.count, e.noise_multiplier) for e in plan.ledger.events()] == [(4, 1.0)]  # one reservation, in full
    model.train_on_batch(X[:5], Y[:5])
    plan.settle()
    assert sum(e.count for e in plan.ledger.events()) == 4 == model.optimizer.privacy_steps


def test_a_logical_batch_does_not_span_two_passes():
    plan = make_plan(accumulation_steps=4)  # 6 batches an epoch: one step, and two batches that are dropped
    model = planned_model(plan)
    model.fit(X, Y, batch_size=BATCH, epochs=3, callbacks=plan.callbacks(), verbose=0)
    (event,) = plan.ledger.events()
    assert (event.sampler, event.count, event.participations, event.noise_multiplier) == ("shuffled", 3, 3, 2.0)
    assert model.optimizer.privacy_steps == 3


def test_an_interrupted_logical_batch_is_dropped():
    plan, model = quiet_model()
    start = model.get_weights()

    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, batch_size=10, shuffle=False, callbacks=[*plan.callbacks(), Break()], verbose=0)
    model.fit(X[40:60], Y[40:60], batch_size=10, shuffle=False, callbacks=plan.callbacks(), verbose=0)
    assert model.optimizer.privacy_steps == 2
    assert_same(trainable_values(model), after_whole_batches(start, slice(0, 20), slice(40, 60)), rtol=1e-5)


@pytest.mark.parametrize("times", [1, 2])
def test_a_step_in_between_joins_no_logical_batch_and_shifts_none(times):
    plan, model = quiet_model()
    start = model.get_weights()

    class Sneak(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 0:
                for part in [slice(100, 110), slice(110, 120)][:times]:
                    self.model.train_on_batch(X[part], Y[part])

    model.fit(X[:40], Y[:40], batch_size=10, shuffle=False, callbacks=[*plan.callbacks(), Sneak()], verbose=0)
    # What was held before it is lost; the second batch of the first pair comes alone.
    own = [slice(100, 120)] if times == 2 else []
    assert model.optimizer.privacy_steps == 2 + len(own)
    assert_same(trainable_values(model), after_whole_batches(start, *own, slice(10, 20), slice(20, 40)), rtol=1e-5)


def test_accumulated_sums_are_in_no_checkpoint(tmp_path):
    model = make_model()
    model.compile(DPKerasAdamOptimizer(CLIP, 1.0, accumulation_steps=2), LOGITS)
    for _ in range(3):
        model.train_on_batch(X[:8], Y[:8])
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(tmp_path / "at"))
    names = [name for name, _ in tf.train.list_variables(path)]
    assert not [name for name in names if "clipped_sum" in name or "micro_batches" in name or "mechanism" in name]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.accumulation_steps == 2
    before = trainable_values(loaded)
    loaded.train_on_batch(X[:8], Y[:8])  # begins a logical batch of its own
    for now, then in zip(trainable_values(loaded), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_micro_batches_that_do_not_fit_get_one_sentence():
    with pytest.raises(InvalidArgumentError, match="accumulation_steps=0"):
        DPKerasSGDOptimizer(1.0, 1.0, accumulation_steps=0)
    with pytest.raises(InvalidArgumentError, match="use accumulation_steps"):
        DPKerasSGDOptimizer(1.0, 1.0, gradient_accumulation_steps=2)
    with pytest.raises(InvalidArgumentError, match=r"accumulation_steps=1 and the plan accumulation_steps=2"):
        make_plan().attach(DPKerasSGDOptimizer(1.0, 2.0))
    with pytest.raises(InvalidArgumentError, match="accumulation_steps=True"):
        make_plan(accumulation_steps=True)
    with pytest.raises(InvalidArgumentError, match=r"accumulation_steps=2\.5"):
        poisson_batches(X, Y, batch_size=20, accumulation_steps=2.5)
    plan = make_plan(accumulation_steps=7)
    with pytest.raises(InvalidArgumentError, match="an epoch has 6 batches"):
        planned_model(plan).fit(X, Y, batch_size=BATCH, callbacks=plan.callbacks(), verbose=0)
