"""The time stage: latency of two or three engines, measured in interleaved runs."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from maskplan.engines.base import Arrays, Runner, polygraphy_runner, quiet_polygraphy
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.reports import BatchTiming, Latency, TimingReport
from maskplan.pipeline.data.samples import Samples
from maskplan.pipeline.timing.interleaved import Clock, Runs, TimeOptions, run_interleaved

_SEED = 1
_RESAMPLES = 1000
_POLYGRAPHY_REPEATS = 3


def time_engines(
    dense: Runner,
    sparse: Runner,
    pruned: Runner | None,
    options: TimeOptions,
    *,
    note: str = "",
    same_file: bool = False,
    device: str | None = None,
    clock: Clock = time.perf_counter,
    samples: Samples | None = None,
) -> TimingReport:
    """Time engines on one device, interleaved.

    Args:
        dense: Dense weights.
        sparse: Pruned weights, with the sparse flag where there is one.
        pruned: Pruned weights without it, or None.
        options: Batch sizes and repeats.
        note: What the measurement can and cannot show; copied into the report.
        same_file: `pruned` is `sparse` loaded a second time, so that their difference is noise.
        device: Name of the device; by default this host's CPU.
        clock: Returns seconds; tests inject their own.
        samples: What the engines run on; noise by default.
    """
    engines = {"dense": dense, "sparse": sparse} | ({"pruned": pruned} if pruned is not None else {})
    timed = [
        _time_batch(engines, batch, options, same_file, clock, samples)
        for batch in track(options.batches, "time", len(options.batches))
        if all(e.fixed_batch in (None, batch) for e in engines.values())
    ]
    allowed = allowed_cpus()
    return TimingReport(device or cpu_name(), len(allowed), note, tuple(timed), format_cpu_ranges(allowed))


def cpu_name() -> str:
    """Model name of the CPU, as reported by the kernel."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def allowed_cpus() -> list[int]:
    """Sorted CPU numbers in the affinity mask of the process; all CPUs where the system has no such mask."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def format_cpu_ranges(numbers: Sequence[int]) -> str:
    """Format sorted CPU numbers as `taskset` does: `0-3,8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _time_batch(
    engines: Mapping[str, Runner],
    batch: int,
    options: TimeOptions,
    same_file: bool,
    clock: Clock,
    samples: Samples | None,
) -> BatchTiming:
    measured = run_interleaved(list(engines.values()), batch, options, clock, samples)
    seconds = {name: measured.seconds(number) for number, name in enumerate(engines)}
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    latencies = {
        name: latency(runs, batch, _polygraphy_ms(engine, feeds))
        for (name, engine), runs, feeds in zip(engines.items(), measured.runs, measured.feeds, strict=True)
    }
    return BatchTiming(
        batch=batch,
        repeats=len(seconds["dense"]),
        dense=latencies["dense"],
        pruned=latencies.get("pruned"),
        sparse=latencies["sparse"],
        by=measured.by,
        speedup=median["dense"] / median["sparse"],
        ratio_ci95=ratio_interval(seconds["dense"], seconds["sparse"]),
        build_spread=abs(median["pruned"] / median["sparse"] - 1) if same_file else None,
        clocks=measured.clocks,
    )


def latency(runs: Runs, batch: int, polygraphy_host_ms: float) -> Latency:
    """Summarize repeated runs of one engine."""
    ms = 1000 * np.asarray(runs.host_s)
    p50, p90, p99 = (float(p) for p in np.percentile(ms, (50, 90, 99)))
    gpu_ms = copies_ms = None
    if runs.device_timings:
        gpu_ms = float(np.median([t.gpu_ms for t in runs.device_timings]))
        copies_ms = float(np.median([t.copy_in_ms + t.copy_out_ms for t in runs.device_timings]))
    images_per_s = 1000 * batch / max(p50, 1e-9)
    return Latency(p50, p90, p99, images_per_s, gpu_ms, copies_ms, float(ms.mean()), polygraphy_host_ms)


def ratio_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the ratio of medians; repeats are paired because the runs are interleaved."""
    pairs = np.stack([np.asarray(first), np.asarray(second)])
    drawn = np.random.default_rng(_SEED).integers(0, pairs.shape[1], (_RESAMPLES, pairs.shape[1]))
    medians = np.median(pairs[:, drawn], axis=-1)
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5))
    return float(low), float(high)


def _polygraphy_ms(engine: Runner, feeds: Arrays) -> float:
    """Mean latency as Polygraphy measures it: host wall clock around its runner's inference."""
    quiet_polygraphy()
    runner = polygraphy_runner(engine, engine.name)
    with runner:
        times = []
        for _ in range(_POLYGRAPHY_REPEATS):
            runner.infer(dict(feeds))
            times.append(runner.last_inference_time())
    return 1000 * float(np.mean(times))
