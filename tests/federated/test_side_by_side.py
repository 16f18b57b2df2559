import logging

import numpy as np
import pytest

from federated import client_work, side_by_side, stateless
from tfprivacy_ft import models
from tfprivacy_ft.keras_compat import IS_KERAS_3

# What to make, on images of which shape.
CONVOLUTIONS = {
    "valid": ("Conv2D", (9, 8, 3), {"kernel_size": 3}),
    "same": ("Conv2D", (9, 8, 3), {"kernel_size": (3, 2), "padding": "same"}),
    "strides": ("Conv2D", (9, 8, 3), {"kernel_size": 3, "strides": 2}),
    "strides, same": ("Conv2D", (9, 8, 3), {"kernel_size": (4, 3), "strides": (2, 3), "padding": "same"}),
    "strides beyond the kernel": ("Conv2D", (9, 8, 3), {"kernel_size": 2, "strides": 3}),
    "dilation": ("Conv2D", (9, 8, 3), {"kernel_size": 2, "dilation_rate": (2, 3)}),
    "dilation, same": ("Conv2D", (9, 8, 3), {"kernel_size": 3, "dilation_rate": 2, "padding": "same"}),
    "one pixel": ("Conv2D", (9, 8, 3), {"kernel_size": 1, "use_bias": False}),
    "one position": ("Conv2D", (4, 5, 3), {"kernel_size": (4, 5)}),
    "groups": ("Conv2D", (9, 8, 6), {"kernel_size": 3, "strides": 2, "groups": 2}),
    "1D": ("Conv1D", (11, 3), {"kernel_size": 3, "strides": 2}),
    "1D, causal": ("Conv1D", (11, 3), {"kernel_size": 3, "dilation_rate": 2, "padding": "causal"}),
    "3D": ("Conv3D", (4, 5, 3, 2), {"kernel_size": 2, "strides": 2, "padding": "same"}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_prepared_layer_computes_what_it_did_and_the_same_gradients(tff, name):
    import tensorflow as tf

    layer, shape, options = CONVOLUTIONS[name]
    inputs = tf.keras.Input(shape)
    model = tf.keras.Model(inputs, getattr(tf.keras.layers, layer)(4, **options)(inputs))
    x = tf.constant(np.random.default_rng(0).normal(size=(3, *shape)), tf.float32)

    def output_and_gradients():
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = model(x)
            objective = tf.reduce_sum(tf.sin(output))
        return output, *tape.gradient(objective, [x, *model.trainable_weights])

    before = output_and_gradients()
    assert side_by_side.prepare(model) is model
    asked = []
    name = "_jit_compiled_convolution_op" if "groups" in options else "convolution_op"
    setattr(model.layers[1], name, _counted(getattr(model.layers[1], name), asked))
    for ours, theirs in zip(output_and_gradients(), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())
    assert asked or (IS_KERAS_3 and layer == "Conv1D")  # which there goes past the method, and stays a loop


@pytest.mark.parametrize(
    ("size", "strides", "left_to_keras"),
    [((2, 2), (1, 1), False), ((2, 3), (2, 3), False), ((3, 1), (1, 1), False), ((2, 2), (3, 1), True)],
)
def test_prepared_max_pooling_gives_the_same_values_and_gradients_also_where_values_are_equal(
    size, strides, left_to_keras
):
    import tensorflow as tf

    inputs = tf.keras.Input((7, 8, 3))
    layer = tf.keras.layers.MaxPooling2D(size, strides)
    model = tf.keras.Model(inputs, layer(inputs))
    random = np.random.default_rng(0)
    x = tf.constant(random.integers(0, 3, (5, 7, 8, 3)), tf.float32)  # most windows hold their largest value twice
    weights = tf.constant(random.normal(size=(5, *model.output_shape[1:])), tf.float32)

    def output_and_gradient():
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = model(x)
        return output, tape.gradient(output, x, weights)

    before = output_and_gradient()
    asked = []
    if hasattr(layer, "pool_function"):  # in Keras 3 there is none
        layer.pool_function = _counted(layer.pool_function, asked)
    side_by_side.prepare(model)
    for ours, theirs in zip(output_and_gradient(), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert bool(asked) == (left_to_keras and not IS_KERAS_3)


def _counted(function, calls):
    def counted(*args, **options):
        calls.append(args)
        return function(*args, **options)

    return counted


def updates_of(build):
    """What two clients of different lengths learn, one tensor (k, ...) per variable; the weights depend on shapes alone."""
    import tensorflow as tf

    model, keras_model = stateless.stateless_model(build, side_by_side.prepare)
    rng = np.random.default_rng(0)
    weights = tuple(rng.normal(scale=0.5, size=value.shape).astype(np.float32) for value in model.trainable)
    shape = keras_model.inputs[0].shape[1:]
    x, y = rng.normal(size=(10, *shape)).astype(np.float32), rng.integers(0, 3, 10).astype(np.int32)
    rows = np.array([[[0, 1, 2], [3, 4, -1]], [[5, 6, 7], [-6, -6, -6]]], np.int32)  # negative ones are padding
    loss = client_work.per_example_loss("sparse_categorical_crossentropy")
    arrays = (tuple(map(tf.constant, weights)), (), *map(tf.constant, (x, y, rows)))
    train = tf.function(lambda: client_work.train_side_by_side(model, loss, 0.1, *arrays), autograph=False)
    return [update.numpy() for update in train()]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger=side_by_side.__name__)
    return lambda: [record.getMessage() for record in caplog.records if record.name == side_by_side.__name__]


def many_convolutions():
    """Also some that are not layers of the model itself."""
    import tensorflow as tf

    layers = tf.keras.layers
    inputs = tf.keras.Input((9, 8, 2))
    x = layers.Conv2D(3, 3, strides=2, padding="same", activation="tanh")(inputs)
    x = layers.Conv2D(4, 2, dilation_rate=(1, 2), kernel_regularizer="l2")(x)
    inner = tf.keras.Sequential([tf.keras.Input((2, 4)), layers.Conv1D(3, 2, padding="causal"), layers.Flatten()])
    x = layers.TimeDistributed(inner)(x)
    return tf.keras.Model(inputs, layers.Dense(3, "softmax")(layers.Flatten()(x)))


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: models.build_model("cnn", (10, 9, 1), 3, filters=(2, 3), hidden_units=(4,)), id="cnn"),
        pytest.param(many_convolutions, id="many"),
    ],
)
def test_convolutions_side_by_side_learn_what_they_learn_one_after_the_other(tff, said, monkeypatch, build):
    ours = updates_of(build)
    assert said() == ["clients train side by side"]
    monkeypatch.setattr(side_by_side, "prepare", lambda model: model)
    theirs = updates_of(build)
    assert "; one after the other in conv2d" in said()[-1]
    _assert_same(ours, theirs)


@pytest.mark.slow  # TensorFlow takes a quarter of a minute to vectorise the loop over time
def test_an_lstm_trains_side_by_side_and_without_preparation_one_client_after_the_other(tff, said, monkeypatch):
    def build():
        import tensorflow as tf

        inputs = tf.keras.Input((3, 2))
        return tf.keras.Model(inputs, tf.keras.layers.Dense(3, "softmax")(tf.keras.layers.LSTM(2)(inputs)))

    ours = updates_of(build)
    assert said() == ["clients train side by side"]
    monkeypatch.setattr(side_by_side, "prepare", lambda model: model)
    theirs = updates_of(build)
    assert said()[-1].startswith("clients train one after the other, as TensorFlow cannot take the model apart")
    _assert_same(ours, theirs)


def test_what_tensorflow_cannot_take_apart_is_computed_one_client_after_the_other(tff, said):
    import tensorflow as tf

    def step(elements):
        x, y = elements
        return tf.data.Dataset.from_tensors(x).get_single_element(), {"sum": x + y}

    @tf.function(autograph=False)
    def run(x, y):
        return side_by_side.map_clients(step, (x, y))

    x = [[1.0, 2.0], [3.0, 4.0]]
    found, others = run(tf.constant(x), tf.constant([[1.0], [2.0]]))
    assert said()[0].startswith("clients train one after the other, as TensorFlow cannot take the model apart")
    np.testing.assert_allclose(found, x)
    np.testing.assert_allclose(others["sum"], [[2.0, 3.0], [5.0, 6.0]])


def _assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(b).max() > 1e-4  # something was learnt
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_layer_without_a_rule_is_named_and_a_mistake_of_the_model_is_shown(tff, said):
    import tensorflow as tf

    def step(x):
        with tf.name_scope("net"), tf.name_scope("enlarge"):
            return tf.image.resize(x, (4, 4), method="nearest")

    def broken(x):
        raise ZeroDivisionError("of the model")

    with tf.Graph().as_default():
        side_by_side.map_clients(step, tf.ones((2, 3, 2, 2, 1)))
        with pytest.raises(ZeroDivisionError, match="of the model"):
            side_by_side.map_clients(broken, tf.ones((2, 3)))
    assert said()[0] == "clients train side by side; one after the other in enlarge"


def test_large_images_and_images_of_unknown_size_are_left_to_keras(tff):
    import tensorflow as tf

    for shape in ((None, None, 1), (300, 300, 1)):
        inputs = tf.keras.Input(shape)
        model = side_by_side.prepare(tf.keras.Model(inputs, tf.keras.layers.Conv2D(2, 3)(inputs)))
        graph = tf.function(model).get_concrete_function(tf.TensorSpec([None, *shape])).graph
        assert "Conv2D" in {op.type for op in graph.get_operations()}
