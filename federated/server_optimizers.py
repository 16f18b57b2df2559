"""What the server does with a round's mean: SGD with momentum, Adagrad, Adam and Yogi (FedOpt).

They have the interface of `tff.learning.optimizers` and take the same steps, but need no TFF, and their learning rate can
be a schedule. They see noised means only, and cost no privacy.

Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295, Algorithm 2.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["LEARNING_RATE", "SGD", "Adagrad", "Adam", "Yogi"]

Schedule = float | Callable[[int], float]
State = collections.OrderedDict[str, Any]

LEARNING_RATE = "learning_rate"  # of a state; TFF's optimizers call it the same


@dataclasses.dataclass(frozen=True)
class SGD:
    """w <- w - learning_rate * a, with a <- momentum * a + g.

    Args:
        learning_rate: > 0, or a function of the round (from 0).
        momentum: in [0, 1).

    Example:
        >>> import tensorflow as tf
        >>> sgd = SGD(0.5)
        >>> _, weights = sgd.next(sgd.initialize([tf.TensorSpec([])]), [tf.constant(3.0)], [tf.constant(2.0)])
        >>> float(weights[0])
        2.0
    """

    learning_rate: Schedule
    momentum: float = 0.0

    def initialize(self, specs: Sequence["tf.TensorSpec"]) -> State:
        """The state before the first round, for weights of these shapes."""
        return _state(self.learning_rate, **({"accumulator": _filled(specs, 0.0)} if self.momentum else {}))

    def next(
        self, state: State, weights: Sequence["tf.Tensor"], gradients: Sequence["tf.Tensor"]
    ) -> tuple[State, list["tf.Tensor"]]:
        """One step."""
        rate, kept = state[LEARNING_RATE], {}
        if self.momentum:
            gradients = [self.momentum * a + g for a, g in zip(state["accumulator"], gradients, strict=True)]
            kept["accumulator"] = gradients
        stepped = [w - _as(rate, w) * g for w, g in zip(weights, gradients, strict=True)]
        return _state(rate, **kept), stepped


@dataclasses.dataclass(frozen=True)
class Adagrad:
    """w <- w - learning_rate * g / sqrt(p + epsilon), with p <- p + g².

    Args:
        learning_rate: > 0, or a function of the round (from 0).
        initial_preconditioner_value: >= 0, of p.
        epsilon: >= 0.
    """

    learning_rate: Schedule
    initial_preconditioner_value: float = 0.1
    epsilon: float = 1e-7

    def initialize(self, specs: Sequence["tf.TensorSpec"]) -> State:
        """The state before the first round, for weights of these shapes."""
        return _state(self.learning_rate, preconditioner=_filled(specs, self.initial_preconditioner_value))

    def next(
        self, state: State, weights: Sequence["tf.Tensor"], gradients: Sequence["tf.Tensor"]
    ) -> tuple[State, list["tf.Tensor"]]:
        """One step."""
        import tensorflow as tf

        rate = state[LEARNING_RATE]
        squares = [p + tf.square(g) for p, g in zip(state["preconditioner"], gradients, strict=True)]
        stepped = [
            w - _as(rate, w) * g / tf.sqrt(p + self.epsilon)
            for w, g, p in zip(weights, gradients, squares, strict=True)
        ]
        return _state(rate, preconditioner=squares), stepped


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam with bias correction.

    Args:
        learning_rate: > 0, or a function of the round (from 0).
        beta_1, beta_2: in [0, 1), decay of the means of gradients and of their squares.
        epsilon: > 0.
    """

    learning_rate: Schedule
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7

    def initialize(self, specs: Sequence["tf.TensorSpec"]) -> State:
        """The state before the first round, for weights of these shapes."""
        return _adaptive_state(self.learning_rate, specs, 0.0)

    def next(
        self, state: State, weights: Sequence["tf.Tensor"], gradients: Sequence["tf.Tensor"]
    ) -> tuple[State, list["tf.Tensor"]]:
        """One step."""
        import tensorflow as tf

        return _adaptive_step(self, state, weights, gradients, lambda p, g: p + (tf.square(g) - p) * (1 - self.beta_2))


@dataclasses.dataclass(frozen=True)
class Yogi:
    """Adam whose mean of squares moves by a step of fixed size towards the newest.

    Args:
        learning_rate: > 0, or a function of the round (from 0).
        beta_1, beta_2: in [0, 1), decay of the means of gradients and of their squares.
        epsilon: > 0.
        initial_preconditioner_value: >= 0, of the mean of squares.
    """

    learning_rate: Schedule
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-3
    initial_preconditioner_value: float = 1e-6

    def initialize(self, specs: Sequence["tf.TensorSpec"]) -> State:
        """The state before the first round, for weights of these shapes."""
        return _adaptive_state(self.learning_rate, specs, self.initial_preconditioner_value)

    def next(
        self, state: State, weights: Sequence["tf.Tensor"], gradients: Sequence["tf.Tensor"]
    ) -> tuple[State, list["tf.Tensor"]]:
        """One step."""
        import tensorflow as tf

        def towards(p, g):
            return p + (1 - self.beta_2) * tf.sign(tf.square(g) - p) * tf.square(g)

        return _adaptive_step(self, state, weights, gradients, towards)


def _adaptive_state(learning_rate: Schedule, specs: Sequence["tf.TensorSpec"], preconditioner: float) -> State:
    import tensorflow as tf

    return _state(
        learning_rate,
        step=tf.constant(0),
        accumulator=_filled(specs, 0.0),
        preconditioner=_filled(specs, preconditioner),
    )


def _adaptive_step(
    optimizer: Adam | Yogi,
    state: State,
    weights: Sequence["tf.Tensor"],
    gradients: Sequence["tf.Tensor"],
    towards: Callable[["tf.Tensor", "tf.Tensor"], "tf.Tensor"],
) -> tuple[State, list["tf.Tensor"]]:
    import tensorflow as tf

    step, rate = state["step"] + 1, state[LEARNING_RATE]
    means = [a + (g - a) * (1 - optimizer.beta_1) for a, g in zip(state["accumulator"], gradients, strict=True)]
    squares = [towards(p, g) for p, g in zip(state["preconditioner"], gradients, strict=True)]
    passed = tf.cast(step, tf.float32)
    corrected = rate * tf.sqrt(1 - tf.pow(optimizer.beta_2, passed)) / (1 - tf.pow(optimizer.beta_1, passed))
    stepped = [
        w - _as(corrected, w) * a / (tf.sqrt(p) + optimizer.epsilon)
        for w, a, p in zip(weights, means, squares, strict=True)
    ]
    return _state(rate, step=step, accumulator=means, preconditioner=squares), stepped


def _state(learning_rate: Any, **parts: Any) -> State:
    import tensorflow as tf

    # What a schedule says is put in before each round.
    rate = tf.constant(0.0) if callable(learning_rate) else tf.convert_to_tensor(learning_rate, tf.float32)
    return collections.OrderedDict([(LEARNING_RATE, rate), *parts.items()])


def _filled(specs: Sequence["tf.TensorSpec"], value: float) -> list["tf.Tensor"]:
    import tensorflow as tf

    return [tf.fill(spec.shape, tf.cast(value, spec.dtype)) for spec in specs]


def _as(rate: "tf.Tensor", like: "tf.Tensor") -> "tf.Tensor":
    import tensorflow as tf

    return tf.cast(rate, like.dtype)
