"""Models whose input is not an image as maskplan feeds it: each refusal gives the true reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.engines.build import BuildOptions, build_engine
from maskplan.exporters.metadata import describe_onnx

Dims = tuple[int | str, ...]


def mean_of_pixels(dims: Dims, path: Path) -> Path:
    """A model of three scores whose input has these dimensions."""
    count = len(dims)
    axes = numpy_helper.from_array(np.arange(1, count, dtype=np.int64), "axes")
    weight = numpy_helper.from_array(np.ones((1, 3), np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
            helper.make_node("Reshape", ["mean", "column"], ["m"]),
            helper.make_node("MatMul", ["m", "w"], ["scores"]),
        ],
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [dims[0], 3])],
        [axes, weight, numpy_helper.from_array(np.array([-1, 1], np.int64), "column")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("dims", "reason", "fix"),
    [
        (("n", "h", "w", 3), "only the batch may be dynamic", "--shape"),
        (("n", 16, 16, 4), "4 channels, and images have 1 or 3", ".npz"),
        (("n", 4, 16, 16), "4 channels, and images have 1 or 3", ".npz"),
        (("n", 2, 8, 8), "2 channels, and images have 1 or 3", ".npz"),
        (("n", "c", 16, 16), "number of channels of the model's input is dynamic", "1 or 3 channels"),
        (("n", 3, "h", "w"), "has no fixed input size", "fixed image sizes"),
        (("n", 3, 16, "w"), "has no fixed input size", "fixed image sizes"),
    ],
)
def test_a_refusal_gives_the_true_reason(
    dims: Dims, reason: str, fix: str, cli: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    model = mean_of_pixels(dims, tmp_path / "odd.onnx")
    out = tmp_path / "int8.onnx"
    for command in (("compare", model, model), ("calibrate", model, "-o", out)):
        ran = cli(*command, "--data", toy_data)
        assert (ran.code, ran.out) == (3, "")
        assert reason in ran.err.splitlines()[0]
        assert "odd.onnx" in ran.err
        assert "image (" in ran.err
        assert fix in ran.err.splitlines()[-1]
        assert not out.exists()


@pytest.mark.parametrize("dims", [("n", 16, 16, 3), (1, 16, 16, 1)])
def test_channels_last_images_are_compared_with_their_labels(
    dims: Dims, cli: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    model = mean_of_pixels(dims, tmp_path / "last.onnx")
    ran = cli("compare", model, model, "--data", toy_data, "--report", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "r.json").read_text())
    # All scores are equal, so the first of three classes is predicted.
    labels = [path.parent.name for path in sorted((toy_data / "val").rglob("*.png"))]
    assert found["metric"]["dense"] == pytest.approx(100 * labels.count(sorted(set(labels))[0]) / len(labels))
    assert found["by_output"][0]["agreement"] == 100


@pytest.mark.parametrize("dims", [("n", 3, "h", "w"), ("n", "h", "w", 3)])
def test_time_refuses_sizes_that_it_would_have_to_invent(dims: Dims, cli: Callable[..., Any], tmp_path: Path) -> None:
    model = describe_onnx(mean_of_pixels(dims, tmp_path / "odd.onnx"))
    engine = build_engine(model, BuildOptions(backend="onnxruntime"), tmp_path / "engine.onnx").path
    ran = cli("time", engine, engine, "--seconds", "0.1", "--batch", "1")
    assert ran.code == 3
    assert "only the batch may be dynamic" in ran.err


def test_time_takes_any_layout_of_a_fixed_size(cli: Callable[..., Any], tmp_path: Path) -> None:
    model = describe_onnx(mean_of_pixels(("n", 16, 16, 4), tmp_path / "odd.onnx"))
    engine = build_engine(model, BuildOptions(backend="onnxruntime"), tmp_path / "engine.onnx").path
    ran = cli("time", engine, engine, "--seconds", "0.1", "--batch", "1")
    assert ran.code == 0, ran.err
