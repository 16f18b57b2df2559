"""Clips, noises and weights of a round, seen from outside; and that both engines do the same."""

import functools
import math

import numpy as np
import pytest
from federated_models import CLASSES, DIM, cnn, own_builder
from scipy import stats

from federated import PoissonCohorts, server_optimizers
from tfprivacy_ft import Adaptive
from tfprivacy_ft.errors import InvalidArgumentError

WEIGHTS = 83  # of the small model


def flat(process, state):
    return np.concatenate([np.ravel(value) for value in process.get_model_weights(state).trainable])


def change(process, state, clients):
    return flat(process, process.next(state, clients).state) - flat(process, state)


def in_order(clients):
    """The clients as data sets, whose batches are not shuffled: two rounds then train alike."""
    import tensorflow as tf

    return [tf.data.Dataset.from_tensor_slices(client).batch(8) for client in clients]


def within(statistic, count):
    """Whether a sum of `count` squares of standard normals may be this; false alarm 2e-7."""
    return 1e-7 < stats.chi2(count).cdf(statistic) < 1 - 1e-7


# Noise of clients.


@pytest.mark.parametrize("central", [0.0, 2.0])
def test_each_client_adds_its_own_noise_and_the_server_its_own_once(make_process, draw_clients, central):
    # Clients clipped to next to nothing: what is left is noise of 9 clients over the constant 4. They train in groups of four,
    # the last of which has three places that nobody takes.
    groups = {"shards": 2, "clients_at_once": 4}
    process = make_process(l2_norm_clip=1e-4, noise_multiplier=central * 1e4, local_noise_multiplier=1e4, **groups)
    state, clients = process.initialize(), draw_clients([3] * 9)
    noise = np.concatenate([change(process, state, clients) for _ in range(20)])
    assert within(np.sum(np.square(noise)) / ((9 + central**2) / 16), len(noise))
    assert len(np.unique(noise)) > 0.99 * len(noise)


def test_who_is_not_there_adds_no_noise(make_process):
    process = make_process(local_noise_multiplier=5.0)
    assert not change(process, process.initialize(), []).any()


def test_laplace_noise_has_its_scale_and_a_client_its_l1_norm(make_process, draw_clients):
    options = {"l2_norm_clip": None, "l1_norm_clip": 0.5}
    process = make_process(noise_multiplier=3.0, **options)
    state = process.initialize()
    noise = np.concatenate([change(process, state, []) for _ in range(20)])
    assert stats.kstest(noise / (0.5 * 3.0 / 4), "laplace").pvalue > 1e-7  # false alarm 1e-7
    quiet = make_process(noise_multiplier=0.0, client_learning_rate=1e3, **options)
    moved = change(quiet, quiet.initialize(), draw_clients([11], scale=10.0))
    assert np.sum(np.abs(moved)) * 4 == pytest.approx(0.5, rel=1e-3)


def test_multiplicative_noise_scales_each_number_of_the_mean(make_process, draw_clients):
    options = {"l2_norm_clip": 5.0, "server_learning_rate": 1.0}
    clients = in_order(draw_clients([30, 40], scale=5.0))
    plain, scaled = make_process(**options), make_process(multiplicative_noise=0.3, **options)
    state = scaled.start_from(plain.model(plain.initialize()))
    mean = change(plain, plain.start_from(scaled.model(state)), clients)
    factors = np.concatenate([change(scaled, state, clients) / mean - 1 for _ in range(10)])
    factors = factors[np.isfinite(factors)]
    assert len(factors) > 300 and np.std(factors) == pytest.approx(0.3, rel=0.2)
    assert "guarantees nothing" in scaled.notes["multiplicative noise"] and plain.notes == {}


# The clip that moves.


def test_the_clip_converges_to_the_quantile_of_the_norms(make_process):
    # A linear model with one output and squared error: from weights of zero and labels y, one step moves by y * x.
    norms = np.linspace(0.05, 2.0, 40).astype(np.float32)
    x = np.zeros((40, DIM), np.float32)
    x[:, 0] = 1.0
    process = make_process(
        _linear,
        loss="mse",
        client_learning_rate=0.5,
        server_learning_rate=1e-12,
        l2_norm_clip=10.0,
        noise_multiplier=0.1,
        clipping=Adaptive(target_quantile=0.75, learning_rate=0.5, count_stddev=1.0),
        expected_clients_per_round=40,
    )
    state = process.initialize()
    clients = [(x[i : i + 1], norms[i : i + 1]) for i in range(40)]
    clips = []
    for _ in range(60):
        state = process.next(state, clients).state
        clips.append(float(state.clip))
    # The noise on the share has deviation 1/40, and the clip follows its mean over some ten rounds: 0.75 +- 0.1 is far out.
    assert np.mean(norms <= np.mean(clips[-20:])) == pytest.approx(0.75, abs=0.1)
    assert clips[0] < 10.0


def _linear():
    import tensorflow as tf

    return tf.keras.Sequential(
        [tf.keras.Input((DIM,)), tf.keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")]
    )


def test_the_votes_are_paid_for_by_more_noise_on_the_sum(make_process):
    process = make_process(noise_multiplier=1.0, clipping=Adaptive(count_stddev=0.6, learning_rate=1e-9))
    state = process.initialize()
    noise = np.concatenate([change(process, state, []) for _ in range(20)])
    stddev = 0.5 * (1.0 - (2 * 0.6) ** -2) ** -0.5 / 4
    assert within(np.sum(np.square(noise / stddev)), len(noise))


# Weights, schedules, optimizers.


def test_clients_may_count_by_their_examples_where_nothing_is_private(make_process, draw_clients):
    options = {"l2_norm_clip": None, "expected_clients_per_round": 1}
    clients = in_order(draw_clients([5, 20, 11]))
    alone = make_process(**options)
    state = alone.initialize()
    each = [change(alone, state, [client]) for client in clients]
    together = make_process(client_weighting="examples", **options)
    mean = change(together, together.start_from(alone.model(state)), clients)
    np.testing.assert_allclose(mean, np.average(each, axis=0, weights=[5, 20, 11]), atol=1e-6)


def test_one_step_over_all_examples_is_fedsgd(make_process, draw_clients):
    import tensorflow as tf

    process = make_process(batch_size=None, client_learning_rate=1.0, l2_norm_clip=None, expected_clients_per_round=1)
    ((x, y),) = clients = draw_clients([50])
    state = process.initialize()
    model = process.model(state)
    with tf.GradientTape() as tape:
        loss = tf.keras.losses.SparseCategoricalCrossentropy()(y, model(x))
    gradient = np.concatenate([np.ravel(g) for g in tape.gradient(loss, model.trainable_weights)])
    np.testing.assert_allclose(change(process, state, clients), -gradient, atol=1e-6)


def test_learning_rates_follow_their_schedules_from_round_to_round(make_process, draw_clients):
    asked = []

    def falling(round_number):
        asked.append(round_number)
        return 0.1 if round_number < 2 else 1e-9

    clients = in_order(draw_clients([20]))
    for options in ({"client_learning_rate": falling}, {"server_learning_rate": falling, "server_momentum": 0.5}):
        process = make_process(**options)
        state, moved = process.initialize(), []
        for _ in range(3):
            after = process.next(state, clients).state
            moved.append(np.abs(flat(process, after) - flat(process, state)).max())
            state = after
        assert moved[0] > 1e-4 and moved[1] > 1e-4 and moved[2] < 1e-7
        assert "schedule falling" in (process.facts.client_learning_rate, process.facts.server_learning_rate)
    assert set(asked) == {0, 1, 2}


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (server_optimizers.SGD(0.1, 0.9), "sgdm"),
        (server_optimizers.Adagrad(0.1), "adagrad"),
        (server_optimizers.Adam(0.1), "adam"),
        (server_optimizers.Yogi(0.1), "yogi"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_server_optimizers_take_the_steps_of_tffs(tff, ours, name):
    import tensorflow as tf

    theirs = getattr(tff.learning.optimizers, f"build_{name}")(0.1, **({"momentum": 0.9} if name == "sgdm" else {}))
    rng = np.random.default_rng(0)
    weights = [tf.constant(rng.normal(size=shape), tf.float32) for shape in ((3, 2), (5,))]
    specs = [tf.TensorSpec(value.shape, value.dtype) for value in weights]
    states, both = [ours.initialize(specs), theirs.initialize(specs)], [weights, weights]
    for _ in range(5):
        gradients = [tf.constant(rng.normal(size=value.shape), tf.float32) for value in weights]
        for i, optimizer in enumerate((ours, theirs)):
            states[i], both[i] = optimizer.next(states[i], both[i], gradients)
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Both engines.


@pytest.mark.slow
@pytest.mark.parametrize(("build", "shape"), [(own_builder, (DIM,)), (cnn, (8, 8, 1))], ids=["own", "cnn"])
def test_both_engines_train_alike(tff, make_process, build, shape):
    rng = np.random.default_rng(0)
    clients = in_order(
        [
            (rng.normal(size=(n, *shape)).astype(np.float32), rng.integers(0, CLASSES, n).astype(np.int32))
            for n in (1, 9, 23)
        ]
    )
    # A small epsilon would blow up how two orders of a sum differ wherever a gradient is next to nothing.
    adam = server_optimizers.Adam(0.01, epsilon=1e-3)
    options = {"l2_norm_clip": 0.1, "server_optimizer": adam, "shards": 2, "clients_at_once": 1}
    processes = [make_process(build, engine=engine, **options) for engine in ("tff", "tensorflow")]
    start = build()
    states = [process.start_from(start) for process in processes]
    for _ in range(3):
        states = [process.next(state, clients).state for process, state in zip(processes, states, strict=True)]
    after = [flat(process, state) for process, state in zip(processes, states, strict=True)]
    np.testing.assert_allclose(*after, atol=2e-6)
    before = np.concatenate([v.numpy().ravel() for v in start.trainable_weights])
    assert np.abs(after[0] - before).max() > 1e-3


def test_what_xla_compiles_trains_alike_for_cohorts_of_several_sizes(make_process):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, DIM)).astype(np.float32)
    everybody = in_order([(rows[:n], np.arange(n, dtype=np.int32) % CLASSES) for n in (1, 9, 23, 4, 5, 6, 7)])
    processes = [make_process(engine="tensorflow", jit_compile=jit, clients_at_once=2) for jit in (False, True)]
    start = processes[0].model()
    states = [process.start_from(start) for process in processes]
    for clients in (everybody, everybody[:2], []):
        states = [process.next(state, clients).state for process, state in zip(processes, states, strict=True)]
    after = [flat(process, state) for process, state in zip(processes, states, strict=True)]
    np.testing.assert_allclose(*after, atol=1e-5)
    assert np.abs(after[0] - np.concatenate([v.numpy().ravel() for v in start.trainable_weights])).max() > 1e-3


def test_xla_is_refused_for_tffs_worker(make_process):
    with pytest.raises(InvalidArgumentError, match="give engine='tensorflow'"):
        make_process(engine="tff", jit_compile=True)


def test_a_process_of_the_tensorflow_engine_trains_like_keras(make_process, draw_clients):
    process = make_process(
        engine="tensorflow", l2_norm_clip=1e6, expected_clients_per_round=1, batch_size=None, local_epochs=3
    )
    model = process.model()
    state = process.start_from(model)
    ((x, y),) = draw_clients([20])
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.optimizer.learning_rate = 0.1
    model.fit(x, y, batch_size=100, epochs=3, verbose=0)
    after = process.next(state, [(x, y)]).state
    for ours, theirs in zip(process.get_model_weights(after).trainable, model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


# What the ledger is told.


class _Cohorts:
    num_clients, clients_per_round = 40, 4.0

    def __init__(self, name):
        self.name = name

    def event(self, **mechanism):
        from tfprivacy_ft.events import Event

        return Event.unknown(count=1, unit="client", population=40, **mechanism)


def test_events_tell_what_each_party_sees(make_process):
    make_process = functools.partial(make_process, engine="tensorflow")  # made faster, and never run
    (central,) = make_process(noise_multiplier=1.5).events(_Cohorts("poisson"))
    assert (central.sampler, central.noise_multiplier, central.l2_norm_clip) == ("unknown", 1.5, 0.5)
    central, local = make_process(noise_multiplier=1.5, local_noise_multiplier=2.0).events(_Cohorts("poisson"))
    assert (central.noise_multiplier, local.sampler, local.noise_multiplier) == (1.5, "local", 2.0)
    (local,) = make_process(local_noise_multiplier=2.0).events(_Cohorts("poisson"))
    assert local.is_local
    promised = make_process(noise_multiplier=1.5, local_noise_multiplier=2.0, least_reports=4)
    central, _ = promised.events(_Cohorts("fixed"))
    assert central.noise_multiplier == pytest.approx(math.sqrt(1.5**2 + 4 * 2.0**2))
    with pytest.raises(InvalidArgumentError, match="least_reports=4 is more than a cohort of these is sure to have"):
        promised.events(_Cohorts("poisson"))
    with pytest.raises(InvalidArgumentError, match="least_reports=4"):
        promised.event(40)
    (laplace,) = make_process(l2_norm_clip=None, l1_norm_clip=1.0, noise_multiplier=2.0).events(_Cohorts("cyclic"))
    assert (laplace.mechanism, laplace.l2_norm_clip) == ("laplace", None)
    (moving,) = make_process(noise_multiplier=1.0, clipping=Adaptive()).events(_Cohorts("cyclic"))
    assert (moving.noise_multiplier, moving.l2_norm_clip) == (1.0, None)


def test_noise_of_clients_shows_who_is_there_so_that_no_draw_amplifies(make_process):
    process = make_process(noise_multiplier=1.5, local_noise_multiplier=2.0, engine="tensorflow")
    central, local = process.events(PoissonCohorts(40, 4))
    assert (central.sampler, central.count, central.participations) == ("shuffled", 1, 1)
    assert (central.noise_multiplier, central.relation, local.participations) == (1.5, "zero_out", 1)
    assert process.event(40) == central
    assert make_process(noise_multiplier=1.5, engine="tensorflow").event(40).sampler == "poisson"


def test_a_state_of_another_process_brings_neither_its_clip_nor_its_rate(make_process):
    options = {"engine": "tensorflow"}
    loose = make_process(l2_norm_clip=None, server_learning_rate=5.0, **options)
    noisy = make_process(noise_multiplier=1.0, server_learning_rate=0.5, **options)
    state = noisy.next(loose.initialize(), []).state
    assert state.clip == 0.5 and state.optimizer["learning_rate"] == 0.5
    assert np.isfinite(flat(noisy, state)).all()
    moving = make_process(noise_multiplier=1.0, clipping=Adaptive(), **options)
    with pytest.raises(InvalidArgumentError, match="state has a clip of inf"):
        moving.next(loose.initialize(), [])
    with pytest.raises(InvalidArgumentError, match="not of this process"):
        make_process(server_momentum=0.9, **options).next(loose.initialize(), [])


def test_a_loss_of_a_whole_batch_is_refused(make_process, draw_clients):
    import tensorflow as tf

    process = make_process(loss=lambda y, p: tf.reduce_mean(p), engine="tensorflow", example_spec=_spec())
    with pytest.raises(InvalidArgumentError, match="returns one number for a whole batch"):
        process.next(process.initialize(), draw_clients([3]))


def _spec():
    import tensorflow as tf

    return tf.TensorSpec([DIM], tf.float32), tf.TensorSpec([], tf.int32)


def test_a_round_with_fewer_reports_than_promised_does_not_run(make_process, draw_clients):
    process = make_process(local_noise_multiplier=2.0, least_reports=3)
    with pytest.raises(InvalidArgumentError, match="2 clients are fewer than least_reports=3"):
        process.next(process.initialize(), draw_clients([4, 5]))


# What is refused.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"client_weighting": "examples", "noise_multiplier": 1.0},
            "client_weighting='examples' does not go with privacy",
        ),
        ({"client_weighting": "size"}, "use 'equal' or 'examples'"),
        ({"l1_norm_clip": 1.0}, "were both given"),
        ({"l2_norm_clip": None, "noise_multiplier": 1.0}, "noise without a clip protects nobody"),
        ({"l2_norm_clip": None, "local_noise_multiplier": 1.0}, "noise without a clip protects nobody"),
        ({"clipping": Adaptive(), "local_noise_multiplier": 1.0}, "a moving clip needs"),
        ({"clipping": Adaptive(), "l2_norm_clip": None}, "a moving clip needs"),
        ({"clipping": "adaptive"}, "clipping is a str"),
        ({"clipping": Adaptive(count_stddev=0.1), "noise_multiplier": 1.0}, "count_stddev=0.1 is not allowed"),
        ({"least_reports": 2}, "they add none"),
        ({"least_reports": -1}, "least_reports=-1 is not allowed"),
        ({"multiplicative_noise": -0.1}, "multiplicative_noise"),
        ({"local_noise_multiplier": float("inf")}, "local_noise_multiplier"),
        ({"engine": "jax"}, "use 'tff' or 'tensorflow'"),
        ({"client_learning_rate": lambda round_number: float("nan")}, "the learning rate of round 0 is nan"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_in_a_sentence(make_process, changes, says):
    with pytest.raises(InvalidArgumentError, match=says):
        make_process(**changes)


def test_a_keras_optimizer_on_clients_is_refused(make_process):
    import tensorflow as tf

    with pytest.raises(InvalidArgumentError, match="client_learning_rate is the Keras optimizer Adam"):
        make_process(client_learning_rate=tf.keras.optimizers.Adam())
