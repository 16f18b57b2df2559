"""An audit in one training run: canaries in the data of an ordinary private `fit`, and guesses which of them were there.

What is audited is the training itself, with its own optimizer, plan, sampler and ledger; only data and model get
something added. A canary is an example whose clipped gradient is as long as the clip, along a coordinate of its own; no
example can be easier to find in noisy sums. Its coin decides whether it is there, or a row that only fills its place; the
sums cannot tell that row from none. So how many examples there are is public and does not depend on the coins: the plan
is made for all data and all canaries, and its sampling probability and expected batch size stay as they are.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfprivacy_ft import _check
from tfprivacy_ft.arrays import nested_arrays, number_of_examples
from tfprivacy_ft.audit.bounds import epsilon_lower_bound
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.keras_compat import keras
from tfprivacy_ft.sampling import PADDING
from tfprivacy_ft.statement import figure

if TYPE_CHECKING:
    from tfprivacy_ft.plan import PrivacyPlan

__all__ = ["AuditResult", "Canaries"]

_SLOPE = 1e6  # of a canary's loss: far above any sensible clip


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """What an audit found, beside what was reported; `print` it for a statement.

    Args:
      epsilon_lower_bound: what epsilon really is at least, but for a probability of 1 - confidence.
      reported_epsilon: of what ran, by its ledger.
      delta: of both.
      num_canaries: coins tossed.
      guesses: coins guessed at, as settled before the training.
      correct: guesses that were right.
      confidence: how sure the lower bound is.
    """

    epsilon_lower_bound: float
    reported_epsilon: float
    delta: float
    num_canaries: int
    guesses: int
    correct: int
    confidence: float

    @property
    def holds(self) -> bool:
        """Whether the reported epsilon is not contradicted."""
        return self.epsilon_lower_bound <= self.reported_epsilon

    @property
    def ceiling(self) -> float:
        """The lower bound if all guesses had been right: a larger epsilon could not have been contradicted."""
        return epsilon_lower_bound(self.num_canaries, self.guesses, self.guesses, self.delta, self.confidence)

    def __str__(self) -> str:
        bound, ceiling = (math.floor(value * 1000) / 1000 for value in (self.epsilon_lower_bound, self.ceiling))
        if not self.holds:
            verdict = (
                "The report is contradicted: clipping, noise, sampling or accounts are not what they say, or this is the "
                f"one audit in {1 / (1 - self.confidence):.4g} that errs."
            )
        elif self.ceiling <= self.reported_epsilon:
            verdict = "The report is not contradicted, and so few guesses could not have done it: this proves nothing."
        else:
            verdict = "The report is not contradicted, which proves nothing: another attack may find more."
        return (
            f"epsilon >= {bound:g} at delta = {self.delta:g}, with {self.confidence:.4g} confidence; reported: "
            f"{figure(self.reported_epsilon)}.\n"
            f"{verdict}\n"
            f"  {self.correct:,} of {self.guesses:,} guesses were right, of {self.num_canaries:,} canaries; had all been, "
            f"the bound would be {ceiling:g}."
        )


class Canaries:
    """Canaries for one audit: tosses their coins, and wraps model and data so that an ordinary `fit` trains on them.

    Guarantees of the result hold whatever the optimizer, the model and the attack: only the coins count, which are fair,
    independent, of the operating system's randomness, and new in every object. The bound is best for SGD, where a
    canary's weight moves by just what was released of it; under `PerLayer()` a canary has its layer's share of the clip
    only, and the bound is weaker. The loss on a canary has weight 0, so that the model's own
    weights do not feel it; only the expected batch is shared with canaries.

    Args:
      model: a Keras model, not compiled; the training changes its weights. A `train_step` of its own is refused.
      x, y: arrays of n examples, or tuples, lists or dictionaries of such arrays.
      num_canaries: m >= 1; the more, the sharper the bound.
      guesses: r in [1, m], half of them "in" for those that moved most and half "out"; settled here, before anything is
        seen. The best choice grows with epsilon, and no epsilon above about log(r) - 1.1 can be contradicted; None takes
        a fifth of the canaries.
      sample_weight: a weight for each row, or None for ones.
      rows_per_example: as in the plan.

    Attributes:
      model: to be compiled and trained: the model with one weight more for each canary.
      num_examples: n + m, what the plan has to be made for.
      included: bool [m], the coins; only whoever keeps the score should look.

    Raises:
      InvalidArgumentError: an argument is outside its range.
      DatasetError: there are no examples, or x, y and sample_weight differ in length.
      UnsupportedModelError: the model has a `train_step` or `compute_loss` of its own, which would not be what is audited.

    Example:
      >>> import numpy as np
      >>> layers = keras.layers
      >>> model = keras.Sequential([layers.Input((3,)), layers.Dense(2)])
      >>> Canaries(model, np.zeros([40, 3]), np.zeros(40), num_canaries=100).num_examples
      140

    Source: Steinke, Nasr & Jagielski 2023, "Privacy Auditing with One (1) Training Run", Algorithm 1; Nasr et al. 2023,
    "Tight Auditing of Differentially Private Machine Learning", for gradients along one coordinate.
    """

    def __init__(
        self,
        model: Any,
        x: Any,
        y: Any,
        *,
        num_canaries: int,
        guesses: int | None = None,
        sample_weight: Any = None,
        rows_per_example: int = 1,
    ):
        _check.positive_integer(num_canaries=num_canaries, rows_per_example=rows_per_example)
        self.guesses = max(1, num_canaries // 5) if guesses is None else guesses
        _check.positive_integer(guesses=self.guesses)
        _check.at_most("num_canaries", num_canaries, guesses=self.guesses)
        _refuse_own_training(model)
        size = number_of_examples(x, y, sample_weight, rows_per_example=rows_per_example)
        self.num_canaries, self.num_examples = num_canaries, size + num_canaries
        self.included = np.random.default_rng().random(num_canaries) < 0.5  # keyed from the operating system

        rows = num_canaries * rows_per_example
        included = np.repeat(self.included, rows_per_example)

        def extended(array: np.ndarray) -> np.ndarray:
            # Canaries look like the first example, so that the model can be run on them; their weights hide it.
            return np.concatenate([array, np.resize(array[:rows_per_example], (rows, *array.shape[1:]))])

        x, y = tf.nest.map_structure(extended, (nested_arrays(x), nested_arrays(y)))
        numbers = np.where(included, np.arange(rows) // rows_per_example + 1, 0)
        numbers = np.concatenate([np.zeros(size * rows_per_example), numbers]).astype(np.int32)
        self._x, self._y = {"rows": x, "canary": numbers}, y
        own = np.ones(size * rows_per_example) if sample_weight is None else np.asarray(sample_weight)
        hidden = np.full((rows, *own.shape[1:]), PADDING, np.float32)
        hidden[included] = 0.0
        self._sample_weight = np.concatenate([own.astype(np.float32), hidden])
        self.model = _WithCanaries(model, num_canaries)

    def batches(self, plan: "PrivacyPlan", *, pad_to: int | None = None) -> Any:
        """The plan's Poisson batches of data and canaries, for `fit`; see `PrivacyPlan.batches`.

        Args:
          plan: made for `num_examples` examples.
          pad_to: as there.

        Raises:
          InvalidArgumentError: the plan was made for another number of examples.
        """
        return plan.batches(self._x, self._y, sample_weight=self._sample_weight, pad_to=pad_to)

    def result(self, plan: "PrivacyPlan", *, confidence: float = 0.95) -> AuditResult:
        """Guesses by what the training did to the canaries' weights, and counts.

        Args:
          plan: the one that trained, whose ledger is held against the bound.
          confidence: in (0, 1); settled before the training, too.

        Raises:
          InvalidArgumentError: nothing was trained, by another plan, or confidence is outside its range.
          UnsupportedEventError: the ledger has several accounts, which do not add up.
        """
        report = plan.report()
        scores = self.model.scores()
        if not report.accounts or not scores.any():
            raise InvalidArgumentError(
                "the canaries' weights did not move under this plan: train canaries.model by "
                "fit(canaries.batches(plan), callbacks=plan.callbacks()) first."
            )
        plan.recorder(self.model.optimizer)  # refuses an optimizer of another plan
        order = np.argsort(scores)
        out, into = np.split(order[self._guessed()], [self.guesses // 2])
        correct = int(np.sum(~self.included[out]) + np.sum(self.included[into]))
        bound = epsilon_lower_bound(self.num_canaries, self.guesses, correct, report.delta, confidence)
        return AuditResult(bound, report.epsilon, report.delta, self.num_canaries, self.guesses, correct, confidence)

    def _guessed(self) -> np.ndarray:
        """Places, among the canaries in order of their scores, of those guessed at: lowest ones and highest ones."""
        low = self.guesses // 2
        return np.r_[0:low, self.num_canaries - (self.guesses - low) : self.num_canaries]


class _CanaryLoss(keras.layers.Layer):
    """Adds a loss of value 0 whose gradient is `_SLOPE` in the weight of each canary of the batch."""

    def __init__(self, count: int):
        super().__init__(dtype="float32", name="canaries")
        self.table = self.add_weight(shape=(count, 1), initializer="zeros", name="table")

    def call(self, canary):
        weights = tf.gather(self.table, tf.maximum(canary - 1, 0))[:, 0]
        slopes = tf.where(canary > 0, _SLOPE, 0.0)
        self.add_loss(tf.reduce_sum(slopes * (weights - tf.stop_gradient(weights))))
        return canary


class _WithCanaries(keras.Model):
    """A model on x = {"rows": its own inputs, "canary": the number of each row's canary, or 0}."""

    def __init__(self, model: Any, count: int):
        super().__init__(name="with_canaries")
        self._model, self._canaries = model, _CanaryLoss(count)

    def call(self, inputs, training=None):
        self._canaries(inputs["canary"])
        return self._model(inputs["rows"], training=training)

    def scores(self) -> np.ndarray:
        """How far each canary's weight went down, [m]."""
        return -np.asarray(self._canaries.table)[:, 0]


def _refuse_own_training(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise InvalidArgumentError(f"model={model!r} is not allowed: give a Keras model.")
    for name in ("train_step", "compute_loss"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise UnsupportedModelError(
                f"{type(model).__name__} has a {name} of its own, which the audited training would not run: give a model that "
                "Keras trains."
            )
