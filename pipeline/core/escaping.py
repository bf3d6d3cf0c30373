r"""Make text that others chose (names of files, classes, layers, tensors) safe for the place where it is shown.

Escapes are visible and look like those of a Python string: `\x1b`, `\u202e`.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

# Control characters without tab and newline, separators of lines, marks that reorder text, surrogates (bytes of a file name
# that are not UTF-8), and the two code points that XML does not allow.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)
_LINE_ENDS = {"\n": "\\n", "\t": "\\t"}
# GitHub's and Azure's runners read commands from every line of a log: `::error::text` at the start of a line, after any
# white space, and `##[error]text` or `##vso[...]text` anywhere.
_COMMAND = re.compile(r"(?m)^([^\S\n]*)::")
_OLD_COMMAND = re.compile(r"#(?=#(?:vso)?\[)", re.IGNORECASE)


def printable(text: str) -> str:
    """Escape everything that a terminal, an XML parser or a reader could take for more than text; lines stay lines."""
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: object) -> str:
    """As `printable`, with newlines and tabs escaped too: a name cannot start a line of its own."""
    escaped = printable(str(text))
    for character, visible in _LINE_ENDS.items():
        escaped = escaped.replace(character, visible)
    return escaped


def without_commands(text: str, *, starts_line: bool = True) -> str:
    """Escape what the runner of a CI job would execute.

    Args:
        text: Part of a log.
        starts_line: Whether only white space precedes the text on its line.
    """
    text = _OLD_COMMAND.sub(r"\\x23", text)
    first, end, rest = ("", "", text) if starts_line else text.partition("\n")
    return first + end + _COMMAND.sub(r"\1\\x3a:", rest)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def shell_command(words: Iterable[str | Path]) -> str:
    """A command line that a shell reads as these words, on one line of printable text.

    A path that begins with a dash would be read as an option and gets its folder.
    """
    return " ".join(
        _shell_word(f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word))
        for word in words
    )


def _shell_word(word: str) -> str:
    if one_line(word) == word:
        return shlex.quote(word)
    escaped = "".join(chr(b) if 0x20 <= b < 0x7F and chr(b) not in "\\'" else f"\\x{b:02x}" for b in os.fsencode(word))
    return f"$'{escaped}'"
