"""The last layers before outputs of values stay in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from any_network import baked_batch, box_head

from maskplan.calibration.calibrate import CalibrateOptions, CalibrationSamples, calibrate
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.data.samples import TensorSamples


def int8_layers(model: Path, out: Path, **options: bool) -> dict[str, str | None]:
    values = np.random.default_rng(0).standard_normal((12, 3, 16, 16), np.float32)
    samples = CalibrationSamples(TensorSamples("train", {"x": values}, {}))
    found = calibrate(describe_onnx(model), samples, CalibrateOptions(**options), {"fp32": out})
    return {layer.node: layer.reason for layer in found.layers}


def boxes(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    values = np.random.default_rng(1).standard_normal((8, 3, 16, 16), np.float32)
    (found,) = session.run(["boxes"], {"x": values})
    return np.asarray(found, np.float64)


def test_heads_and_the_table_behind_them_stay_float(tmp_path: Path) -> None:
    model = box_head(tmp_path / "m.onnx")
    reasons = int8_layers(model, tmp_path / "float.onnx")
    assert {name for name, reason in reasons.items() if reason is None} == {"stem"}
    assert "--quantize-heads" in (reasons["dfl"] or "")
    all_int8 = int8_layers(model, tmp_path / "int8.onnx", quantize_heads=True)
    assert {name for name, reason in all_int8.items() if reason is None} == {"stem", "box", "score", "dfl"}
    exact = boxes(model)
    kept, quantized = (np.linalg.norm(boxes(tmp_path / f"{n}.onnx") - exact) for n in ("float", "int8"))
    assert kept < quantized / 2


def test_a_batch_in_the_graph_is_found(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((5, 3, 8, 8), np.float32)
    samples = CalibrationSamples(TensorSamples("train", {"x": values}, {}))
    model = describe_onnx(baked_batch(tmp_path / "m.onnx"))
    found = calibrate(model, samples, CalibrateOptions(), {"fp32": tmp_path / "q.onnx"})
    assert found.models[0].inputs[0].shape == (1, 3, 8, 8)
    assert found.report.quantized_layers == 2
