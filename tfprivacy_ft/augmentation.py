"""Several augmentations of each example, whose gradients are averaged before the clip.

An augmentation is a function of one example and a seed. It is called on every row by itself, so that no example can
reach another's rows, and whatever it does the clip bounds what an example adds: the K rows of an example are one example
to `PrivacyPlan(rows_per_example=K)`, which costs no privacy. `plan.batches(x, y, augment=...)` makes them after the draw,
anew in every step; `augmented_rows` once and for all, for features that are computed once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfprivacy_ft import _check
from tfprivacy_ft.arrays import nested_arrays, number_of_examples
from tfprivacy_ft.errors import InvalidArgumentError

__all__ = ["Augmentation", "Chain", "RandomFlip", "RandomShift", "augmented_rows"]

# Of one example, or a tuple or dictionary of its parts, and an int64 seed [2] for the random ops `tf.random.stateless_*` and
# `tf.image.stateless_*`; to an example of the same shapes and dtypes.
Augmentation = Callable[[Any, tf.Tensor], Any]

_AT_ONCE = 1024  # rows that `augmented_rows` holds as tensors


class _OfAllRows:
    """An augmentation of this module: it knows how to do many examples at once, and still lets no row see another."""

    def rows(self, x: Any, seed: tf.Tensor) -> Any:
        """All rows of x, each by draws of its own."""
        raise NotImplementedError

    def __call__(self, example: Any, seed: tf.Tensor) -> Any:
        """One example."""
        several = tf.nest.map_structure(lambda part: part[tf.newaxis], example)
        return tf.nest.map_structure(lambda part: part[0], self.rows(several, seed))


@dataclasses.dataclass(frozen=True)
class RandomShift(_OfAllRows):
    """Moves an image by up to `pixels` up or down, and left or right; what comes in from outside mirrors the edge.

    Args:
      pixels: >= 1, at most the image's smaller side.

    Raises:
      InvalidArgumentError: pixels is outside its range, or what is moved is no image [height, width, channels].

    Example:
      >>> RandomShift(1)(tf.ones([4, 4, 1]), tf.constant([1, 2], tf.int64)).shape
      TensorShape([4, 4, 1])

    Source: De et al. 2022, "Unlocking High-Accuracy Differentially Private Image Classification through Scale", section 4.2.
    """

    pixels: int = 2

    def __post_init__(self) -> None:
        _check.positive_integer(pixels=self.pixels)

    def rows(self, x: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Images [rows, height, width, channels], each moved by itself."""
        height, width = _image_size(x, self)
        _check.at_most("the image's smaller side", min(height, width), pixels=self.pixels)
        moves = tf.random.stateless_uniform([tf.shape(x)[0], 2], seed, -self.pixels, self.pixels + 1, tf.int32)
        x = tf.gather(x, _mirrored(moves[:, :1], height), axis=1, batch_dims=1)
        return tf.gather(x, _mirrored(moves[:, 1:], width), axis=2, batch_dims=1)


def _mirrored(moves: tf.Tensor, size: int) -> tf.Tensor:
    """Where the pixels of each moved axis come from, [rows, size]."""
    places = tf.range(size) + moves
    return tf.where(places < 0, -1 - places, tf.where(places < size, places, 2 * size - 1 - places))


@dataclasses.dataclass(frozen=True)
class RandomFlip(_OfAllRows):
    """Mirrors an image left to right, half of the time.

    Raises:
      InvalidArgumentError: what is mirrored is no image [height, width, channels].

    Example:
      >>> RandomFlip()(tf.ones([4, 4, 1]), tf.constant([1, 2], tf.int64)).shape
      TensorShape([4, 4, 1])
    """

    def rows(self, x: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Images [rows, height, width, channels], each mirrored or not."""
        _image_size(x, self)
        flips = tf.random.stateless_uniform([tf.shape(x)[0], 1, 1, 1], seed) < 0.5
        return tf.where(flips, tf.reverse(x, [2]), x)


@dataclasses.dataclass(frozen=True)
class Chain(_OfAllRows):
    """One augmentation after the other, each with draws of its own.

    Args:
      steps: the first one first.

    Example:
      >>> Chain((RandomFlip(), RandomShift(2)))(tf.ones([4, 4, 1]), tf.constant([1, 2], tf.int64)).shape
      TensorShape([4, 4, 1])
    """

    steps: tuple[Augmentation, ...]

    def rows(self, x: Any, seed: tf.Tensor) -> Any:
        """All rows of x, after all steps."""
        count = tf.shape(tf.nest.flatten(x)[0])[0]
        for number, step in enumerate(self.steps):
            own = tf.random.experimental.stateless_fold_in(seed, number)
            x = _each(x, tf.random.stateless_uniform([count, 2], own, None, None, tf.int64), step)
        return x


def _image_size(x: tf.Tensor, augment: Any) -> tuple[int, int]:
    if tf.nest.is_nested(x) or x.shape.rank != 4 or None in x.shape.as_list()[1:3]:
        shape = "several parts" if tf.nest.is_nested(x) else f"the shape {x.shape.as_list()[1:]}"
        raise InvalidArgumentError(
            f"{type(augment).__name__} is for images [height, width, channels] and an example has {shape}: reshape x, or "
            "give a function of your own."
        )
    return x.shape[1], x.shape[2]


def augmented_rows(
    x: Any, y: Any, augment: Augmentation, augmentations: int, *, seed: int | None = None
) -> tuple[Any, Any]:
    """K rows for each example, one after the other, as `rows_per_example=K` takes them.

    The same rows come in every epoch. That is right where they are only read once, as for features of a frozen backbone
    that are kept; `plan.batches(x, y, augment=...)` makes fresh ones, and needs no room for them.

    Args:
      x: array of n examples, or a tuple or dictionary of such arrays.
      y: their labels, of the same length, in one array or several.
      augment: makes a row of an example and a seed.
      augmentations: K >= 1.
      seed: of all rows, for the same ones at each call; None draws it from the operating system. It protects nothing.

    Returns:
      x with n * K augmented rows, and y with each label K times.

    Raises:
      InvalidArgumentError: an argument is outside its range, or augment changes the shape or dtype of an example.
      DatasetError: there are no examples, or x and y differ in length.

    Example:
      >>> rows, labels = augmented_rows(np.zeros([5, 8, 8, 1]), np.arange(5), RandomFlip(), 2)
      >>> rows.shape, labels.tolist()
      ((10, 8, 8, 1), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    """
    size = number_of_examples(x, y)
    _check.positive_integer(augmentations=augmentations)
    if seed is not None:
        _check.non_negative_integer(seed=seed)
    arrays, labels = nested_arrays(x), nested_arrays(y)
    check_augmentation(augment, arrays)
    seeds = row_seeds(np.random.default_rng(seed), size * augmentations)
    expand = tf.function(lambda part, of_rows: rows_of(part, of_rows, augment, augmentations), reduce_retracing=True)
    parts = []
    for start in range(0, size, max(1, _AT_ONCE // augmentations)):
        chosen = slice(start, start + max(1, _AT_ONCE // augmentations))
        of_rows = seeds[chosen.start * augmentations : chosen.stop * augmentations]
        part = tf.nest.map_structure(lambda a, c=chosen: tf.convert_to_tensor(a[c]), arrays)
        parts.append(tf.nest.map_structure(lambda t: t.numpy(), expand(part, tf.constant(of_rows))))
    repeated = tf.nest.map_structure(lambda a: np.repeat(a, augmentations, axis=0), labels)
    return tf.nest.map_structure(lambda *each: np.concatenate(each), *parts), repeated


def row_seeds(source: np.random.Generator, rows: int) -> np.ndarray:
    """A seed for each row, int64 [rows, 2]."""
    return source.integers(np.iinfo(np.int64).max, size=[rows, 2], dtype=np.int64)


def rows_of(x: Any, seeds: tf.Tensor, augment: Augmentation, augmentations: int) -> Any:
    """The augmented rows of a batch, those of an example one after the other; adds ops to a graph.

    Args:
      x: tensors of m examples.
      seeds: int64 [m * augmentations, 2].
      augment: makes each row of its example alone.
      augmentations: rows of each example.
    """
    return _each(tf.nest.map_structure(lambda part: tf.repeat(part, augmentations, axis=0), x), seeds, augment)


def _each(x: Any, seeds: tf.Tensor, augment: Augmentation) -> Any:
    """Every row of x by itself: at once where that is known to be the same, else one after the other."""
    if isinstance(augment, _OfAllRows):
        return augment.rows(x, seeds[0])
    one = tf.nest.map_structure(lambda part: tf.TensorSpec(part.shape[1:], part.dtype), x)
    return tf.map_fn(lambda row: augment(*row), (x, seeds), fn_output_signature=one)


def fresh_rows(augment: Augmentation, augmentations: int) -> Callable[[Any, Any, tf.Tensor, tf.Tensor], Any]:
    """Makes (x, y, sample_weight) with all rows of a batch (x, y, sample_weight, seeds) with one row for each example."""

    def expand(x: Any, y: Any, weight: tf.Tensor, seeds: tf.Tensor) -> Any:
        labels, weights = tf.nest.map_structure(lambda part: tf.repeat(part, augmentations, axis=0), (y, weight))
        return rows_of(x, seeds, augment, augmentations), labels, weights

    return expand


def check_augmentation(augment: Augmentation, arrays: Any) -> None:
    """Refuses what is no function, or changes shape or dtype of an example; looks at no row of the data.

    Raises:
      InvalidArgumentError: as it says.
    """
    if not callable(augment):
        raise InvalidArgumentError(
            f"augment={augment!r} is not allowed: give a function of an example and a seed, such as RandomShift(2)."
        )
    zeros = tf.nest.map_structure(lambda a: tf.zeros(a.shape[1:], tf.as_dtype(a.dtype)), arrays)
    made = augment(zeros, tf.constant([1, 2], tf.int64))
    given, got = _kinds(zeros), _kinds(made)
    if got != given:
        raise InvalidArgumentError(
            f"augment makes {got} of an example that is {given}: let it return the shape and dtype that it is given."
        )


def _kinds(example: Any) -> Any:
    def kind(part: Any) -> str:
        part = tf.convert_to_tensor(part)
        return f"{part.dtype.name}{part.shape.as_list()}"

    return tf.nest.map_structure(kind, example)
