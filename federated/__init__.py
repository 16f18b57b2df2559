"""Federated averaging on TensorFlow Federated over the same model builders.

This package imports `tfprivacy_ft`, never the other way round, and is the only one that imports TensorFlow Federated.
Public names load when they are first used; TensorFlow Federated loads when a process is built.
"""

from tfprivacy_ft import _lazy

# Public name -> the module it lives in.
_HOMES = {
    "AveragingFacts": "process",
    "AveragingProcess": "process",
    "build_averaging": "averaging",
    "ClientData": "clients",
    "ClientEvaluation": "evaluation",
    "Cohorts": "cohorts",
    "CyclicCohorts": "cohorts",
    "FixedCohorts": "cohorts",
    "PoissonCohorts": "cohorts",
    "clients_from_datasets": "clients",
    "clients_from_table": "clients",
    "evaluate_clients": "evaluation",
    "poisson_cohort": "clients",
    "split_by_label_skew": "clients",
    "split_by_owner": "clients",
    "split_by_quantity_skew": "clients",
    "split_evenly": "clients",
    "RecordLevelFacts": "record_level",
    "RecordLevelProcess": "record_level",
    "RecordLevelResult": "record_level",
    "build_record_level_averaging": "record_level",
    "simulate_records": "record_level",
    "solve_noise_multipliers": "record_level",
    "SimulationResult": "simulation",
    "simulate": "simulation",
}
_MODULES = (
    "aggregation",
    "averaging",
    "checkpoints",
    "client_work",
    "clients",
    "cohorts",
    "evaluation",
    "packing",
    "process",
    "record_level",
    "rounds",
    "runtime",
    "server_optimizers",
    "side_by_side",
    "simulation",
    "stateless",
    "tensorflow_engine",
    "tff_engine",
    "worker",
)

__all__ = [*_HOMES, *_MODULES]

__getattr__, __dir__ = _lazy.loading(__name__, _HOMES, _MODULES)
