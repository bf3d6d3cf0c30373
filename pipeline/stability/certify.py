"""Images whose class cannot change, given a bound of what changes before the head or at the logits (lemma L5)."""

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
    cuts,
    head_of,
    largest_product,
)
from maskplan.pipeline.stability.probabilities import spread_limit

if TYPE_CHECKING:
    from maskplan.pipeline.stability.network import Network

Bools = npt.NDArray[np.bool_]

# Rounding of the bounds.
_SLACK = 1e-9


@dataclass(frozen=True, eq=False)
class Certificates:
    """What holds for each of N images.

    Attributes:
        by_norm: The margin of the class exceeds sqrt(2) times the bound of the logits' change.
        by_largest: It exceeds twice the bound of the largest change of a logit.
        by_pairs: For every other class, it exceeds the bound of how that pair's difference changes.
        odds: Bound of the largest minus the smallest change of a logit, from which those of probabilities follow (L2).
        change: Bound of the logits' change, in the Euclidean norm.
    """

    by_norm: Bools
    by_largest: Bools
    by_pairs: Bools
    odds: Floats
    change: Floats

    @property
    def certified(self) -> Bools:
        found: Bools = self.by_norm | self.by_largest | self.by_pairs
        return found


def certify(pair: Pair, seen: ForwardObservation, start: int = 0) -> Certificates:
    """Which images of a batch keep the first network's class in the second, as far as the bounds from `start` on tell."""
    bounds = change_bounds(pair, seen, start)
    logits, change = seen.logits_first, bounds[-1]
    margins = _margins(logits)
    scale = np.maximum(
        largest_product(pair.network, pair.first_norms, seen.sizes_first),
        largest_product(pair.network, pair.second_norms, seen.sizes_second),
    )
    least, rounding = margins.min(axis=1), ROUNDING * scale

    def holds(margin: Floats, limit: Floats) -> Bools:
        found: Bools = margin - limit * (1 + _SLACK) > rounding
        return found

    by_norm = holds(least, spread_limit(change))
    by_largest = holds(least, 2 * change)
    by_pairs, odds = by_norm, spread_limit(change)
    head = head_of(pair.network)
    apart = pair.rows_apart
    if head is not None and seen.head_first is not None and seen.head_second is not None and start < head:
        assert apart is not None
        before = bounds[pair.network.nodes[head].inputs[0]]
        # Each side's measured vector goes with the other's weights.
        sides = ((seen.head_first, pair.second[head], apart[1]), (seen.head_second, pair.first[head], apart[0]))
        worst = np.full(margins.shape, np.inf)
        for moved, affine, between in sides:
            lengths = affine.weight.norm(dim=1).numpy()
            largest = (np.abs(moved) + lengths * before[:, None]).max(axis=1)
            by_largest = by_largest | holds(least, 2 * largest)
            odds = np.minimum(odds, np.ptp(moved, axis=1) + between.max() * before)
            top = logits.argmax(axis=1)
            against = _against(moved, top) + between[top] * before[:, None]
            worst = np.minimum(worst, against)
        worst[np.arange(len(logits)), logits.argmax(axis=1)] = 0.0
        # A change may favor the class, but what it is in the first network has to be clear.
        kept = np.minimum(least, (margins - worst - _SLACK * np.abs(worst)).min(axis=1))
        by_pairs = by_pairs | (kept > rounding)
    return Certificates(by_norm, by_largest, by_pairs, odds, change)


@dataclass(frozen=True)
class Tail:
    """The end of a network, behind a node that all paths lead through.

    Attributes:
        start: That node.
        after: Its name; the change there is taken as measured.
        layers: Names of the layers behind it.
    """

    start: int
    after: str
    layers: tuple[str, ...]


def tails(network: Network) -> tuple[Tail, ...]:
    """The head, the ends of a network block by block, and last the whole: shortest first.

    Of places with the same layers behind them the last one counts.
    """
    by_count: dict[int, Tail] = {}
    for cut in cuts(network):
        behind = tuple(network.nodes[i].name for i in network.layers if i > cut)
        if behind:
            by_count[len(behind)] = Tail(cut, network.nodes[cut].name, behind)
    whole = tuple(network.nodes[i].name for i in network.layers)
    by_count[len(whole)] = Tail(0, network.nodes[0].name, whole)
    return tuple(by_count[count] for count in sorted(by_count))


def _margins(logits: Floats) -> Floats:
    """(N, K): the largest logit minus each; infinite at its own."""
    rows = np.arange(len(logits))
    top = logits.argmax(axis=1)
    margins: Floats = logits[rows, top][:, None] - logits
    margins[rows, top] = np.inf
    return margins


def _against(moved: Floats, top: npt.NDArray[np.intp]) -> Floats:
    """(N, K): how much more the class loses than each other, by what was measured."""
    return moved[np.arange(len(moved)), top][:, None] - moved
