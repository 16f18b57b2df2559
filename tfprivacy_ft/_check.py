"""Checks of arguments, one sentence each, called by keyword: `positive(l2_norm_clip=1.0)`."""

import math
from numbers import Integral, Real

from tfprivacy_ft.errors import InvalidArgumentError


def _refuse(name: str, value, allowed: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name}={value!r} is not allowed: give {allowed}.")


def _is_real(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def positive(**values) -> None:
    """Each value is a finite number > 0."""
    for name, value in values.items():
        if not (_is_real(value) and value > 0):
            raise _refuse(name, value, "a finite number > 0")


def non_negative(**values) -> None:
    """Each value is a finite number >= 0."""
    for name, value in values.items():
        if not (_is_real(value) and value >= 0):
            raise _refuse(name, value, "a finite number >= 0")


def probability(**values) -> None:
    """Each value is a number in (0, 1]."""
    for name, value in values.items():
        if not (_is_real(value) and 0 < value <= 1):
            raise _refuse(name, value, "a number in (0, 1]")


def open_unit_interval(**values) -> None:
    """Each value is a number in (0, 1), as delta has to be."""
    for name, value in values.items():
        if not (_is_real(value) and 0 < value < 1):
            raise _refuse(name, value, "a number in (0, 1)")


def positive_integer(**values) -> None:
    """Each value is an integer >= 1."""
    for name, value in values.items():
        if not (isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1):
            raise _refuse(name, value, "an integer >= 1")


def non_negative_integer(**values) -> None:
    """Each value is an integer >= 0."""
    for name, value in values.items():
        if not (isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0):
            raise _refuse(name, value, "an integer >= 0")


def boolean(**values) -> None:
    """Each value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise _refuse(name, value, "True or False")


def at_most(limit_name: str, limit, **values) -> None:
    """Each value is no larger than the named limit."""
    for name, value in values.items():
        if value > limit:
            raise _refuse(name, value, f"at most {limit_name}={limit}")
