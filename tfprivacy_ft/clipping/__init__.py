"""Per-example clipping of the gradients of an ordinary Keras training step."""

from tfprivacy_ft.clipping.engine import ClippedSum, RoundedClipWarning, SlowClippingWarning, clipped_sum
from tfprivacy_ft.clipping.functional import clipped_sum_of_function
from tfprivacy_ft.clipping.rules import Automatic, ClippingRule, Flat, PerLayer
from tfprivacy_ft.clipping.self_check import ClippingCheck, VariableCheck, check

__all__ = [
    "Automatic",
    "ClippedSum",
    "ClippingCheck",
    "ClippingRule",
    "Flat",
    "PerLayer",
    "RoundedClipWarning",
    "SlowClippingWarning",
    "VariableCheck",
    "check",
    "clipped_sum",
    "clipped_sum_of_function",
]
