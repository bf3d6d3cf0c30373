"""Is sparse faster? Dense, pruned with the sparse flag off and on, each built several times and timed in turn.

Only the last two differ by the kernels alone; and builds of one graph differ among themselves, for the builder's own
measurements are noisy. A gain counts when it is larger than that.
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

from maskplan.engines.base import Classifier
from maskplan.engines.build import SUFFIX, BuildOptions, build_engine
from maskplan.engines.sidecar import read_engine, sidecar_path
from maskplan.engines.trt.options import TrtOptions
from maskplan.pipeline.core.artifacts import EngineFile, OnnxModel
from maskplan.pipeline.core.choices import TENSORRT
from maskplan.pipeline.core.errors import InputError, host_error, listed
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.reports import GpuClocks
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.timing.interleaved import Clock, TimeOptions, run_interleaved

DENSE, PRUNED, SPARSE = "dense", "pruned", "sparse"
KINDS = (DENSE, PRUNED, SPARSE)
LEAST_BUILDS = 3

_NAME = re.compile(rf"({'|'.join(KINDS)})\.\d+({'|'.join(map(re.escape, SUFFIX.values()))})")
_BUILDING = ".building"
_BUILD_AGAIN = "maskplan build PRUNED.onnx --three-way DENSE.onnx -o DIR"
_OF_A_GRAPH = ("ONNX file", "precision")


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
        is_faster: The gain exceeds the spread, and there are sparse kernels that it can come from.
        clocks: The GPU's, while these engines ran; None without one.
        note: Why no gain can come from sparse kernels here; empty where it can.
    """

    batch: int
    repeats: int
    by: str
    p50_ms: Mapping[str, tuple[float, ...]]
    gain: float
    spread: float
    is_faster: bool
    clocks: GpuClocks | None = None
    note: str = ""


@dataclass(frozen=True)
class OneBuild:
    """What one of the engines is built from; `name` is that of its file without the suffix."""

    kind: str
    name: str
    model: OnnxModel
    sparse_weights: bool


def planned_builds(
    dense: OnnxModel, pruned: OnnxModel, options: TrtOptions, builds: int = LEAST_BUILDS
) -> tuple[OneBuild, ...]:
    """All builds, the kinds in turn.

    The timing cache is left out: builds that share it would agree by copying each other.

    Raises:
        InputError: A timing cache is asked for, or fewer than three builds.
    """
    at_least(LEAST_BUILDS, builds=builds)
    if options.timing_cache is not None:
        raise InputError("builds that share a timing cache show no spread", fix="leave --timing-cache out")
    sources = {DENSE: (dense, False), PRUNED: (pruned, False), SPARSE: (pruned, True)}
    return tuple(
        OneBuild(kind, f"{kind}.{number}", *source) for number in range(builds) for kind, source in sources.items()
    )


def build_three_way(
    dense: OnnxModel, pruned: OnnxModel, options: BuildOptions, folder: Path, builds: int = LEAST_BUILDS
) -> dict[str, tuple[EngineFile, ...]]:
    """Build all three kinds, in turn, into a folder: `dense.0.plan` and so on, with sidecars.

    Engines of these names that lie there already go when the last new one is built, so that old and new never mix.

    Raises:
        InputError: As of the backend, or of `planned_builds`.
        HostError: As of the backend, or the folder cannot be written.
    """
    building, suffix = folder / _BUILDING, SUFFIX[options.backend]
    made: dict[str, list[EngineFile]] = {kind: [] for kind in KINDS}
    planned = planned_builds(dense, pruned, options.trt, builds)
    shutil.rmtree(building, ignore_errors=True)
    try:
        for one in planned:
            out = building / f"{one.name}{suffix}"
            engine = build_engine(one.model, replace(options, sparse_weights=one.sparse_weights), out)
            made[one.kind].append(replace(engine, path=folder / out.name))
        _replace_engines(folder, building)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return {kind: tuple(engines) for kind, engines in made.items()}


def _replace_engines(folder: Path, building: Path) -> None:
    """First remove, then move: whenever this is cut short, engines are missing, and none is of another build."""
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
    """The engines that `build_three_way` left in a folder, or others of these names that can be held against each other.

    Raises:
        InputError: Some are missing, are not what their sidecars describe, or differ in more than they should.
    """
    found = {kind: [p for p in _engines_in(folder) if p.name.startswith(f"{kind}.")] for kind in KINDS}
    few = [f"{kind}: {len(paths)}" for kind, paths in found.items() if len(paths) < LEAST_BUILDS]
    if few:
        raise InputError(
            f"each kind of engine is needed {LEAST_BUILDS} times", where=folder, found=listed(few), fix=_BUILD_AGAIN
        )
    engines = {kind: tuple(read_engine(path) for path in paths) for kind, paths in found.items()}
    _require_comparable(engines, folder)
    return engines


def _require_comparable(engines: Mapping[str, Sequence[EngineFile]], folder: Path) -> None:
    """All have one runtime, device and profiles; dense ones have one graph, the others another, and the flag as due."""
    told = {e.path: _told(e) for builds in engines.values() for e in builds}
    problems: dict[Path, list[str]] = {path: [] for path in told}
    groups = {KINDS: ("runtime", "device", "profiles"), (DENSE,): _OF_A_GRAPH, (PRUNED, SPARSE): _OF_A_GRAPH}
    for kinds, fields in groups.items():
        paths = [e.path for kind in kinds for e in engines[kind]]
        for field in fields:
            ((usual, _),) = Counter(told[path][field] for path in paths).most_common(1)
            for path in paths:
                if told[path][field] != usual:
                    problems[path].append(f"{field} {told[path][field]}, of others {usual}")
    for kind, builds in engines.items():
        for e in builds:
            if e.sparse_weights != (kind == SPARSE and e.backend == TENSORRT):
                problems[e.path].append(f"sparse flag {'on' if e.sparse_weights else 'off'}")
    wrong = [f"{path.name}: {'; '.join(texts)}" for path, texts in problems.items() if texts]
    if wrong:
        raise InputError(
            "the engines are not builds that can be compared",
            where=folder,
            found="\n         ".join(wrong),
            fix=_BUILD_AGAIN,
        )


def _told(engine: EngineFile) -> dict[str, str]:
    return {
        "runtime": f"{engine.backend} {engine.runtime_version}",
        "device": f"{engine.device} (compute capability {engine.compute_capability})",
        "profiles": ", ".join(map(str, engine.profiles)),
        "ONNX file": f"sha256 {engine.onnx_sha256[:12]}",
        "precision": engine.precision,
    }


def time_three_way(
    engines: Mapping[str, Sequence[Classifier]],
    options: TimeOptions,
    clock: Clock = time.perf_counter,
    note: str = "",
) -> tuple[ThreeWayBatch, ...]:
    """Time all builds of all kinds in turn.

    Args:
        engines: Builds by kind, loaded.
        options: Batch sizes and repeats.
        clock: Seconds.
        note: Why no gain can come from sparse kernels here; goes into the result.
    """
    batches = track(options.batches, "time", len(options.batches))
    return tuple(_time_batch(engines, batch, options, clock, note) for batch in batches)


def _time_batch(
    engines: Mapping[str, Sequence[Classifier]], batch: int, options: TimeOptions, clock: Clock, note: str
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
