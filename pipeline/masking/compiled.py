"""Loops compiled to machine code that release the GIL, so that threads can share the work."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F, *, fastmath: frozenset[str] = frozenset()) -> F:
    """Compile at the first call; the machine code is cached on disk for later processes, if there is a place for it.

    Args:
        function: The function.
        fastmath: What LLVM may assume of floating point.
    """
    settings: dict[str, Any] = {"nogil": True, "fastmath": set(fastmath) or False}
    try:
        return cast(F, njit(cache=True, **settings)(function))
    except RuntimeError as error:
        # Neither the installation nor the home folder can be written. Each process compiles again, which takes seconds.
        log.debug("compiled code is not cached: %s", error)
        return cast(F, njit(**settings)(function))
