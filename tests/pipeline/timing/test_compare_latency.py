"""Timing of engines with known latencies, which advance the injected clock themselves."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from maskplan.engines.base import Arrays, Classifier
from maskplan.pipeline.core.artifacts import TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.reports import TimingReport
from maskplan.pipeline.timing.compare_latency import cpu_name, format_cpu_ranges, latency, ratio_interval, time_engines
from maskplan.pipeline.timing.interleaved import Runs, TimeOptions

# After the timed runs, Polygraphy's runner runs each engine this often.
BY_POLYGRAPHY = 3


@dataclass
class Bench:
    """A clock and a log of all runs."""

    now: float = 0.0
    runs: list[tuple[str, npt.NDArray[Any]]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    @property
    def order(self) -> list[str]:
        return [name for name, _ in self.runs]


class Timed:
    """An engine whose runs take the given `seconds`, one after the other."""

    last_timing = None

    def __init__(
        self, bench: Bench, name: str, seconds: Iterator[float], batch: int | None = None, dtype: str = "float32"
    ) -> None:
        self.bench, self.name, self.seconds = bench, name, seconds
        self.inputs = (TensorSpec("image", dtype, (batch, 3, 1, 5)),)
        self.outputs = (TensorSpec("scores", "float32", (batch, 2)),)

    def infer(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        self.bench.now += next(self.seconds)
        self.bench.runs.append((self.name, feeds["image"].copy()))
        return {"scores": np.zeros((len(feeds["image"]), 2), np.float32)}

    def close(self) -> None:
        pass


def engine(bench: Bench, name: str, ms: float | Sequence[float], **kind: Any) -> Classifier:
    durations = [ms] if isinstance(ms, int | float) else list(ms)
    endless = itertools.chain(durations, itertools.repeat(durations[-1]))
    return Classifier(Timed(bench, name, (d / 1000 for d in endless), **kind), name)


def timed(
    bench: Bench,
    dense: Classifier,
    sparse: Classifier,
    pruned: Classifier | None = None,
    *,
    same_file: bool = False,
    **options: Any,
) -> TimingReport:
    return time_engines(dense, sparse, pruned, TimeOptions(**options), same_file=same_file, clock=bench.clock)


def test_latencies_are_measured_by_the_clock() -> None:
    bench = Bench()
    engines = engine(bench, "dense", 4), engine(bench, "sparse", 2), engine(bench, "pruned", 2.5)
    report = timed(bench, *engines, batches=(8,), seconds=1.2)
    (batch,) = report.batches
    assert batch.batch == 8
    assert batch.pruned is not None
    for found, ms in ((batch.dense, 4), (batch.sparse, 2), (batch.pruned, 2.5)):
        for figure in (found.p50_ms, found.p90_ms, found.p99_ms, found.host_ms):
            assert figure == pytest.approx(ms)
        assert found.images_per_s == pytest.approx(8 / (ms / 1000))
        assert found.gpu_ms is None
        assert 0 < found.polygraphy_host_ms < math.inf
    # Above one: dense over sparse.
    assert batch.speedup == pytest.approx(2)
    assert batch.ratio_ci95 == pytest.approx((2, 2))
    # Three engines of at most 4 ms: 12 ms per round.
    assert batch.repeats == pytest.approx(1200 / 12, abs=1)


def test_the_build_spread_is_the_difference_between_two_loads_of_one_file() -> None:
    for same_file, spread in ((True, 0.25), (False, None)):
        bench = Bench()
        engines = engine(bench, "dense", 4), engine(bench, "sparse", 2), engine(bench, "pruned", 2.5)
        (batch,) = timed(bench, *engines, same_file=same_file, batches=(1,), seconds=0.1).batches
        assert batch.build_spread == (spread if spread is None else pytest.approx(spread))
    bench = Bench()
    # The sign does not matter.
    engines = engine(bench, "dense", 4), engine(bench, "sparse", 2), engine(bench, "pruned", 1.5)
    assert timed(bench, *engines, same_file=True, batches=(1,), seconds=0.1).batches[0].build_spread == pytest.approx(
        0.25
    )


@pytest.mark.parametrize(
    ("options", "repeats"),
    [
        ({"seconds": 1.0}, 50),
        ({"seconds": 0.0}, 5),
        ({"seconds": 0.2, "min_repeats": 30}, 30),
        ({"seconds": 1000.0, "max_repeats": 70}, 70),
        ({"seconds": 1000.0, "min_repeats": 70, "max_repeats": 70}, 70),
    ],
)
def test_repeats_fill_the_time_within_their_limits(options: dict[str, Any], repeats: int) -> None:
    bench = Bench()
    report = timed(bench, engine(bench, "dense", 10), engine(bench, "sparse", 1), batches=(1,), **options)
    assert report.batches[0].repeats == pytest.approx(repeats, abs=1 if options == {"seconds": 1.0} else 0)
    assert report.batches[0].pruned is None
    timed_runs = bench.order[2 * 2 : -2 * BY_POLYGRAPHY]
    assert timed_runs.count("dense") == timed_runs.count("sparse") == report.batches[0].repeats


def test_warm_up_runs_do_not_count() -> None:
    bench = Bench()
    cold = [900.0, 500.0, 300.0]
    engines = engine(bench, "dense", [*cold, 4]), engine(bench, "sparse", [*cold, 2])
    (batch,) = timed(bench, *engines, batches=(1,), warm_up=3, min_repeats=20, seconds=0.0).batches
    assert (batch.dense.p99_ms, batch.sparse.p99_ms) == pytest.approx((4, 2))
    assert (batch.dense.host_ms, batch.sparse.host_ms) == pytest.approx((4, 2))
    again = Bench()
    engines = engine(again, "dense", [*cold, 4]), engine(again, "sparse", [*cold, 2])
    (batch,) = timed(again, *engines, batches=(1,), warm_up=1, min_repeats=20, seconds=0.0).batches
    assert batch.dense.p99_ms > 100


def test_runs_are_interleaved_and_each_engine_comes_first_equally_often() -> None:
    bench = Bench()
    names = ("dense", "sparse", "pruned")
    timed(bench, *(engine(bench, name, 1) for name in names), batches=(1,), warm_up=1, min_repeats=30, seconds=0.0)
    order = bench.order[3 : -3 * BY_POLYGRAPHY]
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 30
    assert all(sorted(r) == sorted(names) for r in rounds)
    for place in range(3):
        assert {name: sum(r[place] == name for r in rounds) for name in names} == dict.fromkeys(names, 10)


def test_a_host_that_slows_down_does_not_change_the_ratio() -> None:
    bench = Bench()
    slowing = [1 + 0.05 * i for i in range(200)]
    engines = engine(bench, "dense", [3 * s for s in slowing]), engine(bench, "sparse", [2 * s for s in slowing])
    (batch,) = timed(bench, *engines, batches=(1,), min_repeats=100, max_repeats=100, seconds=0.0).batches
    assert batch.speedup == pytest.approx(1.5)
    assert batch.ratio_ci95 == pytest.approx((1.5, 1.5))


def test_one_interrupted_run_does_not_change_the_speedup() -> None:
    bench = Bench()
    engines = engine(bench, "dense", [3.0] * 9 + [3000.0, 3.0]), engine(bench, "sparse", 2)
    (batch,) = timed(bench, *engines, batches=(1,), min_repeats=15, max_repeats=15, seconds=0.0).batches
    assert batch.dense.host_ms > 100
    assert batch.speedup == pytest.approx(1.5)


def test_all_engines_receive_the_same_images_of_the_requested_batch_size() -> None:
    bench = Bench()
    engines = engine(bench, "dense", 1), engine(bench, "sparse", 1, dtype="float16"), engine(bench, "pruned", 1)
    report = timed(bench, *engines, batches=(1, 6), min_repeats=3, seconds=0.0)
    assert [b.batch for b in report.batches] == [1, 6]
    seen = {batch: [(n, x) for n, x in bench.runs if len(x) == batch] for batch in (1, 6)}
    assert sum(map(len, seen.values())) == len(bench.runs)
    for batch, runs in seen.items():
        first = next(x for name, x in runs if name == "dense")
        assert first.shape == (batch, 3, 1, 5)
        assert first.std() > 0
        for name, images in runs:
            assert images.dtype == (np.float16 if name == "sparse" else np.float32)
            np.testing.assert_array_equal(images, first.astype(images.dtype))


def test_batches_that_an_engine_does_not_accept_are_omitted() -> None:
    bench = Bench()
    engines = engine(bench, "dense", 1), engine(bench, "sparse", 1, batch=4)
    report = timed(bench, *engines, batches=(1, 4, 8), min_repeats=3, seconds=0.0)
    assert [b.batch for b in report.batches] == [4]
    engines = engine(bench, "dense", 1, batch=2), engine(bench, "sparse", 1, batch=4)
    assert timed(bench, *engines, batches=(1, 2, 4), min_repeats=3, seconds=0.0).batches == ()


def test_the_report_names_the_device_and_carries_the_note() -> None:
    bench = Bench()
    engines = engine(bench, "dense", 1), engine(bench, "sparse", 1)
    options = TimeOptions(batches=(1,), seconds=0.0)
    here = time_engines(*engines, None, options, note="a note", clock=bench.clock)
    assert (here.device, here.note) == (cpu_name(), "a note")
    assert here.threads == len(os.sched_getaffinity(0)) <= (os.cpu_count() or 1)
    assert cpu_name().strip() == cpu_name() != ""
    there = time_engines(*engines, None, options, device="an accelerator", clock=bench.clock)
    assert (there.device, there.note) == ("an accelerator", "")


def test_cpu_numbers_are_formatted_as_by_taskset() -> None:
    assert format_cpu_ranges([]) == ""
    assert format_cpu_ranges([3]) == "3"
    assert format_cpu_ranges([0, 1, 2, 3, 8, 10, 11]) == "0-3,8,10-11"


def test_allowed_cpus_follow_the_affinity_of_the_process() -> None:
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, [{one}]); from maskplan.pipeline.timing.compare_latency import *;"
        " print(format_cpu_ranges(allowed_cpus()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [str(one)]


SECONDS = st.lists(st.floats(1e-6, 10), min_size=2, max_size=40)


@settings(deadline=None, max_examples=50)
@given(SECONDS, st.integers(1, 64))
def test_percentiles_are_those_of_the_standard_library(seconds: list[float], batch: int) -> None:
    found = latency(Runs(tuple(seconds), ()), batch, 7.5)
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    wanted = [1000 * cuts[i] for i in (49, 89, 98)]
    assert [found.p50_ms, found.p90_ms, found.p99_ms] == pytest.approx(wanted)
    assert found.images_per_s == pytest.approx(batch / statistics.median(seconds))
    assert found.host_ms == pytest.approx(1000 * statistics.fmean(seconds))
    assert found.polygraphy_host_ms == 7.5


def test_the_interval_agrees_with_scipys_bootstrap() -> None:
    generator = np.random.default_rng(3)
    common = generator.lognormal(0, 0.3, 400)
    first, second = common * generator.lognormal(0.4, 0.05, 400), common * generator.lognormal(0, 0.05, 400)
    low, high = ratio_interval(list(first), list(second))

    def ratio(a: npt.NDArray[Any], b: npt.NDArray[Any], axis: int = -1) -> Any:
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    other = bootstrap((first, second), ratio, paired=True, method="percentile", n_resamples=4000, rng=5)
    assert (low, high) == pytest.approx(tuple(other.confidence_interval), rel=0.01)
    assert low < np.median(first) / np.median(second) < high
    independent = bootstrap((first, second), ratio, paired=False, method="percentile", n_resamples=500, rng=5)
    unpaired = independent.confidence_interval
    # Only a paired interval is this narrow.
    assert high - low < 0.7 * (unpaired.high - unpaired.low)


@settings(deadline=None, max_examples=30)
@given(SECONDS, st.floats(0.1, 10))
def test_pairs_with_one_ratio_give_an_interval_of_one_point(seconds: list[float], factor: float) -> None:
    assert ratio_interval([factor * s for s in seconds], seconds) == pytest.approx((factor, factor))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"batches": ()}, "batch sizes"),
        ({"batches": (1, 0)}, "batches"),
        ({"batches": (-8,)}, "batches"),
        ({"warm_up": -1}, "warm_up"),
        ({"seconds": -0.1}, "seconds"),
        ({"seconds": math.nan}, "seconds"),
        ({"seconds": math.inf}, "seconds"),
        ({"min_repeats": 0}, "min_repeats"),
        ({"min_repeats": 10, "max_repeats": 9}, "max_repeats"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names):
        TimeOptions(**options)


def test_the_command_times_both_engines_and_writes_the_report(
    cli: Callable[..., Any], finished_digits: Path, tmp_path: Path
) -> None:
    report = tmp_path / "time.json"
    engines = finished_digits / "dense_engine.onnx", finished_digits / "engine.onnx"
    ran = cli("time", *engines, "--batch", "3, 1", "--seconds", 0.05, "--report", report)
    assert ran.code == 0
    values = json.loads(report.read_text())
    assert [b["batch"] for b in values["batches"]] == [3, 1]
    for batch, line in zip(values["batches"], ran.out.splitlines()[1:], strict=False):
        assert batch["repeats"] >= 5
        assert batch["speedup"] == pytest.approx(batch["dense"]["p50_ms"] / batch["sparse"]["p50_ms"])
        assert batch["ratio_ci95"][0] <= batch["ratio_ci95"][1]
        assert batch["build_spread"] is not None
        assert line.startswith(f"batch {batch['batch']}: dense {batch['dense']['p50_ms']:.3g} ms")
    # ONNX Runtime on a CPU cannot show a gain, and the report must say so.
    assert "no sparse kernels" in values["note"]
    assert values["note"] in ran.out
