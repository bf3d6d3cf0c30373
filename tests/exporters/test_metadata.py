"""The record inside an ONNX file, and what is said of files that other tools wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.lazy_load import load_lazily
from maskplan.exporters.metadata import describe_onnx, load_onnx, precision_of, read_provenance, write_provenance
from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing, Provenance, TensorSpec
from maskplan.pipeline.core.errors import InputError


def model_of(
    *,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    tensors: dict[str, np.ndarray[Any, Any]] | None = None,
    nodes: Sequence[onnx.NodeProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes or [helper.make_node("Relu", ["x"], ["y"])],
        "test",
        inputs,
        outputs,
        [numpy_helper.from_array(value, name) for name, value in (tensors or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def value(name: str, kind: int, shape: Sequence[int | str | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


words = st.text(max_size=12)
digests = st.text("0123456789abcdef", min_size=16, max_size=16)
numbers = st.floats(allow_nan=False, allow_infinity=False)
records = st.builds(
    Provenance,
    model=words,
    trained=st.booleans(),
    origin=words,
    dense_sha256=digests,
    classes=st.integers(1, 1000),
    labels=st.lists(words, max_size=4).map(tuple),
    preprocessing=st.builds(
        Preprocessing,
        channels=st.sampled_from([1, 3]),
        height=st.integers(1, 512),
        width=st.integers(1, 512),
        resize=st.integers(0, 512),
        interpolation=st.sampled_from(["bilinear", "bicubic", "nearest"]),
        mean=st.lists(numbers, max_size=3).map(tuple),
        std=st.lists(numbers, max_size=3).map(tuple),
    ),
    masked=st.lists(words, max_size=4).map(tuple),
    pattern=st.none() | st.just("2:4"),
    layout=st.none() | st.just("channel"),
    method=st.none() | words,
    recalibrated_images=st.integers(0, 10_000),
    image_sets=st.lists(
        st.builds(
            ImageSet,
            role=st.sampled_from(["train", "select", "val"]),
            images=st.integers(0, 10**7),
            sha256=digests,
            sketch=st.lists(digests, max_size=3).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
)


@settings(max_examples=50, deadline=None)
@given(records)
def test_a_record_comes_back_as_it_was_written(record: Provenance) -> None:
    model = model_of()
    write_provenance(model, record)
    again = onnx.load_model_from_string(model.SerializeToString())
    assert read_provenance(again, Path("model.onnx")) == record


def test_a_foreign_file_has_no_record() -> None:
    model = model_of()
    entry = model.metadata_props.add()
    entry.key, entry.value = "author", "someone else"
    assert read_provenance(model, Path("model.onnx")) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"model": 3}', '"net"'])
def test_a_spoilt_record_is_refused_and_names_the_file(text: str) -> None:
    model = model_of()
    entry = model.metadata_props.add()
    entry.key, entry.value = "maskplan", text
    with pytest.raises(InputError, match="metadata cannot be read") as caught:
        read_provenance(model, Path("some/model.onnx"))
    assert "some/model.onnx" in str(caught.value)


def test_a_file_is_described_by_its_true_inputs_outputs_and_bytes(tmp_path: Path) -> None:
    model = model_of(
        inputs=[
            value("image", TensorProto.FLOAT, ["n", 3, 8, None]),
            value("mask", TensorProto.BOOL, [1]),
            value("w", TensorProto.FLOAT, [2]),
        ],
        outputs=[
            value("half", TensorProto.FLOAT16, [4, 10]),
            value("ids", TensorProto.INT64, []),
            value("wide", TensorProto.DOUBLE, ["n"]),
        ],
        tensors={"w": np.ones(2, np.float32)},
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    described = describe_onnx(path)
    # An initializer that is listed among the inputs, as older exporters do, is none.
    assert described.inputs == (TensorSpec("image", "float32", (None, 3, 8, None)), TensorSpec("mask", "bool", (1,)))
    assert described.outputs == (
        TensorSpec("half", "float16", (4, 10)),
        TensorSpec("ids", "int64", ()),
        TensorSpec("wide", "float64", (None,)),
    )
    assert (described.path, described.provenance) == (path, None)
    assert described.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert described.bytes == len(path.read_bytes())


FULL, HALF = np.zeros(10, np.float32), np.zeros(10, np.float16)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a": FULL}, "fp32"),
        ({"a": HALF}, "fp16"),
        ({"a": HALF, "scales": FULL[:4]}, "fp16"),
        ({"a": HALF[:4], "b": FULL}, "fp32"),
        ({"shape": np.zeros(100, np.int64), "a": HALF}, "fp16"),
        ({"a": np.zeros((2, 0), np.float16), "b": FULL[:1]}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_precision_is_what_most_weights_have(tensors: dict[str, np.ndarray[Any, Any]], expected: str) -> None:
    assert precision_of(model_of(tensors=tensors)) == expected


def tensor(name: str, kind: int, shape: Sequence[int]) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, shape, np.zeros(shape).ravel().tolist())


FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((BF16,), "bf16"),
        ((BF16, BF16, FP32), "bf16"),
        ((FP16, FP16, FP32), "fp16"),
        ((FP16, FP32), "fp16"),
        ((FP16, FP32, FP32), "fp32"),
        ((FP32,), "fp32"),
    ],
)
@pytest.mark.parametrize("wide", [1, 64])
def test_precision_is_that_of_most_products_not_of_the_widest(kinds: Sequence[int], expected: str, wide: int) -> None:
    """A head that was kept in FP32 may hold more than all convolutions together; a large bias tells nothing."""
    nodes, tensors = [], [tensor("large", FP32, (100_000,))]
    for number, kind in enumerate(kinds):
        shape = (wide * 64, wide * 4) if kind == FP32 else (8, 4)
        tensors.append(tensor(f"w{number}", kind, shape))
        nodes.append(helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"y{number}"]))
    model = model_of(nodes=nodes)
    model.graph.initializer.extend(tensors)
    assert precision_of(model) == expected


def test_weights_behind_other_nodes_count_too() -> None:
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor("", BF16, (8, 4))),
        helper.make_node("Transpose", ["c"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    assert precision_of(model_of(nodes=nodes, tensors={"large": FULL})) == "bf16"


def test_without_products_a_file_is_what_most_elements_are() -> None:
    model = model_of(tensors={"b": FULL[:4]})
    model.graph.initializer.append(tensor("a", BF16, (10,)))
    assert precision_of(model) == "bf16"


def test_quantized_weights_make_a_file_int8() -> None:
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), helper.make_node("Relu", ["d"], ["y"])]
    tensors = {"w": np.zeros(10, np.int8), "s": np.array(1, np.float32), "rest": FULL}
    assert precision_of(model_of(nodes=nodes, tensors=tensors)) == "int8"


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x02}q\x00.", bytes(range(256))])
def test_loading_what_is_not_onnx_is_one_error_that_names_the_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "thing.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError, match="not an ONNX file") as caught:
        load_onnx(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


def test_loading_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file not found"):
        load_onnx(tmp_path / "none.onnx")


def test_loading_leaves_external_tensors_where_they_are(tmp_path: Path) -> None:
    """So that a check can refuse their locations, and a file can be described without its weights."""
    model = model_of(tensors={"w": FULL})
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "absent.bin"
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert load_onnx(path).graph.initializer[0].data_location == TensorProto.EXTERNAL


@pytest.mark.parametrize("where", ["name", "input", "initializer", "subgraph"])
def test_a_name_that_is_not_utf8_is_refused(where: str, tmp_path: Path) -> None:
    """Protobuf returns such names as bytes, which neither JSON nor ONNX Runtime takes."""
    then = helper.make_graph([helper.make_node("Relu", ["x"], ["MARK_subgraph"])], "then", [], [])
    nodes = [
        helper.make_node("Relu", ["MARK_input"], ["x"], "MARK_name"),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=then),
    ]
    tensors = [numpy_helper.from_array(np.zeros(2, np.float32), "MARK_initializer")]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))
    path = tmp_path / "a.onnx"
    path.write_bytes(model.SerializeToString())
    for load in (load_onnx, load_lazily):
        load(path)
    path.write_bytes(model.SerializeToString().replace(f"MARK_{where}".encode(), f"MARK\xff{where}".encode("latin-1")))
    for load in (load_onnx, load_lazily):
        with pytest.raises(InputError, match=r"not UTF-8|not an ONNX file"):
            load(path)


def test_a_file_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    weight = np.arange(4096, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Relu", ["w"], ["y"])], "g", [], [], [numpy_helper.from_array(weight, "w")]
    )
    path = tmp_path / "\udcff\n.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    (tensor,) = load_lazily(path).graph.initializer
    assert np.array_equal(numpy_helper.to_array(tensor), weight)
