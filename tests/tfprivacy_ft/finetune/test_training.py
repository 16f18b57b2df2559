import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import warnings

import killed_fine_tuning as killed
import numpy as np
import pytest
import tensorflow as tf

from tfprivacy_ft import datasets, ledger, models, weights
from tfprivacy_ft.augmentation import RandomShift
from tfprivacy_ft.clipping import SlowClippingWarning
from tfprivacy_ft.errors import CheckpointError, DatasetError, InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.events import Event
from tfprivacy_ft.finetune import Bias, Full, Head, LastLayers, LoRA, Staged, features, finetune
from tfprivacy_ft.keras_compat import IS_KERAS_3, keras, write_saved_model
from tfprivacy_ft.overlap import PublicOverlapWarning

PROGRAM = pathlib.Path(killed.__file__)
DATA = datasets.load("breast_cancer")
BUDGET = {"target_epsilon": 2.0, "delta": 1e-4, "verbose": 0}


def run(model, x=DATA.x_train, y=DATA.y_train, **arguments):
    return finetune(model, x, y, **{**BUDGET, **arguments})


@pytest.fixture(scope="module")
def backbone():
    inputs = keras.Input((30,))
    hidden = keras.layers.Dense(12, "tanh", name="first")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(8, "tanh", name="second")(hidden))
    random = np.random.default_rng(3)
    model.set_weights([random.normal(scale=0.3, size=weight.shape) for weight in model.get_weights()])
    return model


@pytest.fixture(scope="module")
def head(backbone, tmp_path_factory):
    """A head on frozen features, the calls of whose backbone are counted, and the folder of its run."""
    folder = tmp_path_factory.mktemp("head")
    seen = []
    compute = features.compute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "compute", lambda model, x, **more: (seen.append(len(x)), compute(model, x, **more))[1])
        result = run(
            backbone,
            recipe=Head(epochs=15, learning_rate=10.0, cache=folder / "cache"),
            num_classes=2,
            target_epsilon=50.0,  # so little noise that what is learned does not depend on it
            validation_data=(DATA.x_test, DATA.y_test),
            public_data={"other hospital": (DATA.x_test, DATA.y_test)},
            run_dir=folder / "run",
        )
    return result, folder, seen


def test_a_head_learns_within_the_budget(head):
    result, _, _ = head
    assert 49.0 < result.epsilon <= 50.0
    assert result.figures["auc"] > 0.9 and result.figures["accuracy"] > 0.7
    assert [entry["epoch"] for entry in result.history] == list(range(1, 16))
    assert result.history[-1]["epsilon"] == pytest.approx(result.epsilon)


def test_features_are_computed_once_and_frozen_weights_are_bit_identical(head, backbone):
    result, _, seen = head
    assert sorted(seen) == [len(DATA.x_test), len(DATA.x_train)]
    for before, after in zip(backbone.get_weights(), result.model.get_weights(), strict=False):
        np.testing.assert_array_equal(before, after)


def test_the_folder_says_what_happened(head):
    result, folder, _ = head
    facts = json.loads((folder / "run" / "run.json").read_text())
    assert (facts["state"], facts["stages_done"], facts["epsilon"]) == ("finished", 1, result.epsilon)
    assert facts["settings"]["recipe"]["epochs"] == 15 and facts["public_data"]["other hospital"][0] == [[114, 30]]
    assert facts["figures"] == result.figures and len(facts["history"]) == 15
    assert ledger.read(folder / "run").events == tuple(result.report.accounts[0].events)


def test_figures_by_class_are_in_the_result_the_folder_the_ledger_and_the_card(head, tmp_path):
    result, folder, _ = head
    found = result.by_group(DATA.x_test, DATA.y_test)
    assert result.by_class == found and list(found.classes) == ["0", "1"]
    assert json.loads((folder / "run" / "run.json").read_text())["by_class"] == found.to_dict()
    last = ledger.read(folder / "run").history[-1].figures  # of which the report shows the last
    assert last == result.figures | {f"accuracy of class {name}": found.classes[name].accuracy for name in "01"}
    assert "| class 1 |" in result.write_card(tmp_path)[0].read_text()
    by_group = result.by_group(DATA.x_test, DATA.y_test, {"side": np.where(np.arange(114) % 3, "a", "b")})
    assert set(by_group.groups) == {"side = a", "side = b"}
    assert "| side = a |" in result.write_card(tmp_path, groups=by_group)[0].read_text()


def test_the_saved_model_loads_without_the_library(head, tmp_path):
    result, _, _ = head
    result.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", DATA.x_test)
    program = (
        "import sys, numpy, tensorflow as tf; model = tf.keras.models.load_model('model.keras'); "
        "numpy.save('y.npy', model.predict(numpy.load('x.npy'), verbose=0)); assert 'tfprivacy_ft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), result.model.predict(DATA.x_test, verbose=0), rtol=1e-5)


def test_a_saved_model_of_tensorflow_is_fine_tuned_and_is_one_again(backbone, tmp_path, monkeypatch):
    """On Keras 3 a SavedModel is a layer that no .keras file holds; what is saved needs nothing of the first folder."""
    write_saved_model(backbone, str(tmp_path / "public"))
    pretrained = weights.load_backbone(tmp_path / "public")
    result = run(pretrained, recipe=Head(epochs=1), num_classes=2)
    expected = result.model.predict(DATA.x_test, verbose=0)
    if IS_KERAS_3:
        assert result.file_name == "model"
        with pytest.raises(UnsupportedModelError, match=r"of which a \.keras file would hold the path alone"):
            result.save(tmp_path / "model.keras")
    with pytest.raises(InvalidArgumentError, match=r"model\.txt' is not allowed: give a name that ends in \.keras"):
        result.save(tmp_path / "model.txt")
    result.save(tmp_path / "model")
    shutil.rmtree(tmp_path / "public")
    again = weights.load_backbone(tmp_path / "model")
    np.testing.assert_allclose(again.predict(DATA.x_test, verbose=0), expected, rtol=1e-5)
    if IS_KERAS_3:
        card, _ = result.write_card(tmp_path)
        monkeypatch.chdir(tmp_path)
        names = {}
        exec(re.search("```python\n(.*?)```", card.read_text(), re.DOTALL)[1], names)
        (outputs,) = names["model"](tf.constant(DATA.x_test)).values()
        np.testing.assert_allclose(outputs, expected, rtol=1e-5)


def test_a_finished_run_is_not_begun_again_and_gives_its_model_again(head, backbone):
    result, folder, _ = head
    arguments = {
        "recipe": Head(epochs=15, learning_rate=10.0, cache=folder / "elsewhere"),
        "num_classes": 2,
        "run_dir": folder / "run",
    }
    arguments["target_epsilon"] = 50.0
    with pytest.raises(InvalidArgumentError, match="holds a run already: give resume=True"):
        run(backbone, **arguments)
    again = run(backbone, **arguments, resume=True)
    assert again.epsilon == result.epsilon and again.history == result.history
    np.testing.assert_array_equal(again.model.get_weights()[-1], result.model.get_weights()[-1])


def test_another_model_data_or_recipe_is_refused_on_resume(head, backbone):
    _, folder, _ = head
    arguments = {
        "recipe": Head(epochs=15, learning_rate=10.0),
        "num_classes": 2,
        "run_dir": folder / "run",
        "resume": True,
    }
    arguments["target_epsilon"] = 50.0
    with pytest.raises(CheckpointError, match="has another architecture"):
        run(models.build_model("mlp", (30,), 8), **arguments)
    changed = keras.models.clone_model(backbone)
    with pytest.raises(CheckpointError, match="has another pretrained weights"):
        run(changed, **arguments)
    with pytest.raises(CheckpointError, match="has another recipe"):
        run(backbone, **{**arguments, "recipe": Head(epochs=16)})
    with pytest.raises(CheckpointError, match="has another num examples"):
        run(backbone, DATA.x_train[:400], DATA.y_train[:400], **arguments)
    assert json.loads((folder / "run" / "run.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("recipe", "trained"),
    [
        (Bias(epochs=1, batch_size=455), {"first/bias", "second/bias", "head/kernel", "head/bias"}),
        (LoRA(epochs=1, batch_size=455, rank=2), {"first/kernel", "second/kernel", "head/kernel", "head/bias"}),
        (LastLayers(2, epochs=1, batch_size=455), {"second/kernel", "second/bias", "head/kernel", "head/bias"}),
        (
            Full(epochs=1, batch_size=455),
            {f"{layer}/{kind}" for layer in ("first", "second", "head") for kind in ("kernel", "bias")},
        ),
    ],
)
def test_each_recipe_moves_what_it_says_and_nothing_else(backbone, recipe, trained):
    before = backbone.get_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowClippingWarning)
        result = run(backbone, recipe=Staged((Head(epochs=1), recipe)), num_classes=2, target_epsilon=8.0)
    assert result.epsilon <= 8.0
    names = ["first/kernel", "first/bias", "second/kernel", "second/bias", "head/kernel", "head/bias"]
    after = dict(zip(names, result.model.get_weights(), strict=True))
    start = dict(zip(names, [*before, np.zeros([8, 1]), np.zeros(1)], strict=True))
    assert {name for name in names if not np.array_equal(start[name], after[name])} == trained
    assert len(result.model.trainable_variables) == 6
    for ours, theirs in zip(before, backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_zero_shot_spends_nothing(tmp_path):
    model = killed.model()
    result = run(model, recipe="zero_shot", validation_data=(DATA.x_test, DATA.y_test), run_dir=tmp_path)
    assert result.epsilon == 0 and "epsilon = 0" in str(result.report)
    np.testing.assert_allclose(result.model.predict(DATA.x_test, verbose=0), model.predict(DATA.x_test, verbose=0))
    assert 0 <= result.figures["accuracy"] <= 1


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    return killed.run(folder), folder


def test_stages_share_one_budget_and_one_ledger(in_one_go):
    result, folder = in_one_go
    assert 1.98 < result.epsilon <= 2.0
    assert sum(event.count for event in ledger.read(folder).events) == killed.TOTAL
    assert [entry["stage"] for entry in result.history] == [1, 1, 2, 2, 2]


def test_a_hand_over_equals_one_run_in_its_accounts(in_one_go, tmp_path):
    result, folder = in_one_go
    first = killed.run(tmp_path / "light", stages=1)
    assert not first.finished and first.epsilon < result.epsilon
    assert json.loads((tmp_path / "light" / "run.json").read_text())["state"] == "paused"
    shutil.copytree(tmp_path / "light", tmp_path / "strong")
    last = killed.run(tmp_path / "strong", resume=True)
    assert last.finished and last.epsilon == result.epsilon
    assert ledger.read(tmp_path / "strong").events == ledger.read(folder).events
    assert [entry["stage"] for entry in last.history] == [1, 1, 2, 2, 2]


def test_a_killed_run_goes_on_and_counts_what_it_lost(tmp_path):
    program = [sys.executable, PROGRAM, tmp_path]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(program, capture_output=True, text=True, env=paths)
    assert ended.returncode == 9, ended.stderr
    ran = 2 + 5 + 3
    assert sum(event.count for event in ledger.read(tmp_path).events) >= ran
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "running"
    result = killed.run(tmp_path, resume=True)
    assert result.epsilon <= 2.0
    # The three steps since the checkpoint were released, and count, as does the rest of the epoch that was reserved with
    # them; what replaces them is paid for with the last epoch.
    assert sum(event.count for event in ledger.read(tmp_path).events) >= ran + 5
    assert [(entry["stage"], entry["epoch"]) for entry in result.history][:4] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_a_checkpoint_without_its_ledger_is_refused(in_one_go, tmp_path):
    _, folder = in_one_go
    shutil.copytree(folder, tmp_path / "copy")
    for file in ("ledger.jsonl", "ledger.head.json"):
        (tmp_path / "copy" / file).unlink()
    with pytest.raises(InvalidArgumentError, match="holds no run to go on with"):
        killed.run(tmp_path / "copy", resume=True)
    ledger.Ledger.open(tmp_path / "copy", delta=1e-4).close()
    with pytest.raises(CheckpointError, match="lacks what its checkpoint had released"):
        killed.run(tmp_path / "copy", resume=True)


def test_a_run_that_was_killed_before_it_wrote_what_it_is_begins_anew_in_its_ledger(backbone, tmp_path):
    with ledger.Ledger.open(tmp_path, delta=1e-4) as begun:
        begun.reserve(Event.unknown(count=1, noise_multiplier=300.0))
    recipe = Head(epochs=5)
    with pytest.raises(InvalidArgumentError, match="holds a run already"):
        run(backbone, num_classes=2, run_dir=tmp_path, recipe=recipe)
    result = run(backbone, num_classes=2, run_dir=tmp_path, recipe=recipe, resume=True)
    assert {event.noise_multiplier == 300.0 for event in ledger.read(tmp_path).events} == {True, False}
    assert result.epsilon <= 2.0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"y": np.zeros(455)}, DatasetError, "x, y holds one class only: give"),
        ({"y": np.full(455, 0.5)}, DatasetError, "other than the whole numbers from 0 to 1"),
        ({"y": np.arange(455)}, DatasetError, "holds labels other than"),
        ({"y": np.array(["no", "yes"])[DATA.y_train]}, DatasetError, "x, y holds values of dtype <U"),
        ({"y": np.eye(2)[DATA.y_train]}, DatasetError, "not one-hot rows"),
        ({"x": np.where(DATA.x_train > 0.9, np.nan, DATA.x_train)}, DatasetError, "x, y holds NaN or infinity"),
        ({"x": DATA.x_train.astype(str)}, DatasetError, "x, y holds values of dtype <U"),
        ({"x": [[1.0], [1.0, 2.0]]}, DatasetError, "rows of several shapes"),
        ({"x": DATA.x_train[:, :7]}, DatasetError, r"shape \(7,\) and the model takes \(30,\)"),
        ({"x": DATA.x_train[:9]}, DatasetError, "hold"),
        ({"validation_data": (DATA.x_test[:, :7], DATA.y_test)}, DatasetError, "validation_data has examples of shape"),
        ({"validation_data": DATA.x_test}, InvalidArgumentError, "validation_data is not a pair"),
        ({"delta": 2.0}, InvalidArgumentError, "delta=2.0"),
        ({"resume": True}, InvalidArgumentError, "holds no run to go on with"),
        ({"recipe": "zero_shot"}, InvalidArgumentError, "num_classes=2 is not allowed with"),
        ({"recipe": Full(optimizer="Sgd")}, InvalidArgumentError, "optimizer='Sgd'"),
    ],
)
def test_what_cannot_be_trained_on_is_said_in_one_sentence_and_the_folder_keeps_it(
    backbone, tmp_path, change, error, text
):
    arguments = {"num_classes": 2, "run_dir": tmp_path, "recipe": Head(epochs=1), **change}
    with pytest.raises(error, match=text) as raised:
        run(backbone, **arguments)
    if (tmp_path / "run.json").exists():
        facts = json.loads((tmp_path / "run.json").read_text())
        assert (facts["state"], facts["sentence"]) == ("failed", str(raised.value))
    else:
        assert error is InvalidArgumentError  # of an argument, before there is a folder
    assert not list(tmp_path.glob("ledger*")) or "optimizer" in text


@pytest.fixture(scope="module")
def images():
    digits = datasets.load("digits")
    return digits.x_train[:200], digits.y_train[:200]


def convolutional():
    """A small network with a BatchNormalization that has seen something."""
    body = [
        keras.layers.Input((8, 8, 1)),
        keras.layers.Conv2D(8, 3, strides=2, use_bias=False, name="filters"),
        keras.layers.BatchNormalization(name="mixing"),
        keras.layers.Activation("sigmoid"),  # not tanh, which TensorFlow 2.14 fails to compute here on some CPUs
        keras.layers.Flatten(),
    ]
    model = keras.Sequential(body, name="small_network")
    model.get_layer("mixing").moving_mean.assign(np.linspace(-1, 1, 8))
    return model


TWICE = {"epochs": 1, "batch_size": 200, "augment": RandomShift(1), "augmentations": 2}


def test_a_batch_normalisation_that_would_train_is_refused_before_the_first_step_or_frozen(images, tmp_path):
    model, recipe = convolutional(), Staged((Head(**TWICE), Full(**TWICE)))
    with pytest.raises(UnsupportedModelError, match="'mixing' is a BatchNormalization that trains"):
        run(model, *images, recipe=recipe, num_classes=10, run_dir=tmp_path)
    assert not (tmp_path / "ledger.jsonl").exists()
    result = run(model, *images, recipe=recipe, num_classes=10, fix_batchnorm="freeze", run_dir=tmp_path)
    frozen = result.model.get_layer("mixing")
    for before, after in zip(model.get_layer("mixing").get_weights(), frozen.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert not np.array_equal(result.model.get_layer("filters").kernel, model.get_layer("filters").kernel)
    # Two augmentations of an example are one example in the accounts: the mean of the features, and a step for each stage.
    assert sum(event.count for event in ledger.read(tmp_path).events) == 3 and result.epsilon <= 2.0


def test_a_batch_normalisation_becomes_one_of_groups_that_is_trained(images, tmp_path):
    result = run(convolutional(), *images, recipe=Full(**TWICE), num_classes=10, fix_batchnorm="groupnorm")
    assert sum(event.count for event in result.report.accounts[0].events) == 1
    result.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    norm = loaded.get_layer("mixing")
    assert isinstance(norm, keras.layers.GroupNormalization) and loaded.name == result.model.name == "small_network"
    assert not np.array_equal(norm.get_weights()[0], np.ones(8))
    np.testing.assert_allclose(
        loaded.predict(images[0][:5], verbose=0), result.model.predict(images[0][:5], verbose=0), rtol=1e-5
    )


def test_inputs_by_name_and_a_loss_of_ones_own():
    """A regression on two named inputs, in another order than the names' own, with the model's own head."""
    wide, able = keras.Input((20,), name="wide"), keras.Input((9,), name="able")
    hidden = keras.layers.Dense(4, "tanh", name="hidden")(keras.layers.Concatenate()([wide, able]))
    model = keras.Model([wide, able], keras.layers.Dense(1, name="output")(hidden))
    by_name, held_out = (({"able": x[:, 20:29], "wide": x[:, :20]}, 10 * x[:, 29]) for x in (DATA.x_train, DATA.x_test))
    recipe = Staged((Head(epochs=1, batch_size=455), Full(epochs=1, batch_size=455)))
    result = run(model, *by_name, recipe=recipe, loss="mse", validation_data=held_out, target_epsilon=50.0)
    # Nothing that only classes have is measured; the loss is that of what the model predicts, shape by shape.
    assert set(result.figures) == {"loss"} and not any("accuracy" in name for name in result.history[-1])
    errors = result.model.predict(held_out[0], verbose=0)[:, 0] - held_out[1]
    assert result.figures["loss"] == pytest.approx(np.mean(errors**2), rel=1e-5)
    assert all(
        not np.array_equal(before, after)
        for before, after in zip(model.get_weights(), result.model.get_weights(), strict=True)
    )
    with pytest.raises(DatasetError, match="inputs called able and high and the model takes able and wide"):
        run(model, {"able": by_name[0]["able"], "high": by_name[0]["wide"]}, by_name[1], recipe=recipe, loss="mse")


def test_a_card_says_what_the_result_says(head, tmp_path):
    result, _, _ = head
    card, facts = result.write_card(tmp_path)
    assert "other hospital" in card.read_text() and json.loads(facts.read_text())["figures"] == result.figures


def test_rows_that_are_public_and_private_are_warned_of():
    with pytest.warns(PublicOverlapWarning, match="9 of 455 private rows are among the public data 'public data'"):
        run(killed.model(), recipe=Head(epochs=1), public_data=(DATA.x_train[:9], DATA.y_train[:9]))
