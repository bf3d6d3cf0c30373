"""The golden pair that lies beside a deployed engine."""

from __future__ import annotations

import gc
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_cuda
import fake_tensorrt
import numpy as np
import onnxruntime
import pytest
from deployable import built, plan, source
from onnx import TensorProto, helper
from served_models import engine, graph

from maskplan.engines.build import BuildOptions, build_engine
from maskplan.engines.sidecar import read_engine
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Profile, ShapeRange
from maskplan.pipeline.core.errors import InputError, PipelineError
from maskplan.pipeline.triton.deploy import DeployOptions, deploy
from maskplan.pipeline.triton.deployed import read_golden
from maskplan.pipeline.triton.golden import Golden, golden_files, golden_of, golden_pair


def pair(batch: int = 2, classes: int = 5, dtype: Any = np.float32) -> Golden:
    generator = np.random.default_rng(0)
    images, logits = (generator.normal(size=size).astype(dtype) for size in ((batch, 3, 8, 8), (batch, classes)))
    return Golden({"input": images}, {"logits": logits})


def changed_pair(change: Any, *, outputs: bool = False) -> Golden:
    made = pair()
    if outputs:
        return replace(made, outputs={"logits": change(made.outputs["logits"])})
    return replace(made, feeds={"input": change(made.feeds["input"])})


def test_the_pair_is_in_the_version_folder_with_its_description(tmp_path: Path) -> None:
    """It is of this version's weights, and goes where the version goes."""
    engine, options, golden = built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net"), pair()
    deploy(engine, options)
    deploy(engine, options, golden)
    folder = tmp_path / "models/net/2/golden"
    assert not (tmp_path / "models/net/1/golden").exists()
    for name, wanted in (("input", golden.feeds["input"]), ("output", golden.outputs["logits"])):
        array = np.load(folder / f"{name}.npy", allow_pickle=False)
        np.testing.assert_array_equal(array, wanted)
        assert array.dtype == wanted.dtype
    description = json.loads((folder / "golden.json").read_text())
    assert description == {"model": "net", "version": 2, "input": "input", "output": "logits", "tolerance": 1e-3}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 5e-2), ("int8", 1e-1)])
def test_coarser_arithmetic_is_allowed_more(precision: str, tolerance: float, tmp_path: Path) -> None:
    engine = plan(tmp_path / "a.plan", precision=precision)
    deploy(engine, DeployOptions(tmp_path / "models", "net"), pair())
    assert json.loads((tmp_path / "models/net/1/golden/golden.json").read_text())["tolerance"] == tolerance


@pytest.mark.parametrize("batch", ["batch", 4])
def test_the_pair_is_the_engines_output_for_a_seeded_input(batch: int | str, tmp_path: Path) -> None:
    engine = read_engine(built(tmp_path / "engine", batch=batch))
    golden = golden_pair(engine)
    given, answer = golden.feeds["input"], golden.outputs["logits"]
    assert given.shape == (1 if batch == "batch" else 4, 3, 8, 8)
    assert given.std() == pytest.approx(1, abs=0.2)
    session = onnxruntime.InferenceSession(engine.path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(answer, session.run(None, {"input": given})[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(golden_pair(engine).feeds["input"], given)
    assert not np.array_equal(golden_pair(engine, seed=1).feeds["input"], given)


@pytest.mark.parametrize(
    ("golden", "message"),
    [
        (pair(classes=6), r"logits float32 \(None, 5\) does not match float32 \(2, 6\)"),
        (pair(dtype=np.float16), r"match float16 \(2, 3, 8, 8\); .* match float16 \(2, 5\)"),
        (changed_pair(lambda x: x[0]), r"match float32 \(3, 8, 8\)"),
        (changed_pair(lambda x: x[..., 0]), r"match float32 \(2, 3, 8\)"),
        (changed_pair(lambda x: x * np.float32("nan"), outputs=True), "logits is not finite"),
        (replace(pair(), feeds={"image": pair().feeds["input"]}), "input float32 .* does not match image"),
    ],
)
def test_a_pair_that_is_not_the_engines_is_refused(golden: Golden, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        deploy(built(tmp_path / "engine"), DeployOptions(tmp_path / "models", "net"), golden)
    assert not (tmp_path / "models").exists()


def test_the_size_of_a_dynamic_input_is_told(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    dynamic = ["N", 3, "H", "W"]
    made = read_engine(engine(graph(tmp_path / "m.onnx", nodes, [("x", dynamic)], [("y", dynamic)]), ()))
    with pytest.raises(InputError, match="the size of a golden input is not known"):
        golden_pair(made)
    told = golden_pair(made, shapes={"x": (1, 3, 5, 7)})
    assert told.feeds["x"].shape == (1, 3, 5, 7)
    np.testing.assert_array_equal(told.outputs["y"], np.maximum(told.feeds["x"], 0))
    sizes = ShapeRange("x", (1, 3, 4, 4), (2, 3, 6, 6), (8, 3, 8, 8))
    assert golden_pair(replace(made, profiles=(Profile(1, 2, 8, (sizes,)),))).feeds["x"].shape == (1, 3, 6, 6)


def test_several_inputs_and_outputs_of_any_type_have_a_pair(tmp_path: Path) -> None:
    """A scalar, integers and images; read again, they are what the engine was given and returned."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
        helper.make_node("Mul", ["images", "gain"], ["scaled"]),
        helper.make_node("Shape", ["scaled"], ["size"]),
    ]
    inputs = [("images", [2, 3, 4]), ("ids", [2], TensorProto.INT64), ("gain", [])]
    outputs = [("scaled", [2, 3, 4]), ("rows", [2, 3]), ("size", [3], TensorProto.INT64)]
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = graph(tmp_path / "m.onnx", nodes, inputs, outputs, table=table)
    made = engine(path, ())
    deploy(made, DeployOptions(tmp_path / "models", "net"), golden_pair(read_engine(made)))
    folder = tmp_path / "models/net/1/golden"
    read = read_golden(folder)
    assert json.loads((folder / "golden.json").read_text())["input"] == ["images", "ids", "gain"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {name: array.reshape(()) if name == "gain" else array for name, array in read.feeds.items()}
    for name, array in zip(read.outputs, session.run(list(read.outputs), feeds), strict=True):
        np.testing.assert_allclose(read.outputs[name], array, rtol=1e-6)
    assert list(read.outputs) == ["scaled", "rows", "size"]


def test_one_element_that_is_not_finite_is_enough(tmp_path: Path) -> None:
    nodes = [helper.make_node("Log", ["x"], ["y"])]
    made = read_engine(engine(graph(tmp_path / "m.onnx", nodes, [("x", ["N", 9])], [("y", ["N", 9])])))
    with pytest.raises(InputError, match="not finite"):
        golden_pair(made)


def test_no_pair_is_made_of_an_output_that_is_not_finite(tmp_path: Path) -> None:
    engine = read_engine(built(tmp_path / "engine", broken=True))
    with pytest.raises(InputError, match="not finite"):
        golden_pair(engine)
    assert golden_of([engine]) == (None, "the output for random input is not finite (logits)")
    fine = read_engine(built(tmp_path / "fine"))
    found, why = golden_of([engine, fine])
    assert found is not None
    assert why == ""
    assert golden_of([]) == (None, "no engine")
    fine.path.unlink()
    assert golden_of([fine]) == (None, "engine not found")


@pytest.mark.parametrize("failure", [None, "execute"])
def test_memory_of_the_gpu_is_given_back_whether_the_engine_ran_or_not(
    failure: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = fake_cuda.install(monkeypatch)
    trt = fake_tensorrt.install("10.3.0", gpu, monkeypatch)
    model = describe_onnx(source(tmp_path / "model.onnx"))
    engine = build_engine(model, BuildOptions("tensorrt"), tmp_path / "engine.plan")
    trt.failures = {failure} - {None}
    found, why = golden_of([engine])
    assert (found is None) == bool(failure)
    assert why.startswith("TensorRT failed to run the engine (" if failure else "")
    assert gpu.misplaced == 0 or failure
    # A failed call's buffers hang in the frames that its error came through.
    gc.collect()
    assert (gpu.current, gpu.memory, gpu.alive) == ([], {}, 0)


def test_a_plan_that_cannot_be_opened_here_has_no_pair(tmp_path: Path) -> None:
    with pytest.raises(PipelineError):
        golden_pair(read_engine(plan(tmp_path / "a.plan")))


@pytest.mark.parametrize(("shape", "stored"), [(["N"], (1, 1)), ([3], (3,)), (["N", 2], (1, 2))])
def test_the_pair_has_the_shapes_that_clients_see(shape: list[Any], stored: tuple[int, ...], tmp_path: Path) -> None:
    """Triton serves one number for each image as (N, 1)."""
    batch = "N" if shape[0] == "N" else 3
    node = "ReduceMax" if len(shape) == 1 else "Relu"
    axes: dict[str, Any] = {"axes": [1], "keepdims": 0} if len(shape) == 1 else {}
    nodes = [helper.make_node(node, ["x"], ["y"], **axes)]
    made = read_engine(engine(graph(tmp_path / "m.onnx", nodes, [("x", [batch, 2])], [("y", shape)])))
    files = golden_files(golden_pair(made), made, "net", 1)
    assert np.load(io.BytesIO(files["golden/output.npy"])).shape == stored
    assert np.load(io.BytesIO(files["golden/input.npy"])).shape == (stored[0], 2)
