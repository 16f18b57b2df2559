"""Per-example clipping of the gradients of an ordinary Keras training step."""

from tfprivacy_ft.clipping.engine import ClippedSum, SlowClippingWarning, clipped_sum
from tfprivacy_ft.clipping.rules import Automatic, ClippingRule, Flat, PerLayer

__all__ = ["Automatic", "ClippedSum", "ClippingRule", "Flat", "PerLayer", "SlowClippingWarning", "clipped_sum"]
