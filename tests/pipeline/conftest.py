"""One finished run of a small model, shared by the tests of the line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from report_schema import validate_report
from small_line import MODEL, RECIPE, Line

from maskplan.pipeline.cli.app import main


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory, toy_data: Path) -> Line:
    """Run once; do not write to it."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "small.py").write_text(MODEL)
    (folder / "recipe.toml").write_text(RECIPE)
    namespace: dict[str, Any] = {}
    exec(MODEL, namespace)
    torch.manual_seed(3)
    torch.save(namespace["net"]().state_dict(), folder / "w.pth")
    options = (f"{folder}/small.py:net", "--weights", f"{folder}/w.pth", "--data", str(toy_data))
    options += ("--recipe", f"{folder}/recipe.toml")
    out = tmp_path_factory.mktemp("first") / "out"
    assert main(["engine", *options, "--out", str(out)]) == 0
    validate_report(out / "report.json")
    return Line(out, options)


@pytest.fixture
def again(line: Line, tmp_path: Path) -> Line:
    """A copy of the finished run, to go on with."""
    return Line(Path(shutil.copytree(line.out, tmp_path / "out")), line.options)
