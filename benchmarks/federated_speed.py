"""Time of one federated round: this package beside TensorFlow Federated's own federated averaging, on the same clients.

Both average the changes of a cohort with a fixed clip and Gaussian noise, and take turns in one process on one worker; times
are medians over rounds, from the clients in hand to the next state. TFF stands here twice: as it comes (DATASET_REDUCE), and
with its other loop (DATASET_ITERATOR). "weights apart" is the largest difference between our weights and TFF's after one
round from the same weights, on the same batches, without noise. `--flower` adds Flower's simulation of the small net with 40
clients. A second table has how our round grows with clients and weights. A picture goes to `federated_speed.png`.

On a machine that other work shares only the ratios of one run mean something.
"""

import argparse
import gc
import json
import os
import pathlib
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import federated
from federated import runtime
from tfprivacy_ft.models import build_model

CLIP, NOISE, LEARNING_RATE, EPOCHS = 0.5, 1.0, 0.1, 2
OURS, STOCK, ITERATOR, FLOWER = "tfprivacy_ft", "TFF", "TFF, DATASET_ITERATOR", "Flower"
GROWN_CLIENTS, GROWN_WEIGHTS = (10, 30, 100, 300, 1000), (1_000, 10_000, 100_000, 1_000_000)


class Job(NamedTuple):
    """What one round trains, and how many times faster than TFF it is meant to be."""

    title: str
    build: Callable[[], Any]
    shape: tuple[int, ...]
    num_clients: int
    examples: int
    batch_size: int
    target: float | None = None

    def clients(self):
        random = np.random.default_rng(0)
        return [
            (
                random.normal(size=(self.examples, *self.shape)).astype(np.float32),
                random.integers(0, 4, self.examples).astype(np.int32),
            )
            for _ in range(self.num_clients)
        ]


def dense(shape, width, outputs=4):
    return lambda: build_model("mlp", shape, outputs, hidden_units=(width,), activation="relu")


def job_of_size(num_clients=100, weights=1_000):
    """A dense network of about so many weights, as the growth is measured on."""
    width = max(1, round((weights - 4) / (20 + 1 + 4)))
    return Job("", dense((20,), width), (20,), num_clients, 64, 16)


JOBS = {
    "net40": Job("net 20-32-4, 40 clients", dense((20,), 32), (20,), 40, 64, 16, target=15.0),
    "net200": Job("net 20-32-4, 200 clients", dense((20,), 32), (20,), 200, 64, 16, target=40.0),
    "cnn100": Job(
        "MNIST CNN, 100 clients", lambda: build_model("cnn", (28, 28, 1), 10), (28, 28, 1), 100, 20, 10, target=5.0
    ),
}


class Contender:
    """A learning process with the clients of one round, in the form it takes them."""

    def __init__(self, process, clients):
        self._process, self._clients, self.seconds = process, clients, []
        self._state = process.initialize()

    def run(self, rounds):
        for _ in range(rounds):
            start = time.perf_counter()
            self._state = self._process.next(self._state, self._clients).state
            self.seconds.append(time.perf_counter() - start)


def ours(job, noise=NOISE):
    return federated.build_averaging(
        job.build,
        client_learning_rate=LEARNING_RATE,
        batch_size=job.batch_size,
        local_epochs=EPOCHS,
        l2_norm_clip=CLIP,
        noise_multiplier=noise,
        expected_clients_per_round=job.num_clients,
    )


def stock(job, loop, noise=NOISE):
    """TFF's federated averaging with a Gaussian aggregator, as its tutorial on private learning builds it."""
    tff = runtime.require_tff()
    model = tff.learning.models.functional_model_from_keras(
        job.build,
        tf.keras.losses.SparseCategoricalCrossentropy(),
        (tf.TensorSpec([None, *job.shape], tf.float32), tf.TensorSpec([None], tf.int32)),
    )
    return tff.learning.algorithms.build_unweighted_fed_avg(
        model,
        tff.learning.optimizers.build_sgdm(LEARNING_RATE),
        tff.learning.optimizers.build_sgdm(1.0),
        model_aggregator=tff.aggregators.DifferentiallyPrivateFactory.gaussian_fixed(noise, job.num_clients, CLIP),
        loop_implementation=tff.learning.LoopImplementation[loop],
    )


def batches(job, clients):
    """The clients as TFF takes them."""
    return [tf.data.Dataset.from_tensor_slices(client).batch(job.batch_size).repeat(EPOCHS) for client in clients]


def contend(job, rounds):
    """Name -> seconds of each round, measured in turns, and how far our weights are from TFF's after one round."""
    clients = job.clients()
    as_batches = batches(job, clients)
    found = {
        OURS: Contender(ours(job), clients),
        STOCK: Contender(stock(job, "DATASET_REDUCE"), as_batches),
        ITERATOR: Contender(stock(job, "DATASET_ITERATOR"), as_batches),
    }
    for contender in found.values():
        contender.run(2)  # starts the worker's threads, and warms up
        contender.seconds.clear()
    for _ in range(rounds):
        for name, contender in found.items():
            contender.run(5 if name == OURS else 1)
    silent = ours(job, noise=0.0), stock(job, "DATASET_REDUCE", noise=0.0)
    start = silent[1].get_model_weights(silent[1].initialize())
    pairs = zip(*(weights_after_a_round(process, start, as_batches) for process in silent), strict=True)
    return {name: each.seconds for name, each in found.items()}, max(float(np.abs(a - b).max()) for a, b in pairs)


def weights_after_a_round(process, start, clients):
    state = process.set_model_weights(process.initialize(), start)
    return process.get_model_weights(process.next(state, clients).state).trainable


def flower(python, job, rounds):
    """Milliseconds of a round of Flower, and how many were timed, in an environment that has it."""
    asked = {
        "num_clients": job.num_clients,
        "examples": job.examples,
        "batch_size": job.batch_size,
        "epochs": EPOCHS,
        "learning_rate": LEARNING_RATE,
        "l2_norm_clip": CLIP,
        "noise_multiplier": NOISE,
        "rounds": rounds,
    }
    worker = pathlib.Path(__file__).with_name("_peer_flower.py")
    ran = subprocess.run([python, "-E", worker, json.dumps(asked)], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])[FLOWER]


def growth(clients, weights, rounds):
    """axis -> [(value, ms per round)]: one of the two grows, the other stays."""
    sizes = [("clients", n, job_of_size(num_clients=n)) for n in clients]
    sizes += [("weights", n, job_of_size(weights=n)) for n in weights]
    found: dict[str, list[tuple[int, float]]] = {"clients": [], "weights": []}
    for axis, value, job in sizes:
        contender = Contender(ours(job), job.clients())
        contender.run(2)
        contender.seconds.clear()
        contender.run(rounds)
        found[axis].append((value, milliseconds(contender.seconds)))
        del contender
        gc.collect()
    return found


def milliseconds(seconds):
    return 1e3 * statistics.median(seconds)


def show(console, job, rows, apart):
    table = Table(title=f"{job.title}: {job.examples} examples each, batch {job.batch_size}, {EPOCHS} epochs")
    for column in ("", "ms per round", "times tfprivacy_ft", "target", "rounds timed"):
        table.add_column(column, justify="right" if column else "left")
    for name, (ms, rounds) in rows.items():
        target = f"{job.target:g}" if name == STOCK else ""
        table.add_row(name, f"{ms:,.1f}", f"{ms / rows[OURS][0]:.1f}", target, str(rounds))
    console.print(table)
    console.print(f"weights apart from TFF's after one round: {apart:.1e}\n")


def show_growth(console, found):
    for axis, points in found.items():
        table = Table(title=f"our round, as {axis} grow")
        for column in (axis, "ms per round"):
            table.add_column(column, justify="right")
        for value, ms in points:
            table.add_row(f"{value:,}", f"{ms:,.1f}")
        console.print(table)


def picture(path, measured, found):
    """Milliseconds as bars, ratios above them, and the growth as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7 if found else 3.6), layout="constrained")
    parts = figure.subfigures(2 if found else 1, 1, squeeze=False).ravel()
    axes = parts[0].subplots()
    colours = {OURS: "#4477aa", STOCK: "#bbbbbb", ITERATOR: "#dddddd", FLOWER: "#ccbb44"}
    for i, (_, rows) in enumerate(measured):
        for j, (name, (ms, _)) in enumerate(rows.items()):
            place = i + 0.2 * (j - (len(rows) - 1) / 2)
            axes.bar(place, ms, 0.18, color=colours[name])
            axes.text(
                place, ms, f"{ms / rows[OURS][0]:.1f}x" if name != OURS else "", ha="center", va="bottom", fontsize=8
            )
    axes.set_xticks(range(len(measured)), [job.title for job, _ in measured])
    axes.set(yscale="log", ylabel="ms per round", ylim=(10, None))
    axes.margins(y=0.12)
    names = list(dict.fromkeys(name for _, rows in measured for name in rows))
    axes.legend([axes.bar(0, 0, color=colours[name]) for name in names], names, fontsize=8, loc="upper left")
    if found:
        for panel, (axis, points) in zip(parts[1].subplots(1, len(found), sharey=True), found.items(), strict=True):
            panel.plot(*zip(*points, strict=True), "o-", color=colours[OURS])
            panel.set(xscale="log", yscale="log", xlabel=axis)
            panel.grid(alpha=0.3)
        parts[1].axes[0].set_ylabel("our ms per round")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="*", choices=sorted(JOBS), default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=7, help="turns that the contenders take")
    parser.add_argument("--quick", action="store_true", help="the small net with 40 clients, and a little growth, only")
    parser.add_argument("--flower", metavar="PYTHON", help="a Python that has flwr[simulation], which is measured, too")
    picture_file = pathlib.Path(__file__).with_suffix(".png")
    parser.add_argument(
        "--png", default=picture_file, help="file for a picture of it all (default: federated_speed.png)"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    jobs, rounds = (["net40"], 2) if arguments.quick else (arguments.jobs, arguments.rounds)
    console, measured = Console(width=100), []
    for name in jobs:
        job = JOBS[name]
        seconds, apart = contend(job, rounds)
        rows = {each: (milliseconds(found), len(found)) for each, found in seconds.items()}
        if arguments.flower and name == "net40":
            rows[FLOWER] = flower(arguments.flower, job, rounds)
        show(console, job, rows, apart)
        measured.append((job, rows))
        tf.keras.backend.clear_session()
    most = 2 if arguments.quick else None
    found = growth(GROWN_CLIENTS[:most], GROWN_WEIGHTS[:most], rounds)
    show_growth(console, found)
    picture(arguments.png, measured, found)


if __name__ == "__main__":
    main()
