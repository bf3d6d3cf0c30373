"""Magnitude masks, against a search over every pattern of every group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.choices import CHANNEL, FLAT
from maskplan.pipeline.masking.magnitude import keep_largest, kept_magnitude, magnitude_mask
from maskplan.pipeline.masking.patterns import group

PATTERNS = [(1, 2), (1, 4), (2, 4), (3, 4), (4, 4), (2, 6), (4, 8)]
WEIGHTS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], npt.NDArray[np.floating]]] = {
    "distinct": lambda rng, shape: rng.permutation(math.prod(shape)).reshape(shape) - math.prod(shape) / 2,
    "ties": lambda rng, shape: rng.integers(-2, 3, shape).astype(np.float32),
    "half": lambda rng, shape: rng.integers(-50, 51, shape).astype(np.float16),
    "zeros": lambda rng, shape: np.where(rng.random(shape) < 0.5, 0.0, -0.0).astype(np.float32),
}


def best_pattern(members: npt.NDArray[np.floating], n: int) -> npt.NDArray[np.bool_]:
    """The pattern that keeps most of a group; of several, the one with the lowest positions."""
    sizes = np.abs(members.astype(np.float64))
    kept = max(itertools.combinations(range(len(members)), n), key=lambda at: sizes[list(at)].sum())
    return np.isin(np.arange(len(members)), kept)


def by_brute_force(weight: npt.NDArray[np.floating], n: int, m: int, layout: str) -> npt.NDArray[np.bool_]:
    mask = np.zeros(weight.shape, np.bool_)
    if layout == FLAT:
        flat, flat_mask = weight.reshape(len(weight), -1), mask.reshape(len(weight), -1)
        for k in range(len(flat)):
            for start in range(0, flat.shape[1], m):
                run = flat[k, start : start + m]
                padded = np.concatenate([run, np.zeros(m - len(run), run.dtype)])
                flat_mask[k, start : start + m] = best_pattern(padded, n)[: len(run)]
        return mask
    others = [range(weight.shape[0]), *map(range, weight.shape[2:])]
    for k, *tap in itertools.product(*others):
        for start in range(0, weight.shape[1], m):
            at = (k, slice(start, start + m), *tap)
            mask[at] = best_pattern(weight[at], n)
    return mask


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 2)])
def test_the_mask_is_the_best_of_all_patterns_along_c(kind: str, n: int, m: int, kernel: tuple[int, ...]) -> None:
    weight = WEIGHTS[kind](np.random.default_rng(n * m), (3, 2 * m, *kernel))
    mask = magnitude_mask(weight, Pattern(n, m))
    assert np.array_equal(mask, by_brute_force(weight, n, m, CHANNEL))
    assert (group(mask, m).sum(axis=-1) == n).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (2, 6)])
@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (2, 3, 3, 3), (2, 5), (1, 1, 1, 1)])
def test_the_flat_mask_is_the_best_of_all_patterns_with_virtual_zeros_at_the_end(
    kind: str, n: int, m: int, shape: tuple[int, ...]
) -> None:
    weight = WEIGHTS[kind](np.random.default_rng(n * m), shape)
    mask = magnitude_mask(weight, Pattern(n, m), FLAT)
    assert mask.shape == shape
    assert np.array_equal(mask, by_brute_force(weight, n, m, FLAT))


@given(
    values=st.lists(st.sampled_from([-3.0, -1.0, -0.0, 0.0, 1e-40, 1.0, 3.0]), min_size=8, max_size=8),
    n=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_ties_keep_the_lower_index(values: list[float], n: int) -> None:
    weight = np.array(values, np.float32).reshape(1, 8)
    expected = np.zeros((1, 8), np.bool_)
    for start in (0, 4):
        ranked = sorted(range(start, start + 4), key=lambda i: (-abs(weight[0, i]), i))
        expected[0, ranked[:n]] = True
    assert np.array_equal(magnitude_mask(weight, Pattern(n, 4)), expected)


@pytest.mark.parametrize("shape", [(96, 128, 3, 3), (2, 8, 160, 160), (70000, 4), (1, 65536 * 2)])
def test_weights_larger_than_a_block_are_masked_correctly(shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).integers(-9, 10, shape).astype(np.float32)
    groups = np.abs(np.moveaxis(weight, 1, -1)).reshape(-1, 4)
    best = np.argsort(-groups, axis=-1, kind="stable")[:, :2]
    kept = np.zeros(groups.shape, np.bool_)
    np.put_along_axis(kept, best, True, axis=-1)
    moved = kept.reshape(shape[0], *shape[2:], shape[1])
    assert np.array_equal(magnitude_mask(weight, Pattern(2, 4)), np.moveaxis(moved, -1, 1))


@pytest.mark.parametrize("layout", [CHANNEL, FLAT])
def test_memory_order_does_not_matter(layout: str) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 8, 3, 3))
    strided = np.asfortranarray(weight)
    before = strided.copy()
    mask = magnitude_mask(strided, Pattern(2, 4), layout)
    assert np.array_equal(mask, magnitude_mask(weight, Pattern(2, 4), layout))
    assert mask.flags.c_contiguous
    assert np.array_equal(strided, before)


def test_channels_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ValueError, match="not a multiple of 4"):
        magnitude_mask(np.ones((4, 6, 1, 1), np.float32), Pattern(2, 4))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_keep_largest_works_along_any_axis(axis: int) -> None:
    scores = np.random.default_rng(axis).permutation(8 * 12 * 4).reshape(8, 12, 4)
    kept = keep_largest(scores, axis, Pattern(1, 4))
    moved, moved_kept = np.moveaxis(scores, axis, -1), np.moveaxis(kept, axis, -1)
    for index in np.ndindex(*moved.shape[:-1]):
        for start in range(0, moved.shape[-1], 4):
            run = moved[(*index, slice(start, start + 4))]
            assert moved_kept[(*index, slice(start, start + 4))].tolist() == (run == run.max()).tolist()


def test_kept_magnitude_is_the_share_of_the_absolute_sum() -> None:
    rng = np.random.default_rng(0)
    weight, mask = rng.standard_normal((4, 8, 3, 3)).astype(np.float32), rng.random((4, 8, 3, 3)) < 0.5
    kept = sum(abs(float(w)) for w, k in zip(weight.flat, mask.flat, strict=True) if k)
    assert kept_magnitude(weight, mask) == pytest.approx(kept / sum(abs(float(w)) for w in weight.flat), rel=1e-12)


def test_kept_magnitude_is_zero_for_empty_and_one_for_full_masks() -> None:
    weight = np.full((1, 4), -2.0, np.float32)
    assert kept_magnitude(weight, np.zeros((1, 4), np.bool_)) == 0
    assert kept_magnitude(weight, np.ones((1, 4), np.bool_)) == 1
    assert kept_magnitude(np.zeros((1, 4), np.float32), np.zeros((1, 4), np.bool_)) == 1


def test_kept_magnitude_does_not_overflow_half_precision() -> None:
    weight = np.full((1, 4), 60000, np.float16)
    assert kept_magnitude(weight, magnitude_mask(weight, Pattern(1, 4))) == 0.25
