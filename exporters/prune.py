"""Pruning of an ONNX file to N:M by magnitude, or to given values. Names, metadata, opsets and functions do not change."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto

from maskplan.exporters.computed_weights import inline_functions, store_computed_weights
from maskplan.exporters.external_data import external_tensors, locate_external
from maskplan.exporters.fixed_weights import stays_dense
from maskplan.exporters.metadata import load_onnx
from maskplan.exporters.name_patterns import matching, require_matches
from maskplan.exporters.tensors import Array, StoredValues, TensorError, is_addressable, native_values, read_values
from maskplan.exporters.unseen import unseen_uses
from maskplan.exporters.weights import WeightUse, weight_nodes, weight_uses
from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import InputError, host_error, listed
from maskplan.pipeline.core.files import sha256_of, sibling, temporary_path, write_atomically
from maskplan.pipeline.masking.magnitude import keep_largest

# Alignment in bytes of tensors in an external data file, as ONNX recommends for memory mapping.
_ALIGNMENT = 4096
# Bytes copied at once.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Pruned:
    """The result of `prune_onnx`.

    Attributes:
        path: The file written.
        weights: Weights that are N:M now.
        changed: Those of them that were not before.
        zeroed: Elements set to zero.
        left_dense: Weights that could be N:M but must not be, with the reason.
    """

    path: Path
    weights: int
    changed: int
    zeroed: int
    left_dense: tuple[tuple[str, str], ...] = ()


def prune_onnx(path: Path, out: Path, pattern: Pattern, allow_dense: tuple[str, ...] = ()) -> Pruned:
    """Make every eligible weight of an ONNX file N:M by magnitude.

    Inline weights are written inline, external ones to a single data file in the folder of `out`. Weights that are computed
    from stored tensors are stored as computed first. Convolutions with fewer than 4 outputs and weights that are tables
    (`fixed_weights.py`) stay as they are.

    Args:
        path: The file to read.
        out: The file to write; may be `path` itself.
        pattern: N:M.
        allow_dense: Patterns (globs) of names of weights or nodes to leave unchanged.

    Raises:
        InputError: Not ONNX, weights that cannot be read, a weight that is used along two axes, or a pattern of
            `allow_dense` that matches nothing.
        HostError: `out` cannot be written.
    """
    model = load_onnx(path)
    return write_pruned(model, select_weights(model, path, pattern, allow_dense), path, out, pattern, {})


@dataclass(frozen=True)
class Selected:
    """The weights of a model to prune.

    Attributes:
        uses: One use of each, by the `id` of its tensor.
        left_dense: Weights that could be N:M but must not be, with the reason.
    """

    uses: dict[int, WeightUse]
    left_dense: tuple[tuple[str, str], ...]


def select_weights(
    model: onnx.ModelProto, path: Path, pattern: Pattern, allow_dense: tuple[str, ...] = (), *, inline: bool = False
) -> Selected:
    """Store the computed weights of a loaded model, in place, and choose the weights to prune.

    Args:
        model: Of `path`, as loaded.
        path: For external data and messages.
        pattern: N:M.
        allow_dense: As for `prune_onnx`.
        inline: Also inline the local functions that hold weights.

    Raises:
        InputError: As `prune_onnx`.
    """
    _require_names(model, pattern, allow_dense, path)
    if inline and any(scope.outer is None and scope.passed for _, scope, _ in weight_nodes(model, pattern.m)):
        inline_functions(model)
    store_computed_weights(model, path.parent, pattern.m)
    return Selected(*_select(model, pattern, allow_dense, path, path.parent))


def write_pruned(
    model: onnx.ModelProto,
    selected: Selected,
    path: Path,
    out: Path,
    pattern: Pattern,
    chosen: Mapping[int, Array],
) -> Pruned:
    """Write a model whose selected weights have the chosen values, or are pruned by magnitude.

    Args:
        model: Of `path`; its tensors change.
        selected: Of the same model.
        path: For external data.
        out: The file to write.
        pattern: N:M.
        chosen: Values by the `id` of the tensor, in its shape and type; N:M.

    Raises:
        InputError: A weight cannot be read.
        HostError: `out` cannot be written.
    """
    external = external_tensors(model)
    if external:
        return _prune_external(model, selected, external, path, out, pattern, chosen)
    changed, zeroed = _prune_inline(selected.uses.values(), pattern, chosen)
    write_atomically(out, model.SerializeToString())
    return Pruned(out, len(selected.uses), changed, zeroed, selected.left_dense)


def prune_model(
    model: onnx.ModelProto, pattern: Pattern, allow_dense: tuple[str, ...] = (), *, where: object = None
) -> tuple[int, int, int]:
    """As `prune_onnx`, on a parsed model without external data, in place.

    Returns:
        Weights, weights changed, elements set to zero.
    """
    _require_names(model, pattern, allow_dense, where)
    store_computed_weights(model, None, pattern.m)
    selected, _ = _select(model, pattern, allow_dense, where, None)
    return len(selected), *_prune_inline(selected.values(), pattern, {})


def _prune_inline(uses: Iterable[WeightUse], pattern: Pattern, chosen: Mapping[int, Array]) -> tuple[int, int]:
    """Weights changed, elements set to zero."""
    changed = zeroed = 0
    for use in uses:
        assert use.tensor is not None
        values, count = _pruned_values(use, pattern, None, chosen)
        if count or id(use.tensor) in chosen:
            _store(use.tensor, values)
        changed, zeroed = changed + bool(count), zeroed + count
    return changed, zeroed


def _require_names(model: onnx.ModelProto, pattern: Pattern, allow_dense: tuple[str, ...], where: object) -> None:
    """Raise unless every pattern matches a weight or node; on the model as given, before any weight is stored anew."""
    if allow_dense:
        names = [name for use in weight_uses(model, pattern.m) for name in (use.name, use.node)]
        names += [name for unseen in unseen_uses(model) for name in (unseen.name, unseen.node)]
        require_matches(allow_dense, names, "--allow-dense", where)


def _select(
    model: onnx.ModelProto, pattern: Pattern, allow_dense: tuple[str, ...], where: object, folder: Path | None
) -> tuple[dict[int, WeightUse], tuple[tuple[str, str], ...]]:
    """One use of every weight to prune, by the `id` of its tensor, and those that must stay dense, with their reasons.

    4-bit weights are skipped. A weight that one of its uses keeps dense is dense for all of them.
    """
    selected: dict[int, WeightUse] = {}
    kept: dict[int, tuple[str, str] | None] = {}
    conflicts = []
    # A list, so that no tensor's `id` is given to another one.
    uses = list(weight_uses(model, pattern.m))
    for use in uses:
        if use.reason is not None or use.tensor is None or not is_addressable(use.tensor) or id(use.tensor) in kept:
            continue
        if matching((use.name, use.node), allow_dense) is not None:
            kept[id(use.tensor)] = None
            continue
        known = selected.setdefault(id(use.tensor), use)
        if known is use and (why := _stays_dense(use, folder)) is not None:
            kept[id(use.tensor)] = use.name, why
        elif known.axis != use.axis:
            conflicts.append(f"{use.name}: axis {known.axis} for {known.node}, {use.axis} for {use.node}")
    selected = {key: use for key, use in selected.items() if key not in kept}
    conflicts = [text for text in conflicts if any(text.startswith(f"{use.name}: ") for use in selected.values())]
    left_dense = tuple(entry for entry in kept.values() if entry is not None)
    if conflicts:
        raise InputError(
            "weights are used along two axes, and pruning along one may break the other",
            where=where,
            found=listed(conflicts),
            fix="leave them dense with --allow-dense, or store them twice",
        )
    if not selected:
        raise InputError("no weight is eligible", where=where, fix="`maskplan check` shows the reasons")
    return selected, left_dense


def _stays_dense(use: WeightUse, folder: Path | None) -> str | None:
    try:
        return stays_dense(use, folder)
    except TensorError as error:
        raise InputError("a weight cannot be read", where=use.name, found=error) from error


def _pruned_values(
    use: WeightUse, pattern: Pattern, folder: Path | None, chosen: Mapping[int, Array]
) -> tuple[Array, int]:
    """A weight's chosen values, or its own with the smallest of each group set to zero, and how many became zero."""
    assert use.tensor is not None
    try:
        if id(use.tensor) in chosen:
            values = chosen[id(use.tensor)]
            return values, int(np.count_nonzero((values == 0) & (native_values(use.tensor, folder) != 0)))
        stored = read_values(use.tensor, folder)
        zero = _zero_value(use, stored, folder)
    except TensorError as error:
        raise InputError("a weight cannot be read", where=use.name, found=error) from error
    kept = keep_largest(_magnitude(stored, zero), use.axis, pattern)
    values = np.where(kept, stored.array, stored.array.dtype.type(zero))
    count = int(np.count_nonzero(~kept & (stored.array != zero)))
    if stored.negative_zero is not None:
        count -= int(np.count_nonzero(~kept & (stored.array == stored.negative_zero)))
    return values, count


def _zero_value(use: WeightUse, stored: StoredValues, folder: Path | None) -> int:
    if use.zero_point is None or stored.negative_zero is not None:
        return 0
    points = np.unique(read_values(use.zero_point.tensor, folder).array)
    if points.size != 1:
        raise TensorError("zero points differ between channels: quantize symmetrically")
    return int(points[0])


def _magnitude(stored: StoredValues, zero: int) -> Array:
    """Numbers in the order of the elements' magnitudes."""
    array = stored.array
    if stored.negative_zero is not None:
        # The bits of a float without its sign bit are in the order of its magnitude.
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
    selected: Selected,
    external: list[TensorProto],
    path: Path,
    out: Path,
    pattern: Pattern,
    chosen: Mapping[int, Array],
) -> Pruned:
    """Stream all external tensors to one new file, one tensor in memory at a time, then let the model refer to it."""
    staged = temporary_path(out, ".data")
    left, changed, zeroed = dict(selected.uses), 0, 0
    places: list[tuple[TensorProto, int, int]] = []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(staged):
            staged.unlink()
        with staged.open("xb") as file:
            for tensor in external:
                file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                start = file.tell()
                use = left.pop(id(tensor), None)
                if use is None:
                    _copy(tensor, path.parent, file)
                else:
                    values, count = _pruned_values(use, pattern, path.parent, chosen)
                    values.tofile(file)
                    changed, zeroed = changed + bool(count), zeroed + count
                places.append((tensor, start, file.tell() - start))
            file.flush()
            os.fsync(file.fileno())
        # Named by its content, so that the previous model file, until it is replaced, keeps its own data.
        data = sibling(out, f".{sha256_of(staged)[:12]}.data")
        staged.replace(data)
    except OSError as error:
        raise host_error(error, where=out) from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
    inline_changed, inline_zeroed = _prune_inline(left.values(), pattern, chosen)
    changed, zeroed = changed + inline_changed, zeroed + inline_zeroed
    for tensor, start, length in places:
        del tensor.external_data[:]
        for key, value in (("location", data.name), ("offset", str(start)), ("length", str(length))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    write_atomically(out, model.SerializeToString())
    return Pruned(out, len(selected.uses), changed, zeroed, selected.left_dense)


def _copy(tensor: TensorProto, folder: Path, file: BinaryIO) -> None:
    source, offset, left = locate_external(tensor, folder)
    with source.open("rb") as stream:
        stream.seek(offset)
        while left > 0 and (chunk := stream.read(min(_CHUNK, left))):
            file.write(chunk)
            left -= len(chunk)
