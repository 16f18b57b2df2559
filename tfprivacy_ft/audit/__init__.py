"""Audits: lower bounds on the epsilon of what really ran, to hold against the epsilon that is reported for it.

Public names load when they are first used: the bounds by themselves need no TensorFlow.
"""

import importlib
from typing import Any

# Public name -> the module it lives in.
_HOMES = {
    "AuditResult": "one_run",
    "Canaries": "one_run",
    "epsilon_lower_bound": "bounds",
    "p_value": "bounds",
}

__all__ = ["AuditResult", "Canaries", "epsilon_lower_bound", "p_value"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
