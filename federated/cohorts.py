"""Cohorts: who takes part in a round, and what a round of such members releases.

Promises: members and event come from one object, so the accounts cannot be told another sampler than the one that drew;
random numbers are the operating system's; between two rounds of a cyclic event that add a participation nobody takes part
twice, also in a run that goes on in another process. Knows nothing of ledgers and of how a round is computed.

The mean of a round divides by the constant `clients_per_round`, whoever is drawn: a member that is not there is zero.
"""

import contextlib
import math
import secrets
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import numpy as np

from federated.clients import poisson_cohort, sampling_probability
from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.events import Event, Mechanism

__all__ = ["Cohorts", "CyclicCohorts", "FixedCohorts", "PoissonCohorts", "make"]


@runtime_checkable
class Cohorts(Protocol):
    """Draws the members of one round after the other, and says what these rounds release.

    Args:
        num_clients: Clients in all, >= 1.
        clients_per_round: (Expected) size of a cohort, > 0, at most `num_clients`.
        name: `"poisson"`, `"fixed"` or `"cyclic"`.
    """

    num_clients: int
    clients_per_round: float
    name: str

    def event(
        self,
        *,
        noise_multiplier: float,
        mechanism: Mechanism = "gaussian",
        l2_norm_clip: float | None = None,
        rounds: int = 1,
    ) -> Event:
        """What the next `rounds` rounds release; asked before `draw` is called for the first of them.

        Args:
            noise_multiplier: Standard deviation (scale of Laplace noise) on the sum, divided by the clip, >= 0.
            mechanism: `"gaussian"` or `"laplace"`.
            l2_norm_clip: For the record; None for Laplace noise.
            rounds: How many, >= 1.
        """
        ...

    def draw(self) -> np.ndarray:
        """Numbers of the members of the next round, increasing; may be empty."""
        ...

    def position(self) -> dict[str, Any]:
        """What another process needs to go on, as JSON can hold it; empty where there is nothing to remember."""
        ...

    def go_on_from(self, position: dict[str, Any], *, released_since: int | None = None) -> None:
        """Takes over where `position` was asked for.

        Rounds that were released after that had members, who must not come again in the same pass for nothing.

        Args:
            position: What `position()` gave.
            released_since: The most rounds that were, such as the ledger counts since then, >= 0; None where that is not known.

        Raises:
            InvalidArgumentError: It is not a position of such cohorts of as many clients.
        """
        ...


class _Memoryless:
    """Cohorts of which no draw knows of those before."""

    name: str

    def position(self) -> dict[str, Any]:
        """Empty: a draw owes nothing to those before."""
        return {}

    def go_on_from(self, position: dict[str, Any], *, released_since: int | None = None) -> None:
        """Does nothing; refuses the position of other cohorts."""
        _check_memoryless(self.name, position)


class PoissonCohorts(_Memoryless):
    """Each client takes part in each round on its own, with probability clients_per_round / num_clients.

    Epsilon is for adding or removing one client, amplified by sampling. Sizes vary, and are as secret as the members.

    Args:
        num_clients: Clients in all, >= 1.
        clients_per_round: Expected size of a cohort, > 0, at most `num_clients`; need not be whole.

    Raises:
        InvalidArgumentError: An argument is outside its range.

    Example:
        >>> cohorts = PoissonCohorts(num_clients=100, clients_per_round=10)
        >>> cohorts.event(noise_multiplier=1.0).sampling_probability
        0.1

    Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", algorithm 1.
    """

    name = "poisson"

    def __init__(self, num_clients: int, clients_per_round: float):
        _check.positive_integer(num_clients=num_clients)
        self._probability = sampling_probability(num_clients, clients_per_round)
        self.num_clients, self.clients_per_round = int(num_clients), float(clients_per_round)

    def event(
        self,
        *,
        noise_multiplier: float,
        mechanism: Mechanism = "gaussian",
        l2_norm_clip: float | None = None,
        rounds: int = 1,
    ) -> Event:
        """What the next `rounds` rounds release; as in `Cohorts`."""
        _check.positive_integer(rounds=rounds)
        return Event.poisson(
            count=rounds,
            unit="client",
            noise_multiplier=noise_multiplier,
            sampling_probability=self._probability,
            population=self.num_clients,
            l2_norm_clip=l2_norm_clip,
            mechanism=mechanism,
        )

    def draw(self) -> np.ndarray:
        """Numbers of the members of the next round, increasing; may be empty."""
        return poisson_cohort(self.num_clients, self._probability)


class FixedCohorts(_Memoryless):
    """Exactly `clients_per_round` clients in each round, drawn uniformly without replacement.

    Epsilon is for replacing one client by another, which moves a sum by twice the clip: it costs far more than Poisson
    cohorts of that size.

    Args:
        num_clients: Clients in all, >= 1.
        clients_per_round: Size of a cohort, a whole number >= 1, at most `num_clients`.

    Raises:
        InvalidArgumentError: An argument is outside its range.

    Example:
        >>> cohorts = FixedCohorts(num_clients=100, clients_per_round=10)
        >>> len(cohorts.draw()), cohorts.event(noise_multiplier=1.0).relation
        (10, 'replace_one')

    Source: Wang, Balle, Kasiviswanathan 2019, "Subsampled Renyi Differential Privacy and Analytical Moments Accountant",
        Theorem 27.
    """

    name = "fixed"

    def __init__(self, num_clients: int, clients_per_round: float):
        self._size = _whole_size(self.name, num_clients, clients_per_round)
        self.num_clients, self.clients_per_round = int(num_clients), float(clients_per_round)

    def event(
        self,
        *,
        noise_multiplier: float,
        mechanism: Mechanism = "gaussian",
        l2_norm_clip: float | None = None,
        rounds: int = 1,
    ) -> Event:
        """What the next `rounds` rounds release; as in `Cohorts`."""
        _check.positive_integer(rounds=rounds)
        return Event.fixed(
            count=rounds,
            unit="client",
            noise_multiplier=noise_multiplier,
            cohort_size=self._size,
            population=self.num_clients,
            l2_norm_clip=l2_norm_clip,
            mechanism=mechanism,
        )

    def draw(self) -> np.ndarray:
        """Numbers of the members of the next round, increasing."""
        return np.sort(_from_the_system().choice(self.num_clients, self._size, replace=False))


class CyclicCohorts:
    """Everybody in turn: the clients are put in an order once, and each round takes the next `clients_per_round` of them.

    A pass is ceil(num_clients / clients_per_round) rounds, the last of which may be short, and nobody is in a pass twice.
    Epsilon is for blanking out one client, without amplification: that of as many releases as there were passes, begun
    ones included. Nothing about the order or the members has to be secret.

    Args:
        num_clients: Clients in all, >= 1.
        clients_per_round: Size of a cohort, a whole number >= 1, at most `num_clients`.

    Raises:
        InvalidArgumentError: An argument is outside its range.

    Example:
        >>> cohorts = CyclicCohorts(num_clients=5, clients_per_round=2)
        >>> a_pass = [cohorts.draw().tolist() for _ in range(3)]
        >>> sorted(sum(a_pass, [])), [len(members) for members in a_pass]
        ([0, 1, 2, 3, 4], [2, 2, 1])

    Source: parallel composition within a pass (McSherry 2009, "Privacy Integrated Queries", Theorem 4, with zero-out for
        neighbours), and composition over passes.
    """

    name = "cyclic"

    def __init__(self, num_clients: int, clients_per_round: float):
        self._size = _whole_size(self.name, num_clients, clients_per_round)
        self.num_clients, self.clients_per_round = int(num_clients), float(clients_per_round)
        self._order = _from_the_system().permutation(self.num_clients)
        self._round = 0  # of the run, whose passes all have the same order
        self._may_repeat = False  # whether members of the pass under way may come once more before it ends

    @property
    def rounds_per_pass(self) -> int:
        """Rounds until everybody was in one."""
        return math.ceil(self.num_clients / self._size)

    def event(
        self,
        *,
        noise_multiplier: float,
        mechanism: Mechanism = "gaussian",
        l2_norm_clip: float | None = None,
        rounds: int = 1,
    ) -> Event:
        """What the next `rounds` rounds release; as in `Cohorts`. Only the first round of a pass adds a participation."""
        _check.positive_integer(rounds=rounds)
        begun = _passes_begun(self._round + rounds, self.rounds_per_pass) - _passes_begun(
            self._round, self.rounds_per_pass
        )
        in_the_middle = self._round % self.rounds_per_pass != 0
        return Event.shuffled(
            count=rounds,
            passes=begun + (self._may_repeat and in_the_middle),
            unit="client",
            noise_multiplier=noise_multiplier,
            population=self.num_clients,
            l2_norm_clip=l2_norm_clip,
            mechanism=mechanism,
        )

    def draw(self) -> np.ndarray:
        """Numbers of the members of the next round, increasing."""
        start = self._round % self.rounds_per_pass * self._size
        self._round, self._may_repeat = self._round + 1, False
        return np.sort(self._order[start : start + self._size])

    def position(self) -> dict[str, Any]:
        """The order of the clients, how many rounds were drawn, and whether the pass may repeat members."""
        return {"order": self._order.tolist(), "round": self._round, "may_repeat": self._may_repeat}

    def go_on_from(self, position: dict[str, Any], *, released_since: int | None = None) -> None:
        """Takes over where `position` was asked for; as in `Cohorts`.

        Rounds that were released since are left out, and the next ones follow. Where it is not known how many, or they reach
        into the next pass, which nobody may have paid for, the next event adds a participation.
        """
        order, drawn, may_repeat = _cyclic_position(position, self.num_clients)
        if released_since is not None:
            _check.non_negative_integer(released_since=released_since)
        self._order, self._round = order, drawn + (released_since or 0)
        in_the_same_pass = self._round // self.rounds_per_pass == drawn // self.rounds_per_pass
        paid_for = released_since is not None and in_the_same_pass
        self._may_repeat = not paid_for or (may_repeat and not released_since)


_KINDS: Mapping[str, Callable[[int, float], Cohorts]] = {
    kind.name: kind for kind in (PoissonCohorts, FixedCohorts, CyclicCohorts)
}


def make(name: str, num_clients: int, clients_per_round: float) -> Cohorts:
    """The cohorts of this name.

    Args:
        name: `"poisson"`, `"fixed"` or `"cyclic"`.
        num_clients: Clients in all, >= 1.
        clients_per_round: (Expected) size of a cohort, > 0, at most `num_clients`; a whole number but for `"poisson"`.

    Raises:
        InvalidArgumentError: The name is unknown, or a number is outside its range.

    Example:
        >>> make("cyclic", num_clients=6, clients_per_round=3).event(noise_multiplier=1.0, rounds=4).participations
        2
    """
    if not isinstance(name, str) or name not in _KINDS:
        raise InvalidArgumentError(f"cohorts={name!r} is unknown: use one of {', '.join(_KINDS)}.")
    return _KINDS[name](num_clients, clients_per_round)


def _from_the_system() -> np.random.Generator:
    return np.random.default_rng(secrets.randbits(256))


def _passes_begun(rounds: int, rounds_per_pass: int) -> int:
    return math.ceil(rounds / rounds_per_pass)


def _whole_size(name: str, num_clients: int, clients_per_round: float) -> int:
    _check.positive_integer(num_clients=num_clients)
    is_whole = isinstance(clients_per_round, Real) and math.isfinite(clients_per_round) and clients_per_round % 1 == 0
    if not is_whole or isinstance(clients_per_round, bool) or not 1 <= clients_per_round <= num_clients:
        raise InvalidArgumentError(
            f"clients_per_round={clients_per_round!r} is not allowed for {name} cohorts of {num_clients} clients: give a whole "
            "number >= 1 and at most that."
        )
    return int(clients_per_round)


def _check_memoryless(name: str, position: Any) -> None:
    if position != {}:
        raise InvalidArgumentError(
            f"the position given is not one of {name} cohorts, which is empty: go on with the cohorts that it is of."
        )


def _cyclic_position(position: Any, num_clients: int) -> tuple[np.ndarray, int, bool]:
    is_one = isinstance(position, Mapping) and set(position) == {"order", "round", "may_repeat"}
    if is_one and np.array_equal(np.sort(position["order"]), np.arange(num_clients)):
        with contextlib.suppress(InvalidArgumentError):
            _check.non_negative_integer(round=position["round"])
            _check.boolean(may_repeat=position["may_repeat"])
            return np.asarray(position["order"], int), int(position["round"]), position["may_repeat"]
    raise InvalidArgumentError(
        f"the position given is not one of cyclic cohorts of {num_clients} clients: give what `position` of such returned."
    )
