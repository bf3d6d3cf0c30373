"""Options under their old names still work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from maskplan.pipeline.cli.renamed_flags import with_new_flags

Cli = Callable[..., Any]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["compare", "a", "b", "--confident"], ["compare", "a", "b", "--use-ci"]),
        (["compare", "a", "b", "--point"], ["compare", "a", "b", "--use-point"]),
        (["calibrate", "m.onnx", "--rest=fp16"], ["calibrate", "m.onnx", "--float-dtype=fp16"]),
        (["calibrate", "m.onnx", "--rest", "fp16"], ["calibrate", "m.onnx", "--float-dtype", "fp16"]),
        (["mask", "m", "--method", "report"], ["mask", "m", "--method", "danhofer2024"]),
        (["mask", "m", "--method=report"], ["mask", "m", "--method=danhofer2024"]),
    ],
)
def test_old_names_become_the_new_ones_with_a_note(typed: list[str], expected: list[str]) -> None:
    renamed, notes = with_new_flags(typed)
    assert renamed == expected
    assert len(notes) == 1


def test_current_names_and_similar_values_do_not_change() -> None:
    typed = ["check", "report", "--report", "report", "-o", "--use-ci"]
    assert with_new_flags(typed) == (typed, [])


def test_an_old_option_has_the_effect_of_the_new_one(cli: Cli, finished_digits: Path, tmp_path: Path) -> None:
    dense, report = finished_digits / "dense.onnx", tmp_path / "r.json"
    ran = cli("compare", dense, dense, "--confident", "--max-top1-drop", 100, "--report", report)
    assert ran.code == 0, ran.err
    assert "note: --confident is now called --use-ci\n" in ran.err
    assert json.loads(report.read_text())["use_ci"] is True

    int8 = tmp_path / "int8.onnx"
    ran = cli("calibrate", finished_digits / "sparse.onnx", "--images", 16, "--rest=fp16", "-o", int8)
    assert ran.code == 0, ran.err
    assert "note: --rest is now called --float-dtype\n" in ran.err
    scales = {t.data_type for t in onnx.load(int8).graph.initializer if t.name.endswith("_scale")}
    assert scales == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(
    ("typed", "note", "says"),
    [
        (
            ("build", "m.onnx", "--backend", "onnxruntime", "--stripped"),
            "--stripped is now called --strip-plan",
            "--strip-plan: only for TensorRT",
        ),
        (
            ("mask", "TINY", "--method", "report"),
            "--method report is now called --method danhofer2024",
            "danhofer2024 masks need images",
        ),
        (("engine", "TINY", "--masks", "report"), "--masks report is now called --masks danhofer2024", "deployed"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_old_name_reaches_the_command_under_the_new_one(
    cli: Cli,
    tiny_spec: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: tuple[str, ...],
    note: str,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli(*(tiny_spec if word == "TINY" else word for word in typed))
    assert ran.code == 3
    assert f"note: {note}\n" in ran.err
    assert says in ran.err


@pytest.mark.parametrize("command", ["compare", "calibrate", "build"])
def test_help_does_not_show_the_old_names(cli: Cli, command: str) -> None:
    page = cli(command, "--help").out
    assert not any(old in page for old in ("--confident", "--rest", "--stripped", "--point"))
