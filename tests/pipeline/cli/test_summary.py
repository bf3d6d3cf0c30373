"""The last lines of `maskplan engine`."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskplan.pipeline.cli.summary import _files


@pytest.mark.parametrize("name", ["a b", "x;y $(z)", "it's", "new\nline", "plain"])
@pytest.mark.parametrize("trained", [True, False])
def test_the_next_command_can_be_pasted(name: str, trained: bool, tmp_path: Path) -> None:
    engine = tmp_path / name / "engine.onnx"
    parity, model = SimpleNamespace(verdict="pass"), SimpleNamespace(trained=trained)
    report = SimpleNamespace(
        engine=SimpleNamespace(path=engine, backend="onnxruntime"), parity=parity, model=model, compile=None
    )
    result: Any = SimpleNamespace(
        report=report, deployment=None, files=SimpleNamespace(html=SimpleNamespace(path=tmp_path / "report.html"))
    )
    command = dict(_files(result))["next"]
    assert len(command.splitlines()) == 1
    if "\n" not in name:
        assert shlex.split(command)[:3] == ["maskplan", "deploy" if trained else "inspect", str(engine)]
