"""What `stability` found: bounds, certificates and flips, and how far the bounds lie above what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import ImageSet

HEAD, WHOLE = "head", "whole network"


@dataclass(frozen=True)
class Quantiles:
    """Of one number an image."""

    p10: float
    p50: float
    p90: float
    max: float


@dataclass(frozen=True)
class LayerNorms:
    """A layer's spectral norms as a map, BatchNorm folded in; all are upper bounds."""

    name: str
    dense: float
    masked: float
    difference: float


@dataclass(frozen=True)
class Regime:
    """What bounds certify that start from the measured change at one node, in percent of the images.

    Attributes:
        name: `head`, `last N layers` or `whole network`; the last starts from the images and takes nothing as measured.
        after: The node.
        layers: How many with weights lie behind it.
        certified: Their class cannot change, by any of the three that follow.
        by_norm: By the bound of the logits' change in the Euclidean norm.
        by_largest: By that of the largest change of a logit.
        by_pairs: By those of the differences of two logits.
        tightness: log10 of the bound of the logits' change over the measured one, where there is a change.
        probability_change: The bound of the total variation of the probabilities.
        vacuous: It certifies no image.
    """

    name: str
    after: str
    layers: int
    certified: float
    by_norm: float
    by_largest: float
    by_pairs: float
    tightness: Quantiles | None
    probability_change: Quantiles
    vacuous: bool


@dataclass(frozen=True)
class PairReport:
    """Two networks on the same images.

    Attributes:
        name: Which.
        images: How many.
        flips: Images that they classify differently.
        certified_flips: Of those, certified ones in any regime: 0, or a bound is wrong.
        logits_change: Measured, in the Euclidean norm.
        probability_change: Measured total variation.
        regimes: From the shortest end of the network to the whole.
    """

    name: str
    images: int
    flips: int
    certified_flips: int
    logits_change: Quantiles
    probability_change: Quantiles
    regimes: tuple[Regime, ...]


@dataclass(frozen=True)
class WorstCase:
    """Bounds from norms alone, for every image whose pixels lie in [0, 1].

    Attributes:
        image_norm: The largest, after preprocessing.
        logits_change: The bound.
        probability_change: That of the total variation.
        log10_over_largest_measured: How far it lies above the largest change seen; None where nothing changed.
        certified: Percent of the images whose margin exceeds it.
        vacuous: None does.
    """

    image_norm: float
    logits_change: float
    probability_change: float
    log10_over_largest_measured: float | None
    certified: float
    vacuous: bool


@dataclass(frozen=True)
class Share:
    """Percent of the images certified for all updates up to a relative size."""

    radius: float
    certified: float


@dataclass(frozen=True)
class UpdateBall:
    """All updates of some layers, each at most `radius` times its dense weight in the Frobenius norm, masks kept.

    Attributes:
        name: Which layers, as of a regime.
        layers: How many.
        radius: The largest that keeps an image's class.
        shares: For a few radii.
        vacuous: No image is certified for the smallest of them.
    """

    name: str
    layers: int
    radius: Quantiles
    shares: tuple[Share, ...]
    vacuous: bool


@dataclass(frozen=True)
class UpdateReport:
    """A given update of the weights, masks kept.

    Attributes:
        masked: The masked network before and after it.
        dense_and_masked: The new dense network against the new masked one.
        in_parts_certified: Percent of the images that those two give the same class by a third way: the bounds of what the
            update does to either, and between them what was measured before it.
        in_parts_tightness: As of a regime, of that way.
    """

    masked: PairReport
    dense_and_masked: PairReport
    in_parts_certified: float
    in_parts_tightness: Quantiles | None


@dataclass(frozen=True)
class FlipRate:
    """What the images say of all images of their kind, with `confidence`; rates in percent.

    Attributes:
        images: None of which shaped masks or statistics.
        flips: Images that dense and masked network classify differently.
        rate: Of them.
        limit: The rate on all images is no higher.
        probability_change: 95% of all images have a total variation of at most this.
        confidence: Between 0 and 1.
    """

    images: int
    flips: int
    rate: float
    limit: float
    probability_change: float
    confidence: float


@dataclass(frozen=True)
class StabilityReport:
    """The verdict of `stability`.

    Attributes:
        model: As given.
        trained: False when the weights are random, so that classes mean nothing.
        method: How the masks were chosen.
        recalibrated_images: That the masked network's statistics are of.
        arithmetic: In which networks and bounds were computed; engines in other precisions differ by their own rounding.
        images: Which were looked at, a part of these.
        layers: Norms.
        masking: The dense network against the masked one.
        worst_case: The same for any image.
        balls: Updates that keep the masked network's classes.
        update: Of a given checkpoint, if any.
        flip_rate: The statistical certificate.
        verdict: Which regimes certify images.
    """

    model: str
    trained: bool
    method: str
    recalibrated_images: int
    arithmetic: str
    images: ImageSet
    layers: tuple[LayerNorms, ...]
    masking: PairReport
    worst_case: WorstCase
    balls: tuple[UpdateBall, ...]
    update: UpdateReport | None
    flip_rate: FlipRate
    verdict: str


def quantiles(values: npt.ArrayLike) -> Quantiles:
    """Of at least one number."""
    array = np.asarray(values, dtype=np.float64)
    return Quantiles(*(float(v) for v in np.quantile(array, (0.1, 0.5, 0.9, 1.0))))


def tightness(bounds: npt.ArrayLike, measured: npt.ArrayLike) -> Quantiles | None:
    """Quantiles of log10(bound / measured) where something was measured; None where nothing was."""
    above, below = np.asarray(bounds, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    seen = below > 0
    return quantiles(np.log10(above[seen] / below[seen])) if seen.any() else None


def percent(held: npt.ArrayLike) -> float:
    """How many of some images."""
    return 100 * float(np.mean(np.asarray(held)))


def regime_name(layers: int, shortest: int, whole: int) -> str:
    """What the end of a network is called that has so many layers."""
    if layers == whole:
        return WHOLE
    return HEAD if layers == shortest == 1 else f"last {layers} layers"


def verdict_of(masking: PairReport, balls: Sequence[UpdateBall]) -> str:
    """Which deterministic regimes certify images, or that none does."""
    masked = [f"{r.name} {r.certified:.1f}%" for r in masking.regimes if not r.vacuous]
    updates = [f"{b.name} {s.certified:.1f}% up to {s.radius:g}" for b in balls if not b.vacuous for s in b.shares[:1]]
    if not masked and not updates:
        return "no regime but the statistical one certifies an image"
    return f"certified under masking: {', '.join(masked) or 'none'}; under updates: {', '.join(updates) or 'none'}"
