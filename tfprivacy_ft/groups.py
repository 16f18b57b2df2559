"""Figures of a classifier by class and by group: where a private model fails first.

Clip and noise cost small groups more than large ones, and a mean over all examples hides it. Figures are counted, not
noised: those of private data are releases that no epsilon covers, which `NOT_NOISED` says wherever they are shown. Knows
no ledger; needs no TensorFlow of its own.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfprivacy_ft import _check
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError

__all__ = ["NOT_NOISED", "Figures", "Groups", "figures_by_group"]

NOT_NOISED = "These figures carry no noise: of private data they are a release that no epsilon covers."


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a model does on some examples.

    Args:
      count: examples, >= 1.
      accuracy: the share of them that it gets right, in [0, 1].
      auc: area under the ROC curve, in [0, 1]; None for more than two classes, where all examples are of one class, and where
        an output is not finite.
    """

    count: int
    accuracy: float
    auc: float | None = None


@dataclasses.dataclass(frozen=True)
class Groups:
    """Figures over all examples, over those of each class, and over those of each group.

    `str(groups)` is a small table.

    Args:
      overall: over all examples.
      classes: by label.
      groups: by name of the group; empty where none were given.
    """

    overall: Figures
    classes: dict[str, Figures]
    groups: dict[str, Figures]

    @property
    def worst(self) -> str:
        """The class or group of the lowest accuracy, as the table calls it; the smaller of two that are equal."""
        return min(self.rows()[1:], key=lambda row: (row[1].accuracy, row[1].count))[0]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values that strict JSON can hold."""
        return {**dataclasses.asdict(self), "worst": self.worst, "noise": NOT_NOISED}

    def to_json(self) -> str:
        """`to_dict` as strict JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def rows(self) -> list[tuple[str, Figures]]:
        """The lines of a table, as pairs of a label and figures."""
        lines = [("all", self.overall)]
        lines += [(f"class {name}", figures) for name, figures in self.classes.items()]
        return lines + list(self.groups.items())

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        with_auc = any(figures.auc is not None for _, figures in self.rows())
        lines = [f"{'':<{width}}  examples  accuracy" + ("    auc" if with_auc else "")]
        for label, figures in self.rows():
            auc = "" if not with_auc else "      -" if figures.auc is None else f"  {figures.auc:.3f}"
            lines.append(f"{label:<{width}}  {figures.count:>8,}  {figures.accuracy:>8.3f}{auc}")
        return "\n".join([*lines, f"Accuracy is lowest for {self.worst}.", NOT_NOISED])


def figures_by_group(model: Any, x: Any, y: Any, groups: Any = None, *, batch_size: int = 256) -> Groups:
    """Accuracy of a classifier over each class and each group; for two classes AUC, too.

    Args:
      model: a Keras model, or anything whose `predict` returns probabilities: [n, classes], or [n, 1] of the class 1.
      x: inputs of n examples, as the model takes them.
      y: labels in 0 .. classes - 1, [n] or [n, 1].
      groups: who each example belongs to, [n], or a dictionary of such by what they go by, as in {"sex": ..., "site": ...},
        whose groups are then called as in "sex = f". None for figures by class alone.
      batch_size: examples that are predicted at once.

    Returns:
      The figures.

    Raises:
      DatasetError: there are no examples, lengths differ, or a label is none of the model's classes.
      InvalidArgumentError: the model's outputs are no probabilities of classes.

    Example:
      >>> from types import SimpleNamespace
      >>> model = SimpleNamespace(predict=lambda x, **_: np.asarray(x))  # its inputs are its outputs
      >>> print(figures_by_group(model, [[0.9], [0.2], [0.4]], [1, 0, 1], ["a", "a", "b"]))
               examples  accuracy    auc
      all             3     0.667  1.000
      class 0         1     1.000      -
      class 1         2     0.500      -
      a               2     1.000  1.000
      b               1     0.000      -
      Accuracy is lowest for b.
      These figures carry no noise: of private data they are a release that no epsilon covers.

    Source: Bagdasaryan, Poursaeed & Shmatikov 2019, "Differential Privacy Has Disparate Impact on Model Accuracy".
    """
    _check.positive_integer(batch_size=batch_size)
    outputs = np.asarray(model.predict(x, verbose=0, batch_size=batch_size))
    return groups_of(outputs, _labels(y, outputs), groups)


def groups_of(outputs: np.ndarray, labels: np.ndarray, groups: Any = None) -> Groups:
    """`figures_by_group` of what a model gave, with labels [n] among its classes."""

    def over(chosen: np.ndarray) -> Figures:
        return figures_of(outputs[chosen], labels[chosen])

    classes = {str(label): over(labels == label) for label in np.unique(labels)}
    by_name = {name: over(members) for name, members in _members(groups, labels)}
    return Groups(figures_of(outputs, labels), classes, by_name)


def figures_of(outputs: np.ndarray, labels: np.ndarray) -> Figures:
    """Accuracy, and for two classes AUC, of probabilities [n, classes], or [n, 1] of the class 1, for n >= 1 labels."""
    guesses = outputs.argmax(axis=1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0.5).astype(np.int64)
    auc = _auc(labels, outputs[:, -1]) if outputs.shape[1] <= 2 else None
    return Figures(len(labels), float(np.mean(guesses == labels)), auc)


def _labels(y: Any, outputs: np.ndarray) -> np.ndarray:
    # Half-precision softmaxes pass 1 by a little; NaN is in no range.
    if outputs.ndim != 2 or not outputs.size or not ((outputs >= 0) & (outputs <= 1.01)).all():
        raise InvalidArgumentError(
            f"the model gives outputs of shape {outputs.shape} which are not all probabilities of classes: give a model with "
            "a softmax or sigmoid output, and some examples."
        )
    labels = np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != outputs.shape[:1]:
        raise DatasetError(
            f"y has the shape {np.shape(y)} and x holds {len(outputs)} examples: give one label for each."
        )
    classes = max(outputs.shape[1], 2)
    if labels.dtype.kind not in "biuf" or not np.isin(labels, np.arange(classes)).all():
        raise DatasetError(f"y holds labels that are not among the model's {classes} classes: give 0 to {classes - 1}.")
    return labels.astype(np.int64)


def _members(groups: Any, labels: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Each group's name, and which examples are its."""
    if groups is None:
        return []
    found: list[tuple[str, np.ndarray]] = []
    attributes = groups.items() if isinstance(groups, Mapping) else [("", groups)]
    for attribute, values in attributes:
        names = np.asarray([_text(value) for value in np.asarray(values).reshape(-1)])
        if names.shape != labels.shape:
            raise DatasetError(
                f"groups names the groups of {len(names)} examples, and there are {len(labels)}: name one for each."
            )
        prefix = f"{attribute} = " if attribute else ""
        found += [(f"{prefix}{name}", names == name) for name in np.unique(names)]
    return found


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not known"
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    if len(np.unique(labels)) < 2 or not np.isfinite(scores).all():
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))
