"""Patterns of names on the command line: they match nodes and weights alike, and one that matches nothing is an error."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable

from maskplan.pipeline.core.errors import InputError, did_you_mean, listed


def matching(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """The first pattern (glob) that matches one of the names; None if none does."""
    names = tuple(names)
    return next((p for p in patterns if any(fnmatch.fnmatchcase(name, p) for name in names)), None)


def require_matches(patterns: Collection[str], names: Iterable[str], option: str, where: object = None) -> None:
    """Raise unless every pattern matches a name.

    Raises:
        InputError: Some match none.
    """
    known = tuple(dict.fromkeys(name for name in names if name))
    unmatched = [p for p in patterns if matching(known, (p,)) is None]
    if unmatched:
        similar = did_you_mean(unmatched[0], known)
        raise InputError(
            f"{option}: no node and no weight has such a name",
            where=where,
            found=listed(unmatched),
            fix=similar or f"choose from: {listed(known, 10) or 'the model has no weights'}",
        )
