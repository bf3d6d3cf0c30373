"""Plans of graphs that declare other shapes than they have, built with the stand-in for TensorRT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from fake_tensorrt import Control
from fake_tensorrt_runtime import MAGIC
from onnx import helper
from plan_builds import build
from served_models import graph

from maskplan.engines.build import DEFAULT_PROFILES, profiles_for
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import EngineFile, Profile
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.triton.config import config_text


def parsed(engine: EngineFile) -> onnx.ModelProto:
    """The graph that the stand-in was given."""
    data = engine.path.read_bytes()
    start = len(MAGIC) + 8
    return onnx.load_from_string(data[start + int.from_bytes(data[len(MAGIC) : start], "little") :])


def test_a_batch_that_the_graph_contains_is_the_only_one_of_the_plan(trt: Control, tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "target"], ["y"])]
    source = graph(tmp_path / "m.onnx", nodes, [("x", ["N", 3, 8])], [("y", ["N", 24])], target=np.int64([2, -1]))
    engine = build(source, profiles=DEFAULT_PROFILES)
    assert engine.profiles == (Profile(2, 2, 2),)
    assert [s.shape for s in (*engine.inputs, *engine.outputs)] == [(2, 3, 8), (2, 24)]
    values = parsed(engine).graph
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*values.input, *values.output)]
    assert shapes == [[2, 3, 8], [2, 24]]
    assert any("only with a batch of 2" in note for note in engine.notes)


def test_a_graph_as_it_declares_is_read_from_its_file(trt: Control, tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    source = graph(tmp_path / "m.onnx", nodes, [("x", ["N", 3])], [("y", ["N", 3])])
    engine = build(source)
    assert engine.batched
    assert parsed(engine) == onnx.load(source)


def test_a_first_axis_that_is_no_batch_stays_in_every_profile(trt: Control, tmp_path: Path) -> None:
    """An input with a dynamic batch beside one of a fixed shape."""
    nodes = [helper.make_node("MatMul", ["x", "table"], ["y"])]
    source = graph(tmp_path / "m.onnx", nodes, [("x", ["N", 3]), ("table", [3, 5])], [("y", ["N", 5])])
    build(source, profiles=(Profile(1, 8, 16),))
    (profile,) = trt.config._profiles
    assert profile._shapes == {"x": [(1, 3), (8, 3), (16, 3)], "table": [(3, 5)] * 3}


@pytest.mark.parametrize("scalar_first", [True, False])
def test_a_scalar_has_no_batch_in_a_profile(scalar_first: bool, trt: Control, tmp_path: Path) -> None:
    """Triton passes it to no plan."""
    inputs = [("gain", []), ("x", ["N", 3])][:: 1 if scalar_first else -1]
    nodes = [helper.make_node("Mul", ["x", "gain"], ["y"])]
    source = graph(tmp_path / "m.onnx", nodes, inputs, [("y", ["N", 3])])
    assert profiles_for(describe_onnx(source), (1, 8)) == (Profile(1, 1, 1), Profile(1, 8, 8))
    engine = build(source)
    assert not engine.batched
    assert [p._shapes["gain"] for p in trt.config._profiles] == [[(), (), ()]] * 2
    with pytest.raises(InputError, match="gain the shape \\[1\\]"):
        config_text([engine], "net")
