"""Every command of docs/serving.md is run in order, against the real server."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.*)$", PAGE, re.MULTILINE)


def test_the_commands_are_maskplans_and_stand_in_console_blocks() -> None:
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert sum(line.startswith("$ ") for block in blocks for line in block.splitlines()) == len(COMMANDS) > 3
    assert {tuple(command.split()[:1]) for command in COMMANDS} == {("maskplan",)}


def test_the_commands_run_as_printed(
    triton: Any, cli: Callable[..., Any], finished_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("build").mkdir()
    Path("build/digits_resnet").symlink_to(finished_digits)
    Path("models").symlink_to(triton.repository)
    said = []
    for command in COMMANDS:
        words = [word.replace("localhost:8000", triton.server.http) for word in shlex.split(command)]
        quick = ["--window", "0.02"] if words[1] == "serve-check" and "--no-latency" not in words else []
        ran = cli(*words[1:], *quick)
        assert ran.code == 0, f"{command}\n{ran.out}\n{ran.err}"
        said.append(ran.out)
        if words[1] == "deploy":
            triton.server.load("digits_resnet")
    report = json.loads(Path("served.json").read_text())
    assert (report["verdict"], report["version"], {load["batch"] for load in report["latency"]}) == ("pass", 1, {1, 8})
    assert Path("served.xml").read_text().count("<testcase") == 3
    assert "agreement %" in said[2]
    # As the page says, the dense engine was served beside the sparse one, and then no longer.
    assert "version 1 is served again" in said[-1]
    assert not triton.server.is_ready("digits_resnet", 2)
    ran = cli("serve-check", "--url", triton.server.http, "--repository", "models/digits_resnet", "--no-latency")
    assert (ran.code, "versions       1 served" in ran.out) == (0, True)


def test_the_way_back_that_refuses_nobody(
    triton: Any, cli: Callable[..., Any], finished_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of an earlier version is an engine that can be deployed."""
    assert "`maskplan deploy models/NAME/1/model.onnx --repository models --name NAME`" in PAGE
    monkeypatch.chdir(triton.repository.parent)
    options = ["--repository", triton.repository, "--name", "there_and_back"]
    for engine in (
        finished_digits / "engine.onnx",
        finished_digits / "dense_engine.onnx",
        triton.repository / "there_and_back/1/model.onnx",
    ):
        assert cli("deploy", engine, *options).code == 0
        triton.server.load("there_and_back")
    assert triton.server.is_ready("there_and_back", 3)
    assert triton.server.is_ready("there_and_back", 2)
    first, third = (triton.repository / "there_and_back" / version / "model.onnx" for version in "13")
    assert first.read_bytes() == third.read_bytes()
