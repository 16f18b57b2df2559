import asyncio
import csv
import itertools

import dp_accounting
import numpy as np
import pytest

import federated
from federated import _budget, _progress
from tfprivacy_ft import Adaptive, accounting, ledger
from tfprivacy_ft.errors import (
    BudgetExceededError,
    DatasetError,
    InvalidArgumentError,
    UnsupportedEventError,
    WorkerLostError,
)
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


def test_rounds_are_reserved_before_they_run(noisy, clients, tmp_path, wrap_next):
    seen = []

    def broken(state, cohort):
        seen.append(ledger.read(tmp_path).events[0].count)
        raise RuntimeError("the power failed")

    wrap_next(noisy, lambda real: broken)
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


def test_the_progress_bar_shows_round_figures_and_time(noisy, clients, capsys):
    simulate(noisy, clients, progress=True)
    shown = capsys.readouterr().out
    assert "3/3" in shown and "epsilon" in shown and "in all" in shown


def test_the_progress_bar_never_shows_less_than_was_spent(capsys):
    with _progress.progress_bar(30, done=10, visible=True) as show:
        show(12, [{"round": 11, "epsilon": 1.23401, "accuracy": 0.876543}])
    assert capsys.readouterr().out.split()[:2] == ["round", "12/30"]
    with _progress.progress_bar(30, done=10, visible=True) as show:
        show(30, [{"round": 30, "epsilon": 1.23401, "accuracy": 0.876543}])
    assert "epsilon 1.235  accuracy 0.877" in capsys.readouterr().out


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
        ({"state": "weights"}, InvalidArgumentError),
        ({"evaluate": lambda model: 0.9}, InvalidArgumentError),
        ({"clients": []}, DatasetError),
        ({"clients": 7}, InvalidArgumentError),
        ({"process": "stock"}, InvalidArgumentError),
        ({"evaluate": lambda model: {"epsilon": 0.1}}, InvalidArgumentError),
        ({"release_managers": ["figures.csv"]}, InvalidArgumentError),
        ({"release_managers": 7}, InvalidArgumentError),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(noisy, clients, changes, error):
    options = {"process": noisy, "clients": clients, "rounds": 1, "delta": DELTA, "progress": False, **changes}
    with pytest.raises(error):
        federated.simulate(**options)


# Who is told of a look.


def test_history_is_a_table_in_the_run_folder_that_is_continued(noisy, clients, tmp_path):
    first = simulate(noisy, clients, run_dir=tmp_path, rounds=2)
    second = simulate(noisy, clients, run_dir=tmp_path, rounds=2, evaluate=lambda model: {"accuracy": 0.5})
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [["round", "epsilon", "accuracy"]] * 4
    assert [row["accuracy"] for row in rows] == ["", "", "0.5", "0.5"]
    expected = [*first.history, *second.history]
    assert [(int(row["round"]), float(row["epsilon"])) for row in rows] == [
        (entry["round"], entry["epsilon"]) for entry in expected
    ]


def test_release_managers_get_epsilon_and_what_evaluate_found_and_nothing_else(tff, noisy, clients, tmp_path):
    import tensorflow as tf

    x, y = clients[3]
    memory = tff.program.MemoryReleaseManager()
    managers = [
        memory,
        tff.program.CSVFileReleaseManager(tmp_path / "figures.csv", key_fieldname="round"),
        tff.program.TensorBoardReleaseManager(tmp_path / "logs"),
    ]

    async def in_a_notebook():  # whose cells run inside an event loop
        return simulate(noisy, clients, rounds=4, evaluate_every=2, evaluate=(x, y), release_managers=managers)

    result = asyncio.run(in_a_notebook())
    told = [{"round": key, **value} for key, value in memory.values().items()]
    assert told == result.history and [entry["round"] for entry in told] == [2, 4]
    assert set(told[0]) == {"round", "epsilon", "loss", "accuracy"}
    with open(tmp_path / "figures.csv", newline="") as file:
        assert [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)] == told
    del managers[2]  # closes the file
    (file,) = (tmp_path / "logs").iterdir()
    shown = [
        (event.step, value.tag)
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
        for event in [tf.compat.v1.Event.FromString(record)]
        for value in event.summary.value
    ]
    assert sorted(shown) == sorted((n, tag) for n in (2, 4) for tag in ("epsilon", "loss", "accuracy"))


# Cohorts.


class Cohorts:
    """Everybody in each round of two, three or as many clients as are said, and what the ledger is to hold of it."""

    name = "of the test"

    def __init__(self, num_clients, clients_per_round, make_event):
        self.num_clients, self.clients_per_round, self.make_event = num_clients, clients_per_round, make_event
        self.round = 0

    def event(self, **mechanism):
        return self.make_event(self.round, count=1, unit="client", population=self.num_clients, **mechanism)

    def draw(self):
        self.round += 1
        return np.arange(self.num_clients)

    def position(self):
        return {}

    def go_on_from(self, position, *, released_since=None):
        pass


def in_passes_of_three(number, **event):
    return Event.shuffled(passes=int(number % 3 == 0), **event)


def fixed(number, **event):
    return Event.fixed(cohort_size=4, **event)


def test_cohorts_of_any_kind_state_what_a_round_of_theirs_is(noisy, clients, tmp_path):
    result = simulate(noisy, clients, run_dir=tmp_path, rounds=7, cohorts=Cohorts(10, 4, in_passes_of_three))
    (event,) = ledger.read(tmp_path).events
    assert (event.sampler, event.count, event.participations, event.l2_norm_clip) == ("shuffled", 7, 3, 0.5)
    assert result.epsilon == accounting.gaussian_epsilon(noise_multiplier=1.5, delta=DELTA, releases=3)
    assert ledger.read(tmp_path).facts["cohorts"] == "of the test"


def test_noise_of_clients_and_of_the_server_are_two_figures_in_the_ledger(make_process, clients, tmp_path):
    process = make_process(noise_multiplier=1.5, local_noise_multiplier=4.0)
    result = simulate(process, clients, run_dir=tmp_path, rounds=5, cohorts="cyclic")
    central, local = ledger.read(tmp_path).events
    assert (central.sampler, central.count, central.participations, central.noise_multiplier) == ("shuffled", 5, 2, 1.5)
    assert (local.sampler, local.count, local.participations, local.noise_multiplier) == ("local", 5, 2, 4.0)
    of_local = accounting.gaussian_epsilon(noise_multiplier=2.0, delta=DELTA, releases=2)
    assert {a.relation: a.epsilon for a in result.report.accounts}["local"] == pytest.approx(of_local)
    assert result.history[-1]["epsilon"] == max(a.epsilon for a in result.report.accounts)


def test_the_history_tells_where_a_moving_clip_is(make_process, clients):
    process = make_process(noise_multiplier=1.0, clipping=Adaptive())
    result = simulate(process, clients, rounds=3, evaluate_every=1)
    clips = [look["clip"] for look in result.history]
    assert clips[-1] == pytest.approx(float(result.state.clip))
    assert all(before != after for before, after in itertools.pairwise(clips))  # it may come back to where it was


def test_multiplicative_noise_alone_is_an_infinite_epsilon_with_the_reason(make_process, clients):
    result = simulate(make_process(multiplicative_noise=0.5), clients, rounds=2)
    assert result.epsilon == float("inf") and "noise on a small number is small" in " ".join(str(result.report).split())


def test_cohorts_in_the_middle_of_a_pass_cost_one_in_another_ledger(noisy, clients):
    cohorts = Cohorts(10, 4, in_passes_of_three)
    costs = [simulate(noisy, clients, rounds=1, cohorts=cohorts).epsilon for _ in range(4)]
    assert costs == [accounting.gaussian_epsilon(noise_multiplier=1.5, delta=DELTA)] * 4


@pytest.mark.parametrize(
    ("make_event", "rounds", "releases"),
    [(in_passes_of_three, 6, 2), (fixed, 4, 4)],  # two passes of three rounds
)
def test_a_budget_holds_for_cohorts_of_any_kind(noisy, clients, make_event, rounds, releases):
    cohorts = Cohorts(10, 4, make_event)
    target = _budget.epsilon_of([cohorts.event(noise_multiplier=1.5)] * releases, DELTA) * 1.0001
    result = simulate(noisy, clients, rounds=20, target_epsilon=target, cohorts=cohorts)
    assert result.history[-1]["round"] == rounds
    assert 0.999 * target < result.epsilon <= target


def test_a_budget_holds_for_rounds_of_several_releases(noisy, clients, tmp_path, monkeypatch):
    of_round = noisy.event(10)

    def events(cohorts):
        votes = Event.poisson(count=1, unit="client", noise_multiplier=9.0, sampling_probability=0.4)
        return of_round, votes

    monkeypatch.setattr(noisy, "events", events, raising=False)
    target = accounting.epsilon([event.with_count(3) for event in events(None)], DELTA) * 1.0001
    result = simulate(noisy, clients, rounds=9, target_epsilon=target, run_dir=tmp_path)
    assert [event.count for event in ledger.read(tmp_path).events] == [3, 3]
    assert ledger.read(tmp_path).unsettled == 0
    assert 0.999 * target < result.epsilon <= target


def test_the_budget_allows_what_fits_and_no_more_however_rounds_change(monkeypatch):
    rng = np.random.default_rng(0)
    looks = []
    real = accounting.epsilon
    monkeypatch.setattr(_budget.accounting, "epsilon", lambda *args, **kw: looks.append(None) or real(*args, **kw))
    for trial in range(5):
        book = ledger.Ledger.in_memory()
        budget = _budget.Budget(book, 2.0, DELTA)
        noise = np.full(40, 8.0) if trial == 0 else np.sort(rng.uniform(4, 30, size=40))[:: 1 if trial % 2 else -1]
        looks.clear()
        for number in range(40):
            events = [Event.unknown(count=1, noise_multiplier=noise[number], unit="client")]
            after = real([*book.events(), *events], DELTA)
            allowed = budget.allows(events, at_most=40 - number)
            assert allowed == (after <= 2.0)
            if not allowed:
                break
            book.reserve(events[0])
        assert 3 < number < 39 or allowed
        assert len(looks) < 20 or trial


def test_releases_that_do_not_add_up_are_no_budget():
    book = ledger.Ledger.in_memory()
    book.reserve(fixed(0, count=1, unit="client", population=10, noise_multiplier=4.0))
    with pytest.raises(UnsupportedEventError):
        _budget.Budget(book, 9.0, DELTA).allows([Event.unknown(count=1, noise_multiplier=4.0, unit="client")], 1)


@pytest.mark.parametrize(
    ("cohorts", "text"),
    [
        (Cohorts(9, 4, fixed), "of 4 among 9 clients"),
        (Cohorts(10, 5, fixed), "of 5 among 10 clients"),
        ("roulette", "cohorts='roulette'"),
        (7, "cohorts is a int"),
    ],
)
def test_cohorts_of_other_clients_are_refused(noisy, clients, cohorts, text):
    with pytest.raises(InvalidArgumentError, match=text):
        simulate(noisy, clients, cohorts=cohorts)


# What fails.


class OnDisk:
    """Four clients, the last two of whom cannot be read."""

    def __init__(self, clients, error):
        self.clients, self.error = clients, error

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if i >= 2:
            raise self.error
        return self.clients[i]


def broken_data_set(x, y):
    import tensorflow as tf

    def fail(x, y):
        with tf.control_dependencies([tf.debugging.Assert(tf.shape(x)[0] > 99, ["cannot be parsed"])]):
            return tf.identity(x), y

    return tf.data.Dataset.from_tensor_slices((x, y)).batch(8).map(fail)


def test_a_client_that_cannot_be_read_drops_out_and_the_denominator_stays(noiseless, draw_clients, caplog):
    import tensorflow as tf

    two = draw_clients([3, 5])
    expected = noiseless.get_model_weights(noiseless.next(noiseless.initialize(), two).state).trainable
    broken = broken_data_set(*two[0])
    for clients in (OnDisk(two, OSError("no such file")), [*two, broken, broken]):
        with pytest.warns(UserWarning, match="delta"):
            result = simulate(noiseless, clients, rounds=1, delta=0.9)
        assert "2 times a client's data could not be read" in caplog.text
        caplog.clear()
        for one, other in zip(result.weights.trainable, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(KeyError), pytest.warns(UserWarning, match="delta"):
        simulate(noiseless, OnDisk(two, KeyError("a mistake in the program")), rounds=1, delta=0.9)
    data = [tf.data.Dataset.from_tensor_slices(client).batch(8) for client in two]
    with pytest.warns(UserWarning, match="delta"):
        result = simulate(noiseless, [*data, broken, broken], rounds=1, delta=0.9)
    for one, other in zip(result.weights.trainable, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_client_of_nan_counts_as_zero(noiseless, draw_clients):
    two = draw_clients([3, 5])
    expected = noiseless.get_model_weights(noiseless.next(noiseless.initialize(), two).state).trainable
    poisoned = (np.full_like(two[0][0], np.nan), two[0][1])
    with pytest.warns(UserWarning, match="delta"):
        result = simulate(noiseless, [*two, poisoned, poisoned], rounds=1, delta=0.9)
    for one, other in zip(result.weights.trainable, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.fixture
def losing(wrap_next):
    """The worker is lost in the first rounds, so many times; returns the cohorts that came."""

    def lose(process, times):
        cohorts = []

        def losing_next(real):
            def next_round(state, cohort):
                cohorts.append([len(x) for x, _ in cohort])
                if len(cohorts) <= times:
                    raise WorkerLostError("the worker is gone.")
                return real(state, cohort)

            return next_round

        wrap_next(process, losing_next)
        return cohorts

    return lose


def test_a_round_whose_worker_is_lost_is_counted_and_run_once_more(noisy, clients, tmp_path, losing, caplog):
    cohorts = losing(noisy, 1)
    result = simulate(noisy, clients, run_dir=tmp_path, rounds=2, cohorts=Cohorts(10, 4, in_passes_of_three))
    (event,) = ledger.read(tmp_path).events
    assert (event.count, event.participations) == (3, 2)  # two rounds of one pass, one of them twice
    assert len(cohorts) == 3 and cohorts[0] == cohorts[1] and result.history[-1]["round"] == 2
    assert "round 1 is counted once more and run again: the worker is gone." in caplog.text


def test_a_worker_that_is_lost_again_and_again_ends_the_run(noisy, clients, tmp_path, losing):
    losing(noisy, 99)
    with pytest.raises(WorkerLostError):
        simulate(noisy, clients, run_dir=tmp_path)
    assert ledger.read(tmp_path).events[0].count == 4
    target = accounting.epsilon(noisy.event(10).with_count(2), DELTA) * 1.0001
    with pytest.raises(BudgetExceededError):
        simulate(noisy, clients, target_epsilon=target)


def test_amplified_rounds_that_run_again_draw_anew_and_rounds_of_a_pass_do_not(noisy, clients, losing):
    losing(noisy, 1)
    drawn = Cohorts(10, 4, fixed)
    simulate(noisy, clients, rounds=2, cohorts=drawn)
    assert drawn.round == 3
    losing(noisy, 1)
    in_turn = Cohorts(10, 4, in_passes_of_three)
    simulate(noisy, clients, rounds=2, cohorts=in_turn)
    assert in_turn.round == 2


def test_a_state_from_elsewhere_is_said_in_the_report(noisy, clients, caplog):
    first = simulate(noisy, clients, rounds=3)
    second = simulate(noisy, clients, rounds=1, state=first.state)
    assert "3 earlier rounds had trained" in " ".join(str(second.report).split())
    assert "3 earlier rounds" in caplog.text and "earlier rounds" not in str(first.report)


def test_both_noises_have_one_epsilon_the_larger(make_process, clients):
    process = make_process(noise_multiplier=1.5, local_noise_multiplier=4.0)
    result = simulate(process, clients, rounds=2)
    central, local = sorted(result.report.accounts, key=lambda account: account.relation == "local")
    assert result.epsilon == result.history[-1]["epsilon"] == max(central.epsilon, local.epsilon)
    assert central.epsilon == accounting.gaussian_epsilon(noise_multiplier=1.5, delta=DELTA, releases=2)


def test_a_round_that_lacks_promised_noise_is_counted_and_left_out(make_process, draw_clients, caplog, tmp_path):
    class Broken(list):
        def __getitem__(self, i):
            raise OSError("no such disk")

    process = make_process(local_noise_multiplier=4.0, least_reports=4)
    start = process.initialize()
    result = simulate(process, Broken(draw_clients([3] * 6)), rounds=2, cohorts="fixed", run_dir=tmp_path, state=start)
    assert [event.count for event in ledger.read(tmp_path).events] == [2, 2]
    for one, other in zip(
        process.get_model_weights(result.state).trainable, process.get_model_weights(start).trainable, strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert "is counted and left out" in caplog.text
