"""Orders of channels that share quadruples with other groups, or fill different quadruples in the layers that read them.

ShuffleNet's shuffles and splits leave groups that occupy every second or fourth position of a layer. `search.py` handles
whole quadruples only; here the best swap of two channels is applied until no swap improves the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.permutation.axes import Integers

Floats = npt.NDArray[np.float32]

# Gains below this share of the kept magnitude are rounding.
_ROUNDING = 1e-6
# Elements that are compared per block.
_BLOCK = 1 << 22


@dataclass(frozen=True, eq=False)
class Reader:
    """A masked layer that reads a group.

    Attributes:
        name: Name of its weight.
        scores: (rows, C) float32, magnitudes of the whole layer.
        positions: (channels,) int64, the group's columns.
    """

    name: str
    scores: Floats
    positions: Integers


def descend(readers: Sequence[Reader], n: int, m: int) -> Integers:
    """An order of the group's channels that no swap of two improves: channel `order[i]` becomes channel `i`."""
    states = [_State(reader, n, m) for reader in readers]
    count = len(readers[0].positions)
    order = np.arange(count)
    min_gain = _ROUNDING * sum(float(reader.scores.sum(dtype=np.float64)) for reader in readers) / count
    # Each swap improves the result, so this ends; the limit only guards against cycles among equals that rounding causes.
    for _ in range(count**2):
        gains = np.sum([state.gains() for state in states], axis=0)
        one, other = np.unravel_index(np.argmax(gains), (count, count))
        if gains[one, other] <= min_gain:
            break
        for state in states:
            state.swap(int(one), int(other))
        order[[one, other]] = order[[other, one]]
    return order


class _State:
    """One reader with the group's columns in their current order."""

    def __init__(self, reader: Reader, n: int, m: int) -> None:
        self._scores, self._positions, self._n, self._m = reader.scores.copy(), reader.positions, n, m
        count = len(self._positions)
        # [i, j]: what the column at place j would add to the kept magnitude at place i.
        self._added = np.zeros((count, count))
        self._score(np.arange(count))

    def gains(self) -> npt.NDArray[np.float64]:
        """(count, count), the gain of each swap of two places."""
        own = np.diagonal(self._added)
        gains = self._added + self._added.T - own[:, None] - own[None, :]
        group = self._positions // self._m
        return np.where(group[:, None] == group[None, :], 0.0, gains)

    def swap(self, one: int, other: int) -> None:
        columns = self._positions[[one, other]]
        self._scores[:, columns] = self._scores[:, columns[::-1]]
        self._added[:, [one, other]] = self._added[:, [other, one]]
        group = self._positions // self._m
        self._score(np.flatnonzero(np.isin(group, group[[one, other]])))

    def _score(self, places: Integers) -> None:
        """With the n - 1 largest of the other columns, a quadruple keeps the larger of the n-th and the new column."""
        columns = self._scores[:, self._positions]
        for place in places:
            position = int(self._positions[place])
            first = position // self._m * self._m
            others = [c for c in range(first, first + self._m) if c != position]
            rival = np.sort(self._scores[:, others], axis=1)[:, -self._n]
            step = max(_BLOCK // columns.shape[1], 1)
            self._added[place] = sum(
                np.maximum(columns[i : i + step], rival[i : i + step, None]).sum(0, dtype=np.float64)
                for i in range(0, len(columns), step)
            )
