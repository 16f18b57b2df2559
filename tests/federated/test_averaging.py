import copy
import pickle
import sys
import threading

import numpy as np
import pytest
from federated_models import CLASSES, DIM, cnn, own_builder
from scipy import stats

import federated
from federated import aggregation, runtime
from tfprivacy_ft import models
from tfprivacy_ft.errors import InvalidArgumentError, MissingDependencyError, UnsupportedModelError


def trainable(process, state):
    return [np.asarray(value) for value in process.get_model_weights(state).trainable]


def change(process, state, clients):
    """What a round adds to the weights, as one vector."""
    after = process.next(state, clients).state
    pairs = zip(trainable(process, after), trainable(process, state), strict=True)
    return np.concatenate([(a - b).ravel() for a, b in pairs])


# The process as TFF knows it.


def test_it_is_a_learning_process(tff, noisy, draw_clients):
    assert isinstance(noisy, tff.learning.templates.LearningProcess)
    assert isinstance(noisy, federated.AveragingProcess)
    output = noisy.next(noisy.initialize(), draw_clients([3, 5]))
    assert isinstance(output, tff.learning.templates.LearningProcessOutput)
    weights = noisy.get_model_weights(output.state)
    assert isinstance(weights, tff.learning.models.ModelWeights)
    assert [value.shape for value in weights.trainable] == [(DIM, 8), (8,), (8, CLASSES), (CLASSES,)]


def test_metrics_release_nothing_of_the_clients(noisy, draw_clients):
    of_clients, of_nobody = (noisy.next(noisy.initialize(), clients).metrics for clients in (draw_clients([3, 5]), []))
    assert of_clients == of_nobody == {"round": 1, "clip": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "shape", "from_logits"),
    [(None, (DIM,), False), (own_builder, (DIM,), True), (cnn, (8, 8, 1), False)],
    ids=["mlp", "own", "cnn"],
)
def test_without_noise_it_equals_stock_tff_on_ragged_clients(tff, make_process, build, shape, from_logits):
    import tensorflow as tf

    build = build or (lambda: models.build_model("mlp", (DIM,), CLASSES, hidden_units=(8,)))
    sizes = [1, 7, 8, 9, 23]
    rng = np.random.default_rng(0)
    clients = [
        tf.data.Dataset.from_tensor_slices(
            (rng.normal(size=(n, *shape)).astype(np.float32), rng.integers(0, CLASSES, n).astype(np.int32))
        )
        .batch(8)
        .repeat(2)
        for n in sizes
    ]
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    start = build()
    ours = make_process(
        build, loss=loss, l2_norm_clip=0.1, server_learning_rate=0.7, server_momentum=0.9, shards=2, clients_at_once=2
    )
    stock = tff.learning.algorithms.build_unweighted_fed_avg(
        lambda: tff.learning.models.from_keras_model(
            build(),
            loss=loss,
            input_spec=(tf.TensorSpec([None, *shape], tf.float32), tf.TensorSpec([None], tf.int32)),
        ),
        tff.learning.optimizers.build_sgdm(0.1),
        tff.learning.optimizers.build_sgdm(0.7, momentum=0.9),
        model_aggregator=tff.aggregators.DifferentiallyPrivateFactory.gaussian_fixed(0.0, 4, 0.1),
    )
    state = ours.start_from(start)
    as_stock = tff.learning.models.ModelWeights(
        *([v.numpy() for v in values] for values in (start.trainable_weights, start.non_trainable_weights))
    )
    stock_state = stock.set_model_weights(stock.initialize(), as_stock)
    for _ in range(2):
        state, stock_state = ours.next(state, clients).state, stock.next(stock_state, clients).state
    moved = 0.0
    for a, b, c in zip(
        trainable(ours, state), trainable(stock, stock_state), [v.numpy() for v in start.trainable_weights], strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        moved = max(moved, np.abs(a - c).max())
    assert moved > 1e-3


@pytest.mark.parametrize("name", ["adagrad", "adam", "yogi"])
def test_server_optimizers_equal_stock_tff(tff, make_process, draw_clients, name):
    import tensorflow as tf

    def build():
        return models.build_model("mlp", (DIM,), CLASSES, hidden_units=(8,))

    def server_optimizer():
        return getattr(tff.learning.optimizers, f"build_{name}")(0.05)

    loss = tf.keras.losses.SparseCategoricalCrossentropy()
    ours = make_process(build, loss=loss, l2_norm_clip=0.3, server_optimizer=server_optimizer())
    stock = tff.learning.algorithms.build_unweighted_fed_avg(
        lambda: tff.learning.models.from_keras_model(
            build(), loss=loss, input_spec=(tf.TensorSpec([None, DIM], tf.float32), tf.TensorSpec([None], tf.int32))
        ),
        tff.learning.optimizers.build_sgdm(0.1),
        server_optimizer(),
        model_aggregator=tff.aggregators.DifferentiallyPrivateFactory.gaussian_fixed(0.0, 4, 0.3),
    )
    clients = [
        tf.data.Dataset.from_tensor_slices(arrays).batch(8).repeat(3) for arrays in draw_clients([5, 9, 17], scale=3.0)
    ]
    start = build()
    # Always the same: where an update is close to zero, these optimizers turn its rounding into a step.
    rng = np.random.default_rng(0)
    start.set_weights([rng.normal(scale=0.4, size=weight.shape) for weight in start.get_weights()])
    state = ours.start_from(start)
    as_stock = tff.learning.models.ModelWeights([v.numpy() for v in start.trainable_weights], [])
    stock_state = stock.set_model_weights(stock.initialize(), as_stock)
    for _ in range(2):
        state, stock_state = ours.next(state, clients).state, stock.next(stock_state, clients).state
    for a, b in zip(trainable(ours, state), trainable(stock, stock_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert ours.facts.server_optimizer == name


def test_the_proximal_term_is_half_its_strength_times_the_squared_distance_from_the_server(make_process, draw_clients):
    import tensorflow as tf

    strength, epochs = 2.0, 6
    (client,) = clients = draw_clients([40], scale=3.0)
    changes = {"local_epochs": epochs, "batch_size": 40, "expected_clients_per_round": 1, "l2_norm_clip": 1e3}
    process = make_process(proximal_strength=strength, **changes)
    model = process.model()
    state = process.start_from(model)
    server = [v.numpy() for v in model.trainable_weights]
    loss = tf.keras.losses.SparseCategoricalCrossentropy()
    for _ in range(epochs):
        with tf.GradientTape() as tape:
            away = sum(tf.reduce_sum((v - w) ** 2) for v, w in zip(model.trainable_weights, server, strict=True))
            objective = loss(client[1], model(client[0], training=True)) + strength / 2 * away
        for gradient, v in zip(tape.gradient(objective, model.trainable_weights), model.trainable_weights, strict=True):
            v.assign_sub(0.1 * gradient)
    for ours, expected in zip(trainable(process, process.next(state, clients).state), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"server_optimizer": "yogi"}, "server_optimizer is a str: give one of federated.server_optimizers"),
        ({"proximal_strength": -1.0}, "proximal_strength=-1.0 is not allowed"),
    ],
)
def test_settings_of_the_server_and_of_clients_get_one_sentence(make_process, changes, sentence):
    with pytest.raises(InvalidArgumentError, match=sentence):
        make_process(**changes)


def test_a_server_optimizer_has_its_own_learning_rate(tff, make_process):
    with pytest.raises(InvalidArgumentError, match="do not go with server_optimizer"):
        make_process(server_optimizer=tff.learning.optimizers.build_adam(0.01), server_learning_rate=0.5)


def test_a_client_of_arrays_trains_like_keras(noiseless, make_process, draw_clients):
    process = make_process(l2_norm_clip=1e6, expected_clients_per_round=1, batch_size=100, local_epochs=3)
    model = process.model()
    state = process.start_from(model)
    ((x, y),) = draw_clients([20])
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.optimizer.learning_rate = 0.1
    model.fit(x, y, batch_size=100, epochs=3, verbose=0)  # one batch of everything: the order does not matter
    for ours, theirs in zip(trainable(process, process.next(state, [(x, y)]).state), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_dropout_masks_differ_between_clients():
    import tensorflow as tf

    from federated import client_work, stateless

    def build():
        inputs = tf.keras.Input((DIM,))
        x = tf.keras.layers.Dropout(0.5)(tf.keras.layers.Dense(64, use_bias=False)(inputs))
        return tf.keras.Model(inputs, tf.keras.layers.Dense(CLASSES)(x))

    model, _ = stateless.stateless_model(build)
    loss = client_work.per_example_loss(tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        weights = tuple(map(tf.constant, model.trainable))
        rows = tf.zeros((5, 1, 1), tf.int32)  # five clients with the same example
        updates = client_work.train_side_by_side(
            model, loss, 1.0, weights, (), tf.ones((1, DIM)), tf.zeros((1,), tf.int32), rows
        )
        kernels = session.run(updates[0])
    assert len({kernel.tobytes() for kernel in kernels}) == 5


# The clip.


def test_one_client_that_learns_hugely_moves_the_sum_by_the_clip(make_process, draw_clients):
    process = make_process(client_learning_rate=1e4, local_epochs=2)
    state = process.initialize()
    for seed in range(10):
        (client,) = draw_clients([11], seed, scale=10.0)
        moved = np.linalg.norm(change(process, state, [client])) * 4
        assert 0.5 * (1 - 1e-3) <= moved <= 0.5 * (1 + 1e-4)


def test_one_client_in_or_out_moves_the_sum_by_at_most_the_clip(noiseless, draw_clients):
    clients = draw_clients([5, 9, 2, 30], seed=4, scale=10.0)
    state = noiseless.initialize()
    whole = change(noiseless, state, sorted_batches(clients))
    for i in range(4):
        without = change(noiseless, state, sorted_batches(clients[:i] + clients[i + 1 :]))
        assert np.linalg.norm(whole - without) * 4 <= 0.5 * (1 + 1e-4)


def sorted_batches(clients):
    """The clients as data sets, whose batches are not shuffled: two rounds then train alike."""
    import tensorflow as tf

    return [tf.data.Dataset.from_tensor_slices(client).batch(8) for client in clients]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_client_counts_as_zero(noiseless, draw_clients, bad):
    good, spoilt = draw_clients([8, 8])
    spoilt[0][3, 2] = bad
    state = noiseless.initialize()
    with_both = change(noiseless, state, sorted_batches([good, spoilt]))
    np.testing.assert_allclose(with_both, change(noiseless, state, sorted_batches([good])), atol=1e-7)


# The noise.


def test_the_noise_on_the_sum_has_the_stated_standard_deviation(noisy):
    # An empty cohort leaves the noise alone: 83 coordinates of 30 rounds, deviation 0.5 * 1.5 over the constant 4.
    state = noisy.initialize()
    noise = np.concatenate([change(noisy, state, []) for _ in range(30)])
    statistic = np.sum(np.square(noise / (0.5 * 1.5 / 4)))
    assert 1e-7 < stats.chi2(len(noise)).cdf(statistic) < 1 - 1e-7  # false alarm 2e-7
    assert stats.kstest(noise / (0.5 * 1.5 / 4), "norm").pvalue > 1e-7
    assert len(np.unique(noise)) > 0.99 * len(noise)


def test_noise_is_added_once_whatever_the_number_of_clients(make_process, draw_clients):
    # Clients clipped to next to nothing: what is left is noise, here of deviation 1e-4 * 1e4 / 10 = 0.1.
    process = make_process(l2_norm_clip=1e-4, noise_multiplier=1e4, expected_clients_per_round=10, shards=4)
    state, clients = process.initialize(), draw_clients([3] * 12)
    noise = np.concatenate([change(process, state, clients) for _ in range(20)])
    statistic = np.sum(np.square(noise / 0.1))
    assert 1e-7 < stats.chi2(len(noise)).cdf(statistic) < 1 - 1e-7  # false alarm 2e-7; the clients add below 0.1 %


def test_two_rounds_from_one_state_have_different_noise(noisy):
    state = noisy.initialize()
    restored = copy.deepcopy(state)
    first, second, third = (change(noisy, each, []) for each in (state, state, restored))
    for a, b in ((first, second), (first, third), (second, third)):
        assert not np.any(a == b)
        # Correlation of 83 pairs of independent normals: above 0.6 with probability below 1e-8.
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.6


def test_noise_differs_after_a_checkpoint(noisy):
    state = noisy.next(noisy.initialize(), []).state
    restored = pickle.loads(pickle.dumps(state))
    for saved, loaded in zip(trainable(noisy, state), trainable(noisy, restored), strict=True):
        np.testing.assert_array_equal(saved, loaded)
    assert not np.any(change(noisy, state, []) == change(noisy, restored, []))


def test_states_hold_no_noise_key_and_a_round_without_one_fails(noisy, monkeypatch):
    state = noisy.next(noisy.initialize(), []).state
    np.testing.assert_array_equal(state.noise_key, aggregation.blank_noise_key())
    prepared, _ = noisy._prepare(state, [])
    assert np.any(prepared.noise_key != aggregation.blank_noise_key())
    monkeypatch.setattr(aggregation, "fresh_noise_key", aggregation.blank_noise_key)
    with pytest.raises(Exception, match="noise key is blank"):
        noisy.next(state, [])


# Keras on both sides.


def test_the_trained_model_is_the_builders_own(noisy, draw_clients, tmp_path):
    import tensorflow as tf

    state = noisy.next(noisy.initialize(), draw_clients([5])).state
    model = noisy.model(state)
    for value, expected in zip(model.get_weights(), trainable(noisy, state), strict=True):
        np.testing.assert_array_equal(value, expected)
    model.save(tmp_path / "model.keras")
    ((x, y),) = draw_clients([6])
    again = tf.keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again(x), model(x), atol=1e-6)
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(x, y, verbose=0)
    back = noisy.start_from(model)
    np.testing.assert_array_equal(trainable(noisy, back)[0], model.get_weights()[0])


def test_a_model_of_another_architecture_is_refused(noisy):
    other = models.build_model("mlp", (DIM,), CLASSES, hidden_units=(9,))
    with pytest.raises(InvalidArgumentError, match="shapes"):
        noisy.start_from(other)
    with pytest.raises(InvalidArgumentError, match="shapes"):
        noisy.assign(noisy.initialize(), other)


@pytest.mark.parametrize(
    ("loss", "num_outputs", "labels"),
    [
        ("binary_crossentropy", 1, np.array([0, 1, 1])),
        ("categorical_crossentropy", 3, np.eye(3)),
        ("mse", 1, np.array([[0.1], [2.0], [3.0]])),
    ],
)
def test_other_losses_and_labels(make_process, loss, num_outputs, labels):
    build = lambda: models.build_model("logistic", (DIM,), num_outputs)  # noqa: E731
    process = make_process(build, loss=loss, l2_norm_clip=1e6, expected_clients_per_round=1)
    model = process.model()
    state, x = process.start_from(model), np.random.default_rng(0).normal(size=(3, DIM)).astype(np.float32)
    model.compile("sgd", loss)
    model.optimizer.learning_rate = 0.1
    model.fit(x, labels, verbose=0)
    after = trainable(process, process.next(state, [(x, labels)]).state)
    for ours, theirs in zip(after, model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


# What is refused.


def _transformer():
    sizes = {"vocabulary_size": 9, "embedding_dim": 4, "feed_forward_units": 4}
    return models.build_model("transformer", (5,), CLASSES, mask_zero=True, **sizes)


def _frozen_batch_norm():
    import tensorflow as tf

    statistics = {"moving_mean_initializer": "ones", "gamma_initializer": "ones", "trainable": False}
    norm = tf.keras.layers.BatchNormalization(
        moving_variance_initializer=tf.keras.initializers.Constant(4), **statistics
    )
    dense = tf.keras.layers.Dense
    return tf.keras.Sequential([tf.keras.Input((DIM,)), dense(4, "tanh"), norm, dense(CLASSES, "softmax")])


@pytest.mark.slow
@pytest.mark.parametrize("build", [_transformer, _frozen_batch_norm])
def test_one_step_of_one_client_is_a_step_of_sgd(make_process, build):
    import tensorflow as tf

    start = build()
    shape, is_text = start.input_shape[1:], start.input_shape[1:] == (5,)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, (4, *shape)).astype(np.int32) if is_text else rng.normal(size=(4, *shape)).astype(np.float32)
    y = rng.integers(0, CLASSES, 4).astype(np.int32)
    process = make_process(build, l2_norm_clip=1e3, expected_clients_per_round=1)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.keras.losses.sparse_categorical_crossentropy(y, start(x, training=True)))
    gradients = [tf.convert_to_tensor(g).numpy().ravel() for g in tape.gradient(loss, start.trainable_variables)]
    moved = change(process, process.start_from(start), [(x, y)])
    assert np.abs(moved).max() > 1e-3
    np.testing.assert_allclose(moved, -0.1 * np.concatenate(gradients), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"l2_norm_clip": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"expected_clients_per_round": 0},
        {"client_learning_rate": "fast"},
        {"server_learning_rate": 0.0},
        {"server_momentum": 1.0},
        {"batch_size": 0},
        {"local_epochs": 1.5},
        {"shards": 0},
        {"clients_at_once": 0},
        {"loss": "no such loss"},
    ],
    ids=str,
)
def test_bad_arguments_are_refused(make_process, bad):
    with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
        make_process(**bad)


def _with_layer(make_layer):
    def build():
        import tensorflow as tf

        return tf.keras.Sequential(
            [tf.keras.Input((DIM,)), make_layer(tf.keras.layers), tf.keras.layers.Dense(CLASSES)]
        )

    return build


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (_with_layer(lambda layers: layers.BatchNormalization(name="bn")), "'bn' is a BatchNormalization"),
        (_with_layer(lambda layers: layers.Dense(2, name="d", activity_regularizer="l2")), "'d' has an activity_reg"),
        (lambda: "a model", "returned str"),
        ("a name", "not a model builder"),
    ],
)
def test_unsupported_models_are_refused_by_name(make_process, build, says):
    with pytest.raises(UnsupportedModelError, match=says):
        make_process(build)


def test_a_builder_that_hands_out_one_model_is_refused(make_process):
    model = models.build_model("logistic", (DIM,), CLASSES)
    with pytest.raises(UnsupportedModelError, match="returned before"):
        make_process(lambda: model)


def test_a_builder_that_loads_weights_is_told_what_to_do(tff, make_process):
    def build():
        model = models.build_model("logistic", (DIM,), CLASSES)
        model.set_weights([value.numpy() for value in model.weights])
        return model

    with pytest.raises(UnsupportedModelError, match="start_from"):
        make_process(build)


def test_a_model_with_two_inputs_is_refused(make_process):
    def build():
        import tensorflow as tf

        inputs = [tf.keras.Input((2,)), tf.keras.Input((2,))]
        return tf.keras.Model(inputs, tf.keras.layers.Dense(1)(tf.keras.layers.Add()(inputs)))

    with pytest.raises(UnsupportedModelError, match="2 inputs"):
        make_process(build)


def test_a_state_of_another_process_is_refused(noisy, make_process):
    other = make_process(lambda: models.build_model("logistic", (DIM,), CLASSES))
    for state in (None, other.initialize()):
        with pytest.raises(InvalidArgumentError, match="not of this process"):
            noisy.next(state, [])


def test_without_tff_the_error_says_how_to_add_it(monkeypatch, make_process):
    monkeypatch.setitem(sys.modules, "tensorflow_federated", None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps -r requirements/federated\.txt"):
        make_process(engine="tff")


def test_models_that_were_there_before_can_still_be_called(make_process):
    older = models.build_model("logistic", (DIM,), CLASSES)
    make_process()
    assert older(np.zeros((2, DIM), np.float32)).shape == (2, CLASSES)


def test_it_runs_in_another_thread_and_after_the_worker_died(tff, noisy):
    state, found = noisy.initialize(), []
    runtime._worker._process.kill()
    runtime._worker.wait()
    thread = threading.Thread(target=lambda: found.append(noisy.next(state, [])))
    thread.start()
    thread.join()
    assert found
