"""Memory and threads over many Poisson rounds of federated averaging: this program, TFF's worker, and its relay.

Every cohort has another size, which in TFF's own algorithms costs the worker memory and threads for each size. The last row is
what was added after the warm-up; the exit code is 1 if a process grew by 50 MB or gained a thread.
"""

import argparse
import sys

import numpy as np
import psutil

import federated
from tfprivacy_ft import models

CLIENTS, COHORT, MOST_GROWTH_MB = 200, 40, 50.0


def measure():
    """Resident MB and threads of each process; the worker and its relay are the children."""
    program = psutil.Process()
    processes = {"program": program}
    for child in program.children(recursive=True):
        processes["worker" if child.name().startswith("worker_binary") else "relay"] = child
    return {
        name: (process.memory_info().rss / 1e6, process.num_threads()) for name, process in sorted(processes.items())
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--looks", type=int, default=10, help="rows of the table; the first is the end of the warm-up")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    clients = [
        (rng.normal(size=(n, 28, 28, 1)).astype(np.float32), rng.integers(0, 10, n).astype(np.int32))
        for n in rng.integers(5, 30, CLIENTS)
    ]
    process = federated.build_averaging(
        lambda: models.build_model("cnn", input_shape=(28, 28, 1), num_outputs=10),
        client_learning_rate=0.1,
        l2_norm_clip=1.0,
        noise_multiplier=1.0,
        expected_clients_per_round=COHORT,
    )
    looks = []

    def look(model):
        del model
        looks.append(measure())
        return {}

    every = options.rounds // options.looks
    federated.simulate(
        process, clients, rounds=options.rounds, delta=1e-3, evaluate=look, evaluate_every=every, progress=False
    )
    names = list(looks[0])
    print("rounds" + "".join(f"  {name + ' MB':>12} {'threads':>8}" for name in names))
    for number, measured in enumerate(looks, start=1):
        cells = (f"  {measured[name][0]:12.1f} {measured[name][1]:8d}" for name in names)
        print(f"{min(number * every, options.rounds):6d}" + "".join(cells))
    growth = {
        name: [last - first for first, last in zip(looks[0][name], looks[-1][name], strict=True)] for name in names
    }
    print("growth" + "".join(f"  {growth[name][0]:+12.1f} {growth[name][1]:+8d}" for name in names))
    return int(growth["worker"][0] >= MOST_GROWTH_MB or any(threads > 0 for _, threads in growth.values()))


if __name__ == "__main__":
    sys.exit(main())
