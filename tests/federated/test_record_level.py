import dp_accounting
import numpy as np
import pytest
import tensorflow as tf

import federated
from federated import record_level
from tfprivacy_ft import accounting, compute_epsilon, ledger, models
from tfprivacy_ft.clipping import reference
from tfprivacy_ft.errors import BudgetExceededError, DatasetError, InvalidArgumentError, UnsupportedModelError

pytest.importorskip("tensorflow_federated", reason="needs requirements/federated.txt")

DIM, CLASSES, CLIP, RATE, BATCH, STEPS = 6, 3, 0.5, 0.2, 20, 2
DELTA = 1e-3
LOSS = tf.keras.losses.SparseCategoricalCrossentropy()


def mlp():
    return models.build_model("mlp", (DIM,), CLASSES, hidden_units=(8,))


def build(model=mlp, **changes):
    options = {
        "l2_norm_clip": CLIP,
        "noise_multiplier": 0.0,
        "expected_batch_size": BATCH,
        "local_steps": STEPS,
        "client_learning_rate": RATE,
    }
    return federated.build_record_level_averaging(model, **{**options, **changes})


@pytest.fixture(scope="module")
def noiseless():
    return build()


@pytest.fixture(scope="module")
def noisy():
    return build(noise_multiplier=(3.0, 1.5))


def records(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, DIM)).astype(np.float32), rng.integers(0, CLASSES, n).astype(np.int32)


def one_step(model, x, y):
    """A step of the definition: the sum over a loop of clipped gradients, by the constant denominator."""
    total = [np.zeros(v.shape) for v in model.trainable_weights]
    if len(x):
        total = reference.clipped_sum(reference.per_example_gradients(model, LOSS, x, y), CLIP)
    for variable, each in zip(model.trainable_weights, total, strict=True):
        variable.assign_sub(RATE * each / BATCH)


def trained(x, y, rows, noise_multiplier=0.0, keys=None, model=mlp):
    """What `train_privately` makes of a model's weights, and that model."""
    from federated.client_work import per_example_loss
    from federated.stateless import stateless_model

    function, _ = stateless_model(model)
    start = model()
    for variable, value in zip(start.trainable_weights, function.trainable, strict=True):
        variable.assign(value)
    facts = record_level.RecordLevelFacts(CLIP, noise_multiplier, BATCH, len(rows), RATE, 1.0)

    @tf.function(autograph=False)
    def run(*arguments):
        weights = tuple(tf.constant(value) for value in function.trainable)
        return record_level.train_privately(function, per_example_loss(LOSS), facts, weights, (), *arguments)

    keys = np.ones((len(rows), 3), np.uint64) if keys is None else keys
    return run(x, y, np.array(rows, np.int32), keys, np.float32(noise_multiplier)), start


def test_local_training_is_the_loop_of_the_definition():
    """Steps on other rows, with padding, with nobody, and with a record that has no finite gradient."""
    x, y = records(7)
    x[5, 0] = np.nan
    steps = [[0, 2, 4, 6], [3, -1, -1, -1], [-1, -1, -1, -1], [5, 1, -1, -1]]
    after, model = trained(x, y, steps)
    for taken in ([0, 2, 4, 6], [3], [], [1]):
        one_step(model, x[taken], y[taken])
    for value, variable in zip(after, model.trainable_weights, strict=True):
        np.testing.assert_allclose(value, variable, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make, x",
    [
        (lambda: models.build_model("cnn", (8, 8, 1), CLASSES), np.ones((3, 8, 8, 1), np.float32)),
        (
            lambda: tf.keras.Sequential(
                [
                    tf.keras.layers.Input((4,), dtype="int32"),
                    tf.keras.layers.Embedding(5, 3),
                    tf.keras.layers.Flatten(),
                    tf.keras.layers.Dense(CLASSES, "softmax"),
                ]
            ),
            np.ones((3, 4), np.int32),
        ),
    ],
    ids=["cnn", "embedding"],
)
def test_a_step_without_records_works_for_every_layer(make, x):
    after, model = trained(x, np.zeros(3, np.int32), [[-1]], model=make)
    for value, variable in zip(after, model.trainable_weights, strict=True):
        np.testing.assert_array_equal(value, variable)


def test_a_regulariser_is_neither_clipped_nor_noised_away():
    def decayed():
        return tf.keras.Sequential(
            [
                tf.keras.layers.Input((DIM,)),
                tf.keras.layers.Dense(CLASSES, "softmax", kernel_regularizer=tf.keras.regularizers.L2(50.0)),
            ]
        )

    after, model = trained(*records(3), [[-1]], model=decayed)
    kernel, _ = model.trainable_weights
    np.testing.assert_allclose(after[0], kernel - RATE * 100.0 * kernel, rtol=1e-5)


def test_noise_has_the_stated_deviation_and_no_step_repeats_another():
    """Both steps without a record; 10,000 and more numbers: a deviation 6 % off is beyond 8 sigma, alarm below 1e-12."""

    def wide():
        return models.build_model("mlp", (DIM,), CLASSES, hidden_units=(1500,))

    x, y = records(4)
    keys = np.stack([record_level.aggregation.fresh_noise_key() for _ in range(2)])
    moved = []
    for steps in (1, 2):
        after, model = trained(x, y, [[-1]] * steps, 2.0, keys[:steps], wide)
        moved.append(np.concatenate([np.ravel(a - v) for a, v in zip(after, model.trainable_weights, strict=True)]))
    noises = np.stack([moved[0], moved[1] - moved[0]]) / (RATE * CLIP * 2.0 / BATCH)
    assert noises.shape[1] > 10_000
    assert np.std(noises, axis=1) == pytest.approx([1, 1], rel=0.06)
    assert abs(np.corrcoef(noises)[0, 1]) < 0.06
    assert abs(np.corrcoef(noises[0, 1:], noises[0, :-1])[0, 1]) < 0.06


def test_a_round_is_the_mean_of_what_clients_train(noiseless, tff):
    """With all records in each batch, so that nothing is random."""
    clients = [records(BATCH), records(BATCH, seed=1)]
    assert isinstance(noiseless, tff.learning.templates.LearningProcess)
    state = noiseless.initialize()
    after = noiseless.next(state, clients).state
    each = []
    for x, y in clients:
        model = noiseless.model(state)
        for _ in range(STEPS):
            one_step(model, x, y)
        each.append([v.numpy() for v in model.trainable_weights])
    for value, *own in zip(noiseless.get_model_weights(after).trainable, *each, strict=True):
        np.testing.assert_allclose(value, np.mean(own, axis=0), rtol=1e-5, atol=1e-6)


def test_a_process_starts_from_a_model_and_models_made_before_it_work():
    earlier = mlp()
    process = build()
    other = mlp()
    weights = process.get_model_weights(process.start_from(other))
    for value, variable in zip(weights.trainable, other.trainable_weights, strict=True):
        np.testing.assert_array_equal(value, variable)
    assert earlier(records(1)[0]).shape == (1, CLASSES)


def test_rounds_from_one_state_have_batches_and_noise_of_their_own(noisy):
    clients = [records(30), records(60, seed=1)]
    state = noisy.initialize()
    one, two = (noisy.get_model_weights(noisy.next(state, clients).state).trainable for _ in range(2))
    assert not any(np.intersect1d(a, b).size for a, b in zip(one, two, strict=True))


def test_batches_are_poisson():
    """4000 records, 50 steps: the mean share is within 7 of its deviations, alarm below 1e-11."""
    q, n, steps = 0.3, 4000, 50
    rows = record_level.draw_batches(n, q, steps, np.random.default_rng())
    assert all(len(np.unique(row[row >= 0])) == (row >= 0).sum() for row in rows)
    sizes = (rows >= 0).sum(1)
    assert abs(sizes.mean() - q * n) < 7 * np.sqrt(n * q * (1 - q) / steps)
    assert len(set(sizes)) > 10  # equal sizes would be another sampler
    assert record_level.draw_batches(5, 1e-9, 3, np.random.default_rng()).tolist() == [[-1]] * 3


def test_every_client_has_a_ledger_of_its_own(noisy, tmp_path):
    clients = {"north": records(20), "south": records(100, seed=1)}
    result = federated.simulate_records(
        noisy, clients, rounds=3, delta=DELTA, run_dir=tmp_path, progress=False, evaluate_every=2,
        evaluate=lambda model: {"accuracy": 0.5 + 0 * len(model.weights)},
    )  # fmt: skip
    for name, n, z in (("north", 20, 3.0), ("south", 100, 1.5)):
        (event,) = ledger.read(tmp_path / name).events
        assert (event.unit, event.sampler, event.population, event.count) == ("example", "poisson", n, 3 * STEPS)
        assert (event.noise_multiplier, event.sampling_probability, event.l2_norm_clip) == (z, BATCH / n, CLIP)
        accountant = dp_accounting.pld.PLDAccountant()
        one = dp_accounting.PoissonSampledDpEvent(BATCH / n, dp_accounting.GaussianDpEvent(z))
        expected = accountant.compose(one, 3 * STEPS).get_epsilon(DELTA)
        report = compute_epsilon.compute_epsilon(tmp_path / name)
        assert report.epsilon == result.reports[name].epsilon == pytest.approx(expected, rel=1e-3)
        assert "one training example" in str(report)
        assert "evaluation" in str([note.kind for note in report.notes])
    assert result.epsilon == max(report.epsilon for report in result.reports.values())
    assert [(look["round"], look["accuracy"]) for look in result.history] == [(2, 0.5), (3, 0.5)]
    assert result.history[-1]["epsilon"] == result.epsilon
    assert result.model().count_params() == mlp().count_params()


def test_the_round_that_would_pass_the_budget_of_one_client_does_not_run(noisy, tmp_path):
    x, y = records(40)
    clients = federated.split_by_owner(x, y, ["b"] * 20 + ["a"] * 20)
    target = 1.0001 * accounting.epsilon(noisy.event(20, client=1).with_count(2 * STEPS), DELTA)  # of the louder one

    def run():
        return federated.simulate_records(
            noisy, clients, rounds=9, delta=DELTA, run_dir=tmp_path, target_epsilon=target, progress=False
        )

    assert run().epsilon <= target
    assert {ledger.read(tmp_path / name).events[0].count for name in "ab"} == {2 * STEPS}
    with pytest.raises(BudgetExceededError, match="leaves no room for a round"):
        run()


def test_rounds_are_reserved_in_every_ledger_before_they_run(noisy, tmp_path, monkeypatch):
    seen = []

    def broken(state, clients):
        seen.extend(ledger.read(tmp_path / name).events[0].count for name in "ab")
        raise RuntimeError("the power failed")

    monkeypatch.setattr(noisy, "_next_fn", broken)
    with pytest.raises(RuntimeError, match="power"):
        federated.simulate_records(
            noisy, {"a": records(30), "b": records(40)}, rounds=2, delta=DELTA, run_dir=tmp_path, progress=False
        )
    assert seen == [STEPS, STEPS] == [ledger.read(tmp_path / name).events[0].count for name in "ab"]


def test_noise_is_solved_for_every_client():
    sizes, rounds = (20, 400), 3  # the first in every batch
    noise = federated.solve_noise_multipliers(
        sizes, target_epsilon=0.5, delta=DELTA, expected_batch_size=BATCH, local_steps=STEPS, rounds=rounds
    )
    facts = record_level.RecordLevelFacts(CLIP, noise, BATCH, STEPS, RATE, 1.0)
    process = record_level.RecordLevelProcess()
    process.facts = facts
    for i, n in enumerate(sizes):
        event = process.event(n, client=i)
        assert 0.499 < accounting.epsilon(event.with_count(rounds * STEPS), DELTA) <= 0.5
    assert noise[0] > noise[1]


def test_what_does_not_fit_is_refused_in_one_sentence(noisy, noiseless):
    state = noiseless.initialize()
    with pytest.raises(InvalidArgumentError, match="3 clients were given to a process with 2 noise multipliers"):
        noisy.next(state, [records(30)] * 3)
    with pytest.raises(InvalidArgumentError, match="more than the 5 records of a client"):
        noiseless.next(state, [records(5)])
    with pytest.raises(DatasetError, match="30 examples and 31 labels"):
        noiseless.next(state, [(records(30)[0], records(31)[1])])
    with pytest.raises(InvalidArgumentError, match="a client is a ndarray"):
        noiseless.next(state, [records(30)[0]])
    with pytest.raises(InvalidArgumentError, match="state is a NoneType that is not of this process"):
        noiseless.next(None, [records(30)])
    with pytest.raises(DatasetError, match="no clients"):
        federated.simulate_records(noisy, {}, rounds=1, delta=DELTA)
    with pytest.raises(InvalidArgumentError, match=r"the client name '\.\./b' is not allowed"):
        federated.simulate_records(noisy, {"../b": records(30)}, rounds=1, delta=DELTA)
    with pytest.raises(InvalidArgumentError, match="process is a int"):
        federated.simulate_records(3, {"a": records(30)}, rounds=1, delta=DELTA)
    with pytest.raises(InvalidArgumentError, match="noise_multiplier=-1"):
        build(noise_multiplier=(1.0, -1.0))
    with pytest.raises(UnsupportedModelError, match="BatchNormalization"):
        build(lambda: tf.keras.Sequential([tf.keras.layers.Input((DIM,)), tf.keras.layers.BatchNormalization()]))


def test_the_loop_over_clients_refuses_a_process_that_protects_records(noiseless):
    """Its rounds would be accounted for as if clients were the unit."""
    with pytest.raises(InvalidArgumentError, match="process is a RecordLevelProcess"):
        federated.simulate(noiseless, [records(30)], rounds=1, delta=DELTA)
