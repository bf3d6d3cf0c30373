"""Search for the order of columns that keeps the most under N:M, on one matrix of scores.

Columns are channels; rows are all weights that share them. Swaps of two columns are annealed: first a plain descent, whose
local optimum determines the temperatures, then random swaps that may lose a little, then another descent. Apex instead tries
all regroupings of two or three groups at a time (Pool & Yu, NeurIPS 2021), which reaches poorer optima at a higher cost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.errors import InputError

Floats = npt.NDArray[np.floating]
Order = npt.NDArray[np.int64]

# If all pairs were proposed once: swaps accepted per column at the first temperature, and in total at the last.
_HOT, _COLD = 0.3, 2.0
# Proposals of a chain: per ordered pair of columns, the minimum and the maximum, and the maximum number of elements that
# they read. The maximum of proposals is for wide, short matrices, as of MobileNets: without it, 64 x 384 gains 1 point of
# efficacy in ten times the time.
_STEPS_PER_PAIR = 4000
_MIN_STEPS, _MAX_STEPS = 1 << 22, 1 << 26
_MAX_ELEMENTS = 1 << 35
# Rows that a chain reads; of more, it takes a sample.
_MAX_ROWS = 1 << 14
# Visits per pair of columns from which a table of their gains is worth its memory.
_MIN_VISITS_FOR_TABLE = 16
# Temperatures of a chain, and the maximum number of elements read between two checks of the time.
_PARTS = 256
_ELEMENTS_PER_PART = 1 << 27
# Elements copied per block when summing the kept magnitude.
_COPY_BLOCK = 1 << 22


@dataclass(frozen=True)
class SearchOptions:
    """How long to search, and for what.

    Attributes:
        effort: Multiplies the proposals of a chain, which `steps` derives from the size. The same effort and seed give the
            same order on the same kind of processor.
        seconds: Cool faster, to end in about this time. The result then depends on the machine's speed.
        seed: Seed of all random numbers.
        restarts: Number of chains; the best result is used. They share the machine's cores. The first starts from the
            given order.
        m: Group length.
        n: Maximum number of weights that a group keeps.
    """

    effort: float = 1.0
    seconds: float | None = None
    seed: int = 0
    restarts: int = 2
    m: int = 4
    n: int = 2


@dataclass(frozen=True)
class SearchResult:
    """An order of the columns and the magnitude that it keeps.

    Attributes:
        order: (C,), int64: `scores[:, order]` keeps `kept`. Columns ascend within groups, groups by their first column; the
            given order where none better was found.
        kept: Sum of the n largest of each m, over all rows, in float64.
        kept_before: The same in the given order.
        kept_bound: The sum of the n/m largest of each whole row, which no order can exceed.
    """

    order: Order
    kept: float
    kept_before: float
    kept_bound: float

    @property
    def efficacy(self) -> float:
        """Gain in percent of the gain of a free choice in each row, as Apex defines it; 0 where there is nothing to gain."""
        room = self.kept_bound - self.kept_before
        return 100 * (self.kept - self.kept_before) / room if room > 0 else 0.0


def search(scores: Floats, options: SearchOptions | None = None) -> SearchResult:
    """Search for an order of the columns that keeps as much as possible.

    Args:
        scores: (rows, C), not negative: magnitudes or any other importance of the weights.
        options: The defaults if None.

    Returns:
        The best order found, never worse than the given one.

    Raises:
        InputError: Scores or options that cannot be used.
    """
    options = options or SearchOptions()
    scores = np.asarray(scores)
    _require(scores, options)
    n, m = options.n, options.m
    given = np.arange(scores.shape[1])
    before, bound = kept(scores, n, m), kept(scores, scores.shape[1] // m * n, scores.shape[1])
    best = SearchResult(given, before, before, bound)
    if n == m or scores.shape[1] == m or not scores.any():
        return best
    columns = _columns(scores, options.seed)
    deadline = None if options.seconds is None else time.monotonic() + options.seconds
    for order in _in_threads(lambda chain, stop: _chain(columns, chain, options, deadline, stop), options.restarts):
        regrouped = np.sort(order.reshape(-1, m), axis=1)
        order = regrouped[np.argsort(regrouped[:, 0])].ravel()
        now = kept(scores, n, m, order)
        if now > best.kept:
            best = SearchResult(order, now, before, bound)
    return best


def kept(scores: Floats, n: int, m: int, order: Order | None = None) -> float:
    """Sum of the n largest of each m columns over all rows, exact to float64."""
    total = 0.0
    block = max(_COPY_BLOCK // scores.shape[1], 1)
    for first in range(0, len(scores), block):
        part = scores[first : first + block]
        part = (part if order is None else part[:, order]).astype(np.float64).reshape(-1, m)
        part.partition(m - n if n < m else 0, axis=1)
        total += float(part[:, m - n :].sum())
    return total


def steps(rows: int, columns: int, effort: float = 1.0) -> int:
    """Proposals of a chain: 4000 for each ordered pair of columns, from 2**22 to 2**26, but of at most 2**35 elements."""
    wanted = min(max(_STEPS_PER_PAIR * columns**2, _MIN_STEPS), _MAX_STEPS)
    return max(int(effort * min(wanted, _MAX_ELEMENTS // min(rows, _MAX_ROWS))), 1)


def _require(scores: Floats, options: SearchOptions) -> None:
    wrong = []
    if scores.ndim != 2 or not scores.size:
        wrong.append(f"scores of shape {scores.shape}, not (rows, columns) with at least one of each")
    if scores.dtype.kind not in "fiub":
        wrong.append(f"scores of type {scores.dtype}")
    elif scores.size:
        lowest, highest = float(scores.min()), float(scores.max())
        if np.isnan(lowest):
            wrong.append(f"{np.count_nonzero(np.isnan(scores))} scores that are not numbers")
        elif np.isinf(highest):
            wrong.append("infinite scores")
        if lowest < 0:
            wrong.append(f"negative scores, down to {lowest:g}")
    if not 1 <= options.n <= options.m:
        wrong.append(f"pattern {options.n}:{options.m}, where n must be from 1 to m")
    elif scores.ndim == 2 and scores.shape[1] % options.m:
        wrong.append(f"{scores.shape[1]} columns, not a multiple of {options.m}")
    if not (options.effort > 0 and np.isfinite(options.effort)):
        wrong.append(f"an effort of {options.effort}")
    if options.seconds is not None and not options.seconds > 0:
        wrong.append(f"{options.seconds} seconds")
    if options.restarts < 1:
        wrong.append(f"{options.restarts} restarts")
    if wrong:
        raise InputError(
            "cannot search for a permutation",
            found="; ".join(wrong),
            fix="give finite scores of at least 0, a multiple of m columns, n from 1 to m, and positive options",
        )


def _columns(scores: Floats, seed: int) -> npt.NDArray[np.float32]:
    """The input of chains: contiguous columns scaled to at most 1, with a sample of the rows if there are many."""
    if len(scores) > _MAX_ROWS:
        rows = np.random.default_rng(seed).choice(len(scores), _MAX_ROWS, replace=False, shuffle=False)
        scores = scores[np.sort(rows)]
    largest = max(float(scores.max()), np.finfo(np.float64).tiny)
    return np.ascontiguousarray(np.divide(scores, largest, dtype=np.float64).T, dtype=np.float32)


def _chain(
    columns: npt.NDArray[np.float32], number: int, options: SearchOptions, deadline: float | None, stop: Event
) -> Order:
    from maskplan.pipeline.permutation import anneal

    n, m = options.n, options.m
    count, rows = columns.shape
    random = np.random.default_rng((options.seed, number))
    order = np.arange(count) if number == 0 else random.permutation(count)
    total_steps = steps(rows, count, options.effort)
    table = total_steps >= _MIN_VISITS_FOR_TABLE * count**2
    state = anneal.start(columns, order, n, m, int(random.integers(1 << 62)), table=table)
    begun = time.monotonic()

    def elapsed_share() -> float:
        return 0.0 if deadline is None else (time.monotonic() - begun) / max(deadline - begun, 1e-9)

    def descend(max_rounds: int) -> None:
        for _ in range(max_rounds):
            if stop.is_set() or not anneal.descend(*state, n, m):
                break

    descend(8)
    losses = anneal.sampled_losses(*state, min(64 * count**2, 1 << 16))
    losses = losses[np.isfinite(losses)]
    if len(losses):
        hot, cold = (_temperature(losses, share) for share in (_HOT / count, _COLD / count**2))
        best, lead, done = state.order.copy(), 0.0, 0
        block = max(min(total_steps // _PARTS, _ELEMENTS_PER_PART // rows), 1)
        while done < total_steps and (cooled := max(done / total_steps, elapsed_share())) < 1 and not stop.is_set():
            share = min(block, total_steps - done)
            lead = anneal.anneal(*state, best, lead, share, hot * (cold / hot) ** cooled, n, m)
            done += share
        state = anneal.start(columns, best, n, m, 1, table=False)
        descend(4)
    return state.order


def _temperature(losses: npt.NDArray[np.float32], share: float) -> float:
    """The temperature at which this share of swaps with these losses is accepted, by bisection."""
    smallest, largest = (float(f(losses)) for f in (np.min, np.max))
    low, high = smallest / 64, largest * 64
    for _ in range(40):
        middle = (low * high) ** 0.5
        if np.exp(-losses.astype(np.float64) / middle).mean() < share:
            low = middle
        else:
            high = middle
    return high


def _in_threads(work: Callable[[int, Event], Order], count: int) -> list[Order]:
    """Run chains on all cores; an interrupt ends them."""
    stop = Event()
    if count == 1:
        return [work(0, stop)]
    with ThreadPoolExecutor(min(count, os.cpu_count() or 1), thread_name_prefix="permute") as pool:
        try:
            return list(pool.map(lambda number: work(number, stop), range(count)))
        except BaseException:
            stop.set()
            raise
