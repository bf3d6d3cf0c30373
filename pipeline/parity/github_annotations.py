"""Show the gate's verdict in GitHub Actions: annotations on stdout, and a table for the job's summary."""

from __future__ import annotations

import os
import re
from pathlib import Path

from maskplan.pipeline.core.choices import NOT_APPLICABLE, PASS
from maskplan.pipeline.core.errors import host_error
from maskplan.pipeline.core.escaping import one_line, printable
from maskplan.pipeline.core.reports import ParityReport

# What Markdown could take for more than text; an underscore within a word is text.
_MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_BLOCK = re.compile(r"^(\s*)([#+=-]|\d+(?=[.)]))")


def workflow_commands(report: ParityReport, title: str) -> tuple[str, ...]:
    """Annotations: an error for each threshold that failed, a warning for each note, and one notice of a pass."""
    problems = [c.message for c in report.checks if c.passed is False] if report.verdict != NOT_APPLICABLE else []
    if not report.passed and report.reason is not None and not problems:
        problems = [report.reason]
    lines = [_command("error", title, problem) for problem in problems]
    lines += [_command("warning", title, note) for note in report.notes]
    if report.passed:
        lines.append(_command("notice", title, "; ".join(c.message for c in report.checks if c.passed)))
    return tuple(lines)


def summary(report: ParityReport, title: str) -> str:
    """A Markdown section: the verdict, and a table of the thresholds."""
    lines = [f"### {_cell(title)}: {report.verdict.replace('_', ' ')}", ""]
    if report.reason is not None:
        lines += [_cell(report.reason), ""]
    lines += ["| threshold | limit | value | |", "|---|---:|---:|---|"]
    for check in report.checks:
        state = {None: "not judged", True: PASS, False: "**fail**"}[check.passed]
        measured = "" if check.judged is None else f"{check.judged:.6g}"
        lines.append(f"| {_cell(check.name)} | {check.limit:g} | {measured} | {state} |")
    if report.drift:
        lines += ["", "| since the baseline | before | now | change |", "|---|---:|---:|---:|"]
        for row in report.drift:
            before, now = ("" if v is None else f"{v:.6g}" for v in (row.before, row.now))
            change = "" if row.change is None else f"{row.change:+.6g}"
            lines.append(f"| {_cell(row.name)} | {before} | {now} | {change} |")
    lines += ["", *(f"* {_cell(note)}" for note in report.notes)]
    return "\n".join(lines).rstrip() + "\n\n"


def append_summary(text: str) -> None:
    """Append to the job's summary page; does nothing if GITHUB_STEP_SUMMARY is not set.

    Raises:
        HostError: The file cannot be written.
    """
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return
    try:
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise host_error(error, where=name, option="GITHUB_STEP_SUMMARY") from error


def _command(kind: str, title: str, text: str) -> str:
    named = _escaped(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={named}::{_escaped(text)}"


def _escaped(text: str) -> str:
    """Escape as GitHub's own toolkit does; the percent sign first, or it would be escaped twice."""
    parts = (printable(part).replace("%", "%25").replace("\n", "%0A") for part in text.split("\r"))
    return "%0D".join(parts)


def _cell(text: str) -> str:
    """Text for one line of Markdown: no markup, no HTML, no cell of its own."""
    plain = one_line(" ".join(text.splitlines()))
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = _MARKDOWN.sub(r"\\\g<0>", plain)
    # A number at the start would begin a list: its period is escaped, as a digit cannot be.
    return _BLOCK.sub(lambda m: m[0] + "\\" if m[2].isdigit() else f"{m[1]}\\{m[2]}", plain)
