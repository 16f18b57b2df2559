"""DP optimizers as Keras users meet them: equal to Keras without clip and noise, saved, loaded, and hard to misuse."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, assert_same, global_norm, layers, released_sum, trainable_values

from tfprivacy_ft import models, optimizers
from tfprivacy_ft.errors import InvalidArgumentError, RawGradientsError, UnsupportedModelError
from tfprivacy_ft.keras_compat import IS_KERAS_3
from tfprivacy_ft.optimizers import (
    DPKerasAdagradOptimizer,
    DPKerasAdamOptimizer,
    DPKerasAdamWOptimizer,
    DPKerasSGDOptimizer,
    NoPlanWarning,
    SeededNoiseWarning,
    make_dp_optimizer_class,
)

keras = tf.keras
LOGITS = CrossEntropy(from_logits=True)
X = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 50)


def small_model():
    return keras.Sequential(
        [layers.Input((6,)), layers.Dense(5, "tanh", kernel_regularizer="l2"), layers.Dense(3, name="out")]
    )


PAIRS = [
    (keras.optimizers.SGD, DPKerasSGDOptimizer, {"learning_rate": 0.1}),
    (keras.optimizers.SGD, DPKerasSGDOptimizer, {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True}),
    (keras.optimizers.Adam, DPKerasAdamOptimizer, {"learning_rate": 0.01}),
    (keras.optimizers.AdamW, DPKerasAdamWOptimizer, {"learning_rate": 0.01, "weight_decay": 0.1}),
    (keras.optimizers.Adagrad, DPKerasAdagradOptimizer, {"learning_rate": 0.1}),
    (keras.optimizers.RMSprop, make_dp_optimizer_class(keras.optimizers.RMSprop), {"learning_rate": 0.01}),
]


@pytest.mark.parametrize(("plain", "private", "arguments"), PAIRS)
@pytest.mark.parametrize("jit", [False, True])
def test_no_noise_and_a_huge_clip_is_plain_keras(plain, private, arguments, jit):
    results, start = [], small_model().get_weights()
    for optimizer in (plain(**arguments), private(1e9, 0.0, **arguments)):
        model = small_model()
        model.set_weights(start)
        model.compile(optimizer, LOGITS, jit_compile=jit)
        model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)  # the last batch holds 2
        results.append(trainable_values(model))
    assert_same(results[1], results[0], rtol=1e-4)


@pytest.mark.parametrize("name", ["logistic", "mlp", "cnn", "text"])
def test_one_example_moves_every_built_in_model_by_at_most_the_clip(name):
    shape = {"cnn": (28, 28, 1), "text": (20,)}.get(name, (12,))
    options = {"vocabulary_size": 50} if name == "text" else {}
    model = models.build_model(name, shape, 3, **options)
    rng = np.random.default_rng(0)
    x = rng.integers(1, 50, (1, *shape)) if name == "text" else rng.normal(size=(1, *shape)).astype(np.float32)
    y = np.array([1])

    def huge(true, predicted):
        return 1e6 * keras.losses.sparse_categorical_crossentropy(true, predicted)

    released = released_sum(model, huge, x, y, 0.7)
    assert 0.3 < global_norm(released) <= 0.7 * (1 + 1e-4)


def test_removing_one_example_moves_the_clipped_sum_by_at_most_the_clip():
    start = small_model().get_weights()
    sums = []
    for keep in (slice(0, 10), slice(1, 10)):
        model = keras.Sequential([layers.Input((6,)), layers.Dense(5, "tanh"), layers.Dense(3)])
        model.set_weights(start)
        sums.append(released_sum(model, LOGITS, 100 * X[keep], Y[keep], 0.25))
    difference = global_norm([a - b for a, b in zip(*sums, strict=True)])
    assert 0.01 < difference <= 0.25 * (1 + 1e-4)


def test_without_a_plan_one_warning_and_a_counter():
    model = small_model()
    optimizer = DPKerasSGDOptimizer(1.0, 1.0, learning_rate=0.1)
    model.compile(optimizer, LOGITS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, Y, batch_size=16, epochs=2, verbose=0)
        model.train_on_batch(X[:4], Y[:4])
    assert len([w for w in caught if w.category is NoPlanWarning]) == 1
    assert optimizer.privacy_steps == 9


def test_a_seed_without_a_plan_is_warned_about_once_also_when_loaded(tmp_path):
    model = small_model()
    model.compile(DPKerasSGDOptimizer(1.0, 1.0, learning_rate=0.1, noise_seed=3), LOGITS)
    for trained in (model, None):
        if trained is None:
            model.save(tmp_path / "model.keras")
            trained = keras.models.load_model(tmp_path / "model.keras")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained.fit(X, Y, batch_size=16, epochs=2, verbose=0)
            trained.train_on_batch(X[:4], Y[:4])
        (warned,) = [w for w in caught if w.category is SeededNoiseWarning]
        assert "noise_seed=3 is for tests only" in str(warned.message)


def test_a_seed_repeats_the_training_and_no_seed_does_not():
    start, ends = None, []
    for seed in (3, 3, 4, None):
        model = small_model()
        start = start or model.get_weights()
        model.set_weights(start)
        model.compile(DPKerasSGDOptimizer(1.0, 1.0, learning_rate=0.1, noise_seed=seed), LOGITS)
        model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
        ends.append(trainable_values(model)[0])
    assert_same([ends[0]], [ends[1]], rtol=1e-5)
    assert all(np.abs(ends[0] - other).max() > 1e-3 for other in ends[2:])


@pytest.mark.parametrize("arguments", [{"secure_noise": True}, {"noise_seed": 7}, {}])
def test_where_noise_comes_from_survives_the_config(arguments):
    config = DPKerasAdamOptimizer.from_config(DPKerasAdamOptimizer(1.0, 1.0, **arguments).get_config()).get_config()
    assert {name: config[name] for name in ("secure_noise", "noise_seed")} == {
        "secure_noise": False,
        "noise_seed": None,
    } | arguments
    without = {name: value for name, value in config.items() if name not in ("secure_noise", "noise_seed")}
    assert DPKerasAdamOptimizer.from_config(without).get_config()["noise_seed"] is None  # saved by an older version


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"secure_noise": True, "noise_seed": 0}, "noise from a seed is not secure"),
        ({"secure_noise": 1}, "secure_noise=1 is not allowed: give True or False"),
        ({"noise_seed": -1}, "noise_seed=-1 is not allowed: give an integer >= 0"),
        ({"noise_seed": 1.5}, "noise_seed=1.5 is not allowed"),
    ],
)
def test_where_noise_cannot_come_from_is_refused(arguments, sentence):
    with pytest.raises(InvalidArgumentError, match=sentence):
        DPKerasSGDOptimizer(1.0, 1.0, **arguments)


def test_secure_noise_also_where_sums_are_added_up_and_no_step_without_it():
    model = small_model()
    optimizer = DPKerasSGDOptimizer(
        1.0, 1.0, learning_rate=1.0, accumulation_steps=2, expected_batch_size=8, secure_noise=True
    )
    model.compile(optimizer, LOGITS)
    before = trainable_values(model)
    model.train_on_batch(X[:4], Y[:4])
    assert_same(trainable_values(model), before, rtol=0)
    model.train_on_batch(X[4:8], Y[4:8])
    assert optimizer.privacy_steps == 1
    assert all(np.abs(a - b).min() > 0 for a, b in zip(trainable_values(model), before, strict=True))


def test_secure_noise_of_nothing_is_the_clipped_sum_itself():
    start, ends = None, []
    for secure in (False, True):
        model = small_model()
        start = start or model.get_weights()
        model.set_weights(start)
        model.compile(DPKerasSGDOptimizer(1.0, 0.0, learning_rate=1.0, secure_noise=secure), LOGITS)
        model.train_on_batch(X, Y)
        ends.append(trainable_values(model))
    assert_same(*ends, rtol=1e-5)


def test_the_step_counter_never_goes_back(tmp_path):
    model = small_model()
    model.compile(DPKerasAdamOptimizer(1.0, 1.0), LOGITS)
    model.fit(X, Y, batch_size=25, verbose=0)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = checkpoint.save(str(tmp_path / "at"))
    model.fit(X, Y, batch_size=25, verbose=0)
    checkpoint.restore(path)
    assert int(model.optimizer.iterations) == 2
    assert model.optimizer.privacy_steps == 4


def test_expected_batch_size_can_change_after_the_first_step():
    model = keras.Sequential([layers.Input((6,)), layers.Dense(3)])
    optimizer = DPKerasSGDOptimizer(1e-3, 0.0, learning_rate=1.0, expected_batch_size=1)
    model.compile(optimizer, LOGITS)
    moves = []
    for expected in (1.0, 10.0):
        optimizer.expected_batch_size.assign(expected)
        before = trainable_values(model)
        model.train_on_batch(X[:8], Y[:8])
        moves.append(global_norm([b - a for b, a in zip(before, trainable_values(model), strict=True)]))
    assert moves[0] / moves[1] == pytest.approx(10, rel=1e-3)


def test_raw_gradients_are_refused_before_and_after_a_private_step():
    model = small_model()
    model.compile(DPKerasSGDOptimizer(1.0, 1.0), LOGITS)
    raw = [(tf.zeros_like(v), v) for v in model.trainable_variables]
    with pytest.raises(RawGradientsError, match=r"model\.fit"):
        model.optimizer.apply_gradients(raw)
    model.fit(X, Y, verbose=0)
    with pytest.raises(RawGradientsError):
        model.optimizer.apply_gradients(raw)


def half_model(policy):
    """Computes in the policy's type, without a global policy: then Keras wraps no optimizer."""
    return keras.Sequential(
        [
            layers.Input((6,)),
            layers.Dense(5, "tanh", dtype=policy),
            layers.Dense(3, dtype=policy),
            layers.Activation("linear", dtype="float32"),
        ]
    )


def moved_by(optimizer, policy, start, scale=1.0, **compile_options):
    """What one step on the first ten examples takes from the weights."""
    model = half_model(policy)
    model.set_weights(start)

    def loss(true, predicted):
        return scale * keras.losses.sparse_categorical_crossentropy(true, predicted, from_logits=True)

    model.compile(optimizer, loss, **compile_options)
    model.train_on_batch(X[:10], Y[:10])
    return [b - a for b, a in zip(start, trainable_values(model), strict=True)]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_half_precision_steps_agree_with_float32(policy, scale):
    start = half_model("float32").get_weights()
    loss_scale = {"mixed_float16": 2.0**13 / scale, "mixed_bfloat16": None}[policy]
    results = [
        moved_by(
            DPKerasSGDOptimizer(0.3 * scale, 0.0, None, 1.0 / scale, expected_batch_size=1, loss_scale=used),
            kind,
            start,
            scale,
        )
        for kind, used in (("float32", None), (policy, loss_scale))
    ]
    assert 0.3 < global_norm(results[0]) <= 3.0
    assert_same(results[1], results[0], rtol=0.05 if policy == "mixed_bfloat16" else 0.01)


def test_the_clip_holds_in_float16_and_an_overflow_adds_nothing():
    start = half_model("float32").get_weights()
    for scale, moves in ((1e3, True), (1e12, False)):
        optimizer = DPKerasSGDOptimizer(0.1, 0.0, None, 1.0, expected_batch_size=1, loss_scale=4.0)
        moved = global_norm(moved_by(optimizer, "mixed_float16", start, scale))
        assert (0.1 if moves else 0.0) <= moved <= (10 * 0.1 * (1 + 1e-4) if moves else 0.0)


def test_loss_scale_on_the_slow_path():
    model = keras.Sequential([layers.Input((6, 3)), layers.LSTM(4), layers.Dense(3)])
    start, x, results = model.get_weights(), np.random.default_rng(0).normal(size=(5, 6, 3)).astype(np.float32), []
    for loss_scale in (None, 256.0):
        model.set_weights(start)
        results.append(released_sum(model, LOGITS, x, Y[:5], 0.3, private={"loss_scale": loss_scale}))
    assert_same(results[1], results[0], rtol=1e-4)


def test_float16_without_a_scale_of_ours_is_refused():
    model = half_model("mixed_float16")
    model.compile(DPKerasSGDOptimizer(0.1, 0.0), LOGITS)
    with pytest.raises(UnsupportedModelError, match=r"dense.*float16.*loss_scale=1024"):
        model.fit(X, Y, verbose=0)
    with pytest.raises(InvalidArgumentError, match=r"loss_scale=0\.0"):
        DPKerasSGDOptimizer(0.1, 0.0, loss_scale=0.0)
    with pytest.raises(InvalidArgumentError, match="use loss_scale"):
        DPKerasSGDOptimizer(0.1, 0.0, loss_scale_factor=2.0)


def test_a_loss_scale_optimizer_of_keras_is_refused_with_the_way_out():
    try:
        keras.mixed_precision.set_global_policy("mixed_float16")
        model = half_model("mixed_float16")
        model.compile(DPKerasSGDOptimizer(0.1, 0.0, loss_scale=1024.0), LOGITS)
        with pytest.raises(
            RawGradientsError, match="LossScaleOptimizer.*" + ("auto_scale_loss" if IS_KERAS_3 else "dtype")
        ):
            model.fit(X, Y, verbose=0)
        if IS_KERAS_3:
            model = half_model("mixed_float16")
            optimizer = DPKerasSGDOptimizer(0.1, 0.0, None, 1.0, expected_batch_size=1, loss_scale=1024.0)
            model.compile(optimizer, LOGITS, auto_scale_loss=False)
            model.fit(X, Y, verbose=0)
            assert optimizer.privacy_steps == 2
    finally:
        keras.mixed_precision.set_global_policy("float32")


@pytest.mark.skipif(not IS_KERAS_3, reason="Keras 2 has one backend")
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_of_keras_are_refused_in_one_sentence(backend):
    code = "from tfprivacy_ft import DPKerasSGDOptimizer"
    environment = {**os.environ, "KERAS_BACKEND": backend}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(
        f"tfprivacy_ft.errors.UnsupportedBackendError: Keras runs on the backend '{backend}'"
    )


def test_replicas_are_refused():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = small_model()
        model.compile(DPKerasSGDOptimizer(1.0, 1.0), LOGITS)
    with pytest.raises(UnsupportedModelError, match="MirroredStrategy"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"l2_norm_clip": -1.0}, "l2_norm_clip=-1.0"),
        ({"l2_norm_clip": float("nan")}, "l2_norm_clip=nan"),
        ({"l2_norm_clip": 0}, "l2_norm_clip=0"),
        ({"noise_multiplier": -0.1}, "noise_multiplier=-0.1"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier=nan"),
        ({"expected_batch_size": 0}, "expected_batch_size=0"),
        ({"num_microbatches": 4}, "one example is one microbatch"),
        ({"num_microbatches": 4, "expected_batch_size": 8}, "one example is one microbatch"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, sentence):
    with pytest.raises(InvalidArgumentError, match=sentence):
        DPKerasSGDOptimizer(**{"l2_norm_clip": 1.0, "noise_multiplier": 1.0, **arguments})


def test_microbatches_of_tensorflow_privacy_programs_are_accepted_when_they_hold_one_example():
    assert DPKerasAdamOptimizer(1.0, 1.0, 32, expected_batch_size=32).l2_norm_clip == 1.0


@pytest.mark.parametrize("wrong", [keras.optimizers.SGD(), object, DPKerasSGDOptimizer])
def test_only_keras_optimizer_classes_are_made_private(wrong):
    with pytest.raises(InvalidArgumentError):
        make_dp_optimizer_class(wrong)


@pytest.mark.parametrize("suffix", [".keras"] if IS_KERAS_3 else [".keras", ".h5", ""])
def test_saved_models_load_and_go_on(tmp_path, suffix):
    model = small_model()
    model.compile(DPKerasAdamOptimizer(0.7, 1.1, learning_rate=0.01, expected_batch_size=16), LOGITS)
    model.fit(X, Y, batch_size=16, verbose=0)
    path = str(tmp_path / f"model{suffix}")
    model.save(path)
    loaded = keras.models.load_model(path)
    assert_same(trainable_values(loaded), trainable_values(model), rtol=1e-6)
    if suffix:  # a SavedModel's optimizer is only good for its state
        assert (loaded.optimizer.l2_norm_clip, loaded.optimizer.noise_multiplier) == (0.7, 1.1)
        assert float(loaded.optimizer.expected_batch_size) == 16
        loaded.fit(X, Y, batch_size=16, verbose=0)
        assert loaded.optimizer.privacy_steps == 4


LOAD = """
import sys, numpy as np, tensorflow as tf
model = tf.keras.models.load_model(sys.argv[1], compile=False)
assert not any(name.startswith("tfprivacy_ft") for name in sys.modules)
print(float(np.sum(model.get_weights()[0])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_saved_models_load_in_plain_keras(tmp_path, suffix):
    model = small_model()
    model.compile(DPKerasAdamOptimizer(0.7, 1.1), LOGITS)
    model.fit(X, Y, verbose=0)
    path = str(tmp_path / f"model{suffix}")
    model.save(path)
    ran = subprocess.run([sys.executable, "-c", LOAD, path], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == pytest.approx(float(np.sum(model.get_weights()[0])), rel=1e-5)


def test_public_classes_have_the_documented_names():
    assert optimizers.DPKerasAdamOptimizer.__name__ == "DPKerasAdamOptimizer"
    assert "l2_norm_clip" in (DPKerasAdamOptimizer.__doc__ or "")


def test_class_weight_counts_before_the_clip():
    model = keras.Sequential([layers.Input((6,)), layers.Dense(3)])
    optimizer = DPKerasSGDOptimizer(0.1, 0.0, learning_rate=1.0, expected_batch_size=1)
    model.compile(optimizer, LOGITS)
    before = trainable_values(model)
    model.fit(X[:10], Y[:10], batch_size=10, class_weight={0: 1e6, 1: 1e6, 2: 1e6}, verbose=0)
    assert global_norm([b - a for b, a in zip(before, trainable_values(model), strict=True)]) <= 1.0 * (1 + 1e-4)
