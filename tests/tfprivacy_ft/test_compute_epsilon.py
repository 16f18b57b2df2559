import csv
import io
import math

import pytest
from epsilon_helpers import DPSGD, FEDAVG, a_run, strict_json

from tfprivacy_ft import accounting, statement
from tfprivacy_ft.compute_epsilon import best_of, compose, compute_epsilon, dpftrl, dpsgd, fedavg, solve
from tfprivacy_ft.errors import InvalidArgumentError, LedgerError, UnsupportedEventError
from tfprivacy_ft.events import Event
from tfprivacy_ft.ledger import Ledger
from tfprivacy_ft.search import BestOf
from tfprivacy_ft.statement import figure


def test_dpsgd_by_epochs_and_by_steps():
    report = dpsgd(**DPSGD)
    assert report.epsilon == pytest.approx(2.382, rel=3e-4)
    (account,) = report.accounts
    assert account.releases == 14063 and account.epsilon_rdp == pytest.approx(2.597, rel=3e-4)
    assert dpsgd(**{**DPSGD, "epochs": None}, steps=14063).accounts == report.accounts


@pytest.mark.parametrize(
    ("length", "count", "passes"),
    [({"epochs": 60}, 14063, 60), ({"epochs": 0.5}, 118, 1), ({"steps": 234}, 234, 1), ({"steps": 235}, 235, 2)],
)
def test_shuffled_batches_are_not_amplified(length, count, passes):
    report = dpsgd(**{**DPSGD, "epochs": None, **length}, sampling="shuffle")
    (event,) = report.accounts[0].events
    assert (event.sampler, event.count, event.participations) == ("shuffled", count, passes)
    assert report.epsilon == report.accounts[0].epsilon_without_amplification


def test_shuffled_figures():
    (account,) = dpsgd(**DPSGD, sampling="shuffle").accounts
    assert account.epsilon == pytest.approx(54.05, rel=2e-4)
    assert account.epsilon_rdp == pytest.approx(56.95, rel=2e-4)
    assert account.epsilon_replace_one == pytest.approx(158.4, rel=5e-4)


def test_fedavg_protects_a_client():
    report = fedavg(**FEDAVG)
    assert report.epsilon == pytest.approx(1.879, rel=3e-4)
    assert report.accounts[0].unit == "client"


def test_fixed_cohorts_cost_more():
    report = fedavg(
        num_clients=10000, clients_per_round=100, noise_multiplier=1.0, rounds=1000, delta=1e-6, sampling="fixed"
    )
    assert report.epsilon == pytest.approx(23.3, rel=1e-3)
    assert report.accounts[0].epsilon_pld is None
    assert "no bound" in str(report)


@pytest.mark.parametrize("name", ["num_examples", "batch_size", "noise_multiplier", "epochs", "delta"])
@pytest.mark.parametrize("value", [math.nan, -1, math.inf, "7"])
def test_arguments_of_dpsgd_are_checked_by_name(name, value):
    with pytest.raises(InvalidArgumentError, match=name):
        dpsgd(**{**DPSGD, name: value})


@pytest.mark.parametrize("name", ["num_clients", "clients_per_round", "noise_multiplier", "rounds", "delta"])
@pytest.mark.parametrize("value", [math.nan, -1, math.inf, "7"])
def test_arguments_of_fedavg_are_checked_by_name(name, value):
    with pytest.raises(InvalidArgumentError, match=name):
        fedavg(**{**FEDAVG, name: value})


def test_arguments_that_contradict_each_other():
    with pytest.raises(InvalidArgumentError, match=r"batch_size=60001.*num_examples=60000"):
        dpsgd(**{**DPSGD, "batch_size": 60001})
    with pytest.raises(InvalidArgumentError, match=r"clients_per_round=3001.*num_clients=3000"):
        fedavg(**{**FEDAVG, "clients_per_round": 3001})
    for length in ({"epochs": None}, {"steps": 5}):
        with pytest.raises(InvalidArgumentError, match="exactly one"):
            dpsgd(**{**DPSGD, **length})
    for function, arguments in ((dpsgd, DPSGD), (fedavg, FEDAVG)):
        with pytest.raises(InvalidArgumentError, match="sampling"):
            function(**arguments, sampling="lottery")


def test_a_large_delta_warns():
    with pytest.warns(UserWarning, match="delta"):
        dpsgd(**{**DPSGD, "delta": 1e-4})
    with pytest.warns(UserWarning, match="delta"):
        fedavg(**{**FEDAVG, "delta": 1e-2})


# Runs.


def test_a_run_reports_what_its_ledger_says(tmp_path):
    event = Event.poisson(count=14063, noise_multiplier=1.1, sampling_probability=256 / 60000, population=60000)
    run = a_run(tmp_path / "mnist", [event], notes=[("training metrics", "loss of every epoch.")])
    report = compute_epsilon(run)
    assert report.recorded and report.delta == 1e-5 and report.facts == {"model": "cnn"}
    assert report.epsilon == dpsgd(**DPSGD).epsilon
    text = str(report)
    for part in ("2.382", "2.597", "6,270", "one training example", "1e-05", "recorded by the run", "Poisson", "mnist"):
        assert part in " ".join(text.split())
    assert "Released without noise, training metrics: loss of every epoch." in text
    assert compute_epsilon(run / "ledger.jsonl").accounts == report.accounts
    assert compute_epsilon(str(run), delta=1e-6).epsilon > report.epsilon
    with Ledger.open(run) as book:
        assert compute_epsilon(book).accounts == report.accounts
        assert compute_epsilon(book).notes == report.notes


def test_blocks_that_were_never_settled_are_said_to_count(tmp_path):
    with Ledger.open(tmp_path, delta=1e-5) as book:
        book.reserve(Event.unknown(count=10, noise_multiplier=4.0))
    assert "may not have run to the end, counted in full: 1." in str(compute_epsilon(tmp_path))
    assert compute_epsilon(tmp_path).unsettled == 1


def test_units_stand_side_by_side(tmp_path):
    events = [
        Event.unknown(count=1, noise_multiplier=2.0),
        Event.poisson(count=1, noise_multiplier=1.0, sampling_probability=0.1, unit="client"),
    ]
    report = compute_epsilon(events, delta=1e-5)
    assert [account.unit for account in report.accounts] == ["example", "client"]
    assert "do not add up" in str(report)
    assert strict_json(report.to_json())["epsilon"] is None
    with pytest.raises(UnsupportedEventError, match="no single epsilon"):
        _ = report.epsilon


def test_nothing_released_is_epsilon_zero(tmp_path):
    report = compute_epsilon(a_run(tmp_path, []))
    assert report.epsilon == 0.0
    assert "nothing was released" in str(report)


def test_delta_must_come_from_somewhere(tmp_path):
    with pytest.raises(InvalidArgumentError, match="no run recorded one"):
        compute_epsilon([Event.unknown(count=1, noise_multiplier=1.0)])
    with pytest.raises(InvalidArgumentError, match="no run recorded one"):
        compute_epsilon(a_run(tmp_path, [], delta=None))
    with pytest.raises(LedgerError, match="no ledger"):
        compute_epsilon(tmp_path / "elsewhere")


def test_runs_compose_to_what_their_events_do(tmp_path):
    head, rest = (
        Event.poisson(count=n, noise_multiplier=z, sampling_probability=q, population=1000)
        for n, z, q in ((50, 1.5, 0.02), (80, 1.1, 0.05))
    )
    notes = [("training metrics", "loss of every epoch.")]
    runs = [a_run(tmp_path / "head", [head], notes=notes), a_run(tmp_path / "all", [rest, head], notes=notes)]
    report = compose(runs)
    assert report.epsilon == compute_epsilon([head, head, rest], delta=1e-5).epsilon
    assert report.epsilon > max(compute_epsilon(run).epsilon for run in runs)
    assert (
        report.recorded and len(report.notes) == 1 and report.facts[str(runs[1] / "ledger.jsonl")] == {"model": "cnn"}
    )
    assert "the same data" in " ".join(str(report).split())
    clients = a_run(tmp_path / "clients", [Event.unknown(count=1, noise_multiplier=3.0, unit="client")])
    side_by_side = compose([*runs, clients])
    assert [a.unit for a in side_by_side.accounts] == ["example", "client"]
    assert side_by_side.accounts[0].epsilon == report.epsilon


def test_runs_that_cannot_be_composed_get_one_sentence(tmp_path):
    event = Event.unknown(count=1, noise_multiplier=3.0)
    one, other = a_run(tmp_path / "one", [event]), a_run(tmp_path / "other", [event], delta=1e-6)
    with pytest.raises(InvalidArgumentError, match="is named 2 times"):
        compose([one, one / "ledger.jsonl"])
    with pytest.raises(InvalidArgumentError, match="recorded 1e-06 and 1e-05"):
        compose([one, other])
    assert compose([one, other], delta=1e-6).delta == 1e-6
    with pytest.raises(InvalidArgumentError, match="at least one run"):
        compose([])


SETTINGS = {"batch_size": 60, "noise_multiplier": 1.0, "steps": 300, "target_epsilon": 2.0}


@pytest.mark.parametrize("sampling", ["poisson", "shuffle"])
@pytest.mark.parametrize("unknown", ["batch_size", "noise_multiplier", "steps"])
def test_what_is_solved_for_meets_the_target_and_hardly_anything_more_does(unknown, sampling):
    common = {"num_examples": 3000, "delta": 1e-5}
    given = SETTINGS | {"noise_multiplier": 1.0 if sampling == "poisson" else 8.0, unknown: None}
    report = solve(**common, **given, sampling=sampling)
    answer = report.solved[unknown]
    target = given.pop("target_epsilon")
    assert report.epsilon <= target
    beyond = {"noise_multiplier": answer * 0.998, "batch_size": answer + 1, "steps": answer + 1}[unknown]
    assert dpsgd(**common, **{**given, unknown: beyond}, sampling=sampling).epsilon > target
    assert dpsgd(**common, **{**given, unknown: answer}, sampling=sampling).epsilon == report.epsilon
    if unknown == "steps":
        assert report.solved["epochs"] == answer * 60 / 3000


def test_the_epsilon_of_settings_is_solved_for_too():
    report = solve(**DPSGD)
    assert report.solved == {"epsilon": report.epsilon} and report.epsilon == dpsgd(**DPSGD).epsilon
    assert str(report).startswith("Solved for: epsilon = 2.382.\n")
    assert strict_json(report.to_json())["solved"]["epsilon"] == report.epsilon


def test_a_printed_noise_multiplier_is_never_too_small():
    report = solve(num_examples=1000, delta=1e-5, batch_size=10, steps=1000, target_epsilon=1.0)
    printed = float(str(report).split("noise multiplier = ")[1].split()[0].rstrip("."))
    assert report.solved["noise_multiplier"] <= printed <= report.solved["noise_multiplier"] * 1.00002


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": None, "batch_size": None}, "2 of batch_size, noise_multiplier, epochs or steps, target_epsilon"),
        ({}, "0 of batch_size"),
        ({"noise_multiplier": None, "target_epsilon": -1.0}, "target_epsilon=-1"),
        ({"steps": None, "noise_multiplier": 0.0}, "noise_multiplier=0.0"),
        ({"steps": None, "batch_size": 4000}, "batch_size=4000"),
        ({"steps": None, "target_epsilon": 1e-3}, "by a single step"),
        ({"batch_size": None, "target_epsilon": 1e-3}, "by a single example"),
    ],
)
def test_what_cannot_be_solved_gets_one_sentence(changes, sentence):
    with pytest.raises(InvalidArgumentError, match=sentence):
        solve(num_examples=3000, delta=1e-5, **{**SETTINGS, **changes})


# The text, the JSON and the table.


def test_the_table_has_a_row_for_each_account():
    events = [Event.unknown(count=3, noise_multiplier=2.0), Event.unknown(count=1, noise_multiplier=0.0, unit="client")]
    report = compute_epsilon(events, delta=1e-5)
    example, client = csv.DictReader(io.StringIO(report.to_csv()))
    assert float(example["epsilon"]) == report.accounts[0].epsilon and example["releases"] == "3"
    assert (client["unit"], client["epsilon"], client["samplers"]) == ("client", "inf", "unknown")


def test_no_noise_is_called_no_privacy():
    report = dpsgd(**{**DPSGD, "noise_multiplier": 0})
    assert report.epsilon == math.inf
    assert "epsilon is infinite" in str(report) and "no privacy guarantee" in " ".join(str(report).split())
    fields = strict_json(report.to_json())
    assert fields["epsilon"] == fields["accounts"][0]["epsilon_rdp"] == "Infinity"
    assert fields["accounts"][0]["is_private"] is False
    assert float(fields["epsilon"]) == math.inf


def test_json_holds_the_figures_in_full():
    report = dpsgd(**DPSGD)
    fields = strict_json(report.to_json())
    assert fields == report.to_dict()
    assert fields["epsilon"] == report.epsilon and fields["recorded"] is False
    account = fields["accounts"][0]
    assert (account["unit"], account["relation"], account["accountant"]) == ("example", "add_or_remove_one", "pld")
    assert Event(**account["events"][0]) == report.accounts[0].events[0]


def test_json_takes_numbers_of_numpy():
    np = pytest.importorskip("numpy")
    event = Event.unknown(count=np.int64(3), noise_multiplier=np.float32(4))
    assert strict_json(compute_epsilon(event, delta=1e-5).to_json())["accounts"][0]["events"][0]["count"] == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.38171, "2.382"), (2.3811, "2.382"), (2.0, "2"), (54.0458, "54.05"), (6269.96, "6,270"),
     (123456.2, "123,500"), (0.00123411, "0.001235"), (9.9999, "10"), (math.inf, "infinite")],
)  # fmt: skip
def test_quoted_figures_are_rounded_up(value, text):
    assert statement.figure(value) == text


def test_a_typed_in_report_says_so():
    text = " ".join(str(fedavg(**FEDAVG)).split())
    assert "typed in, not recorded by a run" in text
    assert "one client, with all of its data" in text
    assert "adding or removing one client" in text
    assert "hyper-parameters" in text
    assert max(len(line) for line in str(fedavg(**FEDAVG)).splitlines()) <= 100


def test_laplace_noise_is_stated_with_its_pure_epsilon():
    report = fedavg(**{**FEDAVG, "mechanism": "laplace", "noise_multiplier": 5.0})
    (account,) = report.accounts
    assert f"By pure DP:       epsilon = {figure(account.epsilon_pure)} at delta = 0" in str(report)
    assert "Laplace noise, whose scale is 5 times the clip of the l1 norm" in " ".join(str(report).split())
    assert strict_json(report.to_json())["accounts"][0]["epsilon_pure"] == account.epsilon_pure
    with pytest.raises(InvalidArgumentError, match=r"mechanism='uniform' is unknown"):
        dpsgd(**{**DPSGD, "mechanism": "uniform"})


def test_trees_are_stated_as_what_they_are():
    report = dpftrl(num_examples=1000, batch_size=1, noise_multiplier=5.0, epochs=2, delta=1e-6)
    assert "2,000 steps in 2 trees of partial sums with at most 1,000 leaves, in each of which" in " ".join(
        str(report).split()
    )
    (account,) = report.accounts
    assert (account.relation, account.epsilon) == ("zero_out", account.epsilon_without_amplification)
    assert "one tree of partial sums with at most 3 leaves" in " ".join(
        str(dpftrl(num_examples=9, batch_size=4, noise_multiplier=5.0, epochs=1, delta=1e-3)).split()
    )
    with pytest.raises(InvalidArgumentError, match="batch_size"):
        dpftrl(num_examples=1000, batch_size=1001, noise_multiplier=5.0, epochs=2, delta=1e-6)


def test_a_search_is_stated_as_one(tmp_path):
    one = compute_epsilon(a_run(tmp_path, [Event.poisson(count=500, noise_multiplier=2.0, sampling_probability=0.01)]))
    searched = best_of(one, distribution="geometric", mean=10)
    assert searched.epsilon == BestOf("geometric", 10).epsilon(one.accounts[0].events, one.delta) > one.epsilon
    everyone = Event.unknown(count=500, noise_multiplier=2.0)
    unamplified = BestOf("geometric", 10).epsilon(everyone, one.delta)
    assert searched.accounts[0].epsilon_without_amplification == pytest.approx(unamplified)
    text = " ".join(str(searched).split())
    assert "the best of a number of such runs, drawn beforehand: geometric, 10 on average" in text
    assert "By PLD: no bound is known" in text and "A search for hyper-parameters" not in text
    assert strict_json(searched.to_json())["search"] == {"distribution": "geometric", "mean": 10}


def test_local_releases_are_stated_as_what_they_are():
    report = compute_epsilon([Event.local(count=30, participations=3, noise_multiplier=2.0, population=90)], delta=1e-3)
    text = " ".join(str(report).split())
    assert (
        "30 rounds, in at most 3 of which any one client of 90 reported, with noise that it added itself (local" in text
    )
    assert "nobody can tell which of any two reports any one client sent" in text


def test_noise_of_clients_stands_beside_that_of_the_server():
    settings = {"num_clients": 90, "clients_per_round": 30, "rounds": 7, "delta": 1e-3}
    both = fedavg(**settings, noise_multiplier=2.0, local_noise_multiplier=20.0, sampling="cyclic")
    central, local = sorted(both.accounts, key=lambda account: account.relation != "zero_out")
    assert central.epsilon == accounting.gaussian_epsilon(noise_multiplier=2.0, delta=1e-3, releases=3)
    assert local.epsilon == accounting.gaussian_epsilon(noise_multiplier=10.0, delta=1e-3, releases=3)
    alone = fedavg(**settings, noise_multiplier=0.0, local_noise_multiplier=20.0)
    assert [account.relation for account in alone.accounts] == ["local"]
    assert alone.epsilon == accounting.gaussian_epsilon(noise_multiplier=10.0, delta=1e-3, releases=7)
