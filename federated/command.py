"""What `tfprivacy-ft federate` runs: federated averaging over the clients of a file, at an epsilon that is given.

Promises: what shapes the model and the inputs is given and never taken from the rows, since that would be a release: the
number of classes, the bounds that columns are scaled by; the noise is solved for, before a row is trained on; every run has a
folder of its own, so that no ledger is continued by accident.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from federated import cohorts
from federated.clients import ClientData, clients_from_table, split_evenly
from tfprivacy_ft import _check, accounting, datasets, models, plots, run_folder, tables
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedEventError

if TYPE_CHECKING:
    from federated.evaluation import ClientEvaluation
    from federated.simulation import SimulationResult

__all__ = ["FederateSettings", "run_federate"]


@dataclasses.dataclass(frozen=True)
class FederateSettings:
    """What can be chosen.

    Args:
        data: A file that ends in .csv, .csv.gz, .tsv, .parquet or .npz, or the name of a bundled data set.
        run_dir: The run's folder, which holds no run yet.
        rounds: >= 1.
        clients_per_round: (Expected) size of a cohort, > 0.
        target_epsilon: Of one client, > 0.
        delta: In (0, 1), well below 1 / number of clients.
        label: Name of the column of labels, whole numbers from 0; for files.
        clients_by: Name of the column that says whose row it is; for files.
        classes: How many labels there are, >= 2; for files.
        features: Names of the columns to learn from; None for all others.
        bounds: `"COLUMN=LOW:HIGH"`, or `"LOW:HIGH"` for all columns without bounds of their own: values are cut off there and
            scaled to -1 .. 1. Columns without are taken as they are.
        num_clients: Clients to split a bundled data set into, >= 1.
        model: Name of a model that `models.build_model` knows.
        cohorts: `"poisson"`, `"fixed"` or `"cyclic"`.
        held_out: Share of the clients to measure on and not to train on, in [0, 1); their figures are releases without noise.
        client_learning_rate, l2_norm_clip, batch_size, local_epochs: As in `build_averaging`.

    Raises:
        InvalidArgumentError: An argument is outside its range, missing, or does not go with the others.
    """

    data: str
    run_dir: str | os.PathLike[str]
    rounds: int
    clients_per_round: float
    target_epsilon: float
    delta: float
    label: str | None = None
    clients_by: str | None = None
    classes: int | None = None
    features: Sequence[str] | None = None
    bounds: Sequence[str] = ()
    num_clients: int | None = None
    model: str = "mlp"
    cohorts: str = "poisson"
    held_out: float = 0.0
    client_learning_rate: float = 0.5
    l2_norm_clip: float = 1.0
    batch_size: int = 8
    local_epochs: int = 1

    def __post_init__(self) -> None:
        _check.positive_integer(rounds=self.rounds, batch_size=self.batch_size, local_epochs=self.local_epochs)
        _check.positive(
            clients_per_round=self.clients_per_round,
            target_epsilon=self.target_epsilon,
            client_learning_rate=self.client_learning_rate,
            l2_norm_clip=self.l2_norm_clip,
        )
        _check.open_unit_interval(delta=self.delta)
        if self.held_out:
            _check.open_unit_interval(held_out=self.held_out)
        self._check_data()

    def _check_data(self) -> None:
        for_files = ("label", "clients_by", "classes")
        if self.is_bundled:
            _check.positive_integer(num_clients=self.num_clients)
            if extra := [name for name in (*for_files, "features", "bounds") if getattr(self, name)]:
                raise InvalidArgumentError(f"data={self.data!r} is a bundled data set: leave out {_as_options(extra)}.")
            return
        tables.check_suffix(pathlib.Path(self.data))
        if missing := [name for name in for_files if getattr(self, name) is None]:
            raise InvalidArgumentError(f"data={self.data!r} is a file: give {_as_options(missing)}, too.")
        if self.num_clients is not None:
            raise InvalidArgumentError(
                f"num_clients={self.num_clients} is not for files, whose clients are given: leave it out."
            )
        if self.classes is None or self.classes < 2:
            raise InvalidArgumentError(f"classes={self.classes} is not allowed: give an integer >= 2.")

    @property
    def is_bundled(self) -> bool:
        """Whether `data` is the name of a bundled data set."""
        return self.data in datasets.names()


def run_federate(settings: FederateSettings) -> "SimulationResult":
    """Trains, prints the report, and leaves ledger, history, report and model in the run's folder.

    Args:
        settings: What was chosen.

    Returns:
        What `simulate` returned.

    Raises:
        InvalidArgumentError: The folder holds a run already, or no noise reaches the target.
        DatasetError: The file cannot be read, or is no table of numbers with these columns.
        MissingDependencyError: What reads the file is not installed.
    """
    from federated.simulation import simulate

    clients, classes = _bundled(settings) if settings.is_bundled else _from_file(settings)
    clients, held_out = clients.split(held_out=settings.held_out, seed=0) if settings.held_out else (clients, None)
    accounting.check_delta(settings.delta, len(clients))
    drawn = cohorts.make(settings.cohorts, len(clients), settings.clients_per_round)
    process = _process(settings, clients.x.shape[1:], classes, drawn)
    folder = run_folder.new(settings.run_dir)
    result = simulate(
        process,
        clients,
        rounds=settings.rounds,
        delta=settings.delta,
        cohorts=drawn,
        target_epsilon=settings.target_epsilon,
        run_dir=folder,
        evaluate=None if held_out is None else _rows_of(held_out),
    )
    result.model().save(folder / "model.keras")
    (folder / "report.txt").write_text(f"{result.report}\n", encoding="utf-8")
    (folder / "report.json").write_text(f"{result.report.to_json()}\n", encoding="utf-8")
    sys.stdout.write(f"{result.report}\n")
    if held_out is not None:
        evaluation = _measure(result, held_out)
        (folder / "held_out.json").write_text(f"{evaluation.to_json()}\n", encoding="utf-8")
        drawing = plots.plot_clients({"held-out clients": evaluation.figures["accuracy"].tolist()})
        drawing.savefig(folder / "held_out.png", dpi=120)
        sys.stdout.write(f"\nHeld out, without noise: {evaluation}\n")
    sys.stdout.write(f"\nLedger, report, history and model are in {folder}\n")
    return result


def _as_options(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _bundled(settings: FederateSettings) -> tuple[ClientData, int]:
    data = datasets.load(settings.data)
    assert settings.num_clients is not None
    return split_evenly(data.x_train, data.y_train, num_clients=settings.num_clients, seed=0), data.num_classes


def _from_file(settings: FederateSettings) -> tuple[ClientData, int]:
    owner, label, classes = settings.clients_by, settings.label, settings.classes
    assert owner is not None and label is not None and classes is not None
    table = tables.read_table(settings.data)
    rest = [name for name in tables.names(table) if name not in (owner, label)]
    chosen = rest if settings.features is None else settings.features
    scaled = tables.scaled({name: table[name] for name in chosen if name in rest}, tables.parse_bounds(settings.bounds))
    columns: dict[Any, Any] = {name: scaled.get(name, table[name]) for name in tables.names(table)}
    clients = clients_from_table(columns, owner=owner, label=label, features=list(chosen))
    tables.check_classes(label, clients.y, classes)
    return clients, classes


def _process(settings: FederateSettings, shape: Sequence[int], classes: int, drawn: cohorts.Cohorts) -> Any:
    """Federated averaging with the noise that keeps all rounds within the target."""
    from federated.averaging import build_averaging

    return build_averaging(
        lambda: models.build_model(settings.model, shape, 1 if classes == 2 else classes),
        loss="binary_crossentropy" if classes == 2 else "sparse_categorical_crossentropy",
        client_learning_rate=settings.client_learning_rate,
        batch_size=settings.batch_size,
        local_epochs=settings.local_epochs,
        l2_norm_clip=settings.l2_norm_clip,
        noise_multiplier=_noise_multiplier(settings, drawn),
        expected_clients_per_round=drawn.clients_per_round,
        engine="tff" if importlib.util.find_spec("tensorflow_federated") else "tensorflow",
    )


def _noise_multiplier(settings: FederateSettings, drawn: cohorts.Cohorts) -> float:
    solve = functools.partial(
        accounting.solve_noise_multiplier,
        target_epsilon=settings.target_epsilon,
        delta=settings.delta,
        events_for=lambda noise: drawn.event(noise_multiplier=noise, rounds=settings.rounds),
    )
    try:
        return solve(accountant="pld")
    except UnsupportedEventError:  # no PLD is known for cohorts of a fixed size, and reports then quote RDP
        return solve(accountant="rdp")


def _rows_of(clients: ClientData) -> tuple[np.ndarray, np.ndarray]:
    rows = np.concatenate(clients.rows)
    return clients.x[rows], clients.y[rows]


def _measure(result: "SimulationResult", held_out: ClientData) -> "ClientEvaluation":
    from federated.evaluation import evaluate_clients

    return evaluate_clients(result.model(), held_out, loss=result.process.loss)
