"""Certificates: images whose class cannot change, given bounds at the head's input or at the logits (lemma L5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.stability.bounds import (
    ROUNDING,
    Floats,
    ForwardObservation,
    Pair,
    change_bounds,
    cut_nodes,
    head_of,
    max_product,
)
from maskplan.pipeline.stability.probabilities import spread, spread_limit

if TYPE_CHECKING:
    from maskplan.pipeline.stability.network import Network

Bools = npt.NDArray[np.bool_]

# Relative margin for rounding in the computation of the bounds.
_SLACK = 1e-9


@dataclass(frozen=True, eq=False)
class Certificates:
    """Certificates of N images.

    Attributes:
        by_norm: (N,), the margin exceeds sqrt(2) times the bound of the change of the logits.
        by_largest: (N,), the margin exceeds twice the bound of the largest change of a logit.
        by_pairs: (N,), for every other class, the margin exceeds the bound of the change of that difference of logits.
        logit_spread: (N,), bound of the largest minus the smallest change of a logit; bounds of probabilities follow (L2).
        change: (N,), bound of the change of the logits in the Euclidean norm.
    """

    by_norm: Bools
    by_largest: Bools
    by_pairs: Bools
    logit_spread: Floats
    change: Floats

    @property
    def certified(self) -> Bools:
        found: Bools = self.by_norm | self.by_largest | self.by_pairs
        return found


def certify(pair: Pair, observed: ForwardObservation, start: int = 0) -> Certificates:
    """Certify images of a batch that have the same class in both networks, by the bounds from `start` on."""
    bounds = change_bounds(pair, observed, start)
    logits, change = observed.logits_first, bounds[-1]
    margins = _margins(logits)
    scale = np.maximum(
        max_product(pair.network, pair.first_norms, observed.sizes_first),
        max_product(pair.network, pair.second_norms, observed.sizes_second),
    )
    margin, rounding = margins.min(axis=1), ROUNDING * scale

    def exceeds(limit: Floats) -> Bools:
        flags: Bools = margin - limit * (1 + _SLACK) > rounding
        return flags

    by_norm = exceeds(spread_limit(change))
    by_largest = exceeds(2 * change)
    by_pairs, logit_spread = by_norm, spread_limit(change)
    head = head_of(pair.network)
    row_distances = pair.row_distances
    if head is not None and observed.head_first is not None and observed.head_second is not None and start < head:
        assert row_distances is not None
        before = bounds[pair.network.nodes[head].inputs[0]]
        # E h + e is measured, W' (h - g) is bounded; the same with E g + e and W.
        sides = (
            (observed.head_first, pair.second[head], row_distances[1]),
            (observed.head_second, pair.first[head], row_distances[0]),
        )
        worst = np.full(margins.shape, np.inf)
        for moved, affine, between in sides:
            lengths = affine.weight.norm(dim=1).numpy()
            largest = (np.abs(moved) + lengths * before[:, None]).max(axis=1)
            by_largest = by_largest | exceeds(2 * largest)
            logit_spread = np.minimum(logit_spread, spread(moved) + between.max() * before)
            top = logits.argmax(axis=1)
            against = _against(moved, top) + between[top] * before[:, None]
            worst = np.minimum(worst, against)
        worst[np.arange(len(logits)), logits.argmax(axis=1)] = 0.0
        # A change may increase the margin, but the class in the first network must itself be above rounding.
        kept = np.minimum(margin, (margins - worst - _SLACK * np.abs(worst)).min(axis=1))
        by_pairs = by_pairs | (kept > rounding)
    return Certificates(by_norm, by_largest, by_pairs, logit_spread, change)


@dataclass(frozen=True)
class Tail:
    """The end of a network, behind a node that all paths pass through.

    Attributes:
        start: That node, whose change is taken as measured.
        after: Its name.
        layers: Names of the layers behind it.
    """

    start: int
    after: str
    layers: tuple[str, ...]


def tails(network: Network) -> tuple[Tail, ...]:
    """The head, then longer and longer ends of a network block by block, and finally the whole network.

    Of several nodes with the same layers behind them, the last is used.
    """
    by_count: dict[int, Tail] = {}
    for cut in cut_nodes(network):
        behind = tuple(network.nodes[i].name for i in network.layers if i > cut)
        if behind:
            by_count[len(behind)] = Tail(cut, network.nodes[cut].name, behind)
    whole = tuple(network.nodes[i].name for i in network.layers)
    by_count[len(whole)] = Tail(0, network.nodes[0].name, whole)
    return tuple(by_count[count] for count in sorted(by_count))


def _margins(logits: Floats) -> Floats:
    """The largest logit minus each logit, shape (N, K); infinite at the largest."""
    rows = np.arange(len(logits))
    top = logits.argmax(axis=1)
    margins: Floats = logits[rows, top][:, None] - logits
    margins[rows, top] = np.inf
    return margins


def _against(moved: Floats, top: npt.NDArray[np.intp]) -> Floats:
    """Measured loss of the margin to each class, shape (N, K)."""
    return moved[np.arange(len(moved)), top][:, None] - moved
