"""The search behind layer-wise masks: descent over the patterns of a row's groups, one and two at a time, with restarts.

Of a row w, with `e` what is dropped of it and `v` = H e, the error is e.v. What group g adds under a pattern, all others
as they are, needs only its own block of H and what they bring there, r = v_g - H_gg e_g: with e_g the dropped weights,
2 e_g.r + e_g H_gg e_g. Of two groups at once there is 2 e_g H_gh e_h besides. A change updates `v` by the rows of H of what
changed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.masking.compiled import compiled

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# What counts as a gain, as a share of the row's energy; below it lies the rounding of float32 moments.
_NO_GAIN = 1e-9
# Passes over a row end by themselves, after some ten, where the moments are symmetric; of others they might run in a circle.
_MOST_ROUNDS = 1000
# Groups thrown over at a restart: one, and some of those it is coupled to.
_KICKED = 3
_MULTIPLIER, _INCREMENT = 6364136223846793005, 1442695040888963407


@compiled
def descend(
    rows: Floats,
    moment: npt.NDArray[np.floating],
    starts: Indices,
    table: npt.NDArray[np.bool_],
    dropped: Indices,
    near: Indices,
    kicks: int,
    seed: int,
    choice: Indices,
) -> Floats:
    """Lower the error of each row until no step gains, from several starts and again from the best of their ends.

    Args:
        rows: (K, D) weights, groups of M side by side.
        moment: (D, D), contiguous.
        starts: (S, K, G) index into `table` of each group.
        table: (P, M) patterns, True is kept.
        dropped: (P, M - N) what each pattern drops.
        near: (G, T) groups that are tried together with each.
        kicks: How often to start again from the best so far with some groups thrown over.
        seed: Of these; a row's own is added.
        choice: (K, G), filled with the best end.

    Returns:
        (K,) error of each row.
    """
    count, d = rows.shape
    groups = choice.shape[1]
    now = np.empty(groups, np.int64)
    e, v, best_e, best_v = np.empty(d), np.empty(d), np.empty(d), np.empty(d)
    error, state = np.empty(count), np.empty(1, np.uint64)
    for k in range(count):
        state[0] = seed + k
        error[k] = np.inf
        now[:] = starts[0, k]
        least = _begin(rows[k], moment, now, table, e, v)
        for trial in range(len(starts) + kicks):
            if trial < len(starts):
                # From where the last start ended: what the two share need not be summed anew.
                for g in range(groups):
                    _take(rows[k], moment, now, table, e, v, g, starts[trial, k, g])
            else:
                e[:], v[:], now[:] = best_e, best_v, choice[k]
                _kick(rows[k], moment, now, table, near, e, v, state)
            found = _settle(rows[k], moment, now, table, dropped, near, e, v, least)
            if trial == 0 or found < error[k] - least:
                error[k] = found
                best_e[:], best_v[:], choice[k] = e, v, now
    return error


@compiled
def _kick(
    row: Floats,
    moment: npt.NDArray[np.floating],
    choice: Indices,
    table: npt.NDArray[np.bool_],
    near: Indices,
    e: Floats,
    v: Floats,
    state: npt.NDArray[np.uint64],
) -> None:
    """Give a group, and some of those it is coupled to, patterns drawn at random."""
    first = _drawn(state, len(choice))
    _take(row, moment, choice, table, e, v, first, _drawn(state, len(table)))
    for _ in range(_KICKED - 1):
        g = near[first, _drawn(state, near.shape[1])] if near.shape[1] > 0 else _drawn(state, len(choice))
        _take(row, moment, choice, table, e, v, g, _drawn(state, len(table)))


@compiled
def _drawn(state: npt.NDArray[np.uint64], below: int) -> int:
    """The next number of a linear congruential generator, from 0 to below `below`."""
    state[0] = state[0] * np.uint64(_MULTIPLIER) + np.uint64(_INCREMENT)
    return int(np.int64((state[0] >> np.uint64(33)) % np.uint64(below)))


@compiled
def _begin(
    row: Floats,
    moment: npt.NDArray[np.floating],
    choice: Indices,
    table: npt.NDArray[np.bool_],
    e: Floats,
    v: Floats,
) -> float:
    """Fill `e` and `v`; the least gain that counts."""
    m = table.shape[1]
    energy = 0.0
    v[:] = 0
    for j in range(len(row)):
        energy += row[j] * row[j] * moment[j, j]
        e[j] = 0.0 if table[choice[j // m], j % m] else row[j]
        if e[j] != 0:
            _add(v, moment[j], e[j])
    return _NO_GAIN * max(energy, 0.0)


@compiled
def _settle(
    row: Floats,
    moment: npt.NDArray[np.floating],
    choice: Indices,
    table: npt.NDArray[np.bool_],
    dropped: Indices,
    near: Indices,
    e: Floats,
    v: Floats,
    least: float,
) -> float:
    """Descend by single groups until none gains, then by pairs, and again; the error at the end."""
    groups, m = len(choice), table.shape[1]
    count = len(table)
    r, s = np.empty(m), np.empty(m)
    costs, others = np.empty(count), np.empty(count)
    changed = True
    for _ in range(_MOST_ROUNDS):
        if not changed:
            break
        changed = False
        quiet, g = 0, 0
        for _ in range(_MOST_ROUNDS * groups):
            if quiet == groups:
                break
            best = _best(row, moment, dropped, e, v, g, r, costs)
            if costs[best] < costs[choice[g]] - least:
                _take(row, moment, choice, table, e, v, g, best)
                quiet = 0
            else:
                quiet += 1
            g = g + 1 if g + 1 < groups else 0
        for g in range(groups):
            for t in range(near.shape[1]):
                h = near[g, t]
                p, q = _best_pair(row, moment, choice, dropped, e, v, g, h, r, s, costs, others, least)
                if p != choice[g] or q != choice[h]:
                    _take(row, moment, choice, table, e, v, g, p)
                    _take(row, moment, choice, table, e, v, h, q)
                    changed = True
    error = 0.0
    for j in range(len(row)):
        error += e[j] * v[j]
    return error


@compiled
def _best(
    row: Floats,
    moment: npt.NDArray[np.floating],
    dropped: Indices,
    e: Floats,
    v: Floats,
    g: int,
    r: Floats,
    costs: Floats,
) -> int:
    """What each pattern of a group costs beside all other groups; the cheapest."""
    m = len(r)
    at = g * m
    for i in range(m):
        r[i] = v[at + i]
        for j in range(m):
            r[i] -= moment[at + i, at + j] * e[at + j]
    _price(row, moment, dropped, at, r, costs)
    best = 0
    for p in range(1, len(costs)):
        if costs[p] < costs[best]:
            best = p
    return best


@compiled
def _price(row: Floats, moment: npt.NDArray[np.floating], dropped: Indices, at: int, r: Floats, costs: Floats) -> None:
    """2 e_g.r + e_g H_gg e_g of each pattern."""
    for p in range(len(dropped)):
        cost = 0.0
        for a in range(dropped.shape[1]):
            i = dropped[p, a]
            inner = 2 * r[i] + moment[at + i, at + i] * row[at + i]
            for b in range(a):
                j = dropped[p, b]
                inner += 2 * moment[at + i, at + j] * row[at + j]
            cost += row[at + i] * inner
        costs[p] = cost


@compiled
def _best_pair(
    row: Floats,
    moment: npt.NDArray[np.floating],
    choice: Indices,
    dropped: Indices,
    e: Floats,
    v: Floats,
    g: int,
    h: int,
    r: Floats,
    s: Floats,
    costs: Floats,
    others: Floats,
    least: float,
) -> tuple[int, int]:
    """The cheapest patterns of two groups beside all others; those that they have, if none gains."""
    m = len(r)
    at, to = g * m, h * m
    for i in range(m):
        r[i], s[i] = v[at + i], v[to + i]
        for j in range(m):
            r[i] -= moment[at + i, at + j] * e[at + j] + moment[at + i, to + j] * e[to + j]
            s[i] -= moment[to + i, to + j] * e[to + j] + moment[to + i, at + j] * e[at + j]
    _price(row, moment, dropped, at, r, costs)
    _price(row, moment, dropped, to, s, others)
    now, best = 0.0, np.inf
    p_best, q_best = choice[g], choice[h]
    for q in range(len(others)):
        # What group h under q brings to group g.
        for i in range(m):
            s[i] = 0
            for b in range(dropped.shape[1]):
                j = dropped[q, b]
                s[i] += moment[at + i, to + j] * row[to + j]
        for p in range(len(costs)):
            cost = costs[p] + others[q]
            for a in range(dropped.shape[1]):
                i = dropped[p, a]
                cost += 2 * row[at + i] * s[i]
            if p == choice[g] and q == choice[h]:
                now = cost
            if cost < best:
                best, p_best, q_best = cost, p, q
    if best < now - least:
        return p_best, q_best
    return choice[g], choice[h]


@compiled
def _take(
    row: Floats,
    moment: npt.NDArray[np.floating],
    choice: Indices,
    table: npt.NDArray[np.bool_],
    e: Floats,
    v: Floats,
    g: int,
    p: int,
) -> None:
    """Give a group a pattern."""
    m = table.shape[1]
    choice[g] = p
    for i in range(m):
        j = g * m + i
        new = 0.0 if table[p, i] else row[j]
        if new != e[j]:
            _add(v, moment[j], new - e[j])
            e[j] = new


@compiled
def _add(v: Floats, column: npt.NDArray[np.floating], factor: float) -> None:
    for j in range(len(v)):
        v[j] += factor * column[j]
