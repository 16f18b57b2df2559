"""The histogram of gradient norms, against norms found by a loop over examples; kept only where it was asked for."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import CrossEntropy, layers

from tfprivacy_ft import ledger
from tfprivacy_ft.clipping import reference
from tfprivacy_ft.gradient_norms import NormHistogram
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer
from tfprivacy_ft.plan import PrivacyPlan

N = 60
X = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32) * np.geomspace(0.01, 10, N)[:, None].astype(
    np.float32
)
Y = np.random.default_rng(1).integers(0, 3, N)


def test_bins_meet_at_the_clip_and_hold_everything():
    histogram = NormHistogram(2.0)
    norms = tf.constant([0.0, 1.99, 2.01, 1e9, float("nan"), 5.0])
    tf.function(histogram.add)(norms, tf.constant([True, True, True, True, True, False]), 2.0)
    found = histogram.take()
    middle = len(found.counts) // 2
    assert found.edges[middle] == 2.0 and found.examples == 5
    assert (sum(found.counts[:middle]), sum(found.counts[middle:])) == (2, 3)
    assert (found.counts[0], found.counts[-1], found.clipped) == (1, 2, 3)
    assert histogram.take() is None


@pytest.mark.parametrize("private", [{}, {"accumulation_steps": 2}])
@pytest.mark.parametrize("jit", [False, True])
def test_a_training_keeps_the_norms_of_its_first_gradients(tmp_path, jit, private):
    plan = PrivacyPlan(N, N // 2, 1, 1e-3, 1.0, **private)
    model = tf.keras.Sequential([layers.Input((5,)), layers.Dense(3)])
    each = reference.per_example_gradients(model, CrossEntropy(from_logits=True), X, Y)
    norms = np.array([reference.norm(gradients) for gradients in each])
    clip = float(np.median(norms)) * 1.0001
    # A learning rate of zero: every gradient is that of the first weights.
    model.compile(
        plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=clip, learning_rate=0.0, keep_gradient_norms=True),
        CrossEntropy(from_logits=True),
        jit_compile=jit,
    )
    model.fit(X, Y, batch_size=N // 4, verbose=0, callbacks=plan.callbacks(tmp_path))
    plan.close()
    contents = ledger.read(tmp_path)
    (kept,) = [moment.gradient_norms for moment in contents.history if moment.gradient_norms]
    expected = np.histogram(np.clip(norms, kept.edges[0], kept.edges[-1] * 0.999), kept.edges)[0]
    np.testing.assert_array_equal(kept.counts, expected)
    assert kept.clipped == np.sum(norms > clip)
    assert ledger.GRADIENT_NORMS in contents.notes


def test_nothing_is_kept_unless_it_was_asked_for_and_it_survives_a_configuration():
    assert DPKerasSGDOptimizer(1.0, 1.0).mechanism.norms is None
    asked = DPKerasSGDOptimizer(1.0, 1.0, keep_gradient_norms=True)
    again = DPKerasSGDOptimizer.from_config(asked.get_config())
    assert again.mechanism.norms is not None
    plan = PrivacyPlan(N, N // 2, 1, 1e-3, 1.0)
    plan.attach(again)
    assert [note.kind for note in plan.report().notes] == ["gradient norms"]
