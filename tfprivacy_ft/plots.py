"""Figures of trainings: accuracy, and the epsilon spent, side by side or one below the other.

Promises: matplotlib is imported when a figure is drawn, not before; no window, no pyplot, nothing global, so it works
without a display and in any thread. Knows nothing of TensorFlow, and computes no epsilon.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfprivacy_ft.errors import InvalidArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "plot_runs"]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run, seen after some of its epochs or rounds.

    Args:
      title: name of the run.
      unit: what `done` counts, such as `"epoch"` or `"round"`.
      done: epochs or rounds made, increasing.
      accuracy: accuracy after each of these, in [0, 1].
      epsilon: epsilon spent up to each of these.

    Raises:
      InvalidArgumentError: the three do not have the same length.

    Example:
      >>> Curve("central", "epoch", done=[1, 2], accuracy=[0.8, 0.9], epsilon=[0.5, 0.7]).unit
      'epoch'
    """

    title: str
    unit: str
    done: Sequence[int]
    accuracy: Sequence[float]
    epsilon: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.done) == len(self.accuracy) == len(self.epsilon):
            raise InvalidArgumentError(
                f"done, accuracy and epsilon have lengths {len(self.done)}, {len(self.accuracy)} and "
                f"{len(self.epsilon)}: give one value of each per point."
            )

    @classmethod
    def of_history(cls, history: Any, title: str, *, accuracy: str = "val_accuracy") -> "Curve":
        """The curve of what `model.fit` with a plan's callbacks returned.

        Args:
          history: the `keras.callbacks.History`.
          title: name of the run.
          accuracy: which figure of the history to draw.

        Raises:
          InvalidArgumentError: the history lacks epsilon or that figure.
        """
        figures = history.history
        for name in (accuracy, "epsilon"):
            if name not in figures:
                raise InvalidArgumentError(
                    f"the history holds {sorted(figures)} and no {name!r}: train with plan.callbacks() and a metric."
                )
        return cls(title, "epoch", [epoch + 1 for epoch in history.epoch], figures[accuracy], figures["epsilon"])


def plot_runs(
    curves: Sequence[Curve], *, target_epsilon: float | None = None, references: Mapping[str, float] | None = None
) -> "Figure":
    """Draws accuracy above and epsilon below, one column for each run, on common scales.

    Args:
      curves: the runs, at least one.
      target_epsilon: drawn as a line that epsilon must not cross.
      references: accuracies to compare with, by name, drawn as lines.

    Returns:
      A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
      InvalidArgumentError: there are no runs.

    Example:
      >>> figure = plot_runs([Curve("central", "epoch", done=[1, 2], accuracy=[0.8, 0.9], epsilon=[0.5, 0.7])])
      >>> len(figure.axes)
      2
    """
    from matplotlib.figure import Figure

    if not curves:
        raise InvalidArgumentError("no runs were given: give at least one curve.")
    figure = Figure(figsize=(1.0 + 4.0 * len(curves), 5.5), layout="constrained")
    grid = figure.subplots(2, len(curves), sharex="col", sharey="row", squeeze=False)
    for curve, (above, below) in zip(curves, grid.T, strict=True):
        above.set_title(curve.title)
        above.plot(curve.done, curve.accuracy, color="tab:blue", marker=".", label=curve.title)
        for (name, value), style in zip((references or {}).items(), _line_styles(), strict=False):
            above.axhline(value, color="tab:gray", linestyle=style, label=name)
        below.plot(curve.done, curve.epsilon, color="tab:red", marker=".", label="spent")
        if target_epsilon is not None:
            below.axhline(target_epsilon, color="tab:gray", linestyle="--", label="target")
            below.legend(loc="lower right")
        below.set_xlabel(curve.unit)
        below.xaxis.get_major_locator().set_params(integer=True)
    if references:
        grid[0, 0].legend(loc="lower right")
    grid[0, 0].set_ylabel("test accuracy")
    grid[1, 0].set_ylabel("epsilon")
    grid[1, 0].set_ylim(bottom=0)
    return figure


def _line_styles() -> list[Any]:
    return ["--", ":", "-.", (0, (1, 4)), (0, (5, 5))]
