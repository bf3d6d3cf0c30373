"""What the second pass of `--refine` measured: frozen records."""

from __future__ import annotations

from dataclasses import dataclass, field

from maskplan.pipeline.core.choices import GateVerdict


@dataclass(frozen=True)
class PassFigures:
    """Results of one pass of the pipeline.

    Attributes:
        engine_sha256: Of its engine.
        masked_layers: How many weights its masks prune.
        verdict: Of the parity gate on `select`.
        top1_drop: Points against the dense model on `select`; None without labeled images.
        batches: Its engine's times; each `speedup` is against the one dense engine of both passes.
        relative_error: The largest of any output, on `select`; of networks that are compared by output.
    """

    engine_sha256: str
    masked_layers: int
    verdict: GateVerdict
    top1_drop: float | None
    batches: tuple[PassTiming, ...]
    relative_error: float | None = field(default=None, metadata={"omit_empty": True})


@dataclass(frozen=True)
class PassTiming:
    """One batch size of a pass. Medians are by the clock of the speedup, GPU or host."""

    batch: int
    p50_ms: float
    dense_p50_ms: float
    speedup: float
    ratio_ci95: tuple[float, float]
    build_spread: float | None


@dataclass(frozen=True)
class Refinement:
    """Result of a second pass in which layers that ran dense get their dense weights back.

    Attributes:
        restored: Weights without masks in the second pass; empty if it was skipped.
        kept: `first` or `refined`.
        reason: Why that one, or why there was no second pass.
        first: The engine with all masks.
        refined: The engine without the masks of `restored`; None if the second pass was skipped.
    """

    restored: tuple[str, ...]
    kept: str
    reason: str
    first: PassFigures
    refined: PassFigures | None
