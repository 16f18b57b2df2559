import numpy as np
import pytest
import tensorflow as tf

from tfprivacy_ft import models
from tfprivacy_ft.errors import DatasetError
from tfprivacy_ft.finetune import features
from tfprivacy_ft.keras_compat import IS_KERAS_3, keras

X = np.random.default_rng(0).normal(size=(2100, 4)).astype("float32")


@pytest.fixture(scope="module")
def model():
    return models.build_model("mlp", (4,), 3, hidden_units=(5,))


def test_features_in_memory_and_on_disk_are_what_the_model_predicts(model, tmp_path):
    expected = model.predict(X, batch_size=2100, verbose=0)
    np.testing.assert_allclose(features.compute(model, X), expected, rtol=1e-5)
    on_disk = features.compute(model, X, cache=tmp_path / "cache")
    assert isinstance(on_disk, np.memmap)
    np.testing.assert_array_equal(on_disk, features.compute(model, X))


def test_a_cache_is_found_again_and_only_by_the_same_rows_and_weights(model, tmp_path):
    features.compute(model, X[:9], cache=tmp_path)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    features.compute(model, X[:9], cache=tmp_path)
    assert file.stat().st_mtime_ns == written
    features.compute(model, X[:9] + 1, cache=tmp_path)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    other = features.compute(model, X[:9], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    np.testing.assert_array_equal(other, features.compute(model, X[:9]))


def test_a_folder_that_cannot_be_written_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot be kept in"):
        features.compute(model, X[:9], cache=tmp_path / "file")


class Doubled(keras.layers.Layer):
    """Python's `if` on a tensor, which TensorFlow rewrites."""

    def call(self, inputs):
        if tf.reduce_sum(inputs) > 0:
            return 2 * inputs
        return inputs


@pytest.mark.skipif(IS_KERAS_3, reason="Keras 3 refuses such a layer when the model is made")
def test_layers_may_branch_on_what_they_see():
    inputs = keras.layers.Input((4,))
    doubled = keras.Model(inputs, Doubled()(inputs))
    np.testing.assert_array_equal(features.compute(doubled, np.abs(X[:200])), 2 * np.abs(X[:200]))
