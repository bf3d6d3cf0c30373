from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


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
