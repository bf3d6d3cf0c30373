"""Loops compiled to machine code, free of Python's lock so that threads share the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile at the first call; the code is kept on disk for the next process."""
    return cast(F, njit(cache=True, nogil=True)(function))
