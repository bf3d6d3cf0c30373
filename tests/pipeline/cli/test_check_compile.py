"""`maskplan check --compile` on files of any tool: exit codes, messages, JSON and JUnit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from compiled_graphs import graph, needs_rtx
from report_schema import PUBLISHED

from maskplan.engines.trt import compile as compiling

Cli = Callable[..., Any]


@needs_rtx
def test_a_file_that_conforms_and_is_accepted_passes(cli: Cli, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    model, report, junit = graph(tmp_path / "net.onnx"), tmp_path / "check.json", tmp_path / "check.xml"
    ran = cli("check", model.path, "--compile", "--profile", "1:2:4", "--report", report, "--junit", junit)
    assert ran.code == 0, ran.err
    assert "accepted by TensorRT-RTX" in ran.out
    assert "profile 1:2:4: " in ran.out
    assert "convolutions and matrix products: 1 in Float" in ran.out
    assert "not sparse kernels, not speed" in ran.out
    values = json.loads(report.read_text())
    assert (values["verdict"], values["compile"]["accepted"]) == ("pass", True)
    schema = json.loads(PUBLISHED.read_text())
    jsonschema.validate(values, {"$ref": "#/$defs/CheckReport", "$defs": schema["$defs"]})
    suite = ElementTree.parse(junit).getroot()
    assert [case.get("name") for case in suite][-1] == "compiled by TensorRT-RTX"
    assert suite.get("failures") == "0"


@needs_rtx
def test_a_refused_file_fails_with_the_node_and_a_way_out(cli: Cli, tmp_path: Path) -> None:
    model, report, junit = graph(tmp_path / "net.onnx", "unsupported"), tmp_path / "c.json", tmp_path / "c.xml"
    ran = cli("check", model.path, "--compile", "--report", report, "--junit", junit)
    assert ran.code == 1
    assert "refuses net.onnx: node layer.unique (Unique): the operator is not supported" in ran.err
    assert "write it with other operators" in ran.err
    assert "Traceback" not in ran.err
    assert json.loads(report.read_text())["compile"]["problems"][0]["node"] == "layer.unique"
    (failure,) = ElementTree.parse(junit).getroot().findall("testcase/failure")
    assert "layer.unique" in (failure.get("message") or "")


@needs_rtx
def test_a_dense_file_can_be_judged_by_the_compiler_alone(cli: Cli, finished_digits: Path, tmp_path: Path) -> None:
    dense = finished_digits / "dense.fp16.onnx"
    both = cli("check", dense, "--compile")
    assert both.code == 1
    assert "--allow-dense '*' leaves only the compiler's verdict" in both.err
    alone = cli("check", dense, "--compile", "--allow-dense", "*", "--junit", tmp_path / "check.xml")
    assert alone.code == 0, alone.err
    assert "unknown: 0 conforming" in alone.out
    suite = ElementTree.parse(tmp_path / "check.xml").getroot()
    assert suite.get("failures") == "0"
    assert suite.find("testcase[@name='verdict']/skipped") is not None


@pytest.mark.parametrize(
    ("shape", "options", "found"),
    [
        (("batch", 8, "h", "w"), (), "--shape input:1x8x224x224"),
        ((4, 8, 8, 8), ("--profile", "1:8:8"), "a fixed batch of 4, not 1:8:8"),
        (("batch", 8, 8, 8), ("--profile", "8:1"), "MIN:OPT:MAX"),
        (("batch", 8, 8, 8), ("--shape", "input:8by8"), "--shape input:1x3x224x224"),
    ],
)
def test_shapes_that_do_not_fit_are_one_message(
    shape: tuple[int | str, ...],
    options: tuple[str, ...],
    found: str,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiling, "is_installed", lambda package: True)
    ran = cli("check", graph(tmp_path / "net.onnx", shape=shape).path, "--compile", *options)
    assert ran.code == 3
    assert found in ran.err
    assert "Traceback" not in ran.err


def test_without_the_compiler_the_message_says_what_to_install(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "is_installed", lambda package: False)
    report = tmp_path / "check.json"
    ran = cli("check", graph(tmp_path / "net.onnx").path, "--compile", "--report", report)
    assert ran.code == 3
    assert "TensorRT-RTX is not installed" in ran.err
    assert "pip install 'maskplan[rtx]'" in ran.err
    assert not report.exists()


def test_options_of_the_compiler_are_refused_without_it(cli: Cli, tmp_path: Path) -> None:
    ran = cli("check", graph(tmp_path / "net.onnx").path, "--profile", "1:8:8", "--shape", "input:1x8x8x8")
    assert ran.code == 3
    assert "--profile, --shape without --compile" in ran.err
