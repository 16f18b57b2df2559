"""Model builders: fresh at each call, right shapes, and clear refusals."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_exact, compile_for_sum, labels, rows

from tfprivacy_ft import models
from tfprivacy_ft.clipping import SlowClippingWarning
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.models import registry

CASES = [
    ("logistic", (30,), 2, {}),
    ("logistic", (8, 8, 1), 10, {}),
    ("mlp", (30,), 1, {"hidden_units": (16, 8), "activation": "relu"}),
    ("cnn", (28, 28, 1), 10, {}),
    ("cnn", (8, 8, 1), 10, {}),
    ("cnn", (16, 16, 3), 3, {}),
    ("cnn", (15, 40, 3), 3, {}),
    ("cnn", (6, 6, 1), 2, {}),
    ("text", (20,), 2, {"vocabulary_size": 50, "mask_zero": True}),
    ("text", (None,), 1, {"vocabulary_size": 50, "embedding_dim": 4, "hidden_units": (3,)}),
    ("resnet", (8, 8, 3), 3, {"filters": (4, 8), "blocks": (1, 2), "groups": 2}),
    ("squeezenet", (31, 32, 3), 3, {}),
    ("transformer", (6,), 2, {"vocabulary_size": 50, "embedding_dim": 8, "feed_forward_units": 4, "mask_zero": True}),
    ("transformer", (6,), 2, {"vocabulary_size": 50, "embedding_dim": 4, "feed_forward_units": 4}),
    ("lstm", (6,), 2, {"vocabulary_size": 50, "embedding_dim": 4, "units": 3, "mask_zero": True}),
    ("lstm", (None, 3), 1, {"units": 4, "hidden_units": (3,)}),
]
TEXTS = np.array([[3, 4, 0, 0], [4, 3, 0, 0], [0, 0, 0, 0]], "int32")  # of which 0 is padding
CLIPPED = [case for case in CASES if case[0] == "resnet" or (case[0] != "lstm" and case[3].get("mask_zero"))]


def _inputs(name, shape, count=4):
    rng = np.random.default_rng(0)
    if len(shape) == 1 and name in ("text", "transformer", "lstm"):
        return rng.integers(0, 50, (count, shape[0] or 7)).astype("int32")
    return rng.normal(size=(count, *(size or 7 for size in shape))).astype("float32")


@pytest.fixture
def clean_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))


def _dense(input_shape, num_outputs):
    inputs = tf.keras.Input(shape=input_shape)
    return tf.keras.Model(inputs, tf.keras.layers.Dense(num_outputs)(inputs))


@pytest.mark.parametrize(("name", "shape", "outputs", "options"), CASES)
def test_probabilities_by_default_and_logits_on_request(name, shape, outputs, options):
    x = _inputs(name, shape)
    model = models.build_model(name, shape, outputs, **options)
    probabilities = model(x).numpy()
    assert probabilities.shape == (4, outputs)
    assert (probabilities > 0).all() and (probabilities < 1).all()
    if outputs > 1:
        np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    with_logits = models.build_model(name, shape, outputs, from_logits=True, **options)
    with_logits.set_weights(model.get_weights())
    logits = with_logits(x)
    again = tf.sigmoid(logits) if outputs == 1 else tf.nn.softmax(logits)
    np.testing.assert_allclose(again, probabilities, rtol=1e-5)


@pytest.mark.parametrize(("name", "shape", "outputs", "options"), CASES)
def test_one_example_does_not_change_the_output_of_another(name, shape, outputs, options):
    x = _inputs(name, shape)
    model = models.build_model(name, shape, outputs, **options)
    np.testing.assert_allclose(model(x, training=True)[:1], model(x[:1], training=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "shape", "outputs", "options"), CLIPPED)
def test_clipping_is_exact_and_fast(name, shape, outputs, options):
    model = models.build_model(name, shape, outputs, **options)
    y = labels(classes=outputs)
    assert_exact(model, "sparse_categorical_crossentropy", _inputs(name, shape, len(y)), y, fast=True)


def test_clipping_squeezenet_is_fast():
    model = models.build_model("squeezenet", (31, 31, 3), 4)
    compile_for_sum(model, "sparse_categorical_crossentropy", 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowClippingWarning)
        model.train_on_batch(rows(31, 31, 3), labels())


def test_clipping_an_lstm_is_exact_and_takes_each_example_alone():
    model = models.build_model("lstm", (6,), 2, vocabulary_size=50, embedding_dim=4, units=3, mask_zero=True)
    y = labels(classes=2)
    assert_exact(model, "sparse_categorical_crossentropy", _inputs("lstm", (6,), len(y)), y, fast=False)


def test_the_default_cnn_is_the_one_of_the_literature():
    assert models.build_model("cnn", (28, 28, 1), 10).count_params() == 26010


def test_two_calls_share_nothing():
    first, second = (models.build_model("mlp", (3,), 2) for _ in range(2))
    before = second.get_weights()
    first.set_weights([w + 1 for w in first.get_weights()])
    for old, new in zip(before, second.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert getattr(first, "optimizer", None) is None


def test_string_loss_trains_the_probabilities():
    tf.keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 4)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    for outputs, loss in ((2, "sparse_categorical_crossentropy"), (1, "binary_crossentropy")):
        model = models.build_model("logistic", (4,), outputs)
        model.compile(tf.keras.optimizers.SGD(1.0), loss, metrics=["accuracy"])
        model.fit(x, y, epochs=5, verbose=0)
        assert model.evaluate(x, y, verbose=0)[1] > 0.95


def test_padding_does_not_count_and_a_row_of_padding_is_no_nan():
    model = models.build_model("text", (None,), 2, vocabulary_size=9, mask_zero=True)
    outputs = model(np.array([[3, 4, 0, 0], [0, 0, 0, 0]], "int32"))
    np.testing.assert_allclose(outputs[0], model(np.array([[3, 4]], "int32"))[0], rtol=1e-5)
    np.testing.assert_allclose(outputs[1], [0.5, 0.5])


def test_a_transformer_sees_the_order_of_tokens_and_no_padding():
    model = models.build_model("transformer", (4,), 2, vocabulary_size=9, mask_zero=True)
    first, second, nothing = model(TEXTS).numpy()
    assert np.abs(first - second).max() > 1e-4
    np.testing.assert_allclose(nothing, [0.5, 0.5])
    tokens = next(layer for layer in model.layers if layer.name.startswith("embedding"))
    table = tokens.get_weights()[0]
    table[0] += 1  # the vector of padding
    tokens.set_weights([table])
    np.testing.assert_allclose(model(TEXTS).numpy()[0], first, rtol=1e-5)


def test_features_of_squeezenet():
    model = models.build_model("squeezenet", (None, None, 3), 512, include_top=False)
    assert model.count_params() == 722_496  # as in the file of its weights
    assert model(np.zeros((2, 40, 33, 3), "float32")).shape == (2, 512)


def test_saved_text_models_load_without_this_library(tmp_path):
    """In one process, from which the library is shut out, as they compute here."""
    for name in ("text", "transformer", "lstm"):
        model = models.build_model(name, (4,), 2, vocabulary_size=9, mask_zero=True)
        model.save(tmp_path / f"{name}.keras")
        np.save(tmp_path / f"{name}.npy", model(TEXTS))
    code = f"""
import sys
sys.modules["tfprivacy_ft"] = None
import numpy as np, pathlib, tensorflow as tf
for path in sorted(pathlib.Path({str(tmp_path)!r}).glob("*.keras")):
    outputs = tf.keras.models.load_model(path, compile=False)(np.array({TEXTS.tolist()}, "int32"))
    np.testing.assert_allclose(outputs, np.load(path.with_suffix(".npy")), rtol=1e-5)
    print(path.stem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["lstm", "text", "transformer"], done.stderr


def test_importing_the_module_needs_no_tensorflow():
    code = "import sys, tfprivacy_ft.models; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


def test_a_function_and_a_registered_name_work_like_a_name(clean_registry):
    assert models.build_model(_dense, (3,), 2).output_shape == (None, 2)
    assert models.register_model("mine")(_dense) is _dense
    assert models.build_model("mine", (3,), 2).output_shape == (None, 2)
    assert "mine" in models.model_names()
    models.register_model("mine")(_dense)
    with pytest.raises(InvalidArgumentError, match="'mine' is taken"):
        models.register_model("mine")(lambda input_shape, num_outputs: None)


@pytest.mark.parametrize("name", ["cnn", "", None])
def test_names_that_cannot_be_registered(clean_registry, name):
    with pytest.raises(InvalidArgumentError):
        models.register_model(name)(_dense)


def test_an_unknown_name_lists_the_names():
    with pytest.raises(InvalidArgumentError, match=r"no model 'vgg'.*'cnn', 'logistic', 'lstm', 'mlp', 'resnet'"):
        models.build_model("vgg", (3,), 2)


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "options", "text"),
    [
        (7, (3,), 2, {}, "name=7"),
        ("mlp", (), 2, {}, "input_shape="),
        ("mlp", 3, 2, {}, "input_shape=3"),
        ("mlp", (0,), 2, {}, "input_shape="),
        ("mlp", (True,), 2, {}, "input_shape="),
        ("mlp", (None,), 2, {}, "give every size"),
        ("mlp", (3,), 0, {}, "num_outputs=0"),
        ("mlp", (3,), 2.0, {}, "num_outputs=2.0"),
        ("mlp", (3,), 2, {"hidden_units": (0,)}, "hidden_units="),
        ("mlp", (3,), 2, {"hidden_units": 8}, "hidden_units=8"),
        ("mlp", (3,), 2, {"units": 8}, "units"),
        ("cnn", (28, 28), 2, {}, "height, width, channels"),
        ("cnn", (3, 3, 1), 2, {}, "too small"),
        ("cnn", (8, 8, 1), 2, {"kernel_sizes": (8, 8)}, "nothing is left after convolution 2"),
        ("cnn", (8, 8, 1), 2, {"filters": (4,)}, "different lengths"),
        ("resnet", (8, 8, 3), 2, {"groups": 3}, "groups=3 does not divide"),
        ("resnet", (8, 8, 3), 2, {"blocks": (1,)}, "different lengths"),
        ("resnet", (None, 8, 3), 2, {}, "give every size"),
        ("resnet", (8, 8), 2, {}, "height, width, channels"),
        ("squeezenet", (30, 40, 3), 2, {}, "31 pixels"),
        ("squeezenet", (40, 40, 3), 2, {"include_top": False}, "squeezenet has 512 features"),
        ("squeezenet", (40, 40, 3), 2, {"include_top": "no"}, "include_top='no'"),
        ("transformer", (None,), 2, {"vocabulary_size": 5}, "give every size"),
        ("transformer", (3,), 2, {"vocabulary_size": 5, "num_heads": 3}, "num_heads=3 does not divide"),
        ("transformer", (3, 3), 2, {"vocabulary_size": 5}, "input_shape="),
        ("lstm", (3,), 2, {}, "vocabulary_size"),
        ("lstm", (3, 2), 2, {"mask_zero": True}, "mask_zero=True"),
        ("lstm", (3, 2), 2, {"vocabulary_size": 5}, "input_shape="),
        ("text", (3, 3), 2, {"vocabulary_size": 5}, "input_shape="),
        ("text", (3,), 2, {}, "vocabulary_size"),
        ("text", (3,), 2, {"vocabulary_size": 0}, "vocabulary_size=0"),
    ],
)
def test_bad_arguments(name, shape, outputs, options, text):
    with pytest.raises(InvalidArgumentError, match=text):
        models.build_model(name, shape, outputs, **options)


def test_builders_that_do_not_make_a_fresh_model_are_refused():
    one = _dense((3,), 2)
    backbone = tf.keras.layers.Dense(4)

    def compiled(input_shape, num_outputs):
        model = _dense(input_shape, num_outputs)
        model.compile("sgd", "mse")
        return model

    def shared(input_shape, num_outputs):
        inputs = tf.keras.Input(shape=input_shape)
        return tf.keras.Model(inputs, tf.keras.layers.Dense(num_outputs)(backbone(inputs)))

    models.build_model(lambda s, n: one, (3,), 2)
    with pytest.raises(UnsupportedModelError, match="same model twice"):
        models.build_model(lambda s, n: one, (3,), 2)
    models.build_model(shared, (3,), 2)
    with pytest.raises(UnsupportedModelError, match=r"shares weight .*dense"):
        models.build_model(shared, (3,), 2)
    with pytest.raises(UnsupportedModelError, match="compiled"):
        models.build_model(compiled, (3,), 2)
    with pytest.raises(UnsupportedModelError, match="without weights"):
        models.build_model(lambda s, n: tf.keras.Sequential([tf.keras.layers.Dense(n)]), (3,), 2)
    with pytest.raises(UnsupportedModelError, match="returned NoneType"):
        models.build_model(lambda s, n: None, (3,), 2)
    with pytest.raises(UnsupportedModelError, match="use its arguments"):
        models.build_model(lambda s, n: _dense((4,), 2), (3,), 2)
    with pytest.raises(UnsupportedModelError, match="use its arguments"):
        models.build_model(lambda s, n: _dense((3,), 5), (3,), 2)


def test_builds_inside_a_graph_as_federated_learning_does():
    with tf.Graph().as_default():
        first = models.build_model("cnn", (8, 8, 1), 10)
        second = models.build_model("cnn", (8, 8, 1), 10)
    assert len(first.trainable_variables) == len(second.trainable_variables) == 8
