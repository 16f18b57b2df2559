"""A federated run on its way, round by round.

Promises: a round is reserved in the ledger before a client is looked at, and once more before it runs again; a client
whose data cannot be read drops out and changes nothing else.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from federated._budget import Budget
from federated.checkpoints import Checkpoint
from federated.cohorts import Cohorts
from tfprivacy_ft import accounting, ledger
from tfprivacy_ft.errors import LedgerDamagedError, WorkerLostError
from tfprivacy_ft.events import Event, merge
from tfprivacy_ft.ledger import Ledger

__all__ = ["Run", "releases"]

_MOST_RETRIES = 3  # of one round whose worker was lost

_log = logging.getLogger(__name__)


class Run:
    """How many rounds are done, the server's state, and the looks so far.

    Args:
        process: An `AveragingProcess`.
        clients: As in `simulate`.
        cohorts: A `Cohorts` object over them.
        state: To start from.
        book: The ledger.
        budget: What says whether there is room for a round.
    """

    def __init__(self, process: Any, clients: Any, cohorts: Cohorts, state: Any, book: Ledger, budget: Budget):
        self._process, self._clients, self._cohorts, self._book, self._budget = process, clients, cohorts, book, budget
        self.state = state
        self.done = 0
        self.history: list[dict[str, float]] = []
        self._reserved: list[tuple[int, Event]] = []
        # Cohorts may come in the middle of a pass, which nobody has paid for in this ledger.
        self._may_repeat = True
        self._units = {"client"}
        self._dropped = 0
        self._first_failure: Exception | None = None

    def go_on_from(self, checkpoint: Checkpoint | None, run_dir: str | os.PathLike[str]) -> None:
        """Takes over from a checkpoint, if there is one.

        Raises:
            LedgerDamagedError: The ledger does not hold what was released for it.
        """
        if checkpoint is None:
            return
        if not ledger.holds(run_dir, checkpoint.ledger):
            raise LedgerDamagedError(
                f"the checkpoint of round {checkpoint.round} in {run_dir} was made when the ledger held "
                f"{checkpoint.ledger.records} records, which are not those of the ledger there now: restore the ledger from a "
                "backup, or start a new run folder and count this run as spent."
            )
        self.state, self.done, self.history = checkpoint.state, checkpoint.round, list(checkpoint.history)
        # A round is one release, or one of either kind.
        since = max(now - then for now, then in zip(releases(self._book), checkpoint.released, strict=True))
        self._cohorts.go_on_from(checkpoint.cohorts, released_since=since)
        self._may_repeat = False
        _log.warning(
            "going on after round %d, from the checkpoint in %s%s.", self.done, run_dir,
            f"; the {since} releases since are counted, and the rounds run again and count again" if since else "",
        )  # fmt: skip

    def checkpoint(self) -> Checkpoint:
        """The run as it is now."""
        return Checkpoint(
            round=self.done,
            state=self.state,
            cohorts=self._cohorts.position(),
            ledger=self._book.position(),
            released=releases(self._book),
            history=self.history,
        )

    def next_round(self, rounds: int) -> bool:
        """Runs one more round; False if the budget leaves no room for it."""
        events = self._process.events(self._cohorts)
        if not self._reserve(_in_full(events) if self._may_repeat else events, rounds):
            return False
        self._may_repeat = False
        cohort = self._read(self._cohorts.draw())
        if len(cohort) < self._process.facts.least_reports:
            _log.warning(
                "round %d is counted and left out: too few clients are left for the noise it needs.", self.done + 1
            )
            self.done += 1
            return True
        for retry in range(_MOST_RETRIES + 1):
            try:
                self.state = self._process.next(self.state, cohort).state
                break
            except WorkerLostError as error:
                if retry == _MOST_RETRIES:
                    raise
                _log.warning("round %d is counted once more and run again: %s", self.done + 1, error)
                if not self._reserve(_in_full(events), rounds):
                    return False
                if not any(
                    event.in_passes for event in events
                ):  # amplified: each attempt is accounted as a draw of its own
                    cohort = self._read(self._cohorts.draw())
        self.done += 1
        return True

    def settle(self) -> None:
        """A reservation counts in full until it is settled, so many can be settled together."""
        kinds: dict[Event, list[tuple[int, Event]]] = {}
        for number, event in self._reserved:
            kinds.setdefault(dataclasses.replace(event, count=0, participations=0), []).append((number, event))
        for reserved in kinds.values():
            (together,) = merge(event for _, event in reserved)
            self._book.settle([number for number, _ in reserved], together)
        self._reserved.clear()

    def epsilon(self, delta: float) -> float:
        """Of the unit that this run protects; what the ledger holds for others is in the report, side by side."""
        own = [event for event in self._book.events() if event.unit in self._units]
        return max((account.epsilon for account in accounting.accounts(own, delta)), default=0.0)

    def say_who_dropped_out(self) -> None:
        """Warns how many there were: to the log of this machine alone, since it is no noised figure."""
        if self._dropped:
            _log.warning(
                "%d times a client's data could not be read, and it dropped out of the round, which counts as before; the "
                "first time: %r", self._dropped, self._first_failure,
            )  # fmt: skip

    def _reserve(self, events: Sequence[Event], rounds: int) -> bool:
        if not self._budget.allows(events, at_most=rounds - self.done):
            return False
        self._units = {event.unit for event in events}
        for event in events:
            self._reserved.append((self._book.reserve(event), event))
        return True

    def _read(self, members: np.ndarray) -> list[Any]:
        """What these clients hold, without those whose data cannot be read; the round's denominator is a constant."""
        import tensorflow as tf

        cohort = []
        for number in members:
            try:
                client = self._clients[int(number)]
                if isinstance(client, tf.data.Dataset):
                    client = client.cache()  # in memory: what is read here cannot fail later
                    for _ in client:
                        pass
                cohort.append(client)
            except (OSError, tf.errors.OpError) as error:
                self._dropped += 1
                self._first_failure = self._first_failure or error
        return cohort


def _in_full(events: Sequence[Event]) -> tuple[Event, ...]:
    """The same releases, whose members may have been in this pass before.

    In passes over the clients only the first round adds a participation, since nobody is in a pass twice.
    """
    return tuple(dataclasses.replace(event, participations=event.count) for event in events)


def releases(book: Ledger) -> tuple[int, int]:
    """Releases so far: of clients' own noise, and others."""
    events = book.events()
    local = sum(event.count for event in events if event.is_local)
    return local, sum(event.count for event in events) - local
