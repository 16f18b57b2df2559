"""Promises of the engine over random architectures, losses and batches; `architectures` makes them from one seed.

A failing test says the seed and what the model is made of. With the environment variable REPLAY set to a seed, the
tests run that seed alone: `REPLAY=123 pytest tests/tfprivacy_ft/clipping/test_properties.py -k loop`.
"""

import contextlib
import gc
import os
import warnings

import architectures
import numpy as np
import pytest
import tensorflow as tf
from helpers import global_norm, trainable_values
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tfprivacy_ft import optimizers
from tfprivacy_ft.clipping import SlowClippingWarning, clipped_sum, reference
from tfprivacy_ft.keras_compat import IS_KERAS_3, keras

EXAMPLES = 8
HUGE = 1e6
_OF_THIS_STACK = 0x5DEECE6 if IS_KERAS_3 else 0  # each stack tries seeds of its own
SLOW_TRAITS = {"recurrent", "learned mask"}


@pytest.fixture(scope="module", autouse=True)
def _what_was_there_before_is_not_looked_through_for_garbage():
    """Keras 3 collects garbage whenever a session is cleared, which is slow where many tests have run before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def over_seeds(count):
    """Runs the property of one seed on `count` seeds, the same in every run of a stack, or on the one that REPLAY names."""

    def decorate(check):
        def of_one(seed):
            try:
                check(seed)
            except Exception as error:
                raise AssertionError(f"REPLAY={seed} fails: {error}") from error

        if "REPLAY" in os.environ:
            return lambda: of_one(int(os.environ["REPLAY"]))
        of_one.__name__ = of_one.__qualname__ = check.__name__
        seeds = st.integers(0, 2**31 - 1).map(lambda seed: seed ^ _OF_THIS_STACK)
        chosen = settings(max_examples=count, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        return chosen(given(seed=seeds)(of_one))

    return decorate


@contextlib.contextmanager
def described(case):
    """Adds to a failure what the model is made of."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{case}\n{error}") from error
    finally:
        keras.backend.clear_session()


@contextlib.contextmanager
def floats(dtype):
    """Makes models in `dtype`, also where a test before this one has set a policy, which then goes before floatx."""
    before, policy = keras.backend.floatx(), keras.mixed_precision.global_policy()
    keras.backend.set_floatx(dtype)
    keras.mixed_precision.set_global_policy(dtype)
    try:
        yield
    finally:
        keras.backend.set_floatx(before)
        keras.mixed_precision.set_global_policy(policy)


def signature(arrays, rows):
    return tuple(tf.TensorSpec((rows, *a.shape[1:]), a.dtype) for a in arrays)


def arrays_of(case):
    return (*case.x, *case.y, *([] if case.weights is None else [case.weights]))


def apart(case, tensors):
    """Inputs, labels and weights, of one flat list."""
    tensors, inputs, outputs = list(tensors), len(case.x), len(case.y)
    return tensors[:inputs], tensors[inputs : inputs + outputs], (tensors[inputs + outputs :] or [None])[0]


def engine_of(case, rows):
    """What the engine makes of batches of `rows` rows (None: any number), and whether it was slow about it."""

    @tf.function(input_signature=(signature(arrays_of(case), rows), tf.TensorSpec([])), autograph=False)
    def run(batch, clip):
        clipped = clipped_sum(case.loss(*apart(case, batch)), case.variables, clip)
        zeros = [tf.zeros_like(v) for v in case.variables]
        independent = [z if g is None else g for g, z in zip(clipped.data_independent, zeros, strict=True)]
        return clipped.sums, independent, clipped.norms

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.get_concrete_function()
    return run, [str(w.message) for w in caught if issubclass(w.category, SlowClippingWarning)]


def loop_of(case, batch):
    """Each example's gradients from a batch of that example alone, and those of the regularisers."""

    @tf.function(input_signature=(signature(batch, 1),), autograph=False)
    def run(example):
        with tf.GradientTape() as tape:
            value = case.loss(*apart(case, example))
        return dense(tape.gradient(value, case.variables), case.variables)

    with tf.GradientTape() as tape:
        value = case.regularisers()
    regular = [g.numpy() for g in dense(tape.gradient(value, case.variables), case.variables)]
    each = []
    for i in range(len(batch[0])):
        gradients = run(tuple(a[i : i + 1] for a in batch))
        each.append([g.numpy().astype(np.float64) - r for g, r in zip(gradients, regular, strict=True)])
    return each, regular


def fit(case, static, steps=1):
    """Trains on all examples `steps` times, in one batch."""
    batches = case.batches(len(case.y[0]), steps, drop_remainder=static)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.model.fit(batches, verbose=0)


def dense(gradients, variables):
    return [
        tf.zeros_like(v) if g is None else tf.convert_to_tensor(g) for g, v in zip(gradients, variables, strict=True)
    ]


def assert_same(actual, expected, rtol, scale, what):
    """Equal up to `rtol` of `scale`."""
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        np.testing.assert_allclose(a, e, atol=rtol * scale, rtol=0, err_msg=f"{what}, variable {k}")


def largest(arrays):
    return max((float(np.abs(a).max()) for a in arrays if np.size(a)), default=0.0)


def check_against_loop(seed, rtol, static, checked=frozenset()):
    """Norms and sums are those of the loop; replacing one example moves no other; a huge loss stays within the clip.

    A model that is made of nothing but kinds that are in `checked` is passed over; returns the kinds that it is made of.
    """
    without = ("dropout", "activity") if static else ("dropout",)
    case = architectures.build(seed, EXAMPLES + 1, without=without, weighted=static or None)
    with described(case):
        kinds = {*case.parts, *case.traits, f"static: {static}"}
        if kinds <= checked:
            return kinds
        everything = arrays_of(case)
        each, regular = loop_of(case, everything)
        norms = np.array([reference.norm(g) for g in each])
        run, slow = engine_of(case, EXAMPLES if static else None)
        assert not slow or case.traits & SLOW_TRAITS or (static and "masked" in case.traits), slow
        clip = float(np.float32(np.median(norms[norms > 0]))) if (norms > 0).any() else 1.0
        batch = tuple(a[:EXAMPLES] for a in everything)

        sums, independent, made = run(batch, clip)
        expected = reference.clipped_sum(each[:EXAMPLES], clip)
        scale = max(largest(e) for e in each[:EXAMPLES])
        np.testing.assert_allclose(made, norms[:EXAMPLES], rtol=rtol, atol=rtol * norms.max(), err_msg="norms")
        assert_same(sums, expected, rtol, scale, "sums")
        assert_same(independent, regular, rtol, max(largest(regular), 1e-30), "regularisers")

        j = seed % EXAMPLES
        others = [i for i in range(EXAMPLES) if i != j]
        replaced = tuple(np.concatenate([a[:j], a[-1:], a[j + 1 : EXAMPLES]]) for a in everything)
        sums, _, after = run(replaced, clip)
        moved = reference.clipped_sum([each[-1 if i == j else i] for i in range(EXAMPLES)], clip)
        np.testing.assert_allclose(
            after.numpy()[others],
            made.numpy()[others],
            rtol=rtol,
            atol=0.1 * rtol * norms.max(),
            err_msg="others' norms",
        )
        assert_same(sums, moved, rtol, max(scale, largest(each[-1])), "sums with one replaced")

        check_huge(case, run, static, norms)
    return kinds


def check_huge(case, run, static, norms):
    """One example, its loss a million times as large where weights can make it so: the sum is as long as the clip."""
    i = int(np.argmax(norms[:EXAMPLES]))
    batch = [a[:EXAMPLES] if static else a[i : i + 1] for a in arrays_of(case)]
    clip = 0.5 if case.weights is not None else max(norms[i], 1e-30) / HUGE
    if case.weights is not None:
        batch[-1] = HUGE * (np.arange(EXAMPLES) == i if static else np.ones(1)).astype(batch[-1].dtype)
    sums, _, _ = run(tuple(batch), clip)
    length = global_norm(sums)
    assert length <= clip * (1 + 1e-4), f"{length} exceeds {clip}"
    assert length > 0.99 * clip or norms[i] * HUGE <= clip, f"{length} is below {clip}"


CHECKED = set()


@over_seeds(100)
def test_equals_a_loop_over_examples(seed):
    """Every kind of layer with its settings, of head and of batch that 100 models hold; of models of nothing new, none."""
    CHECKED.update(check_against_loop(seed, 1e-4, static=seed % 3 == 0, checked=CHECKED))


@over_seeds(10)
def test_equals_a_loop_over_examples_in_double_precision(seed):
    with floats("float64"):
        check_against_loop(seed, 1e-9, static=seed % 3 == 0)


@over_seeds(8)
def test_a_step_of_fit_releases_what_the_loop_gives(seed):
    case = architectures.build(seed, EXAMPLES, without=("dropout",))
    with described(case):
        each, regular = loop_of(case, arrays_of(case))
        norms = [reference.norm(g) for g in each]
        clip = float(np.median([n for n in norms if n > 0] or [1.0]))
        case.compile(optimizers.DPKerasSGDOptimizer(clip, 0.0, None, 1.0, expected_batch_size=1))
        before = trainable_values(case.model)
        fit(case, static=seed % 2 == 0)
        released = [b - a for b, a in zip(before, trainable_values(case.model), strict=True)]
        expected = [s + r for s, r in zip(reference.clipped_sum(each, clip), regular, strict=True)]
        # What is subtracted from weights is known as well as the weights are.
        assert_same(released, expected, 1e-4, max(largest(expected), 1e-2 * largest(before)), "released")


@over_seeds(5)
def test_dropout_leaves_the_clip_in_place(seed):
    case = architectures.build(seed, 1, without=("activity",), weighted=True, needs="dropout")
    with described(case):
        run, _ = engine_of(case, None)
        batch = [*arrays_of(case)[:-1], np.full(1, HUGE, np.float32)]
        sums, _, norms = run(tuple(batch), 0.5)
        assert global_norm(sums) <= 0.5 * (1 + 1e-4)
        assert global_norm(sums) > 0.99 * min(0.5, norms[0])


OPTIMIZERS = (
    ("SGD", {"learning_rate": 0.05}),
    ("SGD", {"learning_rate": 0.05, "momentum": 0.9}),
    ("Adam", {"learning_rate": 0.01, "epsilon": 1e-2}),  # what is zero but for rounding is not made large
    ("AdamW", {"learning_rate": 0.01, "epsilon": 1e-2, "weight_decay": 0.1}),
)


@over_seeds(8)
def test_without_clip_and_noise_training_is_that_of_keras(seed):
    case = architectures.build(seed, EXAMPLES, without=("dropout", "masked", "activity"))
    # Keras 3's Adam squares each of several gradients of one row of a table, rather than their sum.
    usable = OPTIMIZERS[:2] if IS_KERAS_3 and "table" in case.traits else OPTIMIZERS
    name, options = usable[seed % len(usable)]
    with described(case):
        ours = getattr(optimizers, f"DPKeras{name}Optimizer")
        private = ours(1e9, 0.0, expected_batch_size=1 if case.summed else None, **options)
        start, ends = case.model.get_weights(), []
        for optimizer in (getattr(keras.optimizers, name)(**options), private):
            case.model.set_weights(start)
            case.compile(optimizer)
            fit(case, static=seed % 2 == 0, steps=3)
            ends.append(trainable_values(case.model))
        plain, ours = ends
        assert_same(ours, plain, 1e-4, max(largest(plain), 1.0), f"{name} {options}")
