"""The mean drop of several seeds of one network, with an interval over seeds and images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy.stats import t

FEWEST = 3
"""A mean of fewer seeds is not shown."""


def mean_drop(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """The mean of the drops and its 95% interval.

    Seeds are independent, but all are measured on the same images. So the half width over seeds (Student's t) shrinks with
    their number, the mean half width over images does not; both are added as squares.

    Args:
        rows: `drop` and `drop_ci95` of each seed, at least two.
    """
    drops = [row["drop"] for row in rows]
    over_seeds = float(t.ppf(0.975, len(drops) - 1)) * statistics.stdev(drops) / math.sqrt(len(drops))
    over_images = statistics.fmean((row["drop_ci95"][1] - row["drop_ci95"][0]) / 2 for row in rows)
    mean, half = statistics.fmean(drops), math.hypot(over_seeds, over_images)
    return mean, mean - half, mean + half


def mean_lines(runs: Sequence[Mapping[str, Any]], key: Sequence[str], rows: Sequence[str]) -> Iterator[str]:
    """A line of a table for each group of runs that differ in their seed only, and each of these rows."""
    groups: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(tuple(run[k] for k in key), {})[run["seed"]] = run
    for of_group, by_seed in groups.items():
        known = [row for row in rows if all(row in run["rows"] for run in by_seed.values())]
        for row in known if len(by_seed) >= FEWEST else ():
            found = [by_seed[seed]["rows"][row] for seed in sorted(by_seed)]
            mean, low, high = mean_drop(found)
            each = ", ".join(f"{r['drop']:+.2f}" for r in found)
            yield f"| {' | '.join(map(str, of_group))} | {row} | {each} | {mean:+.2f} | {low:+.2f} to {high:+.2f} |"
