"""Private fine-tuning: a pretrained Keras model, private data and a budget in; a model, its epsilon and its figures out.

`finetune` is the one call. What it is made of can be used alone: recipes (what is trained, and how), backbones (a model
taken apart), features (computed once), budget (noise of several stages under one epsilon).
"""

from tfprivacy_ft import _lazy

# Public name -> the module it lives in.
_HOMES = {
    "finetune": "training",
    "FineTuned": "result",
    "Recipe": "recipes",
    "Head": "recipes",
    "Bias": "recipes",
    "LoRA": "recipes",
    "LastLayers": "recipes",
    "Full": "recipes",
    "Staged": "recipes",
    "ZeroShot": "recipes",
}

__all__ = [*_HOMES]

__getattr__, __dir__ = _lazy.loading(__name__, _HOMES)
