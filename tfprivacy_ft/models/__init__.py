"""Model builders: the one place where architectures live, used by `model.fit` and by federated learning alike.

Promises: every call gives a fresh model, not compiled, that shares no weight with any earlier one; no layer mixes
the examples of a batch (no BatchNorm), so each example has a gradient of its own. Knows nothing of privacy, optimizers
or losses. TensorFlow is imported when a model is built, not before.
"""

from tfprivacy_ft.models import images, tables, texts  # noqa: F401  (they register their builders)
from tfprivacy_ft.models.registry import build_model, model_names, register_model

__all__ = ["build_model", "model_names", "register_model"]
