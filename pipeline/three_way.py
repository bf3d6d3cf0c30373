"""Is sparse faster? Dense, pruned with the sparse flag off and on, each built several times and timed in turn.

Only the last two differ by the kernels alone; and builds of one graph differ among themselves, for the builder's own
measurements are noisy. A gain counts when it is larger than that.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engines.base import Classifier
from engines.build import SUFFIX, BuildOptions, build_engine
from engines.sidecar import read_engine
from pipeline.artifacts import EngineFile, OnnxModel
from pipeline.bounds import at_least
from pipeline.errors import InputError, listed
from pipeline.in_turn import Clock, TimeOptions, run_in_turn
from pipeline.progress import track
from pipeline.reports import GpuClocks

DENSE, PRUNED, SPARSE = "dense", "pruned", "sparse"
KINDS = (DENSE, PRUNED, SPARSE)
LEAST_BUILDS = 3


@dataclass(frozen=True)
class ThreeWayBatch:
    """One batch size.

    Attributes:
        batch: Images a call.
        repeats: Runs of each engine.
        by: Whose time it is: `gpu` where every engine tells it, else `host`.
        p50_ms: Medians by kind, one for each build.
        gain: How much longer pruned takes with the flag off than on: the ratio of the builds' medians, less one.
        spread: The largest such figure between two builds of one kind.
        is_faster: The gain exceeds the spread.
        clocks: The GPU's, while these engines ran; None without one.
    """

    batch: int
    repeats: int
    by: str
    p50_ms: Mapping[str, tuple[float, ...]]
    gain: float
    spread: float
    is_faster: bool
    clocks: GpuClocks | None = None


def build_three_way(
    dense: OnnxModel, pruned: OnnxModel, options: BuildOptions, folder: Path, builds: int = LEAST_BUILDS
) -> dict[str, tuple[EngineFile, ...]]:
    """Build all three kinds, in turn, into a folder: `dense.0.plan` and so on, with sidecars.

    The timing cache is left out: builds that share it would agree by copying each other.

    Raises:
        InputError: As of the backend, or fewer than three builds.
    """
    at_least(LEAST_BUILDS, builds=builds)
    if options.trt.timing_cache is not None:
        raise InputError("builds that share a timing cache show no spread", fix="leave --timing-cache out")
    sources = {DENSE: (dense, False), PRUNED: (pruned, False), SPARSE: (pruned, True)}
    made: dict[str, list[EngineFile]] = {kind: [] for kind in KINDS}
    for number in range(builds):
        for kind, (model, sparse_weights) in sources.items():
            out = folder / f"{kind}.{number}{SUFFIX[options.backend]}"
            made[kind].append(build_engine(model, replace(options, sparse_weights=sparse_weights), out))
    return {kind: tuple(engines) for kind, engines in made.items()}


def read_three_way(folder: Path) -> dict[str, tuple[EngineFile, ...]]:
    """The engines that `build_three_way` left in a folder.

    Raises:
        InputError: Some are missing, or are not what their sidecars describe.
    """
    found = {kind: sorted(p for p in folder.glob(f"{kind}.*") if p.suffix in SUFFIX.values()) for kind in KINDS}
    few = [f"{kind}: {len(paths)}" for kind, paths in found.items() if len(paths) < LEAST_BUILDS]
    if few:
        raise InputError(
            f"each kind of engine is needed {LEAST_BUILDS} times",
            where=folder,
            found=listed(few),
            fix="maskplan build PRUNED.onnx --three-way DENSE.onnx -o DIR",
        )
    return {kind: tuple(read_engine(path) for path in paths) for kind, paths in found.items()}


def time_three_way(
    engines: Mapping[str, Sequence[Classifier]], options: TimeOptions, clock: Clock = time.perf_counter
) -> tuple[ThreeWayBatch, ...]:
    """Time all builds of all kinds in turn.

    Args:
        engines: Builds by kind, loaded.
        options: Batch sizes and repeats.
        clock: Seconds.
    """
    batches = track(options.batches, "time", len(options.batches))
    return tuple(_time_batch(engines, batch, options, clock) for batch in batches)


def _time_batch(
    engines: Mapping[str, Sequence[Classifier]], batch: int, options: TimeOptions, clock: Clock
) -> ThreeWayBatch:
    every = [(kind, engine) for kind, builds in engines.items() for engine in builds]
    measured = run_in_turn([engine for _, engine in every], batch, options, clock)
    medians: dict[str, list[float]] = {kind: [] for kind in engines}
    for number, (kind, _) in enumerate(every):
        medians[kind].append(1000 * float(np.median(measured.seconds(number))))
    p50_ms = {kind: tuple(values) for kind, values in medians.items()}
    gain = float(np.median(p50_ms[PRUNED]) / np.median(p50_ms[SPARSE])) - 1
    spread = max(max(values) / min(values) - 1 for values in p50_ms.values())
    repeats = len(measured.runs[0].host_s)
    return ThreeWayBatch(batch, repeats, measured.by, p50_ms, gain, spread, gain > spread, measured.clocks)
