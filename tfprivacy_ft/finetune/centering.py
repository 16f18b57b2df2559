"""The mean of the rows that a head reads: released once, with noise, and taken off the rows while the head learns.

Features of images or texts have much in common that tells no class from another, and that uses up the clip. Without it the same
noise leaves more of what matters. The mean is one release among the others of the stage: in the ledger before it is
computed, within the budget. The trained head is put back to read the rows as they are, so the model stays what it was.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfprivacy_ft import accounting
from tfprivacy_ft.errors import BudgetExceededError
from tfprivacy_ft.events import Event
from tfprivacy_ft.keras_compat import keras
from tfprivacy_ft.ledger import Ledger
from tfprivacy_ft.noise import GaussianNoise

_ROWS = 4096  # added up at once
_LEAST_SCALE = 0.1


class Center(NamedTuple):
    """What is done to a row: (row - mean) / scale, after which rows have length 1 on average.

    Args:
      mean: float32, [features].
      scale: > 0.
    """

    mean: np.ndarray
    scale: float


def release_mean(
    rows: np.ndarray,
    event: Event,
    *,
    ledger: Ledger,
    target_epsilon: float,
    delta: float,
    rows_per_example: int = 1,
) -> np.ndarray:
    """The mean of rows of at most unit length over the examples, with Gaussian noise, as near to it as that lets one say.

    What the noise hides is shrunk away (James and Stein), so that with few examples the mean is near zero and not noise.

    Args:
      rows: float, [n * rows_per_example, features]; a longer row counts with length 1, one that is not finite as zeros.
      event: this release, of sensitivity 1 and of every example.
      ledger: gets the event before anything is computed.
      target_epsilon, delta: the budget over the whole ledger.
      rows_per_example: consecutive rows of which the mean counts as one example's row.

    Returns:
      float32, [features].

    Raises:
      BudgetExceededError: the budget has no room for it.
      LedgerError: the ledger cannot be written.

    Example:
      >>> event = Event.poisson(count=1, noise_multiplier=10.0, sampling_probability=1.0)
      >>> rows = np.full([5000, 4], 0.5, np.float32)
      >>> mean = release_mean(rows, event, ledger=Ledger.in_memory(delta=1e-5), target_epsilon=1.0, delta=1e-5)
      >>> bool(np.abs(mean - 0.5).max() < 0.02)
      True

    Source: Tramer & Boneh 2021, section 2.3, for private statistics of features; James & Stein 1961 for the shrinkage.
    """
    if max(account.epsilon for account in accounting.accounts([*ledger.events(), event], delta)) > target_epsilon:
        raise BudgetExceededError(
            f"the ledger leaves no room below the target {target_epsilon} for the mean of the features: stop here, or give "
            "Head(center=False) in a run of another folder."
        )
    ledger.settle([ledger.reserve(event)], event)
    noise, count = event.noise_multiplier, len(rows) // rows_per_example
    total = tf.constant(_sum(rows, rows_per_example))
    (noisy,) = GaussianNoise().draw([total], 1.0, noise)([total])
    mean = noisy.numpy() / count
    by_noise = (noise / count) ** 2 * len(mean)  # of the squared length
    return (mean * max(0.0, 1 - by_noise / max(mean @ mean, 1e-12))).astype(np.float32)


def _sum(rows: np.ndarray, rows_per_example: int) -> np.ndarray:
    """The sum over examples of the mean of each one's rows, float64: no example moves it by more than 1, whatever it holds."""
    total = np.zeros(rows.shape[1])
    for start in range(0, len(rows), _ROWS):
        part = np.asarray(rows[start : start + _ROWS], np.float64)
        with np.errstate(over="ignore"):
            lengths = np.linalg.norm(part, axis=1, keepdims=True)
        total += (np.where(np.isfinite(lengths), part, 0) / np.maximum(np.nan_to_num(lengths), 1)).sum(axis=0)
    return total / rows_per_example


def center_of(mean: np.ndarray) -> Center:
    """How rows of unit length are centered on a released mean.

    Example:
      >>> round(center_of(np.array([0.6, 0.0], np.float32)).scale, 3)
      0.8
    """
    return Center(mean, math.sqrt(max(1 - float(mean @ mean), _LEAST_SCALE**2)))


def center_rows(rows: np.ndarray, center: Center) -> np.ndarray:
    """Centers the rows where they stand, [n, features], and returns them."""
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        part -= center.mean
        part /= center.scale
    return rows


def centering_model(head: Any, center: Center) -> Any:
    """A model of the same layers as `head` that centers rows itself, batch by batch, for those that memory does not hold."""
    inputs = keras.Input(head.input_shape[1:])
    # An array: Keras would look through a list number by number, in every epoch.
    return keras.Model(inputs, head(keras.layers.Rescaling(1 / center.scale, -center.mean / center.scale)(inputs)))


def adapt(head: Any, center: Center) -> None:
    """Changes the weights of `head` so that it computes of centered rows what it computed of rows; `restore` undoes it.

    Args:
      head: a model whose first layer with weights is dense, with a bias, and reads the rows.
      center: of the rows.
    """
    dense = _first_dense(head)
    kernel, bias = dense.get_weights()
    dense.set_weights([kernel * center.scale, bias + center.mean @ kernel])


def restore(head: Any, center: Center) -> None:
    """Changes the weights of `head` so that it computes of rows what it computed of centered rows."""
    dense = _first_dense(head)
    kernel, bias = dense.get_weights()
    kernel = kernel / center.scale
    dense.set_weights([kernel, bias - center.mean @ kernel])


def _first_dense(head: Any) -> Any:
    return next(layer for layer in head.layers if layer.weights)
