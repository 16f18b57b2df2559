"""Private fine-tuning: a pretrained Keras model, private data and a budget in; a model, its epsilon and its figures out.

`finetune` is the one call. What it is made of can be used alone: recipes (what is trained, and how), backbones (a model
taken apart), features (computed once), budget (noise of several stages under one epsilon).
"""

import importlib
from typing import Any

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


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
