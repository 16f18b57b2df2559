"""Inputs of several parts, by name: what fits a model, and what is refused."""

import numpy as np
import pytest

from tfprivacy_ft.errors import DatasetError
from tfprivacy_ft.finetune import inputs
from tfprivacy_ft.keras_compat import keras

WIDE, ABLE = np.ones([6, 3]), np.ones([6, 2])
BY_NAME = {"wide": WIDE, "able": ABLE}


@pytest.fixture(scope="module")
def models():
    """Models that take a list, a dictionary and a single input."""
    wide, able = keras.Input((3,), name="wide"), keras.Input((2,), name="able")
    output = keras.layers.Concatenate()([wide, able])
    listed = keras.Model([wide, able], output)
    return {
        "list": listed,
        "dictionary": keras.Model({"wide": wide, "able": able}, output),
        "one": keras.Model(wide, keras.layers.Activation("tanh")(wide)),
    }


@pytest.mark.parametrize(
    ("kind", "x"),
    [("list", BY_NAME), ("list", (WIDE, ABLE)), ("dictionary", BY_NAME), ("one", WIDE), ("one", {"wide": WIDE})],
)
def test_parts_fit_by_name_or_in_the_order_of_a_list(models, kind, x):
    assert len(inputs.checked(x, np.arange(6), models[kind])) == 6


@pytest.mark.parametrize(
    ("kind", "x", "sentence"),
    [
        ("list", {"wide": WIDE, "Able": ABLE}, "called Able and wide and the model takes able and wide: give"),
        ("dictionary", {"wide": WIDE}, "called wide and the model takes able and wide: give a dictionary"),
        ("dictionary", (WIDE, ABLE), "inputs without names and the model takes able and wide"),
        ("one", {"height": WIDE}, "called height and the model takes wide"),
        ("list", {"wide": ABLE, "able": WIDE}, r"of shape \(2,\) and \(3,\) and the model takes \(3,\) and \(2,\)"),
        ("list", (ABLE, WIDE), r"of shape \(2,\) and \(3,\) and the model takes \(3,\) and \(2,\)"),
        ("list", WIDE, r"of shape \(3,\) and the model takes \(3,\) and \(2,\)"),
    ],
)
def test_other_names_and_shapes_are_refused_in_one_sentence(models, kind, x, sentence):
    with pytest.raises(DatasetError, match=sentence):
        inputs.checked(x, np.arange(6), models[kind])
