"""What rules for operators have in common: the call they are given, and what happens to channels that meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from maskplan.pipeline.permutation.axes import Channels, Places, Value

Result = Value | list[Value | None]

FIXED_VALUES = "it meets values that cannot move"
LIES_OTHERWISE = "it meets channels that lie otherwise"


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


def joined(channels: Channels, values: Sequence[Value], shape: tuple[int, ...]) -> Value:
    """What broadcast values give: channels that meet move together; those that meet anything else are held."""
    values = [aligned(value, len(shape)) for value in values]
    found: dict[tuple[int, ...], Places] = {}
    for value in values:
        for places in value.places:
            for other in values:
                if other is not value:
                    meet(channels, places, other)
            found.setdefault(places.dims, places)
    # Channels that meet others along some dimensions only are held, and one of them stands for all.
    kept: list[Places] = []
    for dims, places in found.items():
        if not any(set(dims) & set(p.dims) for p in kept):
            kept.append(places)
    constant = frozenset(d for d in range(len(shape)) if all(not v.varies(d) for v in values))
    return Value(shape, tuple(kept), constant)


def apart(channels: Channels, value: Value) -> Value:
    """Of channels that come to lie along one dimension, as those of a flattened outer product, only the first can move."""
    kept: list[Places] = []
    for places in value.places:
        if any(set(p.dims) & set(places.dims) for p in kept):
            channels.hold(places, LIES_OTHERWISE)
        else:
            kept.append(places)
    return value if len(kept) == len(value.places) else Value(value.shape, tuple(kept), value.constant)


def meet(channels: Channels, places: Places, other: Value) -> None:
    """Channels meet another tensor, place by place as broadcasting has it: they are tied to its own, or held."""
    dims = set(places.dims)
    for each in other.places:
        if each.dims == places.dims:
            channels.tie(places, each)
            dims -= set(each.dims)
        elif dims & set(each.dims):
            for held in (places, each):
                channels.hold(held, LIES_OTHERWISE)
            dims -= set(each.dims)
    if any(other.varies(d) for d in dims):
        channels.hold(places, FIXED_VALUES)


def aligned(value: Value, dims: int) -> Value:
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


def hold_all(channels: Channels, value: Value, why: str) -> None:
    """Hold all channels of a tensor."""
    for places in value.places:
        channels.hold(places, why)


def hold_beyond(channels: Channels, value: Value, dims: set[int], why: str) -> None:
    """Hold channels that vary along other dimensions than these."""
    for places in value.places:
        if set(places.dims) - dims:
            channels.hold(places, why)


def moved_to(places: Places, dim: int, dims: int) -> Places:
    """Channels along one dimension of one tensor as those along another of another."""
    return places.rearranged(lambda p: p.reshape([-1 if d == dim else 1 for d in range(dims)]))


def spread(vector: Value, dim: int, dims: int) -> Value:
    """A vector as a tensor that varies along one dimension."""
    shape = tuple(vector.shape[0] if d == dim else 1 for d in range(dims))
    return Value(shape, tuple(moved_to(p, dim, dims) for p in vector.places))


def unknown(channels: Channels, call: Call) -> Result:
    """The rule for operators without one: what they read stays where it is."""
    for value in call.tensors():
        hold_all(channels, value, f"the operator {call.name} is not known")
    return Value(call.shape)
