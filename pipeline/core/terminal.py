"""What the commands print, escaped in one place: no name can control a terminal or give commands to a CI runner.

`print` and rich's consoles write through the two streams below, which `escaped_output` puts in place of the process's own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from maskplan.pipeline.core.escaping import one_line, printable, without_commands


class _Stream:
    """A text stream that escapes what is written; everything else is that of the stream below."""

    def __init__(self, raw: TextIO, *, controls: bool) -> None:
        self._raw, self._controls = raw, controls
        self._starts_line = True

    def write(self, text: str) -> int:
        escaped = without_commands(printable(text) if self._controls else text, starts_line=self._starts_line)
        if text:
            last = text.rpartition("\n")[2]
            self._starts_line = not last.strip() and ("\n" in text or self._starts_line)
        try:
            self._raw.write(escaped)
        except UnicodeEncodeError:
            encoding = self._raw.encoding or "ascii"
            self._raw.write(escaped.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


class EscapedStream(_Stream):
    """What `print` writes to: control characters are escaped.

    Attributes:
        rich_proxied_file: What rich's consoles write to instead, whose own control characters must stay.
        unescaped: The stream below.
    """

    def __init__(self, raw: TextIO) -> None:
        super().__init__(raw, controls=True)
        self.rich_proxied_file = _Stream(raw, controls=False)
        self.unescaped = raw


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Escape what is written to stdout and stderr within the context."""
    before = sys.stdout, sys.stderr
    escaped = tuple(s if isinstance(s, EscapedStream) else cast(TextIO, EscapedStream(s)) for s in before)
    sys.stdout, sys.stderr = escaped
    try:
        yield
    finally:
        # After a broken pipe another stream is in place, which keeps the interpreter quiet when it ends.
        if sys.stdout is escaped[0]:
            sys.stdout = before[0]
        if sys.stderr is escaped[1]:
            sys.stderr = before[1]


def print_for_runner(lines: Iterable[str]) -> None:
    """Print commands for the runner of a CI job, which are escaped already."""
    stream = getattr(sys.stdout, "unescaped", sys.stdout)
    for line in lines:
        print(line, file=stream)


def print_line(text: str) -> None:
    """Print one line, whatever names it contains."""
    print(one_line(text))
