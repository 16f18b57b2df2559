"""Figures of many clients: each equal to what the client's own examples give alone."""

import json
import math

import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import roc_auc_score

import federated
from federated.evaluation import ClientEvaluation, evaluate_clients
from tfprivacy_ft import models
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError, UnsupportedModelError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 6)).astype(np.float32)
OWNERS = np.repeat(np.arange(8), [1, 2, 3, 5, 7, 11, 13, 18])[RNG.permutation(60)]
losses = tf.keras.losses


def clients_of(y):
    return federated.split_by_owner(X, y, OWNERS)


def alone(model, clients, loss, metrics=()):
    """What Keras says of each client by itself."""
    model.compile(loss=loss, metrics=list(metrics))
    return [model.evaluate(x, y, verbose=0, return_dict=True) for x, y in clients]


CASES = {
    "classes": ("sparse_categorical_crossentropy", 3, {}, RNG.integers(0, 3, 60)),
    "classes as columns": ("sparse_categorical_crossentropy", 3, {}, RNG.integers(0, 3, (60, 1))),
    "one-hot": ("categorical_crossentropy", 3, {}, np.eye(3, dtype=np.float32)[RNG.integers(0, 3, 60)]),
    "logits": (losses.SparseCategoricalCrossentropy(True), 3, {"from_logits": True}, RNG.integers(0, 3, 60)),
    "one output": ("binary_crossentropy", 1, {}, RNG.integers(0, 2, 60)),
    "one logit": (losses.BinaryCrossentropy(from_logits=True), 1, {"from_logits": True}, RNG.integers(0, 2, (60, 1))),
    "summed": (losses.SparseCategoricalCrossentropy(reduction="sum"), 3, {}, RNG.integers(0, 3, 60)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_client_gets_what_keras_says_of_it_alone(case):
    loss, outputs, options, y = CASES[case]
    model, clients = models.build_model("mlp", (6,), outputs, hidden_units=(5,), **options), clients_of(y)
    found = evaluate_clients(model, clients, loss=loss, batch_size=16)
    reference = loss if case != "summed" else "sparse_categorical_crossentropy"
    # Keras's "accuracy" has its threshold at 0.5 for logits, too.
    metrics = [tf.keras.metrics.BinaryAccuracy("accuracy", threshold=0.0)] if case == "one logit" else ["accuracy"]
    expected = alone(model, clients, reference, metrics)
    np.testing.assert_allclose(found.figures["loss"], [each["loss"] for each in expected], rtol=1e-5)
    np.testing.assert_allclose(found.figures["accuracy"], [each["accuracy"] for each in expected], rtol=1e-6)
    assert found.num_examples.tolist() == [1, 2, 3, 5, 7, 11, 13, 18] and found.names == tuple(range(8))
    for name in ("loss", "accuracy"):
        assert found.pooled[name] == pytest.approx(np.average(found.figures[name], weights=found.num_examples))
    assert ("auc" in found.figures) == (outputs == 1)


def test_auc_is_of_each_client_and_not_there_for_one_class():
    y = RNG.integers(0, 2, 60)
    model, clients = models.build_model("logistic", (6,), 1), clients_of(y)
    found = evaluate_clients(model, clients, loss="binary_crossentropy")
    for value, (x, labels) in zip(found.figures["auc"], clients, strict=True):
        if len(set(labels)) == 1:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(roc_auc_score(labels, model.predict(x, verbose=0)[:, 0]))
    assert math.isnan(found.figures["auc"][0]) and not math.isnan(found.spread()["auc"].mean)
    assert found.pooled["auc"] == pytest.approx(roc_auc_score(y, model.predict(X, verbose=0)[:, 0]))


def test_ties_count_half_in_an_auc():
    constant = tf.keras.Sequential([tf.keras.layers.Input([6]), tf.keras.layers.Dense(1, kernel_initializer="zeros")])
    found = evaluate_clients(constant, clients_of(RNG.integers(0, 2, 60)), loss="binary_crossentropy")
    assert found.pooled["auc"] == 0.5


def test_several_labels_of_one_example_are_averaged():
    y = RNG.integers(0, 2, (60, 4))
    model, clients = models.build_model("mlp", (6,), 4, from_logits=True), clients_of(y)
    found = evaluate_clients(model, clients, loss=losses.BinaryCrossentropy(from_logits=True))
    expected = [((model.predict(x, verbose=0) > 0) == labels).mean() for x, labels in clients]
    np.testing.assert_allclose(found.figures["accuracy"], expected)
    assert "auc" not in found.figures


def test_sequences_have_a_figure_per_example():
    x, y = RNG.integers(0, 9, (60, 5)), RNG.integers(0, 9, (60, 5))
    model = tf.keras.Sequential(
        [
            tf.keras.layers.Input([5], dtype="int64"),
            tf.keras.layers.Embedding(9, 4),
            tf.keras.layers.Dense(9, "softmax"),
        ]
    )
    clients = federated.split_by_owner(x, y, OWNERS)
    found = evaluate_clients(model, clients, loss="sparse_categorical_crossentropy")
    expected = alone(model, clients, "sparse_categorical_crossentropy", ["accuracy"])
    np.testing.assert_allclose(found.figures["loss"], [each["loss"] for each in expected], rtol=1e-5)
    np.testing.assert_allclose(found.figures["accuracy"], [each["accuracy"] for each in expected], rtol=1e-6)


def test_a_regression_has_a_loss_and_the_metrics_asked_for():
    y = RNG.normal(size=60).astype(np.float32)
    model, clients = models.build_model("mlp", (6,), 1, from_logits=True), clients_of(y)
    found = evaluate_clients(
        model,
        clients,
        loss="mse",
        metrics={"absolute error": lambda labels, found: np.abs(labels - found[:, 0])},
        lower_is_better=["absolute error"],
    )
    assert set(found.figures) == {"loss", "absolute error"}
    np.testing.assert_allclose(
        found.figures["absolute error"],
        [np.abs(model.predict(x, verbose=0)[:, 0] - y).mean() for x, y in clients],
        rtol=1e-5,
    )
    spread = found.spread()["absolute error"]
    assert spread.worst_decile == pytest.approx(found.figures["absolute error"].max())


def test_only_rows_that_somebody_owns_are_looked_at():
    y = RNG.integers(0, 3, 60)
    training, held_out = clients_of(y).split(held_out=0.4, seed=0)
    poisoned = X.copy()
    poisoned[np.concatenate(training.rows)] = np.nan
    model = models.build_model("mlp", (6,), 3)
    clean = evaluate_clients(model, held_out, loss="sparse_categorical_crossentropy")
    held_out = federated.ClientData(poisoned, y, held_out.rows, held_out.names)
    again = evaluate_clients(model, held_out, loss="sparse_categorical_crossentropy")
    np.testing.assert_array_equal(clean.figures["loss"], again.figures["loss"])


def test_the_model_is_asked_once_in_large_batches():
    model, sizes = models.build_model("mlp", (6,), 3), []

    class Counting:
        def predict(self, x, batch_size, **options):
            sizes.append((len(x), batch_size))
            return model.predict(x, batch_size=batch_size, **options)

    evaluate_clients(Counting(), clients_of(RNG.integers(0, 3, 60)), loss="sparse_categorical_crossentropy")
    assert sizes == [(60, 1024)]


# The spread.

TWENTY = ClientEvaluation(
    tuple(f"client {i}" for i in range(20)),
    np.arange(1, 21),
    {"accuracy": np.arange(20) / 20, "loss": np.arange(20.0)},
    {"accuracy": 0.6, "loss": 12.0},
)


def test_the_worst_tenth_is_low_in_accuracy_and_high_in_loss():
    spread = TWENTY.spread()
    assert spread["accuracy"].mean == pytest.approx(0.475)
    assert spread["accuracy"].worst_decile == pytest.approx(0.025)
    assert spread["accuracy"].best_decile == pytest.approx(0.925)
    assert (spread["accuracy"].worst, spread["accuracy"].worst_client) == (0.0, "client 0")
    assert (spread["loss"].worst_decile, spread["loss"].best_decile) == (18.5, 0.5)
    assert (spread["loss"].worst, spread["loss"].worst_client) == (19.0, "client 19")
    assert spread["accuracy"].deviation == pytest.approx(np.std(np.arange(20) / 20))


def test_it_reads_as_a_table():
    lines = str(TWENTY).splitlines()
    assert lines[0] == "20 clients, 210 examples"
    assert lines[1].split("  ")[-1].strip() == "worst client" and len({len(line) for line in lines[1:]}) == 1
    assert lines[2].split() == ["accuracy", "0.6000", "0.4750", "0.0250", "0.9250", "0.0000", "client", "0"]


def test_json_holds_it_all_and_no_nan():
    nothing = ClientEvaluation(("a", 2), np.array([1, 2]), {"auc": np.full(2, np.nan)}, {"auc": math.nan})
    plain = json.loads(nothing.to_json())
    assert plain["clients"] == ["a", 2] and plain["num_examples"] == [1, 2]
    assert plain["figures"] == {"auc": [None, None]} and plain["pooled"] == {"auc": None}
    assert plain["spread"]["auc"]["mean"] is None and plain["spread"]["auc"]["worst_client"] is None
    assert json.loads(TWENTY.to_json())["spread"]["loss"]["worst_client"] == "client 19"


# What is refused.


def test_bad_arguments_get_one_sentence():
    model, clients = models.build_model("mlp", (6,), 3), clients_of(RNG.integers(0, 3, 60))
    good = {"loss": "sparse_categorical_crossentropy"}
    for changes, says in [
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"metrics": {"loss": lambda y, found: y}}, "'loss' is a figure that there is already"),
        ({"metrics": {"mean": lambda y, found: y.mean()}}, r"'mean' gave shape \(\) for 60 examples"),
        ({"lower_is_better": ["mae"]}, "'mae'.* are no figures here"),
    ]:
        with pytest.raises(InvalidArgumentError, match=says):
            evaluate_clients(model, clients, **{**good, **changes})
    with pytest.raises(InvalidArgumentError, match="clients is a list: give ClientData"):
        evaluate_clients(model, [(X, X)], **good)
    with pytest.raises(DatasetError, match=r"labels of shape \(60, 6\)"):
        evaluate_clients(model, clients_of(X), loss="categorical_crossentropy")
    inputs = tf.keras.Input([6])
    two = tf.keras.Model(inputs, [tf.keras.layers.Dense(1)(inputs), tf.keras.layers.Dense(1)(inputs)])
    with pytest.raises(UnsupportedModelError, match="the model has 2 outputs"):
        evaluate_clients(two, clients, loss="mse")
