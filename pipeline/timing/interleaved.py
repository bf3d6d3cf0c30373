"""Runs of several engines in turn, so that a host that slows down slows them all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskplan.engines.base import CallTiming, Classifier
from maskplan.engines.trt.clocks import ClockWatch, watch_clocks
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.reports import GpuClocks
from maskplan.pipeline.core.validation import at_least

GPU, HOST = "gpu", "host"
_SEED = 1

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


@dataclass(frozen=True)
class Runs:
    """Repeated runs of one engine.

    Attributes:
        host_s: Wall clock of each, in seconds.
        spent: The engine's own account of each; empty where it keeps none.
    """

    host_s: tuple[float, ...]
    spent: tuple[CallTiming, ...]


@dataclass(frozen=True)
class Interleaved:
    """What `run_interleaved` measured.

    Attributes:
        images: What the engines ran on.
        runs: By engine, in the order given.
        clocks: The GPU's meanwhile; None without one.
    """

    images: npt.NDArray[np.float32]
    runs: tuple[Runs, ...]
    clocks: GpuClocks | None

    @property
    def by(self) -> str:
        """The clock that tells these engines apart: the GPU's where every one has it, else the host's."""
        return GPU if all(r.spent for r in self.runs) else HOST

    def seconds(self, number: int) -> tuple[float, ...]:
        """Of an engine's runs, by that clock."""
        runs = self.runs[number]
        return tuple(s.gpu_ms / 1000 for s in runs.spent) if self.by == GPU else runs.host_s


def run_interleaved(engines: Sequence[Classifier], batch: int, options: TimeOptions, clock: Clock) -> Interleaved:
    """Run engines on one batch of noise, one after the other, over and over; each has warmed up before.

    Args:
        engines: Of one input shape.
        batch: Images a run.
        options: Warm-up, and for how long.
        clock: Seconds.

    Raises:
        InputError: An engine does not take the batch in one call.
    """
    unfit = [f"{e.name} takes {e.batch_for(1)} to {e.largest_batch}" for e in engines if not _takes(e, batch)]
    if unfit:
        raise InputError(
            f"engines do not take batches of {batch}",
            found=listed(unfit),
            fix="build with a --profile that holds it, or time other batches",
        )
    rest = (d or 1 for d in engines[0].input.shape[1:])
    images = np.random.default_rng(_SEED).standard_normal((batch, *rest), dtype=np.float32)
    slowest = 0.0
    for engine in engines:
        for _ in range(max(options.warm_up, 1)):
            started = clock()
            engine.logits(images)
            slowest = max(slowest, clock() - started)
    repeats = int(np.clip(options.seconds / max(slowest * len(engines), 1e-9), options.least, options.most))
    host_s: list[list[float]] = [[] for _ in engines]
    spent: list[list[CallTiming]] = [[] for _ in engines]
    on_gpu = any(engine.spent is not None for engine in engines)
    with watch_clocks() if on_gpu else contextlib.nullcontext(ClockWatch()) as watch:
        for i in range(repeats):
            # Rotating the order keeps one engine from always running after the same other.
            for number in np.roll(np.arange(len(engines)), -i).tolist():
                started = clock()
                engines[number].logits(images)
                host_s[number].append(clock() - started)
                if (told := engines[number].spent) is not None:
                    spent[number].append(told)
    runs = tuple(Runs(tuple(h), tuple(s)) for h, s in zip(host_s, spent, strict=True))
    return Interleaved(images, runs, watch.clocks)


def _takes(engine: Classifier, batch: int) -> bool:
    return batch <= engine.largest_batch and engine.batch_for(batch) == batch
