"""Builds federated averaging with differential privacy for each client.

Promises: one client moves the sum of a round by at most the clip; the server adds noise to the sum once, from a key that
is new in each call of `next`, and so does each client where it adds noise itself; under privacy the mean divides by the
constant `expected_clients_per_round` and weighs every client the same. The process states these facts itself, so the
sampler and the accounts cannot be told others. Knows nothing of the ledger.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from federated import aggregation, client_work, packing, rounds, server_optimizers, stateless
from federated.clients import sampling_probability
from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.events import Event, Mechanism

if TYPE_CHECKING:
    import tensorflow as tf

    from federated.cohorts import Cohorts
    from tfprivacy_ft.moving_clip import Adaptive

__all__ = ["AveragingFacts", "AveragingProcess", "build_averaging"]

Schedule = float | Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class AveragingFacts:
    """What a process promises of each of its rounds; all of it public.

    Args:
        l2_norm_clip: Largest l2 norm of one client's update, over all variables together; where the clip moves, the first.
        noise_multiplier: Standard deviation (or scale) of the server's noise on the sum, divided by the clip.
        expected_clients_per_round: The constant denominator, the expected size of a cohort.
        client_learning_rate, server_learning_rate, server_momentum: Of the two optimizers; the name of a schedule.
        batch_size: Examples per local step; None for all of a client's.
        local_epochs: Passes of a client over its examples in one round.
        proximal_strength: How strongly clients are pulled back to the server's weights.
        server_optimizer: Name of the server's optimizer.
        l1_norm_clip: Largest l1 norm of one client's update, with Laplace noise, in place of `l2_norm_clip`.
        local_noise_multiplier: Of the noise that each client adds to its own update, divided by the clip.
        least_reports: How many noisy reports are in every sum, whatever happens.
        multiplicative_noise: Standard deviation of a random factor on each number of the mean.
        client_weighting: Whether clients count "equal" or by their "examples".
        target_quantile: Share of the clients' updates that a moving clip lets through whole; None where the clip stays.
    """

    l2_norm_clip: float | None
    noise_multiplier: float
    expected_clients_per_round: float
    client_learning_rate: float | str
    server_learning_rate: float | str
    server_momentum: float
    batch_size: int | None
    local_epochs: int
    proximal_strength: float = 0.0
    server_optimizer: str = "sgd"
    l1_norm_clip: float | None = None
    local_noise_multiplier: float = 0.0
    least_reports: int = 0
    multiplicative_noise: float = 0.0
    client_weighting: Literal["equal", "examples"] = "equal"
    target_quantile: float | None = None

    def __post_init__(self) -> None:
        clips = {"l2_norm_clip": self.l2_norm_clip, "l1_norm_clip": self.l1_norm_clip}
        _check.positive(**{name: clip for name, clip in clips.items() if clip is not None})
        _check.positive(expected_clients_per_round=self.expected_clients_per_round)
        _check.non_negative(
            noise_multiplier=self.noise_multiplier,
            proximal_strength=self.proximal_strength,
            local_noise_multiplier=self.local_noise_multiplier,
            multiplicative_noise=self.multiplicative_noise,
        )
        _check.positive_integer(local_epochs=self.local_epochs)
        if self.batch_size is not None:
            _check.positive_integer(batch_size=self.batch_size)
        if isinstance(self.least_reports, bool) or not (
            isinstance(self.least_reports, int) and self.least_reports >= 0
        ):
            raise InvalidArgumentError(f"least_reports={self.least_reports!r} is not allowed: give an integer >= 0.")
        momentum = self.server_momentum
        if not (isinstance(momentum, int | float) and 0 <= momentum < 1):
            raise InvalidArgumentError(f"server_momentum={momentum!r} is not allowed: give a number in [0, 1).")
        self._check_clip()
        self._check_weighting()

    def _check_clip(self) -> None:
        if self.l2_norm_clip is not None and self.l1_norm_clip is not None:
            raise InvalidArgumentError(
                f"l2_norm_clip={self.l2_norm_clip} and l1_norm_clip={self.l1_norm_clip} were both given: the first goes with "
                "Gaussian noise, the second with Laplace noise; give one."
            )
        if self.is_noisy and self.clip is None:
            raise InvalidArgumentError(
                "noise without a clip protects nobody: give l2_norm_clip, or l1_norm_clip for Laplace noise."
            )
        if self.target_quantile is not None and (self.l2_norm_clip is None or self.local_noise_multiplier):
            raise InvalidArgumentError(
                "a moving clip needs l2_norm_clip to begin with, and a server that sees the clients' votes on it: leave out "
                "l1_norm_clip and local_noise_multiplier, or clipping."
            )
        if self.least_reports and not (self.local_noise_multiplier and self.mechanism == "gaussian"):
            raise InvalidArgumentError(
                f"least_reports={self.least_reports} is about the Gaussian noise of clients, and they add none: give "
                "local_noise_multiplier and l2_norm_clip, or leave it out."
            )

    def _check_weighting(self) -> None:
        if self.client_weighting not in ("equal", "examples"):
            raise InvalidArgumentError(
                f"client_weighting={self.client_weighting!r} is not allowed: use 'equal' or 'examples'."
            )
        if self.client_weighting == "examples" and (self.is_noisy or self.target_quantile is not None):
            raise InvalidArgumentError(
                "client_weighting='examples' does not go with privacy: a weight multiplies what one client can do to the sum, "
                "and the mean's denominator would depend on who is there; use 'equal'."
            )

    @property
    def is_noisy(self) -> bool:
        """Whether server or clients add noise."""
        return bool(self.noise_multiplier or self.local_noise_multiplier)

    @property
    def clip(self) -> float | None:
        """Largest norm of one client's update."""
        return self.l2_norm_clip if self.l1_norm_clip is None else self.l1_norm_clip

    @property
    def mechanism(self) -> Mechanism:
        """Laplace noise goes with a clip of the l1 norm, Gaussian noise with one of the l2 norm."""
        return "gaussian" if self.l1_norm_clip is None else "laplace"

    @property
    def central_noise_multiplier(self) -> float:
        """Of the sum as those see it who see only models: the server's noise, and that of `least_reports` clients."""
        return math.hypot(self.noise_multiplier, math.sqrt(self.least_reports) * self.local_noise_multiplier)


class AveragingProcess:
    """What `build_averaging` returns, besides being a `tff.learning.templates.LearningProcess` where TFF runs it.

    `next(state, client_data)` takes one entry per client of the cohort, each client at most once; the cohort may be
    empty. An entry is a pair of arrays (x, y), which the process shuffles and batches, or a `tf.data.Dataset` of batches
    (x, y), taken as they are, as in TFF (slower to read). Each call puts a new noise key in the state: two calls with
    one state give two independent noises. Unlike `federated.simulate`, it writes no ledger.
    """

    facts: AveragingFacts
    loss: Any

    def __init__(
        self,
        *,
        facts: AveragingFacts,
        loss: Any,
        packer: packing.Packer,
        build: Callable[[], "tf.keras.Model"],
        shapes: list[tuple[int, ...]],
        schedules: tuple[Schedule, Schedule],
    ):
        self.facts, self.loss = facts, loss
        self._packer, self._build, self._shapes = packer, build, shapes
        self._schedules = schedules  # of the clients' learning rate and of the server's

    @property
    def loss_name(self) -> str:
        """The name of the loss, in small letters and without underscores."""
        return _loss_name(self.loss)

    def event(self, num_clients: int) -> Event:
        """One round over a Poisson cohort, as the ledger records what the server's noise protects.

        Args:
            num_clients: Clients in all, at least `expected_clients_per_round`.
        """
        return Event.poisson(
            count=1,
            unit="client",
            sampling_probability=sampling_probability(num_clients, self.facts.expected_clients_per_round),
            population=num_clients,
            **self._central,
        )

    def events(self, cohorts: "Cohorts") -> tuple[Event, ...]:
        """What the next round of these cohorts releases, as the ledger records it.

        One event for those who see the models; and one for whoever sees what clients send, where these add noise. Where
        only clients add noise, and nobody promises how many there are, theirs is the only one, and holds for everyone.

        Raises:
            InvalidArgumentError: The process counts on more noisy reports than the cohorts have.
        """
        facts = self.facts
        if facts.least_reports > _guaranteed(cohorts):
            raise InvalidArgumentError(
                f"least_reports={facts.least_reports} is more than a cohort of these is sure to have "
                f"({_guaranteed(cohorts)}): use cohorts of fixed size, or least_reports=0."
            )
        central = cohorts.event(**self._central)
        if not facts.local_noise_multiplier:
            return (central,)
        local = Event.local(
            count=1,
            noise_multiplier=facts.local_noise_multiplier,
            participations=central.participations,
            population=cohorts.num_clients,
            l2_norm_clip=facts.l2_norm_clip,
            mechanism=facts.mechanism,
        )
        return (central, local) if facts.central_noise_multiplier else (local,)

    def measurements(self, state: Any) -> dict[str, float]:
        """What else a state tells, of what the noise has protected: the clip, where it moves."""
        return {} if self.facts.target_quantile is None else {"clip": float(state.clip)}

    @property
    def notes(self) -> dict[str, str]:
        """What the accounts need to be read with: kind of note -> text."""
        if not self.facts.multiplicative_noise:
            return {}
        return {
            "multiplicative noise": "each number of a round's mean was multiplied by a random factor, which guarantees "
            "nothing: noise on a small number is small. Epsilon is that of the other noise, and infinite without any."
        }

    @property
    def _central(self) -> dict[str, Any]:
        return {
            "noise_multiplier": self.facts.central_noise_multiplier,
            "l2_norm_clip": None if self.facts.target_quantile is not None else self.facts.l2_norm_clip,
            "mechanism": self.facts.mechanism,
        }

    def _prepare(self, state: Any, client_data: Sequence[Any]) -> tuple[Any, list[rounds.Shard]]:
        """What a round needs from outside of TensorFlow: a noise key, the learning rates, and shards of clients."""
        weights = getattr(getattr(state, "global_model_weights", None), "trainable", None)
        if weights is None or [np.shape(value) for value in weights] != self._shapes:
            raise InvalidArgumentError(
                f"state is a {type(state).__name__} that is not of this process: give what its `initialize` or its "
                "last `next` returned."
            )
        shards = self._packer.pack(client_data)
        if len(client_data) < self.facts.least_reports:
            raise InvalidArgumentError(
                f"{len(client_data)} clients are fewer than least_reports={self.facts.least_reports}, whose noise the epsilon "
                "counts on: run the round with more clients."
            )
        at_clients, at_server = self._schedules
        number = int(state.round_number)
        if callable(at_server):
            optimizer = type(state.optimizer)(state.optimizer)
            optimizer[server_optimizers.LEARNING_RATE] = np.float32(_rate_at(at_server, number))
            state = state._replace(optimizer=optimizer)
        return state._replace(
            client_learning_rate=np.float32(_rate_at(at_clients, number)), noise_key=aggregation.fresh_noise_key()
        ), shards

    def assign(self, state: Any, model: "tf.keras.Model") -> None:
        """Copies the weights of a state into a Keras model of the same architecture.

        Raises:
            InvalidArgumentError: The weights do not fit the model.
        """
        weights = self.get_model_weights(state)  # type: ignore[attr-defined]
        pairs = [
            *_pairs(model.trainable_weights, weights.trainable),
            *_pairs(model.non_trainable_weights, weights.non_trainable),
        ]
        for variable, value in pairs:
            variable.assign(value)

    def model(self, state: Any = None) -> "tf.keras.Model":
        """A fresh Keras model from the process's builder, with the weights of a state if one is given."""
        model = self._build()
        if state is not None:
            self.assign(state, model)
        return model

    def start_from(self, model: "tf.keras.Model") -> Any:
        """An initial state with the weights of a Keras model of the same architecture, to fine-tune it.

        Raises:
            InvalidArgumentError: The model's weights do not fit.
        """
        state = self.initialize()  # type: ignore[attr-defined]
        initial = self.get_model_weights(state)  # type: ignore[attr-defined]
        pairs = (
            _pairs(model.trainable_weights, initial.trainable),
            _pairs(model.non_trainable_weights, initial.non_trainable),
        )
        weights = type(initial)(*([variable.numpy() for variable, _ in each] for each in pairs))
        return self.set_model_weights(state, weights)  # type: ignore[attr-defined]


def build_averaging(
    model: Callable[[], "tf.keras.Model"],
    *,
    loss: Any = "sparse_categorical_crossentropy",
    client_learning_rate: Schedule,
    l2_norm_clip: float | None = None,
    l1_norm_clip: float | None = None,
    noise_multiplier: float,
    expected_clients_per_round: float,
    clipping: "Adaptive | None" = None,
    local_noise_multiplier: float = 0.0,
    least_reports: int = 0,
    multiplicative_noise: float = 0.0,
    client_weighting: Literal["equal", "examples"] = "equal",
    server_learning_rate: Schedule = 1.0,
    server_momentum: float = 0.0,
    server_optimizer: Any = None,
    proximal_strength: float = 0.0,
    batch_size: int | None = 32,
    local_epochs: int = 1,
    example_spec: tuple["tf.TensorSpec", "tf.TensorSpec"] | None = None,
    shards: int | None = None,
    clients_at_once: int | None = None,
    engine: Literal["tff", "tensorflow"] = "tff",
) -> Any:
    """Builds federated averaging with differential privacy for each client.

    Each round, each client of the cohort trains the server's model by SGD on its own examples; its change of the
    weights is clipped; the server divides the noised sum of these by a constant and takes a step with it.

    Guarantees: a round is the Gaussian (or Laplace) mechanism with noise multiplier `noise_multiplier` and unit of privacy
    one client, sampled as the caller samples. Nothing else of the clients leaves a round: no training metrics, no cohort
    size. The trained model is the same, to rounding, as that of `tff.learning.algorithms.build_unweighted_fed_avg` with a
    fixed Gaussian aggregator, and the same on both engines.

    Args:
        model: Called without arguments, returns a new Keras model of the same architecture at each call, with one
            input: `lambda: models.build_model("cnn", (28, 28, 1), 10)`.
        loss: Any Keras loss: a name, a function, or a `tf.keras.losses.Loss`; the mean over a batch is minimised,
            plus the model's weight regularisers.
        client_learning_rate: Of the clients' SGD, > 0: a number, or a function of the round (0 for the first), such as a
            `tf.keras.optimizers.schedules.LearningRateSchedule`.
        l2_norm_clip: Largest l2 norm of one client's update, over all variables together, > 0. A client whose update
            is not finite, or of a norm beyond 1e19, counts as zero. None, without any noise, clips nothing.
        l1_norm_clip: The same for the l1 norm, in place of `l2_norm_clip`: noise is Laplace noise then, which is private
            with delta 0 but grows with the number of weights.
        noise_multiplier: Standard deviation (scale, of Laplace noise) of the server's noise on the sum, divided by the
            clip, >= 0; 0 is not private.
        expected_clients_per_round: The constant denominator, > 0.
        clipping: `tfprivacy_ft.Adaptive()` moves the clip, from `l2_norm_clip` on, to a quantile of the norms of the clients'
            updates, which it learns privately within the same `noise_multiplier`. None for a clip that stays.
        local_noise_multiplier: Each client adds such noise to its own update before it leaves, >= 0: local privacy, for
            which nobody has to be trusted. Both noises may be used; the ledger holds an epsilon for each.
        least_reports: How many clients' noise is in every sum, >= 0; those who see only models are protected by as much of
            it. More than 0 needs cohorts of fixed size, and is refused in a round with fewer clients.
        multiplicative_noise: Standard deviation of random factors, around 1, on the numbers of the noised mean, >= 0. It
            guarantees nothing, and no epsilon counts on it.
        client_weighting: "equal", or "examples" for a mean weighted by numbers of examples, only without any noise.
        server_learning_rate: Of the server's SGD, > 0, or a function of the round.
        server_momentum: Of the server's SGD, in [0, 1).
        server_optimizer: One of `federated.server_optimizers` or `tff.learning.optimizers`, such as `Yogi(0.01)`, in place
            of SGD (FedOpt); it sees noised means only, and costs no privacy. It has a learning rate of its own.
        proximal_strength: mu >= 0: a client's loss also has mu/2 times the squared distance of its weights from the server's
            (FedProx), which keeps unlike clients together; 0 is FedAvg.
        batch_size: Examples per local step, for clients given as arrays, >= 1; None for all of a client's, which with one
            epoch and client_learning_rate=1.0 is FedSGD.
        local_epochs: Passes over a client's examples in a round, for clients given as arrays, >= 1.
        example_spec: Shape and type of one example and of one label, without the batch axis. By default read from
            the model's input and output, with whole-number labels for the losses that Keras calls sparse.
        shards: TFF clients that the cohort is spread over, computed in parallel, >= 1; by default one per core, at
            most 8. Fixed, because TFF's worker keeps memory and threads for each cohort size it has ever seen.
        clients_at_once: Clients of one shard trained side by side, >= 1; each costs some copies of the model's
            weights. By default at most 64 and about 32 million weights.
        engine: "tff", or "tensorflow" for the same process without TFF: in this program, on a GPU where there is one, and
            wherever TFF cannot be installed.

    Returns:
        An `AveragingProcess`; of the engine "tff", one that is a `tff.learning.templates.LearningProcess`.

    Raises:
        InvalidArgumentError: An argument is outside its range, or two do not go together.
        UnsupportedModelError: The builder or a layer cannot be used; the text names it.
        MissingDependencyError: TFF is not installed.

    Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018,
        https://arxiv.org/abs/1710.06963, algorithm 1 with flat clipping and the fixed-denominator estimator. Reddi et al.,
        "Adaptive Federated Optimization", ICLR 2021, for other server optimizers; Li et al., "Federated Optimization in
        Heterogeneous Networks", MLSys 2020, for the proximal term; Andrew et al., "Differentially Private Learning with
        Adaptive Clipping", NeurIPS 2021, for the clip that moves.
    """
    if engine not in ("tff", "tensorflow"):
        raise InvalidArgumentError(f"engine={engine!r} is not allowed: use 'tff' or 'tensorflow'.")
    _check_server_optimizer(server_optimizer, server_learning_rate, server_momentum)
    optimizer = server_optimizer or server_optimizers.SGD(server_learning_rate, server_momentum)
    facts = AveragingFacts(
        l2_norm_clip=l2_norm_clip,
        noise_multiplier=noise_multiplier,
        expected_clients_per_round=expected_clients_per_round,
        client_learning_rate=_named("client_learning_rate", client_learning_rate),
        server_learning_rate=_named("server_learning_rate", server_learning_rate),
        server_momentum=server_momentum,
        batch_size=batch_size,
        local_epochs=local_epochs,
        proximal_strength=proximal_strength,
        server_optimizer=type(optimizer).__name__.strip("_").lower(),
        l1_norm_clip=l1_norm_clip,
        local_noise_multiplier=local_noise_multiplier,
        least_reports=least_reports,
        multiplicative_noise=multiplicative_noise,
        client_weighting=client_weighting,
        target_quantile=_quantile(clipping),
    )
    shards = min(os.cpu_count() or 1, 8) if shards is None else shards
    _check.positive_integer(shards=shards)
    if clients_at_once is not None:
        _check.positive_integer(clients_at_once=clients_at_once)
    run, weights_class = _engine(engine)
    apart, keras_model = stateless.stateless_model(model)
    x_spec, y_spec = example_spec or spec_of(keras_model, loss)
    round_ = rounds.Round(
        model=apart,
        loss=client_work.per_example_loss(loss),
        privacy=rounds.RoundPrivacy(
            clip=math.inf if facts.clip is None else float(facts.clip),
            mechanism=facts.mechanism,
            noise_multiplier=noise_multiplier,
            local_noise_multiplier=local_noise_multiplier,
            moving=clipping,
            multiplicative_noise=multiplicative_noise,
        ),
        expected_clients=None if client_weighting == "examples" else expected_clients_per_round,
        client_learning_rate=_rate_at(client_learning_rate, 0),
        proximal_strength=proximal_strength,
        optimizer=optimizer,
        weights_class=weights_class,
    )
    packer = packing.Packer(
        x_spec=x_spec,
        y_spec=y_spec,
        batch_size=batch_size,
        local_epochs=local_epochs,
        shards=shards,
        clients_at_once=clients_at_once or max(1, min(64, 32_000_000 // max(1, apart.num_parameters))),
        by_examples=client_weighting == "examples",
        with_noise=bool(local_noise_multiplier),
    )
    process = run(
        round_,
        packer,
        facts=facts,
        loss=loss,
        build=model,
        shapes=[value.shape for value in apart.trainable],
        schedules=(client_learning_rate, getattr(optimizer, "learning_rate", 1.0)),
    )
    model()  # Keras 2 calls no model that is older than the last one made in a graph: there is a newer one now
    return process


def _engine(name: str) -> tuple[Callable[..., AveragingProcess], Any]:
    """What builds a process, and the class of its weights."""
    if name == "tensorflow":
        from federated import tensorflow_engine

        return tensorflow_engine.build, rounds.Weights
    from federated import runtime, tff_engine

    return tff_engine.build, runtime.require_tff().learning.models.ModelWeights


def _guaranteed(cohorts: "Cohorts") -> int:
    """How many clients every cohort is sure to have."""
    size = int(cohorts.clients_per_round)
    return {"fixed": size, "cyclic": cohorts.num_clients % size or size}.get(cohorts.name, 0) if size else 0


def _quantile(clipping: Any) -> float | None:
    if clipping is None:
        return None
    from tfprivacy_ft.moving_clip import Adaptive

    if not isinstance(clipping, Adaptive):
        raise InvalidArgumentError(
            f"clipping is a {type(clipping).__name__}: give tfprivacy_ft.Adaptive(), or None for a clip that stays."
        )
    return clipping.target_quantile


def _named(name: str, schedule: Any) -> float | str:
    """A learning rate as the ledger can hold it."""
    if hasattr(schedule, "apply_gradients"):
        raise InvalidArgumentError(
            f"{name} is the Keras optimizer {type(schedule).__name__}, which keeps variables that a client has no place for: "
            "give the learning rate of SGD, a number or a function of the round."
        )
    if callable(schedule):
        return f"schedule {getattr(schedule, '__name__', type(schedule).__name__)}"
    _check.positive(**{name: schedule})
    return schedule


def _rate_at(schedule: Schedule, round_number: int) -> float:
    """The learning rate of a round."""
    if not callable(schedule):
        return schedule
    rate = float(schedule(round_number))
    if not (math.isfinite(rate) and rate >= 0):
        raise InvalidArgumentError(
            f"the learning rate of round {round_number} is {rate}: let the schedule give finite numbers >= 0."
        )
    return rate


def _check_server_optimizer(optimizer: Any, learning_rate: Any, momentum: float) -> None:
    if optimizer is None:
        return
    if not (hasattr(optimizer, "initialize") and hasattr(optimizer, "next")):
        raise InvalidArgumentError(
            f"server_optimizer is a {type(optimizer).__name__}: give one of federated.server_optimizers, such as Yogi(0.01), "
            "or of tff.learning.optimizers."
        )
    if (learning_rate, momentum) != (1.0, 0.0):
        raise InvalidArgumentError(
            f"server_learning_rate={learning_rate} and server_momentum={momentum} are for the server's SGD and do not go with "
            "server_optimizer: give them to that optimizer."
        )


def spec_of(model: "tf.keras.Model", loss: Any) -> tuple["tf.TensorSpec", "tf.TensorSpec"]:
    """Shape and type of one example and of one label, as a model and a loss take them."""
    import tensorflow as tf

    inputs, outputs = getattr(model, "inputs", None) or [], getattr(model, "outputs", None) or []
    if len(inputs) != 1 or len(outputs) != 1:
        raise UnsupportedModelError(
            f"the model has {len(inputs)} inputs and {len(outputs)} outputs that can be read: give a model with one of "
            "each made by the functional API, or example_spec for a subclassed one."
        )
    sparse = "sparse" in _loss_name(loss)
    shape = outputs[0].shape[1:]
    return (
        tf.TensorSpec(inputs[0].shape[1:], inputs[0].dtype),
        tf.TensorSpec(shape[:-1], tf.int32) if sparse else tf.TensorSpec(shape, tf.float32),
    )


def _loss_name(loss: Any) -> str:
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    return name.lower().replace("_", "")


def _pairs(variables: Sequence[Any], values: Sequence[Any]) -> list[tuple[Any, np.ndarray]]:
    if [tuple(variable.shape) for variable in variables] != [np.shape(value) for value in values]:
        raise InvalidArgumentError(
            f"the model has weights of shapes {[tuple(variable.shape) for variable in variables]}, the process "
            f"{[np.shape(value) for value in values]}: give a model from the builder that the process was built with."
        )
    return list(zip(variables, values, strict=True))
