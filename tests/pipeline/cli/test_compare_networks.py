"""`maskplan compare` on networks that are not classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from any_network import baked_batch, box_head
from onnx import numpy_helper

from maskplan.pipeline.cli.app import main


def changed(model: Path, out: Path, weight: str, scale: float) -> Path:
    proto = onnx.load(model)
    for tensor in proto.graph.initializer:
        if tensor.name == weight:
            tensor.CopyFrom(numpy_helper.from_array(scale * numpy_helper.to_array(tensor), weight))
    onnx.save(proto, out)
    return out


@pytest.fixture
def detectors(tmp_path: Path) -> list[str]:
    model = box_head(tmp_path / "dense.onnx")
    values = np.random.default_rng(0).standard_normal((12, 3, 16, 16), np.float32)
    np.savez(tmp_path / "val.npz", x=values, boxes=np.zeros((12, 4, 64), np.float32))
    return [str(model), str(changed(model, tmp_path / "sparse.onnx", "w3", 1.1)), "--data", str(tmp_path / "val.npz")]


def test_limits_metric_report_and_baseline(
    detectors: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.py").write_text("def m(o, t):\n    return -abs(o['scores'] - 0.5).mean(axis=(1, 2, 3))\n")
    report, junit = tmp_path / "r.json", tmp_path / "j.xml"
    files = ["--report", str(report), "--junit", str(junit)]
    assert main(["compare", *detectors, "--min-sqnr", "20", *files]) == 0
    found = json.loads(report.read_text())
    assert [(o["name"], o["kind"]) for o in found["by_output"]] == [("boxes", "values"), ("scores", "values")]
    assert found["by_output"][0]["relative_error"] == 0
    assert "min_sqnr 20" in junit.read_text()
    assert main(["compare", *detectors, "--max-relative-error", "0.0001"]) == 1
    capsys.readouterr()
    metric = ["--metric", f"{tmp_path / 'm.py'}:m"]
    assert main(["compare", *detectors, *metric, "--max-metric-drop", "0.5", "--baseline", str(report)]) == 0
    assert "since baseline scores sqnr_db" in capsys.readouterr().out
    assert main(["compare", *detectors, *metric, "--max-metric-drop", "0.0001"]) == 1


@pytest.mark.parametrize("option", ["--bisect", "--print-polygraphy"])
def test_options_of_classifiers_are_refused(
    detectors: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *detectors, option]) == 3
    assert option in capsys.readouterr().err


def test_limits_of_outputs_hold_for_classifiers_too(tmp_path: Path) -> None:
    model = baked_batch(tmp_path / "dense.onnx")
    sparse = changed(model, tmp_path / "sparse.onnx", "w2", 1.5)
    np.savez(tmp_path / "val.npz", x=np.random.default_rng(0).standard_normal((6, 3, 8, 8), np.float32))
    data = ["--data", str(tmp_path / "val.npz")]
    assert main(["compare", str(model), str(sparse), *data, "--min-sqnr", "5"]) == 0
    assert main(["compare", str(model), str(sparse), *data, "--min-sqnr", "7"]) == 1
    # Without data the outputs are compared on noise, which can fail but not pass.
    assert main(["compare", str(model), str(sparse), "--min-sqnr", "5"]) == 1
    assert main(["compare", str(model), str(sparse)]) == 1
