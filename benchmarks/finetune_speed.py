"""An epoch of `finetune`'s head recipe on cached features: beside the same head without privacy, and beside all weights.

Targets: at most 1.2 times the epoch of a plain `fit` of the same head on the same features with the same batch size, and at
least 10 times faster than an epoch of private fine-tuning of the whole model. Whatever `finetune` does in an epoch is in
its time: Poisson batches, clip, noise, ledger, epsilon and checkpoint, on the disk. Building graphs is not, and neither are
the features, which are computed once. Both heads take turns in one process, and times are medians over epochs: on a
machine that other work shares only their ratios mean something, those of CPU time more than those of wall time.

The model is a pretrained SqueezeNet at 96 x 96 on PneumoniaMNIST, from the folder in the environment variable
TFPRIVACY_FT_DATA, or from ../shared/data; where that is missing, a small ResNet on the bundled digits.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import finetune_pneumonia
import numpy as np
import tensorflow as tf

from tfprivacy_ft import datasets, models
from tfprivacy_ft.arrays import aligned
from tfprivacy_ft.errors import DatasetError, WeightsError
from tfprivacy_ft.finetune import Full, Head, backbones, budget, features, recipes, stages, training
from tfprivacy_ft.finetune.checkpoints import RunFolder
from tfprivacy_ft.finetune.inputs import Examples

EPSILON, DELTA = 3.0, 1e-5
PLAIN, PRIVATE, FULL = "head, not private", "head, private", "all weights, private"


class EpochTimer(tf.keras.callbacks.Callback):
    """Wall and CPU seconds of every epoch; comes last, so that what other callbacks do at its end is in them."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch, logs=None):
        wall, cpu = self._start
        self.seconds.append((time.perf_counter() - wall, time.process_time() - cpu))


class Contender:
    """A compiled model and what it is trained on."""

    def __init__(self, model, data, callbacks=(), **arguments):
        self.model, self.timer = model, EpochTimer()
        self._data, self._arguments, self._callbacks = data, arguments, [*callbacks, self.timer]

    def run(self, epochs, **arguments):
        self.model.fit(*self._data, epochs=epochs, callbacks=self._callbacks, verbose=0, **self._arguments, **arguments)

    def warm_up(self, **arguments):
        self.run(1, **arguments)
        self.timer.seconds.clear()

    @property
    def wall_and_cpu(self):
        return tuple(1e3 * statistics.median(each) for each in zip(*self.timer.seconds, strict=True))


def squeezenet():
    x, y = finetune_pneumonia.images_of("train")
    return "SqueezeNet at 96 x 96, PneumoniaMNIST", finetune_pneumonia.backbone(), x, y, 2


def resnet():
    data = datasets.load("digits")
    model = models.build_model("resnet", data.input_shape, data.num_classes)
    backbone = tf.keras.Model(model.input, model.layers[-3].output)  # without the mean over places and the head
    return "ResNet at 8 x 8, digits", backbone, data.x_train, data.y_train, data.num_classes


def random_features(rows, width):
    """A head for features of no model, and rows of them: what an epoch costs does not depend on what is in them."""
    rng = np.random.default_rng(0)
    x = aligned(np.dtype(np.float32), (rows, width))
    for i in range(rows):
        x[i] = rng.normal(scale=width**-0.5, size=width)
    nothing = tf.keras.Sequential([tf.keras.layers.Input((1,)), tf.keras.layers.Dense(width)])
    return f"random features, {rows:,} x {width:,}", nothing, x, rng.integers(0, 10, rows), 10


def private(recipe, classifier, x, y, loss, folder):
    """A stage of `finetune`, made as that makes it, on the features x for a head."""
    facts = {"num_examples": len(y), "target_epsilon": EPSILON, "delta": DELTA}
    (recipe,) = recipes.stages_of(recipe, num_examples=len(y))
    (noise,) = budget.solve([recipe], **facts)
    recipe = recipes.with_learning_rate(
        recipe, num_examples=len(y), noise_multiplier=noise, target_epsilon=EPSILON, unit_rows=True
    )
    plan, run = budget.plan(recipe, noise, **facts), RunFolder(folder, resume=False)
    ledger = run.ledger(delta=DELTA, facts=facts)
    plan.continue_ledger(ledger)
    stage = stages.prepare(recipe, classifier)
    mean = np.mean(x, axis=0) if isinstance(recipe, Head) else None  # its noise is no part of an epoch
    model = stage.model if mean is None else stages.centered(stage, Examples(x.copy(), y), mean).model
    model.compile(training._optimizer(recipe, plan), loss, metrics=["accuracy"], jit_compile=False)
    every_epoch = training._EveryEpoch(run, ledger, [], 0, recipe, None, mean)
    return Contender(model, [plan.batches(x, y)], [*plan.callbacks(), every_epoch])


def without_privacy(head, x, y, loss, batch_size):
    model = tf.keras.models.clone_model(head)
    model.compile(tf.keras.optimizers.SGD(1.0, recipes.MOMENTUM), loss, metrics=["accuracy"], jit_compile=False)
    return Contender(model, [x, y], batch_size=batch_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4096, help="or as many as there are")
    parser.add_argument("--batch-size", type=int, default=4096, help="of the head (default: 4096)")
    parser.add_argument("--full-batch-size", type=int, default=128, help="of all weights (default: 128)")
    parser.add_argument("--rounds", type=int, default=5, help="turns that both heads take")
    parser.add_argument("--epochs", type=int, default=5, help="epochs in a turn")
    parser.add_argument("--full-epochs", type=int, default=1, help="of all weights; 0 leaves them out")
    parser.add_argument("--digits", action="store_true", help="the small model, in any case")
    parser.add_argument(
        "--random-features", type=int, nargs=2, metavar=("EXAMPLES", "FEATURES"), help="heads alone, on random features"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    title, backbone, x, y, num_classes = chosen(arguments)
    loss = "binary_crossentropy" if num_classes == 2 else "sparse_categorical_crossentropy"
    batch_size = min(len(y), arguments.batch_size)

    classifier = backbones.with_new_head(backbone, num_classes)
    start = time.perf_counter(), time.process_time()
    found = x if arguments.random_features else features.compute(classifier.features, x)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"{title}: {len(y):,} examples, {found.shape[1]:,} features, batches of {batch_size:,}")
    print(f"features, once: {wall:.1f} s, {cpu:.1f} s of CPU")

    with tempfile.TemporaryDirectory() as head_dir, tempfile.TemporaryDirectory() as full_dir:
        epochs = 1 + arguments.rounds * arguments.epochs
        heads = {
            PLAIN: without_privacy(classifier.head, found, y, loss, batch_size),
            PRIVATE: private(Head(batch_size=batch_size, epochs=epochs), classifier, found, y, loss, head_dir),
        }
        for contender in heads.values():
            contender.warm_up()
        for _ in range(arguments.rounds):
            for contender in heads.values():
                contender.run(arguments.epochs)
        contenders = dict(heads)
        if arguments.full_epochs and not arguments.random_features:
            whole = backbones.with_new_head(backbone, num_classes)
            recipe = Full(batch_size=min(len(y), arguments.full_batch_size), epochs=1 + arguments.full_epochs)
            contenders[FULL] = private(recipe, whole, x, y, loss, full_dir)
            contenders[FULL].warm_up(steps_per_epoch=1)
            contenders[FULL].run(arguments.full_epochs)
        table(contenders)
        load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
        print(f"load of the machine over 1, 5 and 15 minutes: {load}, on {os.cpu_count()} CPUs")


def chosen(arguments):
    if arguments.random_features:
        return random_features(*arguments.random_features)
    try:
        title, backbone, x, y, num_classes = resnet() if arguments.digits else squeezenet()
    except (DatasetError, WeightsError) as error:
        print(f"The small model instead. {error}")
        title, backbone, x, y, num_classes = resnet()
    return title, backbone, x[: arguments.examples], y[: arguments.examples], num_classes


def table(contenders):
    private_wall, private_cpu = contenders[PRIVATE].wall_and_cpu
    print(f"  {'':22} {'ms per epoch':>13} {'CPU ms':>10} {'by the private head':>20} {'in CPU':>8} {'epochs':>7}")
    for name, contender in contenders.items():
        wall, cpu = contender.wall_and_cpu
        epochs = len(contender.timer.seconds)
        print(f"  {name:22} {wall:13,.1f} {cpu:10,.1f} {wall / private_wall:20.2f} {cpu / private_cpu:8.2f} {epochs:7}")
    wall, cpu = contenders[PLAIN].wall_and_cpu
    print(
        f"  private head by plain head: {private_wall / wall:.2f}, in CPU {private_cpu / cpu:.2f}; target 1.2 at most"
    )
    if FULL in contenders:
        wall, cpu = contenders[FULL].wall_and_cpu
        print(
            f"  all weights by private head: {wall / private_wall:.0f}, in CPU {cpu / private_cpu:.0f}; target 10 at least"
        )


if __name__ == "__main__":
    main()
