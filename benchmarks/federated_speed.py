"""Time of one federated round: this package beside TensorFlow Federated's own federated averaging, on the same clients.

Both average the changes of a cohort with a fixed clip and Gaussian noise, and take turns in one process, on one kind of
worker; times are medians over rounds, from the data in hand to the next state. TFF stands here twice, as it comes
(DATASET_REDUCE) and with its other loop (DATASET_ITERATOR). "apart" is the largest difference between our weights and its
own after one round from the same weights, on batches in the same order, without noise. A second table has how our round
grows with clients and weights. A picture goes to `federated_speed.png`.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

import federated
from federated import runtime
from tfprivacy_ft.models import build_model

CLIP, NOISE, LEARNING_RATE, EPOCHS = 0.5, 1.0, 0.1, 2
OURS, STOCK, ITERATOR = "tfprivacy_ft", "TFF", "TFF, DATASET_ITERATOR"
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
        self.process, self.clients, self.seconds = process, clients, []
        self._state = process.initialize()

    def run(self):
        start = time.perf_counter()
        self._state = self.process.next(self._state, self.clients).state
        self.seconds.append(time.perf_counter() - start)

    def weights_after_a_round(self, weights, clients):
        state = self.process.set_model_weights(self.process.initialize(), weights)
        return self.process.get_model_weights(self.process.next(state, clients).state).trainable

    @property
    def milliseconds(self):
        return 1e3 * statistics.median(self.seconds)


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
    """Name -> contender, measured in turns, and how far our weights are from TFF's after one round."""
    clients = job.clients()
    as_batches = batches(job, clients)
    found = {
        OURS: Contender(ours(job), clients),
        STOCK: Contender(stock(job, "DATASET_REDUCE"), as_batches),
        ITERATOR: Contender(stock(job, "DATASET_ITERATOR"), as_batches),
    }
    for contender in found.values():
        contender.run()  # starts the worker's threads, and warms up
        contender.run()
        contender.seconds.clear()
    for _ in range(rounds):
        for name, contender in found.items():
            for _ in range(5 if name == OURS else 1):
                contender.run()
    silent = Contender(ours(job, noise=0.0), as_batches), Contender(stock(job, "DATASET_REDUCE", noise=0.0), as_batches)
    start = silent[1].process.get_model_weights(silent[1].process.initialize())
    pairs = zip(*(each.weights_after_a_round(start, as_batches) for each in silent), strict=True)
    return found, max(float(np.abs(a - b).max()) for a, b in pairs)


def growth(rounds):
    """axis -> [(value, ms per round)]; one of the two grows, the other stays."""
    found: dict[str, list[tuple[int, float]]] = {"clients": [], "weights": []}
    sizes = [("clients", n, job_of_size(num_clients=n)) for n in GROWN_CLIENTS]
    sizes += [("weights", n, job_of_size(weights=n)) for n in GROWN_WEIGHTS]
    for axis, value, job in sizes:
        contender = Contender(ours(job), job.clients())
        for _ in range(rounds + 2):
            contender.run()
        del contender.seconds[:2]
        found[axis].append((value, contender.milliseconds))
        gc.collect()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="*", choices=sorted(JOBS), default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=7, help="turns that the contenders take")
    parser.add_argument("--no-growth", action="store_true", help="leave out the second table")
    arguments = parser.parse_args()
    for name in arguments.jobs:
        job = JOBS[name]
        found, apart = contend(job, arguments.rounds)
        m = {n: c.milliseconds for n, c in found.items()}
        print(
            job.title,
            {n: round(v, 1) for n, v in m.items()},
            round(m[STOCK] / m[OURS], 1),
            round(m[ITERATOR] / m[OURS], 1),
            apart,
            flush=True,
        )
    if not arguments.no_growth:
        print(growth(arguments.rounds))


if __name__ == "__main__":
    main()
