"""Bounds on the difference of two networks of one architecture at every node, per image and for any image (lemmas L1, L3).

At a layer, W h - W' g = (W - W') h + W' (h - g) = (W - W') g + W (h - g). The first term is measured; of the second only the
norm of h - g is bounded. Both forms hold, so the smaller bound is used. Masking can increase a spectral norm, so W' needs a
norm of its own. Two refinements: vectors that meet in a sum are added before taking their norm, and behind a ReLU only
values count that are positive in at least one of the two networks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.stability.network import (
    Affine,
    Cat,
    Conv,
    Linear,
    Maps,
    Network,
    Node,
    Operator,
    Sum,
    Weighted,
    apply_node,
)
from maskplan.pipeline.stability.norms import conv_norm, linear_norm

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float64]
Norms = Mapping[int, float]

ROUNDING = 1e-12
"""Margins below this share of `max_product` may be an effect of rounding in float64, so they certify nothing."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two networks of one architecture.

    Attributes:
        network: The architecture.
        first: Layers of the first network, by node.
        second: Layers of the second network, by node.
        first_norms: Upper bounds of the spectral norms of the first network's layers.
        second_norms: The same for the second network.
    """

    network: Network
    first: Maps
    second: Maps
    first_norms: Norms
    second_norms: Norms

    @cached_property
    def row_distances(self) -> tuple[Floats, Floats] | None:
        """Distances between the rows of each network's head, two (K, K) arrays; None without a head."""
        head = head_of(self.network)
        if head is None:
            return None
        return pairwise_distances(self.first[head].weight.numpy()), pairwise_distances(self.second[head].weight.numpy())


@dataclass(frozen=True, eq=False)
class ForwardObservation:
    """Measurements of a pair on N images, float64; h are values of the first network, g of the second.

    Attributes:
        changes: (nodes, N), norms of h - g.
        sizes_first: (nodes, N), norms of h.
        sizes_second: (nodes, N), norms of g.
        local_first: (nodes, N), norms of E h + e, where E and e are the differences of weights and biases. At a sum, of all
            its layers together; at a ReLU behind a layer or sum, without values that are 0 in both networks; 0 elsewhere.
        local_second: The same with E g + e.
        logits_first: (N, K).
        logits_second: (N, K).
        head_first: (N, K), E h + e at the head; None if the last node is not a linear layer on one vector per image.
        head_second: The same with E g + e.
    """

    changes: Floats
    sizes_first: Floats
    sizes_second: Floats
    local_first: Floats
    local_second: Floats
    logits_first: Floats
    logits_second: Floats
    head_first: Floats | None
    head_second: Floats | None


def spectral_norms(network: Network, maps: Maps) -> dict[int, float]:
    """Upper bounds of the spectral norms of layers, by node."""
    return {i: _spectral_norm(network, i, affine) for i, affine in maps.items()}


def difference_norms(network: Network, first: Maps, second: Maps) -> dict[int, float]:
    """Upper bounds of the spectral norms of W - W', by node."""
    return spectral_norms(network, {i: _difference(first[i], second[i]) for i in first})


def pair_of(network: Network, first: Maps, second: Maps) -> Pair:
    """Compute the norms of two networks; layers that are equal in both are computed once."""
    norms = spectral_norms(network, first)
    new = {i: affine for i, affine in second.items() if _differs(first[i], affine)}
    return Pair(network, first, second, norms, norms | spectral_norms(network, new))


def head_of(network: Network) -> int | None:
    """The last node if it is a linear layer on one vector per image, else None."""
    last = len(network.nodes) - 1
    return last if isinstance(network.nodes[last].op, Linear) and len(network.nodes[last].shape) == 1 else None


def pairwise_distances(rows: Floats) -> Floats:
    """Euclidean distances between the rows of a (K, C) matrix, shape (K, K), never too small."""
    squares = (rows**2).sum(axis=1)
    rounded = np.sqrt(np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0))
    # Cancellation leaves a rounding error relative to the squares, so round up by more than that.
    found: Floats = rounded + 1e-7 * np.sqrt(squares.max(initial=0.0))
    return found


def max_product(network: Network, norms: Norms, sizes: Floats) -> Floats:
    """The largest bound |W| |x| over all layers, shape (N,): the scale of rounding errors in a forward pass.

    Biases may cancel a product W x, but not the rounding error that it leaves.

    Args:
        network: The architecture.
        norms: Spectral norms of its layers.
        sizes: (nodes, N), norms of all values.
    """
    found: Floats = np.max([norms[i] * sizes[network.nodes[i].inputs[0]] for i in network.layers], axis=0)
    return found


def observe(pair: Pair, images: torch.Tensor) -> ForwardObservation:
    """Run both networks on a batch (N, C, H, W) in float64, node by node, and measure their differences."""
    import torch

    network, head = pair.network, head_of(pair.network)
    count, batch = len(network.nodes), len(images)
    changes, sizes_first, sizes_second, local_first, local_second = np.zeros((5, count, batch))
    differences = {i: _difference(pair.first[i], pair.second[i]) for i in network.layers}
    last_uses = network.last_uses
    h: dict[int, torch.Tensor] = {}
    g: dict[int, torch.Tensor] = {}
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    heads: tuple[Floats, Floats] | None = None
    with torch.no_grad():
        for i, node in enumerate(network.nodes):
            if node.op is None:
                h[i] = g[i] = images.detach().cpu().double()
            else:
                h[i] = apply_node(node, pair.first.get(i), [h[j] for j in node.inputs])
                g[i] = apply_node(node, pair.second.get(i), [g[j] for j in node.inputs])
            added = None
            if i in differences and _differs(pair.first[i], pair.second[i]):
                read = node.inputs[0]
                added = (apply_node(node, differences[i], [h[read]]), apply_node(node, differences[i], [g[read]]))
            elif isinstance(node.op, Sum):
                added = _sum_of_layers(node, pair, moved)
            elif isinstance(node.op, Operator) and node.op.is_rectifier and node.inputs[0] in moved:
                read = node.inputs[0]
                passed = (h[read] > 0) | (g[read] > 0)
                local_first[i], local_second[i] = (_norm(each * passed) for each in moved[read])
            if added is not None:
                moved[i] = added
                local_first[i], local_second[i] = map(_norm, added)
            changes[i], sizes_first[i], sizes_second[i] = _norm(h[i] - g[i]), _norm(h[i]), _norm(g[i])
            if i == head:
                still = torch.zeros_like(h[i])
                one, other = moved.get(i, (still, still))
                heads = (one.numpy(), other.numpy())
            for j in (*node.inputs, i):
                if last_uses[j] <= i and i < count - 1:
                    for values in (h, g, moved):
                        values.pop(j, None)
    return ForwardObservation(
        changes,
        sizes_first,
        sizes_second,
        local_first,
        local_second,
        h[count - 1].numpy(),
        g[count - 1].numpy(),
        None if heads is None else heads[0],
        None if heads is None else heads[1],
    )


def change_bounds(pair: Pair, observed: ForwardObservation, start: int = 0) -> Floats:
    """Bounds of |h - g|, shape (nodes, N), given the measured change at `start`; 0 at nodes before `start`.

    Args:
        pair: The networks.
        observed: Measurements on a batch.
        start: The node whose change is taken as measured: 0 (the images) or another node that all paths pass through.
    """
    nodes = pair.network.nodes

    def layer(i: int, before: Floats) -> Floats:
        return _smaller(
            observed.local_first[i] + pair.second_norms[i] * before,
            observed.local_second[i] + pair.first_norms[i] * before,
        )

    def carried(i: int, bounds: Floats, norms: Norms) -> Floats:
        """The unmeasured part at a layer, or at a sum of layers and other nodes: norms times the bounds of the inputs."""
        node = nodes[i]
        if i in pair.first:
            through: Floats = norms[i] * bounds[node.inputs[0]]
            return through
        assert isinstance(node.op, Sum)
        total = np.zeros(bounds.shape[1])
        for factor, j in zip(node.op.factors, node.inputs, strict=True):
            total += abs(factor) * (carried(j, bounds, norms) if j in pair.first else bounds[j])
        return total

    def closer(i: int, bounds: Floats) -> Floats | None:
        """Tighter bound at a sum with layers among its inputs, and at a ReLU behind a layer or such a sum."""
        op, source = nodes[i].op, i
        if isinstance(op, Operator):
            source = nodes[i].inputs[0]
            if not op.is_rectifier or not (source in pair.first or isinstance(nodes[source].op, Sum)):
                return None
        # The measured parts at these nodes include layers at or before `start`, whose change is given as a whole instead.
        if source <= start or (start in pair.first and start in nodes[source].inputs and source not in pair.first):
            return None
        return _smaller(
            observed.local_first[i] + carried(source, bounds, pair.second_norms),
            observed.local_second[i] + carried(source, bounds, pair.first_norms),
        )

    return propagate(pair.network, layer, observed.changes[start], start, closer)


def propagate(
    network: Network,
    layer: Callable[[int, Floats], Floats],
    given: Floats,
    start: int = 0,
    closer: Callable[[int, Floats], Floats | None] | None = None,
) -> Floats:
    """Propagate bounds of changes through a network.

    Args:
        network: The architecture.
        layer: Rule for layers: from the node and the bound at its input, (N,), to the bound at its output.
        given: (N,), the change at `start`.
        start: A node that all paths pass through.
        closer: Optional second rule for sums and operators, from the node and all bounds so far; the smaller bound is used.

    Returns:
        (nodes, N); 0 before `start`.
    """
    bounds = np.zeros((len(network.nodes), len(given)))
    bounds[start] = given
    for i, node in enumerate(network.nodes):
        if i <= start:
            continue
        before = [bounds[j] for j in node.inputs]
        if isinstance(node.op, Sum):
            bounds[i] = sum(abs(f) * b for f, b in zip(node.op.factors, before, strict=True))
        elif isinstance(node.op, Cat):
            # Concatenated values are orthogonal, so squares add up.
            bounds[i] = np.sqrt(sum(b**2 for b in before))
        elif isinstance(node.op, Operator):
            bounds[i] = node.op.lipschitz * before[0]
        elif isinstance(node.op, Weighted):
            bounds[i] = layer(i, before[0])
        else:
            bounds[i] = before[0]
        other = closer(i, bounds) if closer is not None and isinstance(node.op, Sum | Operator) else None
        if other is not None:
            bounds[i] = _smaller(bounds[i], other)
    return bounds


@dataclass(frozen=True, eq=False)
class WorstCaseBounds:
    """Bounds for every image of norm at most `radius`, one value per node."""

    radius: float
    changes: Floats
    sizes_first: Floats
    sizes_second: Floats


def worst_case(pair: Pair, differences: Norms, radius: float) -> WorstCaseBounds:
    """Bounds from norms alone, valid for every image in a ball.

    Args:
        pair: The networks.
        differences: Spectral norms of the differences of their layers (`difference_norms`).
        radius: The largest norm of an image.
    """
    nodes = pair.network.nodes
    first = _sizes(pair.network, pair.first, pair.first_norms, radius)
    second = _sizes(pair.network, pair.second, pair.second_norms, radius)

    def layer(i: int, before: Floats) -> Floats:
        read = nodes[i].inputs[0]
        shift = _spread(pair, i, _difference(pair.first[i], pair.second[i]))
        # The two decompositions of the module docstring with |E h| <= |E| |h|, and the triangle inequality.
        candidates = (
            differences[i] * first[read] + shift + pair.second_norms[i] * before,
            differences[i] * second[read] + shift + pair.first_norms[i] * before,
            np.array([first[i] + second[i]]),
        )
        smallest: Floats = np.minimum.reduce(candidates)
        return smallest

    return WorstCaseBounds(radius, propagate(pair.network, layer, np.zeros(1))[:, 0], first, second)


def max_image_norm(preprocessing: Preprocessing) -> float:
    """The largest norm of a preprocessed image whose pixel values lie in [0, 1]."""
    largest = [max(abs(0 - m), abs(1 - m)) / s for m, s in zip(preprocessing.mean, preprocessing.std, strict=True)]
    return float(np.sqrt(preprocessing.height * preprocessing.width * sum(f**2 for f in largest)))


def cut_nodes(network: Network) -> tuple[int, ...]:
    """Nodes that all paths from the images to the logits pass through, in order."""
    nodes, last_read = [], 0
    for i, last in enumerate(network.last_uses):
        # No node before i is read by a node after i.
        if last_read <= i:
            nodes.append(i)
        last_read = max(last_read, last)
    return tuple(nodes)


def _sum_of_layers(
    node: Node, pair: Pair, moved: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The measured parts of the layers that a sum reads, added up."""
    assert isinstance(node.op, Sum)
    read = [(f, moved[j]) for f, j in zip(node.op.factors, node.inputs, strict=True) if j in moved and j in pair.first]
    if not read:
        return None
    first, second = (f * m[0] for f, m in read), (f * m[1] for f, m in read)
    return reduce(operator.add, first), reduce(operator.add, second)


def _smaller(one: Floats, other: Floats) -> Floats:
    found: Floats = np.minimum(one, other)
    return found


def _norm(values: torch.Tensor) -> Floats:
    """Euclidean norm of each image's values, shape (N,)."""
    found: Floats = values.flatten(1).norm(dim=1).numpy()
    return found


def _differs(first: Affine, second: Affine) -> bool:
    return first is not second and not (
        bool((first.weight == second.weight).all()) and bool((first.bias == second.bias).all())
    )


def _difference(first: Affine, second: Affine) -> Affine:
    return Affine(first.weight - second.weight, first.bias - second.bias, 0.0, 1.0)


def _spectral_norm(network: Network, i: int, affine: Affine) -> float:
    node, weight = network.nodes[i], affine.weight.numpy()
    if isinstance(node.op, Conv):
        height, width = network.nodes[node.inputs[0]].shape[-2:]
        op = node.op
        return conv_norm(
            weight, size=(height, width), stride=op.stride, padding=op.padding, dilation=op.dilation, groups=op.groups
        ).value
    if isinstance(node.op, Linear):
        return linear_norm(weight).value
    return float(np.abs(weight).max())


def _spread(pair: Pair, i: int, affine: Affine) -> float:
    """The norm of a bias repeated at all positions."""
    positions = int(np.prod(pair.network.nodes[i].shape)) // len(affine.bias)
    return float(affine.bias.norm()) * math.sqrt(positions)


def _sizes(network: Network, maps: Maps, norms: Norms, radius: float) -> Floats:
    """Upper bounds of the norms of all nodes' values, shape (nodes,)."""
    sizes = np.zeros(len(network.nodes))
    sizes[0] = radius
    for i, node in enumerate(network.nodes[1:], start=1):
        before: Sequence[float] = [sizes[j] for j in node.inputs]
        root = float(np.prod(node.shape)) ** 0.5
        if i in maps:
            positions = int(np.prod(node.shape)) // len(maps[i].bias)
            sizes[i] = norms[i] * before[0] + float(maps[i].bias.norm()) * positions**0.5
        elif isinstance(node.op, Sum):
            sizes[i] = (
                sum(abs(f) * b for f, b in zip(node.op.factors, before, strict=True)) + abs(node.op.constant) * root
            )
        elif isinstance(node.op, Cat):
            sizes[i] = sum(b**2 for b in before) ** 0.5
        elif isinstance(node.op, Operator):
            sizes[i] = node.op.lipschitz * before[0] + node.op.at_zero * root
        else:
            sizes[i] = before[0]
    return sizes
