"""Is sparse faster? Dense weights, and pruned weights with the sparse flag off and on, each built several times.

The two pruned kinds differ only in their kernels. Builds of one graph differ from each other as well, because the builder
selects kernels by noisy measurements. A gain counts only if it exceeds the largest difference between builds of one kind.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from maskplan.engines.base import Runner
from maskplan.engines.build import SUFFIX, BuildOptions, build_engine
from maskplan.engines.sidecar import read_engine, sidecar_path
from maskplan.engines.trt.options import TrtOptions
from maskplan.pipeline.core.artifacts import EngineFile, OnnxModel
from maskplan.pipeline.core.choices import GPU_BACKENDS
from maskplan.pipeline.core.errors import InputError, host_error, listed
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.reports import GpuClocks
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.timing.interleaved import Clock, TimeOptions, TimeSource, run_interleaved

DENSE, PRUNED, SPARSE = "dense", "pruned", "sparse"
KINDS = (DENSE, PRUNED, SPARSE)
MIN_BUILDS = 3

_NAME = re.compile(rf"({'|'.join(KINDS)})\.\d+({'|'.join(map(re.escape, SUFFIX.values()))})")
_BUILDING = ".building"
_BUILD_AGAIN = "maskplan build PRUNED.onnx --three-way DENSE.onnx -o DIR"
_OF_A_GRAPH = ("ONNX file", "precision")


@dataclass(frozen=True)
class ThreeWayBatch:
    """Result for one batch size.

    Attributes:
        batch: Images per call.
        repeats: Runs of each engine.
        by: Clock of the times: `gpu` if every engine has GPU times, else `host`.
        p50_ms: Median latency by kind, one value per build.
        gain: Ratio of the builds' median latencies, flag off over flag on, minus one.
        spread: The largest such ratio between two builds of one kind, minus one.
        is_faster: The gain exceeds the spread, and the backend has sparse kernels.
        clocks: GPU clocks during the runs; None without a GPU.
        note: Why sparse kernels cannot be the cause of a gain; empty if they can.
    """

    batch: int
    repeats: int
    by: TimeSource
    p50_ms: Mapping[str, tuple[float, ...]]
    gain: float
    spread: float
    is_faster: bool
    clocks: GpuClocks | None = None
    note: str = ""


@dataclass(frozen=True)
class OneBuild:
    """What one engine is built from; `name` is its file name without the suffix."""

    kind: str
    name: str
    model: OnnxModel
    sparse_weights: bool


def planned_builds(
    dense: OnnxModel, pruned: OnnxModel, options: TrtOptions, builds: int = MIN_BUILDS
) -> tuple[OneBuild, ...]:
    """All builds, alternating between the kinds.

    Builds must not share a timing cache: it would make them select the same kernels.

    Raises:
        InputError: A timing cache is given, or fewer than `MIN_BUILDS` builds.
    """
    at_least(MIN_BUILDS, builds=builds)
    if options.timing_cache is not None:
        raise InputError("builds that share a timing cache show no spread", fix="omit --timing-cache")
    sources = {DENSE: (dense, False), PRUNED: (pruned, False), SPARSE: (pruned, True)}
    return tuple(
        OneBuild(kind, f"{kind}.{number}", *source) for number in range(builds) for kind, source in sources.items()
    )


def build_three_way(
    dense: OnnxModel, pruned: OnnxModel, options: BuildOptions, folder: Path, builds: int = MIN_BUILDS
) -> dict[str, tuple[EngineFile, ...]]:
    """Build all three kinds, alternating, into a folder: `dense.0.plan` and so on, with sidecars.

    Existing engines with these names are removed once the last new one is built, so that old and new engines never mix.

    Raises:
        InputError: Raised by the backend or by `planned_builds`.
        HostError: Raised by the backend, or the folder cannot be written.
    """
    building, suffix = folder / _BUILDING, SUFFIX[options.backend]
    engines: dict[str, list[EngineFile]] = {kind: [] for kind in KINDS}
    planned = planned_builds(dense, pruned, options.trt, builds)
    shutil.rmtree(building, ignore_errors=True)
    try:
        for one in planned:
            out = building / f"{one.name}{suffix}"
            engine = build_engine(one.model, replace(options, sparse_weights=one.sparse_weights), out)
            engines[one.kind].append(replace(engine, path=folder / out.name))
        _replace_engines(folder, building)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return {kind: tuple(builds) for kind, builds in engines.items()}


def _replace_engines(folder: Path, building: Path) -> None:
    """Remove the old engines, then move the new ones: an interruption leaves engines missing, never a mixture."""
    try:
        for path in _engines_in(folder):
            path.unlink()
            sidecar_path(path).unlink(missing_ok=True)
        for path in _engines_in(building):
            sidecar_path(path).replace(sidecar_path(folder / path.name))
            path.replace(folder / path.name)
    except OSError as error:
        raise host_error(error, where=folder) from error


def _engines_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if _NAME.fullmatch(p.name))


def read_three_way(folder: Path) -> dict[str, tuple[EngineFile, ...]]:
    """Read the engines of a folder that `build_three_way` wrote, or of any folder with the same file names.

    Raises:
        InputError: Engines are missing, do not match their sidecars, or are not comparable.
    """
    paths = {kind: [p for p in _engines_in(folder) if p.name.startswith(f"{kind}.")] for kind in KINDS}
    missing = [f"{kind}: {len(builds)}" for kind, builds in paths.items() if len(builds) < MIN_BUILDS]
    if missing:
        raise InputError(
            f"{MIN_BUILDS} engines of each kind are required", where=folder, found=listed(missing), fix=_BUILD_AGAIN
        )
    engines = {kind: tuple(map(read_engine, builds)) for kind, builds in paths.items()}
    _require_comparable(engines, folder)
    return engines


def _require_comparable(engines: Mapping[str, Sequence[EngineFile]], folder: Path) -> None:
    """Require one runtime, device and profile list; one graph for dense and one for pruned; the right sparse flags."""
    traits = {e.path: _traits(e) for builds in engines.values() for e in builds}
    problems: dict[Path, list[str]] = {path: [] for path in traits}
    groups = {KINDS: ("runtime", "device", "profiles"), (DENSE,): _OF_A_GRAPH, (PRUNED, SPARSE): _OF_A_GRAPH}
    for kinds, fields in groups.items():
        paths = [e.path for kind in kinds for e in engines[kind]]
        for field in fields:
            ((usual, _),) = Counter(traits[path][field] for path in paths).most_common(1)
            for path in paths:
                if traits[path][field] != usual:
                    problems[path].append(f"{field} {traits[path][field]}, others {usual}")
    for kind, builds in engines.items():
        for e in builds:
            if e.sparse_weights != (kind == SPARSE and e.backend in GPU_BACKENDS):
                problems[e.path].append(f"sparse flag {'on' if e.sparse_weights else 'off'}")
    wrong = [f"{path.name}: {'; '.join(texts)}" for path, texts in problems.items() if texts]
    if wrong:
        raise InputError(
            "the engines are not comparable builds",
            where=folder,
            found="\n         ".join(wrong),
            fix=_BUILD_AGAIN,
        )


def _traits(engine: EngineFile) -> dict[str, str]:
    return {
        "runtime": f"{engine.backend} {engine.runtime_version}",
        "device": f"{engine.device} (compute capability {engine.compute_capability})",
        "profiles": ", ".join(map(str, engine.profiles)),
        "ONNX file": f"sha256 {engine.onnx_sha256[:12]}",
        "precision": engine.precision,
    }


def time_three_way(
    engines: Mapping[str, Sequence[Runner]],
    options: TimeOptions,
    clock: Clock = time.perf_counter,
    note: str = "",
) -> tuple[ThreeWayBatch, ...]:
    """Time all builds of all kinds, interleaved.

    Args:
        engines: Builds by kind, loaded.
        options: Batch sizes and repeats.
        clock: Returns seconds.
        note: Why sparse kernels cannot be the cause of a gain; copied into the result.
    """
    batches = track(options.batches, "time", len(options.batches))
    return tuple(_time_batch(engines, batch, options, clock, note) for batch in batches)


def _time_batch(
    engines: Mapping[str, Sequence[Runner]], batch: int, options: TimeOptions, clock: Clock, note: str
) -> ThreeWayBatch:
    every = [(kind, engine) for kind, builds in engines.items() for engine in builds]
    measured = run_interleaved([engine for _, engine in every], batch, options, clock)
    medians: dict[str, list[float]] = {kind: [] for kind in engines}
    for number, (kind, _) in enumerate(every):
        medians[kind].append(1000 * float(np.median(measured.seconds(number))))
    p50_ms = {kind: tuple(values) for kind, values in medians.items()}
    gain = float(np.median(p50_ms[PRUNED]) / np.median(p50_ms[SPARSE])) - 1
    spread = max(max(values) / min(values) - 1 for values in p50_ms.values())
    repeats = len(measured.runs[0].host_s)
    is_faster = gain > spread and not note
    return ThreeWayBatch(batch, repeats, measured.by, p50_ms, gain, spread, is_faster, measured.clocks, note)
