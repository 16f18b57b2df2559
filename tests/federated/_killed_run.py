"""A run with checkpoints, used by test_checkpoints.py: killed by signal 9 while it reads a client, or while it saves."""

import os
import pathlib
import signal
import sys

import numpy as np

import federated
from tfprivacy_ft import models

CLIENTS = [(np.ones((3, 4), "float32"), np.zeros(3, "int32")), (np.zeros((2, 4), "float32"), np.ones(2, "int32"))]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Dying(list):
    """Clients of whom reading the ninth kills, which is in round 5 of two clients a round."""

    reads = 0

    def __getitem__(self, i):
        self.reads += 1
        if self.reads == 9:
            die()
        return super().__getitem__(i)


def run(folder, clients=CLIENTS):
    process = federated.build_averaging(
        lambda: models.build_model("logistic", (4,), 2),
        client_learning_rate=0.1,
        l2_norm_clip=1.0,
        noise_multiplier=1.0,
        expected_clients_per_round=2,
    )
    return federated.simulate(
        process, clients, rounds=7, delta=0.1, run_dir=folder, checkpoint_every=2, evaluate_every=2, progress=False
    )


if __name__ == "__main__":
    import tensorflow as tf

    if sys.argv[2] == "save":
        tf.io.gfile.rename = die  # the checkpoint is written by then, and not in its place
    run(pathlib.Path(sys.argv[1]), Dying(CLIENTS) if sys.argv[2] == "client" else CLIENTS)
