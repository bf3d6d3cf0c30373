"""Which channel each place of a tensor belongs to, and which channels are one and the same throughout a network.

Every axis of every parameter starts with channels of its own. Operators tie them: what is added, multiplied or contracted
place by place moves together. A channel may own several places of an axis (its positions in an image that is flattened for
a head), told apart as its *copies*, by number; places with one number correspond in all channels. Two channels can change
places exactly if they own the same copies in every tensor of the network and nothing holds either of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Places:
    """The channels along some dimensions of a tensor.

    Attributes:
        channels: As many dimensions as the tensor, each of the tensor's length or, where channels do not vary, 1.
        copies: Which copy of its channel each place is; of the same shape.
    """

    channels: Integers
    copies: Integers

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions along which channels vary."""
        return tuple(d for d, size in enumerate(self.channels.shape) if size > 1)

    def rearranged(self, how: Callable[[Integers], Integers]) -> Places:
        """What a movement of data makes of it."""
        return Places(how(self.channels), how(self.copies))


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor on its way through the network, by its channels only.

    Attributes:
        shape: Of the tensor.
        places: Channels along disjoint sets of dimensions; other dimensions, such as the batch or rows, never move.
        constant: Dimensions along which the tensor is known not to vary.
    """

    shape: tuple[int, ...]
    places: tuple[Places, ...] = ()
    constant: frozenset[int] = frozenset()

    def along(self, dim: int) -> Places | None:
        """The channels that vary along this dimension alone."""
        return next((p for p in self.places if p.dims == (dim,)), None)

    def varies(self, dim: int) -> bool:
        """Whether places along a dimension may differ."""
        return self.shape[dim] > 1 and dim not in self.constant


class Channels:
    """All channels of a network: which are the same, and which are held in place and why."""

    def __init__(self) -> None:
        # A channel that is a copy of another points to it; copy 0 means that it is the other.
        self._parent: Integers = np.zeros(0, np.int64)
        self._copy: Integers = np.zeros(0, np.int64)
        # The axis that each began on, and the highest number of a copy of it so far.
        self._axis: Integers = np.zeros(0, np.int64)
        self._highest: Integers = np.zeros(0, np.int64)
        self._held: dict[int, str] = {}
        self._apart: list[tuple[Places, Integers]] = []

    def fresh(self, shape: Sequence[int], dim: int, held: str | None = None) -> Places:
        """New channels along one dimension of a tensor."""
        first, count = len(self._parent), shape[dim]
        new = np.arange(first, first + count)
        self._parent = np.concatenate([self._parent, new])
        self._copy = np.concatenate([self._copy, np.zeros(count, np.int64)])
        self._axis = np.concatenate([self._axis, np.full(count, first)])
        self._highest = np.concatenate([self._highest, np.zeros(count, np.int64)])
        lengths = [1] * len(shape)
        lengths[dim] = count
        places = Places(new.reshape(lengths), np.zeros(lengths, np.int64))
        if held is not None:
            self.hold(places, held)
        return places

    def resolved(self, places: Places) -> Places:
        """The same places by the channels that others were found to be the same as."""
        channels, copies = places.channels, places.copies
        while True:
            parents = self._parent[channels]
            if np.array_equal(parents, channels):
                return Places(channels, copies)
            step = self._copy[channels]
            # A copy of a copy has no number.
            if (nested := (step != 0) & (copies != 0)).any():
                self._hold(np.concatenate([channels[nested], parents[nested]]), "a copy of a copy of it is used")
            channels, copies = parents, np.where(step != 0, step, copies)

    def tie(self, a: Places, b: Places) -> None:
        """Two arrays of places correspond one by one from here on."""
        one, other = self.resolved(a), self.resolved(b)
        if self._highest[other.channels].max() > self._highest[one.channels].max():
            # A channel that others are copies of had better stay what they point to.
            one, other = other, one
        rows = np.stack([x.ravel() for x in (one.channels, one.copies, other.channels, other.copies)])
        into, into_copy, new, new_copy = rows = rows[:, rows[0] != rows[2]]
        # Channels of one axis, as the halves of a gate, cannot share a number.
        another = int(self._highest[into].max(initial=0)) + 1
        apart = (self._axis[into] == self._axis[new]) & (into_copy == 0) & (new_copy == 0)
        copy = np.where(apart, another, np.where(into_copy == new_copy, 0, into_copy))
        possible = (into_copy == new_copy) | (new_copy == 0)
        if possible.all() and len(np.unique(new)) == new.size and not np.isin(into, new).any():
            self._point(new, into, copy)
        else:
            for channel, number, met, met_number in rows.T.tolist():
                self._tie(channel, number, met, met_number, another)
        self._hold_unlike(a, b)

    def _hold_unlike(self, a: Places, b: Places) -> None:
        """Places of one channel correspond if their copies do: number by number, the same way for all channels."""
        a, b = self.resolved(a), self.resolved(b)
        pairs = np.unique(np.stack([a.copies.ravel(), b.copies.ravel()]), axis=1)
        if any(len(np.unique(side)) < len(side) for side in pairs):
            self._hold(a.channels[a.copies != b.copies], "copies of it meet in another order")

    def hold(self, places: Places, why: str) -> None:
        """These channels cannot move; of several reasons the first one counts."""
        self._hold(places.channels.ravel(), why)

    def tell_apart(self, places: Places, by: Integers) -> None:
        """Channels at places with different numbers cannot change places; `by` broadcasts to the places."""
        self._apart.append((places, np.broadcast_to(by, places.channels.shape)))

    def held(self) -> dict[int, str]:
        """Why channels that stand for themselves cannot move."""
        found: dict[int, str] = {}
        for channel, why in self._held.items():
            found.setdefault(self._root(channel), why)
        return found

    def signatures(self, values: Sequence[Value]) -> npt.NDArray[np.uint64]:
        """A digest for each channel of the places that it owns in these tensors; equal for those that can change places.

        Holds channels whose copies in some tensor are ambiguous.
        """
        found = np.zeros(len(self._parent), np.uint64)
        places = [p for value in values for p in value.places]
        nothing = np.zeros(1, np.int64)
        for number, (each, by) in enumerate([*((p, nothing) for p in places), *self._apart]):
            owned = self.resolved(each)
            channels, copies = owned.channels.ravel(), owned.copies.ravel()
            keys = channels * (copies.max(initial=0) + 1) + copies
            _, first, times = np.unique(keys, return_index=True, return_counts=True)
            self._hold(channels[first[times > 1]], "two of its places in a tensor cannot be told apart")
            where = np.broadcast_to(by, owned.channels.shape).ravel()
            np.add.at(found, channels, _scrambled(number, copies, where))
        return found

    def _root(self, channel: int) -> int:
        while (parent := int(self._parent[channel])) != channel:
            channel = parent
        return channel

    def _find(self, channel: int, copy: int) -> tuple[int, int]:
        while (parent := int(self._parent[channel])) != channel:
            step = int(self._copy[channel])
            if step and copy:
                self._hold(np.array([channel, parent]), "a copy of a copy of it is used")
            channel, copy = parent, step or copy
        return channel, copy

    def _tie(self, one: int, copy: int, other: int, other_copy: int, another: int) -> None:
        (one, copy), (other, other_copy) = self._find(one, copy), self._find(other, other_copy)
        if one == other:
            return
        if copy == other_copy == 0 and self._axis[one] == self._axis[other]:
            self._point(other, one, another)
        elif copy == other_copy or other_copy == 0:
            self._point(other, one, 0 if copy == other_copy else copy)
        elif copy == 0:
            self._point(one, other, other_copy)
        else:
            self._hold(np.array([one, other]), "copies of it meet in another order")

    def _point(self, new: Integers | int, into: Integers | int, copy: Integers | int) -> None:
        self._parent[new], self._copy[new] = into, copy
        self._highest[into] = np.maximum(np.maximum(self._highest[into], self._highest[new]), copy)

    def _hold(self, channels: Integers, why: str) -> None:
        for channel in channels.tolist():
            self._held.setdefault(channel, why)


def _scrambled(*numbers: int | npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Tuples of numbers to 64 bits that look random (the finalizer of splitmix64), so that sums of them tell sets apart."""
    z = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            # Signed and unsigned together would become floats.
            z = z + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return z
