"""How well a model does on each of many clients, and how far apart they are.

Promises: the model looks at every example once, in large batches, in inference mode; a client's figure is the mean over its
examples, the pooled one that over all examples. Nothing here is private: figures of clients are releases without noise.
It writes no ledger.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from federated.clients import ClientData
from tfprivacy_ft import _check
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError, UnsupportedModelError

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["ClientEvaluation", "Spread", "evaluate_clients"]

Metric = Callable[[np.ndarray, np.ndarray], Any]

_LOWER_IS_BETTER = "loss"


@dataclasses.dataclass(frozen=True)
class Spread:
    """One figure over clients, each counting the same, however many examples it has.

    Args:
        mean: Over the clients.
        deviation: Standard deviation over the clients.
        worst_decile: Mean over the tenth of the clients where it is worst, rounded up to whole clients.
        best_decile: Mean over the tenth where it is best.
        worst: Where it is worst of all.
        worst_client: The name of that client.
    """

    mean: float
    deviation: float
    worst_decile: float
    best_decile: float
    worst: float
    worst_client: Any


@dataclasses.dataclass(frozen=True, eq=False)
class ClientEvaluation:
    """Figures of one model on many clients; all of them releases without noise.

    Args:
        names: Of the clients.
        num_examples: Of each client, int64 (clients,).
        figures: By name, of each client, float64 (clients,): `"loss"`, `"accuracy"` and `"auc"` where they apply, and the
            metrics that were asked for. NaN where a client has none, such as an AUC on one class alone.
        pooled: The same figures over all examples together.
        lower_is_better: Names of the figures that are best where they are small.

    Example:
        >>> evaluation = ClientEvaluation(
        ...     ("ann", "bob"), np.array([3, 1]), {"accuracy": np.array([1.0, 0.0])}, {"accuracy": 0.75}
        ... )
        >>> evaluation.spread()["accuracy"].worst_client, evaluation.spread()["accuracy"].mean
        ('bob', 0.5)
    """

    names: tuple[Any, ...]
    num_examples: np.ndarray
    figures: Mapping[str, np.ndarray]
    pooled: Mapping[str, float]
    lower_is_better: frozenset[str] = frozenset({_LOWER_IS_BETTER})

    def spread(self) -> dict[str, Spread]:
        """How far apart the clients are in each figure; clients that have none are left out of it.

        Source: the worst and best tenth of the clients as in Li et al., "Fair Resource Allocation in Federated Learning",
            ICLR 2020, https://arxiv.org/abs/1905.10497.
        """
        return {name: self._spread(name, values) for name, values in self.figures.items()}

    def _spread(self, name: str, values: np.ndarray) -> Spread:
        has_one = np.flatnonzero(~np.isnan(values))
        if not len(has_one):
            return Spread(math.nan, math.nan, math.nan, math.nan, math.nan, worst_client=None)
        order = has_one[np.argsort(values[has_one] * (-1 if name in self.lower_is_better else 1), kind="stable")]
        ranked = values[order]  # worst first
        tenth = math.ceil(len(ranked) / 10)
        return Spread(
            mean=float(ranked.mean()),
            deviation=float(ranked.std()),
            worst_decile=float(ranked[:tenth].mean()),
            best_decile=float(ranked[-tenth:].mean()),
            worst=float(ranked[0]),
            worst_client=self.names[order[0]],
        )

    def __str__(self) -> str:
        """A table: a line per figure, pooled and over clients."""
        titles = ("", "pooled", "mean", "worst tenth", "best tenth", "worst", "worst client")
        lines: list[tuple[str, ...]] = [titles]
        for name, spread in self.spread().items():
            of_clients = (spread.mean, spread.worst_decile, spread.best_decile, spread.worst)
            lines.append(
                (name, *(f"{value:.4f}" for value in (self.pooled[name], *of_clients)), str(spread.worst_client))
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        counts = f"{len(self.names):,} clients, {int(self.num_examples.sum()):,} examples"
        rows = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([counts, *rows])

    def to_json(self) -> str:
        """All of it as JSON; what is no finite number is null, and names of other kinds than text and numbers are text."""
        plain = {
            "clients": list(self.names),
            "num_examples": self.num_examples.tolist(),
            "figures": {name: [_or_none(value) for value in values] for name, values in self.figures.items()},
            "pooled": {name: _or_none(value) for name, value in self.pooled.items()},
            "spread": {
                name: {
                    key: _or_none(value) if isinstance(value, float) else value
                    for key, value in dataclasses.asdict(spread).items()
                }
                for name, spread in self.spread().items()
            },
        }
        return json.dumps(plain, allow_nan=False, default=str)


def evaluate_clients(
    model: "tf.keras.Model",
    clients: ClientData,
    *,
    loss: Any,
    metrics: Mapping[str, Metric] | None = None,
    lower_is_better: Sequence[str] = (),
    batch_size: int = 1024,
) -> ClientEvaluation:
    """Measures a model on each client and on all of them together.

    These figures are computed without noise: on clients that are private each is a release, which no epsilon covers. Measure
    on clients whose data may be known, or keep the figures inside.

    Args:
        model: A Keras model with one output; need not be compiled.
        clients: Held out from training, as by `ClientData.split`; only rows that somebody owns are looked at.
        loss: A name or a `tf.keras.losses.Loss`, as for `compile`; any reduction. With a crossentropy there are accuracy,
            and AUC where the output is a single number per example.
        metrics: Further figures by name: functions of labels (n, ...) and predictions (n, ...) that give (n,), or
            (n, ...), of which the mean is taken.
        lower_is_better: Names of those metrics that are best where they are small.
        batch_size: Examples at once, >= 1.

    Returns:
        A `ClientEvaluation`.

    Raises:
        InvalidArgumentError: An argument is outside its range, or a metric does not give one number per example.
        UnsupportedModelError: The model has several outputs.
        DatasetError: Labels do not fit the model's output.

    Example:
        >>> import tensorflow as tf
        >>> from federated import split_evenly
        >>> clients = split_evenly(np.ones([6, 2], "float32"), np.zeros(6), num_clients=3, seed=0)
        >>> model = tf.keras.Sequential([tf.keras.layers.Input([2]), tf.keras.layers.Dense(1, "sigmoid", trainable=False)])
        >>> evaluate_clients(model, clients, loss="binary_crossentropy").num_examples.tolist()
        [2, 2, 2]
    """
    import tensorflow as tf

    _check.positive_integer(batch_size=batch_size)
    if not isinstance(clients, ClientData):
        raise InvalidArgumentError(
            f"clients is a {type(clients).__name__}: give ClientData, as from federated.split_by_owner."
        )
    rows = np.concatenate(clients.rows)
    sizes = np.array([len(part) for part in clients.rows])
    y = clients.y[rows]
    predictions = _predict(model, clients.x[rows], batch_size)
    loss = tf.keras.losses.get(loss)
    per_example: dict[str, np.ndarray] = {"loss": _losses(loss, y, predictions)}
    classifies = "crossentropy" in _name(loss)
    if classifies:
        per_example["accuracy"] = _per_example("accuracy", _right(y, predictions, loss), len(y))
    for name, metric in (metrics or {}).items():
        if name in (*per_example, "auc"):
            raise InvalidArgumentError(f"metrics={name!r} is a figure that there is already: give it another name.")
        per_example[name] = _per_example(name, metric(y, predictions), len(y))
    if unknown := set(lower_is_better) - set(per_example):
        raise InvalidArgumentError(
            f"lower_is_better={sorted(unknown)} are no figures here: give some of {sorted(per_example)}."
        )
    owner = np.repeat(np.arange(len(sizes)), sizes)
    figures = {name: np.bincount(owner, values) / sizes for name, values in per_example.items()}
    pooled = {name: float(values.mean()) for name, values in per_example.items()}
    if classifies and predictions.size == len(y):
        ends = np.cumsum(sizes)[:-1]
        pairs = zip(np.split(y.reshape(-1) > 0.5, ends), np.split(predictions.reshape(-1), ends), strict=True)
        figures["auc"] = np.array([_auc(labels, scores) for labels, scores in pairs])
        pooled["auc"] = _auc(y.reshape(-1) > 0.5, predictions.reshape(-1))
    return ClientEvaluation(
        clients.names, sizes, figures, pooled, lower_is_better=frozenset({_LOWER_IS_BETTER, *lower_is_better})
    )


def _predict(model: "tf.keras.Model", x: np.ndarray, batch_size: int) -> np.ndarray:
    found = model.predict(x, batch_size=batch_size, verbose=0)
    if isinstance(found, list | tuple | dict):
        raise UnsupportedModelError(f"the model has {len(found)} outputs: give one with a single output.")
    return np.asarray(found, np.float32)


def _name(loss: Any) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__)).lower().replace("_", "")


def _threshold(loss: Any) -> float:
    """Where a single output turns from one class to the other: 0.5 for probabilities, 0 for logits."""
    config = loss.get_config() if hasattr(loss, "get_config") else {}
    return 0.0 if config.get("from_logits") else 0.5


def _losses(loss: Any, y: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """The loss of each example, whatever the reduction; over several labels of one example, their mean."""
    import tensorflow as tf

    of_each = getattr(loss, "call", loss)  # of a Loss object, that is what comes before its reduction
    if y.ndim == predictions.ndim - 1 and predictions.shape[-1] == 1:
        y = y[..., np.newaxis]  # as Keras does in training
    try:
        found = of_each(tf.convert_to_tensor(y), tf.convert_to_tensor(predictions))
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        raise DatasetError(
            f"labels of shape {y.shape} or their values do not fit predictions of shape {predictions.shape} under {_name(loss)}: "
            "give labels and a loss as in training."
        ) from error
    return _per_example("loss", found, len(y))


def _right(y: np.ndarray, predictions: np.ndarray, loss: Any) -> np.ndarray:
    """Whether each label was found: by the side of the threshold where each output is a class of its own, or by the largest."""
    if "binary" in _name(loss) or predictions.size == len(y):
        return (predictions.reshape(len(y), -1) > _threshold(loss)) == (y.reshape(len(y), -1) > 0.5)
    found = predictions.argmax(axis=-1)
    wanted = y.argmax(axis=-1) if y.shape == predictions.shape else y.reshape(found.shape)
    return found == wanted


def _per_example(name: str, values: Any, examples: int) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.shape[:1] != (examples,):
        raise InvalidArgumentError(
            f"metrics: {name!r} gave shape {array.shape} for {examples} examples; give one number per example."
        )
    return array.reshape(examples, -1).mean(axis=1)


def _auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties counting half; NaN if either is missing.

    Source: Hanley & McNeil 1982, "The Meaning and Use of the Area under a ROC Curve" (Mann and Whitney's statistic).
    """
    from scipy.stats import rankdata

    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives or np.isnan(scores).any():
        return math.nan
    return float((rankdata(scores)[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _or_none(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
