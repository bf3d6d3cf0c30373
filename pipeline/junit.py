"""Verdicts as JUnit XML, which CI systems show case by case."""

from __future__ import annotations

from xml.etree import ElementTree

from pipeline.reports import DENSE_BY_CHOICE, INELIGIBLE, VIOLATING, ConformanceReport


def conformance_junit(report: ConformanceReport, model: str) -> bytes:
    """A test case for each weight, violations as failures, what is not demanded as skipped; and one for the whole file."""
    failed = sum(w.verdict == VIOLATING for w in report.weights)
    skipped = sum(w.verdict in (DENSE_BY_CHOICE, INELIGIBLE) for w in report.weights)
    suite = ElementTree.Element(
        "testsuite",
        name=f"{report.pattern} conformance of {model}",
        tests=str(len(report.weights) + 1),
        failures=str(failed + (not report.passed)),
        skipped=str(skipped),
    )
    whole = ElementTree.SubElement(suite, "testcase", classname=model, name="verdict")
    if not report.passed:
        ElementTree.SubElement(whole, "failure", message=report.reason or "")
    for weight in report.weights:
        case = ElementTree.SubElement(suite, "testcase", classname=model, name=f"{weight.name} ({weight.node})")
        if weight.verdict == VIOLATING:
            text = f"{weight.violating_groups} of {weight.groups} groups have too many non-zeros"
            failure = ElementTree.SubElement(case, "failure", message=text)
            if weight.first_violation is not None:
                failure.text = f"first at {list(weight.first_violation.index)}: {list(weight.first_violation.values)}"
        elif weight.verdict in (DENSE_BY_CHOICE, INELIGIBLE):
            ElementTree.SubElement(case, "skipped", message=weight.reason or weight.verdict)
    ElementTree.indent(suite)
    xml: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return xml
