"""Rules for operators that move data and change none: channels are found again where their places went."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from maskplan.pipeline.permutation.axes import Channels, Integers, Places, Value
from maskplan.pipeline.permutation.calls import (
    FIXED_VALUES,
    Call,
    Result,
    aligned,
    hold_all,
    hold_beyond,
    meet,
    unknown,
)


def same(channels: Channels, call: Call) -> Result:
    """Nothing moves."""
    return next(iter(call.tensors()))


def permute(channels: Channels, call: Call) -> Result:
    """Dimensions in another order."""
    x = call.args["self"]
    dims = list(range(len(x.shape)))
    if call.name == "permute":
        dims = [d % len(dims) for d in call.args["dims"]]
    elif call.name == "transpose":
        a, b = (call.args[name] % len(dims) for name in ("dim0", "dim1"))
        dims[a], dims[b] = dims[b], dims[a]
    else:
        dims.reverse()
    moved = tuple(p.rearranged(lambda q: q.transpose(dims)) for p in x.places)
    return Value(call.shape, moved, frozenset(dims.index(d) for d in x.constant))


def view(channels: Channels, call: Call) -> Result:
    """The same elements in another shape."""
    x = call.args["self"]
    return Value(call.shape, tuple(_reshaped(channels.resolved(p), x.shape, call.shape) for p in x.places))


def as_strided(channels: Channels, call: Call) -> Result:
    """Known only where it changes nothing, as behind poolings to one position."""
    return same(channels, call) if call.same_layout else unknown(channels, call)


def expand(channels: Channels, call: Call) -> Result:
    """Dimensions of length 1 repeated."""
    x = aligned(call.args["self"], len(call.shape))
    grown = {d for d, size in enumerate(x.shape) if size == 1 and call.shape[d] > 1}
    return Value(call.shape, x.places, x.constant | grown)


def repeat(channels: Channels, call: Call) -> Result:
    """A tensor several times side by side: each time is a copy."""
    repeats = tuple(call.args["repeats"])
    x = aligned(call.args["self"], len(repeats))

    def tiled(places: Places) -> Places:
        ids, copies = places.channels, places.copies
        for dim in places.dims:
            number = np.arange(repeats[dim]).reshape([-1 if d == dim else 1 for d in range(len(repeats))])
            number = np.repeat(number, ids.shape[dim], axis=dim)
            times = [repeats[dim] if d == dim else 1 for d in range(len(repeats))]
            ids, copies = np.tile(ids, times), np.tile(copies, times) * repeats[dim] + number
        return Places(ids, copies)

    return Value(call.shape, tuple(tiled(p) for p in x.places))


def pick(channels: Channels, call: Call) -> Result:
    """`slice`, `select` and `flip`: places along one dimension are left out or turned round."""
    x = call.args["self"]
    taken: list[Any] = [slice(None)] * len(x.shape)
    dims = [d % len(x.shape) for d in (call.args["dims"] if call.name == "flip" else [call.args["dim"]])]
    for d in dims:
        if call.name == "select":
            taken[d] = call.args["index"]
        elif call.name == "flip":
            taken[d] = slice(None, None, -1)
        else:
            taken[d] = slice(call.args["start"], call.args["end"], call.args["step"])

    def picked(places: Places) -> Places:
        # Along a dimension of length 1 there is nothing to pick; `select` takes it away.
        own = [
            i if places.channels.shape[d] > 1 else 0 if isinstance(i, int) else slice(None) for d, i in enumerate(taken)
        ]
        return places.rearranged(lambda p: p[tuple(own)])

    return Value(call.shape, _several(channels, [picked(p) for p in x.places]))


def split(channels: Channels, call: Call) -> Result:
    """Parts of a tensor along one dimension."""
    x, dim = call.args["self"], call.args["dim"] % len(call.args["self"].shape)
    sizes = call.args["split_sizes"]
    parts: list[Value | None] = []
    start = 0
    for size in sizes:
        taken = slice(start, start + size)
        places = [
            p.rearranged(lambda q, t=taken: q[(slice(None),) * dim + (t,)]) if dim in p.dims else p for p in x.places
        ]
        shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
        parts.append(Value(shape, _several(channels, places)))
        start += size
    return parts


def _several(channels: Channels, picked: Sequence[Places]) -> tuple[Places, ...]:
    """What is left of channels after a part was taken; one that is left alone is held, for it is no axis any more."""
    for places in picked:
        if not places.dims:
            channels.hold(places, "it is used alone")
    return tuple(p for p in picked if p.dims)


def concatenate(channels: Channels, call: Call) -> Result:
    """Tensors one behind the other: along their channels, or along other dimensions, where channels are tied."""
    values = [v for v in call.args["tensors"] if math.prod(v.shape)]
    dim = call.args["dim"] % len(call.shape)
    for value in values:
        for places in value.places:
            if dim in places.dims and len(places.dims) > 1:
                channels.hold(places, "it is concatenated in parts")
            elif dim not in places.dims:
                for other in values:
                    if other is not value:
                        meet(channels, places, other)
    found: dict[tuple[int, ...], Places] = {}
    for value in values:
        for places in value.places:
            if dim not in places.dims:
                found.setdefault(places.dims, places)
    if any(value.along(dim) is not None for value in values):
        parts = [value.along(dim) or channels.fresh(value.shape, dim, FIXED_VALUES) for value in values]
        found[(dim,)] = _end_to_end(channels, parts, dim)
    kept: list[Places] = []
    for dims, places in found.items():
        if not any(set(dims) & set(p.dims) for p in kept):
            kept.append(places)
    return Value(call.shape, tuple(kept))


def _end_to_end(channels: Channels, parts: Sequence[Places], dim: int) -> Places:
    """Channels that come again get copies of their own."""
    resolved = [channels.resolved(part) for part in parts]
    seen: set[int] = set()
    copies, used = [], 0
    for part in resolved:
        own = set(part.channels.ravel().tolist())
        copies.append(part.copies + used if own & seen else part.copies)
        seen |= own
        used = max(used, int(copies[-1].max()) + 1)
    return Places(np.concatenate([p.channels for p in resolved], dim), np.concatenate(copies, dim))


def pad(channels: Channels, call: Call) -> Result:
    """Zeros around: channels of padding cannot move."""
    x, pads = call.args["self"], call.args["pad"]
    amounts = {len(x.shape) - 1 - i // 2: (pads[i], pads[i + 1]) for i in range(0, len(pads), 2)}
    amounts = {dim: pair for dim, pair in amounts.items() if any(pair)}
    padded = []
    for places in x.places:
        inside = set(places.dims) & set(amounts)
        if (len(places.dims) > 1 and inside) or any(min(amounts[d]) < 0 for d in inside):
            channels.hold(places, "it is padded or cropped in parts")
        elif inside:
            (dim,) = inside
            around = [
                channels.fresh([count if d == dim else 1 for d in range(len(x.shape))], dim, "it is padding")
                for count in amounts[dim]
            ]
            padded.append(_end_to_end(channels, [p for p in (around[0], places, around[1]) if p.channels.size], dim))
        else:
            padded.append(places)
    return Value(call.shape, tuple(padded))


def index(channels: Channels, call: Call) -> Result:
    """Places along some dimensions are picked by number, as interpolation does; channels along others pass."""
    x, indices = call.args["self"], call.args["indices"]
    for each in indices:
        if each is not None:
            hold_all(channels, each, "it tells positions")
    picked = [d for d, each in enumerate(indices) if each is not None]
    hold_beyond(channels, x, set(range(len(x.shape))) - set(picked), "places are picked by number")
    # What is picked comes where the first index is, or in front of all if dimensions lie between the indices.
    start = picked[0] if picked[-1] - picked[0] < len(picked) else 0
    added = (1,) * (len(call.shape) - len(x.shape) + len(picked))

    def passed(ids: Integers) -> Integers:
        left = ids.squeeze(tuple(picked))
        return left.reshape(left.shape[:start] + added + left.shape[start:])

    return Value(call.shape, tuple(p.rearranged(passed) for p in x.places if not set(p.dims) & set(picked)))


def index_select(channels: Channels, call: Call) -> Result:
    """The same along one dimension, as a roll of positions does."""
    dim = call.args["dim"] % len(call.args["self"].shape)
    indices = [None] * dim + [call.args["index"]]
    return index(channels, replace(call, args={"self": call.args["self"], "indices": indices}))


def _reshaped(places: Places, before: tuple[int, ...], after: tuple[int, ...]) -> Places:
    """Channels of a tensor whose elements, in their order, get another shape.

    Where other dimensions are merged with channels, the positions along them become copies. Where the copies come apart
    again into a dimension of their own, that dimension is free of channels.
    """
    ids, copies = places.channels, places.copies
    spread, shape = list(ids.shape), [1] * len(after)
    changed = False
    for old, new in _corresponding(before, after):
        if not any(ids.shape[d] > 1 for d in old):
            continue
        for d in old:
            if spread[d] != before[d]:
                position = np.arange(before[d]).reshape([-1 if i == d else 1 for i in range(len(before))])
                copies = copies * before[d] + position
                spread[d], changed = before[d], True
        for d in new:
            shape[d] = after[d]
    ids = np.broadcast_to(ids, spread).reshape(shape)
    copies = np.broadcast_to(copies, spread).reshape(shape)
    for d in range(len(shape)):
        first_ids, first = ids.take([0], d), copies.take([0], d)
        if shape[d] > 1 and (ids == first_ids).all():
            step = copies - first
            corner = step[tuple(slice(None) if i == d else slice(1) for i in range(len(shape)))]
            if (step == corner).all():
                ids, copies, changed = first_ids, first, True
    if changed:
        copies = np.unique(copies, return_inverse=True)[1].reshape(copies.shape)
    return Places(ids, copies)


def _corresponding(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions that hold the same elements in two shapes."""
    i = j = 0
    while i < len(before) or j < len(after):
        old: list[int] = []
        new: list[int] = []
        product = [1, 1]
        while True:
            if i < len(before) and (not old or product[0] < product[1]):
                old.append(i)
                product[0] *= before[i]
                i += 1
            elif j < len(after) and (not new or product[1] < product[0]):
                new.append(j)
                product[1] *= after[j]
                j += 1
            else:
                break
        yield old, new
