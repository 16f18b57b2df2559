"""The plan against dp_accounting: what the ledger says after what really ran, by whatever way it ran."""

import dataclasses
import gc
import importlib.util
import threading
import weakref

import dp_accounting
import numpy as np
import pytest
import tensorflow as tf
from dp_accounting import pld
from helpers import CrossEntropy, layers, trainable_values

from tfprivacy_ft import accounting, ledger
from tfprivacy_ft.callbacks import EpsilonCallback
from tfprivacy_ft.compute_epsilon import compute_epsilon
from tfprivacy_ft.errors import BudgetExceededError, DatasetError, InvalidArgumentError, LedgerDamagedError
from tfprivacy_ft.keras_compat import IS_KERAS_3
from tfprivacy_ft.noise import DiscreteGaussianNoise
from tfprivacy_ft.optimizers import DPKerasAdamOptimizer, DPKerasSGDOptimizer
from tfprivacy_ft.plan import PrivacyPlan

N, BATCH, DELTA = 120, 20, 1e-4
X = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, N)


def make_plan(**changes):
    settings = {"num_examples": N, "batch_size": BATCH, "epochs": 3, "delta": DELTA, "noise_multiplier": 2.0}
    return PrivacyPlan(**{**settings, **changes})


def make_model(plan, **compile_options):
    model = tf.keras.Sequential([layers.Input((5,)), layers.Dense(3)])
    optimizer = plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0, learning_rate=0.1)
    model.compile(optimizer, CrossEntropy(from_logits=True), **compile_options)
    return model


def poisson_epsilon(steps, noise=2.0, and_gaussian=0):
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    event = dp_accounting.PoissonSampledDpEvent(BATCH / N, dp_accounting.GaussianDpEvent(noise))
    accountant.compose(event, steps)
    if and_gaussian:
        accountant.compose(dp_accounting.GaussianDpEvent(noise), and_gaussian)
    return accountant.get_epsilon(DELTA)


def gaussian_epsilon(releases, noise=2.0):
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    return accountant.compose(dp_accounting.GaussianDpEvent(noise), releases).get_epsilon(DELTA)


def counts(events):
    return {(e.sampler, e.count, e.participations) for e in events}


@pytest.mark.parametrize("jit", [False, True])
def test_two_fits_a_batch_and_a_resumed_run_are_accounted_as_what_ran(tmp_path, jit):
    plan = make_plan()
    model = make_model(plan, jit_compile=jit)
    for epochs in (2, 1):
        model.fit(plan.batches(X, Y), epochs=epochs, callbacks=plan.callbacks(tmp_path), verbose=0)
    assert plan.epsilon() == pytest.approx(poisson_epsilon(18), rel=1e-4)
    if not jit:
        for _ in range(2):
            model.train_on_batch(X[:7], Y[:7])
    plan.close()

    resumed = make_plan()
    again = make_model(resumed, jit_compile=jit)
    again.fit(resumed.batches(X, Y), epochs=1, callbacks=resumed.callbacks(tmp_path), verbose=0)
    resumed.close()

    contents = ledger.read(tmp_path)
    assert counts(contents.events) == {("poisson", 24, 24)} | (set() if jit else {("unknown", 2, 2)})
    assert contents.unsettled == 0
    report = compute_epsilon(tmp_path)
    (account,) = report.accounts
    assert account.relation == ("add_or_remove_one" if jit else "zero_out")
    assert report.epsilon == pytest.approx(poisson_epsilon(24, and_gaussian=0 if jit else 2), rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="Keras's callback needs TensorBoard")
def test_epsilon_is_in_tensorboard_by_its_own_callback(tmp_path):
    plan = make_plan()
    callbacks = [*plan.callbacks(), tf.keras.callbacks.TensorBoard(tmp_path)]
    history = make_model(plan).fit(plan.batches(X, Y), epochs=2, callbacks=callbacks, verbose=0).history
    written = {
        event.step: float(tf.make_ndarray(value.tensor))
        for file in (tmp_path / "train").glob("*tfevents*")
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
        if value.tag == "epoch_epsilon"
    }
    assert written == {epoch: pytest.approx(epsilon) for epoch, epsilon in enumerate(history["epsilon"])}
    assert len(written) == 2


def test_epsilon_is_in_history_and_grows_with_the_epochs(tmp_path):
    plan = make_plan()
    model = make_model(plan)
    history = model.fit(plan.batches(X, Y), epochs=3, callbacks=plan.callbacks(tmp_path), verbose=0).history
    *before, last = history["epsilon"]
    for epoch, shown in enumerate(before, start=1):
        assert 1 <= shown / poisson_epsilon(6 * epoch) < 1.005  # a quick bound
    assert before == sorted(before) and before[-1] < last == plan.epsilon() == pytest.approx(
        poisson_epsilon(18), rel=1e-4
    )
    assert "poisson" in str(plan.report()).lower()


def test_a_quick_epsilon_is_not_above_the_target_where_epsilon_is_not():
    plan = make_plan(target_epsilon=poisson_epsilon(18) * (1 + 1e-6))
    make_model(plan).fit(plan.batches(X, Y), epochs=3, callbacks=plan.callbacks(), verbose=0)
    assert accounting.quick_epsilon(plan.ledger.events(), DELTA) > plan.target_epsilon
    assert plan.target_epsilon >= plan.quick_epsilon() == plan.epsilon()


def test_arrays_given_to_fit_are_shuffled_passes_without_amplification(tmp_path):
    plan = make_plan()
    model = make_model(plan)
    model.fit(X, Y, batch_size=BATCH, epochs=2, callbacks=plan.callbacks(tmp_path), verbose=0)
    assert counts(plan.ledger.events()) == {("shuffled", 12, 2)}
    assert plan.epsilon() == pytest.approx(gaussian_epsilon(2), rel=1e-3)


@pytest.mark.parametrize("way", ["own_dataset", "repeated", "steps_per_epoch", "other_plan", "generator"])
def test_batches_that_nobody_vouches_for_count_every_example_in_every_step(way):
    plan, arguments = make_plan(), {}
    model = make_model(plan)
    batches = plan.batches(X, Y)
    if way == "own_dataset":
        batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)
    elif way == "repeated":
        batches = batches.repeat(1)
    elif way == "steps_per_epoch":
        arguments["steps_per_epoch"] = 6
    elif way == "other_plan":
        batches = make_plan(batch_size=21).batches(X, Y)
    else:
        batches = ((X[i : i + 20], Y[i : i + 20]) for i in range(0, N, 20))
    model.fit(batches, callbacks=plan.callbacks(), verbose=0, **arguments)
    ran = model.optimizer.privacy_steps  # 6, but Keras 3 takes a generator's first batch twice
    assert ran >= 6
    assert counts(plan.ledger.events()) == {("unknown", ran, ran)}


def test_batches_that_can_hold_an_example_twice_are_refused_before_anything_is_released():
    plan = make_plan()
    model = make_model(plan)
    rows = tf.data.Dataset.from_tensor_slices((X, Y))
    with pytest.raises(InvalidArgumentError, match=r"call \.repeat\(\) after \.batch\(\)"):
        model.fit(rows.repeat().shuffle(N).batch(BATCH), steps_per_epoch=3, callbacks=plan.callbacks(), verbose=0)
    assert model.optimizer.privacy_steps == 0
    assert counts(plan.ledger.events()) == set()
    model.fit(rows.batch(BATCH).repeat(), steps_per_epoch=3, callbacks=plan.callbacks(), verbose=0)
    assert counts(plan.ledger.events()) == {("unknown", 3, 3)}


def test_a_plan_for_users_counts_all_of_their_examples():
    plan = make_plan(examples_per_user=3)
    model = make_model(plan)
    model.fit(plan.batches(X, Y, user_ids=np.arange(N) // 3), callbacks=plan.callbacks(), verbose=0)
    (account,) = plan.report().accounts
    assert (account.unit, account.events[0].examples_per_user) == ("user", 3)
    assert "one user, with all of its examples, which are at most 3." in str(plan.report())
    (of_example,) = accounting.accounts(
        [dataclasses.replace(e, unit="example", examples_per_user=1) for e in account.events], plan.delta
    )
    assert plan.epsilon() > 1.5 * of_example.epsilon
    with pytest.raises(DatasetError, match="one user has 4 examples"):
        plan.batches(X, Y, user_ids=np.arange(N) // 4)
    with pytest.raises(InvalidArgumentError, match=f"owners of {N - 1} examples"):
        plan.batches(X, Y, user_ids=np.arange(N - 1))


def test_a_plan_says_who_is_protected_and_refuses_what_does_not_agree():
    assert make_plan().ledger.facts["unit"] == make_plan(unit="example").ledger.facts["unit"] == "example"
    plan = dataclasses.replace(make_plan(), examples_per_user=1)
    assert plan.ledger.facts["unit"] == dataclasses.replace(plan, unit="user").ledger.facts["unit"] == "user"
    for changes in ({"unit": "user"}, {"unit": "example", "examples_per_user": 2}, {"unit": "patient"}):
        with pytest.raises(InvalidArgumentError, match=r"unit='\w+' with examples_per_user=\w+ is not allowed"):
            make_plan(**changes)


def test_what_a_plan_for_users_spent_is_gone_from_the_budget_of_examples(tmp_path):
    first = make_plan(examples_per_user=2)
    make_model(first).fit(first.batches(X, Y), callbacks=first.callbacks(tmp_path), verbose=0)
    first.close()
    (of_user,) = compute_epsilon(tmp_path).accounts
    assert of_user.unit == "user"
    of_example = accounting.epsilon(accounting.concerning("example", of_user.events), first.delta)
    second = make_plan(target_epsilon=of_example)
    with pytest.raises(BudgetExceededError, match=r"no room\s+for a step"):
        make_model(second).fit(second.batches(X, Y), callbacks=second.callbacks(tmp_path), verbose=0)


def test_a_plan_for_users_needs_more_noise():
    common = {"target_epsilon": 3.0, "delta": 1e-5, "num_examples": 1000, "batch_size": 1000, "epochs": 4}
    of_example, of_user = (PrivacyPlan.solve(**common, examples_per_user=k) for k in (None, 5))
    assert of_user.noise_multiplier == pytest.approx(5 * of_example.noise_multiplier, rel=3e-4)


def test_choices_by_metrics_are_listed_as_releases(tmp_path):
    plan = make_plan()
    model = make_model(plan)
    validation = (X[:10], Y[:10])
    choosing = [
        tf.keras.callbacks.EarlyStopping(patience=5),
        tf.keras.callbacks.ModelCheckpoint(
            str(tmp_path / "best.weights.h5"), save_best_only=True, save_weights_only=True
        ),
    ]
    harmless = [
        tf.keras.callbacks.ModelCheckpoint(str(tmp_path / "last.weights.h5"), save_weights_only=True),
        tf.keras.callbacks.TerminateOnNaN(),
    ]
    model.fit(plan.batches(X, Y), validation_data=validation, callbacks=[*plan.callbacks(), *harmless], verbose=0)
    assert [note.kind for note in plan.report().notes] == ["training metrics", "evaluation"]
    model.fit(plan.batches(X, Y), validation_data=validation, callbacks=[*choosing, *plan.callbacks()], verbose=0)
    chosen = [note.text for note in plan.report().notes if note.kind == "a choice by metrics"]
    assert [text.split()[0] for text in chosen] == ["EarlyStopping", "ModelCheckpoint"]
    assert "Released without noise, a choice by metrics: EarlyStopping" in " ".join(str(plan.report()).split())


def test_held_out_figures_are_kept_with_what_was_spent_by_then(tmp_path):
    plan = make_plan()
    model = make_model(plan)
    model.fit(plan.batches(X, Y), epochs=2, verbose=0, validation_data=(X, Y), callbacks=plan.callbacks(tmp_path))
    plan.record_figures({"accuracy": 0.5, "broken": float("nan")})
    plan.close()
    contents = ledger.read(tmp_path)
    looks = [moment for moment in contents.history if moment.figures]
    assert [sum(event.count for event in moment.events) for moment in looks] == [6, 12, 12]
    assert [sorted(moment.figures) for moment in looks] == [["val_loss"], ["val_loss"], ["accuracy"]]
    assert ledger.EVALUATION in contents.notes


class ForEachClass(tf.keras.metrics.Metric):
    """A metric with more than one value, as Keras's F1Score."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        pass

    def result(self):
        return tf.constant([0.25, 0.5, 0.75])


def test_a_metric_of_several_numbers_is_no_figure(tmp_path):
    plan = make_plan()
    model = make_model(plan, metrics=[ForEachClass(name="each")])
    model.fit(plan.batches(X, Y), verbose=0, validation_data=(X, Y), callbacks=plan.callbacks(tmp_path))
    plan.record_figures({"each": np.zeros(3), "all": np.float32(0.5), "tensor": tf.constant(0.25)})
    plan.close()
    looks = [moment.figures for moment in ledger.read(tmp_path).history if moment.figures]
    assert [sorted(look) for look in looks] == [["val_loss"], ["all", "tensor"]]


def test_an_optimizer_that_is_done_writes_no_more_and_can_be_freed(tmp_path):
    plan = make_plan()
    plan.record_in(tmp_path)
    head, everything = make_model(plan), make_model(plan)
    for model in (head, everything, everything):
        model.train_on_batch(X, Y)
        plan.settle()
    assert len(ledger.read(tmp_path).trained) == 2
    mechanism = weakref.ref(head.optimizer.mechanism)
    del head, model
    tf.keras.backend.clear_session()
    gc.collect()
    assert mechanism() is None


def test_a_run_that_looks_at_nothing_lists_no_evaluation(tmp_path):
    plan = make_plan()
    make_model(plan).fit(plan.batches(X, Y), verbose=0, callbacks=plan.callbacks(tmp_path))
    assert ledger.EVALUATION not in plan.ledger.notes()


@pytest.mark.parametrize("by_fit", [True, False])
def test_what_was_trained_is_in_the_ledger_also_after_some_of_it_was_frozen(tmp_path, by_fit):
    model = tf.keras.Sequential([layers.Input((5,)), layers.Dense(4, name="body"), layers.Dense(3, name="head")])

    def train(trainable):
        plan = make_plan()
        model.get_layer("body").trainable = trainable
        optimizer = plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0, learning_rate=0.1)
        model.compile(optimizer, CrossEntropy(from_logits=True))
        if by_fit:
            model.fit(plan.batches(X, Y), epochs=2, verbose=0, callbacks=plan.callbacks(tmp_path))
        else:
            plan.record_in(tmp_path)
            model.train_on_batch(X, Y)
        plan.close()

    train(False)
    train(True)
    head, everything = ledger.read(tmp_path).trained
    assert (head.parameters, everything.parameters) == (15, 39)
    assert len(head.variables) == 2 and all("head" in name for name in head.variables)


def test_steps_are_reserved_before_they_run(tmp_path):
    plan = make_plan(steps_per_block=4)
    model = make_model(plan)
    seen = []

    class Look(tf.keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            reserved = sum(e.count for e in ledger.read(tmp_path).events)
            seen.append((self.model.optimizer.privacy_steps, reserved))

    model.fit(plan.batches(X, Y), callbacks=[*plan.callbacks(tmp_path), Look()], verbose=0)
    assert len(seen) == 6
    assert all(done < reserved <= done + 4 for done, reserved in seen)


def test_a_fit_with_one_forgotten_callback_is_not_taken_for_poisson():
    plan = make_plan()
    model = make_model(plan)
    model.fit(plan.batches(X, Y), verbose=0)
    plan.settle()
    assert counts(plan.ledger.events()) == {("unknown", 6, 6)}


def fit_and_break_off_after_three_steps(plan, model, run_dir):
    class Break(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(plan.batches(X, Y), callbacks=[*plan.callbacks(run_dir), Break()], verbose=0)


def test_a_run_that_breaks_off_counts_its_whole_block(tmp_path):
    plan = make_plan(steps_per_block=100)
    model = make_model(plan)
    fit_and_break_off_after_three_steps(plan, model, tmp_path)
    assert sum(e.count for e in ledger.read(tmp_path).events) == 100
    assert counts(plan.report().accounts[0].events) == {("poisson", 3, 3)}  # the process that ran them knows


def test_what_follows_a_fit_that_broke_off_is_not_taken_for_poisson(tmp_path):
    plan = make_plan(steps_per_block=100)
    model = make_model(plan)
    fit_and_break_off_after_three_steps(plan, model, tmp_path)
    model.train_on_batch(X[:5], Y[:5])
    plan.settle()
    assert counts(plan.ledger.events()) == {("poisson", 3, 3), ("unknown", 1, 1)}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("steps_per_execution", [1, 3, 4])  # 10 steps end within the second of three
def test_training_stops_at_the_budget_and_changes_nothing_after(jit, steps_per_execution, caplog):
    target = poisson_epsilon(10) + 1e-6
    plan = make_plan(target_epsilon=target)
    model = make_model(plan, jit_compile=jit, steps_per_execution=steps_per_execution)
    model.fit(plan.batches(X, Y), epochs=9, callbacks=plan.callbacks(), verbose=0)
    assert model.optimizer.privacy_steps == 10
    assert plan.epsilon() <= target
    assert "leaves no room" in caplog.text
    at_the_limit = trainable_values(model)
    with pytest.raises(BudgetExceededError, match=r"holds epsilon 1\.084"):
        model.fit(plan.batches(X, Y), epochs=2, callbacks=plan.callbacks(), verbose=0)
    assert model.optimizer.privacy_steps == 10
    if jit and steps_per_execution == 1:
        model.train_on_batch(X[:5], Y[:5])
    elif steps_per_execution == 1:
        with pytest.raises(tf.errors.UnknownError, match="BudgetExceededError"):
            model.train_on_batch(X[:5], Y[:5])
    for now, then in zip(trainable_values(model), at_the_limit, strict=True):
        np.testing.assert_array_equal(now, then)


def test_steps_on_unknown_batches_draw_on_the_same_budget():
    plan = make_plan(target_epsilon=poisson_epsilon(12, and_gaussian=1) + 1e-3)
    model = make_model(plan)
    model.fit(plan.batches(X, Y), epochs=2, callbacks=plan.callbacks(), verbose=0)
    model.train_on_batch(X[:5], Y[:5])
    with pytest.raises(tf.errors.UnknownError, match="BudgetExceededError"):
        model.train_on_batch(X[:5], Y[:5])
    assert model.optimizer.privacy_steps == 13
    assert 0.9 * plan.target_epsilon < plan.epsilon() <= plan.target_epsilon


def test_a_thread_that_asks_for_epsilon_loses_no_step(tmp_path):
    plan = make_plan()
    model = make_model(plan)
    stop = threading.Event()

    def poll():
        while not stop.is_set():
            plan.epsilon()

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        model.fit(plan.batches(X, Y), epochs=6, callbacks=plan.callbacks(tmp_path), verbose=0)
        for _ in range(10):
            model.train_on_batch(X[:5], Y[:5])
    finally:
        stop.set()
        thread.join()
    plan.settle()
    assert sum(e.count for e in plan.ledger.events()) >= model.optimizer.privacy_steps == 46


def test_a_callback_that_asks_for_epsilon_at_every_batch_does_not_unsettle_the_run():
    plan = make_plan()
    model = make_model(plan)

    class Ask(tf.keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            assert plan.epsilon() >= 0

    model.fit(plan.batches(X, Y), callbacks=[*plan.callbacks(), Ask()], verbose=0)
    assert counts(plan.ledger.events()) == {("poisson", 6, 6)}


def test_an_execution_that_ends_early_leaves_no_allowance():
    plan = make_plan()
    model = make_model(plan, steps_per_execution=4)  # 6 steps an epoch: 4, then 2

    class Sneak(tf.keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            full = tf.data.Dataset.from_tensors((X, Y)).repeat(4)
            self.model.train_function(iter(full))

    model.fit(plan.batches(X, Y), callbacks=[Sneak(), *plan.callbacks()], verbose=0)
    plan.settle()
    events = {e.sampler: e.count for e in plan.ledger.events()}
    assert events.get("poisson", 0) <= 6
    assert sum(events.values()) >= model.optimizer.privacy_steps


def test_what_an_announced_execution_did_not_use_is_taken_back():
    plan = make_plan()
    model = make_model(plan)
    recorder = plan.recorder(model.optimizer)
    recorder.use(plan.sampling_of({"x": plan.batches(X, Y), "y": None, "batch_size": None, "steps_per_epoch": None}))
    recorder.announce(4)
    model.train_on_batch(X[:BATCH], Y[:BATCH])
    recorder.finished()
    model.train_on_batch(X, Y)
    plan.settle()
    assert {e.sampler: e.count for e in plan.ledger.events()} == {"poisson": 1, "unknown": 1}


def test_a_gradient_that_is_never_applied_is_counted():
    plan = make_plan()
    optimizer = plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0)
    model = tf.keras.Sequential([layers.Input((5,)), layers.Dense(3)])

    @tf.function
    def step(x, y):
        loss = CrossEntropy(from_logits=True)(y, model(x, training=True))
        variables = [getattr(v, "value", v) if IS_KERAS_3 else v for v in model.trainable_variables]
        for gradient, variable in zip(optimizer.private_gradients(loss, variables), variables, strict=True):
            variable.assign_sub(gradient)

    for _ in range(3):
        step(tf.constant(X[:4]), tf.constant(Y[:4]))
    plan.settle()
    assert counts(plan.ledger.events()) == {("unknown", 3, 3)}


def test_steps_that_xla_could_not_reserve_are_spoken_of():
    plan = make_plan()
    model = make_model(plan, jit_compile=True)
    model.train_on_batch(X[:5], Y[:5])
    with pytest.warns(UserWarning, match="1 steps changed nothing"):
        plan.report()
    assert model.optimizer.privacy_steps == 0


def test_an_optimizer_belongs_to_one_plan_and_its_mechanism_does_not_change():
    plan = make_plan()
    optimizer = plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0)
    with pytest.raises(InvalidArgumentError, match="another plan"):
        make_plan().attach(optimizer)
    with pytest.raises(AttributeError):
        optimizer.mechanism.noise_multiplier = 0.0
    with pytest.raises(AttributeError):
        optimizer.mechanism.l2_norm_clip = 1e9


def test_a_step_that_was_not_reserved_moves_neither_momentum_nor_decay():
    plan = make_plan()
    model = tf.keras.Sequential([layers.Input((5,)), layers.Dense(3)])
    optimizer = plan.optimizer(tf.keras.optimizers.AdamW, l2_norm_clip=1.0, weight_decay=0.5)
    model.compile(optimizer, CrossEntropy(from_logits=True), jit_compile=True)
    before = trainable_values(model)
    model.train_on_batch(X[:5], Y[:5])  # compiled, and no callback to reserve it
    assert optimizer.privacy_steps == 0 and int(optimizer.iterations) == 0
    for now, then in zip(trainable_values(model), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_solve_never_gives_less_privacy_than_asked():
    plan = PrivacyPlan.solve(target_epsilon=2.0, delta=DELTA, num_examples=N, batch_size=BATCH, epochs=3)
    assert poisson_epsilon(plan.steps, plan.noise_multiplier) <= 2.0
    assert poisson_epsilon(plan.steps, plan.noise_multiplier * 0.99) > 2.0
    model = make_model(plan)
    model.fit(plan.batches(X, Y), epochs=plan.epochs, callbacks=plan.callbacks(), verbose=0)
    assert model.optimizer.privacy_steps == plan.steps


def test_what_was_released_in_memory_moves_to_the_folder(tmp_path):
    plan = make_plan()
    model = make_model(plan)
    model.fit(plan.batches(X, Y), callbacks=plan.callbacks(), verbose=0)
    model.fit(plan.batches(X, Y), callbacks=plan.callbacks(tmp_path), verbose=0)
    plan.close()
    assert counts(ledger.read(tmp_path).events) == {("poisson", 12, 12)}


SEED_SENTENCE = "the noise was drawn from noise_seed=11, for tests"


def test_a_test_seed_is_in_the_ledger_and_first_in_every_report(tmp_path):
    plan = make_plan()
    model = tf.keras.Sequential([layers.Input((5,)), layers.Dense(3)])
    model.compile(
        plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0, learning_rate=0.1, noise_seed=11),
        CrossEntropy(from_logits=True),
    )
    unused = plan.report()
    for folder in ("first", "second"):  # a folder that comes later is told as well
        model.fit(plan.batches(X, Y), callbacks=plan.callbacks(tmp_path / folder), verbose=0)
        plan.settle()
        (note,) = [note for note in ledger.read(tmp_path / folder).notes if note.kind == ledger.TEST_SEED]
        assert note.text.startswith(SEED_SENTENCE)
    for report in (unused, plan.report(), compute_epsilon(tmp_path / "first")):
        assert str(report).startswith(f"WARNING: {SEED_SENTENCE}") and str(report).count("noise_seed") == 1
        (warning,) = report.to_dict()["warnings"]
        assert "whatever epsilon says" in warning
        assert all("noise_seed" not in sentence for sentence in report.to_dict()["not_covered"])
    assert plan.epsilon() == pytest.approx(poisson_epsilon(6), rel=1e-3)  # the computed one, all the same


def test_a_loaded_optimizer_with_a_test_seed_is_recorded_too(tmp_path):
    model = tf.keras.Sequential([layers.Input((5,)), layers.Dense(3)])
    optimizer = make_plan().optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0, learning_rate=0.1, noise_seed=11)
    model.compile(optimizer, CrossEntropy(from_logits=True))
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    plan = make_plan()
    plan.attach(tf.keras.models.load_model(tmp_path / "model.keras").optimizer)
    assert str(plan.report()).startswith(f"WARNING: {SEED_SENTENCE}")


def test_no_seed_no_warning():
    plan = make_plan()
    make_model(plan).fit(plan.batches(X, Y), callbacks=plan.callbacks(), verbose=0)
    assert "WARNING" not in str(plan.report()) and plan.report().to_dict()["warnings"] == []


def test_secure_noise_passes_through_a_plan_and_a_saved_model(tmp_path):
    plan = make_plan()
    model = tf.keras.Sequential([layers.Input((5,)), layers.Dense(3)])
    optimizer = plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=1.0, learning_rate=0.1, secure_noise=True)
    model.compile(optimizer, CrossEntropy(from_logits=True))
    model.fit(plan.batches(X, Y), callbacks=plan.callbacks(), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = tf.keras.models.load_model(tmp_path / "model.keras").optimizer
    assert loaded.get_config()["secure_noise"] is True
    assert isinstance(loaded.mechanism.noise, DiscreteGaussianNoise)


def test_a_loaded_model_goes_on_in_the_same_ledger(tmp_path):
    plan = make_plan()
    model = make_model(plan)
    model.fit(plan.batches(X, Y), callbacks=plan.callbacks(tmp_path / "run"), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = tf.keras.models.load_model(tmp_path / "model.keras")
    loaded.fit(plan.batches(X, Y), callbacks=plan.callbacks(tmp_path / "run"), verbose=0)
    assert counts(plan.ledger.events()) == {("poisson", 12, 12)}


def test_zero_noise_is_infinite_epsilon_and_said():
    with pytest.warns(UserWarning, match="epsilon is infinite"):
        plan = make_plan(noise_multiplier=0.0)
    model = make_model(plan)
    model.fit(plan.batches(X, Y), callbacks=plan.callbacks(), verbose=0)
    assert plan.epsilon() == float("inf")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": N + 1}, "batch_size=121"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_examples": -3}, "num_examples=-3"),
        ({"epochs": 0}, "epochs=0"),
        ({"delta": 0}, "delta=0"),
        ({"delta": float("nan")}, "delta=nan"),
        ({"noise_multiplier": -1}, "noise_multiplier=-1"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier=nan"),
        ({"target_epsilon": -1.0}, "target_epsilon=-1.0"),
        ({"steps_per_block": 0}, "steps_per_block=0"),
    ],
)
def test_bad_settings_get_one_sentence(changes, sentence):
    with pytest.raises(InvalidArgumentError, match=sentence):
        make_plan(**changes)


def test_a_large_delta_is_warned_about():
    with pytest.warns(UserWarning, match="delta"):
        make_plan(delta=0.5)


def test_data_that_the_plan_was_not_made_for_is_refused():
    with pytest.raises(InvalidArgumentError, match="num_examples=120"):
        make_plan().batches(X[:50], Y[:50])
    with pytest.raises(DatasetError):
        make_plan().batches(X, Y[:50])


def test_optimizers_that_the_plan_cannot_vouch_for_are_refused():
    plan = make_plan()
    with pytest.raises(InvalidArgumentError, match="not a DP optimizer"):
        plan.attach(tf.keras.optimizers.SGD())
    with pytest.raises(InvalidArgumentError, match=r"noise_multiplier=1\.0"):
        plan.attach(DPKerasAdamOptimizer(1.0, 1.0))


def test_a_damaged_ledger_stops_the_run_before_it_starts(tmp_path):
    plan = make_plan()
    plan.record_in(tmp_path)
    plan.close()
    path = tmp_path / ledger.FILE_NAME
    path.write_bytes(path.read_bytes().replace(b'"open"', b'"opem"'))
    with pytest.raises(LedgerDamagedError):
        make_plan().callbacks(tmp_path)


def test_callback_is_a_keras_callback_and_training_metrics_are_noted():
    plan = make_plan()
    assert isinstance(plan.callbacks()[0], EpsilonCallback)
    model = make_model(plan)
    model.fit(plan.batches(X, Y), callbacks=plan.callbacks(), verbose=0)
    assert any("training metrics" in note.kind for note in plan.ledger.notes())
    assert accounting.accounts(plan.ledger.events(), DELTA)[0].releases == 6
