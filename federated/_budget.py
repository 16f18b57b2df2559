"""Whether the budget of a run leaves room for its next round.

Promises: a round that is allowed leaves the ledger within the target, whatever the releases it is made of, by the
figure that reports quote. Knows nothing of rounds.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from tfprivacy_ft import accounting
from tfprivacy_ft.accounting import Accountant
from tfprivacy_ft.errors import UnsupportedEventError
from tfprivacy_ft.events import Event
from tfprivacy_ft.ledger import Ledger

# RDP bounds epsilon from above by itself, in a ms; what it finds to be this far within the target needs no PLD, which can
# take a second.
_CLEARLY = 0.98

__all__ = ["Budget", "epsilon_of"]


class Budget:
    """Says before each round whether it may run.

    Epsilon takes longer than many a round; so one look finds out how many rounds like the next one still fit, and nothing
    is computed again before these are used up or a round costs more.

    Args:
        ledger: What was spent, of which this run alone writes the releases.
        target_epsilon: > 0; None allows everything.
        delta: Of epsilon.
    """

    def __init__(self, ledger: Ledger, target_epsilon: float | None, delta: float):
        self._ledger, self._target, self._delta = ledger, target_epsilon, delta
        self._round: tuple[Event, ...] = ()
        self._room = 0

    def allows(self, events: Sequence[Event], at_most: int) -> bool:
        """Whether there is room for `events`, which the caller then reserves.

        Args:
            events: The releases of the next round.
            at_most: How many rounds the run will still ask for, >= 1, this one among them.

        Raises:
            UnsupportedEventError: They and what the ledger holds do not add up to one epsilon.
        """
        costs = tuple(dataclasses.replace(event, l2_norm_clip=None) for event in events if event.participations)
        if self._target is None or not costs:
            return True
        if not (self._room and _costs_no_more(costs, self._round)):
            self._round, self._room = costs, self._rounds_left(costs, at_most)
        if not self._room:
            return False
        self._room -= 1
        return True

    def _rounds_left(self, costs: tuple[Event, ...], at_most: int) -> int:
        """The largest n <= at_most such that n times `costs` fit."""
        target, spent, units = self._target or 0.0, self._ledger.events(), {event.unit for event in costs}

        def fits(n: int) -> bool:
            both = [*spent, *(_times(event, n) for event in costs)]
            return all(
                epsilon_of(own, self._delta, "rdp") <= _CLEARLY * target or epsilon_of(own, self._delta) <= target
                for own in (accounting.concerning(unit, both) for unit in units)
            )

        if fits(at_most):
            return at_most
        low, high = 0, at_most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def epsilon_of(events: Iterable[Event], delta: float, accountant: Accountant = "pld") -> float:
    """Epsilon by PLD, and by RDP for what has no bound by PLD: the figure that an `Account` quotes; or all by RDP.

    Local releases, which only whoever collects them can see, stand by themselves; the larger figure counts.

    Raises:
        UnsupportedEventError: The others do not compose.

    Example:
        >>> cohorts = Event.fixed(count=1, noise_multiplier=2.0, cohort_size=10, population=100)
        >>> epsilon_of([cohorts], delta=1e-5) == accounting.accounts(cohorts, delta=1e-5)[0].epsilon
        True
    """
    events = list(events)
    local = [event for event in events if event.relation == "local"]
    central = [event for event in events if event.relation != "local"]
    return max(_composed(local, delta, accountant), _composed(central, delta, accountant))


def _composed(events: Sequence[Event], delta: float, accountant: Accountant) -> float:
    if not events:
        return 0.0
    try:
        return accounting.epsilon(events, delta, accountant=accountant)
    except UnsupportedEventError:  # by RDP, what does not compose is refused once more
        return accounting.epsilon(events, delta, accountant="rdp")


def _times(event: Event, n: int) -> Event:
    return dataclasses.replace(event, count=n * event.count, participations=n * event.participations)


def _costs_no_more(costs: tuple[Event, ...], than: tuple[Event, ...]) -> bool:
    """Whether these are the same releases, or the same with more noise."""
    return len(costs) == len(than) and all(
        one.noise_multiplier >= other.noise_multiplier
        and dataclasses.replace(one, noise_multiplier=other.noise_multiplier) == other
        for one, other in zip(costs, than, strict=True)
    )
