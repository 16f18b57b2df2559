import dataclasses
import json

import pytest

from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.events import Event, merge

POISSON = Event.poisson(count=3, noise_multiplier=1.1, sampling_probability=0.01, population=100)
SHUFFLED = Event.shuffled(count=20, passes=2, noise_multiplier=1.1, population=100)
FIXED = Event.fixed(count=5, noise_multiplier=1.0, cohort_size=10, population=100)
UNKNOWN = Event.unknown(count=7, noise_multiplier=0.5)
OF_USER = Event.poisson(count=3, noise_multiplier=1.1, sampling_probability=0.01, unit="user", examples_per_user=4)
TREE = Event.tree(trees=2, leaves_per_tree=9, noise_multiplier=1.0)
LOCAL = Event.local(count=9, participations=2, noise_multiplier=1.0)
ALL = [POISSON, SHUFFLED, FIXED, UNKNOWN, OF_USER, TREE, LOCAL, dataclasses.replace(POISSON, mechanism="laplace")]


@pytest.mark.parametrize("event", ALL)
def test_an_event_survives_json(event):
    assert Event(**json.loads(json.dumps(event.to_dict()))) == event


def test_each_sampler_has_its_neighbouring_relation():
    relations = [event.relation for event in (POISSON, SHUFFLED, FIXED, UNKNOWN, TREE, LOCAL)]
    assert relations == ["add_or_remove_one", "zero_out", "replace_one", "zero_out", "zero_out", "local"]


@pytest.mark.parametrize("event", [POISSON, FIXED, UNKNOWN])
def test_with_count_changes_participations_too(event):
    assert (event.with_count(9).count, event.with_count(9).participations) == (9, 9)


@pytest.mark.parametrize("event", [SHUFFLED, TREE])
def test_with_count_of_an_event_in_passes_is_refused(event):
    with pytest.raises(InvalidArgumentError, match="passes"):
        event.with_count(3)


@pytest.mark.parametrize("changes", [{"leaves_per_tree": None}, {"leaves_per_tree": 0}, {"leaves_per_tree": 8}])
def test_a_tree_holds_its_leaves(changes):
    with pytest.raises(InvalidArgumentError, match="leaves_per_tree"):
        dataclasses.replace(TREE, **changes)


def test_laplace_noise_does_not_go_with_a_clip_of_the_l2_norm():
    with pytest.raises(InvalidArgumentError, match=r"does not go with mechanism='laplace'"):
        Event.unknown(count=1, noise_multiplier=1.0, l2_norm_clip=1.0, mechanism="laplace")


@pytest.mark.parametrize(
    "changes",
    [
        {"unit": "household"},
        {"examples_per_user": 2},
        {"unit": "user", "examples_per_user": 0},
        {"sampler": "lottery"},
        {"mechanism": "uniform"},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"count": -1},
        {"count": 1.5, "participations": 1.5},
        {"count": True, "participations": True},
        {"participations": 4},
        {"participations": -1},
        {"population": 0},
        {"population": 10.5},
        {"sampling_probability": 0.0},
        {"sampling_probability": 1.5},
        {"sampling_probability": None},
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(changes):
    with pytest.raises(InvalidArgumentError, match="|".join(changes)):
        dataclasses.replace(POISSON, **changes)


@pytest.mark.parametrize("cohort_size", [None, 0, 101])
def test_a_fixed_cohort_fits_its_population(cohort_size):
    with pytest.raises(InvalidArgumentError, match="cohort_size"):
        dataclasses.replace(FIXED, cohort_size=cohort_size)


def test_merge_adds_counts_and_participations_of_equal_events_only():
    assert merge([POISSON, SHUFFLED, POISSON, SHUFFLED]) == (
        POISSON.with_count(6),
        Event.shuffled(count=40, passes=4, noise_multiplier=1.1, population=100),
    )
    louder = dataclasses.replace(POISSON, noise_multiplier=2.0)
    assert merge([POISSON, louder]) == (POISSON, louder)
    assert merge([]) == ()
