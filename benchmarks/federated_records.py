"""Heart disease at four hospitals: record-level epsilon of at most 3 at each of them, and the AUC that is reached.

The hospitals are the clients. Each trains a logistic model by DP-SGD on its own records, and the server averages their
weights, so that no hospital trusts the server or another hospital; epsilon is each hospital's own, by its own ledger (PLD
accounting, adding or removing one record). Beside it: each hospital alone with the same epsilon, all records in one place
with the same epsilon, and both without privacy. Features are scaled by clinical ranges and public categories, never by the
records. A quarter of each hospital's records of each label is held out; AUC is that of all held-out records together.
Target: an AUC of 0.85 or more. The data are read from the folder in the environment variable TFPRIVACY_FT_DATA, or from
../shared/data. `--help` lists the settings.
"""

import argparse
import csv
import io
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TFPRIVACY_FT_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))

import numpy as np
import tensorflow as tf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import federated
from tfprivacy_ft import datasets
from tfprivacy_ft.errors import DatasetError

FILE, SHA256 = "heart_disease_4_hospitals.csv", "b5e8796d08fba93d48b2a783cbbcdb2db65cd0eab628551f7f594eaaefa897d5"
URL = "https://archive.ics.uci.edu/dataset/45/heart+disease"
DELTA, HELD_OUT = 1e-5, 0.25

# What a clinician would expect of an adult; values beyond are cut off. A blood pressure or cholesterol of 0 is a blank.
RANGES = {
    "age": (20, 80),
    "trestbps": (80, 200),
    "chol": (100, 400),
    "thalach": (60, 200),
    "oldpeak": (-1, 5),
    "ca": (0, 3),
}
BLANK_IF_ZERO = ("trestbps", "chol")
CATEGORIES = {
    "sex": (0, 1),
    "cp": (1, 2, 3, 4),
    "fbs": (0, 1),
    "restecg": (0, 1, 2),
    "exang": (0, 1),
    "slope": (1, 2, 3),
    "thal": (3, 6, 7),
}


def features(record):
    """A record as numbers in [-1, 1], each with a mark of whether it is missing; categories as ones and zeros."""
    values = []
    for name, (low, high) in RANGES.items():
        number = float(record[name] or "nan")
        missing = np.isnan(number) or (name in BLANK_IF_ZERO and number == 0)
        values += [0.0 if missing else np.clip(2 * (number - low) / (high - low) - 1, -1, 1), float(missing)]
    for name, categories in CATEGORIES.items():
        number = float(record[name] or "nan")
        values += [*(float(number == category) for category in categories), float(np.isnan(number))]
    return values


def load():
    """Features (920, 38), labels (920,) and the hospital of each record."""
    content = datasets._read_checked(FILE, "heart_disease", (SHA256,), URL)
    records = list(csv.DictReader(io.StringIO(content.decode())))
    x = np.array([features(record) for record in records], np.float32)
    y = np.array([float(record["num"]) > 0 for record in records], np.float32)
    return x, y, np.array([record["hospital"] for record in records])


def held_out(y, hospitals, seed):
    """Which records are held out: the same share of each hospital's records of each label, whatever the seed."""
    rng, chosen = np.random.default_rng(seed), np.zeros(len(y), bool)
    for hospital, label in sorted(set(zip(hospitals, y, strict=True))):
        members = np.flatnonzero((hospitals == hospital) & (y == label))
        chosen[rng.permutation(members)[: round(HELD_OUT * len(members))]] = True
    return chosen


def logistic(width):
    return tf.keras.Sequential(
        [tf.keras.layers.Input((width,)), tf.keras.layers.Dense(1, "sigmoid", kernel_initializer="zeros")]
    )


def build(arguments, width, noise_multiplier, expected_batch_size, l2_norm_clip):
    return federated.build_record_level_averaging(
        lambda: logistic(width),
        loss="binary_crossentropy",
        l2_norm_clip=l2_norm_clip,
        noise_multiplier=noise_multiplier,
        expected_batch_size=expected_batch_size,
        local_steps=arguments.local_steps,
        client_learning_rate=arguments.learning_rate,
    )


def scores(process, clients, x, rounds):
    """The trained model's scores of `x`, and the largest epsilon of a record by the ledgers."""
    result = federated.simulate_records(process, clients, rounds=rounds, delta=DELTA, progress=False)
    return result.model()(x).numpy()[:, 0], result.epsilon


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-epsilon", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--local-steps", type=int, default=2)
    parser.add_argument("--batch-size", type=float, default=64, help="expected records in a batch of one hospital")
    parser.add_argument("--l2-norm-clip", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=5, help="splits into training and held-out records")
    arguments = parser.parse_args()

    try:
        x, y, hospitals = load()
    except DatasetError as error:
        print(f"Skipped. {error}")
        return
    start = time.perf_counter()
    split = held_out(y, hospitals, seed=0)
    names, sizes = np.unique(hospitals[~split], return_counts=True)
    batches = {"hospital": arguments.batch_size, "pooled": len(names) * arguments.batch_size}

    def solve(sizes, batch_size):
        return federated.solve_noise_multipliers(
            [int(n) for n in sizes],
            target_epsilon=arguments.target_epsilon,
            delta=DELTA,
            expected_batch_size=batch_size,
            local_steps=arguments.local_steps,
            rounds=arguments.rounds,
        )

    noise, pooled_noise = solve(sizes, batches["hospital"]), solve([sizes.sum()], batches["pooled"])
    clip, width = arguments.l2_norm_clip, x.shape[1]
    together = build(arguments, width, noise, batches["hospital"], clip)
    public = build(arguments, width, 0.0, batches["hospital"], 1e6)
    pooled = build(arguments, width, pooled_noise, batches["pooled"], clip)
    alone = [build(arguments, width, [z], batches["hospital"], clip) for z in noise]

    areas, epsilons = {}, {}
    for seed in range(arguments.seeds):
        test = held_out(y, hospitals, seed)
        clients = {str(n): (x[~test & (hospitals == n)], y[~test & (hospitals == n)]) for n in names}
        everybody = {"all": (x[~test], y[~test])}
        runs = {"federated, private": (together, clients), "one place, private": (pooled, everybody)}
        runs |= {f"{n} alone, private": (p, {n: clients[n]}) for n, p in zip(clients, alone, strict=True)}
        runs["federated, not private"] = (public, clients)
        for name, (process, data) in runs.items():
            found, epsilon = scores(process, data, x[test], arguments.rounds)
            areas.setdefault(name, []).append(roc_auc_score(y[test], found))
            epsilons[name] = max(epsilon, epsilons.get(name, 0.0))
            if process is together:
                for n in names:
                    here = hospitals[test] == n
                    areas.setdefault(f"  at {n}", []).append(roc_auc_score(y[test][here], found[here]))
        plain = LogisticRegression(max_iter=1000).fit(x[~test], y[~test])
        areas.setdefault("one place, not private", []).append(roc_auc_score(y[test], plain.decision_function(x[test])))

    print(f"{'':30}  AUC of {arguments.seeds} splits  lowest  epsilon")
    for name, found in areas.items():
        epsilon = f"{epsilons[name]:8.4f}" if np.isfinite(epsilons.get(name, np.inf)) else "       -"
        print(f"{name:30}  {statistics.mean(found):.3f} +- {statistics.stdev(found):.3f}  {min(found):.3f} {epsilon}")
    described = ", ".join(f"{n} {size} ({z:.2f})" for n, size, z in zip(names, sizes, noise, strict=True))
    print(f"training records (noise multiplier): {described}; all {sizes.sum()} ({pooled_noise[0]:.2f})")
    print(f"epsilon at delta {DELTA:g}, by the ledgers; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
