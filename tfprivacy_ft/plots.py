"""Figures of trainings: accuracy and the epsilon spent, and how a model does on each of many clients.

Promises: matplotlib is imported when a figure is drawn, not before; no window, no pyplot, nothing global, so it works
without a display and in any thread. Knows nothing of TensorFlow, and computes no epsilon.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfprivacy_ft.errors import InvalidArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tfprivacy_ft.groups import Groups

__all__ = ["Curve", "plot_clients", "plot_groups", "plot_runs"]


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


def plot_clients(
    models: Mapping[str, Sequence[float]], *, figure: str = "accuracy", lower_is_better: bool = False
) -> "Figure":
    """Draws how far apart clients are: one curve per model over the clients, its worst ones on the left.

    A band marks the worst tenth of the clients, a dot on its edge their mean, and a dashed line the mean over all of them.
    What is drawn of private clients is a release without noise.

    Args:
      models: for each model, by name, one figure per client, such as `evaluation.figures["accuracy"]`; NaN is left out.
      figure: what the figures are, as the axis is labelled.
      lower_is_better: whether the worst clients are those with the largest figures, as of a loss.

    Returns:
      A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
      InvalidArgumentError: there are no models, or one has no figures.

    Example:
      >>> drawn = plot_clients({"private": [0.7, 0.9, 0.8], "not private": [0.9, 0.95, 0.92]})
      >>> drawn.axes[0].get_ylabel()
      'accuracy'
    """
    from matplotlib.figure import Figure

    if not models:
        raise InvalidArgumentError("no models were given: give the clients' figures of at least one.")
    drawing = Figure(figsize=(6.5, 4.0), layout="constrained")
    axis = drawing.subplots()
    axis.axvspan(0, 10, color="0.93", linewidth=0, zorder=0)
    for number, (name, figures) in enumerate(models.items()):
        ranked = sorted((float(each) for each in figures if not math.isnan(each)), reverse=lower_is_better)
        if not ranked:
            raise InvalidArgumentError(f"models={name!r} has no figures: give one per client.")
        tenth = ranked[: math.ceil(len(ranked) / 10)]
        mean, worst = sum(ranked) / len(ranked), sum(tenth) / len(tenth)
        color, label = f"C{number}", f"{name}: mean {mean:.3g}, worst tenth {worst:.3g}"
        # A step for each client: its figure, over its share of the clients.
        edges = [100 * i / len(ranked) for i in range(len(ranked) + 1)]
        axis.stairs(ranked, edges, baseline=None, color=color, linewidth=1.8, label=label)
        axis.axhline(mean, color=color, linestyle="--", linewidth=0.9, zorder=1)
        axis.plot([0, 10], [worst, worst], color=color, linewidth=1.2, linestyle=":", zorder=3)
        axis.plot([10], [worst], color=color, marker="o", markeredgecolor="white", zorder=3)
    axis.plot([], [], color="0.4", linestyle="--", linewidth=0.9, label="mean over all clients")
    axis.plot([], [], color="0.4", linestyle=":", linewidth=1.2, marker="o", label="mean over the worst tenth")
    axis.set_xlim(0, 100)
    axis.xaxis.set_major_formatter("{x:.0f} %")
    axis.set_xlabel("clients, worst first")
    axis.set_ylabel(figure)
    axis.legend(loc="upper right" if lower_is_better else "lower right")
    return drawing


def plot_groups(groups: "Groups") -> "Figure":
    """Draws the accuracy over each class and each group, worst last, beside that over all examples.

    What is drawn of private data is a release without noise.

    Args:
      groups: what `tfprivacy_ft.groups.figures_by_group` returned.

    Returns:
      A matplotlib figure; `figure.savefig(path)` writes it.

    Example:
      >>> from tfprivacy_ft.groups import Figures, Groups
      >>> drawn = plot_groups(Groups(Figures(9, 0.8), {"0": Figures(6, 0.9), "1": Figures(3, 0.6)}, {}))
      >>> [text.get_text() for text in drawn.axes[0].get_yticklabels()]
      ['class 1 (3)', 'class 0 (6)']
    """
    from matplotlib.figure import Figure

    (_, overall), *parts = groups.rows()
    parts.sort(key=lambda part: part[1].accuracy)
    drawing = Figure(figsize=(6.5, 1.2 + 0.3 * len(parts)), layout="constrained")
    axis = drawing.subplots()
    # Names are of the data: a dollar sign in one begins no formula.
    labels = [f"{name} ({figures.count:,})".replace("$", r"\$") for name, figures in parts]
    axis.barh(range(len(parts)), [figures.accuracy for _, figures in parts], tick_label=labels, color="tab:blue")
    axis.axvline(overall.accuracy, color="0.3", linestyle="--", linewidth=0.9, label=f"all {overall.count:,} examples")
    axis.set_xlim(0, 1)
    axis.set_xlabel("accuracy")
    axis.legend(loc="lower left")
    return drawing


def _line_styles() -> list[Any]:
    return ["--", ":", "-.", (0, (1, 4)), (0, (5, 5))]
