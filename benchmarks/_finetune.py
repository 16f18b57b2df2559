"""What the scripts `finetune_*.py` share: a linear head on fixed features, trained privately by one rule for all of them.

Features come from public knowledge alone (fixed filters, pretrained weights, public categories and bounds, a fixed hash) and
each row has l2 norm 1. Batch, steps, clip and learning rate follow from the number of examples and the noise, by
`starting_values`: nothing is set for one data set. Epsilon is what the ledger says of the steps that ran (PLD accounting,
adding or removing one example). Beside it stand the same head without privacy, and where it is installed
tensorflow_privacy with clip, learning rate rule and epsilon the same; its batches are shuffled, so that it needs the noise of
shuffled batches, which nothing amplifies.
"""

import argparse
import math
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TFPRIVACY_FT_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))

import numpy as np
import tensorflow as tf
from sklearn.metrics import roc_auc_score

from tfprivacy_ft import PrivacyPlan, accounting
from tfprivacy_ft.errors import DatasetError
from tfprivacy_ft.events import Event
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer

DELTA = 1e-5
BATCH_SIZE, EPOCHS, STEPS, CLIP, MOMENTUM = 4096, 40, 100, 0.1, 0.9
STEADY = 50.0  # the largest clip times learning rate under which training stayed steady


class Split(NamedTuple):
    """Features of unit rows and labels from 0 on, to train and to test on."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int = 2


class Outcome(NamedTuple):
    """What one training gave."""

    figure: float
    epsilon: float
    noise_multiplier: float
    wall: float
    cpu: float


def unit_rows(x):
    """Each row divided by its own l2 norm."""
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)).astype(np.float32)


def group_normalized(x, groups):
    """Unit rows of [n, channels, ...]: each group of channels, with all of its places, gets mean 0 and variance 1."""
    parts = x.reshape(len(x), groups, -1)
    parts = parts - parts.mean(axis=2, keepdims=True)
    parts = parts / np.sqrt((parts * parts).mean(axis=2, keepdims=True) + 1e-5)
    return unit_rows(parts.reshape(len(x), -1))


def starting_values(num_examples):
    """Batch size and epochs: 40 epochs and at least 100 steps, each on everybody of a small data set."""
    batch_size = min(num_examples, BATCH_SIZE)
    return batch_size, max(EPOCHS, math.ceil(STEPS * batch_size / num_examples))


def learning_rate(noise_multiplier, batch_size, steps):
    """The rate at which the noise of all steps adds 2 to a unit row's logit, in standard deviation.

    The sum of the noise of all steps in one weight is rate / (1 - momentum) * clip * noise / batch size * sqrt(steps),
    and a logit of a row of norm 1 has as much of it, whatever the number of features.
    """
    by_noise = 2.0 * (1 - MOMENTUM) * batch_size / (CLIP * noise_multiplier * math.sqrt(steps))
    return min(by_noise, STEADY / CLIP)


def figure(measure, y, scores):
    """Accuracy, or the area under the ROC curve, of what a head says of the rows to test on."""
    if measure == "AUC":
        return float(roc_auc_score(y, scores[:, 0]))
    predicted = scores[:, 0] > 0 if scores.shape[1] == 1 else scores.argmax(axis=1)
    return float(np.mean(predicted == y))


def layers(split):
    outputs = 1 if split.num_classes == 2 else split.num_classes
    return [
        tf.keras.layers.Input(split.x_train.shape[1:]),
        tf.keras.layers.Dense(outputs, kernel_initializer="zeros"),
    ]


def loss(split):
    if split.num_classes == 2:
        return tf.keras.losses.BinaryCrossentropy(from_logits=True)
    return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _timed(measure, split, model, fit, epsilon, noise_multiplier):
    wall, cpu = time.perf_counter(), time.process_time()
    fit()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    scores = np.concatenate(
        [model(part).numpy() for part in np.array_split(split.x_test, 1 + len(split.x_test) // 4096)]
    )
    return Outcome(figure(measure, split.y_test, scores), epsilon(), noise_multiplier, wall, cpu)


def private(measure, split, target_epsilon):
    """A head trained on Poisson batches."""
    batch_size, epochs = starting_values(len(split.x_train))
    plan = PrivacyPlan.solve(
        target_epsilon=target_epsilon,
        delta=DELTA,
        num_examples=len(split.x_train),
        batch_size=batch_size,
        epochs=epochs,
    )
    optimizer = plan.optimizer(
        DPKerasSGDOptimizer,
        l2_norm_clip=CLIP,
        learning_rate=learning_rate(plan.noise_multiplier, batch_size, plan.steps),
        momentum=MOMENTUM,
    )
    model = tf.keras.Sequential(layers(split))
    model.compile(optimizer, loss(split))
    batches = plan.batches(split.x_train, split.y_train)

    def fit():
        model.fit(batches, epochs=epochs, callbacks=plan.callbacks(), verbose=0)

    return _timed(measure, split, model, fit, plan.epsilon, plan.noise_multiplier)


def without_privacy(measure, split, target_epsilon):
    """The same head, trained by Adam: 20 epochs and at least 1,000 steps."""
    model = tf.keras.Sequential(layers(split))
    model.compile(tf.keras.optimizers.Adam(0.01), loss(split))
    batch_size = min(256, len(split.x_train) // 8)
    epochs = max(20, math.ceil(1000 * batch_size / len(split.x_train)))

    def fit():
        model.fit(split.x_train, split.y_train, batch_size=batch_size, epochs=epochs, verbose=0)

    return _timed(measure, split, model, fit, lambda: math.inf, 0.0)


def by_tensorflow_privacy(measure, split, target_epsilon):
    """The same head by tensorflow_privacy's model with fast clipping, on the shuffled batches that it is used with."""
    from tensorflow_privacy.privacy.fast_gradient_clipping import layer_registry
    from tensorflow_privacy.privacy.keras_models.dp_keras_model import DPSequential

    n = len(split.x_train)
    batch_size, epochs = starting_values(n)
    steps_per_epoch = n // batch_size  # it drops what is left over, of other examples in every epoch

    def each_epoch_once(noise_multiplier):
        return Event.poisson(count=epochs, noise_multiplier=noise_multiplier, sampling_probability=1.0)

    noise = accounting.solve_noise_multiplier(target_epsilon=target_epsilon, delta=DELTA, events_for=each_epoch_once)
    model = DPSequential(
        l2_norm_clip=CLIP,
        noise_multiplier=noise,
        use_xla=False,  # with XLA its noise is the same in every process
        layer_registry=layer_registry.make_default_layer_registry(),
        layers=layers(split),
    )
    rate = learning_rate(noise, batch_size, steps_per_epoch * epochs)
    model.compile(tf.keras.optimizers.SGD(rate, MOMENTUM), loss(split))
    labels = split.y_train[:, None].astype(np.float32) if split.num_classes == 2 else split.y_train

    def fit():
        for _ in range(epochs):
            order = np.random.default_rng().permutation(n)[: steps_per_epoch * batch_size]
            for rows in np.split(order, steps_per_epoch):
                model.train_on_batch(split.x_train[rows], labels[rows])

    def epsilon():
        return accounting.epsilon(each_epoch_once(noise), delta=DELTA)

    return _timed(measure, split, model, fit, epsilon, noise)


def main(description, splits, *, measure, target_epsilon, target):
    """Reads the command line, trains on a split for each run, and prints the table.

    Args:
      description: what `--help` says.
      splits: a function of the number of runs that gives a `Split` for each of them.
      measure: "accuracy" or "AUC".
      target_epsilon: the default of `--target-epsilon`.
      target: the mean that is to be reached, for the table.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-epsilon", type=float, default=target_epsilon)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only-private", action="store_true", help="nothing beside it")
    arguments = parser.parse_args()
    contenders = {"tfprivacy_ft": private}
    if not arguments.only_private:
        contenders["without privacy"] = without_privacy
        if _has_tensorflow_privacy():
            contenders["tensorflow_privacy"] = by_tensorflow_privacy

    start = time.perf_counter()
    try:
        prepared = splits(arguments.runs)
    except (DatasetError, ImportError) as error:
        print(f"Skipped. {error}")
        return
    seconds = time.perf_counter() - start
    found = {
        name: [run(measure, split, arguments.target_epsilon) for split in prepared] for name, run in contenders.items()
    }
    n, width = prepared[0].x_train.shape
    batch_size, epochs = starting_values(n)
    print(
        f"{n:,} examples, {width:,} features, batches of {batch_size:,}, {epochs} epochs; features in {seconds:.1f} s"
    )
    print(f"{'':18} {measure:>8}  spread  lowest  epsilon   noise  seconds  CPU seconds")
    for name, outcomes in found.items():
        _print_line(name, outcomes)
    print(f"target {target:g} at epsilon {arguments.target_epsilon:g}, delta {DELTA:g}; {arguments.runs} runs")


def _print_line(name, outcomes):
    figures = [outcome.figure for outcome in outcomes]
    spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
    epsilon = max(outcome.epsilon for outcome in outcomes)
    wall, cpu = (statistics.mean(getattr(outcome, key) for outcome in outcomes) for key in ("wall", "cpu"))
    print(
        f"{name:18} {statistics.mean(figures):8.4f}  {spread:.4f}  {min(figures):.4f}  "
        f"{epsilon:7.4f} {outcomes[0].noise_multiplier:7.3f}  {wall:7.1f}  {cpu:11.1f}"
    )


def _has_tensorflow_privacy():
    try:
        import tensorflow_privacy  # noqa: F401
    except ImportError:
        return False
    return True
