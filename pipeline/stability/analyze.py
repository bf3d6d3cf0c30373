"""The stability stage: bounds, certificates and a flip rate for a network, masks and held-out images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from maskplan.pipeline.core.artifacts import ImageSet, Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError, listed
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.data.dataset import Split, batches
from maskplan.pipeline.stability.bounds import (
    Floats,
    ForwardObservation,
    Pair,
    change_bounds,
    difference_norms,
    max_image_norm,
    observe,
    pair_of,
    worst_case,
)
from maskplan.pipeline.stability.certify import Bools, Certificates, Tail, certify, tails
from maskplan.pipeline.stability.flip_rate import flip_rate_limit, quantile_limit
from maskplan.pipeline.stability.network import Network, affine_maps
from maskplan.pipeline.stability.probabilities import spread_limit, total_variation_limit
from maskplan.pipeline.stability.reader import read_network
from maskplan.pipeline.stability.reading_check import ReadingCheck
from maskplan.pipeline.stability.record import (
    FlipRate,
    LayerNorms,
    PairReport,
    Quantiles,
    Regime,
    Share,
    StabilityReport,
    UpdateBall,
    UpdateReport,
    WorstCase,
    percent,
    quantiles,
    regime_name,
    tightness,
    verdict_of,
)
from maskplan.pipeline.stability.updates import Ball, ball_of, keeps_class, largest_radius

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

State = Mapping[str, "torch.Tensor"]

_ARITHMETIC = "float64"
_VARIATION_QUANTILE = 0.95


@dataclass(frozen=True)
class StabilityOptions:
    """Options of the stability stage.

    Attributes:
        images: Number of held-out images, drawn at random; all images if there are fewer.
        confidence: Confidence of the statistical certificate.
        radii: Relative norms of updates for which certified shares are reported.
        batch: Images per batch; None for a size that fits the image size.
        seed: Seed of the draw of images.
        check_reading: Require the network as read for the bounds to compute the module's logits on all images.
    """

    images: int = 1000
    confidence: float = 0.95
    radii: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    batch: int | None = None
    seed: int = 0
    check_reading: bool = True

    def __post_init__(self) -> None:
        at_least(1, images=self.images, batch=self.batch)
        at_least(0, seed=self.seed)
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}", fix="give a number between 0 and 1, such as 0.95")


@dataclass(frozen=True, eq=False)
class Weights:
    """State dicts of one architecture.

    Attributes:
        dense: Dense weights.
        masked: Masked weights.
        updated: Newer dense weights.
        updated_masked: Newer weights, masked.
    """

    dense: State
    masked: State
    updated: State | None = None
    updated_masked: State | None = None


def analyze(
    module: nn.Module,
    provenance: Provenance,
    weights: Weights,
    method: str,
    val: Split,
    known: ImageSet,
    options: StabilityOptions,
) -> StabilityReport:
    """Bound and measure the effect of masking, and of an update, on a network's outputs.

    Args:
        module: The architecture; its own weights are not used.
        provenance: Provenance of the masked weights.
        weights: The state dicts to compare.
        method: Mask method.
        val: Held-out images, not used for choosing any of the weights and masks.
        known: Digests of these images.
        options: Number of images, and what to report.

    Raises:
        InputError: The bounds do not cover the model, or there are no images.
        PipelineError: The network as read for the bounds differs from the module.
    """
    preprocessing = provenance.preprocessing
    if provenance.outputs:
        returned = ", ".join(map(str, provenance.outputs))
        raise InputError("the bounds are for classifiers only", where=provenance.model, found=f"it returns {returned}")
    if not len(val):
        raise InputError("there are no held-out images", fix="give --data DIR with images in val/")
    network = read_network(module, preprocessing)
    ends = tails(network)
    if not network.layers:
        raise InputError("the model has no layer with weights", where=provenance.model)
    dense, masked = affine_maps(network, weights.dense), affine_maps(network, weights.masked)
    pair = pair_of(network, dense, masked)
    differences = difference_norms(network, dense, masked)
    frobenius = {i: affine.frobenius for i, affine in dense.items()}
    balls = [
        (end, ball_of(network, masked, pair.second_norms, frobenius, [i for i in network.layers if i > end.start]))
        for end in _reported(ends)
    ]
    masking = _PairTally("dense against masked", ends)
    ball_tallies = [_BallTally(end, ball, options.radii) for end, ball in balls]
    update = None if weights.updated is None else _UpdateTally.of(pair, weights, ends)
    margins: list[Floats] = []
    split = val.sample(options.images, options.seed)
    check = ReadingCheck(module, weights.dense, where=provenance.model) if options.check_reading else None
    for images in _batches(split, preprocessing, options):
        observed = observe(pair, images)
        if check is not None:
            check.require_equal(images, observed.logits_first, observed.sizes_first)
            if not margins:
                # What is read does not depend on the weights, so one batch of the masked network is enough.
                masked_check = ReadingCheck(module, weights.masked, where=provenance.model)
                masked_check.require_equal(images, observed.logits_second, observed.sizes_second)
        masking.add(pair, observed)
        for each in ball_tallies:
            each.add(observed)
        margins.append(_margin(observed.logits_first))
        if update is not None:
            update.add(observed, images)
    worst = worst_case(pair, differences, max_image_norm(preprocessing))
    report, updates = masking.report(), tuple(each.report(ends) for each in ball_tallies)
    return StabilityReport(
        model=provenance.model,
        trained=provenance.trained,
        method=method,
        recalibrated_images=provenance.recalibrated_images,
        arithmetic=_ARITHMETIC,
        reading_difference=None if check is None else check.largest_difference,
        images=known,
        layers=tuple(
            LayerNorms(network.nodes[i].name, pair.first_norms[i], pair.second_norms[i], differences[i])
            for i in network.layers
        ),
        masking=report,
        worst_case=_worst(worst.radius, float(worst.changes[-1]), report, np.concatenate(margins)),
        balls=updates,
        update=None if update is None else update.report(),
        flip_rate=_flip_rate(masking, options.confidence),
        verdict=verdict_of(report, updates),
    )


def under_masks(
    module: nn.Module, masks: Mapping[str, np.ndarray], statistics_of: State | None
) -> dict[str, torch.Tensor]:
    """Masked state dict of a module, with its own buffers or, for an update without recalibration, older ones.

    Args:
        module: The module with the newer weights; not modified.
        masks: Masks by weight name.
        statistics_of: State dict whose buffers are used; None for the module's own.
    """
    import torch

    state = dict(module.state_dict())
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if statistics_of is not None:
        state |= {name: value for name, value in statistics_of.items() if name not in parameters}
    for name, mask in masks.items():
        state[name] = torch.where(
            torch.from_numpy(mask).to(state[name].device), state[name], torch.zeros_like(state[name])
        )
    return state


def require_masked(sparse: State, masks: Mapping[str, np.ndarray], *, where: object) -> None:
    """Require a checkpoint to be zero wherever masks prune a weight.

    Raises:
        InputError: Some pruned weights are not zero; all layers are checked.
    """
    wrong = [
        f"{name}: {count} weights"
        for name, mask in masks.items()
        if (count := int(np.count_nonzero(sparse[name].detach().cpu().double().numpy()[~mask])))
    ]
    if wrong:
        raise InputError(
            "the sparse checkpoint was not pruned with these masks",
            where=where,
            found=f"{len(wrong)} of {len(masks)} layers have nonzero weights where the masks prune: {listed(wrong, 3)}",
            fix="give the masks that it was baked with, or omit --sparse",
        )


def _batches(split: Split, preprocessing: Preprocessing, options: StabilityOptions) -> Iterator[torch.Tensor]:
    import torch

    # Both networks keep the float64 values of several nodes in memory.
    size = options.batch or (64 if preprocessing.height * preprocessing.width <= 64**2 else 8)
    for x, _ in track(batches(split, preprocessing, size), "stability", -(-len(split) // size)):
        yield torch.from_numpy(x)


def _reported(ends: Sequence[Tail]) -> list[Tail]:
    """The head, the last block and the whole network."""
    return [*ends[:2], *ends[2:][-1:]]


def _name(end: Tail, ends: Sequence[Tail]) -> str:
    return regime_name(len(end.layers), len(ends[0].layers), len(ends[-1].layers))


def _margin(logits: Floats) -> Floats:
    """The largest logit minus the second largest, shape (N,); infinite for a single class."""
    if logits.shape[1] < 2:
        return np.full(len(logits), np.inf)
    highest = np.partition(logits, -2, axis=1)
    found: Floats = highest[:, -1] - highest[:, -2]
    return found


def _total_variation(first: Floats, second: Floats) -> Floats:
    p, q = (_softmax(logits) for logits in (first, second))
    found: Floats = np.abs(p - q).sum(axis=1) / 2
    return found


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: Floats = powers / powers.sum(axis=1, keepdims=True)
    return found


class _PairTally:
    """Accumulates the report of two networks over batches."""

    def __init__(self, name: str, ends: Sequence[Tail]) -> None:
        self._name, self._ends = name, ends
        self._changes: list[Floats] = []
        self._variation: list[Floats] = []
        self._flips: list[Bools] = []
        self._certificates: list[list[Certificates]] = [[] for _ in ends]

    def add(self, pair: Pair, observed: ForwardObservation) -> None:
        self._changes.append(observed.changes[-1])
        self._variation.append(_total_variation(observed.logits_first, observed.logits_second))
        self._flips.append(observed.logits_first.argmax(axis=1) != observed.logits_second.argmax(axis=1))
        for end, certificates in zip(self._ends, self._certificates, strict=True):
            certificates.append(certify(pair, observed, end.start))

    @property
    def flips(self) -> Bools:
        return np.concatenate(self._flips)

    @property
    def variation(self) -> Floats:
        return np.concatenate(self._variation)

    def report(self) -> PairReport:
        changes = np.concatenate(self._changes)
        certified = np.stack([np.concatenate([c.certified for c in batches]) for batches in self._certificates])
        return PairReport(
            self._name,
            len(changes),
            int(self.flips.sum()),
            int((certified.any(axis=0) & self.flips).sum()),
            quantiles(changes),
            quantiles(self.variation),
            tuple(
                self._regime(end, batches, changes) for end, batches in zip(self._ends, self._certificates, strict=True)
            ),
        )

    def _regime(self, end: Tail, certificates: Sequence[Certificates], changes: Floats) -> Regime:
        def share(flags: Callable[[Certificates], Bools]) -> float:
            return percent(np.concatenate([flags(c) for c in certificates]))

        certified = share(lambda c: c.certified)
        return Regime(
            _name(end, self._ends),
            end.after,
            len(end.layers),
            certified,
            by_norm=share(lambda c: c.by_norm),
            by_largest=share(lambda c: c.by_largest),
            by_pairs=share(lambda c: c.by_pairs),
            tightness=tightness(np.concatenate([c.change for c in certificates]), changes),
            probability_change=quantiles(total_variation_limit(np.concatenate([c.logit_spread for c in certificates]))),
            vacuous=certified == 0,
        )


class _BallTally:
    """Accumulates the report of a ball of updates over batches."""

    def __init__(self, end: Tail, ball: Ball, radii: Sequence[float]) -> None:
        self._end, self._ball, self._radii = end, ball, radii
        self._largest: list[Floats] = []
        self._kept: list[list[Bools]] = [[] for _ in radii]

    def add(self, observed: ForwardObservation) -> None:
        sizes, logits = observed.sizes_second, observed.logits_second
        self._largest.append(largest_radius(self._ball, sizes, logits))
        for radius, kept in zip(self._radii, self._kept, strict=True):
            kept.append(keeps_class(self._ball, sizes, logits, np.full(len(logits), radius)))

    def report(self, ends: Sequence[Tail]) -> UpdateBall:
        shares = [Share(r, percent(np.concatenate(k))) for r, k in zip(self._radii, self._kept, strict=True)]
        return UpdateBall(
            _name(self._end, ends),
            len(self._end.layers),
            quantiles(np.concatenate(self._largest)),
            tuple(shares),
            vacuous=max(s.certified for s in shares) == 0,
        )


class _UpdateTally:
    """Accumulates the report of a given update over batches."""

    def __init__(self, dense: Pair, masked: Pair, both: Pair, ends: Sequence[Tail]) -> None:
        self._dense, self._masked, self._both = dense, masked, both
        self._old_and_new = _PairTally("old masked against new masked", ends)
        self._new = _PairTally("new dense against new masked", ends)
        self._in_parts: list[Floats] = []
        self._measured: list[Floats] = []
        self._certified: list[Bools] = []

    @classmethod
    def of(cls, pair: Pair, weights: Weights, ends: Sequence[Tail]) -> _UpdateTally:
        assert weights.updated is not None
        assert weights.updated_masked is not None
        network: Network = pair.network
        new, new_masked = affine_maps(network, weights.updated), affine_maps(network, weights.updated_masked)
        return cls(
            pair_of(network, pair.first, new),
            pair_of(network, pair.second, new_masked),
            pair_of(network, new, new_masked),
            ends,
        )

    def add(self, before: ForwardObservation, images: torch.Tensor) -> None:
        """Add a batch, given the observation of the dense and the masked network before the update."""
        dense, masked, both = (observe(pair, images) for pair in (self._dense, self._masked, self._both))
        self._old_and_new.add(self._masked, masked)
        self._new.add(self._both, both)
        moved = change_bounds(self._dense, dense)[-1] + change_bounds(self._masked, masked)[-1]
        self._in_parts.append(moved + before.changes[-1])
        self._measured.append(both.changes[-1])
        self._certified.append(_margin(both.logits_first) > 2**0.5 * self._in_parts[-1] * (1 + 1e-9))

    def report(self) -> UpdateReport:
        in_parts: Quantiles | None = tightness(np.concatenate(self._in_parts), np.concatenate(self._measured))
        return UpdateReport(
            self._old_and_new.report(), self._new.report(), percent(np.concatenate(self._certified)), in_parts
        )


def _worst(radius: float, change: float, masking: PairReport, margins: Floats) -> WorstCase:
    largest = masking.logits_change.max
    certified = percent(margins > spread_limit(change) * (1 + 1e-9))
    above = float(np.log10(change / largest)) if largest > 0 else None
    variation = float(total_variation_limit(spread_limit(change)))
    return WorstCase(radius, change, variation, above, certified, vacuous=certified == 0)


def _flip_rate(masking: _PairTally, confidence: float) -> FlipRate:
    flips, images = int(masking.flips.sum()), len(masking.flips)
    return FlipRate(
        images,
        flips,
        100 * flips / images,
        100 * flip_rate_limit(flips, images, confidence),
        quantile_limit(masking.variation, _VARIATION_QUANTILE, confidence, highest=1.0),
        confidence,
    )
