"""Builds federated averaging with central, client-level differential privacy as a TFF learning process.

Promises: one client moves the sum of a round by at most `l2_norm_clip`; noise of standard deviation
`l2_norm_clip * noise_multiplier` is added to the sum once, from a key that is new in each call of `next`; the mean
divides by the constant `expected_clients_per_round` and weighs every client the same. The process states these facts
itself, so the sampler and the accounts cannot be told others. Knows nothing of the ledger.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from federated import aggregation, client_work, packing, runtime
from federated.clients import sampling_probability
from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.events import Event

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["AveragingFacts", "AveragingProcess", "build_averaging"]


@dataclasses.dataclass(frozen=True)
class AveragingFacts:
    """What a process promises of each of its rounds; all of it public.

    Args:
        l2_norm_clip: Largest norm of one client's update, over all variables together.
        noise_multiplier: Standard deviation of the noise on the sum, divided by the clip.
        expected_clients_per_round: The constant denominator, the expected size of a Poisson cohort.
        client_learning_rate, server_learning_rate, server_momentum: Of the two optimizers.
        batch_size: Examples per local step.
        local_epochs: Passes of a client over its examples in one round.
        proximal_strength: How strongly clients are pulled back to the server's weights.
        server_optimizer: Name of the server's optimizer.
    """

    l2_norm_clip: float
    noise_multiplier: float
    expected_clients_per_round: float
    client_learning_rate: float
    server_learning_rate: float
    server_momentum: float
    batch_size: int
    local_epochs: int
    proximal_strength: float = 0.0
    server_optimizer: str = "sgd"

    def __post_init__(self) -> None:
        _check.positive(
            l2_norm_clip=self.l2_norm_clip,
            expected_clients_per_round=self.expected_clients_per_round,
            client_learning_rate=self.client_learning_rate,
            server_learning_rate=self.server_learning_rate,
        )
        _check.non_negative(noise_multiplier=self.noise_multiplier, proximal_strength=self.proximal_strength)
        _check.positive_integer(batch_size=self.batch_size, local_epochs=self.local_epochs)
        momentum = self.server_momentum
        if not (isinstance(momentum, int | float) and 0 <= momentum < 1):
            raise InvalidArgumentError(f"server_momentum={momentum!r} is not allowed: give a number in [0, 1).")


class AveragingProcess:
    """What `build_averaging` returns, besides being a `tff.learning.templates.LearningProcess`.

    `next(state, client_data)` takes one entry per client of the cohort, each client at most once; the cohort may be
    empty. An entry is a pair of arrays (x, y), which the process shuffles and batches, or a `tf.data.Dataset` of batches
    (x, y), taken as they are, as in TFF (slower to read). Each call puts a new noise key in the state: two calls with
    one state give two independent noises. Unlike `federated.simulate`, it writes no ledger.
    """

    facts: AveragingFacts
    loss: Any
    _build: Callable[[], "tf.keras.Model"]

    @property
    def loss_name(self) -> str:
        """The name of the loss, in small letters and without underscores."""
        return _loss_name(self.loss)

    def event(self, num_clients: int) -> Event:
        """One round over a Poisson cohort, as the ledger records it.

        Args:
            num_clients: Clients in all, at least `expected_clients_per_round`.
        """
        return Event.poisson(
            count=1,
            unit="client",
            noise_multiplier=self.facts.noise_multiplier,
            sampling_probability=sampling_probability(num_clients, self.facts.expected_clients_per_round),
            population=num_clients,
            l2_norm_clip=self.facts.l2_norm_clip,
        )

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
    client_learning_rate: float,
    l2_norm_clip: float,
    noise_multiplier: float,
    expected_clients_per_round: float,
    server_learning_rate: float = 1.0,
    server_momentum: float = 0.0,
    server_optimizer: Any = None,
    proximal_strength: float = 0.0,
    batch_size: int = 32,
    local_epochs: int = 1,
    example_spec: tuple["tf.TensorSpec", "tf.TensorSpec"] | None = None,
    shards: int | None = None,
    clients_at_once: int | None = None,
) -> Any:
    """Builds federated averaging with client-level differential privacy.

    Each round, each client of the cohort trains the server's model by SGD on its own examples; its change of the
    weights is clipped; the server divides the noised sum of these by a constant and takes a step of SGD with it.

    Guarantees: a round is the Gaussian mechanism with noise multiplier `noise_multiplier` and unit of privacy one
    client, sampled as the caller samples (`federated.simulate` samples by Poisson). Nothing else of the clients leaves
    a round: no training metrics, no cohort size. The trained model is the same, to rounding, as that of
    `tff.learning.algorithms.build_unweighted_fed_avg` with a fixed Gaussian aggregator.

    Args:
        model: Called without arguments, returns a new Keras model of the same architecture at each call, with one
            input: `lambda: models.build_model("cnn", (28, 28, 1), 10)`.
        loss: Any Keras loss: a name, a function, or a `tf.keras.losses.Loss`; the mean over a batch is minimised,
            plus the model's weight regularisers.
        client_learning_rate: Of the clients' SGD, > 0.
        l2_norm_clip: Largest L2 norm of one client's update, over all variables together, > 0. A client whose update
            is not finite, or of a norm beyond 1e19, counts as zero.
        noise_multiplier: Standard deviation of the noise on the sum, divided by the clip, >= 0; 0 is not private.
        expected_clients_per_round: The constant denominator, > 0.
        server_learning_rate: Of the server's SGD, > 0.
        server_momentum: Of the server's SGD, in [0, 1).
        server_optimizer: A `tff.learning.optimizers` optimizer, such as `build_yogi(0.01)`, in place of SGD (FedOpt); it
            sees noised means only, and costs no privacy. It has a learning rate of its own.
        proximal_strength: mu >= 0: a client's loss also has mu/2 times the squared distance of its weights from the server's
            (FedProx), which keeps unlike clients together; 0 is FedAvg.
        batch_size: Examples per local step, for clients given as arrays, >= 1.
        local_epochs: Passes over a client's examples in a round, for clients given as arrays, >= 1.
        example_spec: Shape and type of one example and of one label, without the batch axis. By default read from
            the model's input and output, with whole-number labels for the losses that Keras calls sparse.
        shards: TFF clients that the cohort is spread over, computed in parallel, >= 1; by default one per core, at
            most 8. Fixed, because TFF's worker keeps memory and threads for each cohort size it has ever seen.
        clients_at_once: Clients of one shard trained side by side, >= 1; each costs some copies of the model's
            weights. By default at most 64 and about 32 million weights.

    Returns:
        An `AveragingProcess` that is a `tff.learning.templates.LearningProcess`.

    Raises:
        InvalidArgumentError: An argument is outside its range.
        UnsupportedModelError: The builder or a layer cannot be used; the text names it.
        MissingDependencyError: TFF is not installed.

    Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018,
        https://arxiv.org/abs/1710.06963, algorithm 1 with flat clipping and the fixed-denominator estimator. Reddi et al.,
        "Adaptive Federated Optimization", ICLR 2021, for other server optimizers; Li et al., "Federated Optimization in
        Heterogeneous Networks", MLSys 2020, for the proximal term.
    """
    _check_server_optimizer(server_optimizer, server_learning_rate, server_momentum)
    facts = AveragingFacts(
        l2_norm_clip=l2_norm_clip,
        noise_multiplier=noise_multiplier,
        expected_clients_per_round=expected_clients_per_round,
        client_learning_rate=client_learning_rate,
        server_learning_rate=server_learning_rate,
        server_momentum=server_momentum,
        batch_size=batch_size,
        local_epochs=local_epochs,
        proximal_strength=proximal_strength,
        server_optimizer="sgd" if server_optimizer is None else type(server_optimizer).__name__.strip("_").lower(),
    )
    shards = min(os.cpu_count() or 1, 8) if shards is None else shards
    _check.positive_integer(shards=shards)
    if clients_at_once is not None:
        _check.positive_integer(clients_at_once=clients_at_once)
    tff = runtime.require_tff()
    runtime.ensure_context()
    stateless, keras_model = client_work.stateless_model(model)
    spec = example_spec or _example_spec(keras_model, loss)
    work, weights_type = client_work.build_client_work(
        stateless,
        loss,
        learning_rate=client_learning_rate,
        l2_norm_clip=l2_norm_clip,
        example_spec=spec,
        proximal_strength=proximal_strength,
    )
    composed = _compose(tff, stateless, work, weights_type, facts, server_optimizer)
    packer = packing.Packer(
        x_spec=spec[0],
        y_spec=spec[1],
        batch_size=batch_size,
        local_epochs=local_epochs,
        shards=shards,
        clients_at_once=clients_at_once or max(1, min(64, 32_000_000 // max(1, stateless.num_parameters))),
    )
    return _process_class()(composed, facts, packer, loss, model)


def _check_server_optimizer(optimizer: Any, learning_rate: float, momentum: float) -> None:
    if optimizer is None:
        return
    tff = runtime.require_tff()
    if not isinstance(optimizer, tff.learning.optimizers.Optimizer):
        raise InvalidArgumentError(
            f"server_optimizer is a {type(optimizer).__name__}: give one of tff.learning.optimizers, such as "
            "tff.learning.optimizers.build_yogi(0.01)."
        )
    if (learning_rate, momentum) != (1.0, 0.0):
        raise InvalidArgumentError(
            f"server_learning_rate={learning_rate} and server_momentum={momentum} are for the server's SGD and do not go with "
            "server_optimizer: give them to that optimizer."
        )


def _compose(
    tff: Any,
    model: client_work.StatelessModel,
    work: Any,
    weights_type: Any,
    facts: AveragingFacts,
    server_optimizer: Any,
) -> Any:
    import tensorflow as tf

    @tff.tensorflow.computation()
    def initial_weights():
        return tff.learning.models.ModelWeights(
            *([tf.constant(value) for value in values] for values in (model.trainable, model.non_trainable))
        )

    if server_optimizer is None:
        # Keras and TFF agree that no momentum is none, TFF only if it is not told 0.
        momentum = {"momentum": facts.server_momentum} if facts.server_momentum else {}
        server_optimizer = tff.learning.optimizers.build_sgdm(facts.server_learning_rate, **momentum)
    return tff.learning.templates.compose_learning_process(
        initial_weights,
        tff.learning.templates.build_broadcast_process(weights_type),
        work,
        aggregation.build_gaussian_mean(
            work.next.type_signature.result.result.member.update,
            l2_norm_clip=facts.l2_norm_clip,
            noise_multiplier=facts.noise_multiplier,
            denominator=facts.expected_clients_per_round,
        ),
        tff.learning.templates.build_apply_optimizer_finalizer(server_optimizer, weights_type),
    )


@functools.cache
def _process_class() -> type:
    """The class of the processes; its bases are TFF's, which is not imported before it is needed."""
    tff: Any = runtime.require_tff()

    class Guarded(tff.Computation):
        """A computation that runs in our worker, whichever thread calls it."""

        def __init__(self, inner: Any, prepare: Callable[..., tuple[Any, ...]] | None = None):
            self._inner, self._prepare = inner, prepare

        @property
        def type_signature(self) -> Any:
            return self._inner.type_signature

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            runtime.ensure_context()
            return self._inner(*self._prepare(*args, **kwargs)) if self._prepare else self._inner(*args, **kwargs)

        def __hash__(self) -> int:
            return hash(self._inner)

    class Process(AveragingProcess, tff.learning.templates.LearningProcess):
        __doc__ = AveragingProcess.__doc__

        def __init__(self, composed: Any, facts: AveragingFacts, packer: packing.Packer, loss: Any, build: Any):
            tff.learning.templates.LearningProcess.__init__(
                self,
                composed.initialize,
                composed.next,
                composed.get_model_weights,
                composed.set_model_weights,
                get_hparams_fn=composed.get_hparams,
                set_hparams_fn=composed.set_hparams,
            )
            self.facts, self.loss, self._build = facts, loss, build
            self._packer = packer
            self._shapes = [tuple(each.shape) for each in composed.get_model_weights.type_signature.result.trainable]
            self._initialize_fn = Guarded(composed.initialize)
            self._next_fn = Guarded(composed.next, self._prepare)
            self._get_model_weights = Guarded(composed.get_model_weights)
            self._set_model_weights = Guarded(composed.set_model_weights)

        def _prepare(self, state: Any, client_data: Sequence[Any]) -> tuple[Any, Any]:
            weights = getattr(getattr(state, "global_model_weights", None), "trainable", None)
            if weights is None or [np.shape(value) for value in weights] != self._shapes:
                raise InvalidArgumentError(
                    f"state is a {type(state).__name__} that is not of this process: give what its `initialize` or its "
                    "last `next` returned."
                )
            return state._replace(aggregator=aggregation.fresh_noise_key()), self._packer.pack(client_data)

    Process.__name__ = Process.__qualname__ = "AveragingProcess"
    return Process


def _example_spec(model: "tf.keras.Model", loss: Any) -> tuple["tf.TensorSpec", "tf.TensorSpec"]:
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
