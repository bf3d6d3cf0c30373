"""The repair: magnitude N:M on an ONNX file itself. Weights change; names, metadata, opsets and functions do not."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto

from maskplan.exporters.external_data import external_tensors, place_of
from maskplan.exporters.metadata import load_onnx
from maskplan.exporters.tensors import Array, StoredValues, TensorError, is_addressable, read_values
from maskplan.exporters.weights import WeightUse, weight_uses
from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import InputError, host_error, listed
from maskplan.pipeline.core.files import TEMPORARY_SUFFIX, sha256_of, write_atomically
from maskplan.pipeline.masking.magnitude import keep_largest

# Alignment of tensors in an external data file; what ONNX recommends for mapping them.
_ALIGNMENT = 4096
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Pruned:
    """What `prune` did: weights made N:M (`changed` of them were not before), and elements set to zero."""

    path: Path
    weights: int
    changed: int
    zeroed: int


def prune_onnx(path: Path, out: Path, pattern: Pattern, allow_dense: tuple[str, ...] = ()) -> Pruned:
    """Make every eligible weight of an ONNX file N:M by magnitude.

    Inline weights are written inline; external ones into one data file beside `out`, whatever files they came from.

    Args:
        path: The file to read.
        out: The file to write; may be `path` itself.
        pattern: N:M.
        allow_dense: Patterns of names of weights to leave alone.

    Raises:
        InputError: Not ONNX, weights that cannot be read, or one weight that is used along two axes.
        HostError: `out` cannot be written.
    """
    model = load_onnx(path)
    chosen = _choose(model, pattern, allow_dense, path)
    external = external_tensors(model)
    if external:
        return _prune_external(model, chosen, external, path, out, pattern)
    pruned = prune_model(model, pattern, allow_dense, where=path)
    write_atomically(out, model.SerializeToString())
    return Pruned(out, *pruned)


def prune_model(
    model: onnx.ModelProto, pattern: Pattern, allow_dense: tuple[str, ...] = (), *, where: object = None
) -> tuple[int, int, int]:
    """As `prune_onnx`, on a parsed model without external data, in place.

    Returns:
        Weights, weights changed, elements set to zero.
    """
    changed = zeroed = 0
    chosen = _choose(model, pattern, allow_dense, where)
    for use in chosen.values():
        assert use.tensor is not None
        values, count = _pruned_values(use, pattern, None)
        if count:
            _store(use.tensor, values)
        changed, zeroed = changed + bool(count), zeroed + count
    return len(chosen), changed, zeroed


def _choose(
    model: onnx.ModelProto, pattern: Pattern, allow_dense: tuple[str, ...], where: object
) -> dict[int, WeightUse]:
    """One use of every weight that can be N:M, by the tensor's identity; weights of 4 bits are left alone."""
    chosen: dict[int, WeightUse] = {}
    conflicts = []
    for use in weight_uses(model, pattern.m):
        if use.reason is not None or use.tensor is None or not is_addressable(use.tensor):
            continue
        if any(fnmatch.fnmatchcase(use.name, glob) for glob in allow_dense):
            continue
        known = chosen.setdefault(id(use.tensor), use)
        if known.axis != use.axis:
            conflicts.append(f"{use.name}: axis {known.axis} for {known.node}, {use.axis} for {use.node}")
    if conflicts:
        raise InputError(
            "weights are used along two axes, and pruning along one may break the other",
            where=where,
            found=listed(conflicts),
            fix="leave them dense, or store them twice",
        )
    if not chosen:
        raise InputError("no weight is eligible", where=where, fix="`maskplan check` shows why")
    return chosen


def _pruned_values(use: WeightUse, pattern: Pattern, folder: Path | None) -> tuple[Array, int]:
    """A weight's values with the smallest of each group at zero, and how many that changed."""
    assert use.tensor is not None
    try:
        stored = read_values(use.tensor, folder)
        zero = _zero(use, stored, folder)
    except TensorError as error:
        raise InputError("a weight cannot be read", where=use.name, found=error) from error
    kept = keep_largest(_magnitude(stored, zero), use.axis, pattern)
    values = np.where(kept, stored.array, stored.array.dtype.type(zero))
    count = int(np.count_nonzero(~kept & (stored.array != zero)))
    if stored.negative_zero is not None:
        count -= int(np.count_nonzero(~kept & (stored.array == stored.negative_zero)))
    return values, count


def _zero(use: WeightUse, stored: StoredValues, folder: Path | None) -> int:
    if use.zero_point is None or stored.negative_zero is not None:
        return 0
    points = np.unique(read_values(use.zero_point.tensor, folder).array)
    if points.size != 1:
        raise TensorError("zero points differ from channel to channel: quantize symmetrically")
    return int(points[0])


def _magnitude(stored: StoredValues, zero: int) -> Array:
    """Something that orders elements as their magnitudes do."""
    array = stored.array
    if stored.negative_zero is not None:
        # Without its sign bit, a float's bits order it.
        bits: Array = array & np.array(stored.negative_zero - 1, array.dtype)
        return bits
    if array.dtype.kind == "f":
        return np.abs(array)
    return np.abs(array.astype(np.int64) - zero)


def _store(tensor: TensorProto, values: Array) -> None:
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(field)
    tensor.raw_data = values.tobytes()


def _prune_external(
    model: onnx.ModelProto,
    chosen: dict[int, WeightUse],
    external: list[TensorProto],
    path: Path,
    out: Path,
    pattern: Pattern,
) -> Pruned:
    """Stream all external tensors into one new file, then point the model to it; one tensor is in memory at a time."""
    staged = out.with_name(f".{out.name}.{os.getpid()}.data{TEMPORARY_SUFFIX}")
    weights, changed, zeroed = len(chosen), 0, 0
    places: list[tuple[TensorProto, int, int]] = []
    try:
        with staged.open("wb") as file:
            for tensor in external:
                file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                start = file.tell()
                use = chosen.pop(id(tensor), None)
                if use is None:
                    _copy(tensor, path.parent, file)
                else:
                    values, count = _pruned_values(use, pattern, path.parent)
                    values.tofile(file)
                    changed, zeroed = changed + bool(count), zeroed + count
                places.append((tensor, start, file.tell() - start))
            file.flush()
            os.fsync(file.fileno())
        # Named by its content: until the model is replaced, an older one still finds its own data.
        data = out.with_name(f"{out.stem}.{sha256_of(staged)[:12]}.data")
        staged.replace(data)
    except OSError as error:
        raise host_error(error, where=out) from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
    for use in chosen.values():
        assert use.tensor is not None
        values, count = _pruned_values(use, pattern, None)
        _store(use.tensor, values)
        changed, zeroed = changed + bool(count), zeroed + count
    for tensor, start, length in places:
        del tensor.external_data[:]
        for key, value in (("location", data.name), ("offset", str(start)), ("length", str(length))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    write_atomically(out, model.SerializeToString())
    return Pruned(out, weights, changed, zeroed)


def _copy(tensor: TensorProto, folder: Path, file: BinaryIO) -> None:
    source, offset, left = place_of(tensor, folder)
    with source.open("rb") as stream:
        stream.seek(offset)
        while left > 0 and (chunk := stream.read(min(_CHUNK, left))):
            file.write(chunk)
            left -= len(chunk)
