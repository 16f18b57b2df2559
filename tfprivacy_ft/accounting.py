"""Events -> epsilon, and the noise or the number of steps that a target epsilon allows.

A thin layer over `bounds`, which asks dp_accounting. It promises that epsilon is never under-reported: every
approximation errs to the side of more epsilon, and what the solvers return was itself accounted and found within the
target. Events of different units of privacy do not compose, nor do those for replacing one, or local ones, with the
others: they are reported side by side (`accounts`), never added. Poisson releases are stated for adding or removing one;
beside releases for zero-out they are stated, at the same epsilon, for zero-out, and compose.

It knows neither TensorFlow nor ledgers.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from tfprivacy_ft import _check, bounds, gaussian
from tfprivacy_ft.errors import BudgetExceededError, InvalidArgumentError, UnsupportedEventError
from tfprivacy_ft.events import Event, Relation, Sampler, Unit, merge
from tfprivacy_ft.releases import Release, from_events, has_closed_form, has_pld, needs_lemma
from tfprivacy_ft.root_finding import LEAST_NOISE, MOST_NOISE, largest_count, least_noise, log_excess

Accountant = Literal["pld", "rdp"]

__all__ = [
    "Account",
    "Accountant",
    "accounts",
    "check_delta",
    "concerning",
    "epsilon",
    "epsilon_without_amplification",
    "gaussian_epsilon",
    "quick_epsilon",
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
    return _measure(accountant, value_discretization_interval)(from_events(_one_group(events)), float(delta))


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
    return bounds.unsampled_epsilon(from_events(_one_group(events)), float(delta))


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
    return gaussian.epsilon_at(math.sqrt(releases) / noise_multiplier, delta)


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

    def of(releases: tuple[Release, ...]) -> float:
        if not has_pld(releases):
            return bounds.rdp_epsilon(releases, delta)
        if needs_lemma(releases):  # the grid of mixtures is coarse already
            return bounds.fine_epsilon(releases, delta)
        return bounds.coarse_epsilon(releases, delta)

    return max((of(from_events(group)) for group in _groups(events).values()), default=0.0)


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

    releases = from_events(_one_group(events))
    if needs_lemma(releases):
        raise UnsupportedEventError(
            "users with several examples that are sampled have no Renyi divergence here: account for single examples, or "
            "make batches without sampling."
        )
    orders = np.asarray(bounds.rdp_of_one(Release("everyone", 1.0, 1))[0], float)
    if not releases:
        return orders, np.zeros(len(orders))
    if any(release.noise_multiplier == 0 for release in releases):
        return orders, np.full(len(orders), math.inf)
    return orders, bounds.rdp_of_all(releases)[1]


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

    exact = _measure(accountant, value_discretization_interval)
    # A formula, then a coarse grid for a tenth of the time, leave two or three looks at the fine grid.
    looks = (bounds.limit_epsilon, bounds.coarse_epsilon) if accountant == "pld" else (bounds.limit_epsilon,)
    excess, *guesses = (_excess_by(measure, events_for, target_epsilon, float(delta)) for measure in (exact, *looks))
    found = least_noise(excess, guesses)
    if found is None:
        raise InvalidArgumentError(
            f"target_epsilon={target_epsilon} is not met by any noise multiplier between {LEAST_NOISE:g} and "
            f"{MOST_NOISE:g}, or by all of them: change target_epsilon or the releases."
        )
    return found


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

    def excess(units: int, which: Accountant = accountant) -> float:
        return log_excess(epsilon([*spent, _repeat(event, units)], delta, accountant=which), target_epsilon)

    if excess(0) > 0:
        raise BudgetExceededError(
            f"target_epsilon={target_epsilon} was passed by what is already spent "
            f"(epsilon {epsilon(spent, delta, accountant=accountant):.4g}): raise the target, or stop here."
        )
    is_costly = accountant == "pld" and not has_closed_form(from_events([*spent, _repeat(event, 1)]))
    guesses = [functools.partial(excess, which="rdp")] if is_costly else []
    return pass_length * largest_count(excess, most // pass_length, guesses)


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

    excess = _excess_by(_measure(accountant), events_for, target_epsilon, float(delta))
    if excess(most) <= 0:
        return most
    is_costly = accountant == "pld" and not has_closed_form(from_events(_one_group(events_for(1))))
    looks = (bounds.limit_epsilon, bounds.coarse_epsilon) if is_costly else ()  # as in `solve_noise_multiplier`
    guesses = [_excess_by(look, events_for, target_epsilon, float(delta)) for look in looks]
    return largest_count(excess, most - 1, guesses)


def _measure(
    accountant: Accountant, value_discretization_interval: float | None = None
) -> Callable[[tuple[Release, ...], float], float]:
    """What an accountant makes of releases and delta."""
    if accountant not in ("pld", "rdp"):
        raise InvalidArgumentError(f"accountant={accountant!r} is not an accountant: use 'pld' or 'rdp'.")
    if value_discretization_interval is not None:
        _check.positive(value_discretization_interval=value_discretization_interval)
    if accountant == "rdp":
        return bounds.rdp_epsilon
    return lambda releases, delta: bounds.pld_epsilon(releases, delta, value_discretization_interval)


def _excess_by(
    measure: Callable[[tuple[Release, ...], float], float],
    events_for: Callable[[Any], Event | Iterable[Event]],
    target_epsilon: float,
    delta: float,
) -> Callable[[Any], float]:
    """By how much the events for a noise or a size pass the target, as a search asks for it."""
    return lambda value: log_excess(measure(from_events(_one_group(events_for(value))), delta), target_epsilon)


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


def _account(unit: Unit, relation: Relation, events: list[Event], delta: float) -> Account:
    releases = from_events(events)
    replaced = None
    if relation == "zero_out":  # any other data instead of none moves the sum twice as far
        replaced = bounds.unsampled_epsilon(from_events(events, noise_factor=0.5), delta)
    return Account(
        unit=unit,
        relation=relation,
        delta=delta,
        epsilon_pld=bounds.pld_epsilon(releases, delta, None) if has_pld(releases) else None,
        epsilon_rdp=bounds.rdp_epsilon(releases, delta),
        epsilon_without_amplification=bounds.unsampled_epsilon(releases, delta),
        epsilon_replace_one=replaced,
        events=merge(events),
        epsilon_pure=bounds.pure_epsilon(releases) if any(r.mechanism == "laplace" for r in releases) else None,
        by_group_lemma=needs_lemma(releases) and not bounds.has_mixtures(),
    )


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
