"""Which weights are trained: what is frozen stays bit-identical, and what is trained is clipped exactly and fast."""

import numpy as np
import pytest
from finetune_models import attention_model, nested_model
from helpers import CrossEntropy, assert_exact, labels, rows

from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.finetune.trainable import train_all, train_last_layers, train_only_biases
from tfprivacy_ft.keras_compat import keras, short_name

layers = keras.layers


def _mlp():
    return keras.Sequential([keras.Input((6,)), layers.Dense(5, "tanh"), layers.Dense(4, "softmax")])


def _names(model):
    return [short_name(variable) for variable in model.trainable_variables]


@pytest.mark.parametrize(("make", "shape"), [(_mlp, (6,)), (nested_model, (6, 6, 2)), (attention_model, (5, 6))])
def test_biases_are_trained_exactly_and_fast_and_nothing_else_moves(make, shape, tmp_path):
    model = make()
    x, y = rows(*shape), labels()
    before, names = model.get_weights(), [short_name(w) for w in model.weights]
    part = train_only_biases(model)
    np.testing.assert_array_equal(part(x), model(x))
    assert_exact(part, CrossEntropy(), x, y, fast=True)
    moved = [not np.array_equal(b, a) for b, a in zip(before, model.get_weights(), strict=True)]
    head = [False] * (len(names) - 2) + [True] * 2
    # The bias of an attention's keys adds the same to all scores of a row: its gradient is nothing but rounding.
    free = {i for i, w in enumerate(model.weights) if "key" in w.name or "key" in getattr(w, "path", "")}
    wanted = [name in ("bias", "beta") or last for name, last in zip(names, head, strict=True)]
    assert [m for i, m in enumerate(moved) if i not in free] == [w for i, w in enumerate(wanted) if i not in free]

    part.save(tmp_path / "trained.keras")
    loaded = keras.models.load_model(tmp_path / "trained.keras", compile=False)
    np.testing.assert_array_equal(loaded(x), model(x))
    assert "_TrainedInPart" not in loaded.to_json()
    assert _names(train_only_biases(loaded)) == _names(part)


def test_the_last_layer_can_be_left_out_and_frozen_weights_are_listed_as_such():
    model = attention_model()
    part = train_only_biases(model, also_last=False)
    assert _names(part) == ["bias"] * 4 + ["beta"] + ["bias"] * 2
    assert sorted(map(short_name, part.non_trainable_weights)) == ["gamma"] + ["kernel"] * 6
    assert [id(w) for w in part.weights] == [id(w) for w in model.weights]


def test_batch_normalization_stays_frozen():
    model = nested_model(layers.BatchNormalization())
    assert _names(train_only_biases(model)) == ["bias", "bias", "kernel", "bias"]
    assert _names(train_last_layers(model, 3)) == ["kernel", "bias"] * 3  # passed over
    assert _names(train_all(model)) == ["kernel", "bias"] * 3


def test_the_last_layers_are_those_before_the_output_whatever_model_they_are_in():
    model = nested_model()
    assert train_last_layers(model, 1) is model
    assert _names(model) == ["kernel", "bias"]
    assert len(train_last_layers(model, 2).trainable_variables) == 4
    assert _names(train_last_layers(model, 3)) == ["gamma", "beta", "kernel", "bias", "kernel", "bias"]
    attention = train_last_layers(attention_model(), 3)
    assert _names(attention) == ["gamma", "beta", "kernel", "bias", "kernel", "bias"]
    assert len(train_last_layers(attention, 4).trainable_variables) == len(attention.weights)


def test_all_can_be_trained_again():
    model = attention_model()
    train_only_biases(model)
    train_last_layers(model)
    assert len(train_all(model).trainable_variables) == len(model.weights)


@pytest.mark.parametrize("count", [0, 1.5, 5])
def test_a_count_that_is_no_number_of_layers_is_refused(count):
    with pytest.raises(InvalidArgumentError, match=f"count={count}"):
        train_last_layers(nested_model(), count)


def test_models_without_biases_or_without_weights_are_refused():
    with pytest.raises(UnsupportedModelError, match="no bias"):
        train_only_biases(keras.Sequential([keras.Input((3,)), layers.Dense(2, use_bias=False)]))
    with pytest.raises(UnsupportedModelError, match="no weights yet"):
        train_last_layers(keras.Sequential([layers.Dense(2)]))
