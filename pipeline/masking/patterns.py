"""How a weight is divided into the groups of N:M, and which masks a group can have. The only module that knows.

A *grouped* array has the shape (..., G, M): its last axis is a group. `layout="channel"` is TensorRT's: for every k, r, s an
aligned group of M along C. `layout="flat"` groups along the flattened C*R*S axis, as Danhofer (2024) does; TensorRT does not
accept that for kernels larger than 1x1, so it is for comparison only.
"""

from __future__ import annotations

import itertools
from typing import TypeVar, get_args

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.choices import CHANNEL, FLAT, Layout
from maskplan.pipeline.core.errors import InputError

Scalar = TypeVar("Scalar", bound=np.generic)

LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def parse_pattern(text: str) -> Pattern:
    """`"2:4"` to `Pattern(2, 4)`.

    Raises:
        InputError: Not of the form N:M with 1 <= N <= M <= 64.
    """
    n, colon, m = text.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal()) or not 1 <= int(n) <= int(m) <= 64:
        raise InputError(
            "not an N:M pattern",
            found=repr(text),
            fix="write at most N non-zeros in M as N:M, for example 2:4",
        )
    return Pattern(int(n), int(m))


def parse_layout(text: str) -> Layout:
    """A layout by its name.

    Raises:
        InputError: Not one of `LAYOUTS`.
    """
    for layout in LAYOUTS:
        if text == layout:
            return layout
    raise InputError(f"unknown layout {text!r}", fix=f"choose one of {', '.join(LAYOUTS)}")


def pattern_table(pattern: Pattern) -> npt.NDArray[np.bool_]:
    """All masks of one group that keep exactly N: bool (M choose N, M), in lexicographic order of kept positions."""
    kept = list(itertools.combinations(range(pattern.m), pattern.n))
    table = np.zeros((len(kept), pattern.m), dtype=np.bool_)
    for row, columns in zip(table, kept, strict=True):
        row[list(columns)] = True
    return table


def group(weight: npt.NDArray[Scalar], m: int, layout: Layout = CHANNEL, *, pad: bool = False) -> npt.NDArray[Scalar]:
    """Reshape a weight (K, C, ...) into groups, shape (..., G, M); a view where the layout allows.

    Args:
        weight: (K, C, R, S) or (K, C).
        m: Group length.
        layout: `channel` gives (K, R, S, C/M, M), and (K, C/M, M) for two axes; `flat` gives (K, C*R*S/M, M).
        pad: Fill up the last group with virtual zeros (flat layout only, not deployable).

    Raises:
        ValueError: The axis is not a multiple of `m`; the caller checks eligibility first.
    """
    if layout == CHANNEL:
        moved = np.moveaxis(weight, 1, -1)
        if moved.shape[-1] % m:
            raise ValueError(f"{moved.shape[-1]} channels are not a multiple of {m}")
        return moved.reshape(*moved.shape[:-1], moved.shape[-1] // m, m)
    flat = weight.reshape(weight.shape[0], -1)
    if pad and flat.shape[1] % m:
        flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % m)))
    if flat.shape[1] % m:
        raise ValueError(f"{flat.shape[1]} weights per filter are not a multiple of {m}")
    return flat.reshape(flat.shape[0], -1, m)


def ungroup(grouped: npt.NDArray[Scalar], shape: tuple[int, ...], layout: Layout = CHANNEL) -> npt.NDArray[Scalar]:
    """The inverse of `group`: back to a contiguous array of the weight's `shape`; padding is dropped."""
    if layout == CHANNEL:
        moved = grouped.reshape(shape[0], *shape[2:], shape[1])
        return np.ascontiguousarray(np.moveaxis(moved, -1, 1))
    length = int(np.prod(shape[1:]))
    return np.ascontiguousarray(grouped.reshape(shape[0], -1)[:, :length]).reshape(shape)


def count_violations(mask: npt.NDArray[np.bool_], pattern: Pattern, layout: Layout = CHANNEL) -> int:
    """Number of groups of a mask that keep more than N."""
    return int(np.count_nonzero(group(mask, pattern.m, layout, pad=layout == FLAT).sum(axis=-1) > pattern.n))
