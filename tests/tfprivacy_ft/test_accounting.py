import dataclasses
import itertools
import logging
import math
import warnings

import dp_accounting
import numpy as np
import pytest
import scipy.stats
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st

from tfprivacy_ft import accounting, bounds, gaussian, pure
from tfprivacy_ft.errors import BudgetExceededError, InvalidArgumentError, UnsupportedEventError
from tfprivacy_ft.events import Event, merge
from tfprivacy_ft.releases import Release, from_events


def poisson(q, noise, steps, unit="example"):
    return Event.poisson(count=steps, noise_multiplier=noise, sampling_probability=q, unit=unit)


def shuffled(noise, passes, steps=None):
    return Event.shuffled(count=steps or passes, passes=passes, noise_multiplier=noise)


def fixed(noise, rounds, cohort, population):
    return Event.fixed(count=rounds, noise_multiplier=noise, cohort_size=cohort, population=population)


# Published and independently computed figures: (event, delta, RDP, PLD on the default grid).
GOLDEN = [
    (poisson(0.04, 1.5, 2250), 1e-5, 7.329, 6.7688),
    (poisson(0.1, 3.0, 512), 1e-6, 4.0510, 3.7697),
    (poisson(256 / 60000, 1.1, 14063), 1e-5, 2.597, 2.382),
    (shuffled(1.1, 60), 1e-5, 56.95, 54.05),
    (poisson(150 / 60000, 1.3, 6000), 1e-5, 0.72422, 0.6401),
    (poisson(1e-3, 1.0, 30000), 1e-7, 1.41550, 1.0982),
    (poisson(1.0, 1.0, 1), 1e-5, 4.7285, 4.377178),
    (poisson(0.01, 1.0, 1000, "client"), 1e-6, 2.4367, 2.1245),
    (poisson(100 / 3000, 1.0, 100, "client"), 1e-4, 2.291, 1.879),
]


@pytest.mark.parametrize(("event", "delta", "rdp", "pld"), GOLDEN)
def test_published_figures(event, delta, rdp, pld):
    assert accounting.epsilon(event, delta, accountant="rdp") == pytest.approx(rdp, rel=3e-4)
    assert accounting.epsilon(event, delta) == pytest.approx(pld, rel=3e-4)


@pytest.mark.parametrize(
    ("event", "delta", "pld"),
    [
        (poisson(256 / 60000, 1.1, 14063), 1e-5, 2.391),
        (poisson(150 / 60000, 1.3, 6000), 1e-5, 0.651),
        (poisson(1e-3, 1.0, 30000), 1e-7, 1.152),
    ],
)
def test_published_figures_on_a_coarser_grid(event, delta, pld):
    assert accounting.epsilon(event, delta, value_discretization_interval=1e-3) == pytest.approx(pld, rel=1e-3)


def test_fixed_size_cohorts_cost_ten_times_as_much_as_poisson_ones():
    event = fixed(1.0, 1000, 100, 10000)
    assert accounting.epsilon(event, 1e-6, accountant="rdp") == pytest.approx(23.3, rel=1e-3)
    with pytest.raises(UnsupportedEventError, match="fixed-size"):
        accounting.epsilon(event, 1e-6)


def test_replacing_one_of_a_shuffled_run_moves_the_sum_twice_as_far():
    (account,) = accounting.accounts(shuffled(1.1, 60), 1e-5)
    assert account.epsilon_replace_one == pytest.approx(158.4, rel=5e-4)
    assert account.epsilon_pld == account.epsilon_without_amplification == pytest.approx(54.05, rel=2e-4)


def test_local_noise_has_twice_the_sensitivity():
    assert accounting.gaussian_epsilon(noise_multiplier=1.0 / 2, delta=1e-5) == pytest.approx(10.0, rel=5e-3)


@pytest.mark.parametrize("mu", [1e-6, 1e-3, 0.1, 1.0, 7.0, 40.0, 300.0, 5000.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.1])
def test_closed_form_against_high_precision(mu, delta):
    mpmath = pytest.importorskip("mpmath")

    def true_delta(candidate):
        with mpmath.workdps(60):
            a, b = candidate / mpmath.mpf(mu) - mpmath.mpf(mu) / 2, candidate / mpmath.mpf(mu) + mpmath.mpf(mu) / 2
            return mpmath.erfc(a / mpmath.sqrt(2)) / 2 - mpmath.exp(candidate) * mpmath.erfc(b / mpmath.sqrt(2)) / 2

    spent = accounting.gaussian_epsilon(noise_multiplier=1 / mu, delta=delta)
    assert true_delta(spent) <= delta * (1 + 1e-8)
    if spent > 0:
        assert true_delta(spent * (1 - 1e-6)) > delta
        assert gaussian.delta_at(mu, spent) <= delta  # in its own arithmetic, not even by rounding


def test_the_kept_one_release_distribution_gives_what_the_accountant_of_dp_accounting_gives():
    dp_accounting = pytest.importorskip("dp_accounting")
    events = [poisson(0.02, 1.2, 300), poisson(0.05, 2.0, 50), poisson(1.0, 9.0, 4)]
    reference = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
    for event in events:
        sampled = dp_accounting.PoissonSampledDpEvent(
            event.sampling_probability, dp_accounting.GaussianDpEvent(event.noise_multiplier)
        )
        reference.compose(dp_accounting.SelfComposedDpEvent(sampled, event.count))
    assert accounting.epsilon(events, 1e-6) == pytest.approx(reference.get_epsilon(1e-6), rel=1e-5)


# Releases that count for nothing, for everything, or not together.


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_nothing_released_costs_nothing(accountant):
    assert accounting.epsilon([], 1e-5, accountant=accountant) == 0.0
    assert accounting.epsilon(poisson(0.1, 0.0, 0), 1e-5, accountant=accountant) == 0.0
    assert accounting.accounts([poisson(0.1, 1.0, 0)], 1e-5) == ()


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("event", [poisson(0.1, 0.0, 1), shuffled(0.0, 1), Event.unknown(count=1, noise_multiplier=0)])
def test_one_release_without_noise_is_no_privacy(event, accountant):
    loud = dataclasses.replace(event, noise_multiplier=5.0)
    assert accounting.epsilon([loud, event], 1e-5, accountant=accountant) == math.inf
    assert accounting.epsilon_without_amplification([loud, event], 1e-5) == math.inf


def test_no_noise_in_fixed_cohorts_is_no_privacy():
    assert accounting.epsilon(fixed(0.0, 1, 10, 100), 1e-5, accountant="rdp") == math.inf


@pytest.mark.parametrize(
    "other", [poisson(0.1, 1.0, 1, unit="client"), fixed(1.0, 1, 10, 100)], ids=lambda e: e.sampler
)
def test_units_and_replaced_examples_are_never_added(other):
    event = poisson(0.1, 1.0, 10)
    for figure in (accounting.epsilon, accounting.epsilon_without_amplification):
        with pytest.raises(UnsupportedEventError, match="do not add up"):
            figure([event, other], 1e-5)
    assert len(accounting.accounts([event, other], 1e-5)) == 2


def test_poisson_composes_with_shuffled_under_zero_out():
    events = [poisson(0.1, 1.0, 10), shuffled(2.0, 3)]
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    sampled = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0))
    accountant.compose(sampled, 10).compose(dp_accounting.GaussianDpEvent(2.0), 3)
    (account,) = accounting.accounts(events, 1e-5)
    assert account.relation == "zero_out"
    assert account.epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-4)
    assert account.epsilon > max(accounting.epsilon(event, 1e-5) for event in events)


def test_zero_counts_do_not_stand_in_the_way():
    assert accounting.epsilon([shuffled(1.0, 1), poisson(0.1, 1.0, 0)], 1e-5) == pytest.approx(4.377178, rel=1e-6)


def test_order_and_splitting_of_events_do_not_matter():
    whole = accounting.epsilon([poisson(0.01, 1.0, 100), poisson(0.02, 1.0, 50)], 1e-5)
    parts = [poisson(0.02, 1.0, 20), poisson(0.01, 1.0, 100), poisson(0.02, 1.0, 30)]
    assert accounting.epsilon(parts, 1e-5) == whole


def test_cohorts_of_everybody_are_not_sampled():
    everybody = accounting.epsilon(fixed(2.0, 1, 100, 100), 1e-5)
    assert everybody == pytest.approx(accounting.gaussian_epsilon(noise_multiplier=1.0, delta=1e-5))


def test_account_names_what_it_stands_for():
    example, client = accounting.accounts([fixed(2.0, 10, 5, 100), poisson(0.01, 1.0, 100)], 1e-5)
    assert (example.unit, example.relation, example.accountant) == ("example", "add_or_remove_one", "pld")
    assert example.epsilon == example.epsilon_pld < example.epsilon_rdp < example.epsilon_without_amplification
    assert example.epsilon_replace_one is None
    assert (client.unit, client.relation, client.accountant) == ("client", "replace_one", "rdp")
    assert client.epsilon_pld is None and client.epsilon == client.epsilon_rdp
    assert (client.samplers, client.releases) == (("fixed",), 10)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 1.5, math.nan, "1e-5", None])
def test_delta_outside_its_range_is_refused(delta):
    for figure in (accounting.epsilon, accounting.epsilon_without_amplification, accounting.accounts):
        with pytest.raises(InvalidArgumentError, match="delta"):
            figure([], delta)
    with pytest.raises(InvalidArgumentError, match="delta"):
        accounting.check_delta(delta, 10)


def test_an_unknown_accountant_is_refused():
    with pytest.raises(InvalidArgumentError, match="accountant"):
        accounting.epsilon([], 1e-5, accountant="moments")
    with pytest.raises(InvalidArgumentError, match="accountant"):
        accounting.solve_batch_size(
            target_epsilon=1.0, delta=1e-5, events_for=lambda n: poisson(n / 9, 1.0, 1), most=9, accountant="moments"
        )


def test_a_large_delta_is_warned_about():
    with pytest.warns(UserWarning, match="records whole"):
        accounting.check_delta(1 / 1000, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accounting.check_delta(0.9e-3, 1000)
        accounting.check_delta(0.5)


# Properties that every accountant must have.

noises = st.floats(0.6, 20.0)
rates = st.floats(1e-3, 0.5)
counts = st.integers(1, 3000)
quick = settings(max_examples=8, deadline=None, derandomize=True)


def spend(accountant, q, noise, steps):
    grid = 1e-3 if accountant == "pld" else None  # ten times as fast, and held to the same properties
    return accounting.epsilon(poisson(q, noise, steps), 1e-5, accountant=accountant, value_discretization_interval=grid)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
class TestEveryAccountant:
    @quick
    @given(q=rates, noise=noises, steps=counts, more=st.integers(1, 1000))
    def test_more_steps_cost_more(self, accountant, q, noise, steps, more):
        assert spend(accountant, q, noise, steps) <= spend(accountant, q, noise, steps + more) + 1e-9

    @quick
    @given(q=rates, noise=noises, steps=counts, factor=st.floats(1.01, 3.0))
    def test_more_noise_costs_less(self, accountant, q, noise, steps, factor):
        assert spend(accountant, q, noise * factor, steps) <= spend(accountant, q, noise, steps) + 1e-6

    @quick
    @given(q=rates, noise=noises, steps=counts, factor=st.floats(1.01, 2.0))
    def test_more_sampling_costs_more(self, accountant, q, noise, steps, factor):
        assert spend(accountant, q, noise, steps) <= spend(accountant, q * factor, noise, steps) + 1e-6


@pytest.mark.slow
@quick
@given(q=rates, noise=noises, steps=counts, delta=st.sampled_from([1e-8, 1e-5, 1e-3]))
def test_pld_is_below_rdp_and_below_no_amplification(q, noise, steps, delta):
    pld = accounting.epsilon(poisson(q, noise, steps), delta)
    assert pld <= accounting.epsilon(poisson(q, noise, steps), delta, accountant="rdp") * 1.001 + 2e-3
    assert pld <= accounting.epsilon_without_amplification(poisson(q, noise, steps), delta)


@pytest.mark.parametrize(
    ("event", "delta"),
    [
        (poisson(0.01, 0.02, 100), 1e-6),
        (poisson(0.5, 0.3, 10**6), 1e-6),
        (poisson(0.3, 0.001, 5), 1e-5),
        (poisson(1e-6, 500.0, 10**6), 1e-10),
        (poisson(1e-9, 0.5, 10**6), 1e-300),
        (poisson(0.999999, 1.0, 10), 1e-5),
    ],
)
def test_extremes_give_a_finite_figure(event, delta):
    (account,) = accounting.accounts(event, delta)
    assert 0 < account.epsilon_pld <= account.epsilon_without_amplification < math.inf
    assert account.epsilon_rdp > 0


def test_rounding_never_counts_as_perfect_privacy():
    # The divergence of one release is about q^2 / noise^2 = 4e-18 here, far below the rounding of the sums.
    spent = accounting.epsilon(poisson(1e-6, 500.0, 10**6), 1e-10, accountant="rdp")
    assert spent >= 1e-6


def test_an_order_below_zero_is_not_used(monkeypatch):
    dp_accounting = pytest.importorskip("dp_accounting")

    class Rounded(dp_accounting.rdp.RdpAccountant):
        @property
        def rdp(self):
            return super().rdp if self.orders[0] == 8 else super().rdp - 1e6

    release = from_events([poisson(0.123, 1.0, 1)])[0]
    monkeypatch.setattr(dp_accounting.rdp, "RdpAccountant", Rounded)
    orders, divergences = bounds.rdp_of_one.__wrapped__(release)
    assert [order for order, divergence in zip(orders, divergences, strict=True) if divergence < math.inf] == [8]


def test_the_accountant_is_quiet_and_leaves_logging_as_it_was(caplog):
    logger = logging.getLogger("absl")
    before = (logger.level, list(logger.filters), logger.disabled)
    accounting.accounts([poisson(0.9999, 0.05, 77)], 1e-5)
    assert not caplog.records
    assert (logger.level, list(logger.filters), logger.disabled) == before
    with bounds.quiet_accountant():
        logger.error("somebody else's line")
    assert "somebody else's line" in caplog.text


def test_only_lines_of_the_accountant_are_dropped(caplog):
    with bounds.quiet_accountant():
        record = logging.LogRecord("absl", logging.WARNING, "/x/dp_accounting/rdp/a.py", 1, "noise", None, None)
        logging.getLogger("absl").handle(record)
    assert not caplog.records


@pytest.mark.parametrize(
    "events",
    [
        [poisson(256 / 60000, 1.1, 1175)],
        [poisson(4096 / 60000, 2.0, 15), poisson(1.0, 40.0, 1)],
        [poisson(0.1, 20.0, 50)],
        [poisson(0.02, 0.6, 400), shuffled(5.0, 2)],
        [shuffled(1.1, 60)],
        [fixed(1.0, 10, 100, 10_000)],
        [Event.poisson(count=20, noise_multiplier=4.0, sampling_probability=0.1, unit="user", examples_per_user=3)],
        [Event.poisson(count=5, noise_multiplier=9.0, sampling_probability=0.1, mechanism="laplace")],
        [poisson(0.1, 0.0, 1)],
        [],
    ],
    ids=["small", "head and mean", "little", "zero out", "shuffled", "fixed", "user", "laplace", "no noise", "nothing"],
)
def test_a_quick_epsilon_is_a_bound_that_is_hardly_larger(events):
    found = max((account.epsilon for account in accounting.accounts(events, 1e-5)), default=0.0)
    assert found <= accounting.quick_epsilon(events, 1e-5) <= 1.005 * found


@pytest.mark.parametrize("noise", [2e-3, 1e-3, 1e-4, 1e-7])
def test_next_to_no_noise_is_a_large_epsilon_and_no_error(noise):
    event = poisson(0.01, noise, 100)
    found = accounting.epsilon(event, 1e-5)
    assert 0.5 / noise**2 < found <= accounting.quick_epsilon(event, 1e-5) <= 1.005 * found
    assert found <= accounting.epsilon_without_amplification(event, 1e-5)


def test_a_progress_bar_may_ask_often():
    event = poisson(0.011, 1.0, 1234)
    accounting.epsilon(event, 1e-5)
    costly = (bounds.rdp_of_one, bounds._loss_of_one, bounds.rdp_epsilon, bounds.pld_epsilon)
    computed = [function.cache_info().misses for function in costly]
    for _ in range(100):
        accounting.epsilon([event, poisson(0.5, 1.0, 0)], 1e-5)
    assert [function.cache_info().misses for function in costly] == computed


# Solving.


@pytest.mark.parametrize(
    ("q", "steps", "target", "accountant", "grid", "noise"),
    [
        (0.01, 1000, 1.0, "pld", 1e-3, 1.4158),
        (0.01, 1000, 1.0, "rdp", None, 1.513),
        (0.04, 2250, 8.0, "pld", 1e-3, 1.34596),
        (0.04, 2250, 8.0, "rdp", None, 1.41587),
    ],
)
def test_published_noise_multipliers(q, steps, target, accountant, grid, noise):
    solved = accounting.solve_noise_multiplier(
        target_epsilon=target,
        delta=1e-5,
        events_for=lambda z: poisson(q, z, steps),
        accountant=accountant,
        value_discretization_interval=grid,
    )
    assert solved == pytest.approx(noise, rel=2e-4)


@pytest.mark.parametrize(
    ("q", "steps", "target"),
    [(0.01, 1000, 1.0), (0.04, 2250, 8.0), (0.01, 1000, 0.05), pytest.param(0.01, 10**5, 60.0, marks=pytest.mark.slow)],
)
def test_solved_noise_keeps_the_promise_and_wastes_nothing(q, steps, target):
    solved = accounting.solve_noise_multiplier(
        target_epsilon=target, delta=1e-5, events_for=lambda z: poisson(q, z, steps)
    )
    assert accounting.epsilon(poisson(q, solved, steps), 1e-5) <= target
    assert accounting.epsilon(poisson(q, solved * 0.999, steps), 1e-5) > target


@pytest.mark.parametrize(
    ("events", "target", "delta"),
    [
        (lambda z: poisson(4096 / 60_000, z, 586), 3.0, 1e-5),
        (lambda z: poisson(125 / 455, z, 73), 1.0, 1e-3),
        (lambda z: [poisson(0.2, z, 200), poisson(0.1, 1.5 * z, 100)], 3.0, 1e-5),
    ],
)
def test_noise_is_solved_for_in_a_few_looks_at_the_fine_grid(events, target, delta, monkeypatch):
    looks, measure = [], bounds.pld_epsilon
    monkeypatch.setattr(bounds, "pld_epsilon", lambda *given: looks.append(given) or measure(*given))
    accounting.solve_noise_multiplier(target_epsilon=target, delta=delta, events_for=events)
    fine = [interval for _, _, interval in looks if interval is None]
    assert len(fine) <= 3 and len(looks) <= 12


@pytest.mark.parametrize(
    ("q", "noise", "steps"), [(0.07, 2.5, 600), (1e-3, 0.7, 10**5), (0.3, 1.1, 500), (0.5, 0.4, 9)]
)
def test_a_few_orders_choose_the_grid_that_all_do(q, noise, steps, monkeypatch):
    releases = from_events([poisson(q, noise, steps)])
    quick = bounds._default_interval(releases)
    monkeypatch.setattr(bounds, "_FEW_ORDERS", (1.1,))  # too few to show anything, so all are looked at
    assert bounds.rdp_epsilon(releases, bounds._TAIL, (1.1,)) > 50
    assert bounds._default_interval(releases) == quick


@settings(max_examples=100, deadline=None, derandomize=True)
@given(passes=st.integers(1, 500), target=st.floats(0.01, 100.0), delta=st.sampled_from([1e-9, 1e-5, 1e-2]))
def test_solved_noise_is_never_less_private_than_asked(passes, target, delta):
    solved = accounting.solve_noise_multiplier(
        target_epsilon=target, delta=delta, events_for=lambda z: [shuffled(z, passes)]
    )
    assert accounting.epsilon(shuffled(solved, passes), delta) <= target
    assert accounting.epsilon(shuffled(solved * 0.999, passes), delta) > target


@pytest.mark.parametrize("target", [1e-5, 3e-6, 1e-6])
def test_noise_is_found_up_to_the_end_of_the_range(target):
    solved = accounting.solve_noise_multiplier(target_epsilon=target, delta=1e-9, events_for=lambda z: shuffled(z, 1))
    assert accounting.gaussian_epsilon(noise_multiplier=solved, delta=1e-9) <= target
    assert accounting.gaussian_epsilon(noise_multiplier=solved * 0.999, delta=1e-9) > target


def test_solving_counts_what_was_spent_before():
    before = shuffled(3.0, 2)
    solved = accounting.solve_noise_multiplier(
        target_epsilon=3.0, delta=1e-5, events_for=lambda z: [before, shuffled(z, 5)]
    )
    assert accounting.epsilon([before, shuffled(solved, 5)], 1e-5) == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_a_target_that_no_noise_reaches_is_refused(accountant):
    for events_for in (lambda z: [shuffled(0.5, 10), shuffled(z, 1)], lambda z: shuffled(z, 0, steps=3)):
        with pytest.raises(InvalidArgumentError, match="target_epsilon"):
            accounting.solve_noise_multiplier(
                target_epsilon=1.0, delta=1e-5, events_for=events_for, accountant=accountant
            )


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_after_a_release_without_noise_no_noise_reaches_the_target(accountant):
    with pytest.raises(InvalidArgumentError, match="not met by any noise multiplier"):
        accounting.solve_noise_multiplier(
            target_epsilon=1.0,
            delta=1e-5,
            events_for=lambda z: [poisson(0.1, z, 10), poisson(0.1, 0.0, 1)],
            accountant=accountant,
        )


@pytest.mark.parametrize("target", [0, -1, math.inf, math.nan])
def test_target_outside_its_range_is_refused(target):
    with pytest.raises(InvalidArgumentError, match="target_epsilon"):
        accounting.solve_noise_multiplier(target_epsilon=target, delta=1e-5, events_for=lambda z: shuffled(z, 1))
    with pytest.raises(InvalidArgumentError, match="target_epsilon"):
        accounting.solve_steps(target_epsilon=target, delta=1e-5, event=shuffled(1.0, 1))


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("q", "noise", "target"), [(0.01, 1.0, 2.0), (0.05, 3.0, 0.7)])
def test_solved_steps_are_the_last_that_fit(q, noise, target, accountant):
    event = poisson(q, noise, 1)
    steps = accounting.solve_steps(target_epsilon=target, delta=1e-5, event=event, accountant=accountant)
    assert accounting.epsilon(poisson(q, noise, steps), 1e-5, accountant=accountant) <= target
    assert accounting.epsilon(poisson(q, noise, steps + 1), 1e-5, accountant=accountant) > target


@settings(max_examples=60, deadline=None, derandomize=True)
@given(noise=st.floats(0.3, 200.0), target=st.floats(0.05, 20.0), spent=st.integers(0, 3))
def test_solved_steps_never_pass_the_target(noise, target, spent):
    before = [Event.unknown(count=spent, noise_multiplier=30.0)]
    one = Event.unknown(count=1, noise_multiplier=noise)
    try:
        steps = accounting.solve_steps(target_epsilon=target, delta=1e-5, event=one, spent=before)
    except BudgetExceededError:
        assert accounting.epsilon(before, 1e-5) > target
        return
    assert accounting.epsilon([*before, one.with_count(steps)], 1e-5) <= target
    assert accounting.epsilon([*before, one.with_count(steps + 1)], 1e-5) > target


def test_solved_steps_of_a_shuffle_are_whole_passes():
    event = shuffled(10.0, 2, steps=50)
    steps = accounting.solve_steps(target_epsilon=4.3772, delta=1e-5, event=event)
    assert steps == 100 * 25


def test_no_step_fits_without_noise_or_budget():
    assert accounting.solve_steps(target_epsilon=1.0, delta=1e-5, event=poisson(0.1, 0.0, 1)) == 0
    assert accounting.solve_steps(target_epsilon=0.1, delta=1e-5, event=poisson(0.1, 0.8, 1)) == 0


def test_steps_are_capped():
    event = Event.unknown(count=1, noise_multiplier=1e6)
    assert accounting.solve_steps(target_epsilon=1.0, delta=1e-5, event=event, most=1000) == 1000


def test_a_budget_already_passed_is_an_error_not_zero_steps():
    spent = [Event.unknown(count=10, noise_multiplier=1.0)]
    with pytest.raises(BudgetExceededError, match="already spent"):
        accounting.solve_steps(target_epsilon=1.0, delta=1e-5, event=spent[0].with_count(1), spent=spent)


# All examples of one user.


HAS_MIXTURES = hasattr(dp_accounting.dp_event, "MixtureOfGaussiansDpEvent")


def of_users(event, most):
    return dataclasses.replace(event, unit="user", examples_per_user=most)


@pytest.mark.parametrize("event", [shuffled(8.0, 3), Event.unknown(count=5, noise_multiplier=9.0)])
def test_where_nothing_is_sampled_a_user_moves_the_sum_by_all_of_its_examples(event):
    grouped, alone = of_users(event, 4), dataclasses.replace(event, noise_multiplier=event.noise_multiplier / 4)
    for accountant in ("pld", "rdp"):
        expected = accounting.epsilon(alone, 1e-5, accountant=accountant)
        assert accounting.epsilon(grouped, 1e-5, accountant=accountant) == pytest.approx(expected, rel=1e-12)
    (account,) = accounting.accounts(grouped, 1e-5)
    assert account.unit == "user" and not account.by_group_lemma


def test_a_user_with_one_example_has_the_epsilon_of_an_example():
    event = poisson(0.01, 1.1, 200)
    (of_user,), (of_example,) = (accounting.accounts(e, 1e-5) for e in (of_users(event, 1), event))
    assert of_user.epsilon_pld == of_example.epsilon_pld and of_user.epsilon_rdp == of_example.epsilon_rdp


@pytest.mark.slow
def test_a_sampled_user_lies_between_one_example_and_all_of_them_in_every_batch():
    event, delta = poisson(0.02, 1.5, 100), 1e-5
    figures = [accounting.accounts(of_users(event, most), delta)[0] for most in (1, 2, 3)]
    for less, more in itertools.pairwise(figures):
        assert less.epsilon_pld < more.epsilon_pld and less.epsilon_rdp < more.epsilon_rdp
    for most, account in zip((1, 2, 3), figures, strict=True):
        assert account.epsilon_pld <= account.epsilon_rdp <= account.epsilon_without_amplification
        assert account.epsilon_pld >= (1 if account.by_group_lemma else 0.5) * most * figures[0].epsilon_pld
    assert figures[1].by_group_lemma != HAS_MIXTURES


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MIXTURES, reason="needs a newer dp_accounting")
def test_a_sampled_user_is_a_binomial_mixture():
    q, noise, steps, most = 0.02, 1.5, 100, 3
    chances = [math.comb(most, n) * q**n * (1 - q) ** (most - n) for n in range(most + 1)]
    mixture = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(noise, list(range(most + 1)), chances)
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    expected = accountant.compose(mixture, steps).get_epsilon(1e-5)
    assert accounting.epsilon(of_users(poisson(q, noise, steps), most), 1e-5) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("noise", [3.0, 30.0])
def test_the_group_lemma_holds_and_is_above_what_is_exact(size, noise):
    delta = 1e-5

    def of_one(releases, smaller):
        assert all(release.group == 1 for release in releases)
        return accounting.gaussian_epsilon(noise_multiplier=noise, delta=smaller)

    releases = (Release("everyone", noise, 1, group=size),)
    found = bounds.by_group_lemma(of_one, releases, delta)
    exact = accounting.gaussian_epsilon(noise_multiplier=noise / size, delta=delta)
    assert exact < found < 3 * exact
    # The epsilon for one that was used goes with a delta that the group makes no more than `delta` of.
    alone = found / size
    used = gaussian.delta_at(1 / noise, alone)
    assert used * math.expm1(found) / math.expm1(alone) <= delta * (1 + 1e-9)


@pytest.mark.parametrize("of_example", [Event.unknown(count=2, noise_multiplier=9.0), shuffled(8.0, 3)])
def test_what_was_released_of_users_was_of_their_examples_and_the_other_way_round(of_example):
    of_user = Event.unknown(count=5, noise_multiplier=7.0, unit="user", examples_per_user=3)
    client = Event.unknown(count=1, noise_multiplier=3.0, unit="client")
    example, apart, user = accounting.accounts([of_example, client, of_user], 1e-5)
    single = dataclasses.replace(of_user, unit="example", examples_per_user=1)
    assert example.epsilon == accounting.epsilon([of_example, single], 1e-5)
    assert user.epsilon == accounting.epsilon([of_users(of_example, 3), of_user], 1e-5)
    assert apart.epsilon == accounting.epsilon(client, 1e-5)


def test_users_and_examples_stand_side_by_side():
    events = [poisson(0.01, 1.1, 10), of_users(poisson(0.01, 1.1, 10), 2)]
    assert [account.unit for account in accounting.accounts(events, 1e-5)] == ["example", "user"]
    with pytest.raises(UnsupportedEventError, match="do not add up"):
        accounting.epsilon(events, 1e-5)


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("cohort_size", [100, 1000])
def test_a_user_in_cohorts_of_a_fixed_size_counts_with_all_of_its_examples(mechanism, cohort_size):
    event = Event.fixed(count=10, noise_multiplier=8.0, cohort_size=cohort_size, population=1000, mechanism=mechanism)
    of_one = dataclasses.replace(event, unit="user")
    of_five = dataclasses.replace(of_one, examples_per_user=5)
    (one,), (five,) = accounting.accounts(of_one, 1e-5), accounting.accounts(of_five, 1e-5)
    assert five.epsilon >= 5 * one.epsilon > 0
    everyone = Event.unknown(count=10, noise_multiplier=8.0 / 2 / 5, mechanism=mechanism)
    assert five.epsilon == pytest.approx(accounting.epsilon(everyone, 1e-5), rel=1e-9)


# Laplace noise.


def laplace(event):
    return dataclasses.replace(event, mechanism="laplace")


def test_pure_epsilons_add_up_and_hold_for_delta_zero():
    (account,) = accounting.accounts(laplace(Event.unknown(count=7, noise_multiplier=2.0)), 1e-5)
    assert account.epsilon_pure == 3.5
    assert account.epsilon <= account.epsilon_rdp <= 3.5
    q, z = 0.01, 0.5
    (account,) = accounting.accounts([laplace(poisson(q, z, 10))], 1e-5)
    assert account.epsilon_pure == pytest.approx(10 * math.log(1 + q * (math.exp(1 / z) - 1)), rel=1e-12)
    assert account.epsilon <= account.epsilon_pure < account.epsilon_without_amplification <= 20


def test_laplace_noise_is_no_worse_than_randomized_response_and_no_better_than_on_one_number():
    delta, interval, steps, scale = 1e-5, 1e-4, 200, 20.0
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=interval)
    of_one_number = accountant.compose(dp_accounting.LaplaceDpEvent(scale), steps).get_epsilon(delta)
    spent = accounting.epsilon(laplace(Event.unknown(count=steps, noise_multiplier=scale)), delta)
    assert of_one_number < spent < 1.05 * of_one_number
    # Kairouz, Oh, Viswanath 2015, Theorem 3.3: the exact composition of randomized response.
    one = 1 / scale
    truths = np.arange(steps + 1)
    log_p = scipy.stats.binom.logpmf(truths, steps, 1 / (1 + math.exp(-one)))
    losses = one * (2 * truths - steps)
    within = spent * (1 + 1e-3)
    assert np.sum(np.exp(log_p) * np.maximum(0, -np.expm1(within - losses))) <= delta
    below = spent * 0.99
    assert np.sum(np.exp(log_p) * np.maximum(0, -np.expm1(below - losses))) > delta


def test_tiny_pure_epsilons_are_not_lost_on_the_grid():
    event = laplace(poisson(1e-4, 10.0, 10**6))
    (account,) = accounting.accounts(event, 1e-6)
    # An epsilon e that composes k times is at most about sqrt(2 k log(1 / delta)) e.
    one = math.log1p(1e-4 * math.expm1(0.1))
    bound = math.sqrt(2 * 10**6 * math.log(1e6)) * one + 10**6 * one * math.expm1(one)
    assert 0.5 * bound < account.epsilon <= account.epsilon_rdp <= bound


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_laplace_noise_composes_with_gaussian_noise(accountant):
    of_laplace, of_gauss = laplace(poisson(0.01, 2.0, 100)), poisson(0.01, 1.0, 100)
    both = accounting.epsilon([of_laplace, of_gauss], 1e-5, accountant=accountant)
    alone, apart = (
        [accounting.epsilon(event, delta, accountant=accountant) for event in (of_laplace, of_gauss)]
        for delta in (1e-5, 0.5e-5)
    )
    assert max(alone) < both < sum(apart)
    assert accounting.accounts([of_laplace, of_gauss], 1e-5)[0].epsilon_pure is None


def test_cohorts_of_a_fixed_size_have_a_pure_epsilon_and_a_pld_bound():
    event = laplace(Event.fixed(count=5, noise_multiplier=4.0, cohort_size=10, population=1000))
    (account,) = accounting.accounts(event, 1e-5)
    assert account.epsilon_pure == pytest.approx(5 * math.log(1 + 0.01 * (math.exp(2 / 4.0) - 1)), rel=1e-12)
    assert account.relation == "replace_one" and 0 < account.epsilon_pld <= account.epsilon_pure


@pytest.mark.parametrize("noise", [1e-3, 1e-200])
def test_hardly_any_laplace_noise_is_hardly_any_privacy(noise):
    (account,) = accounting.accounts(laplace(poisson(0.01, noise, 3)), 1e-5)
    assert 100 < account.epsilon <= account.epsilon_pure * (1 + 1e-12)
    assert account.epsilon_pure <= account.epsilon_without_amplification * (1 + 1e-12)


def test_a_user_has_as_many_pure_epsilons_as_examples():
    of_user = dataclasses.replace(laplace(poisson(0.01, 2.0, 10)), unit="user", examples_per_user=3)
    (user,), (example,) = accounting.accounts(of_user, 1e-5), accounting.accounts(laplace(poisson(0.01, 2.0, 10)), 1e-5)
    assert user.epsilon_pure == pytest.approx(3 * example.epsilon_pure, rel=1e-12)
    assert example.epsilon < user.epsilon <= user.epsilon_pure and not user.by_group_lemma


def test_laplace_noise_is_solved_for():
    def events(noise):
        return laplace(poisson(0.01, noise, 1000))

    noise = accounting.solve_noise_multiplier(target_epsilon=1.0, delta=1e-5, events_for=events)
    assert accounting.epsilon(events(noise), 1e-5) <= 1.0 < accounting.epsilon(events(noise * 0.995), 1e-5)


@pytest.mark.parametrize("epsilon", [1e-3, 0.7, 30.0, 1000.0])
def test_amplification_and_divergence_of_pure_epsilons(epsilon):
    assert pure.amplified_epsilon(epsilon, 1.0) == pytest.approx(epsilon, rel=1e-12)
    assert pure.amplified_epsilon(epsilon, 0.1) < epsilon
    divergences = [pure.randomized_response_divergence(epsilon, order) for order in (1.01, 2.0, 32.0, 1e4)]
    assert divergences == sorted(divergences) and divergences[-1] <= epsilon
    assert divergences[1] <= min(epsilon, epsilon**2)  # Bun & Steinke 2016, Proposition 3.3: order * epsilon^2 / 2


# Trees of partial sums.


@pytest.mark.parametrize(("noise", "expected"), [(1.0, 20.55), (5.0, 3.131)])
def test_published_figures_of_trees(noise, expected):
    event = Event.tree(trees=1, leaves_per_tree=1000, noise_multiplier=noise)
    assert float(f"{accounting.epsilon(event, 1e-6, accountant='rdp'):.4g}") == expected
    # All nodes together are one Gaussian mechanism, of which the closed form is exact.
    levels = accounting.gaussian_epsilon(noise_multiplier=noise, delta=1e-6, releases=10)
    assert accounting.epsilon(event, 1e-6) == pytest.approx(levels, rel=1e-12)


@pytest.mark.parametrize("leaves", [1, 2, 3, 4, 7, 8, 1000, 1023, 1024, 1025])
def test_trees_against_the_accountant(leaves):
    accountant = dp_accounting.rdp.RdpAccountant(None, dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_accounting.SingleEpochTreeAggregationDpEvent(2.0, leaves), 3)
    event = Event.tree(trees=3, leaves_per_tree=leaves, noise_multiplier=2.0)
    spent = accounting.epsilon(event, 1e-6, accountant="rdp")
    assert spent == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-9)


def test_trees_of_other_sizes_stay_apart():
    events = [Event.tree(trees=1, leaves_per_tree=leaves, noise_multiplier=3.0) for leaves in (4, 2)]
    assert len(merge(events)) == 2
    assert accounting.epsilon(events, 1e-5) == accounting.gaussian_epsilon(noise_multiplier=3.0, delta=1e-5, releases=5)


def test_trees_are_solved_for_whole():
    tree = Event.tree(trees=1, leaves_per_tree=8, noise_multiplier=10.0)
    steps = accounting.solve_steps(target_epsilon=2.0, delta=1e-5, event=tree)
    assert steps % 8 == 0 and steps > 0
    assert accounting.epsilon(Event.tree(trees=steps // 8, leaves_per_tree=8, noise_multiplier=10.0), 1e-5) <= 2.0


def test_local_releases_are_two_clips_apart_and_not_amplified():
    local = Event.local(count=5, participations=1, noise_multiplier=1.0)
    assert accounting.epsilon(local, 1e-5) == pytest.approx(9.9973, abs=1e-4)  # published as 10.0 for sensitivity 2C
    assert accounting.epsilon(local.with_count(4), 1e-5) == pytest.approx(
        accounting.gaussian_epsilon(noise_multiplier=0.5, delta=1e-5, releases=4)
    )
    laplace = Event.local(count=1, noise_multiplier=4.0, mechanism="laplace")
    assert accounting.epsilon(laplace, 1e-9) == pytest.approx(0.5, rel=1e-6)


def test_local_and_central_releases_stand_side_by_side():
    central = Event.poisson(count=10, noise_multiplier=1.0, sampling_probability=0.1, unit="client")
    local = Event.local(count=10, noise_multiplier=20.0)
    apart = accounting.accounts([central, local], 1e-5)
    assert {a.relation: a.epsilon for a in apart} == {
        event.relation: accounting.epsilon(event, 1e-5) for event in (central, local)
    }
    for event, other in ((central, local), (local, central)):
        options = {"target_epsilon": 3.0, "delta": 1e-5}
        assert accounting.releases_left(event, spent=[other], **options) == accounting.solve_steps(
            event=event, **options
        )
