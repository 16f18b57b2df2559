"""Runs federated averaging on this machine, and accounts for it.

Promises: every round is in the ledger before it runs, with the noise, clip and sampling that the process itself
states; cohorts are Poisson samples, and neither a cohort nor its size is shown or kept; an empty cohort is a round of
noise alone, which counts. Knows nothing of how a round is computed.
"""

import dataclasses
import functools
import importlib.util
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from federated import runtime
from federated.averaging import AveragingProcess
from federated.clients import ClientData, poisson_cohort, sampling_probability
from tfprivacy_ft import _check, accounting
from tfprivacy_ft.compute_epsilon import Report, compute_epsilon
from tfprivacy_ft.errors import BudgetExceededError, DatasetError, InvalidArgumentError
from tfprivacy_ft.events import Event
from tfprivacy_ft.ledger import EVALUATION, Ledger

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["SimulationResult", "simulate"]

Evaluate = Callable[["tf.keras.Model"], Mapping[str, float]] | tuple[Any, Any]
_DEFAULT_LOOKS = 20

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SimulationResult:
    """What a simulation ends with.

    Args:
        process: The process that ran.
        state: Its last state, to go on from: `simulate(process, ..., state=result.state)`.
        history: One dictionary per look at the run: `round` (of this call, from 1), `epsilon` (of the whole ledger up
            to there, for one client) and the figures of `evaluate`.
        report: The privacy spent, by the ledger; `print(result.report)`.
    """

    process: AveragingProcess
    state: Any
    history: list[dict[str, float]]
    report: Report

    @property
    def epsilon(self) -> float:
        """Epsilon of one client by the ledger, at the report's delta."""
        return self.report.epsilon

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
    clients_per_round: float | None = None,
    target_epsilon: float | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    state: Any = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    progress: bool = True,
) -> SimulationResult:
    """Runs rounds of federated averaging over Poisson cohorts.

    Guarantees: each round is written to the ledger, durably if there is a `run_dir`, before any client is looked at. A
    run that is cut short has counted at least what it released. Ctrl-C ends the round, the worker and the ledger.

    Args:
        process: From `build_averaging`.
        clients: `ClientData`, or a list with one entry per client: a pair of arrays (x, y), or a `tf.data.Dataset` of
            batches.
        rounds: >= 1.
        delta: Of the epsilon reported, in (0, 1), well below 1 / len(clients).
        clients_per_round: Expected size of a cohort. The process knows it; any other number is refused.
        target_epsilon: The budget of one client, > 0, for the whole ledger, also one that is continued: the round that would
            pass it does not run, and the state is that of the last one that may; a warning is logged. None for no limit.
        run_dir: Folder of the run's ledger, continued if there is one; None keeps the ledger in memory.
        state: A state to go on from; None starts from the initial weights of the model.
        evaluate: Examples and labels held out, (x, y), or a function from a Keras model to a dictionary of figures. If
            they come from private data, the figures are releases without noise; the report says so.
        evaluate_every: Rounds between two looks (evaluation, and an entry of the history), >= 1; by default about
            20 looks in all. The last round is always looked at.
        progress: Whether to show a progress bar.

    Returns:
        A `SimulationResult`.

    Raises:
        InvalidArgumentError: An argument is outside its range, or contradicts the process.
        DatasetError: There are no clients, or a client's data do not fit the model.
        BudgetExceededError: The target leaves no room for a single round.
        LedgerError: The ledger could not be written; the round that it was for did not run.
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
    _check_cohort(process, clients_per_round)
    accounting.check_delta(delta, len(clients))
    if target_epsilon is not None:
        _check.positive(target_epsilon=target_epsilon)
    event = process.event(len(clients))
    look = _evaluator(evaluate, process)
    q = sampling_probability(len(clients), process.facts.expected_clients_per_round)
    rng = np.random.default_rng(secrets.randbits(256))
    history: list[dict[str, float]] = []
    facts = {
        "algorithm": "federated averaging",
        "num_clients": len(clients),
        "target_epsilon": target_epsilon,
        **dataclasses.asdict(process.facts),
    }
    make = Ledger.in_memory if run_dir is None else functools.partial(Ledger.open, run_dir)
    with make(delta=delta, facts=facts) as ledger, _ending_worker_on_interrupt():
        allowed = _allowed_rounds(rounds, event, ledger, target_epsilon, delta)
        if look is not None:
            ledger.note(EVALUATION.kind, EVALUATION.text)  # ahead of the first look
        state = process.initialize() if state is None else state  # type: ignore[attr-defined]
        with _bar(allowed, progress) as show:
            reserved: list[int] = []
            for number in range(1, allowed + 1):
                reserved.append(ledger.reserve(event))
                cohort = [clients[int(i)] for i in poisson_cohort(len(clients), q, rng)]
                state = process.next(state, cohort).state  # type: ignore[attr-defined]
                if number % every == 0 or number == allowed:
                    # A reservation counts in full until it is settled, so many can be settled together.
                    ledger.settle(reserved, event.with_count(len(reserved)))
                    reserved.clear()
                    figures = look(state) if look is not None else {}
                    if figures:
                        ledger.figures(figures)
                    history.append({"round": number, "epsilon": _client_epsilon(ledger, delta), **figures})
                show(number, history)
        if allowed < rounds:
            _log.warning(
                "training stopped after round %d of %d: epsilon %.4g is spent, and the target %s leaves no room for another "
                "round.", allowed, rounds, _client_epsilon(ledger, delta), target_epsilon,
            )  # fmt: skip
        report = compute_epsilon(ledger, delta=delta)
    return SimulationResult(process=process, state=state, history=history, report=report)


def _allowed_rounds(rounds: int, event: Event, ledger: Ledger, target_epsilon: float | None, delta: float) -> int:
    """How many of these rounds the budget allows, on top of what the ledger holds."""
    if target_epsilon is None:
        return rounds
    left = accounting.releases_left(event, spent=ledger.events(), target_epsilon=target_epsilon, delta=delta)
    if left == 0:
        raise BudgetExceededError(
            f"the ledger holds epsilon {_client_epsilon(ledger, delta):.4g} at delta {delta}, and the target {target_epsilon} "
            "leaves no room for a round: stop here, allow a larger epsilon, or start a run in another folder."
        )
    return min(rounds, left)


def _check_clients(clients: Any) -> None:
    if isinstance(clients, str) or not (hasattr(clients, "__len__") and hasattr(clients, "__getitem__")):
        raise InvalidArgumentError(
            f"clients is a {type(clients).__name__}: give ClientData, as from federated.split_by_owner, or a list with "
            "one entry per client."
        )
    if not len(clients):
        raise DatasetError("no clients were given: give at least one.")


def _check_cohort(process: AveragingProcess, clients_per_round: float | None) -> None:
    expected = process.facts.expected_clients_per_round
    if clients_per_round is not None and clients_per_round != expected:
        raise InvalidArgumentError(
            f"clients_per_round={clients_per_round} is not the process's expected_clients_per_round={expected}, which "
            "its noise and its epsilon go with: leave it out, or build another process."
        )


def _evaluator(evaluate: Evaluate | None, process: AveragingProcess) -> Callable[[Any], Mapping[str, float]] | None:
    if evaluate is None:
        return None
    model = process.model(None)
    if isinstance(evaluate, tuple) and len(evaluate) == 2:
        x, y = evaluate
        model.compile(loss=process.loss, metrics=["accuracy"] if "crossentropy" in process.loss_name else [])

        def on_held_out(model: "tf.keras.Model") -> Mapping[str, float]:
            return model.evaluate(x, y, verbose=0, batch_size=256, return_dict=True)

        figures: Callable[[tf.keras.Model], Mapping[str, float]] = on_held_out
    elif callable(evaluate):
        figures = evaluate
    else:
        raise InvalidArgumentError(
            f"evaluate is a {type(evaluate).__name__}: give (x, y), or a function from a Keras model to a dictionary."
        )

    def look(state: Any) -> Mapping[str, float]:
        process.assign(state, model)
        found = figures(model)
        if not isinstance(found, Mapping):
            raise InvalidArgumentError(
                f"evaluate returned a {type(found).__name__}: return a dictionary of figures, like {{'accuracy': 0.9}}."
            )
        return {name: float(value) for name, value in found.items()}

    return look


def _client_epsilon(ledger: Ledger, delta: float) -> float:
    """Epsilon of one client; what the ledger holds for other units is in the report, side by side."""
    own = [event for event in ledger.events() if event.unit == "client"]
    return max((account.epsilon for account in accounting.accounts(own, delta)), default=0.0)


@contextmanager
def _ending_worker_on_interrupt() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        runtime.stop_worker()  # or it would go on with a round that nobody waits for
        raise


@contextmanager
def _bar(rounds: int, visible: bool) -> Iterator[Callable[[int, list[dict[str, float]]], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    # In a notebook without ipywidgets rich warns and shows nothing; drawn as in a terminal, the line works there too.
    console = Console(force_jupyter=None if importlib.util.find_spec("ipywidgets") else False)
    with Progress(*columns, console=console, disable=not visible) as progress:
        task = progress.add_task("", total=rounds)

        def show(done: int, history: list[dict[str, float]]) -> None:
            figures = {name: value for name, value in (history[-1] if history else {}).items() if name != "round"}
            text = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
            progress.update(task, completed=done, description=text)

        yield show
