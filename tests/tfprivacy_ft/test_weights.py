"""Pretrained models from files, and what is said where a file is missing, damaged or of another model."""

import os
import pathlib
import sys
import urllib.error

import h5py
import numpy as np
import pytest
import tensorflow as tf
from helpers import rows

from tfprivacy_ft import weights
from tfprivacy_ft.errors import InvalidArgumentError, WeightsError
from tfprivacy_ft.keras_compat import IS_KERAS_3

layers = tf.keras.layers


@pytest.fixture(scope="module")
def squeezenet_file():
    name = "squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5"
    here = pathlib.Path(__file__).resolve().parents[2]
    folders = [os.environ.get("TFPRIVACY_FT_DATA", ""), here.parent / "shared" / "data"]
    for folder in filter(None, folders):
        for path in (pathlib.Path(folder) / "squeezenet_imagenet_notop" / name, pathlib.Path(folder) / name):
            if path.is_file():
                return path
    pytest.skip(f"needs {name} in the folder that TFPRIVACY_FT_DATA names")


@pytest.fixture(scope="module")
def small():
    return tf.keras.Sequential([layers.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)])


def _write_weights_alone(path, model):
    """As Keras 2 and keras.applications keep them."""
    with h5py.File(path, "w") as file:
        held = [layer for layer in model.layers if layer.weights]
        file.attrs["layer_names"] = [layer.name.encode() for layer in held]
        for layer in held:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/weight{i}" for i in range(len(layer.weights))]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, value in zip(names, layer.get_weights(), strict=True):
                group.create_dataset(name, data=value)


# SqueezeNet


def test_squeezenet_has_the_weights_of_the_file(squeezenet_file, monkeypatch):
    monkeypatch.setenv("TFPRIVACY_FT_DATA", str(squeezenet_file.parents[1]))
    model = weights.load_backbone("squeezenet")
    assert model.input_shape == (None, None, None, 3) and model.output_shape == (None, None, None, 512)
    with h5py.File(squeezenet_file) as file:
        for layer, number in (("conv1", 1), ("fire2_expand3x3", 4), ("fire9_expand3x3", 25)):
            group = file[layer.replace("_", "/")]
            kernel, bias = model.get_layer(layer).get_weights()
            np.testing.assert_array_equal(kernel, group[f"uniform{number}"])
            np.testing.assert_array_equal(bias, group[f"{layer.replace('_', '/')}_b"])
    sized = weights.load_backbone(squeezenet_file, (40, 48, 3))
    x = 100 * rows(40, 48, 3)
    assert sized.input_shape == (None, 40, 48, 3) and sized.output_shape == (None, 1, 2, 512)
    np.testing.assert_allclose(sized(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_missing_or_damaged_squeezenet_is_told(squeezenet_file, monkeypatch, tmp_path):
    monkeypatch.setenv("TFPRIVACY_FT_DATA", str(tmp_path))
    with pytest.raises(WeightsError, match=r"There is no squeezenet_imagenet_notop/.*https://"):
        weights.load_backbone("squeezenet")
    content = bytearray(squeezenet_file.read_bytes())
    content[-1] ^= 1
    damaged = tmp_path / squeezenet_file.name
    damaged.write_bytes(content)
    for where in ("squeezenet", damaged):
        with pytest.raises(WeightsError, match="damaged or another file, its sha256 is"):
            weights.load_backbone(where)
    monkeypatch.delenv("TFPRIVACY_FT_DATA")
    with pytest.raises(WeightsError, match="set the environment variable TFPRIVACY_FT_DATA"):
        weights.load_backbone("squeezenet")
    with pytest.raises(InvalidArgumentError, match="height, width, 3"):
        weights.load_backbone(squeezenet_file, (40, 40, 1))


# keras.applications


@pytest.fixture
def keras_files(monkeypatch):
    """The module by which keras.applications fetches files."""
    module = sys.modules[tf.keras.applications.MobileNet.__module__]
    return module.file_utils if IS_KERAS_3 else module.data_utils


def test_an_application_is_loaded_from_its_file(keras_files, monkeypatch, tmp_path):
    own = tf.keras.applications.MobileNet(include_top=False, weights=None, input_shape=(32, 32, 3))
    path = tmp_path / "mobilenet_1_0_224_tf_no_top.h5"
    _write_weights_alone(path, own)
    monkeypatch.setattr(keras_files, "get_file", lambda name, origin, **_: str(tmp_path / name))
    model = weights.load_backbone("MobileNet", (32, 32, 3))
    assert model.output_shape == own.output_shape == (None, 1, 1, 1024)
    for ours, theirs in zip(model.get_weights(), own.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    path.write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"'MobileNet' cannot be loaded.*whole and of this architecture"):
        weights.load_backbone("MobileNet", (32, 32, 3))


def test_offline_an_application_says_which_file_to_put_where(keras_files, monkeypatch, tmp_path):
    def offline(*_):
        raise urllib.error.URLError("no network")

    real = keras_files.get_file
    monkeypatch.setattr(keras_files, "urlretrieve", offline)
    monkeypatch.setattr(
        keras_files, "get_file", lambda *args, **options: real(*args, cache_dir=str(tmp_path), **options)
    )
    with pytest.raises(
        WeightsError, match=r"put the file mobilenet_1_0_224_tf_no_top.h5 from https://\S+ into ~/.keras/mod"
    ):
        weights.load_backbone("MobileNet", (32, 32, 3))


def test_an_input_shape_that_an_application_does_not_take():
    with pytest.raises(WeightsError, match=r"give it an input_shape that it takes \(it was given \(8, 8, 3\)\)"):
        weights.load_backbone("MobileNet", (8, 8, 3))


# Files of whole models


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_a_saved_model_comes_back(small, tmp_path, name):
    path = tmp_path / name
    small.save(path)
    for where in (path, str(path)):
        model = weights.load_backbone(where, (3,))
        np.testing.assert_array_equal(model(rows(3)), small(rows(3)))
    with pytest.raises(InvalidArgumentError, match=r"input_shape=\(4,\) does not fit.*takes \(3,\)"):
        weights.load_backbone(path, (4,))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"model\.\w+' cannot be (loaded|read)"):
        weights.load_backbone(path)


def test_a_savedmodel_folder_comes_back(small, tmp_path):
    folder = str(tmp_path / "saved")
    small.export(folder)
    if IS_KERAS_3:
        model = weights.load_backbone(folder)
        np.testing.assert_allclose(model(rows(3)), small(rows(3)), rtol=1e-5, atol=1e-6)  # fused otherwise
        assert model.trainable_weights == []
    else:
        with pytest.raises(WeightsError, match=r"cannot be loaded|holds no Keras model"):
            weights.load_backbone(folder)
        small.save(folder, save_format="tf")
        np.testing.assert_array_equal(weights.load_backbone(folder)(rows(3)), small(rows(3)))
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        weights.load_backbone(folder)


def test_files_that_hold_no_model(small, tmp_path):
    path = tmp_path / "other.h5"
    _write_weights_alone(path, small)
    with pytest.raises(WeightsError, match="weights alone, and not those of squeezenet"):
        weights.load_backbone(path)
    with pytest.raises(WeightsError, match=r"has no saved_model\.pb"):
        weights.load_backbone(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(WeightsError, match="is of no known kind"):
        weights.load_backbone(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["no_such_model", "/no/such/model.keras"])
def test_an_unknown_name_or_path(name):
    with pytest.raises(WeightsError, match=f"no pretrained model '{name}': give 'squeezenet'"):
        weights.load_backbone(name)
    with pytest.raises(InvalidArgumentError, match="name_or_path=None"):
        weights.load_backbone(None)
