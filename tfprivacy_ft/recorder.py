"""Between one optimizer's step counter and the ledger: reserves steps before they run, settles what ran.

Every step of a run passes here, whether `fit`, `train_on_batch` or a resumed program made it. A step whose batch nobody
vouches for is recorded as one that saw every example.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

from tfprivacy_ft import accounting
from tfprivacy_ft.errors import BudgetExceededError
from tfprivacy_ft.events import Event
from tfprivacy_ft.guard import StepGuard
from tfprivacy_ft.ledger import Ledger
from tfprivacy_ft.sampling import UNKNOWN, Sampling

_BLOCK_SECONDS = 1.0  # a crash over-counts by about this much work
_FIRST_BLOCK = 16
_LARGEST_BLOCK = 10_000


class Recorder:
    """Keeps the ledger of one optimizer's private steps.

    Args:
      guard: the optimizer's step counter.
      ledger: gives the ledger to write; asked each time, since a run may move from memory to a folder.
      event: makes the event of some steps under some sampling.
      target_epsilon: a step that would pass it does not run; None for no limit.
      delta: the delta of that target.
      steps_per_block: steps reserved at once; None for about a second of work.
    """

    def __init__(
        self,
        guard: StepGuard,
        ledger: Callable[[], Ledger],
        event: Callable[[Sampling, int], Event],
        *,
        target_epsilon: float | None,
        delta: float,
        steps_per_block: int | None = None,
    ):
        self._guard, self._ledger, self._event = guard, ledger, event
        self._target, self._delta = target_epsilon, delta
        self._steps_per_block = steps_per_block
        self._sampling = UNKNOWN
        self._open: list[int] = []  # reservations that are not settled
        self._started = self._limit = guard.done  # the steps that they cover
        self._last_block: tuple[float, int] | None = None
        self.refuses_quietly = False  # what happens beyond the budget: steps without effect, or an error
        guard.attach(self.reserve_from)

    @property
    def steps_left(self) -> int:
        """Reserved steps that have not run."""
        return self._limit - self._guard.done

    def use(self, sampling: Sampling) -> None:
        """From the next step on batches are drawn like this; what was reserved before is settled."""
        self.settle()
        self._sampling = sampling

    def settle(self) -> None:
        """Replaces what was reserved by what ran."""
        done = self._guard.done
        if self._open:
            ran = done - self._started
            self._ledger().settle(self._open, self._event(self._sampling, ran) if ran else None)
        self._open, self._last_block = [], None
        self._started = self._limit = done
        self._guard.allow_until(done)

    def reserve(self, at_least: int = 1) -> bool:
        """Sees that the next `at_least` steps are reserved; False if the budget does not allow even one."""
        if self.steps_left < at_least:
            self._guard.allow_until(self.reserve_from(self._guard.done, at_least))
        return self.steps_left > 0

    def reserve_from(self, done: int, at_least: int = 1) -> int:
        """Reserves the next block of steps, or what the budget has left of it.

        Args:
          done: the steps that ran.
          at_least: the fewest steps to reserve, budget allowing.

        Returns:
          The new number of steps up to which running is allowed.

        Raises:
          BudgetExceededError: not one more step fits, and it was not asked to refuse quietly.
          LedgerError: the reservation could not be written.
        """
        steps = min(max(self._block(done), at_least), self._room())
        if steps <= 0:
            if self.refuses_quietly:
                return self._limit
            raise BudgetExceededError(
                f"epsilon {self._target} at delta {self._delta} leaves no room for a step with {self._sampling.sampler} "
                f"batches after {done} steps: nothing was released; stop here, or plan for a larger epsilon."
            )
        reservation = self._ledger().reserve(self._event(self._sampling, steps))
        if not self._open:
            self._started = self._limit = done
        self._open.append(reservation)
        self._limit += steps
        return self._limit

    def _block(self, done: int) -> int:
        """Steps for about a second, measured from the last block; a whole pass where batches are shuffled."""
        if self._sampling.pass_length:
            return self._sampling.pass_length
        if self._steps_per_block:
            return self._steps_per_block
        now, last = time.monotonic(), self._last_block
        self._last_block = (now, done)
        if last is None or now <= last[0]:
            return _FIRST_BLOCK
        return int(min(max((done - last[1]) / (now - last[0]) * _BLOCK_SECONDS, 1), _LARGEST_BLOCK))

    def _room(self) -> int:
        """Steps that fit into the target on top of everything reserved or released so far."""
        if self._target is None:
            return _LARGEST_BLOCK
        length = self._sampling.pass_length or 1
        one = self._event(self._sampling, length)
        kind = _kind(one)
        # What was spent under another relation is reported beside this, never added.
        spent = [e for e in self._ledger().events() if (e.unit, e.relation) == (one.unit, one.relation)]
        alike = sum(e.participations for e in spent if _kind(e) == kind)
        others = tuple(e for e in spent if _kind(e) != kind)
        return _most_steps(one, others, self._target, self._delta) - alike * length


def _kind(event: Event) -> Event:
    return dataclasses.replace(event, count=0, participations=0)


@functools.lru_cache(maxsize=64)
def _most_steps(event: Event, spent: tuple[Event, ...], target_epsilon: float, delta: float) -> int:
    """Steps like `event` that fit into the target after `spent`; 0 where the target was passed already."""
    try:
        return accounting.solve_steps(target_epsilon=target_epsilon, delta=delta, event=event, spent=spent)
    except BudgetExceededError:
        return 0
