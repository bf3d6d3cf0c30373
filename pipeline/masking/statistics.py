"""What masks look like: which patterns their groups have, and where they depart from magnitude.

A group's pattern is written as a digit a weight, 1 where it is kept: `1100` keeps the first two of four.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.choices import CHANNEL, FLAT
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.patterns import group

# There are six patterns that keep two of four, but 12,870 that keep eight of sixteen.
_MOST_LISTED = 12


@dataclass(frozen=True)
class PatternCount:
    """How many groups have one pattern, in the masks and in magnitude masks of the same weights."""

    pattern: str
    groups: int
    by_magnitude: int


@dataclass(frozen=True)
class GroupStatistics:
    """Groups of one mask, or of all.

    Attributes:
        groups: How many.
        keeping: Groups that keep 0, 1, ... M weights.
        changed: Groups whose pattern is not that of the magnitude mask.
        patterns: The most frequent, at most twelve: most frequent first, equals as they are written.
        others: Groups with any other pattern.
    """

    groups: int
    keeping: tuple[int, ...]
    changed: int
    patterns: tuple[PatternCount, ...]
    others: int

    @property
    def changed_percent(self) -> float:
        """Percent of groups; 0 where there is none."""
        return 100 * self.changed / self.groups if self.groups else 0.0


@dataclass(frozen=True)
class LayerStatistics:
    """One mask, by the name of its weight."""

    name: str
    found: GroupStatistics


@dataclass(frozen=True)
class MaskStatistics:
    """All masks of a network.

    Attributes:
        pattern: N:M.
        layers: One entry a mask, in the order given.
        total: Groups of all layers together.
    """

    pattern: str
    layers: tuple[LayerStatistics, ...]
    total: GroupStatistics


@dataclass(frozen=True)
class _Counts:
    """Counts before the most frequent are chosen; patterns are numbers whose highest of M bits is a group's first weight."""

    groups: int
    changed: int
    own: Counter[int]
    by_magnitude: Counter[int]


def mask_statistics(
    masks: Mapping[str, npt.NDArray[np.bool_]],
    weights: Mapping[str, npt.NDArray[np.floating]],
    pattern: Pattern,
    layout: str = CHANNEL,
) -> MaskStatistics:
    """Count the patterns of groups, and the groups that magnitude would have kept otherwise.

    Args:
        masks: By the weight's name, each of the weight's shape, no group with more than N kept.
        weights: Dense ones; more than have masks do no harm.
        pattern: N:M with M up to 64.
        layout: See `patterns.group`. Virtual zeros that fill a last group count as dropped.

    Raises:
        KeyError: A mask without its weight.
        ValueError: Channels that are not a multiple of M.
    """
    counts = {name: _counts(mask, weights[name], pattern, layout) for name, mask in masks.items()}
    layers = tuple(LayerStatistics(name, _described(found, pattern.m)) for name, found in counts.items())
    return MaskStatistics(str(pattern), layers, _described(_sum(counts.values()), pattern.m))


def _counts(mask: npt.NDArray[np.bool_], weight: npt.NDArray[np.floating], pattern: Pattern, layout: str) -> _Counts:
    own = _codes(mask, pattern.m, layout)
    by_magnitude = _codes(magnitude_mask(weight, pattern, layout), pattern.m, layout)
    return _Counts(own.size, int(np.count_nonzero(own != by_magnitude)), _counter(own), _counter(by_magnitude))


def _codes(mask: npt.NDArray[np.bool_], m: int, layout: str) -> npt.NDArray[np.uint64]:
    """Each group's pattern as a number."""
    grouped = group(mask, m, layout, pad=layout == FLAT)
    codes = np.zeros(grouped.shape[:-1], np.uint64)
    for i in range(m):
        codes = (codes << np.uint64(1)) | grouped[..., i]
    return codes.ravel()


def _counter(codes: npt.NDArray[np.uint64]) -> Counter[int]:
    return Counter(dict(zip(*(part.tolist() for part in np.unique(codes, return_counts=True)), strict=True)))


def _sum(counts: Iterable[_Counts]) -> _Counts:
    total = _Counts(0, 0, Counter(), Counter())
    for one in counts:
        total.own.update(one.own)
        total.by_magnitude.update(one.by_magnitude)
        total = _Counts(total.groups + one.groups, total.changed + one.changed, total.own, total.by_magnitude)
    return total


def _described(found: _Counts, m: int) -> GroupStatistics:
    keeping = [0] * (m + 1)
    for code, count in found.own.items():
        keeping[code.bit_count()] += count
    written = {code: f"{code:0{m}b}" for code in found.own}
    # Lexicographic order of kept positions, as in `patterns.patterns`, is that of falling codes.
    listed = sorted(found.own, key=lambda code: (-found.own[code], -code))[:_MOST_LISTED]
    return GroupStatistics(
        groups=found.groups,
        keeping=tuple(keeping),
        changed=found.changed,
        patterns=tuple(PatternCount(written[c], found.own[c], found.by_magnitude[c]) for c in listed),
        others=found.groups - sum(found.own[code] for code in listed),
    )
