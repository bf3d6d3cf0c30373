"""Verdicts as JUnit XML, which CI systems display as test cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from xml.etree import ElementTree

from maskplan.pipeline.core.choices import (
    DENSE_BY_CHOICE,
    INELIGIBLE,
    NOT_APPLICABLE,
    PASS,
    UNKNOWN,
    VIOLATING,
    GateVerdict,
)
from maskplan.pipeline.core.compilation import CompileResult
from maskplan.pipeline.core.escaping import printable
from maskplan.pipeline.core.output_reports import OutputCloseness, OutputParity
from maskplan.pipeline.core.reports import Check, ConformanceReport, ParityReport


def conformance_junit(
    report: ConformanceReport, model: str, compiled: CompileResult | None = None, *, judged: bool = True
) -> bytes:
    """A test case for the whole file and one for each weight.

    Violations and weights that cannot be read fail; weights that need not conform are skipped, as is the whole file where
    it is not `judged`. With `compiled` there is one more, which fails if the compiler refuses the file.
    """
    suite = ElementTree.Element(
        "testsuite",
        name=f"{report.pattern} conformance of {model}",
    )
    whole = ElementTree.SubElement(suite, "testcase", classname=model, name="verdict")
    if not report.passed:
        kind = "failure" if judged else "skipped"
        ElementTree.SubElement(whole, kind, message=report.reason or "")
    for weight in report.weights:
        case = ElementTree.SubElement(suite, "testcase", classname=model, name=f"{weight.name} ({weight.node})")
        if weight.verdict == VIOLATING:
            text = f"{weight.violating_groups} of {weight.groups} groups have too many non-zeros"
            failure = ElementTree.SubElement(case, "failure", message=text)
            if weight.first_violation is not None:
                failure.text = f"first at {list(weight.first_violation.index)}: {list(weight.first_violation.values)}"
        elif weight.verdict == UNKNOWN:
            ElementTree.SubElement(case, "failure", message=f"unknown: {weight.hint or weight.reason}")
        elif weight.verdict in (DENSE_BY_CHOICE, INELIGIBLE):
            ElementTree.SubElement(case, "skipped", message=weight.reason or weight.verdict)
    if compiled is not None:
        _add_compiled(suite, compiled, model)
    for kind, tag in (("failures", "failure"), ("skipped", "skipped")):
        suite.set(kind, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("tests", str(len(suite)))
    return _xml(suite)


def _add_compiled(suite: ElementTree.Element, compiled: CompileResult, model: str) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=model, name=f"compiled by {compiled.compiler}")
    if not compiled.accepted:
        failure = ElementTree.SubElement(case, "failure", message="; ".join(map(str, compiled.problems)))
        failure.text = "\n".join(problem.fix for problem in compiled.problems)


def parity_junit(report: ParityReport, model: str) -> bytes:
    """A test case for the outputs and one for each threshold.

    A threshold that could not be evaluated is skipped, or an error if the gate has no verdict without it.
    """
    suite = ElementTree.Element("testsuite", name=f"parity of {model}")
    outputs = ElementTree.SubElement(suite, "testcase", classname=model, name="outputs")
    # Failed without a failed threshold: outputs that are not finite, for example.
    if report.verdict not in (PASS, NOT_APPLICABLE) and not any(c.passed is False for c in report.checks):
        ElementTree.SubElement(outputs, "failure", message=report.reason or "")
    text = ElementTree.SubElement(outputs, "system-out")
    text.text = "\n".join(
        (*map(_format_closeness, report.outputs), *map(_format_closeness, report.by_output), *report.notes)
    )
    for check in report.checks:
        _add_threshold(suite, check, model, report)
    _count(suite)
    return _xml(suite)


def checks_junit(subject: str, checks: Sequence[Check], verdict: GateVerdict, reason: str | None) -> bytes:
    """A test case for the verdict and one for each check; a check that could not be evaluated is skipped."""
    suite = ElementTree.Element("testsuite", name=f"check of {subject}")
    whole = ElementTree.SubElement(suite, "testcase", classname=subject, name="verdict")
    if verdict != PASS:
        ElementTree.SubElement(whole, "error" if verdict == NOT_APPLICABLE else "failure", message=reason or "")
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=subject, name=f"{check.name} {check.limit:g}")
        if check.passed:
            ElementTree.SubElement(case, "system-out").text = check.message
        else:
            ElementTree.SubElement(case, "skipped" if check.passed is None else "failure", message=check.message)
    _count(suite)
    return _xml(suite)


def _count(suite: ElementTree.Element) -> None:
    for kind, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(kind, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("tests", str(len(suite)))


def _add_threshold(suite: ElementTree.Element, check: Check, model: str, report: ParityReport) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=model, name=f"{check.name} {check.limit:g}")
    if report.verdict == NOT_APPLICABLE:
        ElementTree.SubElement(case, "error", message=report.reason or "")
    elif check.passed is None:
        ElementTree.SubElement(case, "skipped", message=check.message)
    elif not check.passed:
        ElementTree.SubElement(case, "failure", message=check.message)
    else:
        ElementTree.SubElement(case, "system-out").text = check.message


def _format_closeness(output: OutputCloseness | OutputParity) -> str:
    numbers = {k: v for k, v in dataclasses.asdict(output).items() if isinstance(v, float)}
    return f"{output.name}: " + ", ".join(f"{name} {value:.6g}" for name, value in numbers.items())


def _xml(suite: ElementTree.Element) -> bytes:
    # XML 1.0 has no way to write most control characters, not even as references.
    for element in suite.iter():
        element.attrib.update({name: printable(value) for name, value in element.attrib.items()})
        element.text = printable(element.text) if element.text else element.text
    ElementTree.indent(suite)
    xml: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return xml
