import numpy as np
import pytest

from tfprivacy_ft import ledger
from tfprivacy_ft.errors import BudgetExceededError
from tfprivacy_ft.events import Event
from tfprivacy_ft.finetune import Head, backbones, budget, centering, recipes
from tfprivacy_ft.keras_compat import keras
from tfprivacy_ft.ledger import Ledger

RNG = np.random.default_rng(0)
N, FEATURES = 3000, 40
COMMON = np.linspace(-0.2, 0.3, FEATURES)
ROWS = COMMON + 0.05 * RNG.normal(size=(N, FEATURES))
ROWS = (ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)).astype(np.float32)


def release(rows, noise_multiplier=8.0, target_epsilon=1.0, into=None, **more):
    event = Event.poisson(count=1, noise_multiplier=noise_multiplier, sampling_probability=1.0)
    into = into or Ledger.in_memory(delta=1e-5)
    return centering.release_mean(rows, event, ledger=into, target_epsilon=target_epsilon, delta=1e-5, **more)


def test_the_noise_of_the_mean_has_the_deviation_that_the_ledger_holds():
    """A chi-square of 40 x 200 numbers; false alarms below 1e-6: five standard deviations and more."""
    into = Ledger.in_memory(delta=1e-5)
    off = [release(ROWS, into=into, target_epsilon=50.0) - ROWS.mean(axis=0) for _ in range(200)]
    (event,) = into.events()
    assert (event.count, event.noise_multiplier, event.sampling_probability) == (200, 8.0, 1.0)
    measured = np.sqrt(np.mean(np.square(off))) * N
    # Shrinking takes off about what noise adds to the length, 1 % of the mean here.
    assert measured == pytest.approx(8.0, rel=0.06)


def test_one_example_moves_the_sum_by_at_most_one_whatever_it_holds(monkeypatch):
    monkeypatch.setattr(centering, "_ROWS", 7)
    base = centering._sum(ROWS[:20], 1)
    np.testing.assert_allclose(base, ROWS[:20].sum(axis=0), atol=1e-5)
    np.testing.assert_allclose(4 * centering._sum(ROWS[:20], 4), base)
    for odd in (1e9, np.nan, np.inf, -1e-3, 1e300):
        with_odd = np.concatenate([ROWS[:20].astype(np.float64), np.full((1, FEATURES), odd)])
        assert np.linalg.norm(centering._sum(with_odd, 1) - base) <= 1 + 1e-9


def test_few_examples_give_nearly_no_mean_rather_than_noise():
    """Of ten rows the shrunk means have length 0.5 +- 0.7, and noise alone 5.1: false alarms below 1e-6 over 60 of them."""
    assert np.mean([np.linalg.norm(release(ROWS[:10])) for _ in range(60)]) < 1.2
    np.testing.assert_allclose(release(ROWS), ROWS.mean(axis=0), atol=6.5 * 8 / N)


def test_without_room_in_the_budget_nothing_is_released():
    into = Ledger.in_memory(delta=1e-5)
    with pytest.raises(BudgetExceededError, match=r"no room below the target 0.1 for the mean"):
        release(ROWS, target_epsilon=0.1, into=into)
    assert into.events() == []


@pytest.mark.parametrize("hidden_units", [(), (5,)])
def test_a_head_computes_the_same_before_and_after_it_is_centered(hidden_units):
    inputs = keras.Input((FEATURES,))
    backbone = keras.Model(inputs, keras.layers.Activation("linear")(inputs))
    head = backbones.with_new_head(backbone, 3, hidden_units).head
    head.set_weights([RNG.normal(size=weight.shape).astype(np.float32) for weight in head.get_weights()])
    before, weights = head.predict(ROWS[:50], verbose=0), head.get_weights()
    center = centering.center_of(ROWS.mean(axis=0))
    centering.adapt(head, center)
    by_model = centering.centering_model(head, center).predict(ROWS[:50], verbose=0)
    np.testing.assert_allclose(by_model, before, rtol=1e-4, atol=1e-6)
    of_rows = head.predict(centering.center_rows(ROWS[:50].copy(), center), verbose=0)
    np.testing.assert_allclose(of_rows, before, rtol=1e-4, atol=1e-6)
    centering.restore(head, center)
    for ours, theirs in zip(head.get_weights(), weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_centered_rows_have_length_one_on_average():
    mean, scale = centering.center_of(ROWS.mean(axis=0))
    centered = (ROWS - mean) / scale
    assert np.mean(np.square(np.linalg.norm(centered, axis=1))) == pytest.approx(1, rel=1e-3)
    np.testing.assert_allclose(centered.mean(axis=0), 0, atol=1e-5)


def test_the_mean_takes_a_hundredth_of_the_budget():
    stage = {
        center: recipes.stages_of(Head(batch_size=500, epochs=20, center=center), num_examples=N)
        for center in (True, False)
    }
    noise = {
        center: budget.solve(stages, num_examples=N, target_epsilon=2.0, delta=1e-5)[0]
        for center, stages in stage.items()
    }
    assert 1.002 < noise[True] / noise[False] < 1.01
    event = budget.event_of_mean(stage[True][0], noise[True], num_examples=N)
    assert (event.count, event.sampling_probability, event.population) == (1, 1.0, N)


def test_the_mean_is_in_the_ledger_of_the_run_before_its_steps(tmp_path):
    from tfprivacy_ft.finetune import finetune

    inputs = keras.Input((FEATURES,))
    backbone = keras.Model(inputs, keras.layers.Activation("linear")(inputs))
    arguments = {"num_classes": 2, "target_epsilon": 3.0, "delta": 1e-4, "verbose": 0}
    labels = (ROWS[:, 0] > np.median(ROWS[:, 0])).astype(int)
    result = finetune(backbone, ROWS, labels, recipe=Head(epochs=2, batch_size=1000), run_dir=tmp_path, **arguments)
    mean, steps = ledger.read(tmp_path).events
    assert (mean.count, mean.sampling_probability, steps.count) == (1, 1.0, 6)
    assert 2.98 < result.epsilon <= 3.0
    own = finetune(result.model, ROWS, labels, recipe=Head(epochs=1), **{**arguments, "num_classes": None})
    assert [event.sampling_probability for event in own.report.accounts[0].events] == [1.0] and own.epsilon <= 3.0
