"""Shapes found by running a graph, against graphs that declare them rightly, wrongly or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from served_models import answers, engine, graph, images, weights

from maskplan.engines.sidecar import read_engine
from maskplan.exporters.metadata import describe_onnx
from maskplan.exporters.run_shapes import RunShapes, run_shapes, set_shapes
from maskplan.pipeline.core.artifacts import Profile

INT64 = TensorProto.INT64
N38 = ("N", 3, 8)


def found(path: Path) -> RunShapes:
    return run_shapes(describe_onnx(path))


def reshaped(path: Path, target: list[int], declared: Any, shape: Any = N38) -> Path:
    """Images (N, 3, 8) in another shape."""
    nodes = [helper.make_node("Reshape", ["x", "target"], ["y"])]
    return graph(path, nodes, [("x", shape)], [("y", declared)], target=np.array(target, np.int64))


@pytest.mark.parametrize("declared", [("N", 24), ("batch", 24), (None, None), (-1, 24)])
def test_a_right_declaration_stays(declared: Any, tmp_path: Path) -> None:
    source = reshaped(tmp_path / "m.onnx", [0, -1], declared)
    described = describe_onnx(source)
    assert run_shapes(described) == RunShapes(described.inputs, described.outputs, True)


@pytest.mark.parametrize("declared", [None, ("N", 5), ("N",), (2, 24), ("N", 24, 1)])
def test_a_missing_or_wrong_declaration_is_replaced(declared: Any, tmp_path: Path) -> None:
    shapes = found(reshaped(tmp_path / "m.onnx", [0, -1], declared))
    assert (shapes.outputs[0].shape, shapes.batched) == ((None, 24), True)
    assert len(shapes.notes) == (declared is not None)


@pytest.mark.parametrize(
    ("target", "declared", "batch"),
    [
        ([1, -1], ("N", 24), 1),
        ([1, 24], ("N", 24), 1),
        ([1, -1], (1, None), 1),
        ([1, -1], (None, None), 1),
        ([1, -1], None, 1),
        ([2, -1], ("N", 24), 2),
        ([2, -1], None, 2),
        ([4, -1], ("N", 24), 4),
        ([7, -1], ("N", 24), 7),
        ([64, 24], ("N", 24), 64),
    ],
)
def test_a_batch_that_the_graph_contains_is_fixed(target: list[int], declared: Any, batch: int, tmp_path: Path) -> None:
    source = reshaped(tmp_path / "m.onnx", target, declared)
    shapes = found(source)
    assert [s.shape for s in (*shapes.inputs, *shapes.outputs)] == [(batch, 3, 8), (batch, 24)]
    assert (shapes.batched, len(shapes.notes)) == (False, 1)
    record = read_engine(engine(source))
    assert record.profiles == (Profile(batch, batch, batch),)
    # The engine's own file declares the same, for servers that compare.
    values = onnx.load(record.path).graph
    declared_now = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*values.input, *values.output)]
    assert declared_now == [[batch, 3, 8], [batch, 24]]
    x = np.random.default_rng(0).random((batch, 3, 8), dtype=np.float32)
    np.testing.assert_array_equal(answers(record.path, {"x": x})["y"], answers(source, {"x": x})["y"])


@pytest.mark.parametrize(
    ("target", "shape", "declared", "batched"),
    [
        # Windows of each image, all images in one row of another meaning, a batch behind another axis.
        ([-1, 8], N38, ("M", 8), False),
        ([-1], N38, ("M",), False),
        ([3, -1, 8], N38, (3, "N", 8), False),
    ],
)
def test_other_rows_than_images_are_not_a_batch(
    target: list[int], shape: Any, declared: Any, batched: bool, tmp_path: Path
) -> None:
    source = reshaped(tmp_path / "m.onnx", target, declared, shape)
    described = describe_onnx(source)
    assert run_shapes(described) == RunShapes(described.inputs, described.outputs, batched)


@pytest.mark.parametrize(("symbol", "batched"), [("N", True), ("num_dets", False), (None, False)])
def test_rows_that_depend_on_the_images_are_a_batch_only_where_they_are_named_so(
    symbol: str | None, batched: bool, tmp_path: Path
) -> None:
    """Random images have one best score each, others may have none: three runs do not tell."""
    nodes = [
        helper.make_node("NonMaxSuppression", ["boxes", "scores", "one", "iou", "least"], ["y"]),
    ]
    inputs = [("boxes", ["N", 5, 4]), ("scores", ["N", 1, 5])]
    tensors = {"one": np.int64([1]), "iou": np.float32([0.5]), "least": np.float32([-1e9])}
    source = graph(tmp_path / "m.onnx", nodes, inputs, [("y", [symbol, 3], INT64)], **tensors)
    assert found(source).batched is batched


def test_inputs_with_first_axes_of_their_own_are_not_a_batch(tmp_path: Path) -> None:
    for name, inputs, batched in (
        ("shared", [("x", ["N", 3]), ("z", ["N", 3])], True),
        ("named apart", [("x", ["N", 3]), ("z", ["M", 3])], True),
        ("scalar", [("x", ["N", 3]), ("z", [])], False),
        ("fixed", [("x", ["N", 3]), ("z", [1, 3])], False),
    ):
        nodes = [helper.make_node("Add", ["x", "z"], ["y"])]
        assert found(graph(tmp_path / "m.onnx", nodes, inputs, [("y", ["N", 3])])).batched is batched, name
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["z"], ["q"])]
    values = [("x", ["N", 3]), ("z", ["M", 3])], [("y", ["N", 3]), ("q", ["M", 3])]
    assert found(graph(tmp_path / "m.onnx", nodes, *values)).batched is False


def test_sizes_that_follow_the_images_stay_dynamic(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2]),
        helper.make_node("GlobalMaxPool", ["y"], ["z"]),
    ]
    source = graph(
        tmp_path / "m.onnx", nodes, [("x", ["N", 3, "H", "W"])], [("y", None), ("z", None)], w=weights(4, 3, 3, 3)
    )
    shapes = found(source)
    assert [o.shape for o in shapes.outputs] == [(None, 4, None, None), (None, 4, 1, 1)]
    assert shapes.batched


def test_a_graph_that_does_not_run_keeps_what_it_declares(tmp_path: Path) -> None:
    nodes = [helper.make_node("NoSuchOperator", ["x"], ["y"], domain="elsewhere")]
    source = graph(tmp_path / "m.onnx", nodes, [("x", N38)], [("y", ("N", 5))])
    described = describe_onnx(source)
    assert run_shapes(described) == RunShapes(described.inputs, described.outputs, None)


def test_only_other_shapes_change_a_file(tmp_path: Path) -> None:
    source = reshaped(tmp_path / "m.onnx", [0, -1], ("N", 24))
    described = describe_onnx(source)
    model = onnx.load(source)
    assert not set_shapes(model, described.inputs, described.outputs)
    assert model == onnx.load(source)
    assert engine(source).read_bytes() == source.read_bytes()


def test_an_axis_of_minus_one_is_dynamic_wherever_a_file_is_read(tmp_path: Path) -> None:
    source = reshaped(tmp_path / "m.onnx", [0, -1], (-1, 24), (-1, 3, 8))
    described = describe_onnx(source)
    assert [s.shape for s in (*described.inputs, *described.outputs)] == [(None, 3, 8), (None, 24)]
    assert found(source).batched
    record = read_engine(engine(source))
    assert [p.max for p in record.profiles] == [1, 8]
    assert answers(record.path, {"x": images(5, 8)[:, :, 0]})["y"].shape == (5, 24)
