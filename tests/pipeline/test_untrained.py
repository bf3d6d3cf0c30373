"""Random weights: marked everywhere, judged nowhere, deployed only when told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors import safe_open
from small_line import Line, read_json

from maskplan.pipeline.cli.app import main


@pytest.fixture(scope="module")
def untrained(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A run of random weights; do not write to it."""
    out = tmp_path_factory.mktemp("untrained") / "out"
    options = ["random" if o.endswith("w.pth") else o for o in line.options]
    assert main(["engine", *options, "--out", str(out)]) == 0
    return Line(out, tuple(options))


def test_random_weights_are_marked_untrained_and_not_judged(untrained: Line) -> None:
    report = read_json(untrained.out / "report.json")

    assert report["model"]["trained"] is False
    assert report["model"]["origin"] == "random, seed 0"
    parity = report["parity"]
    assert parity["verdict"] == "not_applicable"
    assert "random" in parity["reason"]
    assert [parity[key] for key in ("images", "top1_dense", "top1_sparse", "top1_drop", "agreement")] == [0] + [
        None
    ] * 4
    assert parity["methods"] == []
    assert report["conformance"]["verdict"] == "pass"
    assert report["timing"]["batches"][0]["dense"]["p50_ms"] > 0


def test_random_weights_are_marked_in_every_artifact(untrained: Line) -> None:
    for name in ("dense.safetensors", "sparse.safetensors"):
        with safe_open(untrained.out / name, "np") as file:
            assert json.loads(file.metadata()["maskplan"])["trained"] is False
    for name in ("dense.onnx", "sparse.onnx", "sparse.fp16.onnx"):
        (entry,) = [p for p in onnx.load(untrained.out / name).metadata_props if p.key == "maskplan"]
        assert json.loads(entry.value)["trained"] is False
    assert read_json(untrained.out / "engine.onnx.json")["provenance"]["trained"] is False
    assert "untrained" in (untrained.out / "report.html").read_text()


def test_random_weights_are_announced_loudly_and_not_to_be_deployed_next(
    untrained: Line, cli: Callable[..., Any]
) -> None:
    shown = cli("engine", *untrained.options, "--out", untrained.out).out

    assert "UNTRAINED" in shown
    assert "for timing only" in shown
    assert "maskplan deploy" not in shown


def test_weights_that_cannot_be_had_are_replaced_by_random_ones_with_a_warning(
    untrained: Line, cli: Callable[..., Any], tmp_path: Path
) -> None:
    options = ["auto" if o == "random" else o for o in untrained.options]
    shutil.copytree(untrained.out, tmp_path / "out")

    ran = cli("-q", "engine", *options, "--out", tmp_path / "out")

    assert ran.code == 0
    assert "warning: " in ran.err
    assert "random weights" in ran.err
    assert "timing only" in ran.err


def test_compare_does_not_pass_random_weights(untrained: Line, cli: Callable[..., Any], toy_data: Path) -> None:
    sides = (untrained.out / "dense_engine.onnx", untrained.out / "engine.onnx")

    ran = cli("compare", *sides, "--data", toy_data, "--max-top1-drop", "100")

    assert ran.code == 1
    assert "not applicable" in ran.out
    assert "random" in ran.err


def test_deploy_refuses_random_weights_unless_told(untrained: Line, cli: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ("deploy", untrained.out / "engine.onnx", "--repository", tmp_path / "models")

    refused = cli(*arguments)
    assert refused.code == 3
    assert "--allow-untrained" in refused.err
    assert not (tmp_path / "models").exists()

    assert cli(*arguments, "--allow-untrained").code == 0
    assert (tmp_path / "models" / "small_net" / "1" / "model.onnx").is_file()


def test_the_line_does_not_deploy_random_weights_unless_told(
    untrained: Line, cli: Callable[..., Any], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(untrained.out, tmp_path / "out"))
    arguments = ("engine", *untrained.options, "--out", out, "--repository", tmp_path / "models")

    refused = cli(*arguments)
    assert refused.code == 3
    assert not (tmp_path / "models").exists()
    assert (out / "report.json").is_file(), "what the run found is kept"

    told = cli(*arguments, "--allow-untrained")
    assert told.code == 0
    assert f"{tmp_path / 'models' / 'small_net'}, version 1" in told.out
