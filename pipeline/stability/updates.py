"""Weight updates under fixed masks: how large they may be before a class can change (lemma L6)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from maskplan.pipeline.stability.bounds import (
    ROUNDING,
    Floats,
    Norms,
    head_of,
    max_product,
    pairwise_distances,
    propagate,
)
from maskplan.pipeline.stability.network import Affine, Conv, Maps, Network, Scale
from maskplan.pipeline.stability.norms import conv_update_factor

_STEPS = 60
_SMALLEST, _LARGEST = 1e-12, 1e3


@dataclass(frozen=True, eq=False)
class Ball:
    """All updates U of some layers with |U| <= rho |W| in the Frobenius norm; biases and statistics are fixed.

    Attributes:
        network: The architecture.
        maps: Its layers before the update.
        norms: Upper bounds of their spectral norms.
        max_update_norms: By node, bound of the spectral norm of an update at rho = 1; 0 for layers that are not updated.
    """

    network: Network
    maps: Maps
    norms: Norms
    max_update_norms: Norms

    @cached_property
    def row_distances(self) -> Floats | None:
        """Distances between the rows of the head, (K, K); None without a head."""
        head = head_of(self.network)
        return None if head is None else pairwise_distances(self.maps[head].weight.numpy())


def ball_of(network: Network, maps: Maps, norms: Norms, sizes: Norms, layers: Collection[int]) -> Ball:
    """The ball of updates around a masked network.

    Masking an update does not increase its norm, so the ball contains masked updates.

    Args:
        network: The architecture.
        maps: Its layers, masked.
        norms: Upper bounds of their spectral norms.
        sizes: By node, the Frobenius norm |W| of the dense weights, to which updates are relative.
        layers: Nodes of the layers that are updated.
    """
    max_update_norms = {
        i: _max_update_norm(network, i, affine) * sizes[i] if i in layers else 0.0 for i, affine in maps.items()
    }
    return Ball(network, maps, norms, max_update_norms)


def ball_changes(ball: Ball, sizes: Floats, rho: Floats) -> Floats:
    """Bounds of the change of each node's values by an update in the ball, shape (nodes, N).

    Args:
        ball: Center and layers.
        sizes: (nodes, N), norms of the values before the update.
        rho: (N,), the radius for each image.
    """

    def layer(i: int, before: Floats) -> Floats:
        moved: Floats = ball.max_update_norms[i] * rho
        found: Floats = moved * sizes[ball.network.nodes[i].inputs[0]] + (ball.norms[i] + moved) * before
        return found

    return propagate(ball.network, layer, np.zeros(sizes.shape[1]))


def keeps_class(ball: Ball, sizes: Floats, logits: Floats, rho: Floats) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which images keep their class under every update in the ball, shape (N,).

    Args:
        ball: Center and layers.
        sizes: (nodes, N), norms of the values before the update.
        logits: (N, K) before the update.
        rho: (N,), the radius for each image.
    """
    changes = ball_changes(ball, sizes, rho)
    rows = np.arange(len(logits))
    top = logits.argmax(axis=1)
    margins = logits[rows, top][:, None] - logits
    limits = np.broadcast_to(2**0.5 * changes[-1][:, None], margins.shape)
    head, between = head_of(ball.network), ball.row_distances
    if head is not None and between is not None:
        read = ball.network.nodes[head].inputs[0]
        # Two rows of an update differ by at most sqrt(2) times its norm.
        moved = 2**0.5 * ball.max_update_norms[head] * rho
        row_distances = between[top]
        pairs = (moved * sizes[read])[:, None] + (row_distances + moved[:, None]) * changes[read][:, None]
        limits = np.minimum(limits, pairs)
    rounding = ROUNDING * max_product(ball.network, ball.norms, sizes)
    kept = margins - limits * (1 + 1e-9) > rounding[:, None]
    kept[rows, top] = True
    found: np.ndarray[tuple[int], np.dtype[np.bool_]] = kept.all(axis=1)
    return found


def largest_radius(ball: Ball, sizes: Floats, logits: Floats) -> Floats:
    """The largest radius for which each image keeps its class, (N,), by bisection; 0 if below 1e-12."""
    low = np.full(len(logits), np.log(_SMALLEST))
    high = np.full(len(logits), np.log(_LARGEST))
    for _ in range(_STEPS):
        middle = (low + high) / 2
        kept = keeps_class(ball, sizes, logits, np.exp(middle))
        low, high = np.where(kept, middle, low), np.where(kept, high, middle)
    radius = np.exp(low)
    found: Floats = np.where(keeps_class(ball, sizes, logits, radius), radius, 0.0)
    return found


def _max_update_norm(network: Network, i: int, affine: Affine) -> float:
    """Bound of the spectral norm of an update with Frobenius norm 1, BatchNorm folded in."""
    op = network.nodes[i].op
    if isinstance(op, Scale):
        return 0.0
    factor = 1.0
    if isinstance(op, Conv):
        height, width = affine.weight.shape[2:]
        factor = conv_update_factor((height, width), op.stride, op.dilation)
    return affine.gain * factor
