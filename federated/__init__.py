"""Federated averaging on TensorFlow Federated over the same model builders.

This package imports `tfprivacy_ft`, never the other way round, and is the only one that imports TensorFlow Federated.
Public names load when they are first used; TensorFlow Federated loads when a process is built.
"""

import importlib
from typing import Any

# Public name -> the module it lives in.
_HOMES = {
    "AveragingFacts": "averaging",
    "AveragingProcess": "averaging",
    "build_averaging": "averaging",
    "ClientData": "clients",
    "poisson_cohort": "clients",
    "split_by_label_skew": "clients",
    "split_by_owner": "clients",
    "split_evenly": "clients",
    "SimulationResult": "simulation",
    "simulate": "simulation",
}
_MODULES = ("aggregation", "averaging", "checkpoints", "client_work", "clients", "packing", "runtime", "simulation")

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
