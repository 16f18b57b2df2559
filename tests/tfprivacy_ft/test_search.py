"""The best of a random number of runs: bounds held against exact divergences, and what the formulas say of extremes."""

import math

import numpy as np
import pytest

from tfprivacy_ft import accounting, bounds
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedEventError
from tfprivacy_ft.events import Event
from tfprivacy_ft.search import BestOf

DELTA = 1e-5
RUN = Event.poisson(count=500, noise_multiplier=2.0, sampling_probability=0.01)
DISTRIBUTIONS = ("logarithmic", "geometric", "poisson")


def generating_function(search):
    """E[s^K], of the number of runs K."""
    if search.distribution == "poisson":
        return lambda s: np.exp(search.mean * (s - 1))
    gamma = search._gamma()
    if search.distribution == "geometric":
        return lambda s: gamma * s / (1 - (1 - gamma) * s)
    return lambda s: np.log1p(-(1 - gamma) * s) / math.log(gamma)


def divergence(p, q, order):
    return np.logaddexp.reduce(order * np.log(p) + (1 - order) * np.log(q)) / (order - 1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("mean", [1.5, 4.0, 50.0])
def test_the_bound_holds_for_every_outcome_of_a_mechanism(distribution, mean, monkeypatch):
    """A mechanism with a few outcomes, from bad to good: the best of K runs has a distribution that can be computed."""
    search, orders = BestOf(distribution, mean), np.array([1.5, 2.0, 4.0, 8.0, 20.0])
    random = np.random.default_rng(3)
    for _ in range(20):
        p, q = (random.dirichlet(np.full(6, 3.0)) for _ in range(2))
        of_one = np.array([max(divergence(p, q, order), divergence(q, p, order)) for order in orders])
        best = [np.diff(generating_function(search)(np.minimum(np.cumsum([0, *d]), 1.0))) for d in (p, q)]
        if distribution == "poisson":
            best = [np.append(b, math.exp(-mean)) for b in best]  # no run at all shows something that is public
        given = []
        monkeypatch.setattr(accounting, "renyi_divergences", lambda events, d=of_one: (orders, d))
        with bounds.quiet_accountant() as dp_accounting:
            monkeypatch.setattr(
                dp_accounting.rdp, "compute_epsilon", lambda o, total, delta, g=given: (g.append((o, total)), 0)[1:]
            )
            search.epsilon(RUN, DELTA)
            monkeypatch.undo()
        ((usable, found),) = given
        for order, bound in zip(usable, found, strict=True):
            exact = max(divergence(*best, order), divergence(*best[::-1], order))
            assert exact <= bound + 1e-9


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_search_costs_more_than_a_run_and_far_less_than_all_of_them(distribution):
    alone = accounting.epsilon(RUN, DELTA, accountant="rdp")
    costs = [BestOf(distribution, mean).epsilon(RUN, DELTA) for mean in (2, 10, 100)]
    assert alone < costs[0] < costs[1] < costs[2]
    assert distribution == "poisson" or costs[2] < 3 * alone
    assert costs[1] < 3 * alone
    assert costs[2] < accounting.epsilon(RUN.with_count(100 * RUN.count), DELTA, accountant="rdp")


def test_hardly_any_search_is_hardly_any_cost():
    alone = accounting.epsilon(RUN, DELTA, accountant="rdp")
    assert BestOf("poisson", 1e-9).epsilon(RUN, DELTA) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("mean", [1.3, 12.0])
def test_as_many_runs_are_drawn_as_are_accounted_for(distribution, mean):
    """The mean of 20,000 draws is within six of its standard deviations."""
    search = BestOf(distribution, mean)
    draws = np.array([search.draw() for _ in range(20_000)])
    assert abs(draws.mean() - mean) < 6 * draws.std() / math.sqrt(len(draws))
    assert mean > 2 or draws.min() == (0 if distribution == "poisson" else 1)
    s = 0.7
    powers = s**draws
    expected = generating_function(search)(s)
    assert abs(powers.mean() - expected) < 6 * powers.std() / math.sqrt(len(draws))


def test_nothing_released_and_no_noise():
    for distribution in DISTRIBUTIONS:
        search = BestOf(distribution, 5)
        assert search.epsilon([], DELTA) == 0.0
        assert search.epsilon(Event.unknown(count=1, noise_multiplier=0.0), DELTA) == math.inf


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(("uniform", 5), "distribution='uniform'"), (("geometric", 1.0), "mean=1.0"), (("poisson", 0), "mean=0"),
     (("logarithmic", math.nan), "mean=nan")],
)  # fmt: skip
def test_what_is_no_search_is_refused(arguments, sentence):
    with pytest.raises(InvalidArgumentError, match=sentence):
        BestOf(*arguments)


def test_what_has_no_divergence_is_refused():
    of_user = Event.poisson(count=10, noise_multiplier=1.0, sampling_probability=0.1, unit="user", examples_per_user=3)
    with pytest.raises(UnsupportedEventError, match="no Renyi divergence"):
        BestOf("geometric", 3).epsilon(of_user, DELTA)
    with pytest.raises(InvalidArgumentError, match="delta"):
        BestOf("geometric", 3).epsilon(RUN, 2.0)
