"""Rules for operators that move data without changing it: channels follow their positions."""

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
    combine,
    pin_all,
    pin_beyond,
    unknown,
    with_rank,
)


def same(channels: Channels, call: Call) -> Result:
    """The result is the first tensor."""
    return next(iter(call.tensors()))


def permute(channels: Channels, call: Call) -> Result:
    """`permute`, `transpose`, `t` and `numpy_T`: dimensions in another order."""
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
    if math.prod(x.shape) != math.prod(call.shape):  # `view` as a type of another width
        return unknown(channels, call)
    return Value(call.shape, tuple(_reshaped(channels.resolved(p), x.shape, call.shape) for p in x.places))


def as_strided(channels: Channels, call: Call) -> Result:
    """Supported only where it changes nothing, such as after pooling to one position."""
    return same(channels, call) if call.same_layout else unknown(channels, call)


def expand(channels: Channels, call: Call) -> Result:
    """Dimensions of length 1 repeated."""
    x = with_rank(call.args["self"], len(call.shape))
    grown = {d for d, size in enumerate(x.shape) if size == 1 and call.shape[d] > 1}
    return Value(call.shape, x.places, x.constant | grown)


def repeat(channels: Channels, call: Call) -> Result:
    """A tensor repeated along dimensions: each repetition is a copy."""
    repeats = tuple(call.args["repeats"])
    x = with_rank(call.args["self"], len(repeats))

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
    """`slice`, `select` and `flip`: positions are left out or reversed."""
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
        # Along a dimension of length 1 there is nothing to pick; `select` removes the dimension.
        own = [
            i if places.channels.shape[d] > 1 else 0 if isinstance(i, int) else slice(None) for d, i in enumerate(taken)
        ]
        return places.rearranged(lambda p: p[tuple(own)])

    return Value(call.shape, _pin_singles(channels, [picked(p) for p in x.places]))


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
        parts.append(Value(shape, _pin_singles(channels, places)))
        start += size
    return parts


def _pin_singles(channels: Channels, picked: Sequence[Places]) -> tuple[Places, ...]:
    """Drop and pin single channels, which are no longer an axis."""
    for places in picked:
        if not places.dims:
            channels.pin(places, "it is selected individually")
    return tuple(p for p in picked if p.dims)


def concatenate(channels: Channels, call: Call) -> Result:
    """Concatenate along the channels, or along another dimension, where the channels of all parts are tied."""
    values = [v for v in call.args["tensors"] if math.prod(v.shape)]
    dim = call.args["dim"] % len(call.shape)
    for value in values:
        for places in value.places:
            if dim in places.dims and len(places.dims) > 1:
                channels.pin(places, "a concatenation splits it")
            elif dim not in places.dims:
                for other in values:
                    if other is not value:
                        combine(channels, places, other)
    by_dims: dict[tuple[int, ...], Places] = {}
    for value in values:
        for places in value.places:
            if dim not in places.dims:
                by_dims.setdefault(places.dims, places)
    if any(value.along(dim) is not None for value in values):
        parts = [value.along(dim) or channels.fresh(value.shape, dim, FIXED_VALUES) for value in values]
        by_dims[(dim,)] = _end_to_end(channels, parts, dim)
    kept: list[Places] = []
    for dims, places in by_dims.items():
        if not any(set(dims) & set(p.dims) for p in kept):
            kept.append(places)
    return Value(call.shape, tuple(kept))


def _end_to_end(channels: Channels, parts: Sequence[Places], dim: int) -> Places:
    """Concatenate places; channels that occur again become further copies."""
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
    """Constant padding: padded channels cannot move."""
    x, pads = call.args["self"], call.args["pad"]
    amounts = {len(x.shape) - 1 - i // 2: (pads[i], pads[i + 1]) for i in range(0, len(pads), 2)}
    amounts = {dim: pair for dim, pair in amounts.items() if any(pair)}
    padded = []
    for places in x.places:
        inside = set(places.dims) & set(amounts)
        if (len(places.dims) > 1 and inside) or any(min(amounts[d]) < 0 for d in inside):
            channels.pin(places, "it is padded or cropped in part")
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
    """Selection by index along some dimensions, as interpolation does; channels along the others pass through."""
    x, indices = call.args["self"], call.args["indices"]
    for each in indices:
        if each is not None:
            pin_all(channels, each, "it is used as an index")
    picked = [d for d, each in enumerate(indices) if each is not None]
    pin_beyond(channels, x, set(range(len(x.shape))) - set(picked), "it is selected by index")
    # As in NumPy: the selected dimensions come where the first index is, or first if the indices are not adjacent.
    start = picked[0] if picked[-1] - picked[0] < len(picked) else 0
    added = (1,) * (len(call.shape) - len(x.shape) + len(picked))

    def passed(ids: Integers) -> Integers:
        left = ids.squeeze(tuple(picked))
        return left.reshape(left.shape[:start] + added + left.shape[start:])

    return Value(call.shape, tuple(p.rearranged(passed) for p in x.places if not set(p.dims) & set(picked)))


def index_select(channels: Channels, call: Call) -> Result:
    """Selection by index along one dimension, as `roll` does."""
    dim = call.args["dim"] % len(call.args["self"].shape)
    indices = [None] * dim + [call.args["index"]]
    return index(channels, replace(call, args={"self": call.args["self"], "indices": indices}))


def _reshaped(places: Places, before: tuple[int, ...], after: tuple[int, ...]) -> Places:
    """The places after a reshape, which keeps the order of the elements.

    Where a dimension is merged with a dimension of channels, the positions along it become copies. Where copies are split
    into a separate dimension again, that dimension carries no channels.
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
    """The shortest runs of dimensions of two shapes that contain the same elements."""
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
