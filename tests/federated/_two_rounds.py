"""A program of two rounds, run by test_runtime.py: argument 1 says how it ends."""

import os
import signal
import sys

import numpy as np

import federated
from federated import runtime
from tfprivacy_ft import models


def worker_pid():
    return runtime._worker.pid


def main(ending):
    import tensorflow as tf

    tf.keras.utils.set_random_seed(1)  # has to change nothing about the noise
    process = federated.build_averaging(
        lambda: models.build_model("logistic", (4,), 2),
        client_learning_rate=0.1,
        l2_norm_clip=1.0,
        noise_multiplier=1.0,
        expected_clients_per_round=2,
    )
    state = process.initialize()
    start = process.get_model_weights(state).trainable[0]
    clients = [(np.ones((3, 4), "float32"), np.zeros(3, "int32"))] * 2
    states = [state := process.next(state, clients).state for _ in range(2)]
    noise = (process.get_model_weights(states[0]).trainable[0] - start).ravel()[:4]
    print("ready", worker_pid(), *noise, flush=True)
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    if ending == "interrupt":  # the test sends it in the middle of this
        federated.simulate(process, clients, rounds=10**6, delta=0.1, clients_per_round=2, evaluate_every=10**6)


if __name__ == "__main__":
    main(sys.argv[1])
