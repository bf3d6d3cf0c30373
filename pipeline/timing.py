"""The time stage: engines in turn, so that a host that slows down slows them all."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engines.base import Classifier, polygraphy_runner, quiet_polygraphy
from pipeline.bounds import at_least
from pipeline.errors import InputError
from pipeline.progress import track
from pipeline.reports import BatchTiming, Latency, TimingReport

_SEED = 1
_RESAMPLES = 1000
_POLYGRAPHY_REPEATS = 3

Clock = Callable[[], float]


@dataclass(frozen=True)
class TimeOptions:
    """How long, and at which batch sizes.

    Attributes:
        batches: Batch sizes.
        warm_up: Runs of each engine before the clock counts.
        seconds: Aim for this long a batch size, all engines together.
        least: Repeats at least.
        most: Repeats at most.
    """

    batches: tuple[int, ...] = (1, 8)
    warm_up: int = 2
    seconds: float = 5.0
    least: int = 5
    most: int = 2000

    def __post_init__(self) -> None:
        if not self.batches:
            raise InputError("no batch sizes to time", fix="give at least one")
        for batch in self.batches:
            at_least(1, batches=batch)
        at_least(0, warm_up=self.warm_up, seconds=self.seconds)
        at_least(1, least=self.least)
        at_least(self.least, most=self.most)


def time_engines(
    dense: Classifier,
    sparse: Classifier,
    pruned: Classifier | None,
    options: TimeOptions,
    *,
    note: str = "",
    same_file: bool = False,
    device: str | None = None,
    clock: Clock = time.perf_counter,
) -> TimingReport:
    """Time engines on one device, interleaved.

    Args:
        dense: Dense weights.
        sparse: Pruned weights, with the sparse flag where there is one.
        pruned: Pruned weights without it, or None.
        options: Batch sizes and repeats.
        note: What the figures can and cannot show.
        same_file: `pruned` is `sparse` loaded a second time, so that their difference is noise.
        device: What ran it; this host's CPU by default.
        clock: Seconds; injectable, so that tests need not sleep.
    """
    engines = {"dense": dense, "sparse": sparse} | ({"pruned": pruned} if pruned is not None else {})
    timed = [
        _time_batch(engines, batch, options, same_file, clock)
        for batch in track(options.batches, "time", len(options.batches))
        if all(e.fixed_batch in (None, batch) for e in engines.values())
    ]
    return TimingReport(device or cpu_name(), os.cpu_count() or 1, note, tuple(timed))


def cpu_name() -> str:
    """The CPU's model, as the kernel tells it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _time_batch(
    engines: Mapping[str, Classifier], batch: int, options: TimeOptions, same_file: bool, clock: Clock
) -> BatchTiming:
    shape = engines["dense"].input.shape
    images = np.random.default_rng(_SEED).standard_normal((batch, *(d or 1 for d in shape[1:])), dtype=np.float32)
    slowest = 0.0
    for engine in engines.values():
        for _ in range(max(options.warm_up, 1)):
            started = clock()
            engine.logits(images)
            slowest = max(slowest, clock() - started)
    repeats = int(np.clip(options.seconds / max(slowest * len(engines), 1e-9), options.least, options.most))
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    order = list(engines)
    for i in range(repeats):
        # Rotating the order keeps one engine from always running after the same other.
        for name in order[i % len(order) :] + order[: i % len(order)]:
            started = clock()
            engines[name].logits(images)
            seconds[name].append(clock() - started)
    host = {name: _polygraphy_ms(engine, images) for name, engine in engines.items()}
    latencies = {name: latency(seconds[name], batch, host[name]) for name in engines}
    return BatchTiming(
        batch=batch,
        repeats=repeats,
        dense=latencies["dense"],
        pruned=latencies.get("pruned"),
        sparse=latencies["sparse"],
        speedup=latencies["dense"].p50_ms / latencies["sparse"].p50_ms,
        ratio_ci95=ratio_interval(seconds["dense"], seconds["sparse"]),
        build_spread=abs(latencies["pruned"].p50_ms / latencies["sparse"].p50_ms - 1) if same_file else None,
    )


def latency(seconds: Sequence[float], batch: int, polygraphy_host_ms: float) -> Latency:
    """Percentiles of repeated runs of one engine."""
    ms = 1000 * np.asarray(seconds)
    p50, p90, p99 = (float(p) for p in np.percentile(ms, (50, 90, 99)))
    return Latency(p50, p90, p99, 1000 * batch / max(p50, 1e-9), None, float(ms.mean()), polygraphy_host_ms)


def ratio_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Bootstrap interval (95%) of the ratio of medians; the repeats are paired, as they ran in turn."""
    pairs = np.stack([np.asarray(first), np.asarray(second)])
    drawn = np.random.default_rng(_SEED).integers(0, pairs.shape[1], (_RESAMPLES, pairs.shape[1]))
    medians = np.median(pairs[:, drawn], axis=-1)
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5))
    return float(low), float(high)


def _polygraphy_ms(engine: Classifier, images: npt.NDArray[np.float32]) -> float:
    """Polygraphy's own figure: host wall clock around its runner's inference, mean."""
    quiet_polygraphy()
    runner = polygraphy_runner(engine, engine.name)
    with runner:
        times = []
        for _ in range(_POLYGRAPHY_REPEATS):
            runner.infer({"input": images})
            times.append(runner.last_inference_time())
    return 1000 * float(np.mean(times))
