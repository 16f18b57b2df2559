"""Adapters: the same outputs before training, exact private gradients on the fast path, and a plain model afterwards."""

import numpy as np
import pytest
import tensorflow as tf
from finetune_models import attention_model, nested_model
from helpers import CrossEntropy, assert_exact, labels, rows

from tfprivacy_ft import keras_compat, models
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.finetune.lora import add_lora, merge_lora
from tfprivacy_ft.keras_compat import keras, short_name

layers = keras.layers


MODELS = {
    "mlp": (lambda: models.build_model("mlp", (6,), 4, hidden_units=(8, 5)), (6,)),
    "cnn": (lambda: models.build_model("cnn", (6, 6, 1), 4, filters=(3, 4), hidden_units=(5,)), (6, 6, 1)),
    "attention": (attention_model, (5, 6)),
}


def _adapted_layers(model):
    return [layer for layer in keras_compat.layers_inside(model) if hasattr(layer, "lora_kernel_a")]


def _trained(model, seed=0):
    """The model with adapters that do something."""
    random = np.random.default_rng(seed)
    for layer in _adapted_layers(model):
        layer.lora_kernel_b.assign(random.normal(size=layer.lora_kernel_b.shape) * 0.3)
    return model


def _names(model):
    return [short_name(variable) for variable in model.trainable_variables]


def _values(model):
    """Values by the layer's place in the model, but for adapters."""
    pairs = [
        (i, w) for i, layer in enumerate(keras_compat.layers_inside(model)) for w in keras_compat.own_weights(layer)
    ]
    return {(i, short_name(w)): np.asarray(w) for i, w in pairs if not short_name(w).startswith("lora")}


@pytest.mark.parametrize("name", MODELS)
def test_private_gradients_are_exact_and_fast_and_the_merged_model_computes_the_same(name):
    make, shape = MODELS[name]
    base = make()
    x, y = rows(*shape), labels()
    model = add_lora(base, rank=2, layers=lambda layer: getattr(layer, "units", 0) != 4, alpha=3.0)
    np.testing.assert_array_equal(model(x), base(x))
    _trained(model)
    assert np.abs(model(x) - base(x)).max() > 1e-3
    frozen = _values(model)
    head = [(i, short_name(w)) for i, w in _weights_of_last_layer(model)]
    assert_exact(model, CrossEntropy(), x, y, fast=True)
    after = _values(model)
    assert [key for key in frozen if not np.array_equal(frozen[key], after[key])] == head

    merged = merge_lora(model)
    np.testing.assert_allclose(merged(x), model(x), atol=1e-6)
    assert all(type(layer).__module__.startswith("keras.") for layer in keras_compat.layers_inside(merged))
    adapted = {
        (i, "kernel") for i, layer in enumerate(keras_compat.layers_inside(model)) if hasattr(layer, "lora_kernel_a")
    }
    plain = _values(merged)
    assert list(plain) == list(after)
    assert {key for key in plain if not np.array_equal(plain[key], after[key])} == adapted
    for layer, copy in zip(keras_compat.layers_inside(model), keras_compat.layers_inside(merged), strict=True):
        if hasattr(layer, "lora_kernel_a"):
            a, b = np.asarray(layer.lora_kernel_a), np.asarray(layer.lora_kernel_b)
            np.testing.assert_allclose(copy.kernel, np.asarray(layer._kernel) + 1.5 * (a @ b), atol=1e-6)


def _weights_of_last_layer(model):
    inside = keras_compat.layers_inside(model)
    place = max(i for i, layer in enumerate(inside) if keras_compat.own_weights(layer))
    assert inside[place] is model.layers[-1]
    return [(place, weight) for weight in keras_compat.own_weights(inside[place])]


def test_dense_and_einsum_layers_of_any_depth_are_adapted_by_default_and_the_head_is_trained_whole():
    base = attention_model()
    before = base.get_weights()
    model = add_lora(base)
    assert {layer.name for layer in _adapted_layers(model)} == {"query", "key", "value", "attention_output", "wide"}
    assert _names(model) == ["lora_kernel_a", "lora_kernel_b"] * 5 + ["kernel", "bias"]
    assert _names(add_lora(base, also_last=False)) == ["lora_kernel_a", "lora_kernel_b"] * 5
    assert len(base.trainable_variables) == len(before)
    assert {id(w) for w in base.weights}.isdisjoint(id(w) for w in model.weights)
    for value, same in zip(before, base.get_weights(), strict=True):
        np.testing.assert_array_equal(value, same)
    nested = add_lora(nested_model())
    assert [layer.name for layer in _adapted_layers(nested)] == ["top"]


@pytest.mark.parametrize(
    ("make", "chosen", "adapted"),
    [
        (attention_model, ["query", "value"], {"query", "value"}),
        (attention_model, ["attention"], {"query", "key", "value", "attention_output"}),
        (attention_model, ["head"], {"head"}),
        (nested_model, ["backbone"], {"filters", "top"}),
        (nested_model, lambda layer: isinstance(layer, layers.Conv2D), {"filters"}),
    ],
)
def test_layers_are_chosen_by_name_by_what_they_are_in_or_by_a_function(make, chosen, adapted):
    model = add_lora(make(), rank=3, layers=chosen)
    assert {layer.name for layer in _adapted_layers(model)} == adapted
    assert len(model.trainable_variables) == 2 * len(adapted) + (0 if "head" in adapted else 2)


def test_other_kinds_of_layers_are_exact_and_fast():
    inputs = keras.Input((2, 3, 3, 2))
    x = layers.Reshape((4, 2))(layers.Conv3D(2, 2, activation="tanh")(inputs))
    x = layers.Conv1D(4, 2, groups=2, activation="tanh")(x)
    x = layers.EinsumDense("btd,dhk->bhtk", (2, 3, 3), bias_axes="hk")(x)
    model = keras.Model(inputs, layers.Dense(4, "softmax")(layers.Flatten()(x)))
    model = _trained(add_lora(model, rank=1, layers=lambda layer: not isinstance(layer, layers.Dense), also_last=False))
    assert len(model.trainable_variables) == 6
    assert_exact(model, CrossEntropy(), rows(2, 3, 3, 2), labels(), fast=True)


def test_a_file_computes_the_same_and_training_goes_on_from_it(tmp_path):
    model = _trained(add_lora(attention_model(), rank=2))
    x = rows(5, 6)
    model.save(tmp_path / "adapted.keras")
    loaded = keras.models.load_model(tmp_path / "adapted.keras", compile=False)
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-6)
    again = add_lora(merge_lora(loaded), rank=2)
    np.testing.assert_allclose(again(x), model(x), atol=1e-6)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(again(x)[:, 0])
    gradients = tape.gradient(loss, again.trainable_variables)
    moved = [short_name(v) for v, g in zip(again.trainable_variables, gradients, strict=True) if np.abs(g).max() > 0]
    assert moved.count("lora_kernel_b") == 5


def test_the_merged_model_is_saved_as_a_plain_one(tmp_path):
    merged = merge_lora(_trained(add_lora(nested_model(), layers=["backbone"])))
    merged.save(tmp_path / "merged.keras")
    loaded = keras.models.load_model(tmp_path / "merged.keras", compile=False)
    np.testing.assert_array_equal(loaded(rows(6, 6, 2)), merged(rows(6, 6, 2)))
    assert "lora" not in merged.to_json()
    assert len(merged.trainable_variables) == len(merged.weights) == 8


def _unnamed():
    return models.build_model("mlp", (6,), 4, hidden_units=(5,))


def _constrained():
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, kernel_constraint="non_neg"), layers.Dense(2)])


class _Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense, self.head = layers.Dense(3), layers.Dense(2)

    def call(self, inputs):
        return self.head(self.dense(inputs))


def _subclassed():
    model = _Subclassed()
    model(rows(3))
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (_unnamed, {"rank": 0}, InvalidArgumentError, "rank=0"),
        (_unnamed, {"alpha": 0.0}, InvalidArgumentError, "alpha=0.0"),
        (_unnamed, {"layers": ["nowhere"]}, InvalidArgumentError, "'nowhere'"),
        (_unnamed, {"layers": []}, UnsupportedModelError, "No layer to adapt"),
        (_constrained, {}, UnsupportedModelError, "kernel constraint"),
        (lambda: add_lora(_unnamed()), {}, UnsupportedModelError, "adapters already"),
        (lambda: keras.Sequential([layers.Dense(2)]), {}, UnsupportedModelError, "no weights yet"),
        (_subclassed, {}, UnsupportedModelError, "No layer to adapt|cannot be copied"),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_one_sentence(make, options, error, words):
    with pytest.raises(error, match=words):
        add_lora(make(), **options)


def test_a_model_without_adapters_cannot_be_merged():
    with pytest.raises(UnsupportedModelError, match="no adapter"):
        merge_lora(_unnamed())
