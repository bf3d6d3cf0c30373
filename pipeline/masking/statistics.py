"""Statistics of masks: how often each pattern occurs, and in how many groups masks differ from magnitude masks.

A group's pattern is written as one digit per weight, 1 where it is kept: `1100` keeps the first two of four.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.choices import CHANNEL, FLAT, Layout
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.patterns import group

# There are six patterns that keep two of four, but 12,870 that keep eight of sixteen.
_MAX_LISTED = 12


@dataclass(frozen=True)
class PatternCount:
    """Number of groups with one pattern, in the masks and in magnitude masks of the same weights."""

    pattern: str
    groups: int
    by_magnitude: int


@dataclass(frozen=True)
class GroupStatistics:
    """Counts over the groups of one mask, or of all masks.

    Attributes:
        groups: Number of groups.
        keeping: Number of groups that keep 0, 1, ... M weights.
        changed: Number of groups whose pattern differs from that of the magnitude mask.
        patterns: The most frequent patterns, at most twelve, in descending order; ties in lexicographic order.
        others: Number of groups with any other pattern.
    """

    groups: int
    keeping: tuple[int, ...]
    changed: int
    patterns: tuple[PatternCount, ...]
    others: int

    @property
    def changed_percent(self) -> float:
        """Changed groups in percent; 0 if there are no groups."""
        return 100 * self.changed / self.groups if self.groups else 0.0


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one mask, by the name of its weight."""

    name: str
    found: GroupStatistics


@dataclass(frozen=True)
class MaskStatistics:
    """Statistics of all masks of a network.

    Attributes:
        pattern: N:M.
        layers: One entry per mask, in the given order.
        total: Over the groups of all layers.
    """

    pattern: str
    layers: tuple[LayerStatistics, ...]
    total: GroupStatistics


@dataclass(frozen=True)
class _Counts:
    """Counts of all patterns; a pattern is a number whose highest of M bits is the group's first weight."""

    groups: int
    changed: int
    own: Counter[int]
    by_magnitude: Counter[int]


def mask_statistics(
    masks: Mapping[str, npt.NDArray[np.bool_]],
    weights: Mapping[str, npt.NDArray[np.floating]],
    pattern: Pattern,
    layout: Layout = CHANNEL,
) -> MaskStatistics:
    """Count the patterns of the masks' groups and of magnitude masks for the same weights.

    Args:
        masks: Bool masks by the weight's name, each shaped like its weight, at most N kept per group.
        weights: The dense weights by name; weights without a mask are ignored.
        pattern: N:M with M up to 64.
        layout: See `patterns.group`. Virtual zeros that fill up a last group count as dropped.

    Raises:
        KeyError: A mask has no weight.
        ValueError: The channels are not a multiple of M.
    """
    counts = {name: _counts(mask, weights[name], pattern, layout) for name, mask in masks.items()}
    layers = tuple(LayerStatistics(name, _summarize(own, pattern.m)) for name, own in counts.items())
    return MaskStatistics(str(pattern), layers, _summarize(_sum(counts.values()), pattern.m))


def _counts(mask: npt.NDArray[np.bool_], weight: npt.NDArray[np.floating], pattern: Pattern, layout: Layout) -> _Counts:
    own = _codes(mask, pattern.m, layout)
    by_magnitude = _codes(magnitude_mask(weight, pattern, layout), pattern.m, layout)
    return _Counts(own.size, int(np.count_nonzero(own != by_magnitude)), _counter(own), _counter(by_magnitude))


def _codes(mask: npt.NDArray[np.bool_], m: int, layout: Layout) -> npt.NDArray[np.uint64]:
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


def _summarize(counts: _Counts, m: int) -> GroupStatistics:
    keeping = [0] * (m + 1)
    for code, count in counts.own.items():
        keeping[code.bit_count()] += count
    written = {code: f"{code:0{m}b}" for code in counts.own}
    # Lexicographic order of kept positions, as in `patterns.pattern_table`, is descending order of codes.
    listed = sorted(counts.own, key=lambda code: (-counts.own[code], -code))[:_MAX_LISTED]
    return GroupStatistics(
        groups=counts.groups,
        keeping=tuple(keeping),
        changed=counts.changed,
        patterns=tuple(PatternCount(written[c], counts.own[c], counts.by_magnitude[c]) for c in listed),
        others=counts.groups - sum(counts.own[code] for code in listed),
    )
