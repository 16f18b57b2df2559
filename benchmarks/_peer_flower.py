"""Rounds of Flower's simulation: a worker of `federated_speed.py`, which starts it in an environment that has it.

Flower's own server-side DP strategy with a fixed clip around its FedAvg, run by `run_simulation` on Ray, with one actor per
CPU. Its clients train the net 20-32-4 in numpy, which leaves Flower the least to wait for.
"""

import json
import logging
import os
import statistics
import sys
import time

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.simulation import run_simulation

DIM, HIDDEN, CLASSES = 20, 32, 4


class Client(NumPyClient):
    """SGD on the mean cross-entropy of one client's examples."""

    def __init__(self, number, job):
        random = np.random.default_rng(number)
        self.x = random.normal(size=(job["examples"], DIM)).astype(np.float32)
        self.y = np.eye(CLASSES, dtype=np.float32)[random.integers(0, CLASSES, job["examples"])]
        self.job = job

    def fit(self, parameters, config):
        a, b, c, d = (value.copy() for value in parameters)
        rate, size = self.job["learning_rate"], self.job["batch_size"]
        for _ in range(self.job["epochs"]):
            for i in range(0, len(self.x), size):
                x, y = self.x[i : i + size], self.y[i : i + size]
                hidden = np.maximum(x @ a + b, 0)
                scores = np.exp(hidden @ c + d)
                outer = (scores / scores.sum(axis=1, keepdims=True) - y) / len(x)
                inner = (outer @ c.T) * (hidden > 0)
                c -= rate * hidden.T @ outer
                d -= rate * outer.sum(axis=0)
                a -= rate * x.T @ inner
                b -= rate * inner.sum(axis=0)
        return [a, b, c, d], len(self.x), {}


def main():
    job = json.loads(sys.argv[1])
    logging.disable(logging.INFO)
    random = np.random.default_rng(0)
    shapes = [(DIM, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,)]
    weights = [0.2 * random.normal(size=shape).astype(np.float32) for shape in shapes]
    ends = []

    def server(context):
        strategy = DifferentialPrivacyServerSideFixedClipping(
            FedAvg(
                fraction_fit=1.0,
                fraction_evaluate=0.0,
                min_available_clients=job["num_clients"],
                initial_parameters=ndarrays_to_parameters(weights),
                evaluate_fn=lambda *_: ends.append(time.perf_counter()),  # called at the end of every round
            ),
            noise_multiplier=job["noise_multiplier"],
            clipping_norm=job["l2_norm_clip"],
            num_sampled_clients=job["num_clients"],
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=job["rounds"] + 2))

    run_simulation(
        server_app=ServerApp(server_fn=server),
        client_app=ClientApp(client_fn=lambda context: Client(context.node_config["partition-id"], job).to_client()),
        num_supernodes=job["num_clients"],
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    seconds = np.diff(ends)[2:]  # the first rounds start the actors
    print(json.dumps({"Flower": (1e3 * statistics.median(seconds), len(seconds))}))


if __name__ == "__main__":
    main()
