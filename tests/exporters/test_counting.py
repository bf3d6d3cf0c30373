import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskplan.exporters import counting
from maskplan.exporters.counting import count_groups

SHAPES = st.sampled_from([(3, 8), (8, 3), (2, 4, 3, 3), (5, 12, 1, 1), (2, 3, 8), (24,), (4, 16, 2)])


def slow(values: np.ndarray, axis: int, n: int, m: int) -> tuple[int, tuple[int, ...] | None]:
    """Element by element, in the order of storage."""
    violating, first = 0, None
    starts = [range(0, size, m if i == axis else 1) for i, size in enumerate(values.shape)]
    for index in np.ndindex(*[len(s) for s in starts]):
        at = [starts[i][j] for i, j in enumerate(index)]
        nonzero = 0
        for step in range(m):
            element = list(at)
            element[axis] += step
            nonzero += values[tuple(element)] != 0
        if nonzero > n:
            violating += 1
            place = int(np.ravel_multi_index(tuple(at), values.shape))
            if first is None or place < first:
                first = place
    return violating, None if first is None else tuple(int(i) for i in np.unravel_index(first, values.shape))


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, data=st.data(), m=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 2**32 - 1))
def test_counts_and_the_first_violation_agree_with_counting_one_by_one(
    shape: tuple[int, ...], data: st.DataObject, m: int, seed: int
) -> None:
    axes = [i for i, size in enumerate(shape) if size % m == 0]
    if not axes:
        return
    axis, n = data.draw(st.sampled_from(axes)), data.draw(st.integers(1, m))
    block = data.draw(st.sampled_from([1, 8, 1 << 18]))
    generator = np.random.default_rng(seed)
    values = generator.choice([0.0, -0.0, 1.0, np.nan, np.inf], shape, p=[0.4, 0.2, 0.2, 0.1, 0.1]).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        # Small blocks, so that small arrays have many.
        patch.setattr(counting, "_BLOCK", block)
        counts = count_groups(values, axis, n, m)
    assert (counts.violating, counts.first) == slow(values, axis, n, m)
    assert counts.groups == values.size // m
    assert counts.negative_zeros == int((np.signbit(values) & (values == 0)).sum())


def test_bits_of_small_floats_know_their_negative_zero() -> None:
    half = np.array([[0.0, -0.0, 1.0, -2.0], [-0.0, 1.0, 2.0, np.nan]], np.float16)
    counts = count_groups(half.view(np.uint16), 1, 2, 4, negative_zero=0x8000)
    assert (counts.violating, counts.first, counts.negative_zeros) == (1, (1, 0), 2)


def test_zero_is_what_the_zero_point_says() -> None:
    values = np.array([[7, 7, 0, 0], [7, 0, 0, 0]], np.uint8)
    assert count_groups(values, 1, 2, 4, np.array(7, np.uint8)).first == (1, 0)
    assert count_groups(values, 1, 2, 4).violating == 0
    by_row = np.array([[7], [0]], np.uint8)
    assert count_groups(values, 1, 2, 4, by_row).violating == 0


def test_counting_can_stop_at_the_first_violation() -> None:
    values = np.ones((1 << 17, 4), np.float32)
    assert count_groups(values, 1, 2, 4).violating == 1 << 17
    assert 0 < count_groups(values, 1, 2, 4, until_violation=True).violating < 1 << 17
