"""Public names of a package that load when they are first used, so that importing it takes no time and no TensorFlow."""

import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any


def loading(
    package: str, homes: Mapping[str, str], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """What a package calls its `__getattr__` and `__dir__`.

    Args:
        package: Its `__name__`.
        homes: Public name -> the module of the package that it lives in.
        modules: Modules of the package that are public themselves.

    Example:
        >>> load, names = loading("tfprivacy_ft", {"PrivacyPlan": "plan"}, ["errors"])
        >>> load("PrivacyPlan").__name__, load("errors").__name__, "PrivacyPlan" in names()
        ('PrivacyPlan', 'tfprivacy_ft.errors', True)
    """

    def load(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted(importlib.import_module(package).__all__)

    return load, names
