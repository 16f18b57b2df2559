"""The average of the weights over the steps of a training, as a Keras callback.

Noise moves private weights about where they would settle, and an average over steps takes much of it back. It costs no
privacy: it is computed from weights that were released before (post-processing). Promises: frozen weights are not
touched; a step that did not happen (refused by the budget, or a part of a logical batch) does not count; the first
average is the weights after the first step, so that what a training begins with has no share in it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.keras_compat import keras, tensorflow_variable

__all__ = ["WeightAveraging"]

_ORDER = 3  # of the polynomial by whose values steps are weighted where no decay is given
_STEPS = "steps"


class WeightAveraging(keras.callbacks.Callback):
    """Keeps an average of the trainable weights; validates and ends with it.

    Step i of t has the weight decay^(t - i), over the sum of these weights: an exponential moving average without the bias
    towards its start that a fixed rate has. Without a decay it is i^3, roughly, so that the average reaches back over the
    last quarter of the steps so far, however many there are.

    A `fit` begins a new average, unless `load_state` gave one to go on with. With `steps_per_execution=k` only each k-th
    step is seen, and has the weight of k. Between epochs the model has the weights of the last step, which a checkpoint
    has to keep beside `state()`.

    Args:
      decay: in (0, 1), such as 0.99, which reaches back over about 1 / (1 - decay) steps; None goes by the steps made.
      use_averages: whether validation, and the model after `fit`, have the averages. False leaves the model alone, for
        `apply` to put them in.

    Raises:
      InvalidArgumentError: decay is outside its range.

    Example:
      >>> model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
      >>> model.compile("sgd", "mse")
      >>> _ = model.fit(np.ones([8, 2]), np.ones(8), callbacks=[WeightAveraging(0.9)], verbose=0)

    Source: Polyak & Juditsky 1992; De et al. 2022, "Unlocking High-Accuracy Differentially Private Image Classification
      through Scale", section 4.4; Shamir & Zhang 2013, section 4 (polynomial decay, for decay=None).
    """

    def __init__(self, decay: float | None = None, *, use_averages: bool = True):
        super().__init__()
        if decay is not None:
            _check.open_unit_interval(decay=decay)
        _check.boolean(use_averages=use_averages)
        self._decay, self._use_averages = decay, use_averages
        self._weights: list[tf.Variable] = []
        self._averages: list[tf.Variable] = []
        self._steps = tf.Variable(0, dtype=tf.int64, trainable=False, name="steps_averaged")
        self._seen = tf.Variable(0, dtype=tf.int64, trainable=False, name="iterations_seen")
        self._loaded: dict[str, np.ndarray] | None = None
        self._set_aside: list[tf.Tensor] | None = None
        self._move: Any = None

    @property
    def steps(self) -> int:
        """Steps that the average is over."""
        return int(self._steps)

    @property
    def averages(self) -> list[np.ndarray]:
        """The averages, in the order of the model's `trainable_variables`; empty before the first step."""
        return [average.numpy() for average in self._averages]

    def apply(self) -> None:
        """Gives the model the averages; without a step it keeps its weights."""
        for weight, average in zip(self._weights, self._averages, strict=True):
            weight.assign(tf.cast(average, weight.dtype))

    def state(self) -> dict[str, np.ndarray]:
        """Everything that `load_state` takes to go on, as arrays by name, for `np.savez` or a checkpoint of one's own."""
        return {_STEPS: self._steps.numpy()} | {f"average_{i}": each for i, each in enumerate(self.averages)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Lets the next `fit` go on with an average; the model has to have the weights of the step it was kept at.

        Args:
          state: what `state` returned, or what `np.load` read of it.

        Raises:
          InvalidArgumentError: it holds something else; what is of another model is found when `fit` begins to train.
        """
        found = {name: np.asarray(state[name]) for name in state}
        steps = found.get(_STEPS)
        if steps is None or steps.shape or steps < 0 or set(found) != {_STEPS, *_names(len(found) - 1)}:
            raise InvalidArgumentError(
                f"the state holds {sorted(found)}: give what state() of a WeightAveraging returned."
            )
        self._loaded = found

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Begins an average, or takes up the one that was loaded."""
        self._weights, self._averages, self._set_aside = [], [], None
        self._steps.assign(0 if self._loaded is None else int(self._loaded[_STEPS]))
        self._seen.assign(_iterations(self.model))
        if self.model.built:  # else the first batch makes its weights
            self._start()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Moves the average by the steps since the last call."""
        if not self._averages:
            self._start()
        self._move()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Sets the weights aside, and validates with the averages."""
        if self._use_averages and self._averages:
            self._set_aside = [tf.identity(weight) for weight in self._weights]
            self.apply()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Goes on with the weights."""
        if self._set_aside is not None:
            for weight, kept in zip(self._weights, self._set_aside, strict=True):
                weight.assign(kept)
            self._set_aside = None

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Leaves the averages in the model, and the average that was loaded behind."""
        self._loaded = None
        if self._use_averages:
            self.apply()

    def _start(self) -> None:
        """Makes the averages, and the function that moves them."""
        self._weights = [tensorflow_variable(weight) for weight in self.model.trainable_variables]
        starts = self._weights if self._loaded is None else self._of_this_model(self._loaded)
        self._averages = [
            tf.Variable(tf.cast(start, _kept_in(weight.dtype)), trainable=False, name="average")
            for weight, start in zip(self._weights, starts, strict=True)
        ]
        weights, averages, iterations = self._weights, self._averages, _iterations(self.model)

        @tf.function
        def move() -> None:
            before = self._steps.read_value()
            done = tf.maximum(tf.cast(iterations, tf.int64) - self._seen, 0)
            rate = _rate(self._decay, tf.cast(before, tf.float64), tf.cast(before + done, tf.float64))
            for weight, average in zip(weights, averages, strict=True):
                average.assign_add(tf.cast(rate, average.dtype) * (tf.cast(weight, average.dtype) - average))
            self._steps.assign_add(done)
            self._seen.assign_add(done)

        self._move = move.get_concrete_function()  # traced now, not in a step

    def _of_this_model(self, state: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = [state[name] for name in _names(len(state) - 1)]
        theirs, ours = [list(each.shape) for each in found], [weight.shape.as_list() for weight in self._weights]
        if theirs != ours:
            raise InvalidArgumentError(
                f"the averages that were loaded have the shapes {theirs} and the model's trainable weights {ours}: load the "
                "state of the same model, with the same layers frozen."
            )
        return found


def _names(count: int) -> list[str]:
    return [f"average_{i}" for i in range(count)]


def _iterations(model: Any) -> tf.Variable:
    return tensorflow_variable(model.optimizer.iterations)


def _kept_in(dtype: tf.DType) -> tf.DType:
    """A step of an average would round to nothing in 16 bits."""
    return tf.float32 if dtype.size < 4 else dtype


def _rate(decay: float | None, before: tf.Tensor, after: tf.Tensor) -> tf.Tensor:
    """How far the average over `before` steps goes towards the weights, which count for all steps up to `after`."""
    if decay is None:
        # The product of (i - 1) / (i + order) over these steps, in which nearly everything cancels.
        ratios = [tf.math.divide_no_nan(before + j, after + j) for j in range(_ORDER + 1)]
        return 1.0 - tf.reduce_prod(tf.stack(ratios))
    each = math.log(decay)
    return tf.math.divide_no_nan(tf.math.expm1((after - before) * each), tf.math.expm1(after * each))
