"""Figures by class and group, against counts by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tfprivacy_ft.errors import DatasetError, InvalidArgumentError
from tfprivacy_ft.groups import NOT_NOISED, Figures, Groups, figures_by_group
from tfprivacy_ft.plots import plot_groups

ECHO = SimpleNamespace(predict=lambda x, **_: np.asarray(x))  # a model whose inputs are its outputs


def test_several_classes_have_accuracies_and_no_auc():
    outputs = np.eye(3)[[0, 0, 1, 2, 1, 1]]
    found = figures_by_group(ECHO, outputs, [0, 0, 1, 2, 2, 0], np.array(["f", "m", "f", "f", None, "m"], object))
    assert found.overall == Figures(6, 4 / 6)
    assert found.classes == {"0": Figures(3, 2 / 3), "1": Figures(1, 1.0), "2": Figures(2, 0.5)}
    assert found.groups == {"f": Figures(3, 1.0), "m": Figures(2, 0.5), "not known": Figures(1, 0.0)}
    assert found.worst == "not known"


@pytest.mark.parametrize("columns", [1, 2])
def test_two_classes_have_an_auc_where_both_are_there(columns):
    scores, labels = np.array([0.1, 0.6, 0.7, 0.4, 0.9]), np.array([0, 0, 1, 1, 1])
    outputs = scores[:, None] if columns == 1 else np.stack([1 - scores, scores], 1)
    found = figures_by_group(ECHO, outputs, labels[:, None], {"site": [1, 1, 1, 2, 2], "sex": [b"f"] * 5})
    assert found.overall == Figures(5, 3 / 5, roc_auc_score(labels, scores))
    assert found.groups["site = 1"] == Figures(3, 2 / 3, 1.0) and found.groups["site = 2"] == Figures(2, 0.5)
    assert found.groups["sex = f"] == found.overall
    assert found.classes["1"].auc is None and found.worst == "class 0"  # before site 2, of the same size


def test_the_worst_is_a_class_or_a_group_and_of_equal_ones_the_smaller():
    parts = {"a": Figures(5, 0.5), "b": Figures(3, 0.5), "c": Figures(1, 0.9)}
    assert Groups(Figures(9, 0.6), {"0": Figures(9, 0.6)}, parts).worst == "b"
    assert Groups(Figures(9, 0.6), {"0": Figures(4, 0.1), "1": Figures(5, 0.9)}, parts).worst == "class 0"


def test_a_keras_model_is_asked_for_its_probabilities():
    from helpers import layers
    from tensorflow import keras

    model = keras.Sequential([layers.Input((2,)), layers.Dense(1, "sigmoid", kernel_initializer="ones")])
    x = np.array([[1.0, 1.0], [-1.0, 0.0], [3.0, -1.0]])
    assert figures_by_group(model, x, [True, False, False]).overall == Figures(3, 2 / 3, 0.75)  # one tie


def test_the_table_and_the_json_say_that_nothing_was_noised():
    found = figures_by_group(ECHO, [[0.9], [0.2], [0.4]], [1, 0, 1], ["a", "a", "b"])
    assert str(found).endswith(NOT_NOISED) and "Accuracy is lowest for b." in str(found)
    read = json.loads(found.to_json())
    assert read["noise"] == NOT_NOISED and read["worst"] == "b"
    assert read["groups"]["b"] == {"count": 1, "accuracy": 0.0, "auc": None}


def test_the_worst_is_drawn_first_beside_the_mean(tmp_path):
    found = figures_by_group(ECHO, [[0.9], [0.2], [0.4]], [1, 0, 1], ["$a", "$a", "b$"])
    figure = plot_groups(found)
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == [0.0, 0.5, 1.0, 1.0]
    assert list(axis.lines[0].get_xdata()) == [found.overall.accuracy] * 2
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("outputs", "labels", "groups", "error", "sentence"),
    [
        ([0.1, 0.9], [0, 1], None, InvalidArgumentError, r"shape \(2,\) which are not all probabilities"),
        ([[-1.0], [0.2]], [0, 1], None, InvalidArgumentError, "softmax or sigmoid"),
        ([[0.0, 3.0], [0.1, 0.9]], [0, 1], None, InvalidArgumentError, "softmax or sigmoid"),
        ([[np.nan], [0.2]], [0, 1], None, InvalidArgumentError, "softmax or sigmoid"),
        ([[0.1], [0.9]], [0, 1, 1], None, DatasetError, r"y has the shape \(3,\) and x holds 2"),
        ([[0.1], [0.9]], [0, 2], None, DatasetError, "2 classes: give 0 to 1"),
        ([[0.1], [0.9]], ["no", "yes"], None, DatasetError, "2 classes: give 0 to 1"),
        ([[0.1], [0.9]], [0, 1], ["a"], DatasetError, "groups of 1 examples, and there are 2"),
        (np.zeros([0, 3]), [], None, InvalidArgumentError, "some examples"),
    ],
)
def test_bad_input_gets_one_sentence(outputs, labels, groups, error, sentence):
    with pytest.raises(error, match=sentence):
        figures_by_group(ECHO, outputs, labels, groups)
