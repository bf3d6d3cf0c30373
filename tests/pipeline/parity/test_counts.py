"""Counts against a count by hand, image by image."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from maskplan.pipeline.core.reports import ClassDrop, Flips
from maskplan.pipeline.core.statistics import PairedCounts
from maskplan.pipeline.parity.counts import count_outcomes
from maskplan.pipeline.parity.model_outputs import UNLABELED, ModelOutputs

Array = npt.NDArray[Any]


def answers(first: list[int], in_top5: list[bool]) -> ModelOutputs:
    return ModelOutputs(np.zeros((1, 4), np.float32), np.array(first, np.int32), np.array(in_top5, bool), True)


rows = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans(), st.booleans(), st.sampled_from([-1, 0, 1, 3])),
    min_size=1,
    max_size=40,
)


@given(rows)
def test_every_count_is_the_count_by_hand(table: list[tuple[int, int, bool, bool, int]]) -> None:
    mine, theirs, mine5, theirs5, labels = map(list, zip(*table, strict=True))
    found = count_outcomes(answers(theirs, theirs5), answers(mine, mine5), np.array(labels))
    labeled = [row for row in table if row[4] != UNLABELED]
    assert (found.images, found.labeled) == (len(table), len(labeled))
    hits = Counter((b == label, a == label) for a, b, _, _, label in labeled)
    assert found.top1 == PairedCounts(hits[True, True], hits[True, False], hits[False, True], hits[False, False])
    fives = Counter((b, a) for _, _, a, b, _ in labeled)
    assert found.top5 == PairedCounts(fives[True, True], fives[True, False], fives[False, True], fives[False, False])
    assert found.flips == Flips(
        changed=sum(a != b for a, b, *_ in table),
        right_to_wrong=sum(b == label != a for a, b, _, _, label in labeled),
        wrong_to_right=sum(a == label != b for a, b, _, _, label in labeled),
        wrong_to_wrong=sum(a != b and label not in (a, b) for a, b, _, _, label in labeled),
    )
    assert [c.name for c in found.classes] == [str(k) for k in sorted({row[4] for row in labeled})]
    for c in found.classes:
        own = [row for row in labeled if row[4] == int(c.name)]
        right = [sum(row[i] == row[4] for row in own) for i in (0, 1)]
        wanted = [100 * r / len(own) for r in right]
        drop = 100 * (right[1] - right[0]) / len(own)
        assert c == ClassDrop(c.name, len(own), wanted[1], wanted[0], drop)


def test_directions_are_told_apart() -> None:
    """Two right ones lost, one gained, one wrong answer for another, one changed without a label."""
    labels = np.array([0, 1, 2, 3, 0, -1, -1])
    dense = answers([0, 1, 0, 1, 0, 2, 2], [True] * 7)
    sparse = answers([1, 2, 2, 2, 0, 2, 3], [True] * 7)
    found = count_outcomes(dense, sparse, labels, ["a", "b", "c"])
    assert found.flips == Flips(5, 2, 1, 1)
    assert (found.top1.drop, found.labeled) == (20, 5)
    assert [c.name for c in found.classes] == ["a", "b", "c", "3"]
    assert [c.drop for c in found.classes] == [50, 100, -100, 0]
