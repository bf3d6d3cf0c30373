"""External data: tensors that an ONNX file stores in other files, and loading them into the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from maskplan.exporters.subgraphs import model_nodes, subgraphs
from maskplan.exporters.tensors import TensorError, external_path
from maskplan.pipeline.core.errors import InputError

# Protobuf's limit for one message.
_MAX_BYTES = 2**31 - 1


def stored_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model: initializers and attributes, including those in subgraphs and functions."""
    yield from model.graph.initializer
    for node in model_nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for graph in subgraphs(node):
            yield from graph.initializer


def external_tensors(model: onnx.ModelProto) -> list[TensorProto]:
    """Those of `stored_tensors` whose values are stored in another file."""
    return [tensor for tensor in stored_tensors(model) if tensor.data_location == TensorProto.EXTERNAL]


def locate_external(tensor: TensorProto, folder: Path) -> tuple[Path, int, int]:
    """File, offset and length in bytes of an external tensor.

    Raises:
        InputError: The file is outside `folder`, missing, or too short.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        path = external_path(entries.get("location", ""), folder)
        available = path.stat().st_size
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", available - offset))
        if offset < 0 or length < 0 or offset + length > available:
            raise TensorError(f"the tensor ends at byte {offset + length} of {path.name}, which has {available}")
    except (TensorError, ValueError) as error:
        raise InputError("external data cannot be read", where=tensor.name, found=error) from error
    return path, offset, length


def load_external_data(model: onnx.ModelProto, folder: Path, *, where: object) -> None:
    """Read all external data into the model, in place.

    Raises:
        InputError: Data cannot be read, or does not fit into one ONNX file.
    """
    places = [(tensor, *locate_external(tensor, folder)) for tensor in external_tensors(model)]
    total = model.ByteSize() + sum(length for *_, length in places)
    if total > _MAX_BYTES:
        raise InputError(
            "the weights do not fit into one ONNX file",
            where=where,
            found=f"{total / 1e9:.1f} GB; the format allows 2 GB",
            fix="build with --backend tensorrt, whose engines have no such limit",
        )
    for tensor, path, offset, length in places:
        with path.open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(length)
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
