"""Interleaved runs of several engines, so that a slowdown of the host affects all of them alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import numpy as np

from maskplan.engines.base import Arrays, CallTiming, Runner
from maskplan.engines.trt.clocks import ClockWatch, watch_clocks
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.reports import GpuClocks
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.samples import Samples, TensorSamples, noise_samples

TimeSource = Literal["gpu", "host"]
"""Which clock measured a run: GPU events, or the wall clock of the host."""

GPU: Final = "gpu"
HOST: Final = "host"

Clock = Callable[[], float]


@dataclass(frozen=True)
class TimeOptions:
    """Batch sizes and repeats of a measurement.

    Attributes:
        batches: Batch sizes.
        warm_up: Untimed runs of each engine.
        seconds: Target duration per batch size, all engines together.
        min_repeats: Minimum number of timed runs of each engine.
        max_repeats: Maximum number of timed runs of each engine.
        shape: Of one input without the batch, such as (3, 224, 224), for engines whose sizes are dynamic; None takes the
            engines' own.
    """

    RENAMED_FIELDS: ClassVar[Mapping[str, str]] = {"least": "min_repeats", "most": "max_repeats"}

    batches: tuple[int, ...] = (1, 8)
    warm_up: int = 2
    seconds: float = 5.0
    min_repeats: int = 5
    max_repeats: int = 2000
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.batches:
            raise InputError("no batch sizes to time", fix="give at least one")
        for batch in self.batches:
            at_least(1, batches=batch)
        for size in self.shape or ():
            at_least(1, shape=size)
        at_least(0, warm_up=self.warm_up, seconds=self.seconds)
        at_least(1, min_repeats=self.min_repeats)
        at_least(self.min_repeats, max_repeats=self.max_repeats)


@dataclass(frozen=True)
class Runs:
    """Repeated runs of one engine.

    Attributes:
        host_s: Wall-clock time of each, in seconds.
        device_timings: Times that the engine itself measured; empty if it measures none.
    """

    host_s: tuple[float, ...]
    device_timings: tuple[CallTiming, ...]


@dataclass(frozen=True)
class Interleaved:
    """The result of `run_interleaved`.

    Attributes:
        feeds: Inputs of every run, per engine, in the order given.
        runs: Per engine, in the order given.
        clocks: GPU clocks during the runs; None without a GPU.
    """

    feeds: tuple[Arrays, ...]
    runs: tuple[Runs, ...]
    clocks: GpuClocks | None

    @property
    def by(self) -> TimeSource:
        """The clock for comparing the engines: the GPU's if every engine has GPU times, else the host's."""
        return GPU if all(r.device_timings for r in self.runs) else HOST

    def seconds(self, number: int) -> tuple[float, ...]:
        """Durations of one engine's runs by that clock."""
        runs = self.runs[number]
        return tuple(t.gpu_ms / 1000 for t in runs.device_timings) if self.by == GPU else runs.host_s


def run_interleaved(
    engines: Sequence[Runner], batch: int, options: TimeOptions, clock: Clock, samples: Samples | None = None
) -> Interleaved:
    """Warm up all engines, then run them round-robin on one batch.

    Args:
        engines: Engines with inputs of the same names and shapes.
        batch: Images per run.
        options: Warm-up and repeats.
        clock: Returns seconds.
        samples: The batch are the first of these; by default it is noise.

    Raises:
        InputError: An engine cannot run the batch in one call, or the size of its inputs is not known.
    """
    rejecting = [f"{e.name} accepts {e.batch_for(1)} to {e.max_batch}" for e in engines if not _accepts(e, batch)]
    if rejecting:
        raise InputError(
            f"engines do not accept batches of {batch}",
            found=listed(rejecting),
            fix="build with a --profile that includes it, or time other batch sizes",
        )
    first = engines[0]
    source = noise_samples(first.inputs, batch, options.shape, first.name) if samples is None else samples
    feeds = _filled(next(iter(source.batches(batch))), batch, source)
    own = [_by_own_names(feeds, first, engine) for engine in engines]
    slowest = 0.0
    for engine, inputs in zip(engines, own, strict=True):
        for _ in range(max(options.warm_up, 1)):
            started = clock()
            engine.run(inputs)
            slowest = max(slowest, clock() - started)
    repeats = int(
        np.clip(options.seconds / max(slowest * len(engines), 1e-9), options.min_repeats, options.max_repeats)
    )
    host_s: list[list[float]] = [[] for _ in engines]
    device_timings: list[list[CallTiming]] = [[] for _ in engines]
    on_gpu = any(engine.last_timing is not None for engine in engines)
    with watch_clocks() if on_gpu else contextlib.nullcontext(ClockWatch()) as watch:
        for i in range(repeats):
            # Rotating the order prevents an engine from always running after the same other one.
            for number in np.roll(np.arange(len(engines)), -i).tolist():
                started = clock()
                engines[number].run(own[number])
                host_s[number].append(clock() - started)
                if (timing := engines[number].last_timing) is not None:
                    device_timings[number].append(timing)
    runs = tuple(Runs(tuple(h), tuple(d)) for h, d in zip(host_s, device_timings, strict=True))
    return Interleaved(tuple(own), runs, watch.clocks)


def _filled(feeds: Arrays, batch: int, source: Samples) -> Arrays:
    """A whole batch, whose samples repeat where there are too few."""
    if isinstance(source, TensorSamples) and source.one_run_each:
        return feeds
    return {name: array[np.arange(batch) % len(array)] for name, array in feeds.items()}


def _by_own_names(feeds: Arrays, first: Runner, engine: Runner) -> Arrays:
    """The feeds of the first engine, by another one's names and in its types."""
    names = [spec.name for spec in engine.inputs]
    sources = names if set(names) == set(feeds) else [spec.name for spec in first.inputs]
    return {
        spec.name: feeds[source].astype(spec.dtype, copy=False)
        for spec, source in zip(engine.inputs, sources, strict=True)
    }


def _accepts(engine: Runner, batch: int) -> bool:
    return batch <= engine.max_batch and engine.batch_for(batch) == batch
