"""`tfprivacy_ft.clipping.check`: a self-test of clipping on one's own model, before the first private step.

The engine's clipped sum is held against a loop over examples, variable by variable, and one example is exchanged to see
whether the others' gradients stay as they are. Knows no noise; the model is left as it was.
"""

import dataclasses
import io
import math
import warnings
from typing import Any

import numpy as np
import tensorflow as tf

from tfprivacy_ft import _check, keras_compat
from tfprivacy_ft.clipping import graph as graphs
from tfprivacy_ft.clipping import reference
from tfprivacy_ft.clipping.engine import ClippedSum, SlowClippingWarning, clipped_sum
from tfprivacy_ft.errors import InvalidArgumentError

_TOLERANCE = 1e-3  # of the largest entry; losses in 16 bits need a wider one
_TOLERANCE_HALF = 5e-2


@dataclasses.dataclass(frozen=True)
class VariableCheck:
    """What was found for one variable.

    Args:
      name: the variable's path.
      rule: the rule that found its gradients, or `"one by one"`.
      fast: whether that rule is a fast one.
      difference: largest difference between engine and loop, by the largest entry of the loop's sum; None where there
        is nothing to compare with.
    """

    name: str
    rule: str
    fast: bool
    difference: float | None


@dataclasses.dataclass(frozen=True)
class ClippingCheck:
    """What `check` found; `print` it for a table.

    Args:
      variables: one line for each trainable variable.
      longest: the largest norm that one example added alone, divided by the clip; at most 1 but for rounding.
      crosstalk: how much other examples' norms moved when one example was exchanged, by the largest norm; None where
        the model draws at random, so that two runs differ anyway.
      tolerance: what differences may be put down to rounding.
    """

    variables: tuple[VariableCheck, ...]
    longest: float
    crosstalk: float | None
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether sums, bound and isolation held."""
        differences = [v.difference for v in self.variables if v.difference is not None]
        held = [*differences, self.longest - 1.0, self.crosstalk or 0.0]
        return all(value <= self.tolerance for value in held)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("variable", "rule", "speed", "largest difference", box=None)
        for line in self.variables:
            shown = "-" if line.difference is None else f"{line.difference:.1e}"
            table.add_row(line.name, line.rule, "fast" if line.fast else "slow", shown)
        console = Console(width=110, record=True, file=io.StringIO())
        console.print(table)
        apart = "not looked at: the model draws at random" if self.crosstalk is None else f"{self.crosstalk:.1e}"
        return (
            f"{console.export_text()}"
            f"longest contribution  {self.longest:.6f} of the clip\n"
            f"seen of other rows    {apart}\n"
            f"{'passed' if self.passed else 'FAILED'}, differences up to {self.tolerance:g} being rounding"
        )


def check(
    model: Any, x: Any, y: Any, loss: Any, *, l2_norm_clip: float | None = None, examples: int = 8
) -> ClippingCheck:
    """Holds the clipping engine against a loop over examples, on this model, these data and this loss.

    Args:
      model: a built Keras model; its weights stay as they are.
      x: inputs, examples first: an array, or a list, tuple or dictionary of arrays.
      y: labels, examples first.
      loss: a Keras loss, its name, or a function of labels and outputs.
      l2_norm_clip: > 0; None takes the median norm of the examples, so that about half of them are clipped.
      examples: how many of the first examples to look at, >= 2.

    Returns:
      A `ClippingCheck`, with a line for each variable.

    Raises:
      InvalidArgumentError: an argument is outside its range.
      UnsupportedModelError: examples see each other in the model; the text names the layer and the fix.

    Example:
      >>> import numpy as np
      >>> model = keras_compat.keras.Sequential([keras_compat.keras.layers.Input((3,)), keras_compat.keras.layers.Dense(2)])
      >>> check(model, np.random.normal(size=(4, 3)), np.zeros(4), "sparse_categorical_crossentropy").passed
      True
    """
    if l2_norm_clip is not None:
        _check.positive(l2_norm_clip=l2_norm_clip)
    if not isinstance(examples, int) or examples < 2:
        raise InvalidArgumentError(f"examples={examples!r} is not allowed: give an integer of at least 2.")
    x, y = (tf.nest.map_structure(lambda a: tf.convert_to_tensor(np.asarray(a)[:examples]), part) for part in (x, y))
    if not model.built:
        model(x)
    engine = _Engine(model, _scalar(keras_compat.keras.losses.get(loss)))
    found = engine.run(x, y, 1.0)
    clip = float(np.median(found.norms)) if l2_norm_clip is None else float(l2_norm_clip)
    clip = clip if clip > 0 and math.isfinite(clip) else 1.0
    found = engine.run(x, y, clip)
    loop = found.loop if engine.draws else _loop(model, engine.loss, x, y, clip, found.independent)
    tolerance = _TOLERANCE_HALF if engine.is_half else _TOLERANCE
    scale = max((float(np.abs(s).max(initial=0.0)) for s in loop), default=0.0) or 1.0
    lines = []
    for variable, rule, mine, theirs in zip(model.trainable_variables, engine.rules, found.sums, loop, strict=True):
        difference = float(np.abs(mine - theirs).max(initial=0.0)) / scale
        lines.append(VariableCheck(keras_compat.name_of(variable), rule, rule != _SLOW, difference))
    rows = [(reference.row(x, i), reference.row(y, i)) for i in range(len(found.norms))]
    longest = max(reference.norm(engine.run(*row, clip).sums) / clip for row in rows)
    crosstalk = None if engine.draws else _crosstalk(engine, found.norms, x, y, clip)
    return ClippingCheck(tuple(lines), longest, crosstalk, tolerance)


_SLOW = "one by one"


@dataclasses.dataclass(frozen=True)
class _Found:
    sums: list[np.ndarray]
    loop: list[np.ndarray]
    independent: list[np.ndarray]
    norms: np.ndarray


class _Engine:
    """The engine on one model and loss, traced once for batches of any size."""

    def __init__(self, model: Any, loss: Any):
        self.loss, self._model = loss, model
        self._variables = [keras_compat.tensorflow_variable(v) for v in model.trainable_variables]
        self.rules: list[str] = []
        self.draws = self.is_half = False
        self._step = tf.function(self._traced, reduce_retracing=True, autograph=False)

    def run(self, x: Any, y: Any, clip: float) -> _Found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowClippingWarning)  # the table says which
            *parts, norms = self._step(x, y, tf.constant(clip))
        sums, loop, independent = ([np.asarray(t, np.float64) for t in part] for part in parts)
        return _Found(sums, loop, independent, norms.numpy())

    def _traced(self, x: Any, y: Any, clip: tf.Tensor):
        loss = _total(self.loss(y, self._model(x, training=True)), self._model)
        behind = graphs.ancestors([loss])
        self.draws = any(graphs.is_random(op) or graphs.draws_inside(op) for op in behind)
        self.is_half = any(t.dtype in (tf.bfloat16, tf.float16) for op in behind for t in op.outputs)
        found: ClippedSum = clipped_sum(loss, self._variables, clip)
        named = found.rules or [(_SLOW,)] * len(self._variables)
        self.rules = [" and ".join(dict.fromkeys(names)) or "not used" for names in named]
        # A second run of the model would draw anew, so that the loop has to be over this one's ops.
        loop = clipped_sum(loss, self._variables, clip, one_by_one_only=True).sums if self.draws else found.sums
        pairs = zip(found.data_independent, self._variables, strict=True)
        independent = [tf.zeros(v.shape) if g is None else g for g, v in pairs]
        return found.sums, loop, independent, found.norms


def _scalar(loss: Any) -> Any:
    """The loss as a number: the mean, where it is one for each example."""

    def scalar(y: Any, outputs: Any, **options: Any) -> tf.Tensor:
        return tf.reduce_mean(loss(y, outputs, **options))

    return scalar


def _loop(model: Any, loss: Any, x: Any, y: Any, clip: float, independent: list[np.ndarray]) -> list[np.ndarray]:
    """The clipped sum by its definition; regularisers that no data reach are outside of the clip."""

    def with_losses(labels: Any, outputs: Any) -> tf.Tensor:
        return _total(loss(labels, outputs), model)

    each = reference.per_example_gradients(model, with_losses, x, y)
    own = [[g - i for g, i in zip(gradients, independent, strict=True)] for gradients in each]
    return [np.asarray(s) for s in reference.clipped_sum(own, clip)]


def _total(value: tf.Tensor, model: Any) -> tf.Tensor:
    """The loss with what layers add to it."""
    return tf.add_n([value, *(tf.cast(extra, value.dtype) for extra in model.losses)])


def _crosstalk(engine: _Engine, norms: np.ndarray, x: Any, y: Any, clip: float) -> float:
    """How much the other examples' norms move when the first example is replaced by the second."""

    def exchanged(part: tf.Tensor) -> tf.Tensor:
        return tf.concat([part[1:2], part[1:]], 0)

    moved = engine.run(tf.nest.map_structure(exchanged, x), tf.nest.map_structure(exchanged, y), clip).norms
    largest = float(np.max(norms[1:], initial=0.0)) or 1.0
    return float(np.max(np.abs(moved[1:] - norms[1:]), initial=0.0)) / largest
