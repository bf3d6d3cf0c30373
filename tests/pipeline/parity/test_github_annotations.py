"""Annotations and the summary of a GitHub Actions job."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest

from maskplan.pipeline.core.choices import FAIL, NOT_APPLICABLE, PASS
from maskplan.pipeline.core.errors import HostError
from maskplan.pipeline.core.reports import Check, DriftRow, ParityReport
from maskplan.pipeline.parity.github_annotations import append_summary, summary, workflow_commands

GOOD = Check("max_top1_drop", 1.0, 0.25, 0.25, True, "top-1 drops by 0.25 points; the limit is 1")
BAD = Check("min_agreement", 99.0, 98.0, 98.0, False, "the models agree on 98.00% of images; the minimum is 99%")
OPEN = Check("max_class_drop", 5.0, None, None, None, "not judged: no labeled images")
EMPTY = ParityReport(NOT_APPLICABLE, "no labeled images", 0, None, None, None, None, None, None, None, 0.5, 0.9, 1.0)
PASSED = replace(EMPTY, verdict=PASS, reason=None, checks=(GOOD,))
FAILED = replace(EMPTY, verdict=FAIL, reason=BAD.message, checks=(GOOD, BAD, OPEN), notes=("few images",))


def test_each_failure_is_an_error_and_each_note_a_warning() -> None:
    assert workflow_commands(FAILED, "parity of a.onnx") == (
        "::error title=parity of a.onnx::the models agree on 98.00%25 of images; the minimum is 99%25",
        "::warning title=parity of a.onnx::few images",
    )


def test_a_pass_is_one_notice() -> None:
    assert workflow_commands(PASSED, "p") == ("::notice title=p::top-1 drops by 0.25 points; the limit is 1",)


@pytest.mark.parametrize("verdict", [FAIL, NOT_APPLICABLE])
def test_a_gate_that_no_threshold_failed_but_did_not_pass_is_an_error(verdict: str) -> None:
    """NaN, or nothing to judge by: the job is red, and says why."""
    report = replace(EMPTY, verdict=verdict, reason="outputs are NaN or infinite", checks=(GOOD, OPEN))
    assert workflow_commands(report, "p") == ("::error title=p::outputs are NaN or infinite",)


def test_text_cannot_end_an_annotation_or_start_another() -> None:
    report = replace(FAILED, checks=(replace(BAD, message="100%\n::notice::all is well\r"),), notes=())
    (line,) = workflow_commands(report, "a,b:c\nd%")
    assert line == "::error title=a%2Cb%3Ac%0Ad%25::100%25%0A::notice::all is well%0D"
    assert len(line.splitlines()) == 1


def test_the_summary_is_a_table_of_thresholds() -> None:
    lines = summary(FAILED, "parity of a|b").splitlines()
    assert lines[0] == "### parity of a\\|b: fail"
    rows = [line for line in lines if line.startswith("| m")]
    assert rows == [
        "| max_top1_drop | 1 | 0.25 | pass |",
        "| min_agreement | 99 | 98 | **fail** |",
        "| max_class_drop | 5 |  | not judged |",
    ]
    assert "* few images" in lines


def test_the_summary_shows_drift_where_there_is_a_baseline() -> None:
    report = replace(PASSED, drift=(DriftRow("top1_drop", 0.5, 0.25, -0.25), DriftRow("agreement", None, 99.0, None)))
    text = summary(report, "p")
    assert "| top1_drop | 0.5 | 0.25 | -0.25 |" in text
    assert "| agreement |  | 99 |  |" in text
    assert "baseline" not in summary(PASSED, "p")


def test_summaries_follow_each_other_in_the_jobs_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "s.md"))
    for title in ("one", "two"):
        append_summary(summary(PASSED, title))
    text = (tmp_path / "s.md").read_text()
    assert text.index("### one") < text.index("### two")
    assert text.count("| threshold |") == 2


def test_without_a_job_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in (None, ""):
        monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        if value is not None:
            monkeypatch.setenv("GITHUB_STEP_SUMMARY", value)
        append_summary("text")
    assert list(tmp_path.iterdir()) == []


def test_a_summary_that_cannot_be_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    with pytest.raises(HostError):
        append_summary("text")


NASTY = "c0\n::error title=x::y\x1b[2J %0A `code` [link](http://x) ![i](y) <img src=z> a|b \\ *b* _i_ ~~s~~ $m$ &amp;"


def test_names_in_a_command_keep_to_their_line_and_show_control_characters() -> None:
    report = replace(FAILED, checks=(replace(BAD, message=NASTY),), notes=(NASTY,))
    lines = workflow_commands(report, NASTY)
    assert len(lines) == 2
    for line in lines:
        assert len(line.splitlines()) == 1
        assert "\x1b" not in line
        assert line.count("::") == 2 + NASTY.count("::")
        assert "c0%0A::error" in line
        assert "%250A" in line


def rendered(markdown: str) -> str:
    """The text that a reader of one line sees, if nothing in it is markup."""
    text = re.sub(r"\\([!-/:-@\[-`{-~])", lambda m: f"\0{ord(m[1])}\0", markdown)
    assert not re.search(r"[`*|<>\[\]~$]|(?<!\w)_|_(?!\w)", text), text
    return html.unescape(re.sub("\0(\\d+)\0", lambda m: chr(int(m[1])), text))


@pytest.mark.parametrize(
    "name", [NASTY, "# head", "- item", "1. one", "2) two", "+ plus", "=====", "> quote", "top1_drop"]
)
def test_names_in_the_summary_are_text(name: str) -> None:
    report = replace(
        FAILED, checks=(replace(BAD, name=name),), notes=(name,), reason=name, drift=(DriftRow(name, 1, 2, 1),)
    )
    lines = summary(report, name).splitlines()
    expected = name.replace("\n", " ").replace("\x1b", "\\x1b")
    assert rendered(lines[0].removeprefix("### ").removesuffix(": fail")) == expected
    assert rendered(lines[2]) == expected
    assert not re.match(r"[#+=-]|\d+[.)]", lines[2])
    cells = [line for line in lines if line.startswith("| ") and re.search(r"(?<!\\)\|", line[2:])]
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in cells} == {5}
