import math
import sys
from types import SimpleNamespace

import pytest

from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.plots import Curve, plot_clients, plot_runs

CENTRAL = Curve("central", "epoch", [1, 2, 3], [0.5, 0.7, 0.8], [1.0, 1.5, 1.9])
FEDERATED = Curve("federated", "round", [10, 20], [0.4, 0.6], [0.5, 0.8])


def test_what_is_drawn_is_what_was_given(tmp_path):
    figure = plot_runs([CENTRAL, FEDERATED], target_epsilon=2.0, references={"not private": 0.9})
    (accuracy, other_accuracy), (epsilon, _) = figure.axes[:2], figure.axes[2:]
    assert accuracy.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.7], [3, 0.8]]
    assert list(other_accuracy.lines[1].get_ydata()) == [0.9, 0.9]
    assert epsilon.lines[0].get_ydata().tolist() == [1.0, 1.5, 1.9]
    assert list(epsilon.lines[1].get_ydata()) == [2.0, 2.0]
    assert [axis.get_xlabel() for axis in figure.axes[2:]] == ["epoch", "round"]
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_drawing_leaves_pyplot_alone():
    before = "matplotlib.pyplot" in sys.modules
    plot_runs([CENTRAL])
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_history_becomes_a_curve():
    history = SimpleNamespace(epoch=[0, 1], history={"val_accuracy": [0.5, 0.6], "epsilon": [1.0, 1.2]})
    assert Curve.of_history(history, "run") == Curve("run", "epoch", [1, 2], [0.5, 0.6], [1.0, 1.2])
    with pytest.raises(InvalidArgumentError, match=r"no 'accuracy': train with plan.callbacks\(\)"):
        Curve.of_history(history, "run", accuracy="accuracy")


def test_bad_arguments_get_one_sentence():
    with pytest.raises(InvalidArgumentError, match="give at least one curve"):
        plot_runs([])
    with pytest.raises(InvalidArgumentError, match="lengths 2, 1 and 2"):
        Curve("run", "epoch", [1, 2], [0.5], [1.0, 2.0])


def test_clients_are_drawn_worst_first_with_their_means(tmp_path):
    figures = [0.9, 0.2, math.nan, 0.8] + [0.5] * 17  # twenty clients that have a figure: the worst tenth are two
    figure = plot_clients({"private": figures, "not private": [1.0] * 5})
    (axis,) = figure.axes
    values, edges, _ = axis.patches[1].get_data()
    assert values.tolist() == sorted(value for value in figures if not math.isnan(value))
    assert (edges[0], edges[-1]) == (0, 100) and len(edges) == 21
    mean, worst_tenth = axis.lines[0].get_ydata(), axis.lines[1].get_ydata()
    assert list(mean) == pytest.approx([0.52] * 2) and list(worst_tenth) == pytest.approx([0.35] * 2)
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts[:2] == ["private: mean 0.52, worst tenth 0.35", "not private: mean 1, worst tenth 1"]
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_of_losses_the_largest_are_the_worst():
    (axis,) = plot_clients({"private": [1.0, 3.0, 2.0]}, figure="loss", lower_is_better=True).axes
    assert axis.patches[1].get_data().values.tolist() == [3.0, 2.0, 1.0] and axis.get_ylabel() == "loss"
    assert list(axis.lines[1].get_ydata()) == [3.0, 3.0]


def test_clients_without_figures_are_refused():
    with pytest.raises(InvalidArgumentError, match="no models were given"):
        plot_clients({})
    with pytest.raises(InvalidArgumentError, match="models='private' has no figures"):
        plot_clients({"private": [math.nan]})
