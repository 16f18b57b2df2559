"""3,000 clients with 20 digits each, and user-level epsilon at most 2 at delta 1e-4: the accuracy that is reached.

MNIST's 60,000 training images are dealt out so that each client holds 20, mostly of two digits. All clients take part in
each of 50 rounds of federated averaging, so no epsilon here counts on a secret cohort; epsilon is what the ledger says of
one client with all of its images (PLD accounting, adding or removing a client). Target: test accuracy of 93 % or more within
10 minutes.

What costs no privacy does most of the work. Each image is described by its edges, by fixed filters that have seen no data, so
that a linear model of 2,880 weights suffices: the fewer the weights, the less noise there is in all. Beside it stand the same
model without noise and clip, and a linear model on raw pixels. MNIST is read from the folder in the environment variable
TFPRIVACY_FT_DATA, or from ../shared/data.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TFPRIVACY_FT_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))

import numpy as np
import tensorflow as tf

import federated
from tfprivacy_ft import accounting, datasets
from tfprivacy_ft.errors import DatasetError
from tfprivacy_ft.events import Event

DELTA = 1e-4
CLIENTS = 3000
SHARDS_PER_CLIENT = 2
NO_CLIP = 1e6  # no update of these models is as long

DIRECTIONS, FILTER_SIZE, FILTER_WIDTH = 8, 5, 0.7
CELL, STRIDE = 8, 4


def edges(images):
    """How strong the edges of each direction are in each part of an image.

    Derivatives of a Gaussian along eight directions, rectified; their means over 6 x 6 overlapping cells under a triangular
    window; square roots, so that a stroke's width matters less; less the mean over directions, as ink alone tells little.
    The idea is that of histograms of oriented gradients (Dalal & Triggs, CVPR 2005). Nothing here is fitted.

    Args:
        images: float32 in [-1, 1], (n, 28, 28, 1).

    Returns:
        float32 (n, 288), each row of norm 1.
    """
    across = np.arange(FILTER_SIZE) - (FILTER_SIZE - 1) / 2
    angles = 2 * np.pi * np.arange(DIRECTIONS) / DIRECTIONS
    slopes = np.cos(angles) * across[None, :, None] + np.sin(angles) * across[:, None, None]
    bell = np.exp(-(across[None, :, None] ** 2 + across[:, None, None] ** 2) / (2 * FILTER_WIDTH**2))
    filters = slopes * bell / np.linalg.norm(slopes * bell, axis=(0, 1))
    triangle = np.minimum(np.arange(CELL) + 0.5, CELL - np.arange(CELL) - 0.5)
    window = np.outer(triangle, triangle) / triangle.sum() ** 2
    filters = tf.constant(filters[:, :, None, :], tf.float32)
    windows = tf.constant(np.repeat(window[:, :, None, None], DIRECTIONS, axis=2), tf.float32)

    @tf.function
    def describe(batch):
        strengths = tf.nn.relu(tf.nn.conv2d((batch + 1) / 2, filters, 1, "SAME"))
        cells = tf.sqrt(tf.nn.depthwise_conv2d(strengths, windows, [1, STRIDE, STRIDE, 1], "VALID"))
        cells -= tf.reduce_mean(cells, axis=-1, keepdims=True)
        return tf.math.l2_normalize(tf.reshape(cells, [tf.shape(batch)[0], -1]), axis=1)

    return np.concatenate([describe(images[i : i + 1000]).numpy() for i in range(0, len(images), 1000)])


def pixels(images):
    """The pixels themselves (n, 784), each image of norm 1."""
    ink = (images.reshape(len(images), -1) + 1) / 2
    return ink / np.maximum(np.linalg.norm(ink, axis=1, keepdims=True), 1e-6)


def deal(x, y, seed):
    """Clients of 20 examples from two shards of 10, which are cut from the data in order of label.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        section 3, the pathological non-IID partition.
    """
    rng = np.random.default_rng(seed)
    by_label = np.lexsort([rng.random(len(y)), y])
    shards = rng.permutation(by_label.reshape(CLIENTS * SHARDS_PER_CLIENT, -1))
    return federated.ClientData(x, y, tuple(shards.reshape(CLIENTS, -1)), tuple(range(CLIENTS)))


def noise_for(rounds, target_epsilon):
    """The least noise multiplier that keeps these rounds, with all clients in each, within the target."""

    def rounds_of(noise_multiplier):
        return Event.poisson(
            count=rounds,
            unit="client",
            noise_multiplier=noise_multiplier,
            sampling_probability=1.0,
            population=CLIENTS,
        )

    return accounting.solve_noise_multiplier(target_epsilon=target_epsilon, delta=DELTA, events_for=rounds_of)


def averaging(num_features, l2_norm_clip, noise_multiplier, server_learning_rate):
    """Federated averaging of a linear model from zero; each client takes one step on all of its examples."""

    def linear():
        layer = tf.keras.layers.Dense(
            10, "softmax", use_bias=False, kernel_initializer="zeros", input_shape=[num_features]
        )
        return tf.keras.Sequential([layer])

    return federated.build_averaging(
        linear,
        client_learning_rate=1.0,
        batch_size=20,
        l2_norm_clip=l2_norm_clip,
        noise_multiplier=noise_multiplier,
        expected_clients_per_round=CLIENTS,
        server_learning_rate=server_learning_rate,
        server_momentum=0.9,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-epsilon", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--l2-norm-clip", type=float, default=0.2)
    parser.add_argument("--server-learning-rate", type=float, default=80.0, help="with edges")
    parser.add_argument("--pixels-learning-rate", type=float, default=30.0, help="of the server, with raw pixels")
    parser.add_argument("--runs", type=int, default=1, help="of the private model, each on a partition of its own")
    arguments = parser.parse_args()

    try:
        data = datasets.load("mnist")
    except DatasetError as error:
        print(f"Skipped. {error}")
        return
    begin = time.perf_counter()
    noise = noise_for(arguments.rounds, arguments.target_epsilon)
    private = {"l2_norm_clip": arguments.l2_norm_clip, "noise_multiplier": noise}
    bare = {"l2_norm_clip": NO_CLIP, "noise_multiplier": 0.0}
    print(f"{CLIENTS:,} clients of {len(data.y_train) // CLIENTS} images, {arguments.rounds} rounds of all clients")
    print(f"noise multiplier {noise:.4f}, clip {arguments.l2_norm_clip:g}, delta {DELTA:g}\n")
    print(f"{'':24} {'run':>4} {'accuracy':>10} {'epsilon':>8} {'seconds':>8}")
    reached = []
    for name, features, rate, protection, runs in (
        ("edges, private", edges, arguments.server_learning_rate, private, arguments.runs),
        ("edges, no noise, no clip", edges, arguments.server_learning_rate, bare, 1),
        ("raw pixels, private", pixels, arguments.pixels_learning_rate, private, 1),
    ):
        start = time.perf_counter()
        x_train, x_test = features(data.x_train), features(data.x_test)
        process = averaging(x_train.shape[1], server_learning_rate=rate, **protection)
        for run in range(runs):
            result = federated.simulate(
                process,
                deal(x_train, data.y_train, seed=run),
                rounds=arguments.rounds,
                delta=DELTA,
                evaluate=(x_test, data.y_test),
                evaluate_every=arguments.rounds,
                progress=False,
            )
            accuracy, seconds = 100 * result.history[-1]["accuracy"], time.perf_counter() - start
            print(f"{name:24} {run + 1:4} {accuracy:8.2f} % {result.epsilon:8.4f} {seconds:8.1f}", flush=True)
            if protection is private and features is edges:
                reached.append(accuracy)
            start = time.perf_counter()
    print(f"\nedges, private: mean {statistics.mean(reached):.2f} %, from {min(reached):.2f} to {max(reached):.2f} %")
    print(f"in all {time.perf_counter() - begin:.0f} seconds")


if __name__ == "__main__":
    main()
