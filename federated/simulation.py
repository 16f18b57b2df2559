"""Runs federated averaging on this machine, and accounts for it.

Promises: every round is in the ledger before it runs, with the noise, clip and sampling that the process and the
cohorts themselves state; neither a cohort nor its size is shown or kept; an empty cohort is a round of noise alone,
which counts. A run that is cut short and goes on from a checkpoint counts every round that ran, also those that it
runs again. Knows nothing of how a round is computed.
"""

import dataclasses
import functools
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from federated import cohorts as cohorts_module
from federated import runtime
from federated._budget import Budget
from federated._looks import Evaluate, evaluator, releaser
from federated._progress import progress_bar
from federated._run import Run, releases
from federated.checkpoints import FOLDER_NAME, Checkpoints
from federated.clients import ClientData
from federated.cohorts import Cohorts
from federated.process import AveragingProcess
from tfprivacy_ft import _check, accounting
from tfprivacy_ft.compute_epsilon import Report, compute_epsilon
from tfprivacy_ft.errors import BudgetExceededError, DatasetError, InvalidArgumentError
from tfprivacy_ft.ledger import EVALUATION, Ledger

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["SimulationResult", "simulate"]

_DEFAULT_LOOKS = 20

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SimulationResult:
    """What a simulation ends with.

    Args:
        process: The process that ran.
        state: Its last state, to go on from: `simulate(process, ..., state=result.state)`.
        history: One dictionary per look at the run: `round` (of this call, from 1; with checkpoints, of the whole run),
            `epsilon` (of the whole ledger up to there, for one client), the `clip` where it moves, and the figures of
            `evaluate`.
        report: The privacy spent, by the ledger; `print(result.report)`.
    """

    process: AveragingProcess
    state: Any
    history: list[dict[str, float]]
    report: Report

    @property
    def epsilon(self) -> float:
        """Epsilon of one client by the ledger, at the report's delta; the largest, where the report has several."""
        return max((account.epsilon for account in self.report.accounts if account.unit == "client"), default=0.0)

    @property
    def weights(self) -> Any:
        """The model's weights, a `tff.learning.models.ModelWeights`."""
        return self.process.get_model_weights(self.state)  # type: ignore[attr-defined]

    def model(self) -> "tf.keras.Model":
        """A fresh Keras model with the trained weights; it knows nothing of TFF and saves as any other."""
        return self.process.model(self.state)


def simulate(
    process: AveragingProcess,
    clients: ClientData | Sequence[Any],
    *,
    rounds: int,
    delta: float,
    cohorts: str | Cohorts = "poisson",
    clients_per_round: float | None = None,
    target_epsilon: float | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    state: Any = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    release_managers: Sequence[Any] = (),
    progress: bool = True,
) -> SimulationResult:
    """Runs rounds of federated averaging.

    Guarantees: each round is written to the ledger, durably if there is a `run_dir`, before any client is looked at. A
    run that is cut short has counted at least what it released. Ctrl-C ends the round, the worker and the ledger.

    A client whose data cannot be read (`OSError` or `tf.errors.OpError`) drops out of the round, which goes on and counts
    as before; a warning at the end says how often that happened. A round whose worker is lost is counted once more and
    run again, at most three times.

    Args:
        process: From `build_averaging`.
        clients: `ClientData`, or a list with one entry per client: a pair of arrays (x, y), or a `tf.data.Dataset` of
            batches.
        rounds: >= 1. With `checkpoint_every`, those of the whole run, however often it is cut short and goes on; else those
            of this call.
        delta: Of the epsilon reported, in (0, 1), well below 1 / len(clients).
        cohorts: How the clients of a round are chosen: `"poisson"`, `"fixed"` or `"cyclic"`, or a `Cohorts` object over these
            clients. The ledger holds it, and epsilon goes with it.
        clients_per_round: Expected size of a cohort. The process knows it; any other number is refused.
        target_epsilon: The budget of one client, > 0, for the whole ledger, also one that is continued: the round that would
            pass it does not run, and the state is that of the last one that may; a warning is logged. Where clients add
            noise, too, both figures are to be within it. None for no limit.
        run_dir: Folder of the run's ledger, continued if there is one, and of `history.csv`, which gets a line at each look;
            None keeps the ledger in memory.
        checkpoint_every: Rounds between two checkpoints in `run_dir`, >= 1; the last round has one, too. If there are any, the
            run goes on from the newest, which a warning says; rounds that ran since count, and again when they are run again.
            None saves nothing and goes on from nothing.
        state: A state to start from; None starts from the initial weights of the model. A checkpoint takes its place.
        evaluate: Examples and labels held out, (x, y), or a function from a Keras model to a dictionary of figures. If
            they come from private data, the figures are releases without noise; the report says so.
        evaluate_every: Rounds between two looks (evaluation, and an entry of the history), >= 1; by default about
            20 looks in all. The last round is always looked at.
        release_managers: `tff.program.ReleaseManager` objects, such as `tff.program.TensorBoardReleaseManager("logs")`, that
            get epsilon and the figures of `evaluate` at each look, with the round as the key.
        progress: Whether to show a progress bar.

    Returns:
        A `SimulationResult`.

    Raises:
        InvalidArgumentError: An argument is outside its range, or contradicts the process.
        DatasetError: There are no clients, or a client's data do not fit the model.
        BudgetExceededError: The target leaves no room for a single round.
        CheckpointError: The checkpoints in `run_dir` are of another run, or cannot be read or written.
        LedgerDamagedError: The ledger does not hold what a checkpoint was made of.
        LedgerError: The ledger could not be written; the round that it was for did not run.
        WorkerLostError: The worker was lost four times in one round.
    """
    if not isinstance(process, AveragingProcess):
        raise InvalidArgumentError(
            f"process is a {type(process).__name__}: give what federated.build_averaging returned, which knows its own "
            "noise and clip."
        )
    _check.positive_integer(rounds=rounds)
    every = math.ceil(rounds / _DEFAULT_LOOKS) if evaluate_every is None else evaluate_every
    _check.positive_integer(evaluate_every=every)
    _check_clients(clients)
    _check_cohort_size(process, clients_per_round)
    accounting.check_delta(delta, len(clients))
    if target_epsilon is not None:
        _check.positive(target_epsilon=target_epsilon)
    drawn = _cohorts(cohorts, len(clients), process)
    figures = evaluator(evaluate, process)
    release = releaser(run_dir, release_managers)
    facts = {
        "algorithm": "federated averaging",
        "num_clients": len(clients),
        "cohorts": drawn.name,
        **dataclasses.asdict(process.facts),
    }
    checkpoints = None
    if checkpoint_every is not None:
        _check.positive_integer(checkpoint_every=checkpoint_every)
        if run_dir is None:
            raise InvalidArgumentError(f"checkpoint_every={checkpoint_every} needs a folder: give run_dir, too.")
        state = process.initialize() if state is None else state  # type: ignore[attr-defined]
        checkpoints = Checkpoints(
            pathlib.Path(run_dir) / FOLDER_NAME, settings={**facts, "loss": process.loss_name}, like=state
        )
    make = Ledger.in_memory if run_dir is None else functools.partial(Ledger.open, run_dir)
    with make(delta=delta, facts={**facts, "target_epsilon": target_epsilon}) as book, _ending_worker_on_interrupt():
        if figures is not None:
            book.note(EVALUATION.kind, EVALUATION.text)  # ahead of the first look
        for kind, text in process.notes.items():
            book.note(kind, text)
        if checkpoints is None:
            state = process.initialize() if state is None else state  # type: ignore[attr-defined]
        _say_what_is_missing(state, book)
        run = Run(process, clients, drawn, state, book, Budget(book, target_epsilon, delta))
        if checkpoints is not None and run_dir is not None:
            run.go_on_from(checkpoints.newest(), run_dir)

        def look() -> None:
            run.settle()
            found = figures(run.state) if figures is not None else {}
            if found:
                book.figures(found)
            entry = {"round": run.done, "epsilon": run.epsilon(delta), **process.measurements(run.state), **found}
            run.history.append(entry)
            release(run.history[-1])

        def save() -> None:
            if checkpoints is not None:
                checkpoints.save(run.checkpoint())

        with progress_bar(rounds, done=run.done, visible=progress) as show:
            while run.done < rounds and run.next_round(rounds):
                if run.done % every == 0 or run.done == rounds:
                    look()
                if run.done == rounds or (checkpoint_every and run.done % checkpoint_every == 0):
                    save()
                show(run.done, run.history)
        if not run.done:
            raise BudgetExceededError(
                f"the ledger holds epsilon {run.epsilon(delta):.4g} at delta {delta}, and the target {target_epsilon} "
                "leaves no room for a round: stop here, allow a larger epsilon, or start a run in another folder."
            )
        if not run.history or run.history[-1]["round"] < run.done:  # the budget has ended it between two looks
            look()
            save()
        if run.done < rounds:
            _log.warning(
                "training stopped after round %d of %d: epsilon %.4g is spent, and the target %s leaves no room for another "
                "round.", run.done, rounds, run.epsilon(delta), target_epsilon,
            )  # fmt: skip
        run.say_who_dropped_out()
        report = compute_epsilon(book, delta=delta)
    return SimulationResult(process=process, state=run.state, history=run.history, report=report)


def _say_what_is_missing(state: Any, book: Ledger) -> None:
    """A state that went through rounds elsewhere has spent what this ledger does not hold."""
    earlier = int(getattr(state, "round_number", 0))  # what is no state, the first round refuses by name
    if earlier > max(releases(book)):
        text = f"the run began with a state that {earlier} earlier rounds had trained, which its ledger does not hold."
        book.note("earlier rounds", text)
        _log.warning("%s Give the run_dir of those rounds, or add up both reports.", text)


def _cohorts(given: str | Cohorts, num_clients: int, process: AveragingProcess) -> Cohorts:
    expected = process.facts.expected_clients_per_round
    if isinstance(given, str):
        return cohorts_module.make(given, num_clients, expected)
    if not isinstance(given, Cohorts):
        raise InvalidArgumentError(
            f"cohorts is a {type(given).__name__}: give 'poisson', 'fixed' or 'cyclic', or a Cohorts object over these "
            "clients."
        )
    if (given.num_clients, given.clients_per_round) != (num_clients, expected):
        raise InvalidArgumentError(
            f"cohorts are of {given.clients_per_round} among {given.num_clients} clients, where there are {num_clients} "
            f"clients and the process has expected_clients_per_round={expected}: give cohorts of these."
        )
    return given


def _check_clients(clients: Any) -> None:
    if isinstance(clients, str) or not (hasattr(clients, "__len__") and hasattr(clients, "__getitem__")):
        raise InvalidArgumentError(
            f"clients is a {type(clients).__name__}: give ClientData, as from federated.split_by_owner, or a list with "
            "one entry per client."
        )
    if not len(clients):
        raise DatasetError("no clients were given: give at least one.")


def _check_cohort_size(process: AveragingProcess, clients_per_round: float | None) -> None:
    expected = process.facts.expected_clients_per_round
    if clients_per_round is not None and clients_per_round != expected:
        raise InvalidArgumentError(
            f"clients_per_round={clients_per_round} is not the process's expected_clients_per_round={expected}, which "
            "its noise and its epsilon go with: leave it out, or build another process."
        )


@contextmanager
def _ending_worker_on_interrupt() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        runtime.stop_worker()  # or it would go on with a round that nobody waits for
        raise
