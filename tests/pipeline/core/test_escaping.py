"""Names that others chose, in a terminal, a log of a CI job, XML, and a shell."""

from __future__ import annotations

import subprocess
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskplan.pipeline.core.escaping import one_line, printable, shell_command, without_commands

NASTY = "a\x1b[31mb\x00c\x7fd\x9be\u202ef\u2028g\ud800h\rI"


def test_control_characters_become_visible_and_lines_stay() -> None:
    assert printable("layer\x1b[2J\x01") == r"layer\x1b[2J\x01"
    assert printable("zwei\nZeilen\tgrün 🙂") == "zwei\nZeilen\tgrün 🙂"
    assert one_line("c0\n::error::x\r") == r"c0\n::error::x\x0d"
    assert printable(NASTY) == r"a\x1b[31mb\x00c\x7fd\x9be\u202ef\u2028g\ud800h\x0dI"


@given(st.text(st.characters(codec=None)))
def test_no_text_keeps_a_character_that_is_more_than_text(text: str) -> None:
    line = one_line(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in line)
    assert len(line.splitlines()) <= 1
    assert one_line(line) == line
    line.encode()
    ElementTree.fromstring(ElementTree.tostring(_element(printable(text))))


def _element(text: str) -> ElementTree.Element:
    element = ElementTree.Element("case", name=text)
    element.text = text
    return element


@pytest.mark.parametrize(
    "line",
    ["::error::x", "  ::warning title=a::x", "\t::stop-commands::t", "ok\n::error::x", "a ##[error]x", "##vso[task]x"],
)
def test_a_runner_finds_no_command(line: str) -> None:
    escaped = without_commands(line)
    assert not any(part.lstrip().startswith("::") for part in escaped.splitlines())
    assert "##[" not in escaped
    assert "##vso[" not in escaped


def test_what_is_no_command_stays() -> None:
    for text in ("std::vector", "a ::b", "# [x]", "## head"):
        assert without_commands(text) == text
    assert without_commands("::b", starts_line=False) == "::b"


@pytest.mark.parametrize(
    "name", ["a b.onnx", "$(touch x);'\".onnx", "-x.onnx", "a\nb\x1b.onnx", "grün.onnx", "\udcff.onnx", "~"]
)
def test_a_shell_reads_a_printed_command_as_the_same_words(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    line = shell_command(["test", "-f", Path(name)])
    assert len(line.splitlines()) == 1
    assert printable(line) == line
    assert subprocess.run(["bash", "-c", line], cwd=tmp_path, check=False).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == [name]
