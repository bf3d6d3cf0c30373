"""maskplan's record inside an ONNX file, and the description of a file on disk."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from pipeline.artifacts import OnnxModel, Provenance, TensorSpec
from pipeline.errors import InputError
from pipeline.files import read_bytes, sha256_of
from pipeline.records import decode, encode
from pipeline.weights import METADATA_KEY

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


def load_onnx(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file; tensors in external files stay there.

    Raises:
        InputError: The file is missing or is not ONNX.
    """
    return parse_onnx(read_bytes(path), path)


def parse_onnx(data: bytes, path: Path) -> onnx.ModelProto:
    """Parse the bytes of an ONNX file.

    Raises:
        InputError: They are not ONNX.
    """
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own errors differ between its implementations
        raise InputError(
            "not an ONNX file", where=path, found=str(error).partition("\n")[0], fix="give a .onnx file"
        ) from error
    if not model.graph.node:
        raise InputError("not an ONNX file", where=path, found="no nodes", fix="give a whole .onnx file")
    if not model.opset_import:
        raise InputError("not a whole ONNX file", where=path, found="no opset", fix="export or copy it again")
    return model


def describe_onnx(path: Path, model: onnx.ModelProto | None = None) -> OnnxModel:
    """The record of an ONNX file, ours or another tool's.

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


def precision_of(model: onnx.ModelProto) -> str:
    """`int8` with Q/DQ, else `fp16` when most weights are half precision, else `fp32`."""
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return "int8"
    sizes = {"fp16": 0, "fp32": 0}
    for tensor in model.graph.initializer:
        kind = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.FLOAT: "fp32"}.get(tensor.data_type)
        if kind:
            size = 1
            for length in tensor.dims:
                size *= length
            sizes[kind] += size
    return "fp16" if sizes["fp16"] > sizes["fp32"] else "fp32"


def write_provenance(model: onnx.ModelProto, provenance: Provenance) -> None:
    """Put the record into the file's metadata, in place of one that is there."""
    others = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(others)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(encode(provenance), sort_keys=True)


def read_provenance(model: onnx.ModelProto, where: object) -> Provenance | None:
    """The record that maskplan wrote, or None.

    Raises:
        InputError: There is one, and it cannot be read.
    """
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            try:
                return decode(Provenance, json.loads(entry.value))
            except ValueError as error:
                raise InputError(
                    "the ONNX file's metadata cannot be read", where=where, found=error, fix="export it again"
                ) from error
    return None


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return TensorSpec(value.name, _DTYPES.get(tensor.elem_type, f"onnx type {tensor.elem_type}"), shape)
