"""What the rules for operators share: the description of a call, and how channels of several tensors combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from maskplan.pipeline.permutation.axes import Channels, Places, Value

Result = Value | list[Value | None]

FIXED_VALUES = "it is combined with values that cannot move"
DIFFERENT_ORDER = "it is combined with channels in a different order"


@dataclass(frozen=True)
class Call:
    """One operator in the network.

    Attributes:
        name: Name of the operator without overload, such as `convolution`.
        args: Arguments by their name in the operator's schema, defaults included; tensors as `Value`.
        shape: Shape of the result, or of the first result.
        used: Indices of the results that are used, where there are several.
        same_layout: Whether the result has the shape and strides of the first argument.
    """

    name: str
    args: dict[str, Any]
    shape: tuple[int, ...]
    used: frozenset[int]
    same_layout: bool

    def tensors(self) -> list[Value]:
        """All tensors among the arguments, in the order of the schema."""
        tensors = []
        for value in self.args.values():
            for each in value if isinstance(value, list | tuple) else (value,):
                if isinstance(each, Value):
                    tensors.append(each)
        return tensors


Rule = Callable[[Channels, Call], Result]


def broadcast(channels: Channels, values: Sequence[Value], shape: tuple[int, ...]) -> Value:
    """The result of an elementwise operator on broadcast tensors.

    Channels that are combined with channels move together; channels that are combined with anything else are pinned.
    """
    values = [with_rank(value, len(shape)) for value in values]
    by_dims: dict[tuple[int, ...], Places] = {}
    for value in values:
        for places in value.places:
            for other in values:
                if other is not value:
                    combine(channels, places, other)
            by_dims.setdefault(places.dims, places)
    # Sets of dimensions that overlap in part were pinned by `combine`, so that keeping one of them is enough.
    kept: list[Places] = []
    for dims, places in by_dims.items():
        if not any(set(dims) & set(p.dims) for p in kept):
            kept.append(places)
    constant = frozenset(d for d in range(len(shape)) if all(not v.varies(d) for v in values))
    return Value(shape, tuple(kept), constant)


def keep_disjoint(channels: Channels, value: Value) -> Value:
    """Pin all but the first of several channels along one dimension, such as those of a flattened outer product."""
    kept: list[Places] = []
    for places in value.places:
        if any(set(p.dims) & set(places.dims) for p in kept):
            channels.pin(places, DIFFERENT_ORDER)
        else:
            kept.append(places)
    return value if len(kept) == len(value.places) else Value(value.shape, tuple(kept), value.constant)


def combine(channels: Channels, places: Places, other: Value) -> None:
    """Combine channels with another tensor element by element, with broadcasting: tie them to its channels, or pin them."""
    dims = set(places.dims)
    for each in other.places:
        if each.dims == places.dims:
            channels.tie(places, each)
            dims -= set(each.dims)
        elif dims & set(each.dims):
            for clashing in (places, each):
                channels.pin(clashing, DIFFERENT_ORDER)
            dims -= set(each.dims)
    if any(other.varies(d) for d in dims):
        channels.pin(places, FIXED_VALUES)


def with_rank(value: Value, dims: int) -> Value:
    """Add leading dimensions of length 1, as broadcasting does."""
    added = dims - len(value.shape)
    if added == 0:
        return value
    leading = (1,) * added
    return Value(
        leading + value.shape,
        tuple(p.rearranged(lambda x: x.reshape(leading + x.shape)) for p in value.places),
        frozenset(d + added for d in value.constant),
    )


def pin_all(channels: Channels, value: Value, reason: str) -> None:
    """Pin all channels of a tensor."""
    for places in value.places:
        channels.pin(places, reason)


def pin_beyond(channels: Channels, value: Value, dims: set[int], reason: str) -> None:
    """Pin channels that vary along any dimension other than these."""
    for places in value.places:
        if set(places.dims) - dims:
            channels.pin(places, reason)


def along_dim(places: Places, dim: int, dims: int) -> Places:
    """One-dimensional places as those along dimension `dim` of a tensor with `dims` dimensions."""
    return places.rearranged(lambda p: p.reshape([-1 if d == dim else 1 for d in range(dims)]))


def vector_along(vector: Value, dim: int, dims: int) -> Value:
    """A vector as a tensor with `dims` dimensions that varies along `dim` only."""
    shape = tuple(vector.shape[0] if d == dim else 1 for d in range(dims))
    return Value(shape, tuple(along_dim(p, dim, dims) for p in vector.places))


def unknown(channels: Channels, call: Call) -> Result:
    """The rule for operators without a rule: pin everything that they read."""
    for value in call.tensors():
        pin_all(channels, value, f"the operator {call.name} is not supported")
    return Value(call.shape)
