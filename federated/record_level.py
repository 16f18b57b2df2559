"""Federated averaging that protects single records: DP-SGD inside each client, for few clients that hold many.

Promises: in each local step a client takes each of its records independently with probability
`expected_batch_size / (number of its records)`; one record moves the sum of the step by at most `l2_norm_clip`; Gaussian
noise of standard deviation `l2_norm_clip * noise_multiplier` is added to that sum, from a key that the operating system
makes for this step alone; the mean divides by the constant `expected_batch_size`. So all that leaves a client is private,
whoever sees it, the server too. Records of different clients are different records: each is protected by the ledger of
its own client. Knows nothing of clients that come and go: all take part in every round.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from federated import aggregation, averaging, client_work, packing, runtime
from federated._looks import as_figures
from federated.clients import ClientData
from federated.process import AveragingProcess, check_state
from federated.stateless import stateless_model
from federated.tff_engine import in_worker
from tfprivacy_ft import _check, accounting
from tfprivacy_ft.compute_epsilon import Report, compute_epsilon
from tfprivacy_ft.errors import BudgetExceededError, DatasetError, InvalidArgumentError
from tfprivacy_ft.events import Event
from tfprivacy_ft.ledger import EVALUATION, Ledger

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = [
    "RecordLevelFacts",
    "RecordLevelProcess",
    "RecordLevelResult",
    "build_record_level_averaging",
    "simulate_records",
    "solve_noise_multipliers",
]

Clients = Mapping[str, tuple[Any, Any]] | ClientData
Evaluate = Callable[["tf.keras.Model"], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class RecordLevelFacts:
    """What a process promises of each round of each client; all of it public.

    Args:
        l2_norm_clip: Largest norm of what one record adds to a step, over all variables together.
        noise_multiplier: Standard deviation of the noise on the sum, divided by the clip; one for each client, or one
            for all of them.
        expected_batch_size: The constant denominator, the expected size of a Poisson batch.
        local_steps: Steps of each client in one round.
        client_learning_rate, server_learning_rate: Of the two optimizers.
    """

    l2_norm_clip: float
    noise_multiplier: float | tuple[float, ...]
    expected_batch_size: float
    local_steps: int
    client_learning_rate: float
    server_learning_rate: float

    def __post_init__(self) -> None:
        _check.positive(
            l2_norm_clip=self.l2_norm_clip,
            expected_batch_size=self.expected_batch_size,
            client_learning_rate=self.client_learning_rate,
            server_learning_rate=self.server_learning_rate,
        )
        _check.positive_integer(local_steps=self.local_steps)
        each = self.noise_multiplier if isinstance(self.noise_multiplier, tuple) else (self.noise_multiplier,)
        for noise_multiplier in each:
            _check.non_negative(noise_multiplier=noise_multiplier)

    def noise_multipliers(self, num_clients: int) -> tuple[float, ...]:
        """One for each of the clients.

        Raises:
            InvalidArgumentError: The process has noise for another number of clients.
        """
        if not isinstance(self.noise_multiplier, tuple):
            return (self.noise_multiplier,) * num_clients
        if len(self.noise_multiplier) != num_clients:
            raise InvalidArgumentError(
                f"{num_clients} clients were given to a process with {len(self.noise_multiplier)} noise multipliers: give "
                "the clients that these were solved for, in their order."
            )
        return self.noise_multiplier


class RecordLevelProcess:
    """What `build_record_level_averaging` returns, besides being a `tff.learning.templates.LearningProcess`.

    `next(state, client_data)` takes one pair of arrays (x, y) for each client, always the same clients in the same order.
    Batches and noise are drawn anew in each call, by the operating system. Unlike `simulate_records`, it writes no ledger.
    """

    facts: RecordLevelFacts
    _build: Callable[[], "tf.keras.Model"]

    def event(self, num_records: int, client: int = 0) -> Event:
        """One round of one client, as the ledger records it.

        Args:
            num_records: Records of this client, at least `expected_batch_size`; taken to be public.
            client: Its number, where each has noise of its own.

        Raises:
            InvalidArgumentError: The client has too few records.
        """
        each = self.facts.noise_multiplier
        return Event.poisson(
            count=self.facts.local_steps,
            unit="example",
            noise_multiplier=each[client] if isinstance(each, tuple) else each,
            sampling_probability=_sampling_probability(num_records, self.facts.expected_batch_size),
            population=num_records,
            l2_norm_clip=self.facts.l2_norm_clip,
        )

    # A state holds a model's weights in the same way, whoever is protected.
    assign: Any = AveragingProcess.assign
    model: Any = AveragingProcess.model
    start_from: Any = AveragingProcess.start_from


def build_record_level_averaging(
    model: Callable[[], "tf.keras.Model"],
    *,
    loss: Any = "sparse_categorical_crossentropy",
    l2_norm_clip: float,
    noise_multiplier: float | Sequence[float],
    expected_batch_size: float,
    local_steps: int,
    client_learning_rate: float,
    server_learning_rate: float = 1.0,
    example_spec: tuple["tf.TensorSpec", "tf.TensorSpec"] | None = None,
) -> Any:
    """Builds federated averaging in which each client trains by DP-SGD on its own records.

    Each round, each client takes `local_steps` private steps from the server's weights; the server moves its weights to the
    plain mean of the clients', or by another share of the way.

    Guarantees: a local step is the Gaussian mechanism with the client's noise multiplier and unit of privacy one record,
    Poisson-sampled. What a client sends is made of these steps, so that the guarantee holds against the server as well. A
    record that gives no finite gradient adds zero; an empty batch is a step of noise alone, and counts.

    Args:
        model: Called without arguments, returns a new Keras model of the same architecture at each call, with one
            input: `lambda: models.build_model("mlp", (20,), 2)`.
        loss: Any Keras loss: a name, a function, or a `tf.keras.losses.Loss`; weight regularisers are added, outside
            of the clip.
        l2_norm_clip: Largest L2 norm of what one record adds to a step, over all variables together, > 0.
        noise_multiplier: Standard deviation of the noise on the sum, divided by the clip, >= 0: one number, or one for each
            client, as from `solve_noise_multipliers`; 0 is not private.
        expected_batch_size: The constant denominator, > 0, at most the records of the smallest client.
        local_steps: Steps of each client in one round, >= 1.
        client_learning_rate: Of the clients' SGD, > 0.
        server_learning_rate: The server's share of the way to the mean, > 0.
        example_spec: Shape and type of one example and of one label, without the batch axis; by default read from the
            model, as in `build_averaging`.

    Returns:
        A `RecordLevelProcess` that is a `tff.learning.templates.LearningProcess`.

    Raises:
        InvalidArgumentError: An argument is outside its range.
        UnsupportedModelError: The builder or a layer cannot be used; the text names it.
        MissingDependencyError: TFF is not installed.

    Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, https://arxiv.org/abs/1607.00133,
        algorithm 1, inside McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        AISTATS 2017, https://arxiv.org/abs/1602.05629, algorithm 1. Records of different clients are protected in parallel:
        McSherry, "Privacy Integrated Queries", SIGMOD 2009, theorem 4.
    """
    facts = RecordLevelFacts(
        l2_norm_clip=l2_norm_clip,
        noise_multiplier=tuple(noise_multiplier) if isinstance(noise_multiplier, Sequence) else noise_multiplier,
        expected_batch_size=expected_batch_size,
        local_steps=local_steps,
        client_learning_rate=client_learning_rate,
        server_learning_rate=server_learning_rate,
    )
    tff = runtime.require_tff()
    runtime.ensure_context()
    import tensorflow as tf

    apart, keras_model = stateless_model(model)
    spec = example_spec or averaging.spec_of(keras_model, loss)

    @tff.tensorflow.computation()
    def initial_weights():
        return tff.learning.models.ModelWeights(
            *([tf.constant(value) for value in values] for values in (apart.trainable, apart.non_trainable))
        )

    weights_type = initial_weights.type_signature.result
    work = _client_work(tff, apart, loss, facts, spec, weights_type)
    sent = work.next.type_signature.result.result.member
    composed = tff.learning.templates.compose_learning_process(
        initial_weights,
        tff.learning.templates.build_broadcast_process(weights_type),
        work,
        tff.aggregators.MeanFactory().create(sent.update, sent.update_weight),
        tff.learning.templates.build_apply_optimizer_finalizer(
            tff.learning.optimizers.build_sgdm(server_learning_rate), weights_type
        ),
    )
    model()  # Keras 2 calls no model that is older than the last one made in a graph: there is a newer one now
    return _process_class()(composed, facts, spec, model)


def train_privately(
    model: Any,
    loss: Callable[["tf.Tensor", "tf.Tensor"], "tf.Tensor"],
    facts: RecordLevelFacts,
    trainable: tuple["tf.Tensor", ...],
    non_trainable: tuple["tf.Tensor", ...],
    x: "tf.Tensor",
    y: "tf.Tensor",
    rows: "tf.Tensor",
    keys: "tf.Tensor",
    noise_multiplier: "tf.Tensor",
) -> tuple["tf.Tensor", ...]:
    """Trains one client by DP-SGD. Runs in a graph.

    Args:
        model: A `StatelessModel`.
        loss: From `client_work.per_example_loss`.
        facts: The clip, the denominator, and the learning rate.
        trainable, non_trainable: The server's weights.
        x, y: The client's records (n, ...), n >= 1.
        rows: int32 (steps, b), b >= 1: the records of each step; a negative number is padding.
        keys: uint64 (steps, 3), one for the noise of each step.
        noise_multiplier: float32, of this client.

    Returns:
        One tensor per trainable variable: the weights after the last step.
    """
    import tensorflow as tf

    from tfprivacy_ft.clipping import clipped_sum_of_function

    def batch_loss(weights, others, examples, labels):
        outputs, penalty = model(tuple(weights), tuple(others), examples)
        return tf.reduce_mean(loss(labels, outputs)) + penalty

    def step(i, *weights):
        real = rows[i] >= 0
        batch = [tf.gather(part, tf.maximum(rows[i], 0)) for part in (x, y)]
        found = clipped_sum_of_function(
            batch_loss, weights, batch, facts.l2_norm_clip, constants=non_trainable, real=real
        )
        noise = aggregation.add_gaussian_noise([tf.zeros_like(total) for total in found.sums], keys[i], 1.0)
        means = [
            (total + tf.cast(facts.l2_norm_clip * noise_multiplier, each.dtype) * each) / facts.expected_batch_size
            for total, each in zip(found.sums, noise, strict=True)
        ]
        gradients = [
            mean if penalty is None else mean + tf.cast(penalty, mean.dtype)
            for mean, penalty in zip(means, found.data_independent, strict=True)
        ]
        return i + 1, *(
            weight - tf.cast(facts.client_learning_rate * gradient, weight.dtype)
            for weight, gradient in zip(weights, gradients, strict=True)
        )

    steps = tf.shape(rows)[0]
    return tf.while_loop(lambda i, *_: i < steps, step, (tf.constant(0), *trainable))[1:]


def _client_work(tff: Any, model: Any, loss: Any, facts: RecordLevelFacts, spec: Any, weights_type: Any) -> Any:
    """A `tff.learning.templates.ClientWorkProcess` without metrics, which in clear would be releases without noise."""
    import tensorflow as tf

    each_loss = client_work.per_example_loss(loss)
    element = (
        *(tff.TensorType(part.dtype.as_numpy_dtype, [None, *part.shape]) for part in spec),
        tff.TensorType(np.int32, [None, None]),
        tff.TensorType(np.uint64, [None, 3]),
        tff.TensorType(np.float32),
    )
    data_type = tff.SequenceType(tff.StructWithPythonType(element, tuple))

    @tff.tensorflow.computation(weights_type, data_type)
    def local_update(weights, data):
        train = tf.function(functools.partial(train_privately, model, each_loss, facts), autograph=False)
        before = tuple(weights.trainable)
        # One element: iterating over a data set makes TensorFlow set the function up anew in every round.
        after = train(before, tuple(weights.non_trainable), *data.get_single_element())
        update = [old - new for old, new in zip(before, after, strict=True)]
        return tff.learning.templates.ClientResult(update=update, update_weight=tf.constant(1.0))

    @tff.federated_computation()
    def initialize():
        return tff.federated_value((), tff.SERVER)

    @tff.federated_computation(
        initialize.type_signature.result,
        tff.FederatedType(weights_type, tff.CLIENTS),
        tff.FederatedType(data_type, tff.CLIENTS),
    )
    def next_round(state, weights, data):
        result = tff.federated_map(local_update, (weights, data))
        return tff.templates.MeasuredProcessOutput(state, result, tff.federated_value((), tff.SERVER))

    return tff.learning.templates.ClientWorkProcess(initialize, next_round)


@functools.cache
def _process_class() -> type:
    """The class of the processes; its bases are TFF's, which is not imported before it is needed."""
    tff: Any = runtime.require_tff()

    class Process(RecordLevelProcess, tff.learning.templates.LearningProcess):
        __doc__ = RecordLevelProcess.__doc__

        def __init__(self, composed: Any, facts: RecordLevelFacts, spec: Any, build: Any):
            tff.learning.templates.LearningProcess.__init__(
                self, composed.initialize, composed.next, composed.get_model_weights, composed.set_model_weights
            )
            self.facts, self._spec, self._build = facts, spec, build
            self._shapes = [tuple(each.shape) for each in composed.get_model_weights.type_signature.result.trainable]
            self._initialize_fn = in_worker(composed.initialize)
            self._next_fn = in_worker(composed.next, self._prepare)
            self._get_model_weights = in_worker(composed.get_model_weights)
            self._set_model_weights = in_worker(composed.set_model_weights)

        def _prepare(self, state: Any, client_data: Sequence[Any]) -> tuple[Any, Any]:
            import tensorflow as tf

            check_state(state, self._shapes)
            rng = np.random.default_rng(secrets.randbits(256))
            noise = self.facts.noise_multipliers(len(client_data))
            return state, [
                tf.data.Dataset.from_tensors(_client_element(client, self._spec, self.facts, multiplier, rng))
                for client, multiplier in zip(client_data, noise, strict=True)
            ]

    Process.__name__ = Process.__qualname__ = "RecordLevelProcess"
    return Process


def _client_element(
    client: Any, spec: Any, facts: RecordLevelFacts, noise_multiplier: float, rng: np.random.Generator
) -> tuple[Any, ...]:
    """What one client trains on in one round, as in `train_privately`."""
    if not (isinstance(client, tuple | list) and len(client) == 2):
        raise InvalidArgumentError(f"a client is a {type(client).__name__}: give a pair of arrays (x, y).")
    x, y = (packing.as_given(part, its, name) for part, its, name in zip(client, spec, "xy", strict=True))
    if len(x) != len(y):
        raise DatasetError(f"a client has {len(x)} examples and {len(y)} labels: give one label per example.")
    q = _sampling_probability(len(x), facts.expected_batch_size)
    rows = draw_batches(len(x), q, facts.local_steps, rng)
    keys = np.stack([aggregation.fresh_noise_key() for _ in range(facts.local_steps)])
    return x, y, rows, keys, np.float32(noise_multiplier)


def draw_batches(num_records: int, sampling_probability: float, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Poisson batches: each record in each step independently with `sampling_probability`.

    Args:
        num_records: >= 1.
        sampling_probability: In (0, 1].
        steps: >= 1.
        rng: Seeded by the operating system, for privacy.

    Returns:
        int32 (steps, b), b >= 1: the records of each step, and -1 to fill up.

    Example:
        >>> draw_batches(3, 1.0, 2, np.random.default_rng()).tolist()
        [[0, 1, 2], [0, 1, 2]]
    """
    batches = [np.flatnonzero(rng.random(num_records) < sampling_probability) for _ in range(steps)]
    rows = np.full((steps, max(1, *map(len, batches))), -1, np.int32)
    for row, batch in zip(rows, batches, strict=True):
        row[: len(batch)] = batch
    return rows


def _sampling_probability(num_records: int, expected_batch_size: float) -> float:
    if expected_batch_size > num_records:
        raise InvalidArgumentError(
            f"expected_batch_size={expected_batch_size} is more than the {num_records} records of a client: give at most "
            "those of the smallest client."
        )
    return expected_batch_size / num_records


def solve_noise_multipliers(
    num_records: Sequence[int],
    *,
    target_epsilon: float,
    delta: float,
    expected_batch_size: float,
    local_steps: int,
    rounds: int,
) -> tuple[float, ...]:
    """The least noise with which no client's epsilon passes the target.

    A client with fewer records takes each of them more often, and gets more noise for it.

    Args:
        num_records: Records of each client, at least `expected_batch_size`.
        target_epsilon: > 0, for one record after all rounds.
        delta: In (0, 1).
        expected_batch_size, local_steps: As for `build_record_level_averaging`.
        rounds: >= 1.

    Returns:
        A noise multiplier for each client.

    Raises:
        InvalidArgumentError: An argument is outside its range, or no noise reaches the target.

    Example:
        >>> plan = {"delta": 1e-5, "expected_batch_size": 50, "local_steps": 1, "rounds": 10}
        >>> [round(z, 2) for z in solve_noise_multipliers([50, 50], target_epsilon=3, **plan)]
        [4.4, 4.4]
    """
    _check.positive_integer(local_steps=local_steps, rounds=rounds)
    _check.positive(expected_batch_size=expected_batch_size)

    @functools.cache
    def solve(records: int) -> float:
        def events_for(noise_multiplier: float) -> Event:
            return Event.poisson(
                count=rounds * local_steps,
                noise_multiplier=noise_multiplier,
                sampling_probability=_sampling_probability(records, expected_batch_size),
            )

        return accounting.solve_noise_multiplier(target_epsilon=target_epsilon, delta=delta, events_for=events_for)

    return tuple(solve(int(records)) for records in num_records)


@dataclasses.dataclass(frozen=True)
class RecordLevelResult:
    """What `simulate_records` ends with.

    Args:
        process: The process that ran.
        state: Its last state, to go on from.
        history: One dictionary per look at the run: `round` (of this call, from 1), `epsilon` (the largest of the clients',
            of their whole ledgers up to there) and the figures of `evaluate`.
        reports: For each client the privacy spent, by its ledger.
    """

    process: RecordLevelProcess
    state: Any
    history: list[dict[str, float]]
    reports: dict[str, Report]

    @property
    def epsilon(self) -> float:
        """The largest epsilon of a record, whichever client holds it."""
        return max(report.epsilon for report in self.reports.values())

    def model(self) -> "tf.keras.Model":
        """A fresh Keras model with the trained weights."""
        return self.process.model(self.state)


def simulate_records(
    process: RecordLevelProcess,
    clients: Clients,
    *,
    rounds: int,
    delta: float,
    target_epsilon: float | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    state: Any = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    progress: bool = True,
) -> RecordLevelResult:
    """Runs rounds of federated averaging with DP-SGD inside the clients, all of which take part in each.

    Guarantees: each round is written to the ledger of every client, durably if there is a `run_dir`, before it runs.

    Args:
        process: From `build_record_level_averaging`.
        clients: Name -> (x, y), or `ClientData`; in the order of the process's noise multipliers.
        rounds: >= 1.
        delta: Of every epsilon, in (0, 1), well below 1 / (records of the largest client).
        target_epsilon: The budget of one record, > 0, for the whole ledger of each client: the first round that would pass
            it for one of them does not run. None for no limit.
        run_dir: Folder with a folder for each client, by name, in which its ledger is, continued if there is one; None
            keeps ledgers in memory.
        state: A state to go on from; None starts from the initial weights of the model.
        evaluate: From a Keras model to a dictionary of figures. If they come from private data, they are releases without
            noise; the reports say so.
        evaluate_every: Rounds between two looks, >= 1; None looks after the last round only.
        progress: Whether to show a progress bar.

    Returns:
        A `RecordLevelResult`.

    Raises:
        InvalidArgumentError: An argument is outside its range, or contradicts the process.
        DatasetError: There are no clients, or a client's data do not fit the model.
        BudgetExceededError: The target leaves no room for a single round.
        LedgerError: A ledger could not be written; the round that it was for did not run.
    """
    from rich.progress import track

    if not isinstance(process, RecordLevelProcess):
        raise InvalidArgumentError(
            f"process is a {type(process).__name__}: give what federated.build_record_level_averaging returned."
        )
    _check.positive_integer(rounds=rounds, evaluate_every=rounds if evaluate_every is None else evaluate_every)
    if target_epsilon is not None:
        _check.positive(target_epsilon=target_epsilon)
    data = _by_name(clients)
    process.facts.noise_multipliers(len(data))
    events = {name: process.event(len(x), i) for i, (name, (x, _)) in enumerate(data.items())}
    for event in events.values():
        accounting.check_delta(delta, event.population)
    history: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        books = {
            name: stack.enter_context(_open(run_dir, name, delta, _facts(process.facts, event, target_epsilon)))
            for name, event in events.items()
        }
        allowed = _allowed_rounds(rounds, events, books, target_epsilon, delta)
        if evaluate is not None:
            for book in books.values():
                book.note(EVALUATION.kind, EVALUATION.text)  # ahead of the first look
        state = process.initialize() if state is None else state  # type: ignore[attr-defined]
        for number in track(range(1, allowed + 1), "round", disable=not progress):
            state = _run_round(process, state, data, events, books)
            if number == allowed or (evaluate_every and number % evaluate_every == 0):
                figures = {} if evaluate is None else as_figures(evaluate(process.model(state)))
                for book in books.values() if figures else ():
                    book.figures(figures)
                epsilon = max(compute_epsilon(book, delta=delta).epsilon for book in books.values())
                history.append({"round": number, "epsilon": epsilon, **figures})
        reports = {name: compute_epsilon(book, delta=delta) for name, book in books.items()}
    return RecordLevelResult(process=process, state=state, history=history, reports=reports)


def _run_round(
    process: Any, state: Any, data: Mapping[str, Any], events: Mapping[str, Event], books: Mapping[str, Ledger]
) -> Any:
    reserved = {name: book.reserve(events[name]) for name, book in books.items()}
    try:
        state = process.next(state, list(data.values())).state
    except KeyboardInterrupt:
        runtime.stop_worker()  # or it would go on with a round that nobody waits for
        raise
    for name, book in books.items():
        book.settle([reserved[name]], events[name])
    return state


def _allowed_rounds(
    rounds: int, events: Mapping[str, Event], books: Mapping[str, Ledger], target_epsilon: float | None, delta: float
) -> int:
    """How many of these rounds the budget of every client allows, on top of what its ledger holds."""
    for name, book in books.items() if target_epsilon is not None else ():
        assert target_epsilon is not None
        steps = accounting.releases_left(events[name], spent=book.events(), target_epsilon=target_epsilon, delta=delta)
        rounds = min(rounds, steps // events[name].count)
        if not rounds:
            raise BudgetExceededError(
                f"the ledger of {name!r} leaves no room for a round within target_epsilon={target_epsilon}: stop here, allow a "
                "larger epsilon, or start a run in another folder."
            )
    return rounds


def _by_name(clients: Clients) -> dict[str, tuple[Any, Any]]:
    if isinstance(clients, ClientData):
        clients = {str(name): clients[i] for i, name in enumerate(clients.names)}
    if not isinstance(clients, Mapping):
        raise InvalidArgumentError(
            f"clients is a {type(clients).__name__}: give ClientData, as from federated.split_by_owner, or a dictionary from "
            "names to pairs (x, y)."
        )
    if not clients:
        raise DatasetError("no clients were given: give at least one.")
    for name in clients:
        if not isinstance(name, str) or name in ("", "..") or pathlib.PurePath(name).name != name:
            raise InvalidArgumentError(
                f"the client name {name!r} is not allowed: give a string that can name a folder."
            )
    return dict(clients)


def _open(run_dir: str | os.PathLike[str] | None, name: str, delta: float, facts: dict[str, Any]) -> Ledger:
    if run_dir is None:
        return Ledger.in_memory(delta=delta, facts=facts)
    return Ledger.open(pathlib.Path(run_dir) / name, delta=delta, facts=facts)


def _facts(facts: RecordLevelFacts, event: Event, target_epsilon: float | None) -> dict[str, Any]:
    return {
        "algorithm": "federated averaging with DP-SGD inside clients",
        "num_examples": event.population,
        "target_epsilon": target_epsilon,
        **dataclasses.asdict(facts),
        "noise_multiplier": event.noise_multiplier,
    }
