"""Between one optimizer's step counter and the ledger: reserves steps before they run, settles what ran.

Every step of a run passes here, whether `fit`, `train_on_batch` or a resumed program made it. A step whose batch nobody
vouches for is recorded as one that saw every example.
"""

import threading
import time
import warnings
from collections.abc import Callable

from tfprivacy_ft import accounting
from tfprivacy_ft.accumulation import Accumulator
from tfprivacy_ft.errors import BudgetExceededError
from tfprivacy_ft.events import Event
from tfprivacy_ft.guard import StepGuard
from tfprivacy_ft.ledger import Ledger, Trained
from tfprivacy_ft.sampling import UNKNOWN, Sampling

_BLOCK_SECONDS = 1.0  # a crash over-counts by about this much work
_FIRST_BLOCK = 16
_LARGEST_BLOCK = 10_000


class Recorder:
    """Keeps the ledger of one optimizer's private steps.

    While `fit` runs, its callback vouches for the batches: it says before each execution that it comes, only that many
    steps are let through, and what the execution did not use is taken back when it ends. (One that is interrupted before
    it begins leaves at most its own steps open to what follows.) A step that nobody announced, in `train_on_batch`, in a
    loop of one's own, or after a `fit` that broke off, is reserved from inside the graph, as one on an unknown batch.

    Args:
      guard: the optimizer's step counter.
      ledger: gives the ledger to write; asked each time, since a run may move from memory to a folder.
      event: makes the event of some steps under some sampling.
      target_epsilon: a step that would pass it does not run; None for no limit.
      delta: the delta of that target.
      steps_per_block: steps reserved at once; None for about a second of work.
      accumulator: what adds up the micro-batches of a step, if there are several.
      trained: says what the steps train; None until they have been traced.
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
        accumulator: Accumulator | None = None,
        trained: Callable[[], Trained | None] = lambda: None,
    ):
        self._guard, self._ledger, self._event = guard, ledger, event
        self._target, self._delta = target_epsilon, delta
        self._steps_per_block, self._trained = steps_per_block, trained
        self._sampling = UNKNOWN
        self._open: list[int] = []  # reservations that are not settled
        # Step counts: where those reservations begin, up to where they reach, up to where steps are let through.
        self._started = self._reserved = self._allowed = guard.done
        self._last_block: tuple[float, int] | None = None
        self._out_of_budget = self._stopped_by_budget = False
        self._running: int | None = None  # the thread whose announced execution has not ended
        self._lock = threading.RLock()
        self._accumulator = accumulator
        if accumulator is not None:
            accumulator.attach()
        guard.attach(self._unannounced)

    def use(self, sampling: Sampling) -> None:
        """From the next step on batches are drawn like this; what was reserved before is settled.

        Raises:
          BudgetExceededError: the budget has no room for a single such step.
        """
        self._running = None  # a new fit, or the end of one
        self.start_pass()
        self.settle()
        self._sampling = sampling
        if sampling != UNKNOWN:
            try:
                self._reserve(1)
            except BaseException:
                self._sampling = UNKNOWN
                raise

    def start_pass(self) -> None:
        """The next batch is the first of a pass over the data; what is left of a logical batch is dropped."""
        if self._accumulator is not None:
            self._accumulator.finished()
            self._accumulator.start_pass()

    def announce(self, batches: int) -> None:
        """Lets the steps of the next `batches` batches through, or as many of them as the budget allows."""
        with self._lock:
            steps = batches if self._accumulator is None else self._accumulator.announce(batches)
            missing = self._allowed + steps - self._reserved
            if missing > 0 and self._room() > 0:
                self._reserve(missing)
            wanted = self._allowed + steps
            self._allowed = min(wanted, self._reserved)
            # What the budget does not allow of an execution changes nothing, and is no reason to break off.
            self._out_of_budget = self._stopped_by_budget = self._allowed < wanted
            self._guard.allow_until(self._allowed)
            self._record_trained()
            self._running = threading.get_ident()

    def finished(self) -> bool:
        """Takes back what the announced execution did not use; whether the budget allows another step."""
        with self._lock:
            self._running = None
            if self._accumulator is not None:
                self._accumulator.finished()
            done = self._guard.done
            if done != self._allowed:  # else the limit is where it has to be
                self._allowed = done
                self._guard.allow_until(done)
            self._out_of_budget = self._allowed >= self._reserved and self._room() <= 0
            return not self._out_of_budget

    @property
    def running(self) -> bool:
        """Whether an announced execution has not ended, as far as the callback has seen."""
        return self._running is not None

    def settle(self) -> None:
        """Replaces what was reserved by what ran.

        While an announced execution runs (another thread asks for a report), reservations stay open, and count in full.
        """
        with self._lock:
            if self._running not in (None, threading.get_ident()):
                return
            done = self._guard.done
            ran = done - self._started
            if ran > 0:
                self._record_trained()
            if self._open:
                self._ledger().settle(self._open, self._event(self._sampling, ran) if ran else None)
            elif ran > 0:  # steps that were under way when their reservation was settled
                late = self._event(UNKNOWN, ran)
                self._ledger().settle([self._ledger().reserve(late)], late)
            self._open, self._last_block, self._out_of_budget = [], None, False
            self._started = self._reserved = self._allowed = done
            self._guard.allow_until(done)
            self._warn_of_refused()

    def _record_trained(self) -> None:
        trained = self._trained()
        if trained is not None:
            self._ledger().trained(trained)

    def _warn_of_refused(self) -> None:
        refused = self._guard.take_refused()
        if refused and not self._stopped_by_budget:
            warnings.warn(
                f"{refused} steps changed nothing, because they were not reserved: with jit_compile=True train by model.fit "
                "with plan.callbacks().",
                stacklevel=4,
            )
        self._stopped_by_budget = False

    def _unannounced(self, done: int) -> int:
        """Called from the graph before a step that was not let through: the steps to let through, unknown batches all.

        Raises:
          BudgetExceededError: not one such step fits into the budget.
          LedgerError: the reservation could not be written.
        """
        if self._out_of_budget:
            self._stopped_by_budget = True
            return done  # `fit` has been told to stop, and the rest of its execution changes nothing
        with self._lock:
            self._running = None
            self.settle()
            self._sampling = UNKNOWN
            self._reserve(1)
            self._allowed = self._reserved
            return self._allowed

    def _reserve(self, at_least: int) -> None:
        """Writes the next block of steps to the ledger, or what the budget has left of it."""
        steps = min(max(self._block(), at_least), self._room())
        if steps <= 0:
            spent = max((a.epsilon for a in accounting.accounts(self._ledger().events(), self._delta)), default=0.0)
            raise BudgetExceededError(
                f"the ledger holds epsilon {spent:.4g} at delta {self._delta}, and the target {self._target} leaves no room "
                f"for a step with {self._sampling.sampler} batches: stop here, plan for a larger epsilon, or start a run "
                "in another folder."
            )
        self._open.append(self._ledger().reserve(self._event(self._sampling, steps)))
        self._reserved += steps

    def _block(self) -> int:
        """Steps for about a second, measured from the last block; a whole pass where batches are shuffled."""
        if self._sampling.pass_length:
            return self._sampling.pass_length
        if self._steps_per_block:
            return self._steps_per_block
        now, last = time.monotonic(), self._last_block
        self._last_block = (now, self._reserved)
        if last is None or now <= last[0]:
            return _FIRST_BLOCK
        return int(min(max((self._reserved - last[1]) / (now - last[0]) * _BLOCK_SECONDS, 1), _LARGEST_BLOCK))

    def _room(self) -> int:
        """Steps that fit into the target on top of everything reserved or released so far."""
        if self._target is None:
            return _LARGEST_BLOCK
        one = self._event(self._sampling, self._sampling.pass_length or 1)
        spent = self._ledger().events()
        return accounting.releases_left(one, spent=spent, target_epsilon=self._target, delta=self._delta)
