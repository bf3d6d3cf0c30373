"""Sessions of ONNX Runtime: files that its optimizer breaks still run, and that is said."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from concat_net import concat_input, concat_qdq_fp16
from fp16_graphs import run

from maskplan.engines.ort import build_ort
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Profile
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.ort_session import UNFUSED, is_unfused, open_session


def test_a_concat_with_fp16_scales_runs_without_the_fusion_that_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = concat_qdq_fp16(tmp_path / "concat.onnx")
    # If this no longer fails, the retry is no longer needed.
    with pytest.raises(Exception, match="QLinearConcat"):
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with caplog.at_level(logging.INFO, "maskplan"):
        session = open_session(path)
        open_session(path)
    assert is_unfused(session)
    assert caplog.text.count(UNFUSED) == 1
    (expected,) = run(onnx.load(path), concat_input(), optimized=False)
    assert np.allclose(session.run(None, {"x": concat_input()})[0], expected, atol=1e-2)
    assert np.abs(expected).max() > 0.1


def test_the_engine_is_the_same_file_and_its_record_says_how_it_runs(tmp_path: Path) -> None:
    path = concat_qdq_fp16(tmp_path / "concat.onnx")
    engine = build_ort(describe_onnx(path), (Profile(1, 1, 1),), False, tmp_path / "engine.onnx")
    assert engine.notes == (UNFUSED,)
    assert engine.path.read_bytes() == path.read_bytes()


def test_other_failures_are_not_retried(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x0a")
    with pytest.raises(InputError, match="does not accept the file"):
        open_session(path)
