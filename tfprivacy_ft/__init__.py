"""Differentially private training and fine-tuning of Keras models, and the epsilon of what ran.

Public names load when they are first used: `import tfprivacy_ft` and everything about epsilon need no TensorFlow.
"""

import os
import sys

from tfprivacy_ft import _lazy

__version__ = "0.1.0"

# Importing TensorFlow writes ten lines about CPU features and absent GPU libraries, some of them as errors; 3 silences
# them. What goes wrong later still arrives as an exception, and who sets the variable keeps what they set.
if "tensorflow" not in sys.modules:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Public name -> the module it lives in.
_HOMES = {
    "DPKerasSGDOptimizer": "optimizers",
    "DPKerasAdamOptimizer": "optimizers",
    "DPKerasAdamWOptimizer": "optimizers",
    "DPKerasAdagradOptimizer": "optimizers",
    "make_dp_optimizer_class": "optimizers",
    "Flat": "clipping",
    "PerLayer": "clipping",
    "Automatic": "clipping",
    "Adaptive": "moving_clip",
    "PrivacyPlan": "plan",
    "BestOf": "search",
    "WeightAveraging": "weight_averaging",
    "poisson_batches": "sampling",
}
_MODULES = (
    "accounting",
    "audit",
    "augmentation",
    "batch_norm",
    "clipping",
    "compute_epsilon",
    "datasets",
    "errors",
    "events",
    "finetune",
    "groups",
    "ledger",
    "models",
    "overlap",
    "report",
    "weights",
)

__all__ = ["__version__", *_HOMES, *_MODULES]

__getattr__, __dir__ = _lazy.loading(__name__, _HOMES, _MODULES)
