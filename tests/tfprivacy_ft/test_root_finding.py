import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfprivacy_ft import root_finding

targets = st.floats(math.log(1.01 * root_finding.LEAST_NOISE), math.log(root_finding.MOST_NOISE / 1.01)).map(math.exp)
powers = st.floats(1.0, 3.0)  # epsilon falls at least as fast as noise grows


@given(answer=targets, power=powers, offset=st.floats(-0.3, 0.3))
def test_noise_was_measured_meets_the_target_and_is_hardly_more_than_needed(answer, power, offset):
    met = set()

    def excess(noise):
        miss = root_finding.log_excess((answer / noise) ** power, 1.0)
        if miss <= 0:
            met.add(noise)
        return miss

    guess = excess_of(answer * math.exp(offset), power)  # off by up to a third
    for guesses in ([], [guess], [excess_of(answer, 1.0), guess]):
        met.clear()
        found = root_finding.least_noise(excess, guesses)
        assert found in met and found <= answer * 1.0001 * (1 + 1e-9)


def excess_of(answer, power):
    return lambda noise: root_finding.log_excess((answer / noise) ** power, 1.0)


@pytest.mark.parametrize("miss", [1.0, -1.0])
def test_a_target_that_no_noise_meets_or_that_all_do_has_no_least_noise(miss):
    assert root_finding.least_noise(lambda noise: miss, [excess_of(2.0, 1.0)]) is None


@given(answer=st.integers(0, 10**6), most=st.integers(0, 10**6), power=powers, offset=st.floats(0.5, 2.0))
def test_a_count_is_the_largest_that_fits(answer, most, power, offset):
    looks = []

    def excess(count):
        looks.append(count)
        return root_finding.log_excess(((2 * count) / (2 * answer + 1)) ** power, 1.0)

    def guess(count):
        return root_finding.log_excess((count / (answer * offset + 0.5)) ** power, 1.0)

    assert root_finding.largest_count(excess, most) == min(answer, most)
    alone = len(looks)
    assert root_finding.largest_count(excess, most, [guess]) == min(answer, most)
    assert all(1 <= count <= most for count in looks) and len(looks) - alone <= 60 >= alone


def test_an_excess_is_positive_exactly_where_the_target_is_passed():
    above = math.nextafter(3.0, 4.0)
    assert root_finding.log_excess(3.0, 3.0) == 0 < root_finding.log_excess(above, 3.0)
    assert root_finding.log_excess(0.0, 3.0) == -root_finding._FAR
    assert root_finding.log_excess(math.inf, 3.0) == root_finding._FAR
