"""`maskplan convert-precision`, and `--keep-fp32` of `calibrate`: exit codes, output and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fp16_constant_graphs import f32
from fp16_graphs import model_of, node
from onnx import numpy_helper
from PIL import Image
from small_net import small_net

from maskplan.calibration.cache import write_tensorrt_cache


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return small_net(tmp_path / "net.onnx")


def test_it_writes_the_file_and_says_what_it_compared(model: Path, cli: Callable[..., Any]) -> None:
    ran = cli("convert-precision", model, "--images", "4", "--keep-fp32", "head", "--report", "r.json")
    assert ran.code == 0
    assert "head: Gemm, kept by 'head'" in ran.out
    assert "compared on 7 samples" in ran.out
    assert "net.fp16.onnx: fp16" in ran.out
    stored = {t.name: numpy_helper.to_array(t).dtype for t in onnx.load("net.fp16.onnx").graph.initializer}
    assert stored == {"stem": "float16", "mix": "float16", "head": "float32"}
    report = json.loads(Path("r.json").read_text())
    assert report["passed"]
    assert report["in_fp32"] == {"head": "Gemm, kept by 'head'"}
    assert report["outputs"][0]["name"] == "logits"


def test_outputs_beyond_the_bound_fail_the_gate_and_leave_no_file(model: Path, cli: Callable[..., Any]) -> None:
    nodes = [node("Add", ["x", "k"], "a"), node("Sub", ["a", "k"], "s"), node("Mul", ["s", "k"])]
    model.write_bytes(model_of(nodes, {"k": f32(1000)}).SerializeToString())
    ran = cli("convert-precision", model, "--images", "4", "-o", "half.onnx", "--report", "r.json")
    assert ran.code == 1
    assert "half.onnx was not written: y: differs by" in ran.err
    assert not Path("half.onnx").exists()
    assert not json.loads(Path("r.json").read_text())["passed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp32"], "already FP32"),
        (["--precision", "bf16"], "unknown precision"),
        (["-o", "net.onnx"], "would overwrite"),
        (["--keep-fp32", "nothing"], "match no node"),
        (["--mean", "0.5"], "are for images"),
        (["--shape", "input=1x3"], "not a shape"),
        (["--shape", "image:1x3x8x8"], "unknown input"),
        (["--data", "missing"], "missing"),
        (["--tolerance", "0"], "tolerance"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, model: Path, cli: Callable[..., Any]) -> None:
    ran = cli("convert-precision", model, *options)
    assert ran.code == 3
    assert message in ran.err
    assert not Path("net.fp16.onnx").exists()


def test_calibrate_keeps_layers_in_fp32(model: Path, cli: Callable[..., Any]) -> None:
    write_tensorrt_cache(Path("ranges"), dict.fromkeys(("input", "a", "b", "c", "d", "e"), 4.0))
    common = ["calibrate", model, "--import-trt-cache", "ranges", "-o", "q.onnx", "--exclude", "head"]
    refused = cli(*common, "--keep-fp32", "head")
    assert refused.code == 3
    assert "--keep-fp32 without --float-dtype fp16" in refused.err
    assert cli(*common, "--float-dtype", "fp16", "--keep-fp32", "head").code == 0
    stored = {t.name: t.data_type for t in onnx.load("q.onnx").graph.initializer}
    assert stored["head"] == onnx.TensorProto.FLOAT
    assert onnx.TensorProto.FLOAT16 in stored.values()
    unmatched = cli(*common, "--float-dtype", "fp16", "--keep-fp32", "layer99")
    assert unmatched.code == 3
    assert "'layer99'" in unmatched.err


@pytest.mark.parametrize("folders", ["", "train/a,train/b,train/c,val/a,val/b,val/c"])
def test_any_images_serve_whatever_their_classes(folders: str, model: Path, cli: Callable[..., Any]) -> None:
    generator = np.random.default_rng(0)
    for folder in folders.split(","):
        (Path("photos") / folder).mkdir(parents=True)
        for index in range(4):
            pixels = generator.integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(Path("photos") / folder / f"{index}.png")
    ran = cli("convert-precision", model, "--data", "photos", "--images", "2")
    assert ran.code == 0
    assert "compared on 5 samples" in ran.out
