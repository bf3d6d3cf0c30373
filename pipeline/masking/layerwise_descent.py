"""The search behind layer-wise masks: descent over the patterns of a row's groups, one and two at a time, with restarts.

For a row w, let `e` hold the dropped weights (zero where kept) and v = H e. The row's error is e H e = e.v. With all other
groups fixed, group g under a pattern that drops e_g contributes 2 e_g.r + e_g H_gg e_g, where r = v_g - H_gg e_g(current)
is what the other groups contribute to v_g. Only the M x M block H_gg is needed, so pricing all patterns of a group is
cheap. For two groups at once, 2 e_g H_gh e_h is added. When a pattern changes, `v` is updated by the rows of H of the
weights that changed, at O(D) each; it is never recomputed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.masking.compiled import compiled

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# Smallest decrease that counts as a gain, as a fraction of the row's energy sum(w_i^2 H_ii). Smaller differences are
# rounding of the float32 moments; accepting them could make the descent cycle.
_NO_GAIN = 1e-9
# Every accepted step lowers the error, so a row settles after about ten passes; the limit guards against cycles by rounding.
_MAX_ROUNDS = 1000
# Groups that get random patterns at a restart: one, and some that it is coupled to. Changes of one group, or of two coupled
# ones, would mostly be undone by the next descent.
_RESTARTED = 3
# Knuth's MMIX generator: a row's draws depend on its seed alone, whichever thread runs it.
_MULTIPLIER, _INCREMENT = 6364136223846793005, 1442695040888963407


@compiled
def descend(
    rows: Floats,
    moment: npt.NDArray[np.floating],
    starts: Indices,
    table: npt.NDArray[np.bool_],
    dropped: Indices,
    near: Indices,
    restarts: int,
    seed: int,
    choice: Indices,
) -> Floats:
    """Lower the error of each row until no step gains, from several starts and then from the perturbed best result.

    Args:
        rows: (K, D) float64 weights; the M members of a group are adjacent.
        moment: (D, D) second moments H, contiguous and symmetric.
        starts: (S, K, G) index into `table` for each group.
        table: (P, M) bool patterns, True is kept.
        dropped: (P, M - N) positions that each pattern drops.
        near: (G, T) groups that are tried together with each group.
        restarts: Number of restarts from the best result so far, with some groups given random patterns.
        seed: Seed of the restarts; row k uses `seed + k`.
        choice: (K, G), overwritten with the best result.

    Returns:
        (K,) float64 error of each row.
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
        min_gain = _begin(rows[k], moment, now, table, e, v)
        for trial in range(len(starts) + restarts):
            if trial < len(starts):
                # Go from the last result to this start by changing patterns: `v` is updated only where the two differ.
                for g in range(groups):
                    _take(rows[k], moment, now, table, e, v, g, starts[trial, k, g])
            else:
                e[:], v[:], now[:] = best_e, best_v, choice[k]
                _perturb(rows[k], moment, now, table, near, e, v, state)
            result = _settle(rows[k], moment, now, table, dropped, near, e, v, min_gain)
            if trial == 0 or result < error[k] - min_gain:
                error[k] = result
                best_e[:], best_v[:], choice[k] = e, v, now
    return error


@compiled
def _perturb(
    row: Floats,
    moment: npt.NDArray[np.floating],
    choice: Indices,
    table: npt.NDArray[np.bool_],
    near: Indices,
    e: Floats,
    v: Floats,
    state: npt.NDArray[np.uint64],
) -> None:
    """Give a group, and some groups that it is coupled to, random patterns."""
    first = _random_below(state, len(choice))
    _take(row, moment, choice, table, e, v, first, _random_below(state, len(table)))
    for _ in range(_RESTARTED - 1):
        g = near[first, _random_below(state, near.shape[1])] if near.shape[1] > 0 else _random_below(state, len(choice))
        _take(row, moment, choice, table, e, v, g, _random_below(state, len(table)))


@compiled
def _random_below(state: npt.NDArray[np.uint64], below: int) -> int:
    """The next number of a linear congruential generator, in [0, below)."""
    # The low bits of such a generator have short periods: the result is taken from the high ones.
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
    """Fill `e` and `v` for the given patterns; returns the smallest gain that counts for this row."""
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
    min_gain: float,
) -> float:
    """Descend by single groups until none gains, then by pairs, and repeat; returns the final error."""
    groups, m = len(choice), table.shape[1]
    count = len(table)
    r, s = np.empty(m), np.empty(m)
    costs, others = np.empty(count), np.empty(count)
    changed = True
    for _ in range(_MAX_ROUNDS):
        if not changed:
            break
        changed = False
        # Cycle through the groups until a whole cycle changes nothing: cheap single steps first, pairs only when they stall.
        unchanged, g = 0, 0
        for _ in range(_MAX_ROUNDS * groups):
            if unchanged == groups:
                break
            best = _best_single(row, moment, dropped, e, v, g, r, costs)
            if costs[best] < costs[choice[g]] - min_gain:
                _take(row, moment, choice, table, e, v, g, best)
                unchanged = 0
            else:
                unchanged += 1
            g = g + 1 if g + 1 < groups else 0
        for g in range(groups):
            for t in range(near.shape[1]):
                h = near[g, t]
                p, q = _best_pair(row, moment, choice, dropped, e, v, g, h, r, s, costs, others, min_gain)
                if p != choice[g] or q != choice[h]:
                    _take(row, moment, choice, table, e, v, g, p)
                    _take(row, moment, choice, table, e, v, h, q)
                    changed = True
    error = 0.0
    for j in range(len(row)):
        error += e[j] * v[j]
    return error


@compiled
def _best_single(
    row: Floats,
    moment: npt.NDArray[np.floating],
    dropped: Indices,
    e: Floats,
    v: Floats,
    g: int,
    r: Floats,
    costs: Floats,
) -> int:
    """Price every pattern of group g given all other groups, into `costs`; returns the cheapest."""
    m = len(r)
    at = g * m
    # r: what the other groups contribute to v_g, that is v_g without the group's own share.
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
    """Fill `costs` with 2 e_g.r + e_g H_gg e_g for each pattern of the group that starts at column `at`."""
    for p in range(len(dropped)):
        cost = 0.0
        for a in range(dropped.shape[1]):
            i = dropped[p, a]
            # H_gg is symmetric: each pair of dropped weights is visited once and counted twice.
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
    min_gain: float,
) -> tuple[int, int]:
    """The cheapest pair of patterns of groups g and h given all others; their current patterns if no pair gains."""
    m = len(r)
    at, to = g * m, h * m
    # As in `_best_single`, but without the shares of both groups.
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
        # s is free again: now it holds H_gh e_h, what group h under pattern q contributes to group g.
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
    if best < now - min_gain:
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
    """Give group g pattern p, and update `e` and `v`."""
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
    # Rows of the symmetric H serve as its columns, because rows are contiguous.
    for j in range(len(v)):
        v[j] += factor * column[j]
