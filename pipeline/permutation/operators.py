"""What each ATen operator does with channels: one rule for a kind of operator, by name.

A rule takes the operator's arguments by name, tensors as `Value`, and gives its result as `Value`, or several. It ties
channels that must move together, and holds those whose move the operator would notice. Operators without a rule hold all
that they read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.permutation.axes import Channels, Integers, Places, Value

Result = Value | list[Value | None]

FIXED_VALUES = "it meets values that cannot move"


@dataclass(frozen=True)
class Call:
    """One operator in the network.

    Attributes:
        name: Without overload: `convolution`.
        args: By the names of the operator's schema; tensors as `Value`.
        shape: Of the result, or of its first tensor.
        used: Which results are used, where there are several.
        same_layout: The result has the shape and strides of the first argument.
    """

    name: str
    args: dict[str, Any]
    shape: tuple[int, ...]
    used: frozenset[int]
    same_layout: bool

    def tensors(self) -> list[Value]:
        found = []
        for value in self.args.values():
            for each in value if isinstance(value, list | tuple) else (value,):
                if isinstance(each, Value):
                    found.append(each)
        return found


Rule = Callable[[Channels, Call], Result]


def follow(channels: Channels, call: Call, pointwise: bool) -> Result:
    """Apply the rule for an operator; `pointwise` if it works element by element."""
    rule = RULES.get(call.name, _elementwise if pointwise else _unknown)
    return rule(channels, call)


def _unknown(channels: Channels, call: Call) -> Result:
    for value in call.tensors():
        _hold_all(channels, value, f"the operator {call.name} is not known")
    return Value(call.shape)


def _uniform(channels: Channels, call: Call) -> Result:
    return Value(call.shape, constant=frozenset(range(len(call.shape))))


# Element by element.


def _elementwise(channels: Channels, call: Call) -> Result:
    return _joined(channels, call.tensors(), call.shape)


def _joined(channels: Channels, values: Sequence[Value], shape: tuple[int, ...]) -> Value:
    """What broadcast values give: channels that meet move together; those that meet anything else are held."""
    values = [_aligned(value, len(shape)) for value in values]
    found: dict[tuple[int, ...], Places] = {}
    for value in values:
        for places in value.places:
            for other in values:
                if other is not value:
                    _meet(channels, places, other)
            found.setdefault(places.dims, places)
    # Channels that meet others along some dimensions only are held, and one of them stands for all.
    kept: list[Places] = []
    for dims, places in found.items():
        if not any(set(dims) & set(p.dims) for p in kept):
            kept.append(places)
    constant = frozenset(d for d in range(len(shape)) if all(not v.varies(d) for v in values))
    return Value(shape, tuple(kept), constant)


def _meet(channels: Channels, places: Places, other: Value) -> None:
    dims = set(places.dims)
    for each in other.places:
        if each.dims == places.dims:
            channels.tie(places, each)
            dims -= set(each.dims)
        elif dims & set(each.dims):
            for held in (places, each):
                channels.hold(held, "it meets channels that lie otherwise")
            dims -= set(each.dims)
    if any(other.varies(d) for d in dims):
        channels.hold(places, FIXED_VALUES)


def _aligned(value: Value, dims: int) -> Value:
    """Leading dimensions of length 1, as broadcasting adds them."""
    added = dims - len(value.shape)
    if added == 0:
        return value
    leading = (1,) * added
    return Value(
        leading + value.shape,
        tuple(p.rearranged(lambda x: x.reshape(leading + x.shape)) for p in value.places),
        frozenset(d + added for d in value.constant),
    )


# Layers.


def _convolution(channels: Channels, call: Call) -> Result:
    x, weight, bias = (call.args[name] for name in ("input", "weight", "bias"))
    groups, transposed = call.args["groups"], call.args["transposed"]
    inputs, outputs = (0, 1) if transposed else (1, 0)
    for places in weight.places:
        if len(places.dims) > 1 or places.dims[0] > 1:
            channels.hold(places, "it runs over positions of a kernel")
    _hold_beyond(channels, x, {1}, "a convolution runs over it")
    result = weight.along(outputs)
    if groups == 1:
        _contract(channels, (x, 1), (weight, inputs))
    elif not transposed and weight.shape[1] == 1 and groups == x.shape[1]:
        result = _depthwise(channels, x, weight)
    else:
        for each in (x.along(1), weight.along(inputs)):
            if each is not None:
                channels.hold(each, "a grouped convolution reads it")
        if result is not None and transposed:
            channels.hold(result, "a transposed grouped convolution makes it")
        elif result is not None:
            filters = weight.shape[0]
            group = np.arange(filters) // (filters // groups)
            channels.tell_apart(result, group.reshape(result.channels.shape))
    if result is None:
        return Value(call.shape)
    made = Value(call.shape, (_moved_to(result, 1, len(call.shape)),))
    return made if bias is None else _joined(channels, [made, _spread(bias, 1, len(call.shape))], call.shape)


def _depthwise(channels: Channels, x: Value, weight: Value) -> Places | None:
    """Filters of one channel each: several in a row for the same one are its copies."""
    made, read = weight.along(0), x.along(1)
    if made is None:
        return None
    if read is None:
        channels.hold(made, FIXED_VALUES)
        return made
    each = weight.shape[0] // x.shape[1]
    ids, copies = read.channels.ravel(), read.copies.ravel()
    repeated = Places(np.repeat(ids, each), (copies[:, None] * each + np.arange(each)).ravel())
    shaped = repeated.rearranged(lambda x: x.reshape(made.channels.shape))
    channels.tie(shaped, made)
    return shaped


def _matmul(channels: Channels, call: Call) -> Result:
    """`mm`, `bmm`, `addmm` and `baddbmm`: (..., rows, inner) by (..., inner, columns)."""
    first, second = ("self", "mat2") if call.name in ("mm", "bmm") else _FACTORS[call.name]
    a, b = call.args[first], call.args[second]
    inner_a, inner_b = len(a.shape) - 1, len(b.shape) - 2
    for value, inner, own in ((a, inner_a, inner_a - 1), (b, inner_b, inner_b + 1)):
        _hold_beyond(channels, value, {inner, own}, "a product takes it in parts")
        for places in value.places:
            if len(places.dims) > 1:
                channels.hold(places, "a product takes it in parts")
    _contract(channels, (a, inner_a), (b, inner_b))
    made = Value(call.shape, tuple(p for p in (a.along(inner_a - 1), b.along(inner_b + 1)) if p is not None))
    if first == "self":
        return made
    return _joined(channels, [made, call.args["self"]], call.shape)


_FACTORS = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2")}


def _contract(channels: Channels, one: tuple[Value, int], other: tuple[Value, int]) -> None:
    """Two tensors are multiplied and summed along a dimension of each."""
    for (value, dim), (against, along) in ((one, other), (other, one)):
        places, met = value.along(dim), against.along(along)
        if places is None:
            continue
        if met is not None:
            channels.tie(places.rearranged(np.ravel), met.rearranged(np.ravel))
        elif against.varies(along):
            channels.hold(places, FIXED_VALUES)


# Statistics.


def _batch_norm(channels: Channels, call: Call) -> Result:
    x = call.args["input"]
    if "running_mean" not in call.args:
        _within(channels, x, set(range(len(x.shape))) - {1})
    parameters = [call.args.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    spread = [_spread(p, 1, len(x.shape)) for p in parameters if p is not None]
    return [_joined(channels, [x, *spread], x.shape), None, None]


def _layer_norm(channels: Channels, call: Call) -> Result:
    x = call.args["input"]
    count = len(call.args["normalized_shape"])
    _within(channels, x, set(range(len(x.shape) - count, len(x.shape))))
    parameters = [call.args[name] for name in ("weight", "bias") if call.args[name] is not None]
    return [_joined(channels, [x, *parameters], x.shape), None, None]


def _group_norm(channels: Channels, call: Call) -> Result:
    x, groups = call.args["input"], call.args["group"]
    places = x.along(1)
    if places is not None and groups > 1:
        group = np.arange(x.shape[1]) // (x.shape[1] // groups)
        channels.tell_apart(places, group.reshape(places.channels.shape))
    parameters = [call.args[name] for name in ("weight", "bias") if call.args[name] is not None]
    spread = [_spread(p, 1, len(x.shape)) for p in parameters]
    return [_joined(channels, [x, *spread], x.shape), None, None]


def _softmax(channels: Channels, call: Call) -> Result:
    x: Value = call.args["self"]
    _within(channels, x, {call.args["dim"] % len(x.shape)})
    return x


def _within(channels: Channels, x: Value, dims: set[int]) -> None:
    """Statistics are taken over some dimensions, apart for each place along the others."""
    for places in x.places:
        own = set(places.dims)
        if own & dims and own - dims:
            channels.tell_apart(places, _coordinates(places, own - dims))


def _reduce(channels: Channels, call: Call) -> Result:
    """Sums, means and extremes; of pairs such as `max`, the second tells positions, which notice where channels lie."""
    x = call.args["self"]
    given = call.args.get("dim")
    listed = [] if given is None else [given] if isinstance(given, int) else list(given)
    dims = {d % len(x.shape) for d in listed} or set(range(len(x.shape)))
    _within(channels, x, dims)
    keep = bool(call.args.get("keepdim", False))
    left = []
    for places in x.places:
        if not set(places.dims) & dims:
            left.append(places if keep else places.rearranged(lambda p: p.squeeze(tuple(dims))))
        elif call.name in _POSITIONS or (call.name in ("max", "min") and 1 in call.used):
            channels.hold(places, "its position is an output")
    made = Value(call.shape, tuple(left))
    return [made, made] if call.name in ("max", "min", "var_mean") and given is not None else made


_POSITIONS = ("argmax", "argmin")


def _pooling(channels: Channels, call: Call) -> Result:
    """Channels pass; dimensions behind them are pooled or interpolated."""
    x, *others = call.tensors()
    for other in others:
        _hold_all(channels, other, "it tells positions")
    spatial = next(int(c) for c in call.name if c.isdigit())
    first = len(x.shape) - spatial
    _hold_beyond(channels, x, set(range(first)), "positions are pooled or interpolated")
    passed = tuple(p for p in x.places if max(p.dims) < first)
    made = Value(call.shape, passed)
    return [made, made] if call.name in _WITH_INDICES else made


_WITH_INDICES = ("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d")


# Movements of data.


def _same(channels: Channels, call: Call) -> Result:
    return next(iter(call.tensors()))


def _permute(channels: Channels, call: Call) -> Result:
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


def _view(channels: Channels, call: Call) -> Result:
    x = call.args["self"]
    return Value(call.shape, tuple(_reshaped(channels.resolved(p), x.shape, call.shape) for p in x.places))


def _as_strided(channels: Channels, call: Call) -> Result:
    return _same(channels, call) if call.same_layout else _unknown(channels, call)


def _expand(channels: Channels, call: Call) -> Result:
    x = _aligned(call.args["self"], len(call.shape))
    grown = {d for d, size in enumerate(x.shape) if size == 1 and call.shape[d] > 1}
    return Value(call.shape, x.places, x.constant | grown)


def _repeat(channels: Channels, call: Call) -> Result:
    repeats = tuple(call.args["repeats"])
    x = _aligned(call.args["self"], len(repeats))

    def tiled(places: Places) -> Places:
        ids, copies = places.channels, places.copies
        for dim in places.dims:
            number = np.arange(repeats[dim]).reshape([-1 if d == dim else 1 for d in range(len(repeats))])
            number = np.repeat(number, ids.shape[dim], axis=dim)
            times = [repeats[dim] if d == dim else 1 for d in range(len(repeats))]
            ids, copies = np.tile(ids, times), np.tile(copies, times) * repeats[dim] + number
        return Places(ids, copies)

    return Value(call.shape, tuple(tiled(p) for p in x.places))


def _pick(channels: Channels, call: Call) -> Result:
    """`slice`, `select` and `flip`: places along one dimension are left out or turned round."""
    x = call.args["self"]
    index: list[Any] = [slice(None)] * len(x.shape)
    dims = [d % len(x.shape) for d in (call.args["dims"] if call.name == "flip" else [call.args["dim"]])]
    for d in dims:
        if call.name == "select":
            index[d] = call.args["index"]
        elif call.name == "flip":
            index[d] = slice(None, None, -1)
        else:
            index[d] = slice(call.args["start"], call.args["end"], call.args["step"])

    def picked(places: Places) -> Places:
        # Along a dimension of length 1 there is nothing to pick; `select` takes it away.
        own = [
            i if places.channels.shape[d] > 1 else 0 if isinstance(i, int) else slice(None) for d, i in enumerate(index)
        ]
        return places.rearranged(lambda p: p[tuple(own)])

    return Value(call.shape, _several(channels, [picked(p) for p in x.places]))


def _split(channels: Channels, call: Call) -> Result:
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


def _concatenate(channels: Channels, call: Call) -> Result:
    values = [v for v in call.args["tensors"] if math.prod(v.shape)]
    dim = call.args["dim"] % len(call.shape)
    for value in values:
        for places in value.places:
            if dim in places.dims and len(places.dims) > 1:
                channels.hold(places, "it is concatenated in parts")
            elif dim not in places.dims:
                for other in values:
                    if other is not value:
                        _meet(channels, places, other)
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


def _pad(channels: Channels, call: Call) -> Result:
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


def _index(channels: Channels, call: Call) -> Result:
    """Rows and columns are picked by number, as interpolation does; channels before them pass."""
    x, indices = call.args["self"], call.args["indices"]
    for index in indices:
        if index is not None:
            _hold_all(channels, index, "it tells positions")
    leading = next((d for d, index in enumerate(indices) if index is not None), len(indices))
    _hold_beyond(channels, x, set(range(leading)), "places are picked by number")
    trailing = (1,) * (len(call.shape) - leading)
    passed = [p for p in x.places if max(p.dims) < leading]
    return Value(call.shape, tuple(p.rearranged(lambda q: q.reshape(q.shape[:leading] + trailing)) for p in passed))


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


# Helpers of several rules.


def _hold_all(channels: Channels, value: Value, why: str) -> None:
    for places in value.places:
        channels.hold(places, why)


def _hold_beyond(channels: Channels, value: Value, dims: set[int], why: str) -> None:
    """Hold channels that vary along other dimensions than these."""
    for places in value.places:
        if set(places.dims) - dims:
            channels.hold(places, why)


def _moved_to(places: Places, dim: int, dims: int) -> Places:
    """Channels along one dimension of one tensor as those along another of another."""
    return places.rearranged(lambda p: p.reshape([-1 if d == dim else 1 for d in range(dims)]))


def _spread(vector: Value, dim: int, dims: int) -> Value:
    """A vector as a tensor that varies along one dimension."""
    shape = tuple(vector.shape[0] if d == dim else 1 for d in range(dims))
    return Value(shape, tuple(_moved_to(p, dim, dims) for p in vector.places))


def _coordinates(places: Places, dims: set[int]) -> Integers:
    """A number for each place that tells its position along these dimensions."""
    shape = places.channels.shape
    number = np.zeros(shape, np.int64)
    for d in sorted(dims):
        number = number * shape[d] + np.arange(shape[d]).reshape([-1 if i == d else 1 for i in range(len(shape))])
    return number


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_named(_uniform, "full full_like zeros zeros_like ones ones_like scalar_tensor new_zeros new_ones new_full"),
    # Element by element, though torch does not say so of them.
    **_named(_elementwise, "leaky_relu hardtanh elu celu selu hardswish hardsigmoid softplus threshold mish prelu"),
    **_named(_convolution, "convolution"),
    **_named(_matmul, "mm bmm addmm baddbmm"),
    **_named(_batch_norm, "_native_batch_norm_legit_no_training _native_batch_norm_legit"),
    **_named(_layer_norm, "native_layer_norm"),
    **_named(_group_norm, "native_group_norm"),
    **_named(_softmax, "_softmax _log_softmax"),
    **_named(
        _reduce, "mean sum amax amin max min prod any all var std var_mean logsumexp linalg_vector_norm argmax argmin"
    ),
    **_named(
        _pooling,
        "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d"
        " _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d"
        " upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d"
        " _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d reflection_pad2d replication_pad2d",
    ),
    **_named(_same, "clone alias detach contiguous lift_fresh_copy _to_copy to dropout"),
    **_named(_permute, "permute transpose t"),
    **_named(_view, "view _unsafe_view reshape squeeze unsqueeze"),
    **_named(_as_strided, "as_strided"),
    **_named(_expand, "expand"),
    **_named(_repeat, "repeat"),
    **_named(_pick, "slice select flip"),
    **_named(_split, "split_with_sizes"),
    **_named(_concatenate, "cat"),
    **_named(_pad, "constant_pad_nd"),
    **_named(_index, "index _unsafe_index"),
}
