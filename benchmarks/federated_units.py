"""Epsilon of one hospital stay and of one patient, who may have several: what the same noise gives each, and at which AUC.

Diabetes-130 (Strack et al. 2014): 101,766 stays of 71,518 patients; the label is whether the patient came back to hospital.
A logistic model is trained by DP-SGD on stays, and by federated averaging with a client for each patient, on patients of whom
none is in the test set. Both draw 5 % by Poisson sampling, 60 times, so that the same noise gives the same epsilon: to one
stay there, to one patient here.

What DP-SGD on stays gives a patient with k of them follows from the figures for one, by accounting for groups. k has to be
known: three patients in four have one stay and one has 40, so most of a patient's stays may have to be left out. Inputs are
scaled by bounds that are public. The data are read from the folder in the environment variable TFPRIVACY_FT_DATA, or from
../shared/data.
"""

import argparse
import collections
import csv
import hashlib
import io
import lzma
import math
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TFPRIVACY_FT_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))

import numpy as np
from sklearn.metrics import roc_auc_score

import federated
from tfprivacy_ft import DPKerasSGDOptimizer, PrivacyPlan, accounting, models

DELTA = 1e-6
SAMPLING_PROBABILITY, EPOCHS = 0.05, 3  # 20 steps each
MOST_STAYS = 40  # of one patient, as published
L2_NORM_CLIP, LEARNING_RATE, MOMENTUM = 1.0, 0.5, 0.9
SHA256 = "f97e19baaa5dafede93952ca77ddda7e155e8712b6561165800c3255fbae244e"

# The values of each column as the publication lists them, whether they occur or not; all others are "none of these".
CHOICES = {
    "race": ("Caucasian", "AfricanAmerican", "Hispanic", "Asian", "Other"),
    "gender": ("Female", "Male"),
    "admission_type_id": tuple(str(code) for code in range(1, 9)),
    "discharge_disposition_id": tuple(str(code) for code in range(1, 31)),
    "admission_source_id": tuple(str(code) for code in range(1, 27)),
    "max_glu_serum": ("Norm", ">200", ">300"),
    "A1Cresult": ("Norm", ">7", ">8"),
    "metformin": ("Steady", "Up", "Down"),
    "insulin": ("Steady", "Up", "Down"),
    "change": ("Ch",),
    "diabetesMed": ("Yes",),
}
# Counts are taken to at most these, round numbers that do not come from the rows that are trained on.
BOUNDS = {
    "time_in_hospital": 14,
    "num_lab_procedures": 100,
    "num_procedures": 6,
    "num_medications": 40,
    "number_diagnoses": 9,
}
VISITS_BEFORE = ("number_outpatient", "number_emergency", "number_inpatient")  # on a scale of none, 1, 3, 7 or more


def read(folder):
    """Inputs float32 (n, d) in [-1, 1], labels float32 (n,) and patients int64 (n,), a row for each stay."""
    content = (Path(folder) / "diabetes130" / "diabetic_data.csv.xz").read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise OSError("diabetes130/diabetic_data.csv.xz is not the file that these figures are of")
    columns = collections.defaultdict(list)
    for row in csv.DictReader(io.StringIO(lzma.decompress(content).decode())):
        for name in (*CHOICES, *BOUNDS, *VISITS_BEFORE, "age", "readmitted", "patient_nbr"):
            columns[name].append(row[name])
    table = {name: np.array(values) for name, values in columns.items()}
    decade = np.char.partition(np.char.lstrip(table["age"], "["), "-")[:, 0].astype(np.float32) / 10
    inputs = [2 * decade / 9 - 1]
    inputs += [2 * np.minimum(table[name].astype(np.float32) / most, 1) - 1 for name, most in BOUNDS.items()]
    inputs += [np.minimum(np.log2(1 + table[name].astype(np.float32)) / 3, 1) for name in VISITS_BEFORE]
    inputs += [(table[name] == value).astype(np.float32) for name, values in CHOICES.items() for value in values]
    return (
        np.stack(inputs, axis=1).astype(np.float32),
        (table["readmitted"] != "NO").astype(np.float32),
        table["patient_nbr"].astype(np.int64),
    )


def at_most_of_each(patients, most, rng):
    """Rows that keep `most` stays of each patient, drawn at random."""
    order = rng.permutation(len(patients))
    order = order[np.argsort(patients[order], kind="stable")]
    _, first, counts = np.unique(patients[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(first, counts)
    return np.sort(order[place < most])


def plan_for(num_stays, **protection):
    """How to draw from this many stays: with noise_multiplier= as it is, or solved for with target_epsilon=."""
    make = PrivacyPlan.solve if "target_epsilon" in protection else PrivacyPlan
    size = math.ceil(SAMPLING_PROBABILITY * num_stays)
    return make(num_examples=num_stays, batch_size=size, epochs=EPOCHS, delta=DELTA, **protection)


def train_on_stays(x, y, patients, plan):
    """A model by DP-SGD on stays, and the events of its ledger."""
    model = logistic(x.shape[1])
    optimizer = plan.optimizer(
        DPKerasSGDOptimizer, l2_norm_clip=L2_NORM_CLIP, learning_rate=LEARNING_RATE, momentum=MOMENTUM
    )
    model.compile(optimizer, "binary_crossentropy")
    user_ids = (
        None if plan.examples_per_user is None else patients
    )  # a plan for patients checks how many stays they have
    model.fit(plan.batches(x, y, user_ids=user_ids), epochs=plan.epochs, callbacks=plan.callbacks(), verbose=0)
    plan.settle()
    return model, plan.ledger.events()


def train_on_patients(clients, noise_multiplier):
    """A model by federated averaging, and its epsilon: each patient takes one step on all of its stays."""
    process = federated.build_averaging(
        lambda: logistic(clients.x.shape[1]),
        loss="binary_crossentropy",
        client_learning_rate=1.0,
        batch_size=MOST_STAYS,
        l2_norm_clip=L2_NORM_CLIP,
        noise_multiplier=noise_multiplier,
        expected_clients_per_round=SAMPLING_PROBABILITY * len(clients),
        server_learning_rate=LEARNING_RATE,
        server_momentum=MOMENTUM,
    )
    rounds = round(EPOCHS / SAMPLING_PROBABILITY)
    result = federated.simulate(process, clients, rounds=rounds, delta=DELTA, evaluate_every=rounds, progress=False)
    return result.model(), result.epsilon


def logistic(num_inputs):
    return models.build_model("logistic", (num_inputs,), 1)


def epsilon_of_stay(events):
    return accounting.epsilon(accounting.concerning("example", events), DELTA)


def epsilon_of_patient(events, most_stays):
    """Of a patient with at most so many stays, from the events of DP-SGD on stays."""
    each = accounting.concerning("example", events)
    return accounting.epsilon([replace(event, unit="user", examples_per_user=most_stays) for event in each], DELTA)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-epsilon", type=float, default=1.0)
    parser.add_argument("--stays-kept", type=int, default=3, help="of each patient, where the rest is left out")
    arguments = parser.parse_args()

    try:
        x, y, patients = read(os.environ["TFPRIVACY_FT_DATA"])
    except OSError as error:
        print(f"Skipped. {error}")
        return
    begin = time.perf_counter()
    rng = np.random.default_rng(0)
    everybody = np.unique(patients)
    tested = np.isin(patients, rng.choice(everybody, len(everybody) // 5, replace=False))
    x_test, y_test = x[tested], y[tested]
    x, y, patients = x[~tested], y[~tested], patients[~tested]
    clients = federated.split_by_owner(x, y, patients)
    kept, most = at_most_of_each(patients, arguments.stays_kept, rng), arguments.stays_kept
    target = {"target_epsilon": arguments.target_epsilon}
    for_stays = plan_for(len(x), **target)
    noise = for_stays.noise_multiplier

    def line(name, noise_multiplier, model, of_stay, of_patient):
        auc = roc_auc_score(y_test, model.predict(x_test, batch_size=4096, verbose=0)[:, 0])
        print(f"{name:46} {noise_multiplier:6.3f} {of_stay:17.3f} {of_patient:13.3f} {auc:7.4f}", flush=True)

    print(
        f"{len(x):,} stays of {len(clients):,} patients to train on, {len(kept):,} with at most {most} of each patient\n"
    )
    print(f"{'':46} {'noise':>6} {'epsilon of a stay':>17} {'of a patient':>13} {'AUC':>7}")
    for name, rows, stays, plan in (
        ("stays, noise for stays", slice(None), MOST_STAYS, for_stays),
        (f"stays, at most {most} a patient, the same noise", kept, most, plan_for(len(kept), noise_multiplier=noise)),
        (
            f"stays, at most {most} a patient, noise for patients",
            kept,
            most,
            plan_for(len(kept), examples_per_user=most, **target),
        ),
    ):
        model, events = train_on_stays(x[rows], y[rows], patients[rows], plan)
        line(name, plan.noise_multiplier, model, epsilon_of_stay(events), epsilon_of_patient(events, stays))
    model, epsilon = train_on_patients(clients, noise)
    line("federated by patient, the same noise", noise, model, epsilon, epsilon)  # a stay is part of a patient
    model, epsilon = train_on_patients(clients, 0.0)
    line("federated by patient, without noise", 0.0, model, epsilon, epsilon)
    print(f"\nin all {time.perf_counter() - begin:.0f} seconds")


if __name__ == "__main__":
    main()
