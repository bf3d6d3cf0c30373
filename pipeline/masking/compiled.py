"""Loops compiled to machine code that release the GIL, so that threads can share the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile at the first call; the machine code is cached on disk for later processes."""
    return cast(F, njit(cache=True, nogil=True)(function))
