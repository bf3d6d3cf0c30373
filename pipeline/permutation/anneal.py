"""One chain of annealed column swaps, compiled. `search.py` prepares its arrays and compares its results.

Why a swap is cheap: let `rival` be, for one column and row, the n-th largest of the *other* columns of its group. With
another column in its place the group keeps the same n - 1 others and the larger of `rival` and the newcomer. So what a
column would add to a group is one maximum and one addition a row, whatever n and m are, and only the two groups of an
accepted swap are sorted again. These values are cached until the group changes, as most proposals involve unchanged groups.

Functions take arrays one by one: numba adjusts the reference count of each array of a tuple at each call, which costs more
than a proposal. The order of summation is free, so the last bits depend on the processor's vector units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from numba import float32, int64, uint64

from maskplan.pipeline.masking.compiled import compiled

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
_F = TypeVar("_F", bound=Callable[..., Any])

# Gains below this share of what the two columns add are rounding.
_ROUNDING = 1e-6
# log(u) for u uniform in (0, 1): the loss that a proposal may cause, in units of the temperature.
_LOGS = np.log((np.arange(4096) + 0.5) / 4096).astype(np.float32)


def _compiled(function: _F) -> _F:
    # Scores are finite, so that a maximum need not handle NaN; sums may be taken in any order.
    return compiled(function, fastmath=frozenset({"reassoc", "contract", "nsz", "nnan"}))


class State(NamedTuple):
    """A chain's arrays, which compiled functions change in place.

    Attributes:
        x: (C, R), the columns, contiguous, in [0, 1].
        rival: (C, R), see the module's text.
        own: (C,), what a column adds at its current place.
        added: (C, C), what column j would add in the place of column i, negative where unknown; (1, 1) if there is no table.
        order: (C,), the columns, group after group.
        place: (C,), the inverse.
        group: (C,), each column's group.
        random: (1,), the generator's state, never zero.
    """

    x: Floats
    rival: Floats
    own: Floats
    added: Floats
    order: Integers
    place: Integers
    group: Integers
    random: npt.NDArray[np.uint64]


def start(x: Floats, order: Integers, n: int, m: int, seed: int, *, table: bool) -> State:
    """The state of a chain that starts from `order`."""
    columns = len(order)
    state = State(
        x,
        np.empty_like(x),
        np.empty(columns, np.float32),
        np.full((columns, columns) if table else (1, 1), -1, np.float32),
        order.copy(),
        np.argsort(order),
        np.argsort(order) // m,
        np.array([seed | 1], np.uint64),
    )
    _sort_groups(state.x, state.rival, state.own, state.order, n, m)
    return state


@_compiled
def descend(
    x: Floats,
    rival: Floats,
    own: Floats,
    added: Floats,
    order: Integers,
    place: Integers,
    group: Integers,
    random: npt.NDArray[np.uint64],
    n: int,
    m: int,
) -> int:
    """Visit every pair of columns once, swap if that gains, and return the number of swaps."""
    swaps = 0
    for i in range(len(order)):
        for j in range(i):
            if group[i] != group[j]:
                before = own[i] + own[j]
                after = _added(x, rival, added, i, j) + _added(x, rival, added, j, i)
                if after - before > float32(_ROUNDING) * after:
                    _swap(x, rival, own, added, order, place, group, i, j, n, m)
                    swaps += 1
    return swaps


@_compiled
def sampled_losses(
    x: Floats,
    rival: Floats,
    own: Floats,
    added: Floats,
    order: Integers,
    place: Integers,
    group: Integers,
    random: npt.NDArray[np.uint64],
    count: int,
) -> Floats:
    """The losses of random swaps; infinite for swaps within a group and for those without a loss."""
    losses = np.full(count, np.inf, np.float32)
    for k in range(count):
        i, j, _ = _draw(random, len(order))
        if group[i] != group[j]:
            before = own[i] + own[j]
            loss = before - _added(x, rival, added, i, j) - _added(x, rival, added, j, i)
            if loss > float32(_ROUNDING) * before:
                losses[k] = loss
    return losses


@_compiled
def anneal(
    x: Floats,
    rival: Floats,
    own: Floats,
    added: Floats,
    order: Integers,
    place: Integers,
    group: Integers,
    random: npt.NDArray[np.uint64],
    best: Integers,
    lead: float,
    steps: int,
    temperature: float,
    n: int,
    m: int,
) -> float:
    """Propose random swaps, `steps` of them, at one temperature, which is in units of the gain.

    `best` (C,) is the best order so far, overwritten by a better one; `lead` is what the current order keeps above it,
    and its new value is returned. The other arguments are the state, and n and m.
    """
    warmth, known = float32(temperature), added.shape[0] > 1
    for step in range(steps):
        i, j, chance = _draw(random, len(order))
        if group[i] != group[j]:
            # `_added` inlined, as its call would cost more than the rest of most steps.
            here, there = (added[i, j], added[j, i]) if known else (float32(-1), float32(-1))
            if here < 0:
                here = _sum_of_larger(rival[i], x[j])
                if known:
                    added[i, j] = here
            if there < 0:
                there = _sum_of_larger(rival[j], x[i])
                if known:
                    added[j, i] = there
            gain = here - own[i] + there - own[j]
            if gain > warmth * _LOGS[chance]:
                _swap(x, rival, own, added, order, place, group, i, j, n, m)
                lead += gain
        if lead > 0 and step % len(order) == 0:
            best[:] = order
            lead = 0.0
    return lead


@_compiled
def _sort_groups(x: Floats, rival: Floats, own: Floats, order: Integers, n: int, m: int) -> None:
    for group in range(len(order) // m):
        _sort_group(x, rival, own, order[group * m : group * m + m], n)


@_compiled
def _added(x: Floats, rival: Floats, added: Floats, i: int, j: int) -> Any:
    """What column j adds in the place of column i, from the table if there is one."""
    if added.shape[0] == 1:
        return _sum_of_larger(rival[i], x[j])
    known = added[i, j]
    if known < 0:
        known = _sum_of_larger(rival[i], x[j])
        added[i, j] = known
    return known


@_compiled
def _sum_of_larger(a: Floats, b: Floats) -> Any:
    total = float32(0)
    for r in range(len(a)):
        total += a[r] if a[r] > b[r] else b[r]
    return total


@_compiled
def _swap(
    x: Floats,
    rival: Floats,
    own: Floats,
    added: Floats,
    order: Integers,
    place: Integers,
    group: Integers,
    i: int,
    j: int,
    n: int,
    m: int,
) -> None:
    order[place[i]], order[place[j]] = j, i
    place[i], place[j] = place[j], place[i]
    group[i], group[j] = group[j], group[i]
    for which in (group[i], group[j]):
        columns = order[which * m : which * m + m]
        _sort_group(x, rival, own, columns, n)
        if added.shape[0] > 1:
            for column in columns:
                added[column] = float32(-1)


@_compiled
def _sort_group(x: Floats, rival: Floats, own: Floats, columns: Integers, n: int) -> None:
    """Recompute `rival` and `own` of a group's columns."""
    if n == 2 and len(columns) == 4:
        _rivals_2to4(x, rival, columns)
    else:
        _rivals(x, rival, columns, n)
    for column in columns:
        own[column] = _sum_of_larger(rival[column], x[column])


@_compiled
def _rivals_2to4(x: Floats, rival: Floats, columns: Integers) -> None:
    a, b, c, d = x[columns[0]], x[columns[1]], x[columns[2]], x[columns[3]]
    ra, rb, rc, rd = rival[columns[0]], rival[columns[1]], rival[columns[2]], rival[columns[3]]
    for r in range(x.shape[1]):
        p, q, u, v = a[r], b[r], c[r], d[r]
        # Only choices between two values, which the compiler turns into vectorized minima and maxima.
        high, low = p if p > q else q, q if p > q else p
        other_high, other_low = u if u > v else v, v if u > v else u
        low_of_highs = high if high < other_high else other_high
        high_of_lows = low if low > other_low else other_low
        second = low_of_highs if low_of_highs > high_of_lows else high_of_lows
        third = low_of_highs if low_of_highs < high_of_lows else high_of_lows
        ra[r] = third if p >= second else second
        rb[r] = third if q >= second else second
        rc[r] = third if u >= second else second
        rd[r] = third if v >= second else second


@_compiled
def _rivals(x: Floats, rival: Floats, columns: Integers, n: int) -> None:
    m = len(columns)
    falling = np.empty(m, np.float32)
    for r in range(x.shape[1]):
        for k in range(m):
            value = x[columns[k], r]
            at = k
            while at > 0 and falling[at - 1] < value:
                falling[at] = falling[at - 1]
                at -= 1
            falling[at] = value
        for k in range(m):
            rival[columns[k], r] = falling[n] if x[columns[k], r] >= falling[n - 1] else falling[n - 1]


@_compiled
def _draw(random: npt.NDArray[np.uint64], count: int) -> tuple[int, int, int]:
    """Two columns, and the place of a random logarithm: three parts of one number of xorshift64*."""
    s = random[0]
    s ^= s >> uint64(12)
    s ^= s << uint64(25)
    s ^= s >> uint64(27)
    random[0] = s
    z = uint64(s * uint64(2685821657736338717))
    columns = uint64(count)
    i = (uint64(z >> uint64(38)) * columns) >> uint64(26)
    j = (uint64((z >> uint64(12)) & uint64(0x3FFFFFF)) * columns) >> uint64(26)
    return int64(i), int64(j), int64(z & uint64(4095))
