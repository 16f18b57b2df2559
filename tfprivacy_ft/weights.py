"""Pretrained models to fine-tune, from local files and from keras.applications.

Promises: a model is returned with the weights of the file or not at all; a file of SqueezeNet is taken only if it is byte
for byte the known one. Only Keras's own loader of keras.applications ever downloads. What the weights were trained on is
taken to be public. A saved model is a program: load none from where you would not run one.
"""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import tensorflow as tf

from tfprivacy_ft import _local_files, models
from tfprivacy_ft.errors import InvalidArgumentError, WeightsError
from tfprivacy_ft.keras_compat import IS_KERAS_3
from tfprivacy_ft.models.images import SQUEEZENET_FEATURES

__all__ = ["load_backbone"]

_SQUEEZENET_FILE = "squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5"
_SQUEEZENET_PLACE = f"squeezenet_imagenet_notop/{_SQUEEZENET_FILE}"
_SQUEEZENET_COMMIT = "a73d4339aa4d37c51a0b3ba044bed55477abec73"
_SQUEEZENET_URL = f"https://github.com/DeepCognition/keras-squeezenet/raw/{_SQUEEZENET_COMMIT}/{_SQUEEZENET_FILE}"
_SQUEEZENET_SHA256 = ("17154246284f555591549ac2c83e127abfbf4307dc4b0060fdaa2931d0fa38da",)


def load_backbone(
    name_or_path: str | os.PathLike[str], input_shape: Sequence[int | None] | None = None
) -> tf.keras.Model:
    """Loads a pretrained model.

    Args:
        name_or_path: One of
            "squeezenet": SqueezeNet 1.1 trained on ImageNet, without its last layer, from the folder that the
                environment variable TFPRIVACY_FT_DATA names; or a path to the same file. From images of 31 pixels or more
                in each direction to feature maps, float32 [batch, height, width, 512]. Images are float32, BGR, 0 .. 255, minus
                (103.939, 116.779, 123.68); `tf.keras.applications.vgg16.preprocess_input` makes them of RGB.
            a name in `tf.keras.applications`, such as "MobileNetV2": without its last layers, trained on ImageNet, to
                feature maps [batch, height, width, channels]. Keras takes the file from ~/.keras/models, or downloads it.
                Images are prepared by the `preprocess_input` of its module. Most have BatchNormalization: see `batch_norm`.
            a path to a .keras file, to an .h5 file of a whole model, or to a SavedModel: the model as it was saved. On
                Keras 3 a SavedModel is one frozen layer, which computes what "serving_default" computes.
        input_shape: Shape of one example, as (96, 96, 3), or None: images of any size for names, and what was saved for
            paths.

    Returns:
        A Keras model, not compiled.

    Raises:
        WeightsError: The name is unknown, or the file is missing, damaged, or of another architecture.
        InvalidArgumentError: `input_shape` does not fit the model.

    Example:
        >>> load_backbone("squeezenet", (96, 96, 3)).output_shape  # doctest: +SKIP
        (None, 5, 5, 512)

    Source: squeezenet: Iandola et al., 2016, https://arxiv.org/abs/1602.07360.
    """
    shape = None if input_shape is None else tuple(input_shape)
    try:
        name = os.fspath(name_or_path)
    except TypeError:
        raise InvalidArgumentError(f"name_or_path={name_or_path!r} is not allowed: give a name or a path.") from None
    if name == "squeezenet":
        what = "The weights of 'squeezenet' are"
        content = _local_files.read_checked(what, _SQUEEZENET_PLACE, _SQUEEZENET_SHA256, _SQUEEZENET_URL, WeightsError)
        return _squeezenet(content, shape)
    if name in _applications():
        return _application(name, shape)
    path = Path(name).expanduser()
    if not path.exists():
        raise WeightsError(
            f"There is no file and no pretrained model {name!r}: give 'squeezenet', a name in tf.keras.applications such "
            "as 'MobileNetV2', or the path of a .keras or .h5 file or of a SavedModel folder."
        )
    return _from_path(path, shape)


def _applications() -> list[str]:
    applications = tf.keras.applications
    return [name for name in dir(applications) if name[0].isupper() and callable(getattr(applications, name))]


def _squeezenet(content: bytes, shape: tuple[int | None, ...] | None) -> tf.keras.Model:
    shape = (None, None, 3) if shape is None else shape
    if shape[-1:] != (3,):
        raise InvalidArgumentError(f"input_shape={shape} is not allowed: these weights take (height, width, 3).")
    model = models.build_model("squeezenet", shape, SQUEEZENET_FEATURES, include_top=False)
    with h5py.File(io.BytesIO(content), "r") as file:
        for layer in model.layers:
            if layer.weights:
                group = file[layer.name.replace("_", "/")]
                layer.set_weights([group[name.decode()][()] for name in group.attrs["weight_names"]])
    # Without the mean over places, which a head may do without.
    return tf.keras.Model(model.input, model.layers[-2].output, name="squeezenet")


def _application(name: str, shape: tuple[int | None, ...] | None) -> tf.keras.Model:
    folder = os.path.join(os.environ.get("KERAS_HOME", "~/.keras") if IS_KERAS_3 else "~/.keras", "models")
    try:
        builder = getattr(tf.keras.applications, name)
        return builder(include_top=False, weights="imagenet", input_shape=shape)
    except Exception as error:  # Keras raises no narrower one where it cannot download
        missing = re.search(r"https?://\S*/([^/\s:]+)", str(error))
        if missing:
            raise WeightsError(
                f"The weights of {name!r} are not on this machine, and cannot be downloaded: put the file "
                f"{missing[1]} from {missing[0]} into {folder}."
            ) from error
        raise WeightsError(
            f"{name!r} cannot be loaded ({_one_line(error)}): give it an input_shape that it takes (it was given {shape}), "
            f"and look whether its file in {folder} is whole and of this architecture."
        ) from error


def _from_path(path: Path, shape: tuple[int | None, ...] | None) -> tf.keras.Model:
    if path.is_dir():
        if not (path / "saved_model.pb").is_file():
            raise WeightsError(
                f"Folder {str(path)!r} has no saved_model.pb, so it is no SavedModel: give another path."
            )
        model = _loaded(path, _inference_only if IS_KERAS_3 else _keras_model)
    elif path.suffix == ".keras":
        model = _loaded(path, _keras_model)
    elif path.suffix in (".h5", ".hdf5"):
        if _layers_without_model(path) is not None:
            return _squeezenet_of_path(path, shape)
        model = _loaded(path, _keras_model)
    else:
        raise WeightsError(
            f"File {str(path)!r} is of no known kind: give a .keras or .h5 file, or a SavedModel folder."
        )
    if shape is not None and not _takes(model, shape):
        raise InvalidArgumentError(
            f"input_shape={shape} does not fit the model in {str(path)!r}, which takes {model.input_shape[1:]}: leave "
            "input_shape out, or give that."
        )
    return model


def _loaded(path: Path, load: Any) -> tf.keras.Model:
    try:
        model = load(str(path))
    except Exception as error:  # what is raised depends on where a file is damaged
        raise WeightsError(
            f"{str(path)!r} cannot be loaded ({_one_line(error)}): it is damaged, or it was saved by another version of "
            "Keras or with layers that have to be imported first."
        ) from error
    if not isinstance(model, tf.keras.Model):
        raise WeightsError(f"{str(path)!r} holds no Keras model: save one there by `model.save`.")
    return model


def _keras_model(path: str) -> Any:
    return tf.keras.models.load_model(path, compile=False)


def _inference_only(path: str) -> tf.keras.Model:
    """A SavedModel as one frozen layer."""
    signature = tf.saved_model.load(path).signatures["serving_default"]
    (given,) = signature.structured_input_signature[1].values()
    layer = tf.keras.layers.TFSMLayer(path, call_endpoint="serving_default", trainable=False)
    inputs = tf.keras.Input(given.shape[1:], dtype=given.dtype.name)
    (output,) = layer(inputs).values()
    return tf.keras.Model(inputs, output)


def _layers_without_model(path: Path) -> list[str] | None:
    """Names of the layers in a file of weights alone; None for a file of a whole model."""
    try:
        with h5py.File(path, "r") as file:
            if "model_config" in file.attrs:
                return None
            return [name if isinstance(name, str) else name.decode() for name in file.attrs.get("layer_names", ())]
    except OSError as error:
        raise WeightsError(
            f"File {str(path)!r} cannot be read as HDF5 ({_one_line(error)}): it is damaged or another file."
        ) from error


def _squeezenet_of_path(path: Path, shape: tuple[int | None, ...] | None) -> tf.keras.Model:
    if "fire9/squeeze1x1" not in (_layers_without_model(path) or []):
        raise WeightsError(
            f"File {str(path)!r} holds weights alone, and not those of squeezenet: build the model that they are of, call "
            "its load_weights, and take that model, or save it whole as .keras."
        )
    return _squeezenet(_local_files.read_file(path, _SQUEEZENET_SHA256, _SQUEEZENET_URL, WeightsError), shape)


def _takes(model: tf.keras.Model, shape: tuple[int | None, ...]) -> bool:
    known = tuple(model.input_shape)[1:]
    return len(known) == len(shape) and all(a in (None, b) for a, b in zip(known, shape, strict=True))


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")[:300]
