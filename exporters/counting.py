"""Counts of non-zeros in each group of a weight, at memory bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Elements of a block, which stays in the CPU cache over the passes below.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class GroupCounts:
    """Counts of one weight.

    Attributes:
        groups: Groups of M.
        violating: Groups with more than N non-zeros.
        negative_zeros: Elements that are -0.0.
        first: Index of the first element of the violating group that is stored first; None without one.
    """

    groups: int
    violating: int
    negative_zeros: int
    first: tuple[int, ...] | None


def count_groups(
    values: npt.NDArray[Any],
    axis: int,
    n: int,
    m: int,
    zero: npt.NDArray[Any] | None = None,
    negative_zero: int | None = None,
    *,
    until_violation: bool = False,
) -> GroupCounts:
    """Count the groups of `m` along `axis` that have more than `n` non-zeros.

    Args:
        values: Of any shape and numeric type; floats that NumPy lacks as unsigned integers of their bits.
        axis: Reduction axis, not negative; its length is a multiple of `m`.
        n: Non-zeros allowed in a group.
        m: Elements of a group.
        zero: The value that represents zero, broadcast against `values`; 0 by default. NaN is never zero, -0.0 always.
        negative_zero: The bits of -0.0, if `values` holds bits.
        until_violation: Stop at the first block with a violation, for callers that need no counts.
    """
    shape = values.shape
    outer, length, inner = int(np.prod(shape[:axis])), shape[axis], int(np.prod(shape[axis + 1 :]))
    stored = values.reshape(outer, length, inner)
    zeros = None if zero is None else np.broadcast_to(zero, shape).reshape(outer, length, inner)
    floating = values.dtype.kind == "f"
    violating = negative_zeros = 0
    first: tuple[int, ...] | None = None
    for rows, columns in _blocks(outer, length, inner, m):
        block = stored[rows, columns]
        nonzero = block != (0 if zeros is None else zeros[rows, columns])
        if negative_zero is not None:
            negative = block == negative_zero
            nonzero &= ~negative
            negative_zeros += int(np.count_nonzero(negative))
        elif floating:
            negative_zeros += _negative_zeros(block)
        too_many = _group_sums(nonzero, m) > n
        count = int(np.count_nonzero(too_many))
        if count and first is None:
            a, g, b = (int(i) for i in np.unravel_index(np.argmax(too_many), too_many.shape))
            flat = ((rows.start + a) * length + columns.start + g * m) * inner + b
            first = tuple(int(i) for i in np.unravel_index(flat, shape))
        violating += count
        if count and until_violation:
            break
    return GroupCounts(values.size // m, violating, negative_zeros, first)


def _blocks(outer: int, length: int, inner: int, m: int) -> Iterator[tuple[slice, slice]]:
    """Slices that cut (outer, length, inner) into blocks of whole groups, of about `_BLOCK` elements, in storage order."""
    if length * inner <= _BLOCK:
        step = max(_BLOCK // max(length * inner, 1), 1)
        for start in range(0, outer, step):
            yield slice(start, min(start + step, outer)), slice(0, length)
        return
    step = max(_BLOCK // (inner * m), 1) * m
    for row in range(outer):
        for start in range(0, length, step):
            yield slice(row, row + 1), slice(start, min(start + step, length))


def _group_sums(nonzero: npt.NDArray[np.bool_], m: int) -> npt.NDArray[np.uint8]:
    """Non-zeros of each group: (rows, length, inner) to (rows, length / m, inner)."""
    rows, length, inner = nonzero.shape
    bits = nonzero.view(np.uint8)
    if inner == 1 and m in (2, 4, 8) and bits.flags.c_contiguous:
        # The m flags of a group are adjacent bytes of 0 or 1: count the set bits of one word.
        words = bits.reshape(rows, length).view(f"u{m}")
        counts: npt.NDArray[np.uint8] = np.bitwise_count(words)[..., None]
        return counts
    grouped = bits.reshape(rows, length // m, m, inner)
    sums = grouped[:, :, 0] + grouped[:, :, 1] if m > 1 else grouped[:, :, 0].copy()
    for i in range(2, m):
        sums += grouped[:, :, i]
    return sums


def _negative_zeros(block: npt.NDArray[np.floating]) -> int:
    kind = f"u{block.dtype.itemsize}"
    sign = np.array(1 << (8 * block.dtype.itemsize - 1), dtype=kind)
    return int(np.count_nonzero(block.view(kind) == sign))
