"""Ranges of numeric options, checked when a record of options is created."""

from __future__ import annotations

import math

from maskplan.pipeline.core.errors import InputError


def at_least(low: float, **values: float | None) -> None:
    """Raise unless every value is a finite number of at least `low`; None means that an option is off.

    Raises:
        InputError: Otherwise.
    """
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value >= low):
            raise InputError(f"{name} is {value}", fix=f"give a number of at least {low:g}")


def above(low: float, **values: float | None) -> None:
    """As `at_least`, without `low` itself.

    Raises:
        InputError: A value is not a finite number above `low`.
    """
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > low):
            raise InputError(f"{name} is {value}", fix=f"give a number above {low:g}")
