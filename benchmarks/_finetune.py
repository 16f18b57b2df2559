"""What the scripts `finetune_*.py` share: `finetune` puts a linear head on fixed features, by its own starting values.

Features come from public knowledge alone (fixed filters, pretrained weights, public categories and bounds, a fixed hash).
Batch, steps, clip and learning rate follow from the number of examples and the noise: nothing is set for one data set but where
a script says so. Epsilon is what the ledger says of the steps that ran (PLD accounting, adding or removing one example).
Beside it stand the same head without privacy, and where it is installed tensorflow_privacy with clip, learning rate rule and
epsilon the same; its batches are shuffled, so that it needs the noise of shuffled batches, which nothing amplifies.
"""

import argparse
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TFPRIVACY_FT_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))

import numpy as np
import tensorflow as tf

from tfprivacy_ft import accounting
from tfprivacy_ft.errors import DatasetError
from tfprivacy_ft.events import Event
from tfprivacy_ft.finetune import backbones, features, finetune, recipes
from tfprivacy_ft.groups import figures_of

DELTA = 1e-5


class Split(NamedTuple):
    """What a backbone reads, and labels from 0 on, to train and to test on."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int = 2
    backbone: Any = None  # None where x holds features
    recipe: recipes.Head = recipes.Head()


class Outcome(NamedTuple):
    """What one training gave."""

    figure: float
    epsilon: float
    noise_multiplier: float
    wall: float
    cpu: float


def backbone_of(split):
    """The backbone; of features, a model that gives them as they are."""
    if split.backbone is not None:
        return split.backbone
    return tf.keras.Sequential([tf.keras.layers.Input(split.x_train.shape[1:]), tf.keras.layers.Activation("linear")])


def as_rows(split):
    """The split with the rows in place of its inputs that the head of `finetune` reads."""
    made = backbones.with_new_head(backbone_of(split), split.num_classes, norm_groups=split.recipe.norm_groups).features
    x_train, x_test = (features.compute(made, x) for x in (split.x_train, split.x_test))
    return split._replace(x_train=x_train, x_test=x_test, backbone=None)


def stage_of(split):
    """The recipe with the batch size and epochs of `finetune`."""
    (stage,) = recipes.stages_of(split.recipe, num_examples=len(split.x_train))
    return stage


def figure(measure, split, probabilities):
    """Accuracy, or the area under the ROC curve, on the rows to test on."""
    found = figures_of(probabilities, split.y_test)
    return found.auc if measure == "AUC" else found.accuracy


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


def probabilities(model, split):
    parts = np.array_split(split.x_test, 1 + len(split.x_test) // 4096)
    logits = np.concatenate([model(part).numpy() for part in parts])
    return tf.nn.sigmoid(logits).numpy() if split.num_classes == 2 else tf.nn.softmax(logits).numpy()


def timed(work):
    """What `work` gives, its wall time and its CPU time in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    given = work()
    return given, time.perf_counter() - wall, time.process_time() - cpu


def private(measure, split, target_epsilon):
    """`finetune`, from the features or the backbone's inputs to the whole model."""
    result, wall, cpu = timed(
        lambda: finetune(
            backbone_of(split),
            split.x_train,
            split.y_train,
            recipe=split.recipe,
            num_classes=split.num_classes,
            target_epsilon=target_epsilon,
            delta=DELTA,
            verbose=0,
        )
    )
    found = figure(measure, split, result.model.predict(split.x_test, verbose=0))
    return Outcome(found, result.epsilon, result.facts["stages"][0]["noise_multiplier"], wall, cpu)


def without_privacy(measure, split, target_epsilon):
    """The same head, trained by Adam: 20 epochs and at least 1,000 steps."""
    model = tf.keras.Sequential(layers(split))
    model.compile(tf.keras.optimizers.Adam(0.01), loss(split))
    batch_size = min(256, len(split.x_train) // 8)
    epochs = max(20, math.ceil(1000 * batch_size / len(split.x_train)))
    _, wall, cpu = timed(
        lambda: model.fit(split.x_train, split.y_train, batch_size=batch_size, epochs=epochs, verbose=0)
    )
    return Outcome(figure(measure, split, probabilities(model, split)), math.inf, 0.0, wall, cpu)


def by_tensorflow_privacy(measure, split, target_epsilon):
    """The same head by tensorflow_privacy's model with fast clipping, on the shuffled batches that it is used with."""
    from tensorflow_privacy.privacy.fast_gradient_clipping import layer_registry
    from tensorflow_privacy.privacy.keras_models.dp_keras_model import DPSequential

    n, stage = len(split.x_train), stage_of(split)
    steps_per_epoch = n // stage.batch_size  # it drops what is left over, of other examples in every epoch

    def each_epoch_once(noise_multiplier):
        return Event.poisson(count=stage.epochs, noise_multiplier=noise_multiplier, sampling_probability=1.0)

    noise = accounting.solve_noise_multiplier(target_epsilon=target_epsilon, delta=DELTA, events_for=each_epoch_once)
    model = DPSequential(
        l2_norm_clip=stage.l2_norm_clip,
        noise_multiplier=noise,
        use_xla=False,  # with XLA its noise is the same in every process
        layer_registry=layer_registry.make_default_layer_registry(),
        layers=layers(split),
    )
    rate = recipes.rate_on_unit_rows(
        noise_multiplier=noise,
        batch_size=stage.batch_size,
        steps=steps_per_epoch * stage.epochs,
        l2_norm_clip=stage.l2_norm_clip,
    )
    model.compile(tf.keras.optimizers.SGD(rate, recipes.MOMENTUM), loss(split))
    labels = split.y_train[:, None].astype(np.float32) if split.num_classes == 2 else split.y_train

    def fit():
        for _ in range(stage.epochs):
            order = np.random.default_rng().permutation(n)[: steps_per_epoch * stage.batch_size]
            for rows in np.split(order, steps_per_epoch):
                model.train_on_batch(split.x_train[rows], labels[rows])

    _, wall, cpu = timed(fit)
    epsilon = accounting.epsilon(each_epoch_once(noise), delta=DELTA)
    return Outcome(figure(measure, split, probabilities(model, split)), epsilon, noise, wall, cpu)


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
    start = time.perf_counter()
    try:
        prepared = splits(arguments.runs)
    except (DatasetError, ImportError) as error:
        print(f"Skipped. {error}")
        return
    seconds = time.perf_counter() - start
    found = {"tfprivacy_ft": _each(private, measure, prepared, arguments.target_epsilon)}
    if not arguments.only_private:
        rows = [as_rows(split) for split in prepared]
        found["without privacy"] = _each(without_privacy, measure, rows, arguments.target_epsilon)
        if _has_tensorflow_privacy():
            found["tensorflow_privacy"] = _each(by_tensorflow_privacy, measure, rows, arguments.target_epsilon)
    stage = stage_of(prepared[0])
    print(
        f"{len(prepared[0].x_train):,} examples, batches of {stage.batch_size:,}, {stage.epochs} epochs; "
        f"prepared in {seconds:.1f} s"
    )
    print(f"{'':18} {measure:>8}  spread  lowest  epsilon   noise  seconds  CPU seconds")
    for name, outcomes in found.items():
        _print_line(name, outcomes)
    print(f"target {target:g} at epsilon {arguments.target_epsilon:g}, delta {DELTA:g}; {arguments.runs} runs")


def _each(run, measure, prepared, target_epsilon):
    return [run(measure, split, target_epsilon) for split in prepared]


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
