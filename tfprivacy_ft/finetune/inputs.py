"""Arrays of examples, checked before anything is computed of them: one typed sentence for what cannot be trained on."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from tfprivacy_ft.arrays import nested_arrays, number_of_examples
from tfprivacy_ft.errors import DatasetError


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and labels of one length.

    Args:
      x: an array [n, ...], or a tuple or dictionary of them.
      y: labels [n], int32; or what the user's own loss takes, [n, ...].
    """

    x: Any
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    @property
    def shapes(self) -> dict[str, Any]:
        """Shapes and dtypes, which are public."""
        return {"x": [_shape(part) for part in tf.nest.flatten(self.x)], "y": _shape(self.y)}


def checked(x: Any, y: Any, model: Any, *, name: str = "x, y") -> Examples:
    """The arrays, if this model can read them.

    Args:
      x, y: what the user gave.
      model: a Keras model with inputs of known shape.
      name: what they are called in an error.

    Raises:
      DatasetError: they are empty, of different lengths, text, not finite, or have other names or another shape than the
        model's inputs.
    """
    try:
        x, y = nested_arrays(x), np.asarray(y)
    except ValueError as error:
        raise DatasetError(
            f"{name} holds rows of several shapes ({error}): give arrays whose rows are alike."
        ) from error
    number_of_examples(x, y)
    for part in tf.nest.flatten((x, y)):
        _refuse_text_and_gaps(part, name)
    _refuse_other_shapes(x, model, name)
    return Examples(x, y)


def labelled(examples: Examples, num_classes: int, *, several: bool, name: str = "y") -> Examples:
    """The examples with labels 0 .. num_classes - 1 as int32.

    Args:
      several: whether there has to be more than one class, as for training.

    Raises:
      DatasetError: y has another shape, holds other values, or a single class.
    """
    y = examples.y
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise DatasetError(f"{name} has shape {y.shape}: give one class number for each example, not one-hot rows.")
    classes = np.unique(y)
    if classes[0] < 0 or classes[-1] >= num_classes or not np.array_equal(classes, classes.astype(np.int64)):
        raise DatasetError(
            f"{name} holds labels other than the whole numbers from 0 to {num_classes - 1}: give one of these for each example, "
            "or num_classes for as many classes as there are."
        )
    if several and len(classes) < 2:
        raise DatasetError(f"{name} holds one class only: give examples of at least two classes.")
    return Examples(examples.x, y.astype(np.int32))


def _refuse_text_and_gaps(part: np.ndarray, name: str) -> None:
    if part.dtype.kind not in "biuf":
        raise DatasetError(
            f"{name} holds values of dtype {part.dtype}: give numbers, with texts and categories encoded as such before."
        )
    if part.dtype.kind == "f" and not np.isfinite(part).all():
        raise DatasetError(f"{name} holds NaN or infinity: fill gaps or drop these rows before.")


def _refuse_other_shapes(x: Any, model: Any, name: str) -> None:
    parts, inputs = _matched(x, model, name)
    given = [tuple(part.shape[1:]) for part in parts]
    wanted = [tuple(tensor.shape[1:]) for tensor in inputs]
    fits = len(given) == len(wanted) and all(map(_fits, given, wanted))
    if not fits:
        raise DatasetError(
            f"{name} has examples of shape {_join(given)} and the model takes {_join(wanted)}: bring them into that shape, all "
            "in the same way."
        )


def _matched(x: Any, model: Any, name: str) -> tuple[list[Any], list[Any]]:
    """The arrays and the model's inputs in one order: by name where one of them has names, since nobody sees another mix-up."""
    inputs = model.input if isinstance(model.input, dict) else {each.name: each for each in model.inputs}
    if not isinstance(x, dict) and not (isinstance(model.input, dict) and len(inputs) > 1):
        return tf.nest.flatten(x), list(inputs.values())
    if not isinstance(x, dict) or set(x) != set(inputs):
        given = f"has inputs called {_join(sorted(x))}" if isinstance(x, dict) else "has inputs without names"
        raise DatasetError(
            f"{name} {given} and the model takes {_join(sorted(inputs))}: give a dictionary of arrays by these names."
        )
    return [x[each] for each in inputs], list(inputs.values())


def _fits(given: tuple, wanted: tuple) -> bool:
    return len(given) == len(wanted) and all(w in (None, g) for g, w in zip(given, wanted, strict=True))


def _join(parts: Iterable[Any]) -> str:
    return " and ".join(map(str, parts))


def _shape(part: np.ndarray) -> dict[str, Any]:
    return {"shape": list(part.shape), "dtype": str(part.dtype)}
