"""What tests of reports and of the command `compute-epsilon` share: settings, runs with a ledger, strict JSON."""

import json

from tfprivacy_ft.ledger import Ledger

DPSGD = {"num_examples": 60000, "batch_size": 256, "noise_multiplier": 1.1, "epochs": 60, "delta": 1e-5}
FEDAVG = {"num_clients": 3000, "clients_per_round": 100, "noise_multiplier": 1.0, "rounds": 100, "delta": 1e-4}


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not strict JSON")

    return json.loads(text, parse_constant=refuse)


def a_run(folder, events, delta=1e-5, notes=()):
    with Ledger.open(folder, delta=delta, facts={"model": "cnn"}) as book:
        for event in events:
            book.settle([book.reserve(event)], event)
        for note in notes:
            book.note(*note)
    return folder
