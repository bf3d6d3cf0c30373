"""The report of `stability`: bounds, certificates, flips, and the ratio of bounds to measured changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import ImageSet

HEAD, WHOLE = "head", "whole network"


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of a quantity over images."""

    p10: float
    p50: float
    p90: float
    max: float


@dataclass(frozen=True)
class LayerNorms:
    """Upper bounds of a layer's spectral norms, BatchNorm folded in."""

    name: str
    dense: float
    masked: float
    difference: float


@dataclass(frozen=True)
class Regime:
    """Certificates of bounds that start from the measured change at one node, in percent of the images.

    Attributes:
        name: `head`, `last N layers` or `whole network`; the last starts from the images and needs no measured change.
        after: The node.
        layers: Number of layers with weights behind it.
        certified: Images whose class cannot change, by any of the following three.
        by_norm: By the bound of the change of the logits in the Euclidean norm.
        by_largest: By the bound of the largest change of a logit.
        by_pairs: By the bounds of the changes of differences of two logits.
        tightness: log10 of the bound over the measured change of the logits, where there is a change.
        probability_change: Bound of the total variation of the probabilities.
        vacuous: No image is certified.
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
        name: Names of the two.
        images: Number of images.
        flips: Images that the two classify differently.
        certified_flips: Flipped images certified in any regime: 0, or a bound is wrong.
        logits_change: Measured change of the logits, in the Euclidean norm.
        probability_change: Measured total variation.
        regimes: From the shortest end of the network to the whole network.
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
    """Bounds from norms alone, for every image with pixel values in [0, 1].

    Attributes:
        image_norm: The largest norm of a preprocessed image.
        logits_change: Bound of the change of the logits.
        probability_change: Bound of the total variation.
        log10_over_largest_measured: log10 of the bound over the largest measured change; None if nothing changed.
        certified: Percent of the images whose margin exceeds the bound.
        vacuous: No image is certified.
    """

    image_norm: float
    logits_change: float
    probability_change: float
    log10_over_largest_measured: float | None
    certified: float
    vacuous: bool


@dataclass(frozen=True)
class Share:
    """Percent of the images certified for all updates up to a relative norm."""

    radius: float
    certified: float


@dataclass(frozen=True)
class UpdateBall:
    """All updates of some layers, each at most `radius` times the norm of its dense weight (Frobenius), masks kept.

    Attributes:
        name: The layers, named as in a regime.
        layers: Number of layers.
        radius: The largest radius for which an image keeps its class.
        shares: Certified images for a few radii.
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
        masked: The masked network before and after the update.
        dense_and_masked: The new dense network against the new masked one.
        in_parts_certified: Percent of the images to which those two provably give the same class by the triangle inequality:
            the bounds of the update's effect on either network, plus the change measured between them before the update.
        in_parts_tightness: As in a regime, for that sum.
    """

    masked: PairReport
    dense_and_masked: PairReport
    in_parts_certified: float
    in_parts_tightness: Quantiles | None


@dataclass(frozen=True)
class FlipRate:
    """Statistical bounds for all images of the same distribution, with `confidence`; rates in percent.

    Attributes:
        images: Number of images, none of which was used for choosing masks or statistics.
        flips: Images that the dense and the masked network classify differently.
        rate: Share of flips among the images.
        limit: Upper confidence bound of the rate on all images.
        probability_change: Upper confidence bound of the 95% quantile of the total variation.
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
        model: The model's name as given.
        trained: False if the weights are random, so that classes are meaningless.
        method: Mask method.
        recalibrated_images: Number of images behind the masked network's BatchNorm statistics.
        arithmetic: Precision of networks and bounds; engines in other precisions differ by their own rounding.
        reading_difference: Largest difference between the logits of the module and of the network as read for the bounds,
            relative to the largest logit of the image; it is rounding. None if it was not checked.
        images: The image set from which the images were drawn.
        layers: Norms of the layers.
        masking: The dense network against the masked one.
        worst_case: The same for any image.
        balls: Updates that keep the masked network's classes.
        update: Effect of the given update, if any.
        flip_rate: The statistical certificate.
        verdict: Regimes that certify images.
    """

    model: str
    trained: bool
    method: str
    recalibrated_images: int
    arithmetic: str
    reading_difference: float | None
    images: ImageSet
    layers: tuple[LayerNorms, ...]
    masking: PairReport
    worst_case: WorstCase
    balls: tuple[UpdateBall, ...]
    update: UpdateReport | None
    flip_rate: FlipRate
    verdict: str


def quantiles(values: npt.ArrayLike) -> Quantiles:
    """Quantiles of at least one number."""
    array = np.asarray(values, dtype=np.float64)
    return Quantiles(*(float(v) for v in np.quantile(array, (0.1, 0.5, 0.9, 1.0))))


def tightness(bounds: npt.ArrayLike, measured: npt.ArrayLike) -> Quantiles | None:
    """Quantiles of log10(bound / measured) over images with a change; None without any."""
    above, below = np.asarray(bounds, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    changed = below > 0
    return quantiles(np.log10(above[changed] / below[changed])) if changed.any() else None


def percent(flags: npt.ArrayLike) -> float:
    """Share of True values, in percent."""
    return 100 * float(np.mean(np.asarray(flags)))


def regime_name(layers: int, shortest: int, whole: int) -> str:
    """Name of the end of a network, by its number of layers."""
    if layers == whole:
        return WHOLE
    return HEAD if layers == shortest == 1 else f"last {layers} layers"


def verdict_of(masking: PairReport, balls: Sequence[UpdateBall]) -> str:
    """Summary of the deterministic regimes that certify images."""
    masking_regimes = [f"{r.name} {r.certified:.1f}%" for r in masking.regimes if not r.vacuous]
    updates = [f"{b.name} {s.certified:.1f}% up to {s.radius:g}" for b in balls if not b.vacuous for s in b.shares[:1]]
    if not masking_regimes and not updates:
        return "only the statistical regime certifies images"
    return f"certified under masking: {', '.join(masking_regimes) or 'none'}; under updates: {', '.join(updates) or 'none'}"
