"""MNIST with epsilon at most 3 at delta 1e-5: the accuracy that is reached, and what it costs in time.

A tanh CNN trained from scratch on Poisson batches; epsilon is what the ledger says of the steps that ran (PLD accounting,
adding or removing one example). Target: test accuracy of 97.8 % or more within 5 minutes on two quiet cores. Where other
work shares the machine, compare with the CPU seconds of this process and with the time of a plain Keras step in the same
run. MNIST is read from the folder in the environment variable TFPRIVACY_FT_DATA, or from ../shared/data.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TFPRIVACY_FT_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))

import tensorflow as tf

from tfprivacy_ft import PrivacyPlan, datasets
from tfprivacy_ft.errors import DatasetError
from tfprivacy_ft.models import build_model
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer

DELTA = 1e-5


def build(data, optimizer):
    model = build_model("cnn", data.input_shape, data.num_classes)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def plain_step_milliseconds(data, batch_size, steps=30):
    """Median time of a plain Keras step, wall and CPU, after a few to warm up."""
    model = build(data, tf.keras.optimizers.SGD(0.1))
    x, y = data.x_train[:batch_size], data.y_train[:batch_size]
    walls, cpus = [], []
    for _ in range(steps):
        wall, cpu = time.perf_counter(), time.process_time()
        model.train_on_batch(x, y)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return 1e3 * statistics.median(walls[5:]), 1e3 * statistics.median(cpus[5:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-epsilon", type=float, default=3.0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=1024, help="expected examples in a batch")
    parser.add_argument("--l2-norm-clip", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=2.0)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--verbose", type=int, default=2, help="as in Keras: 0 for nothing, 2 for a line each epoch")
    arguments = parser.parse_args()

    try:
        data = datasets.load("mnist")
    except DatasetError as error:
        print(f"Skipped. {error}")
        return
    plan = PrivacyPlan.solve(
        target_epsilon=arguments.target_epsilon,
        delta=DELTA,
        num_examples=len(data.x_train),
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
    )
    optimizer = plan.optimizer(
        DPKerasSGDOptimizer,
        l2_norm_clip=arguments.l2_norm_clip,
        learning_rate=arguments.learning_rate,
        momentum=arguments.momentum,
    )
    model = build(data, optimizer)
    batches = plan.batches(data.x_train, data.y_train)

    before = plain_step_milliseconds(data, arguments.batch_size)
    wall, cpu = time.perf_counter(), time.process_time()
    model.fit(batches, epochs=arguments.epochs, callbacks=plan.callbacks(), verbose=arguments.verbose)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = plain_step_milliseconds(data, arguments.batch_size)

    _, accuracy = model.evaluate(data.x_test, data.y_test, batch_size=1000, verbose=0)
    steps = optimizer.privacy_steps
    plain_wall, plain_cpu = ((b + a) / 2 for b, a in zip(before, after, strict=True))
    rows = [
        ("test accuracy", f"{100 * accuracy:.2f} %"),
        ("epsilon, by the ledger", f"{plan.epsilon():.4f} at delta {DELTA:g}"),
        ("noise multiplier", f"{plan.noise_multiplier:.4f}"),
        ("steps", f"{steps} of {arguments.batch_size} examples expected"),
        ("wall seconds of fit", f"{wall:.1f}"),
        ("CPU seconds of fit", f"{cpu:.1f}"),
        ("ms per step", f"{1e3 * wall / steps:.1f} wall, {1e3 * cpu / steps:.1f} CPU"),
        ("ms per plain Keras step", f"{plain_wall:.1f} wall, {plain_cpu:.1f} CPU"),
        ("private by plain", f"{1e3 * wall / steps / plain_wall:.2f} wall, {1e3 * cpu / steps / plain_cpu:.2f} CPU"),
    ]
    for name, value in rows:
        print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
