"""Audits: lower bounds on the epsilon of what really ran, to hold against the epsilon that is reported for it.

Public names load when they are first used: the bounds by themselves need no TensorFlow.
"""

from tfprivacy_ft import _lazy

# Public name -> the module it lives in.
_HOMES = {
    "AuditResult": "one_run",
    "Canaries": "one_run",
    "epsilon_lower_bound": "bounds",
    "p_value": "bounds",
}

__all__ = ["AuditResult", "Canaries", "epsilon_lower_bound", "p_value"]

__getattr__, __dir__ = _lazy.loading(__name__, _HOMES)
