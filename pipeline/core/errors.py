"""Errors that the user can fix: one message with what failed, where, what was found, and what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path

from maskplan.pipeline.core.escaping import one_line

# The option of the running command that names what it writes, for messages.
OUTPUT_OPTION: ContextVar[str] = ContextVar("OUTPUT_OPTION", default="--output")
# Under the text of the first line of a field.
_INDENT = " " * 9
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class PipelineError(Exception):
    """Bad input or environment, for the user to fix. Ends a command with exit code 3 and no traceback.

    Attributes:
        what: What failed, in one sentence.
        where: The file, layer or option concerned.
        found: What was found there.
        fix: What to do about it.
    """

    def __init__(self, what: str, *, where: object = None, found: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.found, self.fix = what, where, found, fix
        parts = [what]
        for label, text in (("where", where), ("found", found), ("fix", fix)):
            if text is not None:
                parts.append(f"  {label + ':':<6} {_field(text)}")
        super().__init__("\n".join(parts))


def _field(value: object) -> str:
    """A field's text; its further lines are indented, so that no name in it can pose as a field or a message."""
    text = one_line(value) if isinstance(value, Path) else str(value)
    return re.sub(r"[\r\n]\s*", f"\n{_INDENT}", text.rstrip())


class InputError(PipelineError):
    """The model, weights, masks or data given cannot be used."""


class HostError(PipelineError):
    """This machine lacks something: a runtime, a permission, disk space, the folder's lock."""


def host_error(error: OSError, *, where: object, option: str | None = None) -> HostError:
    """Turn an `OSError` raised while writing into a message that says what to do.

    Args:
        error: What the operating system reported.
        where: The file or folder.
        option: The command-line option that names it; by default the running command's for its output.
    """
    found = error.strerror or str(error)
    if error.errno in _FULL:
        return HostError(
            "the disk is full",
            where=where,
            found=found,
            fix="free some space and run the same command again; finished stages are kept",
        )
    fix = f"choose a folder that you may write to with {option or OUTPUT_OPTION.get()}"
    return HostError("cannot write", where=where, found=found, fix=fix)


def listed(items: Iterable[object], max_items: int = 5) -> str:
    """The first few items, separated by commas, and how many more there are."""
    texts = [one_line(item) for item in items]
    shown = ", ".join(texts[:max_items])
    return shown if len(texts) <= max_items else f"{shown} and {len(texts) - max_items} more"


def did_you_mean(word: str, known: Sequence[str]) -> str | None:
    """A question that names the most similar known words; None if there are none."""
    import difflib

    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else None
