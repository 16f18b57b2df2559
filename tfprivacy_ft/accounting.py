"""Events -> epsilon, and the noise or the number of steps that a target epsilon allows.

A thin layer over dp_accounting. It promises that epsilon is never under-reported: every approximation here errs to
the side of more epsilon, and what the solvers return was itself accounted and found within the target. Events of
different units of privacy do not compose, nor do those for replacing one, or local ones, with the others: they are
reported side by side (`accounts`), never added. Poisson releases are stated for adding or removing one; beside releases
for zero-out they are stated, at the same epsilon, for zero-out, and compose.

It knows neither TensorFlow nor ledgers; dp_accounting is imported when a sampled event first needs it.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from tfprivacy_ft import _check, pure
from tfprivacy_ft.errors import BudgetExceededError, InvalidArgumentError, UnsupportedEventError
from tfprivacy_ft.events import Event, Mechanism, Relation, Sampler, Unit, merge

Accountant = Literal["pld", "rdp"]

DEFAULT_DISCRETIZATION = 1e-4  # of privacy losses, for PLD; a coarser grid gives a larger epsilon, never a smaller one

__all__ = [
    "DEFAULT_DISCRETIZATION",
    "Account",
    "Accountant",
    "accounts",
    "check_delta",
    "concerning",
    "epsilon",
    "epsilon_without_amplification",
    "gaussian_epsilon",
    "quiet_accountant",
    "releases_left",
    "renyi_divergences",
    "solve_batch_size",
    "solve_noise_multiplier",
    "solve_steps",
]


@dataclasses.dataclass(frozen=True)
class Account:
    """The privacy spent on one unit of privacy under one neighbouring relation.

    Args:
      unit: who is protected.
      relation: which data sets epsilon cannot tell apart.
      delta: the delta that every epsilon here goes with.
      epsilon_pld: by privacy loss distributions (the closed form where nothing was sampled of Gaussian noise); None
        where no such bound is known (fixed-size cohorts).
      epsilon_rdp: by Renyi differential privacy, as a cross-check.
      epsilon_without_amplification: the same releases with every unit in every release it could have been in: what
        is left if nobody believes the sampling.
      epsilon_replace_one: the same releases when one unit's data is replaced by any other (the sum moves by twice
        the clip); None unless the relation is zero-out.
      events: what was accounted, equal events merged.
      epsilon_pure: the epsilon that holds with delta 0; None unless all noise was Laplace noise.
      by_group_lemma: whether the figures for a user with several examples come from those for one example, by a lemma
        that holds for any mechanism: an upper bound, often several times too large.
    """

    unit: Unit
    relation: Relation
    delta: float
    epsilon_pld: float | None
    epsilon_rdp: float
    epsilon_without_amplification: float
    epsilon_replace_one: float | None
    events: tuple[Event, ...]
    epsilon_pure: float | None = None
    by_group_lemma: bool = False

    @property
    def epsilon(self) -> float:
        """The epsilon to quote: PLD where it exists, else RDP."""
        return self.epsilon_rdp if self.epsilon_pld is None else self.epsilon_pld

    @property
    def accountant(self) -> Accountant:
        """Which accountant `epsilon` is from."""
        return "rdp" if self.epsilon_pld is None else "pld"

    @property
    def samplers(self) -> tuple[Sampler, ...]:
        """The samplers of the events, each once, in order of name."""
        return tuple(sorted({event.sampler for event in self.events}))

    @property
    def releases(self) -> int:
        """How many noised releases (steps, rounds) were made."""
        return sum(event.count for event in self.events)


def epsilon(
    events: Event | Iterable[Event],
    delta: float,
    *,
    accountant: Accountant = "pld",
    value_discretization_interval: float | None = None,
) -> float:
    """The epsilon spent by `events` together, never under-reported.

    Where nothing was sampled and all noise is Gaussian, `"pld"` is the exact closed form. Laplace noise is taken for the
    worst mechanism that is as private, which holds for sums of any number of values.

    Args:
      events: releases that share unit and relation; events whose count is 0 are ignored.
      delta: in (0, 1).
      accountant: `"pld"` (tight) or `"rdp"` (a cross-check, always larger or equal up to rounding).
      value_discretization_interval: PLD's grid, > 0. None means 1e-4, and coarser where the losses are so large
        that the finer grid would take minutes and gain nothing.

    Returns:
      0.0 if nothing was released, `math.inf` if something was released without noise.

    Raises:
      InvalidArgumentError: delta, the accountant or the grid is outside its range.
      UnsupportedEventError: the events do not compose, or PLD has no bound for them (fixed-size cohorts).

    Example:
      >>> round(epsilon(Event.shuffled(count=10, passes=1, noise_multiplier=1.0), delta=1e-5), 6)
      4.377178

    Source:
      Doroshenko et al. 2022, "Connect the Dots" (PLD); Mironov et al. 2019, "Renyi Differential Privacy of the
      Sampled Gaussian Mechanism" (RDP); Wang, Balle, Kasiviswanathan 2019, Theorem 27 (fixed-size cohorts).
    """
    _check.open_unit_interval(delta=delta)
    if accountant not in ("pld", "rdp"):
        raise InvalidArgumentError(f"accountant={accountant!r} is not an accountant: use 'pld' or 'rdp'.")
    if value_discretization_interval is not None:
        _check.positive(value_discretization_interval=value_discretization_interval)
    releases = _releases(_one_group(events))
    if accountant == "rdp":
        return _rdp_epsilon(releases, float(delta))
    return _pld_epsilon(releases, float(delta), value_discretization_interval)


def epsilon_without_amplification(events: Event | Iterable[Event], delta: float) -> float:
    """Epsilon with every unit in every release it could have been in: no sampling is believed, only the noise.

    Args:
      events: releases that share unit and relation.
      delta: in (0, 1).

    Returns:
      The closed form if all noise is Gaussian; 0.0 if nothing was released, `math.inf` without noise.

    Raises:
      InvalidArgumentError: delta is outside its range.
      UnsupportedEventError: the events do not compose.

    Example:
      >>> event = Event.poisson(count=1, noise_multiplier=1.0, sampling_probability=0.01)
      >>> round(epsilon_without_amplification(event, delta=1e-5), 3)
      4.377
    """
    _check.open_unit_interval(delta=delta)
    return _unsampled_epsilon(_releases(_one_group(events)), float(delta))


def gaussian_epsilon(*, noise_multiplier: float, delta: float, releases: int = 1) -> float:
    """The exact epsilon of `releases` Gaussian mechanisms, for any noise and any delta.

    `releases` Gaussians of noise multiplier z are one of z / sqrt(releases).

    Args:
      noise_multiplier: standard deviation divided by the sensitivity, >= 0.
      delta: in (0, 1).
      releases: how many, >= 0.

    Returns:
      Epsilon >= 0, rounded up in its last digits; `math.inf` for noise 0.

    Raises:
      InvalidArgumentError: an argument is outside its range.

    Example:
      >>> round(gaussian_epsilon(noise_multiplier=1.0, delta=1e-5), 6)
      4.377178

    Source:
      Balle & Wang 2018, "Improving the Gaussian Mechanism for Differential Privacy", Theorem 8.
    """
    _check.non_negative(noise_multiplier=noise_multiplier, releases=releases)
    _check.open_unit_interval(delta=delta)
    if releases == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    return _gaussian_epsilon(math.sqrt(releases) / noise_multiplier, delta)


def accounts(events: Event | Iterable[Event], delta: float) -> tuple[Account, ...]:
    """One account for each unit of privacy and neighbouring relation among the events, side by side.

    Args:
      events: any releases; those whose count is 0 are ignored.
      delta: in (0, 1), the same for every account.

    Returns:
      The accounts, examples first, then clients, then users; empty if nothing was released.

    Raises:
      InvalidArgumentError: delta is outside its range.

    Example:
      >>> [account.unit for account in accounts(Event.unknown(count=3, noise_multiplier=2.0), delta=1e-5)]
      ['example']
    """
    _check.open_unit_interval(delta=delta)
    groups = _groups(events)
    ordered = sorted(groups, key=lambda key: (key[0] != "example", key[1]))
    return tuple(_account(unit, relation, groups[unit, relation], float(delta)) for unit, relation in ordered)


def quick_epsilon(events: Event | Iterable[Event], delta: float) -> float:
    """A bound on the largest epsilon of `accounts`, ten times as quick to have: for what is shown while a training runs.

    Args:
      events, delta: as in `accounts`.

    Returns:
      No less than the largest epsilon of `accounts`, and seldom more than half a percent above it; 0.0 if nothing was
      released.

    Raises:
      InvalidArgumentError: delta is outside its range.

    Example:
      >>> event = Event.poisson(count=100, noise_multiplier=1.0, sampling_probability=0.01)
      >>> 1 <= quick_epsilon(event, delta=1e-5) / epsilon(event, delta=1e-5) < 1.005
      True
    """
    _check.open_unit_interval(delta=delta)

    def of(releases: tuple[_Release, ...]) -> float:
        if not _has_pld(releases):
            return _rdp_epsilon(releases, delta)
        measure = _fine_epsilon if _needs_lemma(releases) else _coarse_epsilon  # the grid of mixtures is coarse already
        return measure(releases, delta)

    return max((of(_releases(group)) for group in _groups(events).values()), default=0.0)


def concerning(unit: Unit, events: Iterable[Event]) -> list[Event]:
    """What `events` release about one unit of privacy.

    What was released of users was released of each of their examples; and what was released of examples was of users, who
    are taken to have as many of them there as where most are recorded. Clients stand by themselves.

    Example:
      >>> of_user = Event.unknown(count=1, noise_multiplier=2.0, unit="user", examples_per_user=3)
      >>> concerning("example", [of_user])[0].examples_per_user
      1
    """
    events = list(events)
    if unit == "client":
        return [event for event in events if event.unit == unit]
    most = max((event.examples_per_user for event in events if event.unit == "user"), default=1)
    return [
        event
        if event.unit == unit
        else dataclasses.replace(event, unit=unit, examples_per_user=most if unit == "user" else 1)
        for event in events
        if event.unit != "client"
    ]


def renyi_divergences(events: Event | Iterable[Event]) -> tuple[Any, Any]:
    """The Renyi divergences of `events` together, for accounts that go on from there.

    Args:
      events: releases that share unit and relation.

    Returns:
      Orders > 1 and a divergence for each, two float64 arrays of one length: bounds from above, infinite where something was
      released without noise or the order is out of reach of floating point; zeros if nothing was released.

    Raises:
      UnsupportedEventError: the events do not compose, or no divergence is known for them (users with several examples,
        sampled).

    Example:
      >>> orders, divergences = renyi_divergences(Event.unknown(count=1, noise_multiplier=1.0))
      >>> bool(abs(divergences[0] - orders[0] / 2) < 1e-9)
      True
    """
    import numpy as np

    releases = _releases(_one_group(events))
    if _needs_lemma(releases):
        raise UnsupportedEventError(
            "users with several examples that are sampled have no Renyi divergence here: account for single examples, or "
            "make batches without sampling."
        )
    orders = np.asarray(_rdp_of_one(_Release("everyone", 1.0, 1))[0], float)
    if not releases:
        return orders, np.zeros(len(orders))
    if any(release.noise_multiplier == 0 for release in releases):
        return orders, np.full(len(orders), math.inf)
    return orders, _rdp_of_all(releases)[1]


def check_delta(delta: float, population: int | None = None) -> None:
    """Refuses a delta outside (0, 1), and warns about one so large that it protects nobody in particular.

    Args:
      delta: the delta to check.
      population: how many units are protected, >= 1; None skips the warning.

    Raises:
      InvalidArgumentError: an argument is outside its range.

    Example:
      >>> check_delta(1e-5, population=60_000)
    """
    _check.open_unit_interval(delta=delta)
    if population is None:
        return
    _check.positive_integer(population=population)
    if delta >= 1 / population:
        warnings.warn(
            f"delta={delta:g} is not below 1/{population}: a mechanism that publishes one of the {population} records "
            "whole would pass it, so choose a much smaller delta.",
            stacklevel=2,
        )


def solve_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    events_for: Callable[[float], Event | Iterable[Event]],
    accountant: Accountant = "pld",
    value_discretization_interval: float | None = None,
) -> float:
    """The smallest noise multiplier whose events stay within the target; never less privacy than asked.

    Args:
      target_epsilon: > 0.
      delta: in (0, 1).
      events_for: gives the events of a run with this noise multiplier (with what was spent before, if anything);
        more noise has to mean less epsilon.
      accountant, value_discretization_interval: as in `epsilon`.

    Returns:
      A noise multiplier within 0.01% above the smallest, and for which `epsilon(...) <= target_epsilon` holds.

    Raises:
      InvalidArgumentError: an argument is outside its range, or no noise multiplier reaches the target.
      UnsupportedEventError: as in `epsilon`.

    Example:
      >>> one = lambda noise_multiplier: Event.unknown(count=1, noise_multiplier=noise_multiplier)
      >>> round(solve_noise_multiplier(target_epsilon=4.377178, delta=1e-5, events_for=one), 3)
      1.0
    """
    _check.positive(target_epsilon=target_epsilon)
    _check.open_unit_interval(delta=delta)

    def excess_by(measure: Callable[..., float]) -> Callable[[float], float]:
        def rough(noise: float) -> float:
            releases = _releases(_one_group(events_for(noise)))
            return _excess(measure(releases, delta=float(delta)), target_epsilon)

        return rough

    def excess(noise: float) -> float:
        spent = epsilon(
            events_for(noise),
            delta,
            accountant=accountant,
            value_discretization_interval=value_discretization_interval,
        )
        return _excess(spent, target_epsilon)

    start = _START
    # A formula, then a coarse grid for a tenth of the time, leave two or three looks at the fine grid.
    for look in (_limit_epsilon, _coarse_epsilon) if accountant == "pld" else (_limit_epsilon,):
        rough = excess_by(look)
        bracket = _bracket_noise(rough, start)
        if bracket is not None:
            start = _narrow_noise(rough, bracket, _ROUGH_TOLERANCE).root
    bracket = _bracket_noise(excess, start)
    if bracket is None:
        raise InvalidArgumentError(
            f"target_epsilon={target_epsilon} is not met by any noise multiplier between {_LEAST_NOISE:g} and "
            f"{_MOST_NOISE:g}, or by all of them: change target_epsilon or the releases."
        )
    # The promise: this side was accounted and is within the target.
    return _narrow_noise(excess, bracket, _NOISE_TOLERANCE).feasible


def solve_steps(
    *,
    target_epsilon: float,
    delta: float,
    event: Event,
    spent: Sequence[Event] = (),
    accountant: Accountant = "pld",
    most: int = 10_000_000,
) -> int:
    """How many releases like `event` fit into the target, on top of what was spent.

    Args:
      target_epsilon: > 0.
      delta: in (0, 1).
      event: one kind of release. Its count is ignored, except for `"shuffled"` and `"tree"`: there count / participations
        is the length of a pass, and only whole passes are given.
      spent: events released before, of the same unit and relation.
      accountant: as in `epsilon`.
      most: where to stop looking, >= 1.

    Returns:
      The largest number of releases, at most `most`, for which `epsilon(...) <= target_epsilon` holds; 0 if not
      even one fits.

    Raises:
      BudgetExceededError: what was spent is already over the target.
      InvalidArgumentError: an argument is outside its range.
      UnsupportedEventError: as in `epsilon`.

    Example:
      >>> event = Event.unknown(count=1, noise_multiplier=10.0)
      >>> solve_steps(target_epsilon=4.3772, delta=1e-5, event=event)
      100
    """
    _check.positive(target_epsilon=target_epsilon)
    _check.open_unit_interval(delta=delta)
    _check.positive_integer(most=most)
    pass_length = _pass_length(event)

    def excess(units: int, which: Accountant) -> float:
        return _excess(epsilon([*spent, _repeat(event, units)], delta, accountant=which), target_epsilon)

    if excess(0, accountant) > 0:
        raise BudgetExceededError(
            f"target_epsilon={target_epsilon} was passed by what is already spent "
            f"(epsilon {epsilon(spent, delta, accountant=accountant):.4g}): raise the target, or stop here."
        )
    start = 1
    if accountant == "pld" and not _has_closed_form(_releases([*spent, _repeat(event, 1)])):
        start = max(1, _largest_count(lambda units: excess(units, "rdp"), 1, most // pass_length))
    return pass_length * _largest_count(lambda units: excess(units, accountant), start, most // pass_length)


def releases_left(event: Event, *, spent: Iterable[Event], target_epsilon: float, delta: float) -> int:
    """How many more releases like `event` fit into the target after everything that was spent.

    Args:
      event: as in `solve_steps`.
      spent: what was released before, of whatever unit; what does not concern the event's unit is left aside, and so are
        local releases if the event is not one, and others if it is.
      target_epsilon, delta: as in `solve_steps`.

    Returns:
      0 where none does, or the target was passed already.

    Raises:
      InvalidArgumentError, UnsupportedEventError: as in `solve_steps`.

    Example:
      >>> event = Event.unknown(count=1, noise_multiplier=10.0)
      >>> releases_left(event, spent=[event.with_count(60)], target_epsilon=4.3772, delta=1e-5)
      40
    """
    # What was spent by clients is reported beside this, never added; the event is in it for its unit to be known.
    likewise = (e for e in spent if e.is_local == event.is_local)
    *before, one = concerning(event.unit, [*likewise, event])
    kind = _kind(one)
    alike = sum(e.participations for e in before if _kind(e) == kind)
    others = tuple(e for e in before if _kind(e) != kind)
    return max(0, _most_releases(one, others, target_epsilon, delta) - alike * _pass_length(one))


def _kind(event: Event) -> Event:
    return dataclasses.replace(event, count=0, participations=0)


@functools.lru_cache(maxsize=64)
def _most_releases(event: Event, spent: tuple[Event, ...], target_epsilon: float, delta: float) -> int:
    """Kept, since a budget is asked before every block of steps; 0 where the target was passed already."""
    try:
        return solve_steps(target_epsilon=target_epsilon, delta=delta, event=event, spent=spent)
    except BudgetExceededError:
        return 0


def solve_batch_size(
    *,
    target_epsilon: float,
    delta: float,
    events_for: Callable[[int], Event | Iterable[Event]],
    most: int,
    accountant: Accountant = "pld",
) -> int:
    """A largest batch size whose events stay within the target; never less privacy than asked.

    Args:
      target_epsilon: > 0.
      delta: in (0, 1).
      events_for: gives the events of a run with batches of this many examples (or cohorts of clients).
      most: the largest batch to look at, >= 1, such as all examples.
      accountant: as in `epsilon`.

    Returns:
      `most`, or a batch size for which `epsilon(...) <= target_epsilon` holds while it does not for one more; 0 if not
      even a single example fits.

    Raises:
      InvalidArgumentError: an argument is outside its range.
      UnsupportedEventError: as in `epsilon`.

    Example:
      >>> batches_of = lambda size: Event.poisson(count=100, noise_multiplier=1.0, sampling_probability=size / 10_000)
      >>> solve_batch_size(target_epsilon=1.0, delta=1e-5, events_for=batches_of, most=10_000)
      139
    """
    _check.positive(target_epsilon=target_epsilon)
    _check.open_unit_interval(delta=delta)
    _check.positive_integer(most=most)

    def excess(size: int, measure: Callable[[tuple[_Release, ...]], float]) -> float:
        return _excess(measure(_releases(_one_group(events_for(size)))), target_epsilon) if size else -_FAR

    exact = functools.partial(_rdp_epsilon if accountant == "rdp" else _fine_epsilon, delta=float(delta))
    if excess(most, exact) <= 0:
        return most
    start = 1
    if accountant == "pld" and not _has_closed_form(_releases(_one_group(events_for(1)))):
        for look in (_limit_epsilon, _coarse_epsilon):  # as in `solve_noise_multiplier`
            rough = functools.partial(look, delta=float(delta))
            start = max(1, _largest_count(functools.partial(excess, measure=rough), start, most - 1))
    return _largest_count(functools.partial(excess, measure=exact), start, most - 1)


# Events as the accountants see them: what was drawn, how noisy, how often.


class _Release(NamedTuple):
    """`times` equal releases, as far as epsilon is concerned; hashable, so that answers can be kept."""

    drawn: Literal["everyone", "poisson", "fixed"]
    noise_multiplier: float  # standard deviation, or scale of Laplace noise, over the sensitivity under the relation
    times: int
    sampling_probability: float = 1.0
    cohort_size: int = 1
    population: int = 1
    group: int = 1  # units of what is sampled that are protected together
    mechanism: Mechanism = "gaussian"

    @property
    def noise_of_group(self) -> float:
        """Were the whole group in the release, its noise over what it moves the sum by."""
        return self.noise_multiplier / self.group

    @property
    def pure_epsilon(self) -> float:
        """Of one of them, if its noise is Laplace noise."""
        of_one = 1 / self.noise_multiplier
        if self.drawn == "poisson":
            # Of a group each is sampled by itself; of pure epsilons, those of its members add up.
            return self.group * pure.amplified_epsilon(of_one, self.sampling_probability)
        if self.drawn == "fixed":
            return pure.amplified_epsilon(of_one, self.cohort_size / self.population)
        return self.group * of_one


def _as_list(events: Event | Iterable[Event]) -> list[Event]:
    return [events] if isinstance(events, Event) else list(events)


def _groups(events: Event | Iterable[Event]) -> dict[tuple[Unit, Relation], list[Event]]:
    groups: dict[tuple[Unit, Relation], list[Event]] = {}
    released = [event for event in _as_list(events) if event.count > 0]
    for unit in dict.fromkeys(event.unit for event in released):
        for event in concerning(unit, released):
            groups.setdefault((unit, event.relation), []).append(event)
    for unit in {unit for unit, relation in groups if relation == "zero_out"}:
        # Under Poisson sampling with a constant denominator, an example that is not there and one that is zero release
        # the same: what was sampled holds for zero-out too, at the same epsilon, and then it composes.
        groups[unit, "zero_out"] += groups.pop((unit, "add_or_remove_one"), [])
    return groups


def _one_group(events: Event | Iterable[Event]) -> list[Event]:
    """The events that count, if they compose."""
    groups = _groups(events)
    if len(groups) > 1:
        kinds = " and ".join(f"{unit} / {relation}" for unit, relation in sorted(groups))
        raise UnsupportedEventError(
            f"events of {kinds} do not add up to one epsilon: account for each unit and relation by itself, as "
            "`accounts` does."
        )
    return next(iter(groups.values()), [])


def _release(event: Event, noise_factor: float) -> _Release:
    noise = float(event.noise_multiplier) * noise_factor
    times, group, law = int(event.participations), int(event.examples_per_user), event.mechanism
    if event.sampler == "poisson" and event.sampling_probability is not None and event.sampling_probability < 1:
        q = float(event.sampling_probability)
        return _Release("poisson", noise, times, sampling_probability=q, group=group, mechanism=law)
    if event.sampler == "fixed":
        cohort_size, population = int(event.cohort_size or 1), int(event.population or 1)
        # Replacing one unit moves the sum by twice the clip: to the accountant, half the noise.
        if cohort_size < population and group == 1:
            return _Release("fixed", noise / 2, times, cohort_size=cohort_size, population=population, mechanism=law)
        # What sampling without replacement hides of a group is not known here, so all of it is taken to be in each.
        return _Release("everyone", noise / 2, times, group=group, mechanism=law)
    if event.is_local:
        return _Release("everyone", noise / 2, times, group=group, mechanism=law)  # any two reports are 2 clips apart
    if event.sampler == "tree":
        # A leaf is in one node of each level, and all nodes are released at once: one release, with their sensitivities
        # added up as the norm does.
        levels = event.tree_levels
        noise /= math.sqrt(levels) if law == "gaussian" else levels
    return _Release("everyone", noise, times, group=group, mechanism=law)


def _releases(events: Iterable[Event], noise_factor: float = 1.0) -> tuple[_Release, ...]:
    """The events in which somebody took part, equal ones merged, in a fixed order."""
    times: dict[_Release, int] = {}
    for event in events:
        release = _release(event, noise_factor)
        key = release._replace(times=0)
        times[key] = times.get(key, 0) + release.times
    return tuple(sorted(key._replace(times=n) for key, n in times.items() if n > 0))


def _is_sampled(releases: Iterable[_Release]) -> bool:
    return any(release.drawn != "everyone" for release in releases)


def _has_closed_form(releases: Iterable[_Release]) -> bool:
    """Whether all of it is one Gaussian mechanism."""
    return all(release.drawn == "everyone" and release.mechanism == "gaussian" for release in releases)


def _needs_lemma(releases: Iterable[_Release]) -> bool:
    """Whether a whole group's chance to be sampled is one that RDP knows nothing of."""
    return any(r.group > 1 and r.drawn != "everyone" and r.mechanism == "gaussian" for r in releases)


def _has_pld(releases: Iterable[_Release]) -> bool:
    return not any(release.drawn == "fixed" and release.mechanism == "gaussian" for release in releases)


def _account(unit: Unit, relation: Relation, events: list[Event], delta: float) -> Account:
    releases = _releases(events)
    replaced = _unsampled_epsilon(_releases(events, noise_factor=0.5), delta) if relation == "zero_out" else None
    return Account(
        unit=unit,
        relation=relation,
        delta=delta,
        epsilon_pld=_pld_epsilon(releases, delta, None) if _has_pld(releases) else None,
        epsilon_rdp=_rdp_epsilon(releases, delta),
        epsilon_without_amplification=_unsampled_epsilon(releases, delta),
        epsilon_replace_one=replaced,
        events=merge(events),
        epsilon_pure=_pure_epsilon(releases) if any(r.mechanism == "laplace" for r in releases) else None,
        by_group_lemma=_needs_lemma(releases) and not _has_mixtures(),
    )


def _pure_epsilon(releases: Iterable[_Release]) -> float | None:
    """Pure epsilons add up; None if there is none, as with Gaussian noise."""
    total = 0.0
    for release in releases:
        if release.mechanism != "laplace":
            return None
        total += release.times * release.pure_epsilon if release.noise_multiplier else math.inf
    return total


# Without sampling.


def _unsampled_epsilon(releases: Iterable[_Release], delta: float) -> float:
    """The same releases with everyone in each of them."""
    unsampled: dict[_Release, int] = {}
    for release in releases:
        if release.noise_multiplier == 0:
            return math.inf
        key = _Release("everyone", release.noise_multiplier, 0, group=release.group, mechanism=release.mechanism)
        unsampled[key] = unsampled.get(key, 0) + release.times
    everyone = tuple(sorted(key._replace(times=times) for key, times in unsampled.items()))
    return _gaussians_epsilon(everyone, delta) if _has_closed_form(everyone) else _pld_epsilon(everyone, delta, None)


def _gaussians_epsilon(releases: Iterable[_Release], delta: float) -> float:
    """Composed Gaussians are one Gaussian: the squares of 1 / noise add up."""
    mu_squared = 0.0
    for release in releases:
        if release.noise_multiplier == 0:
            return math.inf
        mu_squared += release.times / release.noise_of_group / release.noise_of_group
    return _gaussian_epsilon(math.sqrt(mu_squared), delta)


def _mills(x: float) -> float:
    """The upper tail of the standard normal at x >= 0, divided by its density there."""
    if x < 5:
        return math.sqrt(math.pi / 2) * math.exp(x * x / 2) * math.erfc(x / math.sqrt(2))
    fraction = x
    for k in range(60, 0, -1):  # the continued fraction of Laplace; 60 terms are exact to rounding from x = 5 on
        fraction = x + k / fraction
    return 1 / fraction


def _gaussian_delta(mu: float, candidate: float) -> float:
    """The delta of a Gaussian mechanism with sensitivity over noise `mu`, at epsilon `candidate`.

    Phi(-a) - e^epsilon Phi(-b) with a, b = epsilon/mu -+ mu/2. The two densities differ by exactly e^epsilon, so the
    product is written with the density at a: nothing overflows.
    """
    a = candidate / mu - mu / 2
    b = candidate / mu + mu / 2
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    tail = density * _mills(a) if a >= 0 else math.erfc(a / math.sqrt(2)) / 2
    return tail - density * _mills(b)


def _gaussian_epsilon(mu: float, delta: float) -> float:
    if mu == 0 or math.erf(mu / math.sqrt(8)) <= delta:  # the total variation distance is delta at epsilon 0
        return 0.0
    if not math.isfinite(mu * mu):
        return math.inf
    low, high = 0.0, max(1.0, mu * mu)
    while _gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _gaussian_delta(mu, middle) > delta:
            low = middle
        else:
            high = middle
    return high  # the side that satisfies delta


# Renyi differential privacy.

_ROUNDING = 1e-12  # of the logarithm of a sum of up to a thousand terms, with room to spare


@contextlib.contextmanager
def quiet_accountant() -> Iterator[Any]:
    """Gives dp_accounting, and drops what it logs while the block runs (thousands of lines on unusual orders)."""
    import dp_accounting

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return "dp_accounting" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(from_elsewhere)
    try:
        yield dp_accounting
    finally:
        logger.removeFilter(from_elsewhere)


@functools.lru_cache(maxsize=256)
def _rdp_of_one(release: _Release, orders: tuple[int, ...] | None = None) -> tuple[Any, Any]:
    """The Renyi orders, and the divergence of one such release at each; infinite where it could not be computed."""
    import numpy as np

    if release.mechanism == "laplace":
        return _rdp_of_one_laplace(release, orders)
    with quiet_accountant() as dp_accounting:
        event = dp_accounting.GaussianDpEvent(release.noise_of_group)
        relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
        if release.drawn == "poisson":
            event = dp_accounting.PoissonSampledDpEvent(release.sampling_probability, event)
        elif release.drawn == "fixed":
            event = dp_accounting.SampledWithoutReplacementDpEvent(release.population, release.cohort_size, event)
            relation = dp_accounting.NeighboringRelation.REPLACE_ONE
        divergences = []
        orders = dp_accounting.rdp.RdpAccountant(orders, relation).orders
        with np.errstate(all="ignore"):
            for order in orders:
                try:
                    divergence = dp_accounting.rdp.RdpAccountant([order], relation).compose(event).rdp[0]
                except (ValueError, OverflowError, ZeroDivisionError):  # an order that floating point cannot reach
                    divergence = math.inf
                if release.drawn != "everyone":
                    # These are logarithms of sums close to 1: what rounding may have taken away is given back, and
                    # an order below zero, which would count as perfect privacy, is not used.
                    divergence = divergence + _ROUNDING / (order - 1) if divergence >= 0 else math.inf
                divergences.append(divergence)
    return orders, np.array(divergences)


def _rdp_of_one_laplace(release: _Release, orders: tuple[int, ...] | None) -> tuple[Any, Any]:
    """The most that its pure epsilon allows for, whichever way the noise on many numbers shares the sensitivity."""
    import numpy as np

    orders = _rdp_of_one(_Release("everyone", 1.0, 1), orders)[0]
    divergences = [pure.randomized_response_divergence(release.pure_epsilon, float(order)) for order in orders]
    return orders, np.array(divergences) + _ROUNDING / (np.asarray(orders) - 1)


def _rdp_of_all(releases: tuple[_Release, ...], orders: tuple[int, ...] | None = None) -> tuple[Any, Any]:
    """The Renyi orders, and the divergence of all releases together at each."""
    looked_at, total = _rdp_of_one(releases[0]._replace(times=1), orders)
    total = releases[0].times * total
    for release in releases[1:]:
        total = total + release.times * _rdp_of_one(release._replace(times=1), orders)[1]
    return looked_at, total


@functools.lru_cache(maxsize=1024)
def _rdp_epsilon(releases: tuple[_Release, ...], delta: float, orders: tuple[int, ...] | None = None) -> float:
    """Divergences add up over releases; the best order gives epsilon, those of dp_accounting or the few that are given.

    Source: Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy", Proposition 12.
    """
    if not releases:
        return 0.0
    if any(release.noise_multiplier == 0 for release in releases):
        return math.inf
    if _needs_lemma(releases):
        by_lemma = _by_group_lemma(functools.partial(_rdp_epsilon, orders=orders), releases, delta)
        return min(by_lemma, _unsampled_epsilon(releases, delta))
    bound = _pure_epsilon(releases)
    bound = math.inf if bound is None else bound
    looked_at, total = _rdp_of_all(releases, orders)
    usable = [i for i, divergence in enumerate(total) if math.isfinite(divergence)]
    if not usable:
        return bound
    with quiet_accountant() as dp_accounting:
        return min(bound, float(dp_accounting.rdp.compute_epsilon(looked_at[usable], total[usable], delta)[0]))


# Groups: all examples of one user.


def _has_mixtures() -> bool:
    """Whether dp_accounting knows the loss of a mixture of Gaussians, which is what a sampled group is; 0.4.3 does not."""
    from dp_accounting.pld import privacy_loss_distribution

    return hasattr(privacy_loss_distribution, "from_mixture_gaussian_mechanism")


def _by_group_lemma(
    epsilon_of: Callable[[tuple[_Release, ...], float], float], releases: tuple[_Release, ...], delta: float
) -> float:
    """From (epsilon, delta) for one to (k epsilon, (e^{k epsilon} - 1) / (e^epsilon - 1) delta) for k of them.

    Source: Vadhan 2017, "The Complexity of Differential Privacy", Lemma 2.2.
    """
    size = max(release.group for release in releases)
    alone = tuple(sorted(release._replace(group=1) for release in releases))
    best = math.inf
    for step in range(400):  # ever smaller deltas for one, until what the group makes of it is within delta
        smaller = delta / size * 10.0 ** (-step / 8)
        one = epsilon_of(alone, smaller)
        if not math.isfinite(one) or size * one > 600:
            break
        factor = math.expm1(size * one) / math.expm1(one) if one > 0 else size
        if smaller * factor <= delta:
            best = size * one
            break
    return best


# Privacy loss distributions.

_MOST_CELLS = 500_000  # of a grid of losses; one evaluation then takes about a second at most
_MOST_PURE_EPSILON = 500.0  # the exponential of larger ones is beyond floating point
_FEW_ORDERS = (3, 4, 5, 6, 8, 10, 12, 16, 24, 32)  # of dp_accounting's own, all quick to compute
_TAIL = 1e-22  # the mass that PLD's own truncation leaves out, about e^-50


@functools.lru_cache(maxsize=8)
def _loss_of_one(noise_multiplier: float, sampling_probability: float, interval: float, group: int = 1) -> Any:
    """The privacy loss distribution of one release, rounded to the side of more loss.

    Of a group, each example is sampled by itself: Ganesh 2024, "Tight Group-Level DP Guarantees for DP-SGD with Sampling
    via Mixture of Gaussians Mechanisms", Theorem 1.1.
    """
    from dp_accounting.pld import privacy_loss_distribution

    if group > 1:
        taken = range(group + 1)
        q = sampling_probability
        chances = [math.comb(group, n) * q**n * (1 - q) ** (group - n) for n in taken]
        return privacy_loss_distribution.from_mixture_gaussian_mechanism(
            standard_deviation=noise_multiplier,
            sensitivities=list(taken),
            sampling_probs=[chance / math.fsum(chances) for chance in chances],
            value_discretization_interval=interval,
        )
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=sampling_probability,
    )


@functools.lru_cache(maxsize=8)
def _loss_of_one_pure(pure_epsilon: float, interval: float) -> Any:
    """The privacy loss distribution of randomized response, which dominates that of every mechanism as private.

    The loss of Laplace noise on a single number lies below it, and would do for vectors if one number were their worst
    case, for which there is no proof that we know of.
    """
    from dp_accounting.pld import common, privacy_loss_distribution

    return privacy_loss_distribution.from_privacy_parameters(
        common.DifferentialPrivacyParameters(pure_epsilon, 0.0), value_discretization_interval=interval
    )


def _default_interval(releases: tuple[_Release, ...]) -> float:
    """1e-4, or 1e-3 for mixtures, doubled until the largest losses that matter fit into `_MOST_CELLS` cells."""
    pure_epsilons = {release.pure_epsilon for release in releases if release.mechanism == "laplace"}
    gaussian = [release.noise_of_group for release in releases if release.mechanism == "gaussian"]
    if not gaussian and len(pure_epsilons) == 1:
        return pure_epsilons.pop()  # all losses are multiples of it: nothing is rounded
    of_one = max([*pure_epsilons, *(10 / noise + 0.5 / noise**2 for noise in gaussian)])
    # The loss of a mixture is found cell by cell, which takes half a minute on the finer grid.
    finest = 10 * DEFAULT_DISCRETIZATION if _needs_lemma(releases) and _has_mixtures() else DEFAULT_DISCRETIZATION
    # The loss of a pure mechanism is one number, rounded up to the grid.
    finest = min([finest, *(one / 200 for one in pure_epsilons)])
    # All orders find a bound that is no larger: where a few show that the finest grid fits, they need not be looked at.
    if max(of_one, _rdp_epsilon(releases, _TAIL, _FEW_ORDERS)) <= finest * _MOST_CELLS:
        return finest
    largest = max(of_one, _rdp_epsilon(releases, _TAIL))
    if not math.isfinite(largest):
        largest = of_one + _unsampled_epsilon(releases, _TAIL)
    doublings = max(0, math.ceil(math.log2(largest / finest / _MOST_CELLS)))
    return finest * 2**doublings


def _limit_epsilon(releases: tuple[_Release, ...], delta: float) -> float:
    """A guess, for the searches to start from: the Gaussian mechanism that many releases come near to. No bound.

    Source: Bu, Dong, Long, Su 2020, "Deep Learning with Gaussian Differential Privacy", Corollary 4.
    """
    mu_squared = 0.0
    for release in releases:
        if release.noise_multiplier == 0:
            return math.inf
        q = release.cohort_size / release.population if release.drawn == "fixed" else release.sampling_probability
        mu_squared_of_one = (release.group / release.noise_multiplier) ** 2
        if q < 1:
            amplified = (q * release.group) ** 2 * math.expm1(min(release.noise_multiplier**-2, 700.0))
            mu_squared_of_one = min(amplified, mu_squared_of_one)
        mu_squared += release.times * mu_squared_of_one
    return _gaussian_epsilon(math.sqrt(mu_squared), delta)


def _coarse_epsilon(releases: tuple[_Release, ...], delta: float) -> float:
    """A quick look: ten times the default grid, where there is one."""
    exact = _has_closed_form(releases) or all(release.mechanism == "laplace" for release in releases)
    exact = exact or any(release.noise_multiplier == 0 for release in releases)  # no privacy, and no grid
    return _pld_epsilon(releases, delta, None if exact else 10 * _default_interval(releases))


def _fine_epsilon(releases: tuple[_Release, ...], delta: float) -> float:
    return _pld_epsilon(releases, delta, None)


@functools.lru_cache(maxsize=4)
def _loss_of_all(releases: tuple[_Release, ...], interval: float) -> Any:
    """The privacy loss distribution of all releases together."""
    total = None
    for release in releases:
        if _has_closed_form([release]):
            composed = _loss_of_one(release.noise_of_group / math.sqrt(release.times), 1.0, interval)
        elif release.mechanism == "laplace":
            composed = _loss_of_one_pure(release.pure_epsilon, interval).self_compose(release.times)
        else:
            one = _loss_of_one(release.noise_multiplier, release.sampling_probability, interval, release.group)
            composed = one.self_compose(release.times)
        total = composed if total is None else total.compose(composed)
    return total


@functools.lru_cache(maxsize=1024)
def _pld_epsilon(releases: tuple[_Release, ...], delta: float, interval: float | None) -> float:
    if not _has_pld(releases):
        raise UnsupportedEventError(
            "accountant='pld' has no bound for fixed-size cohorts drawn without replacement: use accountant='rdp', or "
            "Poisson sampling."
        )
    # Sampling never costs privacy, so the unsampled figure is a bound too: all there is to say where nothing is
    # sampled, and a way out where the grid or the tails give up (losses in the thousands, delta below 1e-14).
    # Small pure epsilons may be below the grid, and then RDP is the tighter of the two.
    bound = _rdp_epsilon(releases, delta) if any(r.mechanism == "laplace" for r in releases) else math.inf
    if _is_sampled(releases) or _has_closed_form(releases):
        bound = min(bound, _unsampled_epsilon(releases, delta))
    if _has_closed_form(releases) or any(release.noise_multiplier == 0 for release in releases):
        return bound
    if any(release.mechanism == "laplace" and release.pure_epsilon > _MOST_PURE_EPSILON for release in releases):
        return bound
    if _needs_lemma(releases) and not _has_mixtures():
        return min(bound, _by_group_lemma(functools.partial(_pld_epsilon, interval=interval), releases, delta))
    with quiet_accountant():
        total = _loss_of_all(releases, interval or _default_interval(releases))
        return min(bound, float(total.get_epsilon_for_delta(delta)))


# Searches. Both keep a side that was accounted and found within the target, and only ever return that side.

_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e7
_NOISE_TOLERANCE = 1e-4  # relative
_ROUGH_TOLERANCE = 5e-3  # a straight line across is closer to the answer than `_NOISE_TOLERANCE` by far
_FAR = 50.0  # stands for an infinitely bad or good fit, so that the searches can interpolate


def _excess(spent: float, target: float) -> float:
    """log(spent / target), kept finite: positive exactly when the target is passed."""
    if spent > target:
        return max(min(_FAR, math.log(spent / target)), 1e-300)
    return max(-_FAR, math.log(spent / target)) if spent > 0 else -_FAR


class _Start(NamedTuple):
    """Where a search for noise begins: how far the first stride goes, and what is known of excess over log(noise)."""

    noise: float
    stride: float  # in log(noise)
    steepness: float  # by how much excess falls


_START = _Start(1.0, math.log(2), 1.0)  # epsilon falls at least as fast as noise grows


class _Bracket(NamedTuple):
    """Two noise multipliers with the answer between them, and by how much each misses or meets the target."""

    too_small: float
    too_small_excess: float
    feasible: float
    feasible_excess: float

    @property
    def width(self) -> float:
        return math.log(self.feasible / self.too_small)

    @property
    def root(self) -> _Start:
        """The straight line between the two: from where it meets the target, one stride closes a bracket."""
        fall = self.too_small_excess - self.feasible_excess
        noise = self.too_small * math.exp(self.width * self.too_small_excess / fall)
        return _Start(noise, 0.95 * _NOISE_TOLERANCE, max(fall / self.width, 0.5))


def _bracket_noise(excess: Callable[[float], float], start: _Start) -> _Bracket | None:
    """Walks from `start` in growing strides until the target lies between two neighbours; None if it never does."""
    noise, stride, steepness = start
    reach = 0.5
    miss = excess(noise)
    upwards = miss > 0
    while True:
        step = max(stride, min(abs(miss) / steepness, reach) + stride / 2)
        following = noise * math.exp(step if upwards else -step)
        if not _LEAST_NOISE <= following <= _MOST_NOISE:
            return None
        following_miss = excess(following)
        if upwards and following_miss <= 0:
            return _Bracket(noise, miss, following, following_miss)
        if not upwards and following_miss > 0:
            return _Bracket(following, following_miss, noise, miss)
        steepness = max(abs(following_miss - miss) / step, 0.5)
        noise, miss, stride, reach = following, following_miss, 2 * stride, 2 * reach


def _narrow_noise(excess: Callable[[float], float], bracket: _Bracket, tolerance: float) -> _Bracket:
    """Regula falsi on log(noise), Illinois variant, until the bracket is `tolerance` wide."""
    over, under = bracket.too_small_excess, -bracket.feasible_excess  # halved where a side stays for a second time
    was_feasible = None
    for _ in range(200):
        width = bracket.width
        if width <= tolerance:
            break
        to_root = width * (over / (over + under) if over + under > 0 else 0.5)
        # Past the root, near enough for the next look, on the other side of it, to close the bracket.
        if to_root <= 0.6 * tolerance:
            step = 0.95 * tolerance
        elif width - to_root <= 0.6 * tolerance:
            step = width - 0.95 * tolerance
        else:
            step = to_root + 0.4 * tolerance
        noise = bracket.too_small * math.exp(step)
        miss = excess(noise)
        feasible = miss <= 0
        if feasible:
            bracket, under = bracket._replace(feasible=noise, feasible_excess=miss), -miss
            over /= 2 if was_feasible else 1
        else:
            bracket, over = bracket._replace(too_small=noise, too_small_excess=miss), miss
            under /= 2 if was_feasible is False else 1
        was_feasible = feasible
    return bracket


def _pass_length(event: Event) -> int:
    """Releases in one pass of a shuffled event, or in one tree, and 1 for any other: what `_repeat` repeats."""
    if not event.in_passes:
        return 1
    if event.participations == 0:
        raise InvalidArgumentError(
            f"a {event.sampler} event with participations=0 has no pass to repeat: give one whole pass."
        )
    return event.count // event.participations


def _repeat(event: Event, units: int) -> Event:
    if not event.in_passes:
        return event.with_count(units)
    return dataclasses.replace(event, count=units * _pass_length(event), participations=units)


def _largest_count(excess: Callable[[int], float], start: int, most: int) -> int:
    """The largest n in [0, most] with excess(n) <= 0, given that n = 0 satisfies it and excess grows with n."""
    low, low_miss, high, high_miss = 0, -_FAR, most + 1, _FAR
    guess = min(start, most)
    stride = 1.05
    while high - low > 1:
        miss = excess(guess)
        if miss <= 0:
            low, low_miss = guess, miss
        else:
            high, high_miss = guess, miss
        if low == 0:
            guess = high // 2
        elif high == most + 1:
            guess, stride = math.ceil(low * stride) + 1, stride**2
        else:
            # Epsilon is close to a power of n: interpolate logarithms, and keep off the ends so that it halves soon.
            share = min(max(low_miss / (low_miss - high_miss), 0.02), 0.98)
            guess = round(low * (high / low) ** share)
        guess = min(max(guess, low + 1), high - 1)
    return low
