import dp_accounting
import numpy as np
import pytest

import federated
from tfprivacy_ft import accounting, ledger
from tfprivacy_ft.errors import BudgetExceededError, DatasetError, InvalidArgumentError
from tfprivacy_ft.events import Event

DELTA = 1e-3


@pytest.fixture
def clients(draw_clients):
    return draw_clients([1, 4, 6, 20, 3, 3, 9, 2, 5, 12])


def simulate(process, clients, **changes):
    return federated.simulate(process, clients, **{"rounds": 3, "delta": DELTA, "progress": False, **changes})


def test_epsilon_is_that_of_the_ledger_and_of_dp_accounting(noisy, clients, tmp_path):
    result = simulate(noisy, clients, run_dir=tmp_path, rounds=7, clients_per_round=4)
    (event,) = ledger.read(tmp_path).events
    assert event == noisy.event(10).with_count(7)
    assert (event.unit, event.sampler, event.sampling_probability) == ("client", "poisson", 0.4)
    accountant = dp_accounting.pld.PLDAccountant()
    one = dp_accounting.PoissonSampledDpEvent(0.4, dp_accounting.GaussianDpEvent(1.5))
    expected = accountant.compose(one, 7).get_epsilon(DELTA)
    assert result.epsilon == result.history[-1]["epsilon"] == pytest.approx(expected, rel=1e-3)
    assert "one client" in str(result.report)


def test_a_second_run_in_the_same_folder_adds_up(noisy, clients, tmp_path):
    first = simulate(noisy, clients, run_dir=tmp_path)
    second = simulate(noisy, clients, run_dir=tmp_path, state=first.state)
    assert ledger.read(tmp_path).events[0].count == 6
    assert second.epsilon > first.epsilon


def test_the_round_that_would_pass_the_budget_does_not_run(noisy, clients, tmp_path, caplog):
    one = noisy.event(10)
    target = accounting.epsilon(one.with_count(5), DELTA) * 1.0001
    first = simulate(noisy, clients, run_dir=tmp_path, rounds=3, target_epsilon=target)
    assert ledger.read(tmp_path).events[0].count == 3 and not caplog.records
    second = simulate(noisy, clients, run_dir=tmp_path, rounds=9, target_epsilon=target, state=first.state)
    assert ledger.read(tmp_path).events[0].count == 5
    assert [entry["round"] for entry in second.history] == [1, 2]
    assert 0.999 * target < second.epsilon <= target
    assert "training stopped after round 2 of 9: epsilon" in caplog.text
    with pytest.raises(BudgetExceededError, match="leaves no room for a round"):
        simulate(noisy, clients, run_dir=tmp_path, target_epsilon=target, state=second.state)
    assert ledger.read(tmp_path).events[0].count == 5
    with pytest.raises(InvalidArgumentError, match="target_epsilon=0"):
        simulate(noisy, clients, target_epsilon=0)


def test_what_examples_spent_is_not_taken_from_the_budget_of_clients(noisy, clients, tmp_path):
    with ledger.Ledger.open(tmp_path, delta=DELTA) as book:
        other = Event.unknown(count=100, noise_multiplier=0.1)
        book.settle([book.reserve(other)], other)
    target = accounting.epsilon(noisy.event(10).with_count(2), DELTA) * 1.0001
    simulate(noisy, clients, run_dir=tmp_path, rounds=9, target_epsilon=target)
    assert [event.count for event in ledger.read(tmp_path).events if event.unit == "client"] == [2]


def test_rounds_are_reserved_before_they_run(noisy, clients, tmp_path, monkeypatch):
    seen = []

    def broken(state, cohort):
        seen.append(ledger.read(tmp_path).events[0].count)
        raise RuntimeError("the power failed")

    monkeypatch.setattr(noisy, "_next_fn", broken)
    with pytest.raises(RuntimeError, match="power"):
        simulate(noisy, clients, run_dir=tmp_path)
    assert seen == [1] and ledger.read(tmp_path).events[0].count == 1


def test_empty_cohorts_are_rounds_of_noise_that_count(make_process, clients, tmp_path):
    process = make_process(noise_multiplier=2.0, expected_clients_per_round=1e-6)
    result = simulate(process, clients[:2], run_dir=tmp_path, rounds=5)
    assert ledger.read(tmp_path).events[0].count == 5
    assert all(np.all(np.isfinite(value)) for value in result.weights.trainable)


def test_history_holds_the_looks_and_never_a_cohort(noisy, clients):
    x, y = clients[3]
    result = simulate(noisy, clients, rounds=5, evaluate_every=2, evaluate=(x, y))
    assert [entry["round"] for entry in result.history] == [2, 4, 5]
    assert all(set(entry) == {"round", "epsilon", "loss", "accuracy"} for entry in result.history)
    epsilons = [entry["epsilon"] for entry in result.history]
    assert epsilons == sorted(epsilons)
    assert "evaluation" in str(result.report)
    model = result.model()
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    assert model.evaluate(x, y, verbose=0)[0] == pytest.approx(result.history[-1]["loss"], rel=1e-5)


def test_training_learns(make_process):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 6)).astype(np.float32)
    y = np.argmax(x[:, :3], axis=1)
    process = make_process(client_learning_rate=0.5, l2_norm_clip=1.0, expected_clients_per_round=20, local_epochs=2)
    clients = federated.split_evenly(x[:500], y[:500], num_clients=50, seed=0)
    result = simulate(process, clients, rounds=30, evaluate=(x[500:], y[500:]), evaluate_every=30)
    assert result.history[-1]["accuracy"] > 0.7
    assert result.epsilon == float("inf")  # without noise


def test_the_progress_bar_shows_round_and_epsilon(noisy, clients, capsys):
    simulate(noisy, clients, progress=True)
    shown = capsys.readouterr().out
    assert "3/3" in shown and "epsilon" in shown


def test_another_cohort_size_than_the_process_has_is_refused(noisy, clients):
    with pytest.raises(InvalidArgumentError, match="clients_per_round=5"):
        simulate(noisy, clients, clients_per_round=5)
    with pytest.raises(InvalidArgumentError, match="with 3 clients"):
        simulate(noisy, clients[:3])


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rounds": 0}, InvalidArgumentError),
        ({"delta": 0.0}, InvalidArgumentError),
        ({"evaluate_every": 0}, InvalidArgumentError),
        ({"evaluate": "test set"}, InvalidArgumentError),
        ({"evaluate": lambda model: 0.9}, InvalidArgumentError),
        ({"clients": []}, DatasetError),
        ({"clients": 7}, InvalidArgumentError),
        ({"process": "stock"}, InvalidArgumentError),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(noisy, clients, changes, error):
    options = {"process": noisy, "clients": clients, "rounds": 1, "delta": DELTA, "progress": False, **changes}
    with pytest.raises(error):
        federated.simulate(**options)
