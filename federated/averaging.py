"""Builds federated averaging with differential privacy for each client.

Promises: one client moves the sum of a round by at most the clip; the server adds noise to the sum once, from a key that
is new in each call of `next`, and so does each client where it adds noise itself; under privacy the mean divides by the
constant `expected_clients_per_round` and weighs every client the same. The process states these facts itself, so the
sampler and the accounts cannot be told others. Knows nothing of the ledger.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from federated import client_work, packing, rounds, server_optimizers, side_by_side, stateless
from federated.process import AveragingFacts, AveragingProcess, Schedule, loss_name, rate_at
from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError

if TYPE_CHECKING:
    import tensorflow as tf

    from tfprivacy_ft.moving_clip import Adaptive

__all__ = ["build_averaging", "spec_of"]


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
    jit_compile: bool = False,
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
            which nobody has to be trusted. Both noises may be used; the ledger holds an epsilon for each, and that of the
            server's noise is not amplified, since noise of clients shows how many there were.
        least_reports: How many clients' noise is in every sum, >= 0; those who see only models are protected by as much of
            it. More than 0 needs fixed or cyclic cohorts, and is refused in a round with fewer clients.
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
        jit_compile: Whether XLA compiles what clients do, for the engine "tensorflow". Cohorts are filled up to few sizes;
            the first round of each takes seconds. On CPUs, small dense networks get faster and convolutions slower.

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
    run, weights_class = _engine(engine, jit_compile)
    apart, keras_model = stateless.stateless_model(model, side_by_side.prepare)
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
        client_learning_rate=rate_at(client_learning_rate, 0),
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
        num_labels=_num_labels(keras_model, loss),
        few_shapes=jit_compile,
    )
    process = run(
        round_,
        packer,
        facts=facts,
        loss=loss,
        build=model,
        shapes=[value.shape for value in apart.trainable],
        kept=tuple(optimizer.initialize([])),
        schedules=(client_learning_rate, getattr(optimizer, "learning_rate", None)),
    )
    model()  # Keras 2 calls no model that is older than the last one made in a graph: there is a newer one now
    return process


def _engine(name: str, jit_compile: bool) -> tuple[Callable[..., AveragingProcess], Any]:
    """What builds a process, and the class of its weights."""
    if name == "tensorflow":
        from federated import tensorflow_engine

        return functools.partial(tensorflow_engine.build, jit_compile=jit_compile), rounds.Weights
    if jit_compile:
        raise InvalidArgumentError("jit_compile=True is not for TFF's worker: give engine='tensorflow', too.")
    from federated import runtime, tff_engine

    return tff_engine.build, runtime.require_tff().learning.models.ModelWeights


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


def _num_labels(model: "tf.keras.Model", loss: Any) -> int | None:
    """How many labels a loss takes, from 0; None where that is not known."""
    outputs = getattr(model, "outputs", None) or []
    ignores = loss.get_config().get("ignore_class") if hasattr(loss, "get_config") else None
    if len(outputs) != 1 or "sparse" not in loss_name(loss) or ignores is not None:
        return None
    return outputs[0].shape[-1]


def spec_of(model: "tf.keras.Model", loss: Any) -> tuple["tf.TensorSpec", "tf.TensorSpec"]:
    """Shape and type of one example and of one label, as a model and a loss take them."""
    import tensorflow as tf

    inputs, outputs = getattr(model, "inputs", None) or [], getattr(model, "outputs", None) or []
    if len(inputs) != 1 or len(outputs) != 1:
        raise UnsupportedModelError(
            f"the model has {len(inputs)} inputs and {len(outputs)} outputs that can be read: give a model with one of "
            "each made by the functional API, or example_spec for a subclassed one."
        )
    sparse = "sparse" in loss_name(loss)
    shape = outputs[0].shape[1:]
    return (
        tf.TensorSpec(inputs[0].shape[1:], inputs[0].dtype),
        tf.TensorSpec(shape[:-1], tf.int32) if sparse else tf.TensorSpec(shape, tf.float32),
    )
