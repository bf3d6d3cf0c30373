"""Statistics of masks, against counting group by group and masks whose counts are known."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.choices import CHANNEL, FLAT
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.patterns import LAYOUTS
from maskplan.pipeline.masking.statistics import PatternCount, mask_statistics

RANDOM = np.random.default_rng(5)


def random_mask(shape: tuple[int, ...], pattern: Pattern, layout: str = CHANNEL) -> np.ndarray:
    return magnitude_mask(RANDOM.standard_normal(shape), pattern, layout)


def groups_of(mask: np.ndarray, m: int, layout: str) -> list[str]:
    """Every group as text, found by walking over the array."""
    found = []
    if layout == FLAT:
        for row in mask.reshape(len(mask), -1):
            padded = [*row, *[False] * (-len(row) % m)]
            found += ["".join("01"[bool(b)] for b in padded[i : i + m]) for i in range(0, len(padded), m)]
        return found
    for k, *place in np.ndindex(mask.shape[0], *mask.shape[2:]):
        for c in range(0, mask.shape[1], m):
            found.append("".join("01"[bool(mask[(k, c + i, *place)])] for i in range(m)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(3, 6), Pattern(4, 8)], ids=str)
def test_pattern_counts_match_a_count_by_loops(pattern: Pattern, layout: str) -> None:
    shapes = {"a.weight": (8, 24, 3, 3), "b.weight": (16, 48)}
    weights = {name: RANDOM.standard_normal(shape) for name, shape in shapes.items()}
    masks = {name: random_mask(shape, pattern, layout) for name, shape in shapes.items()}
    found = mask_statistics(masks, weights, pattern, layout)
    assert found.pattern == str(pattern)
    assert [layer.name for layer in found.layers] == list(shapes)
    everything: list[tuple[str, str]] = []
    for layer in found.layers:
        own = groups_of(masks[layer.name], pattern.m, layout)
        best = groups_of(magnitude_mask(weights[layer.name], pattern, layout), pattern.m, layout)
        everything += zip(own, best, strict=True)
        assert layer.found.groups == len(own)
        assert layer.found.changed == sum(a != b for a, b in zip(own, best, strict=True)) > 0
    own_counts, best_counts = (Counter(pair[i] for pair in everything) for i in (0, 1))
    total = found.total
    assert total.groups == len(everything)
    assert total.changed == sum(a != b for a, b in everything)
    assert total.changed_percent == pytest.approx(100 * total.changed / total.groups)
    ranked = sorted(own_counts, key=lambda text: (-own_counts[text], [-int(c) for c in text]))[:12]
    assert total.patterns == tuple(PatternCount(t, own_counts[t], best_counts[t]) for t in ranked)
    assert total.others == total.groups - sum(own_counts[t] for t in ranked)
    assert total.keeping == tuple(sum(text.count("1") == i for text, _ in everything) for i in range(pattern.m + 1))


def test_magnitude_masks_change_nothing_and_keep_all_six_patterns_of_two_in_four() -> None:
    weight = RANDOM.standard_normal((32, 64, 3, 3))
    masks = {"w": magnitude_mask(weight, Pattern(2, 4))}
    total = mask_statistics(masks, {"w": weight}, Pattern(2, 4)).total
    assert (total.changed, total.others) == (0, 0)
    assert {p.pattern for p in total.patterns} == {"1100", "1010", "1001", "0110", "0101", "0011"}
    assert all(p.groups == p.by_magnitude for p in total.patterns)
    assert total.keeping == (0, 0, total.groups, 0, 0)


def test_the_first_weight_of_a_group_is_the_first_digit() -> None:
    mask = np.array([[True, False, False, True, False, False, False, False]])
    weight = np.array([[9.0, 1.0, 1.0, 8.0, 1.0, 2.0, 0.5, 0.5]])
    total = mask_statistics({"w": mask}, {"w": weight}, Pattern(2, 4)).total
    assert total.patterns == (PatternCount("1001", 1, 1), PatternCount("0000", 1, 0))
    # The second group keeps fewer than it may, so it is not what magnitude keeps.
    assert (total.changed, total.keeping) == (1, (1, 0, 1, 0, 0))


def test_of_many_patterns_the_most_frequent_are_listed_and_the_rest_counted() -> None:
    pattern = Pattern(32, 64)
    weight = RANDOM.standard_normal((4, 64 * 16))
    mask = random_mask(weight.shape, pattern)
    mask[:, : 64 * 8] = np.arange(64 * 8) % 64 >= 32
    total = mask_statistics({"w": mask}, {"w": weight}, pattern).total
    assert total.patterns[0] == PatternCount("0" * 32 + "1" * 32, 32, 0)
    assert len(total.patterns) == 12
    assert sum(p.groups for p in total.patterns) + total.others == total.groups == 64


def test_statistics_of_no_masks_are_empty() -> None:
    total = mask_statistics({}, {}, Pattern(2, 4)).total
    assert (total.groups, total.changed_percent, total.patterns, total.keeping) == (0, 0.0, (), (0, 0, 0, 0, 0))
