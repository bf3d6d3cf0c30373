"""Which channel each position of a tensor belongs to, and which channels are the same throughout a network.

Every axis of every parameter starts with its own channels, numbered by integers. Operators tie them: positions that are
added, multiplied or contracted with each other move together. The ties are a union-find forest over the channel numbers.

A channel may own several positions along one axis (its pixels in an image that is flattened for a head). They are its
*copies*, and are distinguished by number: positions with the same number correspond to each other in all channels.

Two channels can be swapped if and only if they own the same copies in every tensor of the network and neither is pinned.
Comparing these sets channel by channel would need a table of channels by tensors. Instead, each (tensor, copy, position
class) becomes a random-looking 64-bit tag, and a channel's signature is the sum of its tags: equal sets have equal sums, and
different sets have equal sums with a probability of about 2**-64 for each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Places:
    """Which channel, and which copy of it, each position along some dimensions of a tensor belongs to.

    Attributes:
        channels: Channel numbers; as many dimensions as the tensor, each of the tensor's length or, where channels do not
            vary, 1.
        copies: The number of the copy at each position; same shape.
    """

    channels: Integers
    copies: Integers

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions along which channels vary."""
        return tuple(d for d, size in enumerate(self.channels.shape) if size > 1)

    def rearranged(self, movement: Callable[[Integers], Integers]) -> Places:
        """The places after a movement of data."""
        return Places(movement(self.channels), movement(self.copies))


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the network, described by its channels only.

    Attributes:
        shape: Shape of the tensor.
        places: Channels along disjoint sets of dimensions; other dimensions, such as the batch or rows, never move.
        constant: Dimensions along which all values of the tensor are known to be equal.
    """

    shape: tuple[int, ...]
    places: tuple[Places, ...] = ()
    constant: frozenset[int] = frozenset()

    def along(self, dim: int) -> Places | None:
        """The channels that vary along this dimension alone."""
        return next((p for p in self.places if p.dims == (dim,)), None)

    def varies(self, dim: int) -> bool:
        """Whether values along a dimension may differ."""
        return self.shape[dim] > 1 and dim not in self.constant


class Channels:
    """All channels of a network: which are the same, which are pinned (cannot move), and for what reason."""

    def __init__(self) -> None:
        # Union-find: a channel points to the one that it was tied to. Copy 0 means that both are the same channel; any other
        # number means that this one is that copy of its parent.
        self._parent: Integers = np.zeros(0, np.int64)
        self._copy: Integers = np.zeros(0, np.int64)
        # The axis that each channel was created for, and the highest number of a copy of it so far.
        self._axis: Integers = np.zeros(0, np.int64)
        self._highest: Integers = np.zeros(0, np.int64)
        self._pinned: dict[int, str] = {}
        self._distinctions: list[tuple[Places, Integers]] = []

    def fresh(self, shape: Sequence[int], dim: int, pinned: str | None = None) -> Places:
        """Create channels along one dimension of a tensor; `pinned` is the reason reason they cannot move, if any."""
        first, count = len(self._parent), shape[dim]
        new = np.arange(first, first + count)
        self._parent = np.concatenate([self._parent, new])
        self._copy = np.concatenate([self._copy, np.zeros(count, np.int64)])
        self._axis = np.concatenate([self._axis, np.full(count, first)])
        self._highest = np.concatenate([self._highest, np.zeros(count, np.int64)])
        lengths = [1] * len(shape)
        lengths[dim] = count
        places = Places(new.reshape(lengths), np.zeros(lengths, np.int64))
        if pinned is not None:
            self.pin(places, pinned)
        return places

    def resolved(self, places: Places) -> Places:
        """The same places in terms of the representatives (roots) of tied channels."""
        channels, copies = places.channels, places.copies
        while True:
            parents = self._parent[channels]
            if np.array_equal(parents, channels):
                return Places(channels, copies)
            step = self._copy[channels]
            # Copies have one level only: a copy of a copy cannot be numbered.
            if (nested := (step != 0) & (copies != 0)).any():
                self._pin(np.concatenate([channels[nested], parents[nested]]), "a copy of a copy of it is used")
            channels, copies = parents, np.where(step != 0, step, copies)

    def tie(self, a: Places, b: Places) -> None:
        """Make two arrays of places correspond element by element: channels at the same index move together."""
        one, other = self.resolved(a), self.resolved(b)
        if self._highest[other.channels].max() > self._highest[one.channels].max():
            # The channel that already has copies stays the root, so that its copies keep their numbers.
            one, other = other, one
        rows = np.stack([x.ravel() for x in (one.channels, one.copies, other.channels, other.copies)])
        into, into_copy, new, new_copy = rows = rows[:, rows[0] != rows[2]]
        # Two channels of one axis that are tied, such as the halves of a gate, own two positions of that axis: they become
        # different copies of one channel. `another` is a number that no copy has yet.
        another = int(self._highest[into].max(initial=0)) + 1
        same_axis = (self._axis[into] == self._axis[new]) & (into_copy == 0) & (new_copy == 0)
        copy = np.where(same_axis, another, np.where(into_copy == new_copy, 0, into_copy))
        possible = (into_copy == new_copy) | (new_copy == 0)
        if possible.all() and len(np.unique(new)) == new.size and not np.isin(into, new).any():
            self._point(new, into, copy)
        else:
            for channel, number, met, met_number in rows.T.tolist():
                self._tie(channel, number, met, met_number, another)
        self._pin_mismatched(a, b)

    def _pin_mismatched(self, a: Places, b: Places) -> None:
        """Pin channels whose copies do not correspond number by number, in the same way for all channels."""
        a, b = self.resolved(a), self.resolved(b)
        pairs = np.unique(np.stack([a.copies.ravel(), b.copies.ravel()]), axis=1)
        if any(len(np.unique(side)) < len(side) for side in pairs):
            self._pin(a.channels[a.copies != b.copies], "copies of it are combined in a different order")

    def pin(self, places: Places, reason: str) -> None:
        """Keep these channels in place; the first reason given is the one reported."""
        self._pin(places.channels.ravel(), reason)

    def distinguish(self, places: Places, by: Integers) -> None:
        """Forbid swaps between channels at places with different numbers; `by` broadcasts to the places."""
        self._distinctions.append((places, np.broadcast_to(by, places.channels.shape)))

    def pinned(self) -> dict[int, str]:
        """The reason for each pinned channel, by its root."""
        reasons: dict[int, str] = {}
        for channel, reason in self._pinned.items():
            reasons.setdefault(self._root(channel), reason)
        return reasons

    def signatures(self, values: Sequence[Value]) -> npt.NDArray[np.uint64]:
        """For each channel, a 64-bit digest of the positions that it owns in these tensors; equal ones can be swapped.

        Pins channels that own two positions of a tensor with the same copy number.
        """
        digests = np.zeros(len(self._parent), np.uint64)
        places = [p for value in values for p in value.places]
        nothing = np.zeros(1, np.int64)
        for number, (each, by) in enumerate([*((p, nothing) for p in places), *self._distinctions]):
            owned = self.resolved(each)
            channels, copies = owned.channels.ravel(), owned.copies.ravel()
            keys = channels * (copies.max(initial=0) + 1) + copies
            _, first, times = np.unique(keys, return_index=True, return_counts=True)
            self._pin(channels[first[times > 1]], "two of its positions in a tensor cannot be distinguished")
            where = np.broadcast_to(by, owned.channels.shape).ravel()
            np.add.at(digests, channels, _random_tags(number, copies, where))
        return digests

    def _root(self, channel: int) -> int:
        while (parent := int(self._parent[channel])) != channel:
            channel = parent
        return channel

    def _find(self, channel: int, copy: int) -> tuple[int, int]:
        while (parent := int(self._parent[channel])) != channel:
            step = int(self._copy[channel])
            if step and copy:
                self._pin(np.array([channel, parent]), "a copy of a copy of it is used")
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
            self._pin(np.array([one, other]), "copies of it are combined in a different order")

    def _point(self, new: Integers | int, into: Integers | int, copy: Integers | int) -> None:
        self._parent[new], self._copy[new] = into, copy
        self._highest[into] = np.maximum(np.maximum(self._highest[into], self._highest[new]), copy)

    def _pin(self, channels: Integers, reason: str) -> None:
        for channel in channels.tolist():
            self._pinned.setdefault(channel, reason)


def _random_tags(*numbers: int | npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Hash tuples of numbers to 64 random-looking bits (the finalizer of splitmix64); sums of such tags identify sets."""
    z = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            # NumPy would promote int64 with uint64 to float64.
            z = z + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return z
