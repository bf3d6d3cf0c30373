"""Rules for layers and statistics: which channels are contracted, normalized or reduced."""

from __future__ import annotations

import numpy as np

from maskplan.pipeline.permutation.axes import Channels, Integers, Places, Value
from maskplan.pipeline.permutation.calls import (
    FIXED_VALUES,
    Call,
    Result,
    along_dim,
    broadcast,
    pin_all,
    pin_beyond,
    vector_along,
)


def convolution(channels: Channels, call: Call) -> Result:
    """`convolution` of any kind: (N, C, ...) by filters (K, C / groups, ...), or transposed (C, K / groups, ...)."""
    x, weight, bias = (call.args[name] for name in ("input", "weight", "bias"))
    groups, transposed = call.args["groups"], call.args["transposed"]
    inputs, outputs = (0, 1) if transposed else (1, 0)
    for places in weight.places:
        if len(places.dims) > 1 or places.dims[0] > 1:
            channels.pin(places, "it runs along the spatial axes of a kernel")
    pin_beyond(channels, x, {1}, "a convolution slides along it")
    result = weight.along(outputs)
    if groups == 1:
        _contract(channels, (x, 1), (weight, inputs))
    elif weight.shape[1] == 1 and groups == x.shape[1]:
        result = _depthwise(channels, x, weight)
    else:
        for each in (x.along(1), weight.along(inputs)):
            if each is not None:
                channels.pin(each, "a grouped convolution reads it")
        if result is not None and transposed:
            # Each position along this axis makes one channel in every group.
            channels.pin(result, "a transposed grouped convolution produces it")
            result = None
        elif result is not None:
            filters = weight.shape[0]
            group = np.arange(filters) // (filters // groups)
            channels.distinguish(result, group.reshape(result.channels.shape))
    made = Value(call.shape, () if result is None else (along_dim(result, 1, len(call.shape)),))
    return made if bias is None else broadcast(channels, [made, vector_along(bias, 1, len(call.shape))], call.shape)


def _depthwise(channels: Channels, x: Value, weight: Value) -> Places | None:
    """Filters of one channel each; consecutive filters of the same channel are its copies."""
    made, read = weight.along(0), x.along(1)
    if read is None:
        if made is not None:
            channels.pin(made, FIXED_VALUES)
        return made
    each = weight.shape[0] // x.shape[1]
    ids, copies = read.channels.ravel(), read.copies.ravel()
    repeated = Places(np.repeat(ids, each), (copies[:, None] * each + np.arange(each)).ravel())
    shaped = along_dim(repeated, 0, len(weight.shape))
    if made is not None:
        channels.tie(shaped, made)
    elif weight.varies(0):
        channels.pin(shaped, FIXED_VALUES)
    return shaped


def matmul(channels: Channels, call: Call) -> Result:
    """`mm`, `bmm`, `addmm` and `baddbmm`: (..., rows, inner) by (..., inner, columns)."""
    first, second = ("self", "mat2") if call.name in ("mm", "bmm") else _FACTORS[call.name]
    a, b = call.args[first], call.args[second]
    rows, inner = len(a.shape) - 2, len(a.shape) - 1
    made: list[Places] = []
    for value, own, summed in ((a, rows, inner), (b, inner, rows)):
        for places in value.places:
            if own in places.dims and summed not in places.dims:
                # Attention heads keep their channels.
                _distinguish_along(channels, places, set(places.dims) - {own})
                made.append(places)
            elif places.dims != (summed,):
                channels.pin(places, "a matrix product splits it")
    _contract(channels, (a, inner), (b, rows))
    result = Value(call.shape, tuple(made))
    if first == "self":
        return result
    return broadcast(channels, [result, call.args["self"]], call.shape)


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
            channels.pin(places, FIXED_VALUES)


def batch_norm(channels: Channels, call: Call) -> Result:
    """With running statistics, or over all dimensions but the second."""
    x = call.args["input"]
    if call.args.get("running_mean") is None or call.args.get("training"):
        _reduced_over(channels, x, set(range(len(x.shape))) - {1})
    parameters = [call.args.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    vectors = [vector_along(p, 1, len(x.shape)) for p in parameters if p is not None]
    return [broadcast(channels, [x, *vectors], x.shape), None, None]


def layer_norm(channels: Channels, call: Call) -> Result:
    """Over the last dimensions."""
    x = call.args["input"]
    count = len(call.args["normalized_shape"])
    _reduced_over(channels, x, set(range(len(x.shape) - count, len(x.shape))))
    parameters = [call.args[name] for name in ("weight", "bias") if call.args[name] is not None]
    return [broadcast(channels, [x, *parameters], x.shape), None, None]


def group_norm(channels: Channels, call: Call) -> Result:
    """Over all channels, or in groups that keep theirs."""
    x, groups = call.args["input"], call.args["group"]
    for places in x.places:
        if groups > 1 and 1 in places.dims:
            channels.distinguish(places, _coordinates(places, {1}) // (x.shape[1] // groups))
    parameters = [call.args[name] for name in ("weight", "bias") if call.args[name] is not None]
    vectors = [vector_along(p, 1, len(x.shape)) for p in parameters]
    return [broadcast(channels, [x, *vectors], x.shape), None, None]


def softmax(channels: Channels, call: Call) -> Result:
    """Along one dimension."""
    x: Value = call.args["self"]
    _reduced_over(channels, x, {call.args["dim"] % len(x.shape)})
    return x


def _reduced_over(channels: Channels, x: Value, dims: set[int]) -> None:
    """Statistics are taken over `dims`, separately for each position along the others."""
    for places in x.places:
        own = set(places.dims)
        if own & dims:
            _distinguish_along(channels, places, own - dims)


def _distinguish_along(channels: Channels, places: Places, dims: set[int]) -> None:
    """Forbid swaps between channels at different positions along these dimensions."""
    if dims:
        channels.distinguish(places, _coordinates(places, dims))


def reduce(channels: Channels, call: Call) -> Result:
    """Sums, means and extremes. The second result of `max` and `min` is indices, which depend on the order of channels."""
    if "other" in call.args:  # `max` and `min` of two tensors
        return broadcast(channels, call.tensors(), call.shape)
    x = call.args["self"]
    given = call.args.get("dim")
    listed = [] if given is None else [given] if isinstance(given, int) else list(given)
    dims = {d % len(x.shape) for d in listed} or set(range(len(x.shape)))
    _reduced_over(channels, x, dims)
    keep = bool(call.args.get("keepdim", False))
    left = []
    for places in x.places:
        if not set(places.dims) & dims:
            left.append(places if keep else places.rearranged(lambda p: p.squeeze(tuple(dims))))
        elif call.name in _POSITIONS or (call.name in ("max", "min") and 1 in call.used):
            channels.pin(places, "its index is a result")
    made = Value(call.shape, tuple(left))
    return [made, made] if call.name in ("max", "min", "var_mean") and given is not None else made


_POSITIONS = ("argmax", "argmin")


def pooling(channels: Channels, call: Call) -> Result:
    """Channels pass through; the trailing, spatial dimensions are pooled or interpolated."""
    x, *others = call.tensors()
    for other in others:
        pin_all(channels, other, "it is used as an index")
    spatial = next(int(c) for c in call.name if c.isdigit())
    first = len(x.shape) - spatial
    pin_beyond(channels, x, set(range(first)), "it is pooled or interpolated")
    passed = tuple(p for p in x.places if max(p.dims) < first)
    made = Value(call.shape, passed)
    return [made, made] if call.name in _WITH_INDICES else made


_WITH_INDICES = ("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d")


def _coordinates(places: Places, dims: set[int]) -> Integers:
    """A number for each place that encodes its position along these dimensions."""
    shape = places.channels.shape
    number = np.zeros(shape, np.int64)
    for d in sorted(dims):
        number = number * shape[d] + np.arange(shape[d]).reshape([-1 if i == d else 1 for i in range(len(shape))])
    return number
