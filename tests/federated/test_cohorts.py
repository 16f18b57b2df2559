"""Cohorts: who is drawn, and that what they are accounted for is what was drawn."""

import json
import math

import numpy as np
import pytest

from federated import cohorts
from tfprivacy_ft import accounting
from tfprivacy_ft.compute_epsilon import compute_epsilon
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedEventError
from tfprivacy_ft.events import merge
from tfprivacy_ft.ledger import Ledger

NAMES = ["poisson", "fixed", "cyclic"]


def run(drawn, ledger, rounds, **settings):
    """Rounds as a training makes them: reserved, drawn, settled together."""
    settings = {"noise_multiplier": 1.0, **settings}
    events, members = [], []
    reserved = []
    for _ in range(rounds):
        events.append(drawn.event(**settings))
        reserved.append(ledger.reserve(events[-1]))
        members.append(drawn.draw())
    (together,) = merge(events)
    ledger.settle(reserved, together)
    return members


def most_participations(members, num_clients):
    return np.bincount(np.concatenate(members), minlength=num_clients).max()


# What all of them promise.


@pytest.mark.parametrize("name", NAMES)
def test_members_are_distinct_increasing_and_there(name):
    drawn = cohorts.make(name, 23, 5)
    assert isinstance(drawn, cohorts.Cohorts) and (drawn.num_clients, drawn.clients_per_round) == (23, 5)
    for _ in range(50):
        members = drawn.draw()
        assert np.issubdtype(members.dtype, np.integer)
        assert np.all(np.diff(members) > 0) and np.all((members >= 0) & (members < 23))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("mechanism", "clip"), [("gaussian", 0.5), ("laplace", None)])
def test_an_event_holds_what_it_was_told(name, mechanism, clip):
    drawn = cohorts.make(name, 20, 5)
    event = drawn.event(noise_multiplier=1.5, mechanism=mechanism, l2_norm_clip=clip, rounds=7)
    assert (event.unit, event.mechanism, event.l2_norm_clip) == ("client", mechanism, clip)
    assert (event.noise_multiplier, event.count, event.population) == (1.5, 7, 20)


@pytest.mark.parametrize("name", NAMES)
def test_many_rounds_are_the_sum_of_single_ones(name):
    drawn = cohorts.make(name, 10, 3)
    for done in range(9):
        ahead = drawn.event(noise_multiplier=1.0, rounds=6)
        twin = cohorts.make(name, 10, 3)
        twin.go_on_from(drawn.position(), released_since=0)
        singles = []
        for _ in range(6):
            singles.append(twin.event(noise_multiplier=1.0))
            twin.draw()
        assert merge(singles) == (ahead,), done
        drawn.draw()


@pytest.mark.parametrize("name", NAMES)
def test_asking_for_an_event_changes_nothing(name):
    drawn = cohorts.make(name, 10, 4)
    assert drawn.event(noise_multiplier=1.0) == drawn.event(noise_multiplier=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_no_seed_of_numpy_reaches_the_draw(name):
    def first(seed):
        np.random.seed(seed)
        return cohorts.make(name, 1000, 500).draw().tolist()

    assert first(0) != first(0)


@pytest.mark.parametrize("name", NAMES)
def test_a_position_is_json_and_goes_on(name):
    drawn = cohorts.make(name, 10, 4)
    drawn.draw()
    for released_since in (None, 0, 5):
        again = cohorts.make(name, 10, 4)
        again.go_on_from(json.loads(json.dumps(drawn.position())), released_since=released_since)
        assert again.event(noise_multiplier=1.0).sampler == drawn.event(noise_multiplier=1.0).sampler


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "call",
    [
        lambda name: cohorts.make(name, 10, 11),
        lambda name: cohorts.make(name, 10, 0),
        lambda name: cohorts.make(name, 10, math.nan),
        lambda name: cohorts.make(name, 0, 1),
        lambda name: cohorts.make(name, 10.5, 1),
        lambda name: cohorts.make(name, 10, 2).event(noise_multiplier=-1.0),
        lambda name: cohorts.make(name, 10, 2).event(noise_multiplier=1.0, rounds=0),
        lambda name: cohorts.make(name, 10, 2).go_on_from({"order": [0, 1], "round": 3, "may_repeat": False}),
        lambda name: cohorts.make(name, 2, 1).go_on_from({"order": [0, 1], "round": -1, "may_repeat": False}),
        lambda name: cohorts.make(name, 2, 1).go_on_from({"order": [0, 0], "round": 1, "may_repeat": False}),
        lambda name: cohorts.make(name, 10, 2).go_on_from({"something": 1}),
        lambda name: cohorts.make(name, 10, 2).go_on_from(None),
    ],
)
def test_bad_arguments_are_refused(name, call):
    with pytest.raises(InvalidArgumentError):
        call(name)


@pytest.mark.parametrize("name", ["fixed", "cyclic"])
@pytest.mark.parametrize("size", [2.5, True, "3"])
def test_only_poisson_cohorts_have_broken_sizes(name, size):
    with pytest.raises(InvalidArgumentError, match=f"for {name} cohorts of 10 clients: give a whole number"):
        cohorts.make(name, 10, size)
    assert cohorts.make("poisson", 10, 2.5).event(noise_multiplier=1.0).sampling_probability == 0.25
    assert len(cohorts.make(name, 10, 3.0).draw()) == 3  # a process keeps its expected size as a float


def test_an_unknown_name_lists_the_known_ones():
    for name in ("shuffled", None):
        with pytest.raises(InvalidArgumentError, match="use one of poisson, fixed, cyclic"):
            cohorts.make(name, 10, 2)


# Poisson.


def test_poisson_rounds_cost_what_the_golden_table_says():
    drawn = cohorts.PoissonCohorts(3000, 100)
    event = drawn.event(noise_multiplier=1.0, rounds=100)
    assert event.relation == "add_or_remove_one"
    assert accounting.epsilon(event, 1e-4) == pytest.approx(1.879, abs=2e-3)
    assert accounting.epsilon(event, 1e-4, accountant="rdp") == pytest.approx(2.291, abs=2e-3)


def test_poisson_sizes_vary_around_the_expected_one():
    # 1000 draws of 50 clients at q = 0.2: the mean size is 10 +- 0.089, and leaves 10 +- 0.8 with probability below
    # 2 exp(-2 * 800^2 / 50000) < 2e-11 (Hoeffding over the 50000 coins).
    drawn = cohorts.PoissonCohorts(50, 10)
    sizes = [len(drawn.draw()) for _ in range(1000)]
    assert abs(np.mean(sizes) - 10) < 0.8 and len(set(sizes)) > 5


# Fixed.


def test_fixed_rounds_cost_what_the_golden_table_says():
    # With z / 2 for replacing one: it would be 4.0 if the factor 2 were forgotten, and 2.4 if this were called Poisson.
    event = cohorts.FixedCohorts(10_000, 100).event(noise_multiplier=1.0, rounds=1000)
    assert event.relation == "replace_one"
    assert accounting.epsilon(event, 1e-6, accountant="rdp") == pytest.approx(23.3, abs=0.05)
    with pytest.raises(UnsupportedEventError):
        accounting.epsilon(event, 1e-6)


def test_fixed_cohorts_are_uniform_and_of_one_size():
    # 2000 draws of 10 out of 50. A client's count leaves 400 +- 130 with probability 2 exp(-2 * 130^2 / 2000) < 1e-7.
    drawn = cohorts.FixedCohorts(50, 10)
    members = [drawn.draw() for _ in range(2000)]
    assert {len(each) for each in members} == {10}
    counts = np.bincount(np.concatenate(members), minlength=50)
    assert np.abs(counts - 400).max() < 145  # 50 clients: below 1e-6 in all
    # Each round is a draw of its own: 0 and 1 meet with probability 10 * 9 / (50 * 49), so 73 times of 2000 on average,
    # and not once, or 250 times, with probability below 1e-20 (Bernstein).
    assert 0 < sum(0 in each and 1 in each for each in members) < 250


# Cyclic.


@pytest.mark.parametrize(("num_clients", "size"), [(12, 4), (10, 4), (7, 7), (5, 1), (9, 5)])
def test_a_pass_takes_everybody_once(num_clients, size):
    drawn = cohorts.CyclicCohorts(num_clients, size)
    for _ in range(3):
        members = [drawn.draw() for _ in range(drawn.rounds_per_pass)]
        assert sorted(np.concatenate(members)) == list(range(num_clients))
        assert {len(each) for each in members[:-1]} <= {size} and 1 <= len(members[-1]) <= size


def test_the_order_of_a_cycle_is_drawn():
    orders = {tuple(cohorts.CyclicCohorts(30, 1).position()["order"]) for _ in range(5)}
    assert len(orders) == 5  # two of five shuffles of 30 are alike with probability below 1e-30


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 9, 10])
def test_participations_are_the_passes_begun(rounds):
    drawn, ledger = cohorts.CyclicCohorts(10, 4), Ledger.in_memory(delta=1e-5)  # passes of 3 rounds
    members = run(drawn, ledger, rounds)
    (event,) = ledger.events()
    assert (event.sampler, event.count, event.participations) == ("shuffled", rounds, math.ceil(rounds / 3))
    assert most_participations(members, 10) == event.participations


def test_three_passes_cost_three_releases():
    ledger = Ledger.in_memory(delta=1e-5)
    run(cohorts.CyclicCohorts(10, 4), ledger, 9, noise_multiplier=2.0)
    expected = accounting.gaussian_epsilon(noise_multiplier=2.0, delta=1e-5, releases=3)
    (account,) = compute_epsilon(ledger).accounts
    assert (account.unit, account.relation) == ("client", "zero_out")
    assert account.epsilon == pytest.approx(expected, rel=1e-9)
    assert account.epsilon_replace_one == pytest.approx(
        accounting.gaussian_epsilon(noise_multiplier=1.0, delta=1e-5, releases=3), rel=1e-9
    )


def test_a_cyclic_pass_costs_what_the_golden_table_says():
    event = cohorts.CyclicCohorts(60_000, 256).event(noise_multiplier=1.1, rounds=60 * math.ceil(60_000 / 256))
    assert event.participations == 60
    assert accounting.epsilon(event, 1e-5) == pytest.approx(54.05, abs=5e-3)


@pytest.mark.parametrize("seed", range(60))
def test_nobody_takes_part_more_often_than_the_ledger_says_whatever_crashes(seed):
    """Runs save their position, make rounds that it knows nothing of, die, and go on; some rounds are reserved in vain."""
    coins = np.random.default_rng(seed)
    ledger = Ledger.in_memory(delta=1e-5)
    drawn, members = cohorts.CyclicCohorts(10, 4), []
    for _ in range(coins.integers(1, 6)):
        position = json.loads(json.dumps(drawn.position()))
        lost, in_vain = coins.integers(0, 6), coins.integers(0, 2)
        members += run(drawn, ledger, lost) if lost else []
        for _ in range(in_vain):
            ledger.reserve(drawn.event(noise_multiplier=1.0))
        drawn = cohorts.CyclicCohorts(10, 4)
        drawn.go_on_from(position, **({"released_since": int(lost + in_vain)} if coins.integers(0, 2) else {}))
    members += run(drawn, ledger, 7)
    (event,) = ledger.events()
    assert most_participations(members, 10) <= event.participations


@pytest.mark.parametrize("saved_after", [0, 1, 2, 3, 4])
def test_going_on_within_a_pass_costs_nothing_if_the_rounds_since_are_known(saved_after):
    ledger = Ledger.in_memory(delta=1e-5)
    drawn = cohorts.CyclicCohorts(20, 2)  # passes of 10 rounds
    members = run(drawn, ledger, saved_after) if saved_after else []
    position = drawn.position()
    members += run(drawn, ledger, 3)
    drawn = cohorts.CyclicCohorts(20, 2)
    drawn.go_on_from(position, released_since=3)
    members += run(drawn, ledger, 17 - saved_after)
    (event,) = ledger.events()
    assert most_participations(members, 20) == event.participations == 2


def test_going_on_in_the_middle_of_a_pass_adds_a_participation_if_they_are_not():
    drawn = cohorts.CyclicCohorts(10, 4)
    drawn.draw()
    again = cohorts.CyclicCohorts(10, 4)
    again.go_on_from(drawn.position())
    assert [again.event(noise_multiplier=1.0, rounds=n).participations for n in (1, 2, 3)] == [1, 1, 2]
    assert again.draw().tolist() == drawn.draw().tolist()
    assert again.event(noise_multiplier=1.0).participations == 0


def test_what_is_owed_for_going_on_is_owed_by_whoever_goes_on_from_there():
    drawn, again, third = (cohorts.CyclicCohorts(10, 4) for _ in range(3))
    drawn.draw()
    again.go_on_from(drawn.position())
    third.go_on_from(again.position(), released_since=0)
    assert third.event(noise_multiplier=1.0).participations == 1
    third.go_on_from(again.position(), released_since=1)  # the round since then has paid
    assert third.event(noise_multiplier=1.0).participations == 0


def test_rounds_counted_twice_do_not_skip_the_beginning_of_a_pass():
    drawn, again = cohorts.CyclicCohorts(10, 4), cohorts.CyclicCohorts(10, 4)
    drawn.draw(), drawn.draw()
    again.go_on_from(drawn.position(), released_since=2)  # one round, tried twice: no new pass was begun
    assert again.event(noise_multiplier=1.0).participations == 1


def test_a_new_cycle_in_an_old_ledger_begins_a_pass():
    ledger = Ledger.in_memory(delta=1e-5)
    members = run(cohorts.CyclicCohorts(10, 4), ledger, 2) + run(cohorts.CyclicCohorts(10, 4), ledger, 2)
    (event,) = ledger.events()
    assert event.participations == 2 >= most_participations(members, 10)
