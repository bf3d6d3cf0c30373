"""JUnit files, as their readers count them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from maskplan.pipeline.core.choices import FAIL, NOT_APPLICABLE, PASS
from maskplan.pipeline.core.junit import parity_junit
from maskplan.pipeline.core.output_reports import OutputCloseness
from maskplan.pipeline.core.reports import Check, ParityReport


def test_every_weight_is_a_case_and_violations_are_failures(
    cli: Callable[..., Any], finished_digits: Path, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.xml", tmp_path / "bad.xml"
    assert cli("check", finished_digits / "engine.onnx", "--junit", good).code == 0
    assert cli("check", finished_digits / "dense.onnx", "--junit", bad).code == 1
    passed, failed = (ElementTree.parse(path).getroot() for path in (good, bad))
    assert len(passed.findall("testcase")) == len(failed.findall("testcase")) == int(passed.get("tests", 0)) == 11
    assert (passed.get("failures"), len(passed.findall(".//failure"))) == ("0", 0)
    assert (failed.get("failures"), len(failed.findall(".//failure"))) == ("10", 10)
    assert len(passed.findall(".//skipped")) == 2


OUTPUT = OutputCloseness("logits", 8, 0.5, 0.1, 0.1, 0.4, 2.0, 0.2, 0.1, 1.5, 0.99, 0.999, None)
GOOD = Check("max_top1_drop", 1.0, 0.25, 0.25, True, "top-1 drops by 0.25 points; the limit is 1")
BAD = Check("min_agreement", 99.5, 98.0, 98.0, False, '98% < 99% & "more"')
OPEN = Check("max_class_drop", 5.0, None, None, None, "not judged: no labeled images")
BASE = ParityReport(
    NOT_APPLICABLE, "no labeled images", 0, None, None, None, None, None, None, None, 0.5, 0.9, 1.0, outputs=(OUTPUT,)
)


def suite_of(verdict: str, reason: str | None, *checks: Check) -> ElementTree.Element:
    text = parity_junit(replace(BASE, verdict=verdict, reason=reason, checks=checks, notes=("few",)), "a.onnx")
    suite = ElementTree.fromstring(text)
    assert text.startswith(b"<?xml")
    # What the head says is what is there: some readers trust only the one or the other.
    for kind, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert int(suite.get(kind, "-1")) == len(suite.findall(f"./testcase/{tag}"))
    assert int(suite.get("tests", "-1")) == len(suite.findall("testcase")) == 1 + len(checks)
    assert len({case.get("name") for case in suite}) == len(suite)
    return suite


def state_of(suite: ElementTree.Element) -> list[str]:
    return [next((part.tag for part in case if part.tag != "system-out"), "passed") for case in suite]


@pytest.mark.parametrize(
    ("verdict", "reason", "checks", "states"),
    [
        (PASS, None, (GOOD,), ["passed", "passed"]),
        (FAIL, BAD.message, (GOOD, BAD), ["passed", "passed", "failure"]),
        (PASS, None, (GOOD, OPEN), ["passed", "passed", "skipped"]),
        (FAIL, "outputs are NaN or infinite", (GOOD, OPEN), ["failure", "passed", "skipped"]),
        (NOT_APPLICABLE, "no labeled images", (OPEN,), ["passed", "error"]),
        (NOT_APPLICABLE, "the weights are random", (GOOD, OPEN), ["passed", "error", "error"]),
    ],
)
def test_thresholds_are_cases_and_a_gate_that_does_not_pass_is_never_all_green(
    verdict: str, reason: str | None, checks: tuple[Check, ...], states: list[str]
) -> None:
    suite = suite_of(verdict, reason, *checks)
    assert state_of(suite) == states
    assert (verdict == PASS) == (not suite.findall(".//failure") and not suite.findall(".//error"))


def test_messages_survive_and_numbers_are_told() -> None:
    suite = suite_of(FAIL, BAD.message, GOOD, BAD)
    (failure,) = suite.findall(".//failure")
    assert failure.get("message") == BAD.message
    told = suite.findtext("./testcase[@name='outputs']/system-out") or ""
    assert "logits: max_abs 0.5" in told
    assert "psnr" not in told
    assert "few" in told


def test_control_characters_which_xml_cannot_hold_are_replaced_visibly() -> None:
    """Names of layers and outputs come from files; the suite must parse whatever they are."""
    text = "".join(map(chr, range(32))) + "\x7f\u0085\ufffe\ud800<&>"
    check = replace(BAD, name=f"n{text}", message=text)
    report = replace(
        BASE, verdict=FAIL, reason=text, checks=(check,), notes=(text,), outputs=(replace(OUTPUT, name=text),)
    )
    suite = ElementTree.fromstring(parity_junit(report, f"a{text}.onnx"))
    (failure,) = suite.findall(".//failure")
    assert "\\x01" in (failure.get("message") or "")
    assert "\\ufffe\\ud800<&>" in (failure.get("message") or "")
    assert "\\x1b" in (suite.get("name") or "")
    assert "\\x1f" in (suite.findtext(".//system-out") or "")
