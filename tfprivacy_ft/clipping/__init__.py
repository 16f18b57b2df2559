"""Per-example clipping of the gradients of an ordinary Keras training step."""

from tfprivacy_ft.clipping.engine import ClippedSum, SlowClippingWarning, clipped_sum

__all__ = ["ClippedSum", "SlowClippingWarning", "clipped_sum"]
