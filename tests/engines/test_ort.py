"""ONNX Runtime behind the Engine protocol, held against onnx's own reference implementation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from maskplan.engines.ort import NO_SPARSE_KERNELS, OrtEngine, build_ort
from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.core.artifacts import Profile, TensorSpec
from maskplan.pipeline.core.errors import InputError

Array = npt.NDArray[Any]

PROFILES = (Profile(1, 1, 1), Profile(1, 8, 8))


def small(path: Path, batch: int | str = "n") -> Path:
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "h"], ["scores"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 6, 6])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 5])],
        [
            numpy_helper.from_array(generator.normal(size=(8, 3, 3, 3)).astype(np.float32), "w"),
            numpy_helper.from_array(generator.normal(size=(5, 8)).astype(np.float32), "h"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def images(batch: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(batch).normal(size=(batch, 3, 6, 6)).astype(np.float32)


@pytest.mark.parametrize("optimized", [True, False])
def test_any_batch_gives_what_the_reference_implementation_gives(optimized: bool, tmp_path: Path) -> None:
    path = small(tmp_path / "small.onnx")
    engine, reference = OrtEngine(path, optimized=optimized), ReferenceEvaluator(str(path))
    assert engine.inputs == (TensorSpec("image", "float32", (None, 3, 6, 6)),)
    assert engine.outputs == (TensorSpec("scores", "float32", (None, 5)),)
    for batch in (1, 2, 7):
        found = engine.infer({"image": images(batch)})
        assert set(found) == {"scores"}
        assert np.allclose(found["scores"], reference.run(None, {"image": images(batch)})[0], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TensorProto.FLOAT16, "float16"),
        (TensorProto.DOUBLE, "float64"),
        (TensorProto.INT64, "int64"),
        (TensorProto.UINT8, "uint8"),
    ],
)
def test_types_are_named_as_numpy_names_them(kind: int, name: str, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "i", [value("x", kind, [2, "n"])], [value("y", kind, [2, "n"])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "identity.onnx"
    path.write_bytes(model.SerializeToString())
    engine = OrtEngine(path)
    assert engine.inputs == (TensorSpec("x", name, (2, None)),)
    assert engine.outputs == (TensorSpec("y", name, (2, None)),)
    x = np.arange(6).reshape(2, 3).astype(name)
    assert np.array_equal(engine.infer({"x": x})["y"], x)


@pytest.mark.parametrize("data", [b"", b"text", b"\x00" * 64])
def test_a_file_that_the_runtime_does_not_accept_is_one_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError, match="does not accept the file") as caught:
        OrtEngine(path)
    assert str(path) in str(caught.value)
    with pytest.raises(InputError):
        OrtEngine(tmp_path / "missing.onnx")


@pytest.mark.parametrize(
    "feeds",
    [
        {"image": images(1)[:, :2]},
        {"image": images(1)[0]},
        {"image": images(1).astype(np.float64)},
        {"picture": images(1)},
        {},
    ],
    ids=["channels", "rank", "type", "name", "nothing"],
)
def test_feeds_that_do_not_fit_are_one_error(feeds: dict[str, Array], tmp_path: Path) -> None:
    engine = OrtEngine(small(tmp_path / "small.onnx"))
    with pytest.raises(InputError, match="cannot run the model"):
        engine.infer(feeds)
    # And the engine is still good.
    assert engine.infer({"image": images(2)})["scores"].shape == (2, 5)


def test_a_fixed_batch_is_told_and_held(tmp_path: Path) -> None:
    engine = OrtEngine(small(tmp_path / "small.onnx", 4))
    assert engine.inputs[0].shape == (4, 3, 6, 6)
    assert engine.infer({"image": images(4)})["scores"].shape == (4, 5)
    with pytest.raises(InputError):
        engine.infer({"image": images(2)})


def test_a_closed_engine_does_not_run(tmp_path: Path) -> None:
    engine = OrtEngine(small(tmp_path / "small.onnx"))
    engine.close()
    with pytest.raises((InputError, AttributeError)):
        engine.infer({"image": images(1)})


@pytest.mark.parametrize("sparse_weights", [True, False])
def test_the_engine_is_the_onnx_file_and_its_record_says_what_it_is(sparse_weights: bool, tmp_path: Path) -> None:
    source, out = small(tmp_path / "small.onnx"), tmp_path / "built" / "engine.onnx"
    record = build_ort(describe_onnx(source), PROFILES, sparse_weights, out)
    data = source.read_bytes()
    assert out.read_bytes() == data
    digest = hashlib.sha256(data).hexdigest()
    assert (record.path, record.sha256, record.onnx_sha256, record.bytes) == (out, digest, digest, len(data))
    assert (record.backend, record.precision, record.typing) == ("onnxruntime", "fp32", "strong")
    assert (record.device, record.compute_capability) == ("CPU", None)
    assert record.runtime_version == onnxruntime.__version__
    assert record.profiles == PROFILES
    assert record.inputs == (TensorSpec("image", "float32", (None, 3, 6, 6)),)
    assert record.outputs == (TensorSpec("scores", "float32", (None, 5)),)
    assert record.provenance is None
    # There are no sparse kernels on a CPU: the record claims none, and says so to those who asked.
    assert record.sparse_weights is False
    assert record.layers == ()
    assert record.notes == ((NO_SPARSE_KERNELS,) if sparse_weights else ())


def test_a_file_that_does_not_load_leaves_no_engine(tmp_path: Path) -> None:
    source = small(tmp_path / "small.onnx")
    model = onnx.load(source)
    model.graph.node[1].op_type = "NoSuchOperator"
    source.write_bytes(model.SerializeToString())
    with pytest.raises(InputError):
        build_ort(describe_onnx(source), PROFILES, True, tmp_path / "built" / "engine.onnx")
    assert not (tmp_path / "built").exists()


def test_building_in_place_keeps_the_file(tmp_path: Path) -> None:
    source = small(tmp_path / "small.onnx")
    before = source.read_bytes()
    build_ort(describe_onnx(source), PROFILES, True, source)
    assert source.read_bytes() == before
