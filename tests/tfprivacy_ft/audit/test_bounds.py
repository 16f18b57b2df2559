"""The bounds against exact sums, closed forms, and the mechanism that is the easiest to guess: randomized response."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tfprivacy_ft.audit import epsilon_lower_bound, p_value
from tfprivacy_ft.errors import InvalidArgumentError


def exact_p_value(odds, m, r, v, delta):
    """Theorem 5.2 in whole numbers; `odds` is exp(epsilon)."""
    right = Fraction(odds, odds + 1)
    mass = [math.comb(r, w) * right**w * (1 - right) ** (r - w) for w in range(r + 1)]
    alpha = max((sum(mass[max(v - i, 0) : v]) / i for i in range(1, m + 1)), default=Fraction(0))
    return min(sum(mass[v:]) + 2 * m * delta * alpha, Fraction(1))


@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 10**5), Fraction(1, 100)])
@pytest.mark.parametrize("m, r", [(1, 1), (12, 12), (40, 12)])
@pytest.mark.parametrize("odds", [1, 3, 50])
def test_it_is_the_theorem(odds, m, r, delta):
    for v in range(r + 1):
        found = p_value(math.log(odds), num_canaries=m, guesses=r, correct=v, delta=float(delta))
        assert found == pytest.approx(float(exact_p_value(odds, m, r, v, delta)), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("m", [5, 100, 3000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_nothing_but_right_guesses_have_a_closed_form(m, confidence):
    epsilon = 2.0
    only = p_value(epsilon, num_canaries=m, guesses=m, correct=m, delta=0.0)
    assert only == pytest.approx((math.exp(epsilon) / (1 + math.exp(epsilon))) ** m, rel=1e-9)
    right = (1 - confidence) ** (1 / m)
    expected = max(math.log(right / (1 - right)), 0.0)
    assert epsilon_lower_bound(m, m, m, 0.0, confidence) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_the_bound_on_randomized_response_is_seldom_above_the_truth(epsilon):
    """100 000 audits at confidence 0.95: more than 5 % + 5.2 standard deviations by chance in one of 10^7."""
    audits, m = 100_000, 200
    correct = np.random.default_rng(5).binomial(m, 1 / (1 + math.exp(-epsilon)), audits)
    bounds = {v: epsilon_lower_bound(m, m, int(v), 0.0) for v in np.unique(correct)}
    above = sum(bounds[v] > epsilon for v in correct)
    assert above <= stats.binom.isf(1e-7, audits, 0.05)
    assert above >= audits / 100  # and it is no idle one: no other mechanism is as easy to guess
    assert np.median([bounds[v] for v in correct]) >= 0.6 * epsilon


counts = st.integers(1, 300).flatmap(
    lambda m: st.integers(1, m).flatmap(lambda r: st.tuples(st.just(m), st.just(r), st.integers(0, r)))
)


@given(
    counts=counts,
    epsilons=st.lists(st.floats(0, 12), min_size=2, max_size=2).map(sorted),
    deltas=st.lists(st.sampled_from([0.0, 1e-6, 1e-3, 0.05, 0.5]), min_size=2, max_size=2).map(sorted),
)
def test_more_right_guesses_speak_louder_and_a_weaker_claim_is_refuted_later(counts, epsilons, deltas):
    m, r, v = counts
    settings = {"num_canaries": m, "guesses": r, "delta": deltas[0]}
    here = p_value(epsilons[0], correct=v, **settings)
    slack = 1e-12 + 1e-9 * here  # the binomial's own rounding
    assert 0.0 <= here <= 1.0
    assert p_value(epsilons[1], correct=v, **settings) >= here - slack
    assert p_value(epsilons[0], correct=v, **{**settings, "delta": deltas[1]}) >= here - slack
    if v < r:
        assert p_value(epsilons[0], correct=v + 1, **settings) <= here + slack


def test_the_bound_is_where_the_p_value_comes_to_the_level():
    m, r, v, delta = 1000, 200, 180, 1e-5
    bound = epsilon_lower_bound(m, r, v, delta, 0.95)
    below, above = (
        p_value(epsilon, num_canaries=m, guesses=r, correct=v, delta=delta) for epsilon in (bound - 1e-6, bound + 1e-6)
    )
    assert below < 0.05 <= above


def test_bounds_grow_with_right_guesses_and_shrink_with_delta_and_confidence():
    by_correct = [epsilon_lower_bound(1000, 200, v, 1e-5) for v in range(100, 201, 10)]
    assert by_correct[0] == 0.0
    assert all(a < b for a, b in itertools.pairwise(by_correct[2:]))
    by_delta = [epsilon_lower_bound(1000, 200, 180, delta) for delta in (0.0, 1e-5, 1e-3, 1e-2)]
    assert all(a > b for a, b in itertools.pairwise(by_delta))
    by_confidence = [epsilon_lower_bound(1000, 200, 180, 1e-5, c) for c in (0.5, 0.9, 0.99)]
    assert all(a > b for a, b in itertools.pairwise(by_confidence))


@pytest.mark.parametrize(
    "change",
    [
        {"num_canaries": 0}, {"num_canaries": 10.0}, {"guesses": 0}, {"guesses": 11}, {"correct": -1}, {"correct": 6},
        {"correct": 2.5}, {"delta": 1.0}, {"delta": -1e-9}, {"delta": math.nan},
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(change):
    arguments = {"num_canaries": 10, "guesses": 5, "correct": 4, "delta": 1e-5, **change}
    with pytest.raises(InvalidArgumentError, match=next(iter(change))):
        epsilon_lower_bound(**arguments)
    with pytest.raises(InvalidArgumentError, match=next(iter(change))):
        p_value(1.0, **arguments)


def test_epsilon_and_confidence_have_ranges_too():
    for epsilon in (-0.1, math.inf, math.nan):
        with pytest.raises(InvalidArgumentError, match="epsilon"):
            p_value(epsilon, num_canaries=10, guesses=5, correct=4, delta=0.0)
    for confidence in (0.0, 1.0, 95):
        with pytest.raises(InvalidArgumentError, match="confidence"):
            epsilon_lower_bound(10, 5, 4, 0.0, confidence)


def test_bounds_need_no_tensorflow():
    code = "import sys; from tfprivacy_ft.audit import p_value; print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.strip() == "False"
