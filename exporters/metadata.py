"""Provenance in the metadata of an ONNX file, and the record of an ONNX file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from maskplan.exporters.subgraphs import model_nodes, walk_graphs
from maskplan.exporters.weights import weight_uses
from maskplan.pipeline.core.artifacts import OnnxModel, Provenance, TensorSpec
from maskplan.pipeline.core.choices import BF16, FP16, FP32, INT8, OnnxPrecision
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import read_bytes, sha256_of
from maskplan.pipeline.core.serialization import decode, encode, parse_json
from maskplan.pipeline.core.weight_ops import INTEGER_OPS
from maskplan.pipeline.models.state_dict import METADATA_KEY

_DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.DOUBLE: "float64",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.BOOL: "bool",
}
# Protobuf's limit for one message.
_MAX_BYTES = 2**31 - 1
_PRECISIONS: dict[int, OnnxPrecision] = {
    onnx.TensorProto.FLOAT: FP32,
    onnx.TensorProto.FLOAT16: FP16,
    onnx.TensorProto.BFLOAT16: BF16,
}


# Of ONNX Runtime, beside ONNX's own INTEGER_OPS.
_RUNTIME_INTEGER_OPS = {"QGemm", "QAttention", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearConv"}


def load_onnx(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file without loading external data.

    Raises:
        InputError: The file is missing or is not ONNX, or is too large for a single message of protobuf.
    """
    if path.is_file() and path.stat().st_size > _MAX_BYTES:
        raise InputError(
            "an ONNX file of more than 2 GB cannot be read",
            where=path,
            found=f"{path.stat().st_size:,} bytes",
            fix="save it with its weights in a file beside it: onnx.save(model, path, save_as_external_data=True)",
        )
    return parse_onnx(read_bytes(path), path)


def parse_onnx(data: bytes, path: Path) -> onnx.ModelProto:
    """Parse the bytes of an ONNX file; axes of negative size become dynamic.

    Raises:
        InputError: They are not ONNX.
    """
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # the types of errors differ between implementations of protobuf
        raise InputError(
            "not an ONNX file", where=path, found=str(error).partition("\n")[0], fix="give a .onnx file"
        ) from error
    if not model.graph.node:
        raise InputError("not an ONNX file", where=path, found="no nodes", fix="give a complete .onnx file")
    if not model.opset_import:
        raise InputError("not a complete ONNX file", where=path, found="no opset", fix="export or copy it again")
    for graph in walk_graphs(model.graph):
        _clear_negative_sizes(graph)
    damaged = next(_undecodable(model), None)
    if damaged is not None:
        raise InputError(
            "a name in the ONNX file is not UTF-8", where=path, found=repr(damaged), fix="export or copy it again"
        )
    return model


def _clear_negative_sizes(graph: onnx.GraphProto) -> None:
    """Make axes of size -1 dynamic: some tools write dynamic axes so, and ONNX Runtime reads them as such."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.HasField("tensor_type"):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_value < 0:
                    dim.ClearField("dim_value")


def _undecodable(message: Any) -> Iterator[bytes]:
    """Texts of a protobuf message that are not UTF-8, which protobuf returns as bytes."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            texts = (value,) if isinstance(value, str | bytes) else value
            yield from (text for text in texts if isinstance(text, bytes))
        elif field.type == field.TYPE_MESSAGE:
            for inner in (value,) if hasattr(value, "ListFields") else value:
                yield from _undecodable(inner)


def describe_onnx(path: Path, model: onnx.ModelProto | None = None) -> OnnxModel:
    """The record of an ONNX file of any tool.

    Raises:
        InputError: The file is missing or is not ONNX.
    """
    model = load_onnx(path) if model is None else model
    initializers = {tensor.name for tensor in model.graph.initializer}
    return OnnxModel(
        path=path,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        precision=precision_of(model),
        inputs=tuple(_spec(v) for v in model.graph.input if v.name not in initializers),
        outputs=tuple(_spec(v) for v in model.graph.output),
        provenance=read_provenance(model, path),
    )


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model imports; 0 if it imports none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def precision_of(model: onnx.ModelProto) -> OnnxPrecision:
    """`int8` with Q/DQ or operators on integers, else the type of most nodes' weights: `fp32`, `fp16` or `bf16`.

    Counts convolutions and matrix products, not elements, because a few layers kept in FP32 may hold most elements; of two
    types that are equally frequent, the narrower one wins. In a file without such nodes, the elements of its tensors count.
    """
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return INT8
    if any(node.op_type in INTEGER_OPS or node.op_type in _RUNTIME_INTEGER_OPS for node in model_nodes(model)):
        return INT8
    counts = Counter(_PRECISIONS.get(use.tensor.data_type) for use in weight_uses(model) if use.tensor is not None)
    if not any(counts[name] for name in _PRECISIONS.values()):
        for tensor in model.graph.initializer:
            counts[_PRECISIONS.get(tensor.data_type)] += math.prod(tensor.dims)
    halves: tuple[OnnxPrecision, ...] = (FP16, BF16)
    half = max(halves, key=lambda name: counts[name])
    return half if counts[half] and counts[half] >= counts[FP32] else FP32


def write_provenance(model: onnx.ModelProto, provenance: Provenance) -> None:
    """Write the provenance into a model's metadata, in place; replaces one that exists."""
    others = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(others)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(encode(provenance), sort_keys=True)


def read_provenance(model: onnx.ModelProto, where: object) -> Provenance | None:
    """The provenance in a model's metadata; None in files of other tools.

    Raises:
        InputError: It cannot be read.
    """
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            try:
                return decode(Provenance, parse_json(entry.value))
            except ValueError as error:
                raise InputError(
                    "the ONNX file's metadata cannot be read", where=where, found=error, fix="export it again"
                ) from error
    return None


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in tensor.shape.dim)
    return TensorSpec(value.name, _DTYPES.get(tensor.elem_type, f"onnx type {tensor.elem_type}"), shape)
