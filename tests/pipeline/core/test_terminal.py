"""Everything printed goes through two streams that escape it."""

from __future__ import annotations

import io
import sys

import pytest

from maskplan.pipeline.core.console import EscapedConsole
from maskplan.pipeline.core.terminal import EscapedStream, escaped_output, print_for_runner, print_line


def test_prints_are_escaped_and_commands_of_ours_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    with escaped_output():
        print("a\x1b[1m", "\n::error::b")
        print("  ", end="")
        print("::error::c")
        print_line("one\n::error::d")
        print("e\x07", file=sys.stderr)
        print_for_runner(["::notice::ours"])
    captured = capsys.readouterr()
    assert captured.out == "a\\x1b[1m \n\\x3a:error::b\n  \\x3a:error::c\none\\n::error::d\n::notice::ours\n"
    assert captured.err == "e\\x07\n"


def test_the_streams_are_restored_and_not_wrapped_twice() -> None:
    before = sys.stdout, sys.stderr
    with escaped_output(), escaped_output():
        assert isinstance(sys.stdout, EscapedStream)
        assert not isinstance(sys.stdout.unescaped, EscapedStream)
    assert (sys.stdout, sys.stderr) == before


def test_colors_of_a_console_stay_and_those_of_a_name_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stdout", raw)
    with escaped_output():
        console = EscapedConsole(force_terminal=True, color_system="standard", markup=False, highlight=False)
        console.print("name\x1b[32m", style="red")
        EscapedConsole(markup=False).print("::error::x")
    assert raw.getvalue() == "\x1b[31mname\\x1b[32m\x1b[0m\n\\x3a:error::x\n"


def test_an_encoding_without_a_letter_gets_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", raw)
    with escaped_output():
        print("grün")
    raw.flush()
    assert raw.buffer.getvalue() == b"gr\\xfcn\n"  # type: ignore[attr-defined]
