"""A federated averaging process: what it promises of its rounds, and what it does whoever runs it.

The process states its own clip, noise and cohort, so the sampler and the accounts cannot be told others. Knows nothing of
the ledger, nor of what computes a round.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from federated import aggregation, packing, rounds, server_optimizers
from federated.cohorts import PoissonCohorts
from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.events import Event, Mechanism

if TYPE_CHECKING:
    import tensorflow as tf

    from federated.cohorts import Cohorts

__all__ = ["AveragingFacts", "AveragingProcess", "Schedule", "check_state", "loss_name", "rate_at"]

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
        kept: tuple[str, ...],
        schedules: tuple[Schedule, Schedule | None],
    ):
        self.facts, self.loss = facts, loss
        self._packer, self._build, self._shapes = packer, build, shapes
        self._kept = kept  # what the server's optimizer keeps, by name
        self._schedules = schedules  # of the clients' learning rate, and of the server's where it can be set

    @property
    def loss_name(self) -> str:
        """The name of the loss, in small letters and without underscores."""
        return loss_name(self.loss)

    def event(self, num_clients: int) -> Event:
        """One round over a Poisson cohort: the first of `events`.

        Args:
            num_clients: Clients in all, at least `expected_clients_per_round`.
        """
        return self.events(PoissonCohorts(num_clients, self.facts.expected_clients_per_round))[0]

    def events(self, cohorts: "Cohorts") -> tuple[Event, ...]:
        """What the next round of these cohorts releases, as the ledger records it.

        One event for those who see the models; and one for whoever sees what clients send, where these add noise. Where
        only clients add noise, and nobody promises how many there are, theirs is the only one, and holds for everyone.

        Noise of clients shows how many there were: a sum tells whether a client reported at all. What it hides is what the
        client reported, so that the draw of Poisson cohorts amplifies nothing, and neighbours are those of zero-out, where a
        blank client adds its noise as before.

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
        if central.sampler == "poisson":
            central = Event.shuffled(
                count=central.count,
                passes=central.participations,
                unit="client",
                population=cohorts.num_clients,
                **self._central,
            )
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
        check_state(state, self._shapes, self._kept)
        shards = self._packer.pack(client_data)
        if len(client_data) < self.facts.least_reports:
            raise InvalidArgumentError(
                f"{len(client_data)} clients are fewer than least_reports={self.facts.least_reports}, whose noise the epsilon "
                "counts on: run the round with more clients."
            )
        clip = math.inf if self.facts.clip is None else self.facts.clip
        if self.facts.target_quantile is not None:
            clip = float(state.clip)
            if not math.isfinite(clip):
                raise InvalidArgumentError(
                    f"state has a clip of {clip}, as that of a process without one has: give its weights to `start_from` of this."
                )
        at_clients, at_server = self._schedules
        number = int(state.round_number)
        optimizer = type(state.optimizer)(state.optimizer)
        if at_server is not None:
            optimizer[server_optimizers.LEARNING_RATE] = np.float32(rate_at(at_server, number))
        return state._replace(
            clip=np.float32(clip),
            client_learning_rate=np.float32(rate_at(at_clients, number)),
            optimizer=optimizer,
            noise_key=aggregation.fresh_noise_key(),
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


def check_state(state: Any, shapes: Sequence[tuple[int, ...]], kept: tuple[str, ...] | None = None) -> None:
    """Refuses what is no state of a process whose weights have these shapes, and whose optimizer keeps what is so called.

    Raises:
        InvalidArgumentError: It is not.
    """
    weights = getattr(getattr(state, "global_model_weights", None), "trainable", None)
    fits = weights is not None and [np.shape(value) for value in weights] == list(shapes)
    if not fits or (kept is not None and tuple(getattr(state, "optimizer", None) or ()) != kept):
        raise InvalidArgumentError(
            f"state is a {type(state).__name__} that is not of this process: give what its `initialize` or its last `next` "
            "returned."
        )


def rate_at(schedule: Schedule, round_number: int) -> float:
    """The learning rate of a round."""
    if not callable(schedule):
        return schedule
    rate = float(schedule(round_number))
    if not (math.isfinite(rate) and rate >= 0):
        raise InvalidArgumentError(
            f"the learning rate of round {round_number} is {rate}: let the schedule give finite numbers >= 0."
        )
    return rate


def loss_name(loss: Any) -> str:
    """The name of a Keras loss, in small letters and without underscores."""
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    return name.lower().replace("_", "")


def _guaranteed(cohorts: "Cohorts") -> int:
    """How many clients report in every cohort; one whose data are replaced, or blank, still does."""
    size = int(cohorts.clients_per_round)
    return {"fixed": size, "cyclic": cohorts.num_clients % size or size}.get(cohorts.name, 0) if size else 0


def _pairs(variables: Sequence[Any], values: Sequence[Any]) -> list[tuple[Any, np.ndarray]]:
    if [tuple(variable.shape) for variable in variables] != [np.shape(value) for value in values]:
        raise InvalidArgumentError(
            f"the model has weights of shapes {[tuple(variable.shape) for variable in variables]}, the process "
            f"{[np.shape(value) for value in values]}: give a model from the builder that the process was built with."
        )
    return list(zip(variables, values, strict=True))
