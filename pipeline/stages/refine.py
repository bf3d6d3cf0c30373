"""Refine: a mask on a layer that the engine runs dense costs accuracy and gains no time; the layer gets its weights back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from maskplan.pipeline.core.artifacts import EngineFile, MaskSet
from maskplan.pipeline.core.choices import DENSE, FAIL, NOT_APPLICABLE, SPARSE, UNKNOWN
from maskplan.pipeline.core.refinement import PassFigures, PassTiming
from maskplan.pipeline.core.reports import BatchTiming, ConformanceReport, ParityReport, TimingReport
from maskplan.pipeline.timing.interleaved import HOST

Pass = Literal["first", "refined"]

FIRST: Final = "first"
REFINED: Final = "refined"

# Why a layer has no mask, in the refined mask set.
RAN_DENSE = "ran_dense"


@dataclass(frozen=True)
class Choice:
    """Which engine to keep, `first` or `refined`, and why."""

    kept: Pass
    reason: str


def layers_to_restore(engine: EngineFile, conformance: ConformanceReport, masks: MaskSet) -> tuple[str, ...]:
    """Names of the masked weights that the engine certainly runs dense, in the order of the masks.

    A weight is restored if every ONNX node that uses it belongs to engine layers that all run dense, in every profile. One
    sparse layer is a reason to keep the mask. One unknown layer, or a node that no layer names, is no evidence, and without
    evidence nothing changes.

    Args:
        engine: Built from the checked file with the sparse flag.
        conformance: Of that file; it maps nodes to the weights' names in the checkpoint.
        masks: The masks baked into that file.
    """
    states = _states_by_weight(engine, conformance)
    return tuple(m.name for m in masks.masked if states.get(m.name) == {DENSE})


def why_skip(
    engine: EngineFile, conformance: ConformanceReport, masks: MaskSet, restored: tuple[str, ...]
) -> str | None:
    """The reason why a second pass would be useless; None if it is useful."""
    if not engine.layers:
        return f"{engine.backend} gives no evidence of which layers run sparse"
    if len(restored) == len(masks.masked):
        return f"all {len(restored)} masked layers run dense: without their masks this would be the dense engine"
    if restored:
        return None
    states = _states_by_weight(engine, conformance)
    sparse = sum(SPARSE in states.get(m.name, {UNKNOWN}) for m in masks.masked)
    if sparse == len(masks.masked):
        return f"all {sparse} masked layers run sparse"
    return f"no masked layer is known to run dense: {sparse} run sparse, {len(masks.masked) - sparse} are unknown"


def figures(
    engine: EngineFile, masks: MaskSet, on_select: ParityReport | None = None, timing: TimingReport | None = None
) -> PassFigures:
    """The figures of one pass that `better` compares; accuracy and times are missing where there is nothing to choose."""
    by_output = on_select.by_output if on_select is not None else ()
    errors = [o.relative_error for o in by_output if o.relative_error is not None]
    return PassFigures(
        engine_sha256=engine.sha256,
        masked_layers=len(masks.masked),
        verdict=on_select.verdict if on_select is not None else NOT_APPLICABLE,
        top1_drop=on_select.top1_drop if on_select is not None else None,
        batches=tuple(_timed(b) for b in timing.batches) if timing is not None else (),
        relative_error=max(errors) if errors else None,
    )


def _timed(found: BatchTiming) -> PassTiming:
    """Medians by the clock that the speedup uses."""
    sparse_ms, dense_ms = (e.p50_ms if found.by == HOST else e.gpu_ms or e.p50_ms for e in (found.sparse, found.dense))
    return PassTiming(found.batch, sparse_ms, dense_ms, found.speedup, found.ratio_ci95, found.build_spread)


def better(first: PassFigures, refined: PassFigures, restored: tuple[str, ...]) -> Choice:
    """Choose which of two engines to keep.

    Accuracies are those on `select`. The refined engine is kept if it is not slower beyond the noise at any batch size and
    its top-1 drop, or its relative error, is not larger. It wins ties because it is closer to the dense model, provided that
    something was restored. Figures that were not measured do not count. An engine that fails the gate never replaces one
    that passes.

    Each engine was interleaved with the dense engine, not with the other one, so they are compared by their speedups over
    the same dense file. A difference is noise unless the intervals of the speedups are disjoint and it exceeds what one file
    varies by from load to load: the larger of the build spreads, where known, and the drift of the dense engine between the
    two timings.
    """
    if not restored:
        return Choice(FIRST, "no layer got its weights back")
    if (first.verdict == FAIL) != (refined.verdict == FAIL):
        if first.verdict == FAIL:
            return Choice(REFINED, "the first engine fails the parity gate on `select`")
        return Choice(FIRST, "the refined engine fails the parity gate on `select`")
    losses: list[str] = []
    reasons: list[str] = []
    if first.top1_drop is not None and refined.top1_drop is not None:
        drops = f"top-1 drop {refined.top1_drop:.2f} points, {first.top1_drop:.2f} before"
        (losses if refined.top1_drop > first.top1_drop else reasons).append(drops)
    if first.relative_error is not None and refined.relative_error is not None:
        errors = f"relative error {refined.relative_error:.3g}, {first.relative_error:.3g} before"
        (losses if refined.relative_error > first.relative_error else reasons).append(errors)
    timed = {b.batch: b for b in first.batches}
    pairs = [(timed[b.batch], b) for b in refined.batches if b.batch in timed]
    slower = [pair for pair in pairs if _is_slower(*pair)]
    times = ", ".join(
        f"{b.speedup:.3f}x dense at batch {b.batch} ({a.speedup:.3f}x before)" for a, b in slower or pairs
    )
    if slower:
        losses.append(f"slower beyond the noise: {times}")
    elif pairs:
        reasons.append(f"not slower beyond the noise: {times}")
    if losses:
        return Choice(FIRST, f"the refined engine is worse: {'; '.join(losses)}")
    return Choice(
        REFINED, "; ".join(reasons) or "neither time nor accuracy was measured; it is closer to the dense model"
    )


def _states_by_weight(engine: EngineFile, conformance: ConformanceReport) -> dict[str, set[str]]:
    """The states of all layers with a node that uses the weight; unknown for a node that no layer names."""
    by_node: dict[str, set[str]] = {}
    for layer in engine.layers:
        for node in layer.nodes:
            by_node.setdefault(node, set()).add(layer.state)
    found: dict[str, set[str]] = {}
    for weight in conformance.weights:
        found.setdefault(weight.name, set()).update(by_node.get(weight.node, {UNKNOWN}))
    return found


def _is_slower(first: PassTiming, refined: PassTiming) -> bool:
    spreads = [s for s in (first.build_spread, refined.build_spread) if s is not None]
    drift = abs(refined.dense_p50_ms / first.dense_p50_ms - 1)
    disjoint = refined.ratio_ci95[1] < first.ratio_ci95[0]
    return disjoint and first.speedup / refined.speedup - 1 > max([drift, *spreads])
