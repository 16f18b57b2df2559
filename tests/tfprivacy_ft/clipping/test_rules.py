"""Clipping rules against their formulas, on both paths of the engine: what one example adds is at most the clip."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, assert_same, compile_for_sum, global_norm, layers, released_sum, trainable_values

from tfprivacy_ft.clipping import Automatic, ClippingRule, Flat, PerLayer, reference
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.optimizers import DPKerasAdamOptimizer, DPKerasSGDOptimizer
from tfprivacy_ft.plan import PrivacyPlan

keras = tf.keras
LOGITS = CrossEntropy(from_logits=True)
EXAMPLES, CLIP = 7, 0.8
Y = np.random.default_rng(1).integers(0, 4, EXAMPLES)


def fast_model():
    return keras.Sequential(
        [layers.Input((6, 3)), layers.Flatten(), layers.Dense(5, "tanh", name="body"), layers.Dense(4, name="head")]
    )


def slow_model():
    return keras.Sequential([layers.Input((6, 3)), layers.LSTM(5, name="body"), layers.Dense(4, name="head")])


MODELS = pytest.mark.parametrize("build", [fast_model, slow_model], ids=["fast", "slow"])
X = (
    np.random.default_rng(0).normal(size=(EXAMPLES, 6, 3)).astype(np.float32)
    * np.linspace(0.1, 5, EXAMPLES, dtype=np.float32)[:, None, None]
)


def norm(arrays):
    return np.sqrt(sum(np.square(np.asarray(a)).sum() for a in arrays))


def split(model):
    """Indices of the variables of body and head."""
    count = len(model.get_layer("body").trainable_variables)
    return [range(count), range(count, len(model.trainable_variables))]


def expected_sum(model, each, factors):
    """Sum over examples of factor of the group times gradient; `factors` is given the norms by group."""
    total = [np.zeros(v.shape) for v in model.trainable_variables]
    groups = split(model)
    for gradient in each:
        gradient = [np.asarray(g) for g in gradient]
        for group, factor in zip(groups, factors([norm([gradient[i] for i in g]) for g in groups]), strict=True):
            for i in group:
                total[i] += factor * gradient[i]
    return total


@MODELS
@pytest.mark.parametrize("clips", [None, {"body": 0.64, "head": 0.48}])
def test_per_layer_clips_each_layer_by_its_own(build, clips):
    model = build()
    each = reference.per_example_gradients(model, LOGITS, X, Y)
    own = [CLIP / np.sqrt(2)] * 2 if clips is None else list(clips.values())
    expected = expected_sum(model, each, lambda norms: [min(1, c / n) for c, n in zip(own, norms, strict=True)])
    released = released_sum(model, LOGITS, X, Y, CLIP, clipping=PerLayer(clips))
    assert_same(released, expected)


@MODELS
def test_automatic_scales_every_example_by_its_norm(build):
    model = build()
    each = reference.per_example_gradients(model, LOGITS, X, Y)
    expected = expected_sum(model, each, lambda norms: [CLIP / (np.hypot(*norms) + 0.5)] * 2)
    assert_same(released_sum(model, LOGITS, X, Y, CLIP, clipping=Automatic(stability=0.5)), expected)


class Reckless(ClippingRule):
    """A rule that keeps no promise of its own."""

    def weights(self, squared_norms, layers, clip):
        return [tf.fill(tf.shape(s), 1e3 * (i + 1)) for i, s in enumerate(squared_norms)]


@MODELS
@pytest.mark.parametrize("rule", [Flat(), PerLayer(), Automatic(1e-6), Reckless()])
def test_one_example_adds_at_most_the_clip(build, rule):
    def loss(true, predicted):
        return 1e6 * keras.losses.sparse_categorical_crossentropy(true, predicted, from_logits=True)

    released = released_sum(build(), loss, X[:1], Y[:1], CLIP, clipping=rule)
    assert 0.5 * CLIP < global_norm(released) <= CLIP * (1 + 1e-4)


@MODELS
@pytest.mark.parametrize("rule", [PerLayer()])
def test_a_bad_example_contributes_nothing(build, rule):
    start = build().get_weights()
    sums = []
    for keep, bad in ((slice(0, EXAMPLES), np.nan), (slice(1, EXAMPLES), None)):
        model, x = build(), X.copy()
        model.set_weights(start)
        if bad is not None:
            x[0] = bad
        sums.append(released_sum(model, LOGITS, x[keep], Y[keep], CLIP, clipping=rule))
    assert_same(*sums)


def test_a_gradient_of_zero_stays_zero_under_every_rule():
    for rule in (Flat(), PerLayer(), Automatic(1e-6)):
        model = fast_model()
        released = released_sum(model, LOGITS, X, Y, CLIP, clipping=rule, sample_weight=np.zeros(EXAMPLES, np.float32))
        assert global_norm(released) == 0


def test_the_total_of_the_clips_given_is_the_sensitivity():
    assert DPKerasSGDOptimizer(None, 1.0, clipping=PerLayer({"a": 0.6, "b": 0.8})).l2_norm_clip == pytest.approx(1.0)
    plan = PrivacyPlan(num_examples=20, batch_size=5, epochs=1, delta=1e-3, noise_multiplier=2.0)
    optimizer = plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=None, clipping=PerLayer({"a": 3.0, "b": 4.0}))
    assert optimizer.l2_norm_clip == 5.0
    with pytest.raises(InvalidArgumentError, match=r"l2_norm_clip=0\.6.*add up to 1\.0"):
        DPKerasSGDOptimizer(0.6, 1.0, clipping=PerLayer({"a": 0.6, "b": 0.8}))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"l2_norm_clip": None}, "l2_norm_clip=None"),
        ({"clipping": "flat"}, "not a clipping rule"),
        ({"clipping": PerLayer}, "not a clipping rule"),
        ({"l2_norm_clip": None, "clipping": Automatic()}, "l2_norm_clip=None"),
    ],
)
def test_bad_rules_get_one_sentence(arguments, sentence):
    with pytest.raises(InvalidArgumentError, match=sentence):
        DPKerasSGDOptimizer(**{"l2_norm_clip": 1.0, "noise_multiplier": 1.0, **arguments})


@pytest.mark.parametrize("clips", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}])
def test_bad_clips_get_one_sentence(clips):
    with pytest.raises(InvalidArgumentError):
        PerLayer(clips)


@pytest.mark.parametrize("stability", [0.0, -1.0, 1e-9, float("nan")])
def test_bad_stabilities_get_one_sentence(stability):
    with pytest.raises(InvalidArgumentError, match="stability"):
        Automatic(stability)


def test_a_layer_without_a_clip_is_refused_by_name():
    model = fast_model()
    with pytest.raises(UnsupportedModelError, match=r"head.*has no clip.*trainable=False"):
        released_sum(model, LOGITS, X, Y, None, clipping=PerLayer({"body": 1.0}))


@pytest.mark.parametrize("rule", [PerLayer({"body": 0.6, "head": 0.8}), Automatic(0.25)])
def test_rules_are_saved_with_the_model(tmp_path, rule):
    model = fast_model()
    model.compile(DPKerasAdamOptimizer(1.0, 1.1, learning_rate=0.01, clipping=rule), LOGITS)
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    kept = loaded.optimizer.mechanism.clipping
    assert (type(kept), kept.get_config()) == (type(rule), rule.get_config())
    assert_same(trainable_values(loaded), trainable_values(model), rtol=1e-6)
    loaded.fit(X, Y, verbose=0)


def test_rules_work_under_xla():
    results = []
    for jit in (False, True):
        keras.utils.set_random_seed(0)
        model = fast_model()
        compile_for_sum(model, LOGITS, CLIP, clipping=PerLayer(), jit_compile=jit)
        model.fit(X, Y, verbose=0)
        results.append(trainable_values(model))
    assert_same(*results)
