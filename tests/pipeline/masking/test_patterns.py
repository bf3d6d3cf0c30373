"""The grouping of N:M, compared with loops over every index."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.choices import CHANNEL, FLAT
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.masking.patterns import count_violations, group, parse_pattern, pattern_table, ungroup

KERNELS = [(), (1, 1), (3, 3), (1, 3), (2,), (2, 1, 3)]


def numbered(shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return np.arange(1, math.prod(shape) + 1).reshape(shape)


@given(m=st.integers(1, 64), data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_pattern_survives_writing_and_parsing(m: int, data: st.DataObject) -> None:
    pattern = Pattern(data.draw(st.integers(1, m)), m)
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text", ["", ":", "2", "2:", ":4", "2-4", "4:2", "0:4", "-1:4", "2:4:8", "2.0:4", " 2:4", "2:65", "a:b", "²:4"]
)
def test_an_invalid_pattern_is_refused_and_quoted(text: str) -> None:
    with pytest.raises(InputError, match="not an N:M pattern") as raised:
        parse_pattern(text)
    assert raised.value.found == repr(text)
    assert "2:4" in str(raised.value.fix)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (2, 4), (3, 4), (4, 4), (2, 6), (4, 8)])
def test_the_table_holds_every_choice_of_n_in_lexicographic_order(n: int, m: int) -> None:
    """Kept positions in lexicographic order are bit strings in falling order."""
    expected = sorted((bits for bits in itertools.product((0, 1), repeat=m) if sum(bits) == n), reverse=True)
    table = pattern_table(Pattern(n, m))
    assert table.dtype == np.bool_
    assert [tuple(row) for row in table.astype(int).tolist()] == expected


def test_the_first_pattern_of_2_4_keeps_the_first_two() -> None:
    assert pattern_table(Pattern(2, 4))[0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m", [1, 2, 4])
def test_channel_groups_are_aligned_runs_along_c(kernel: tuple[int, ...], m: int) -> None:
    shape = (3, 8, *kernel)
    weight = numbered(shape)
    grouped = group(weight, m)
    assert grouped.shape == (3, *kernel, 8 // m, m)
    for k, c, *tap in itertools.product(*map(range, shape)):
        assert grouped[(k, *tap, c // m, c % m)] == weight[(k, c, *tap)]


def test_flat_groups_run_through_channels_and_kernel() -> None:
    k, c, r, s = shape = (2, 4, 3, 2)
    weight = numbered(shape)
    grouped = group(weight, 4, FLAT)
    assert grouped.shape == (k, c * r * s // 4, 4)
    for i, j, u, v in itertools.product(*map(range, shape)):
        at = (j * r + u) * s + v
        assert grouped[i, at // 4, at % 4] == weight[i, j, u, v]


def test_the_layouts_agree_on_1x1_kernels_only() -> None:
    point, kernel = numbered((2, 8, 1, 1)), numbered((2, 8, 3, 3))
    assert np.array_equal(group(point, 4, CHANNEL).reshape(2, 2, 4), group(point, 4, FLAT))
    assert not np.array_equal(np.sort(group(kernel, 4).reshape(-1, 4), 0), np.sort(group(kernel, 4, FLAT)[0], 0))


@given(
    filters=st.integers(1, 4),
    channels=st.integers(1, 4),
    m=st.sampled_from([1, 2, 4, 6]),
    kernel=st.sampled_from(KERNELS),
)
@settings(max_examples=40, deadline=None)
def test_ungroup_undoes_group_along_c(filters: int, channels: int, m: int, kernel: tuple[int, ...]) -> None:
    weight = numbered((filters, channels * m, *kernel))
    back = ungroup(group(weight, m), weight.shape)
    assert np.array_equal(back, weight)
    assert back.flags.c_contiguous


@given(
    filters=st.integers(1, 4),
    channels=st.integers(1, 9),
    m=st.sampled_from([1, 2, 4, 6]),
    kernel=st.sampled_from(KERNELS),
)
@settings(max_examples=40, deadline=None)
def test_ungroup_undoes_group_of_the_flat_layout_and_drops_its_padding(
    filters: int, channels: int, m: int, kernel: tuple[int, ...]
) -> None:
    weight = numbered((filters, channels, *kernel))
    back = ungroup(group(weight, m, FLAT, pad=True), weight.shape, FLAT)
    assert np.array_equal(back, weight)
    assert back.flags.c_contiguous


def test_grouping_along_c_copies_nothing() -> None:
    weight = np.zeros((8, 16, 3, 3), np.float32)
    assert np.shares_memory(group(weight, 4), weight)


def test_padding_fills_each_filters_last_group_with_zeros() -> None:
    weight = numbered((2, 3, 3, 3))
    grouped = group(weight, 4, FLAT, pad=True)
    assert grouped.shape == (2, 7, 4)
    assert grouped[:, -1, -1].tolist() == [0, 0]
    assert np.count_nonzero(grouped) == weight.size


def test_no_group_straddles_two_filters() -> None:
    weight = np.repeat(np.arange(5), 27).reshape(5, 3, 3, 3) + 1
    for k, filter_groups in enumerate(group(weight, 4, FLAT, pad=True)):
        assert set(filter_groups.ravel().tolist()) <= {k + 1, 0}


@pytest.mark.parametrize(
    ("shape", "layout", "pad"),
    [((2, 6, 1, 1), CHANNEL, False), ((2, 6, 2, 2), CHANNEL, True), ((2, 3, 3, 3), FLAT, False)],
)
def test_an_axis_that_does_not_divide_is_an_error(shape: tuple[int, ...], layout: str, pad: bool) -> None:
    with pytest.raises(ValueError, match="not a multiple of 4"):
        group(numbered(shape), 4, layout, pad=pad)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 4), layout=st.sampled_from([CHANNEL, FLAT]))
@settings(max_examples=30, deadline=None)
def test_violations_match_a_count_by_loops(seed: int, n: int, layout: str) -> None:
    shape = (3, 8, 3, 1) if layout == CHANNEL else (3, 5, 3, 1)
    mask = np.random.default_rng(seed).random(shape) < 0.6
    expected = 0
    for k in range(shape[0]):
        if layout == CHANNEL:
            runs = [mask[k, c : c + 4, r, 0] for c in range(0, 8, 4) for r in range(3)]
        else:
            filter_ = mask[k].ravel()
            runs = [filter_[i : i + 4] for i in range(0, filter_.size, 4)]
        expected += sum(int(run.sum()) > n for run in runs)
    assert count_violations(mask, Pattern(n, 4), layout) == expected


def test_a_group_with_fewer_than_n_is_not_a_violation() -> None:
    mask = np.zeros((1, 8, 1, 1), np.bool_)
    assert count_violations(mask, Pattern(2, 4)) == 0
    mask[0, :3] = True
    assert count_violations(mask, Pattern(2, 4)) == 1
