import numpy as np
import pytest

from tfprivacy_ft import models
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.finetune import backbones
from tfprivacy_ft.keras_compat import keras

layers = keras.layers
X = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype("float32")


def convolutions(shape=(8, 8, 1)):
    inputs = keras.Input(shape)
    output = layers.Conv2D(5, 3, activation="relu", name="filters")(inputs)
    return keras.Model(inputs, output)


def test_a_copy_has_the_values_and_frozen_layers_and_shares_nothing():
    model = models.build_model("mlp", (4,), 3)
    model.layers[1].trainable = False
    copy = backbones.copy_of(model)
    for ours, theirs in zip(model.get_weights(), copy.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [layer.trainable for layer in copy.layers] == [layer.trainable for layer in model.layers]
    copy.set_weights([weight + 1 for weight in copy.get_weights()])
    assert not np.array_equal(model.get_weights()[0], copy.get_weights()[0])


def test_a_new_head_reads_rows_of_unit_length_and_prefers_no_class():
    classifier = backbones.with_new_head(convolutions(), num_classes=3)
    rows = classifier.features.predict(X, verbose=0)
    assert rows.shape == (6, 6 * 6 * 5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(classifier.model.predict(X, verbose=0), 1 / 3, rtol=1e-5)


def test_images_are_read_place_by_place_unless_places_are_many_or_of_unknown_number(monkeypatch):
    maps = convolutions()
    (filters,) = (layer for layer in maps.layers if layer.weights)
    filters.set_weights([filters.get_weights()[0], np.full(5, 0.1)])
    by_place = maps.predict(X, verbose=0)

    def rows(model):
        return backbones.with_new_head(model, num_classes=3).features.predict(X, verbose=0)

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    np.testing.assert_allclose(rows(maps), unit(by_place.reshape(6, -1)), rtol=1e-5, atol=1e-6)
    means = unit(by_place.mean(axis=(1, 2)))
    any_size = convolutions((None, None, 1))
    any_size.set_weights(maps.get_weights())
    np.testing.assert_allclose(rows(any_size), means, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(backbones, "_MOST_FEATURES", 179)
    np.testing.assert_allclose(rows(maps), means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: backbones.with_new_head(convolutions(), 4, hidden_units=(7,)),
                                  lambda: backbones.with_own_head(models.build_model("cnn", (8, 8, 1), 4)),
                                  lambda: backbones.with_own_head(keras.Sequential(
                                      [layers.Input((8, 8, 1)), layers.Flatten(), layers.Dense(4)]))])  # fmt: skip
def test_head_after_features_is_the_whole_and_shares_its_weights(make):
    classifier = make()
    classifier.head.set_weights([np.random.default_rng(1).normal(size=w.shape) for w in classifier.head.get_weights()])
    whole = classifier.model.predict(X, verbose=0)
    np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-5)
    parts = classifier.head.predict(classifier.features.predict(X, verbose=0), verbose=0)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    assert whole.std() > 0.01


def test_logits_stay_logits_for_a_loss_of_ones_own():
    model = keras.Sequential([layers.Input((8, 8, 1)), layers.Flatten(), layers.Dense(4)])
    classifier = backbones.with_own_head(model, probabilities=False)
    np.testing.assert_allclose(classifier.model.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-5)


def test_trainable_flags_come_back_also_inside_of_nested_models():
    inner = models.build_model("mlp", (4,), 3)
    inner.layers[1].trainable = False
    model = keras.Sequential([layers.Input((4,)), inner, layers.Dense(2)])
    flags = backbones.trainable_flags(model)
    for layer in model.layers:
        layer.trainable = False
    backbones.set_trainable_flags(model, flags)
    assert backbones.trainable_flags(model) == flags
    assert len(model.trainable_variables) == 4


def test_models_that_cannot_be_taken_apart_are_refused_in_one_sentence():
    inputs = keras.Input((4,))
    two = keras.Model(inputs, [layers.Dense(2)(inputs), layers.Dense(2)(inputs)])
    joined = keras.Model(inputs, layers.Add()([layers.Dense(2)(inputs), layers.Dense(2)(inputs)]))
    with pytest.raises(UnsupportedModelError, match="has several outputs"):
        backbones.with_own_head(two)
    with pytest.raises(UnsupportedModelError, match="does not end in a chain of layers with weights: give num_classes"):
        backbones.with_own_head(joined)
    with pytest.raises(UnsupportedModelError, match="no inputs of known shape"):
        backbones.copy_of(keras.Sequential([layers.Dense(2)]))
    with pytest.raises(UnsupportedModelError, match="is no row of features"):
        backbones.with_new_head(two, 3)
    with pytest.raises(InvalidArgumentError, match="num_classes=1 is not allowed"):
        backbones.with_new_head(joined, 1)
