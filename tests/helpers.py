"""What several tests share: one noiseless step of a DP optimizer, seen as the clipped sum that it applied."""

import warnings

import numpy as np
import tensorflow as tf

from tfprivacy_ft.clipping import SlowClippingWarning, reference
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer

layers = tf.keras.layers
CrossEntropy = tf.keras.losses.SparseCategoricalCrossentropy
EXAMPLES = 7


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(EXAMPLES, *shape)).astype(np.float32)


def labels(*shape, classes=4, seed=1):
    return np.random.default_rng(seed).integers(0, classes, (EXAMPLES, *shape))


def trainable_values(model):
    return [v.numpy() for v in model.trainable_variables]


def compile_for_sum(model, loss, l2_norm_clip, *, private=None, clipping=None, **options):
    """Compiles so that one step subtracts the clipped sum from the weights: SGD, learning rate 1, no noise.

    `private` holds further arguments of the DP optimizer, and `options` those of `compile`.
    """
    settings = {"expected_batch_size": 1, "clipping": clipping, **(private or {})}
    optimizer = DPKerasSGDOptimizer(l2_norm_clip, 0.0, None, 1.0, **settings)
    model.compile(optimizer=optimizer, loss=loss, **options)
    if model.built:  # else Keras 2 would trace the step twice, the first time to make the optimizer's variables
        optimizer.build(model.trainable_variables)
    return model


def released_sum(model, loss, x, y, l2_norm_clip, *, static_batch=False, sample_weight=None, **options):
    """The clipped sum that one `fit` step on the whole of x, y released, one array for each trainable variable."""
    if not model.built:
        model(x[:1])
    compile_for_sum(model, loss, l2_norm_clip, **options)
    arrays = (x, y) if sample_weight is None else (x, y, sample_weight)
    batches = tf.data.Dataset.from_tensor_slices(arrays).batch(len(y), drop_remainder=static_batch)
    before = trainable_values(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(batches, verbose=0)
    return [b - a for b, a in zip(before, trainable_values(model), strict=True)]


def global_norm(arrays):
    return float(np.sqrt(sum(np.square(np.asarray(a, np.float64)).sum() for a in arrays)))


def assert_same(actual, expected, rtol=1e-4):
    """Equal up to `rtol` of the largest entry of all."""
    scale = max(np.abs(e).max() for e in expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=rtol * scale, rtol=rtol)


def assert_exact(model, loss, x, y, *, fast, static_batch=False, **options):
    """One step releases what the loop over examples gives, with and only with fast rules if `fast`."""
    model(x[:1])
    each = reference.per_example_gradients(model, tf.keras.losses.get(loss), x, y)
    clip = float(np.median([reference.norm(g) for g in each]))
    compile_for_sum(model, loss, clip, **options)
    before = trainable_values(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(len(y), drop_remainder=static_batch), verbose=0)
    released = [b - a for b, a in zip(before, trainable_values(model), strict=True)]
    assert_same(released, reference.clipped_sum(each, clip))
    slow = [str(w.message) for w in caught if issubclass(w.category, SlowClippingWarning)]
    assert bool(slow) != fast, slow
    assert all("layer '" in text for text in slow)
