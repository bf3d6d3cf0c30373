"""Lazy loading: parse an ONNX file without reading its weights.

Protobuf copies every byte of a file twice. Here it parses only the bytes that describe the graph: each large inline tensor
is replaced by a reference to external data whose file is the ONNX file itself, and `tensors.read_values` maps that into
memory when the values are needed. The field numbers below are those of onnx.proto3.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx

from maskplan.exporters.metadata import load_onnx, parse_onnx
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.files import readable

_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_TENSOR_RAW_DATA, _TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 9, 13, 14
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# In bytes; a reference to a smaller tensor costs more than the tensor.
_MIN_LAZY_BYTES = 4096

_Field = tuple[int, int, int, int]


class _NotProtobufError(Exception):
    """The bytes are not a protobuf message."""


def load_lazily(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file; its large weights stay on disk, as external data in the file itself.

    The references are valid as long as the file does not change.

    Raises:
        InputError: The file is missing or is not ONNX.
    """
    try:
        path.name.encode()
    except UnicodeEncodeError:
        # The name of the file is not UTF-8, and ONNX cannot refer to it.
        return load_onnx(path)
    with readable(path), path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                data = bytes(_slim_model(view, path.name))
        except ValueError as error:  # mmap refuses an empty file
            raise InputError("not an ONNX file", where=path, found="an empty file", fix="give a .onnx file") from error
        except _NotProtobufError as error:
            raise InputError("not an ONNX file", where=path, found=error, fix="give a complete .onnx file") from error
    return parse_onnx(data, path)


def _slim_model(view: mmap.mmap, name: str) -> bytearray:
    slim = bytearray()
    for number, start, content, end in _fields(view, 0, len(view)):
        if number == _MODEL_GRAPH:
            _append(slim, _MODEL_GRAPH, _slim_graph(view, content, end, name))
        else:
            slim += view[start:end]
    return slim


def _slim_graph(view: mmap.mmap, start: int, end: int, name: str) -> bytearray:
    slim = bytearray()
    for number, first, content, last in _fields(view, start, end):
        if number == _GRAPH_INITIALIZER and last - content >= _MIN_LAZY_BYTES:
            _append(slim, _GRAPH_INITIALIZER, _slim_tensor(view, content, last, name))
        else:
            slim += view[first:last]
    return slim


def _slim_tensor(view: mmap.mmap, start: int, end: int, name: str) -> bytes | bytearray:
    fields = list(_fields(view, start, end))
    raw = [(content, last) for number, _, content, last in fields if number == _TENSOR_RAW_DATA]
    is_external = any(abs(number) in (_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION) for number, *_ in fields)
    if is_external or len(raw) != 1 or raw[0][1] - raw[0][0] < _MIN_LAZY_BYTES:
        whole: bytes = view[start:end]
        return whole
    slim = bytearray()
    for number, first, _, last in fields:
        if number != _TENSOR_RAW_DATA:
            slim += view[first:last]
    reference = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    content, last = raw[0]
    for key, value in (("location", name), ("offset", str(content)), ("length", str(last - content))):
        entry = reference.external_data.add()
        entry.key, entry.value = key, value
    # Protobuf merges concatenated messages: the reference adds its fields to the tensor.
    merged: bytearray = slim + reference.SerializeToString()
    return merged


def _fields(view: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    """Yield (number, first byte, first byte of the content, end) for each field of a message."""
    at = start
    while at < end:
        first = at
        tag, at = _varint(view, at, end)
        kind = tag & 7
        content = at
        if kind == _VARINT:
            _, at = _varint(view, at, end)
        elif kind == _LENGTH:
            length, content = _varint(view, at, end)
            at = content + length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise _NotProtobufError(f"wire type {kind} at byte {first}")
        if at > end:
            raise _NotProtobufError(f"the field at byte {first} ends after its message")
        # Only length-delimited fields hold graphs, tensors or data; the numbers of all others are negated.
        yield (tag >> 3 if kind == _LENGTH else -(tag >> 3)), first, content, at


def _varint(view: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise _NotProtobufError(f"an unterminated number at byte {at}")


def _append(slim: bytearray, number: int, content: bytes | bytearray) -> None:
    slim.append(number << 3 | _LENGTH)
    length = len(content)
    while length >= 0x80:
        slim.append(length & 0x7F | 0x80)
        length >>= 7
    slim.append(length)
    slim += content
