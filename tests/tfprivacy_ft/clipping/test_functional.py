"""Clipped sums of models whose weights are tensors: the same as with variables, in every kind of graph."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf
from helpers import EXAMPLES, CrossEntropy, assert_same, global_norm, labels, layers, released_sum, rows

from tfprivacy_ft.clipping import PerLayer, SlowClippingWarning, clipped_sum_of_function, reference
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.keras_compat import IS_KERAS_3

LOGITS = CrossEntropy(from_logits=True)


def mlp():
    return tf.keras.Sequential([layers.Input((5,)), layers.Dense(6, "tanh"), layers.Dense(4)])


def cnn():
    return tf.keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="tanh"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )


def words():
    return tf.keras.Sequential(
        [layers.Input((5,), dtype="int32"), layers.Embedding(9, 4), layers.Flatten(), layers.Dense(4)]
    )


def sorting():
    """With an op that has no rule."""
    return tf.keras.Sequential(
        [layers.Input((5,)), layers.Dense(6), layers.Lambda(lambda t: tf.sort(t, axis=1)), layers.Dense(4)]
    )


def grouped():
    return tf.keras.Sequential(
        [layers.Input((6, 6, 2)), layers.Conv2D(4, 3, groups=2, activation="tanh"), layers.Flatten(), layers.Dense(4)]
    )


def regularised():
    return tf.keras.Sequential([layers.Input((5,)), layers.Dense(4, kernel_regularizer=tf.keras.regularizers.L2(0.1))])


def tokens():
    return np.random.default_rng(3).integers(0, 9, (EXAMPLES, 5)).astype(np.int32)


# name: (builder, x, whether every weight has a fast rule)
CASES = {
    "mlp": (mlp, rows(5), True),
    "cnn": (cnn, rows(8, 8, 1), True),
    "grouped convolution": (grouped, rows(6, 6, 2), True),
    "embedding": (words, tokens(), True),
    "regularised": (regularised, rows(5), True),
    "sorted": (sorting, rows(5), False),
}


def as_function(build):
    """A model of `build` and the same as a function (weights, constants, x) -> (outputs, its own losses)."""
    if IS_KERAS_3:
        model = build()

        def call(weights, constants, x):
            outputs, _, losses = model.stateless_call(weights, constants, x, training=True, return_losses=True)
            return outputs, losses

        return model, call
    from federated.stateless import stateless_model

    function, _ = stateless_model(build)
    model = build()  # Keras 2 does not call models that are older than the last one made in a graph
    return model, lambda weights, constants, x: (lambda output, penalty: (output, [penalty]))(
        *function(weights, constants, x)
    )


def loss_of(call, loss=LOGITS):
    def batch_loss(weights, constants, x, y):
        outputs, losses = call(weights, constants, x)
        return tf.add_n([loss(y, outputs), *losses])

    return batch_loss


def values(model):
    return [
        [tf.convert_to_tensor(v) for v in group] for group in (model.trainable_variables, model.non_trainable_variables)
    ]


def expected_sum(model, x, y, fraction=0.5):
    each = reference.per_example_gradients(model, LOGITS, x, y)
    clip = float(np.quantile([reference.norm(g) for g in each], fraction))
    return reference.clipped_sum(each, clip), clip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::tfprivacy_ft.clipping.SlowClippingWarning")
def test_sums_are_those_of_variables_and_of_the_loop(name):
    build, x, fast = CASES[name]
    model, call = as_function(build)
    y = labels()
    expected, clip = expected_sum(model, x, y)
    weights, constants = values(model)

    @tf.function
    def run(weights, constants, x, y):
        found = clipped_sum_of_function(loss_of(call), weights, (x, y), clip, constants=constants)
        assert (found.rules is not None) == fast
        return found.sums, [g for g in found.data_independent if g is not None]

    sums, independent = run(weights, constants, x, y)
    assert_same(sums, expected)
    assert len(independent) == (name == "regularised")
    for gradient in independent:
        np.testing.assert_allclose(gradient, 0.2 * weights[0], rtol=1e-5)
    if name != "regularised":  # whose step also takes the regulariser's gradient
        assert_same(sums, released_sum(model, LOGITS, x, y, clip))


def test_in_a_loop_over_steps_and_in_a_graph_without_functions():
    model, call = as_function(CASES["mlp"][0])
    x, y = CASES["mlp"][1], labels()
    start, _ = values(model)
    clip, steps = 0.5, 3

    def descend(weights):
        def body(i, *weights):
            found = clipped_sum_of_function(loss_of(call), weights, (x, y), clip)
            return i + 1, *(w - 0.1 * s for w, s in zip(weights, found.sums, strict=True))

        return tf.while_loop(lambda i, *_: i < steps, body, (0, *weights))[1:]

    for _ in range(steps):
        each = reference.per_example_gradients(model, LOGITS, x, y)
        for variable, total in zip(model.trainable_weights, reference.clipped_sum(each, clip), strict=True):
            variable.assign(variable - 0.1 * total)
    expected = [v.numpy() for v in model.trainable_weights]
    assert_same(tf.function(descend)(start), expected, rtol=1e-5)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        assert_same(session.run(descend([tf.constant(w.numpy()) for w in start])), expected, rtol=1e-5)


@pytest.mark.parametrize("one_by_one_only", [False, True])
@pytest.mark.filterwarnings("ignore::tfprivacy_ft.clipping.SlowClippingWarning")
def test_rows_that_only_fill_the_batch_and_rows_that_are_not_finite_add_nothing(one_by_one_only):
    model, call = as_function(CASES["mlp"][0])
    x, y = rows(5), labels()
    real = np.arange(EXAMPLES) % 3 > 0
    expected, clip = expected_sum(model, x[real][1:], y[real][1:])
    x[np.flatnonzero(real)[0]] = np.nan
    x[np.flatnonzero(~real)[0]] = np.inf
    weights, _ = values(model)
    found = clipped_sum_of_function(
        loss_of(call), weights, (x, y), clip, real=tf.constant(real), one_by_one_only=one_by_one_only
    )
    assert_same(found.sums, expected)


def test_labels_of_minus_zero_are_no_padding():
    x = rows(3)
    y = tf.fill([EXAMPLES], -0.0)

    def squared(weights, constants, x, y):
        return tf.reduce_mean(tf.square(tf.linalg.matvec(x, weights[0]) + weights[1] - y))

    weights = [tf.ones([3]), tf.ones([])]
    found = clipped_sum_of_function(squared, weights, (tf.constant(x), y), 1e6)
    residual = 2 * (x.sum(1) + 1)
    assert_same([s.numpy() for s in found.sums], [residual @ x, residual.sum()])


def test_several_rows_are_one_example():
    model, call = as_function(CASES["mlp"][0])
    x, y = np.concatenate([rows(5), rows(5, seed=5)]), np.concatenate([labels(), labels(seed=6)])
    weights, _ = values(model)
    found = clipped_sum_of_function(loss_of(call), weights, (x, y), 0.4, rows_per_example=2)
    each = []
    for i in range(0, 2 * EXAMPLES, 2):
        with tf.GradientTape() as tape:
            loss = LOGITS(y[i : i + 2], model(x[i : i + 2], training=True))
        each.append([g.numpy() for g in tape.gradient(loss, model.trainable_weights)])
    assert_same(found.sums, reference.clipped_sum(each, 0.4))


def test_each_weight_is_a_layer_of_its_own():
    model, call = as_function(CASES["mlp"][0])
    weights, _ = values(model)
    batch = rows(5)[:1], labels()[:1]
    found = clipped_sum_of_function(loss_of(call), weights, batch, 1e-3, PerLayer())
    for total in found.sums:
        assert global_norm([total]) == pytest.approx(1e-3 / np.sqrt(len(weights)), rel=1e-4)


def test_weights_that_multiply_the_loss_are_no_mask():
    """A factor made of weights is differentiated; taken for data, half of the gradient would be missing."""

    def scaled(weights, constants, x, y):
        return tf.reduce_mean(weights[0] * tf.square(tf.linalg.matvec(x, weights[1]) - y))

    x, y = rows(3), rows()
    weights = [tf.constant(2.0), tf.ones([3])]
    for slow in (False, True):
        with pytest.warns(SlowClippingWarning) if slow else contextlib.nullcontext():
            found = clipped_sum_of_function(scaled, weights, (x, y), 1e6, one_by_one_only=slow)
        residual = x.sum(1) - y
        expected = [np.square(residual).sum(), 4 * residual @ x]
        assert_same([s.numpy() for s in found.sums], expected)


def test_a_mask_counts_the_steps_of_its_own_example():
    """The loss of an example alone is divided by its own valid steps, and has a fast rule all the same."""

    def masked(weights, constants, x, y, mask):
        errors = tf.square(tf.linalg.matvec(tf.reshape(x, [-1, 3]), weights[0]) - tf.reshape(y, [-1]))
        return tf.reduce_sum(tf.reshape(errors, [-1, 5]) * mask) / tf.reduce_sum(mask)

    x, y, mask = rows(5, 3), rows(5, seed=2), (np.arange(5) <= np.arange(EXAMPLES)[:, None] % 5).astype(np.float32)
    found = clipped_sum_of_function(masked, [tf.ones([3])], (x, y, mask), 1.0)
    assert found.rules is not None
    residual = 2 * mask * (x.sum(2) - y) / mask.sum(1, keepdims=True)
    each = [[gradient] for gradient in np.einsum("bt,btd->bd", residual, x)]
    assert_same(found.sums, reference.clipped_sum(each, 1.0))


def test_what_mixes_examples_is_refused():
    def centred(weights, constants, x, y):
        outputs = tf.matmul(x - tf.reduce_mean(x, 0), weights[0])
        return LOGITS(y, outputs)

    with pytest.raises(UnsupportedModelError, match="lets one example see the others"):
        clipped_sum_of_function(centred, [tf.ones([5, 4])], (rows(5), labels()), 1.0)


def test_what_the_loss_is_not_given_is_refused():
    hidden = tf.Variable(tf.ones([EXAMPLES, 5]))

    @tf.function
    def run(x, y):
        noise = 2.0 * hidden  # a tensor of the graph around, which may hold anybody's values

        def leaking(weights, constants, x, y):
            return LOGITS(y, tf.matmul(x + noise, weights[0]))

        return clipped_sum_of_function(leaking, [tf.ones([5, 4])], (x, y), 1.0).sums

    with pytest.raises(UnsupportedModelError, match="from outside the traced training step"):
        run(rows(5), labels())


def test_a_weight_of_unknown_shape_is_refused():
    @tf.function(input_signature=[tf.TensorSpec([None, 4])], autograph=False)
    def run(weight):
        return clipped_sum_of_function(lambda w, c, x: tf.reduce_sum(x @ w[0]), [weight], (rows(5),), 1.0).sums

    with pytest.raises(InvalidArgumentError, match="of which a part is not known"):
        run(tf.ones([5, 4]))
