"""How batches are drawn, and what each way is called in the accounts.

Amplification by sampling is real only if the sampling happened. `poisson_batches` draws each example independently, with
randomness from the operating system; whatever other batches a training saw are accounted for without amplification.
"""

import dataclasses
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfprivacy_ft import _check
from tfprivacy_ft.arrays import Memory, aligned, nested_arrays, number_of_examples, take_rows
from tfprivacy_ft.augmentation import Augmentation, check_augmentation, fresh_rows, row_seeds
from tfprivacy_ft.events import Event
from tfprivacy_ft.keras_compat import sources_of


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is known about the batches of some steps, enough to make an event of them.

    Args:
      sampler: `"poisson"`, `"shuffled"` (each example at most once in `pass_length` steps) or `"unknown"`.
      population: examples that could take part; None where that is not known.
      sampling_probability: for `"poisson"`.
      pass_length: steps of one pass, for `"shuffled"`.
    """

    sampler: str
    population: int | None = None
    sampling_probability: float | None = None
    pass_length: int | None = None

    def event(
        self,
        steps: int,
        *,
        noise_multiplier: float,
        l2_norm_clip: float | None,
        accumulation_steps: int = 1,
        examples_per_user: int | None = None,
    ) -> Event:
        """The event of `steps` steps that saw such batches, each in `accumulation_steps` micro-batches.

        It protects one example, or with `examples_per_user` all of a user's, of whom none has more. In batches that nobody
        vouches for, an example may be in every micro-batch, and moves the sum by as many clips.
        """
        if self.sampler == "unknown":
            noise_multiplier /= accumulation_steps
        common: dict[str, Any] = {
            "count": steps,
            "noise_multiplier": noise_multiplier,
            "population": self.population,
            "l2_norm_clip": l2_norm_clip,
        }
        if examples_per_user is not None:
            common |= {"unit": "user", "examples_per_user": examples_per_user}
        if self.sampler == "poisson":
            assert self.sampling_probability is not None
            return Event.poisson(sampling_probability=self.sampling_probability, **common)
        if self.sampler == "shuffled":
            assert self.pass_length is not None
            return Event.shuffled(passes=math.ceil(steps / self.pass_length), **common)
        return Event.unknown(**common)


UNKNOWN = Sampling("unknown")

PADDING = -0.0  # the weight of rows that only fill a batch: zero to Keras, and known to the clipping engine by its sign


def poisson_batches(
    x: Any,
    y: Any,
    *,
    batch_size: float,
    steps: int | None = None,
    sample_weight: Any = None,
    pad_to: int | None = None,
    accumulation_steps: int = 1,
    rows_per_example: int = 1,
    augment: Augmentation | None = None,
) -> tf.data.Dataset:
    """Batches for `model.fit` in which each example takes part independently with probability batch_size / n.

    Batches vary in size; the optimizer divides by the constant expected size. An empty draw comes as one row of zeros
    with weight 0, so that the step adds noise only, and counts. Rows that only fill a batch carry the weight -0.0, by
    which the clipping engine leaves them out altogether, activity regularisers included. Every pass draws anew.

    Args:
      x: array of n examples (n * rows_per_example rows), or a tuple, list or dictionary of such arrays.
      y: labels of the same length, in one array or several.
      batch_size: the expected batch size, in (0, n].
      steps: batches in one pass (an epoch of `fit`); None for ceil(n / batch_size).
      sample_weight: a weight for each row, or None for ones.
      pad_to: examples to pad every batch to with rows of weight 0, so that a training function compiled by XLA sees one
        shape; a larger draw is padded to the next multiple, never cut.
      accumulation_steps: micro-batches that each draw comes in, all of one size, for an optimizer with the same
        `accumulation_steps`. Without `pad_to` that size is the same for nearly all draws, and larger where one needs it.
      rows_per_example: consecutive rows that are one example, and are drawn together.
      augment: makes the `rows_per_example` rows of an example after it was drawn, anew in every step, such as
        `augmentation.RandomShift(2)`; x, y and sample_weight then hold one row for each example. Called on one example at
        a time.

    Returns:
      A dataset of (x, y, sample_weight) that knows its cardinality, `steps * accumulation_steps`.

    Raises:
      InvalidArgumentError: `batch_size`, `steps`, `pad_to`, `accumulation_steps` or `rows_per_example` is outside its
        range, or `augment` changes the shape or dtype of an example.
      DatasetError: there are no examples, x, y and sample_weight differ in length, or hold a part of an example.

    Example:
      >>> import numpy as np
      >>> batches = poisson_batches(np.zeros([100, 2]), np.zeros(100), batch_size=10)
      >>> int(batches.cardinality())
      10

    Source: Abadi et al. 2016, section 3.1 (lots); Mironov, Talwar & Zhang 2019 for the amplification that it gives.
    """
    _check.positive_integer(accumulation_steps=accumulation_steps, rows_per_example=rows_per_example)
    held = rows_per_example if augment is None else 1  # rows of each example in the arrays
    size = number_of_examples(x, y, sample_weight, rows_per_example=held)
    weights = np.ones(size * held, np.float32) if sample_weight is None else np.asarray(sample_weight, np.float32)
    # In one piece, since `np.take` copies what is not, all of it at each draw.
    arrays = tf.nest.map_structure(np.ascontiguousarray, (nested_arrays(x), nested_arrays(y)))
    _check.positive(batch_size=batch_size)
    _check.at_most("the number of examples", size, batch_size=batch_size)
    steps = math.ceil(size / batch_size) if steps is None else steps
    _check.positive_integer(steps=steps)
    if pad_to is not None:
        _check.positive_integer(pad_to=pad_to)
    if augment is not None:
        check_augmentation(augment, arrays[0])
    source = np.random.default_rng()  # keyed from the operating system; no global seed reaches it
    flat = [(array, Memory().array) for array in tf.nest.flatten(arrays)]

    usual = _usual_size(batch_size, size, accumulation_steps) if accumulation_steps > 1 and pad_to is None else 1

    def draw(_: Any) -> np.ndarray:
        """The rows of one draw, int64 [micro-batches, rows], with -1 where there are no more."""
        chosen = np.flatnonzero(source.random(size) < batch_size / size)
        examples = max(usual, _padded_size(math.ceil(len(chosen) / accumulation_steps), pad_to))
        drawn = np.full(accumulation_steps * examples * held, -1)
        drawn[: len(chosen) * held] = np.add.outer(chosen * held, np.arange(held)).reshape(-1)
        return drawn.reshape(accumulation_steps, -1)

    def take(drawn: np.ndarray) -> list[np.ndarray]:
        """One batch, flattened."""
        chosen, rows = drawn[drawn >= 0], len(drawn)
        batch = [take_rows(array, chosen, rows, empty) for array, empty in flat]
        batch.append(take_rows(weights, chosen, rows, aligned, fill=PADDING))
        return batch if augment is None else [*batch, row_seeds(source, rows // held * rows_per_example)]

    signature = tf.nest.map_structure(lambda a: tf.TensorSpec([None, *a.shape[1:]], a.dtype), (*arrays, weights))
    if augment is not None:
        signature = (*signature, tf.TensorSpec([None, 2], tf.int64))
    specs, drawing, taking = tf.nest.flatten(signature), _weakly(draw), _weakly(take)

    def batch_of(drawn: tf.Tensor) -> Any:
        parts = tf.numpy_function(taking, [drawn], [spec.dtype for spec in specs])
        known = [tf.ensure_shape(part, spec.shape) for part, spec in zip(parts, specs, strict=True)]
        return tf.nest.pack_sequence_as(signature, known)

    # Not `from_generator`, which takes some 30 ms to begin a pass.
    draws = tf.data.Dataset.range(steps).map(
        lambda step: tf.ensure_shape(tf.numpy_function(drawing, [step], tf.int64), [accumulation_steps, None])
    )
    dataset = draws.unbatch().map(batch_of)
    if augment is not None:
        dataset = dataset.map(fresh_rows(augment, rows_per_example))
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps * accumulation_steps)).prefetch(2)
    dataset.drawn_by = draw, take  # and so are the arrays, for as long as something reads from the data set
    return dataset


def _weakly(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function, for TensorFlow, which keeps what its graphs call until the program ends; something else keeps it alive."""
    reference = weakref.ref(function)

    def call(argument: Any) -> Any:
        found = reference()
        assert found is not None, "an iterator that outlives its data set"
        return found(argument)

    return call


def repeats_before_batching(dataset: tf.data.Dataset) -> bool:
    """Whether a pipeline repeats rows before it makes batches of them, so that one batch can hold a row several times.

    What functions inside `map`, `interleave` or a generator do is not seen.

    Example:
      >>> rows = tf.data.Dataset.range(10)
      >>> repeats_before_batching(rows.repeat().batch(4)), repeats_before_batching(rows.batch(4).repeat())
      (True, False)
    """
    pending: list[tuple[Any, bool]] = [(dataset, False)]
    while pending:
        step, is_batched = pending.pop()
        kind = type(step).__name__
        if is_batched and "Repeat" in kind:
            return True
        is_batched = is_batched or any(word in kind for word in ("Batch", "Window"))
        pending += [(source, is_batched) for source in sources_of(step)]
    return False


def _padded_size(drawn: int, pad_to: int | None) -> int:
    """Rows of a batch: at least one, and a multiple of `pad_to`."""
    unit = pad_to or 1
    return max(1, math.ceil(drawn / unit)) * unit


def _usual_size(batch_size: float, size: int, parts: int) -> int:
    """Rows of a micro-batch that hold all but one in about 30 000 draws."""
    deviation = math.sqrt(batch_size * (1 - batch_size / size))
    return math.ceil(min(batch_size + 4 * deviation, size) / parts)
