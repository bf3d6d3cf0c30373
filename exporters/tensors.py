"""Stored ONNX tensors as arrays: without copies where possible, and with every size and path in the file verified."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto, numpy_helper

Array = npt.NDArray[Any]

# Floats that NumPy lacks or handles slowly: read as unsigned integers, with the bits of -0.0 (None if it does not exist).
_AS_BITS: dict[int, tuple[str, int | None, Any]] = {
    TensorProto.FLOAT16: ("<u2", 0x8000, np.float16),
    TensorProto.BFLOAT16: ("<u2", 0x8000, ml_dtypes.bfloat16),
    TensorProto.FLOAT8E4M3FN: ("u1", 0x80, ml_dtypes.float8_e4m3fn),
    TensorProto.FLOAT8E5M2: ("u1", 0x80, ml_dtypes.float8_e5m2),
    TensorProto.FLOAT8E4M3FNUZ: ("u1", None, ml_dtypes.float8_e4m3fnuz),
    TensorProto.FLOAT8E5M2FNUZ: ("u1", None, ml_dtypes.float8_e5m2fnuz),
}
_PLAIN: dict[int, str] = {
    TensorProto.FLOAT: "<f4",
    TensorProto.DOUBLE: "<f8",
    TensorProto.INT8: "i1",
    TensorProto.UINT8: "u1",
    TensorProto.INT16: "<i2",
    TensorProto.UINT16: "<u2",
    TensorProto.INT32: "<i4",
    TensorProto.UINT32: "<u4",
    TensorProto.INT64: "<i8",
    TensorProto.UINT64: "<u8",
}
# Two or more elements in each byte; onnx unpacks them.
_PACKED_BITS = {
    getattr(TensorProto, name): bits
    for name, bits in (("INT4", 4), ("UINT4", 4), ("FLOAT4E2M1", 4), ("INT2", 2), ("UINT2", 2))
    if hasattr(TensorProto, name)
}
_MAX_RANK = 32
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


class TensorError(ValueError):
    """A tensor whose values cannot be read; the message says why."""


@dataclass(frozen=True)
class StoredValues:
    """A tensor's values.

    Attributes:
        array: In the stored shape; floats of 16 and 8 bits as unsigned integers.
        negative_zero: The bits of -0.0 in such an array; None for one that holds numbers as they are.
        to_floats: Turns elements of `array` into floats.
    """

    array: Array
    negative_zero: int | None
    to_floats: Callable[[Array], npt.NDArray[np.float64]]


def dtype_name(data_type: int) -> str:
    """`float16` for `TensorProto.FLOAT16`; unknown types are returned by number."""
    try:
        return str(TensorProto.DataType.Name(data_type)).lower()
    except ValueError:
        return f"type {data_type}"


def is_numeric(tensor: TensorProto) -> bool:
    """Whether the type is numeric and supported by `read_values`."""
    return tensor.data_type in _PLAIN or tensor.data_type in _AS_BITS or tensor.data_type in _PACKED_BITS


def is_addressable(tensor: TensorProto) -> bool:
    """Whether the type is numeric and its elements are whole bytes."""
    return tensor.data_type in _PLAIN or tensor.data_type in _AS_BITS


def read_values(tensor: TensorProto, folder: Path | None) -> StoredValues:
    """A tensor's values; external data is memory-mapped, and only files inside `folder` are opened.

    Raises:
        TensorError: The size does not match the data, external data is outside `folder` or too short, or the type is not
            numeric.
    """
    shape = tuple(tensor.dims)
    if len(shape) > _MAX_RANK:
        raise TensorError(f"{len(shape)} dimensions")
    if any(d < 0 for d in shape):
        raise TensorError(f"negative dimensions {shape}")
    size = math.prod(shape)
    if tensor.HasField("segment"):
        raise TensorError("stored in segments, which no runtime reads")
    if tensor.data_type in _PACKED_BITS:
        return _packed(tensor, shape, size, folder)
    code, negative_zero, kind = _AS_BITS.get(tensor.data_type, (_PLAIN.get(tensor.data_type), None, None))
    if code is None:
        raise TensorError(f"{dtype_name(tensor.data_type)} is not numeric")
    array = _flat(tensor, np.dtype(code), size, folder).reshape(shape)
    if kind is None:
        return StoredValues(array, None, lambda a: a.astype(np.float64))
    return StoredValues(array, negative_zero, lambda a: np.ascontiguousarray(a).view(kind).astype(np.float64))


def native_values(tensor: TensorProto, folder: Path | None) -> Array:
    """A tensor's values in NumPy's own type for them, also floats of 16 and 8 bits; booleans too.

    Raises:
        TensorError: As `read_values`.
    """
    if tensor.data_type == TensorProto.BOOL and tensor.data_location != TensorProto.EXTERNAL:
        try:
            booleans: Array = numpy_helper.to_array(tensor)
            return booleans
        except (ValueError, TypeError) as error:
            raise TensorError(str(error)) from error
    stored = read_values(tensor, folder)
    kind = _AS_BITS.get(tensor.data_type, (None, None, None))[2]
    return stored.array if kind is None else np.ascontiguousarray(stored.array).view(kind).reshape(stored.array.shape)


def _flat(tensor: TensorProto, dtype: np.dtype[Any], size: int, folder: Path | None) -> Array:
    if tensor.data_location == TensorProto.EXTERNAL:
        return _external(tensor, dtype, size, folder)
    if tensor.HasField("raw_data"):
        data = tensor.raw_data
        if len(data) != size * dtype.itemsize:
            raise TensorError(f"{tuple(tensor.dims)} needs {size * dtype.itemsize} bytes, but the file has {len(data)}")
        return np.frombuffer(data, dtype)
    field = _typed_field(tensor, size)
    values = np.fromiter(field, np.dtype(type(field[0])) if size else np.float32, size)
    if tensor.data_type in _AS_BITS:
        # int32_data holds the bits of small floats.
        return values.astype(np.int64).astype(dtype)
    return values.astype(dtype)


def _typed_field(tensor: TensorProto, size: int) -> Any:
    lengths = {name: len(getattr(tensor, name)) for name in _TYPED_FIELDS}
    name = max(lengths, key=lambda n: lengths[n])
    if lengths[name] != size:
        raise TensorError(f"{tuple(tensor.dims)} needs {size} elements, but the file has {lengths[name]}")
    return getattr(tensor, name)


def _packed(tensor: TensorProto, shape: tuple[int, ...], size: int, folder: Path | None) -> StoredValues:
    needed = -(-size * _PACKED_BITS[tensor.data_type] // 8)
    inline = TensorProto()
    if tensor.data_location == TensorProto.EXTERNAL:
        inline.data_type = tensor.data_type
        inline.dims.extend(shape)
        inline.raw_data = _external(tensor, np.dtype("u1"), needed, folder).tobytes()
    else:
        inline = tensor
        if tensor.HasField("raw_data") and len(tensor.raw_data) != needed:
            raise TensorError(f"{shape} needs {needed} bytes, but the file has {len(tensor.raw_data)}")
        if not tensor.HasField("raw_data") and len(tensor.int32_data) != needed:
            raise TensorError(f"{shape} needs {needed} packed elements, but the file has {len(tensor.int32_data)}")
    try:
        unpacked = numpy_helper.to_array(inline)
    except (ValueError, TypeError, KeyError) as error:
        raise TensorError(str(error)) from error
    return StoredValues(unpacked.astype(np.float32), None, lambda a: a.astype(np.float64))


def _external(tensor: TensorProto, dtype: np.dtype[Any], size: int, folder: Path | None) -> Array:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = external_path(entries.get("location", ""), folder)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size * dtype.itemsize))
    except ValueError as error:
        raise TensorError(
            f"external data with offset {entries.get('offset')!r}, length {entries.get('length')!r}"
        ) from error
    needed = size * dtype.itemsize
    if length != needed:
        raise TensorError(f"{tuple(tensor.dims)} needs {needed} bytes, but the file declares {length}")
    available = path.stat().st_size
    if offset < 0 or offset + needed > available:
        raise TensorError(f"external data ends at byte {offset + needed} of {path.name}, which has {available}")
    if size == 0:
        return np.empty(0, dtype)
    mapped = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(needed,))
    # A plain array over the same bytes: each slice of a memmap calls into Python.
    return mapped.view(np.ndarray).view(dtype)


def external_path(location: str, folder: Path | None) -> Path:
    """The file of external data.

    Raises:
        TensorError: The file is missing or outside the model's folder, also by a symbolic link.
    """
    if folder is None:
        raise TensorError("external data without a folder to find it in: give the path, not the parsed model")
    root = folder.resolve()
    try:
        path = (root / location).resolve()
        inside = path.is_relative_to(root) and bool(location) and not Path(location).is_absolute()
        if not inside:
            raise TensorError(f"external data outside the model's folder: {location[:200]!r}")
        if not path.is_file():
            raise TensorError(f"external data {location[:200]!r} is missing")
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, TensorError):
            raise
        raise TensorError(
            f"external data at {location[:200]!r}: {getattr(error, 'strerror', None) or 'no path'}"
        ) from error
    return path
