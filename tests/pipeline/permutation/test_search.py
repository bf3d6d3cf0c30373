"""Tests of pipeline/permutation/search.py, against brute force over all partitions and against plain NumPy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.permutation import anneal
from maskplan.pipeline.permutation.search import SearchOptions, _columns, kept, search, steps

ENOUGH = SearchOptions(effort=0.02, restarts=4)


def partitions(columns: tuple[int, ...], m: int) -> Iterator[tuple[int, ...]]:
    """Every way to part columns into groups of m, once each, as an order."""
    if not columns:
        yield ()
        return
    first, *rest = columns
    for others in combinations(rest, m - 1):
        left = tuple(column for column in rest if column not in others)
        for order in partitions(left, m):
            yield (first, *others, *order)


def recomputed(scores: npt.NDArray[np.float64], order: npt.NDArray[np.int64], n: int = 2, m: int = 4) -> float:
    grouped = scores[:, order].reshape(len(scores), -1, m)
    return float(np.sort(grouped, axis=-1)[..., m - n :].sum())


def most(scores: npt.NDArray[np.float64], n: int = 2, m: int = 4) -> float:
    orders = partitions(tuple(range(scores.shape[1])), m)
    return max(recomputed(scores, np.array(order), n, m) for order in orders)


def uneven(seed: int, rows: int, columns: int) -> npt.NDArray[np.float64]:
    """Magnitudes whose rows and columns differ in scale, as those of trained weights do."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.standard_normal((rows, 1))), np.exp(rng.standard_normal((1, columns)))
    return np.abs(rng.standard_normal((rows, columns))) * scales[0] * scales[1]


@pytest.mark.parametrize(("columns", "m", "count"), [(8, 4, 35), (12, 4, 5775), (6, 2, 15), (6, 3, 10)])
def test_brute_force_sees_every_partition_once(columns: int, m: int, count: int) -> None:
    orders = list(partitions(tuple(range(columns)), m))
    canonical = {frozenset(frozenset(order[i : i + m]) for i in range(0, columns, m)) for order in orders}
    assert len(orders) == len(canonical) == count


@pytest.mark.parametrize("rows", [1, 3, 7, 33])
@pytest.mark.parametrize("seed", range(6))
def test_eight_columns_get_the_best_of_35_partitions(seed: int, rows: int) -> None:
    for scores in (uneven(seed, rows, 8), np.random.default_rng(seed).random((rows, 8))):
        assert search(scores, ENOUGH).kept == pytest.approx(most(scores), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_twelve_columns_get_the_best_of_5775_partitions(seed: int) -> None:
    for scores in (uneven(seed, 9, 12), np.random.default_rng(seed).random((20, 12))):
        assert search(scores, ENOUGH).kept == pytest.approx(most(scores), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "columns"), [(1, 4, 8), (3, 4, 8), (1, 2, 8), (2, 3, 9), (4, 8, 16), (1, 3, 9)])
def test_any_pattern_gets_the_best_partition(n: int, m: int, columns: int) -> None:
    for seed in range(3):
        scores = uneven(seed, 6, columns)
        found = search(scores, SearchOptions(effort=0.02, restarts=4, m=m, n=n))
        assert found.kept == pytest.approx(recomputed(scores, found.order, n, m))
        assert found.kept == pytest.approx(most(scores, n, m), rel=1e-6)


def test_the_network_for_2_in_4_sorts_as_the_general_kernel_does() -> None:
    rng = np.random.default_rng(0)
    # Few values, so that ties of every kind occur.
    x = rng.integers(0, 4, (4, 4096)).astype(np.float32)
    columns = np.array([2, 0, 3, 1])
    fast, general = np.empty_like(x), np.empty_like(x)
    anneal._rivals_2to4(x, fast, columns)
    anneal._rivals(x, general, columns, 2)
    second_of_others = np.stack([np.sort(np.delete(x, k, axis=0), axis=0)[1] for k in range(4)])
    np.testing.assert_array_equal(general, second_of_others)
    np.testing.assert_array_equal(fast, second_of_others)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_result_is_a_permutation_that_keeps_what_numpy_says(data: st.DataObject) -> None:
    m = data.draw(st.sampled_from([2, 4, 8]), "m")
    n = data.draw(st.integers(1, m), "n")
    shape = data.draw(st.integers(1, 40), "rows"), m * data.draw(st.integers(1, 6), "groups")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    kind = data.draw(
        st.sampled_from(["random", "zeros", "equal", "few values", "huge", "tiny", "dead columns"]), "kind"
    )
    scores = rng.random(shape)
    if kind in ("zeros", "equal"):
        scores[:] = kind == "equal"
    elif kind == "few values":
        scores = rng.integers(0, 3, shape).astype(np.float64)
    elif kind in ("huge", "tiny"):
        scores *= 1e300 if kind == "huge" else 1e-300
    elif kind == "dead columns":
        scores[:, rng.random(shape[1]) < 0.5] = 0
    given = scores.copy()
    found = search(scores, SearchOptions(effort=0.001, m=m, n=n, restarts=data.draw(st.integers(1, 3), "restarts")))
    np.testing.assert_array_equal(scores, given)
    assert sorted(found.order) == list(range(shape[1]))
    identity = np.arange(shape[1])
    assert found.kept == pytest.approx(recomputed(scores, found.order, n, m), rel=1e-9)
    assert found.kept_before == pytest.approx(recomputed(scores, identity, n, m), rel=1e-9)
    bound = np.sort(scores, axis=1)[:, shape[1] - shape[1] // m * n :].sum()
    assert found.kept_bound == pytest.approx(bound, rel=1e-9)
    assert found.kept_before <= found.kept <= found.kept_bound * (1 + 1e-9)
    assert 0 <= found.efficacy <= 100 * (1 + 1e-6)


def test_a_best_order_is_left_as_it_is() -> None:
    """Two large columns in each group: nothing can be gained, and nothing moves."""
    scores = np.tile([4.0, 3.0, 1.0, 1.0], (5, 6))
    found = search(scores, SearchOptions(effort=0.01))
    np.testing.assert_array_equal(found.order, np.arange(24))
    assert (found.kept, found.efficacy) == (found.kept_before, 0.0)


def test_apex_matrix_gets_the_efficacy_that_is_promised() -> None:
    np.random.seed(1)
    found = search(np.random.rand(128, 64), SearchOptions(seed=2))
    assert found.kept_before == pytest.approx(2852.377, abs=1e-3)
    assert found.kept_bound == pytest.approx(3042.332, abs=1e-3)
    assert found.efficacy >= 38.7


def test_more_effort_does_better_on_average() -> None:
    scores = [uneven(seed, 40, 64) for seed in range(4)]
    little, much = (
        np.mean([search(each, SearchOptions(effort=effort, restarts=1)).efficacy for each in scores])
        for effort in (1e-4, 0.25)
    )
    assert much > little + 0.1


def test_the_same_seed_gives_the_same_order_however_many_cores_share_the_chains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = np.random.default_rng(3).random((50, 64))
    options = SearchOptions(effort=0.05, seed=7, restarts=4)
    first = search(scores, options)
    np.testing.assert_array_equal(search(scores, options).order, first.order)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    np.testing.assert_array_equal(search(scores, options).order, first.order)
    other = search(scores, SearchOptions(effort=0.05, seed=8, restarts=4))
    assert (other.order != first.order).any()


def test_restarts_never_do_worse_than_the_first_of_them() -> None:
    scores = np.random.default_rng(4).random((50, 64))
    one, many = (search(scores, SearchOptions(effort=0.02, restarts=count)).kept for count in (1, 6))
    assert many > one


def test_the_unit_of_scores_does_not_matter() -> None:
    scores = uneven(1, 30, 32)
    first = search(scores, SearchOptions(effort=0.05))
    np.testing.assert_array_equal(search(scores * 2.0**40, SearchOptions(effort=0.05)).order, first.order)


def test_a_limit_in_seconds_ends_a_long_search() -> None:
    scores = np.random.default_rng(5).random((64, 64))
    search(scores, SearchOptions(effort=0.01))  # compiled
    started = time.monotonic()
    found = search(scores, SearchOptions(effort=1e5, seconds=0.5, restarts=1))
    assert time.monotonic() - started < 5
    assert found.efficacy > 30


def test_many_rows_are_searched_by_a_sample_and_judged_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskplan.pipeline.permutation.search._MAX_ROWS", 256)
    rng = np.random.default_rng(6)
    # Groups that are large throughout beside groups that are small: mixing them is worth much in every row.
    scores = rng.random((4096, 16)) + np.where(np.arange(16) % 8 < 4, 3.0, 0.0)
    assert _columns(scores, seed=0).shape == (16, 256)
    found = search(scores, SearchOptions(effort=0.01, restarts=1))
    assert found.kept == pytest.approx(recomputed(scores, found.order))
    assert found.efficacy > 50


def test_kept_does_not_depend_on_how_rows_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(7).random((100, 16))
    whole = kept(scores, 2, 4)
    monkeypatch.setattr("maskplan.pipeline.permutation.search._COPY_BLOCK", 48)
    assert kept(scores, 2, 4) == pytest.approx(whole, rel=1e-12)


def test_integers_and_half_precision_are_scores_too() -> None:
    scores = np.random.default_rng(8).integers(0, 100, (20, 16))
    wanted = search(scores.astype(np.float64), SearchOptions(effort=0.01))
    for dtype in (np.uint8, np.int64, np.float16, np.float32):
        found = search(scores.astype(dtype), SearchOptions(effort=0.01))
        assert (found.kept, found.kept_before) == (wanted.kept, wanted.kept_before)


def test_proposals_grow_with_the_pairs_until_rows_make_them_dear() -> None:
    assert steps(128, 8) == 2**22
    assert steps(128, 128) == 4000 * 128**2
    assert steps(128, 128, 0.5) == 2000 * 128**2
    assert steps(4608, 512) == 2**35 // 4608 < 4000 * 512**2
    assert steps(10**9, 512) == steps(1 << 14, 512)
    assert steps(1, 4, 1e-9) == 1


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (np.full((2, 8), np.nan), {}, "16 scores that are not numbers"),
        (np.full((2, 8), np.inf), {}, "infinite scores"),
        (np.full((2, 8), -1.0), {}, "negative scores, down to -1"),
        (np.ones((2, 10)), {}, "10 columns, not a multiple of 4"),
        (np.ones((2, 8)), {"n": 5}, "5:4, where n must be"),
        (np.ones((2, 8)), {"n": 0}, "0:4, where n must be"),
        (np.empty((0, 8)), {}, "shape (0, 8)"),
        (np.empty((2, 0)), {}, "shape (2, 0)"),
        (np.ones(8), {}, "shape (8,)"),
        (np.ones((2, 8), complex), {}, "scores of type complex128"),
        (np.ones((2, 8)), {"effort": 0.0}, "an effort of 0.0"),
        (np.ones((2, 8)), {"effort": float("nan")}, "an effort of nan"),
        (np.ones((2, 8)), {"seconds": -1.0}, "-1.0 seconds"),
        (np.ones((2, 8)), {"restarts": 0}, "0 restarts"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_the_reason(
    scores: npt.NDArray[np.float64], options: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        search(scores, SearchOptions(**options))  # type: ignore[arg-type]
    assert message in str(refused.value)


def test_every_reason_is_told_at_once() -> None:
    with pytest.raises(InputError) as refused:
        search(np.full((2, 10), np.nan), SearchOptions(effort=-1, restarts=0))
    for part in ("not numbers", "10 columns", "effort", "restarts"):
        assert part in str(refused.value)
