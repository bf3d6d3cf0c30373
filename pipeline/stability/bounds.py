"""How far apart two networks of one architecture can be at every node: image by image, and for any image (lemmas L1 and L3).

At a layer W h - W' g = (W - W') h + W' (h - g) = (W - W') g + W (h - g): the first term is measured, of the second only the
norm of h - g is known. Both ways hold, and the smaller counts. Masking can enlarge a spectral norm, so W' needs its own.
Vectors that meet in a sum are added before their norm is taken, and behind a ReLU only values count that it passes in one
of the networks.
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
    apply,
)
from maskplan.pipeline.stability.norms import conv_norm, linear_norm

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float64]
Norms = Mapping[int, float]

ROUNDING = 1e-12
"""A margin below this share of what a network computes with (`largest_product`) may be decided by its own rounding."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two networks of one architecture.

    Attributes:
        network: The architecture.
        first: Layers of the one, by node.
        second: Layers of the other.
        first_norms: Upper bounds of the layers' spectral norms.
        second_norms: The same of the other.
    """

    network: Network
    first: Maps
    second: Maps
    first_norms: Norms
    second_norms: Norms

    @cached_property
    def rows_apart(self) -> tuple[Floats, Floats] | None:
        """(K, K) of either network, how far the rows of its head lie apart; None without a head."""
        head = head_of(self.network)
        if head is None:
            return None
        return distances(self.first[head].weight.numpy()), distances(self.second[head].weight.numpy())


@dataclass(frozen=True, eq=False)
class ForwardObservation:
    """What a batch of N images shows of a pair, float64. h are the first network's values, g the second's.

    Attributes:
        changes: (nodes, N), norms of h - g.
        sizes_first: (nodes, N), norms of h.
        sizes_second: (nodes, N), norms of g.
        local_first: (nodes, N), norms of E h + e, where E and e are the differences of weights and biases; of a sum, that of
            its layers together; of a ReLU behind either, without values that are 0 in both networks; 0 elsewhere.
        local_second: The same of E g + e.
        logits_first: (N, K).
        logits_second: (N, K).
        head_first: (N, K), E h + e of the head; None where the last node is no linear layer of one vector.
        head_second: The same of E g + e.
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
    """Upper bounds of the norms of layers as maps of their inputs, by node."""
    return {i: _spectral_norm(network, i, affine) for i, affine in maps.items()}


def difference_norms(network: Network, first: Maps, second: Maps) -> dict[int, float]:
    """The same of the differences of two networks' layers."""
    return spectral_norms(network, {i: _difference(first[i], second[i]) for i in first})


def pair_of(network: Network, first: Maps, second: Maps) -> Pair:
    """Two networks with their norms; layers that are the same are looked at once."""
    norms = spectral_norms(network, first)
    new = {i: affine for i, affine in second.items() if _differs(first[i], affine)}
    return Pair(network, first, second, norms, norms | spectral_norms(network, new))


def head_of(network: Network) -> int | None:
    """The node of the head, if the network ends with a linear layer of one vector an image."""
    last = len(network.nodes) - 1
    return last if isinstance(network.nodes[last].op, Linear) and len(network.nodes[last].shape) == 1 else None


def distances(rows: Floats) -> Floats:
    """(K, K), how far the rows of a (K, C) matrix lie apart, rounded up."""
    squares = (rows**2).sum(axis=1)
    apart = np.sqrt(np.maximum(squares[:, None] + squares - 2 * rows @ rows.T, 0))
    # What cancels leaves an error of the size of the squares.
    found: Floats = apart + 1e-7 * np.sqrt(squares.max(initial=0.0))
    return found


def largest_product(network: Network, norms: Norms, sizes: Floats) -> Floats:
    """(N,), the largest that a layer can make of its input. Biases may cancel it, but not its rounding.

    Args:
        network: The architecture.
        norms: Of its layers.
        sizes: (nodes, N), norms of all values.
    """
    found: Floats = np.max([norms[i] * sizes[network.nodes[i].inputs[0]] for i in network.layers], axis=0)
    return found


def observe(pair: Pair, images: torch.Tensor) -> ForwardObservation:
    """Run both networks on a batch (N, C, H, W), node by node side by side, in float64."""
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
                h[i] = apply(node, pair.first.get(i), [h[j] for j in node.inputs])
                g[i] = apply(node, pair.second.get(i), [g[j] for j in node.inputs])
            added = None
            if i in differences and _differs(pair.first[i], pair.second[i]):
                read = node.inputs[0]
                added = (apply(node, differences[i], [h[read]]), apply(node, differences[i], [g[read]]))
            elif isinstance(node.op, Sum):
                added = _together(node, pair, moved)
            elif isinstance(node.op, Operator) and node.op.rectifies and node.inputs[0] in moved:
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


def change_bounds(pair: Pair, seen: ForwardObservation, start: int = 0) -> Floats:
    """Bounds of |h - g|, (nodes, N), from what was measured at `start` on; nodes before it are left 0.

    Args:
        pair: The networks.
        seen: What a batch shows of them.
        start: The node whose own change is taken as measured: 0, the images, or another that all paths lead through.
    """
    nodes = pair.network.nodes

    def layer(i: int, before: Floats) -> Floats:
        return _smaller(
            seen.local_first[i] + pair.second_norms[i] * before, seen.local_second[i] + pair.first_norms[i] * before
        )

    def carried(i: int, bounds: Floats, norms: Norms) -> Floats:
        """What a layer, or a sum of some, carries on of its inputs' changes, beside what is measured."""
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
        """Sums of layers, and what a ReLU passes of a layer or of such a sum."""
        op, source = nodes[i].op, i
        if isinstance(op, Operator):
            source = nodes[i].inputs[0]
            if not op.rectifies or not (source in pair.first or isinstance(nodes[source].op, Sum)):
                return None
        # Of a layer at `start` the whole change is known, not what it adds.
        if source <= start or (start in pair.first and start in nodes[source].inputs and source not in pair.first):
            return None
        return _smaller(
            seen.local_first[i] + carried(source, bounds, pair.second_norms),
            seen.local_second[i] + carried(source, bounds, pair.first_norms),
        )

    return propagate(pair.network, layer, seen.changes[start], start, closer)


def propagate(
    network: Network,
    layer: Callable[[int, Floats], Floats],
    given: Floats,
    start: int = 0,
    closer: Callable[[int, Floats], Floats | None] | None = None,
) -> Floats:
    """Take bounds of changes through a network.

    Args:
        network: The architecture.
        layer: A layer's rule: its node and the bound of its input's change, (N,), to that of its output.
        given: (N,), the change at `start`.
        start: A node that all paths lead through.
        closer: Another rule for sums and operators, if it has one: a node and all bounds so far; the smaller counts.

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
            bounds[i] = np.sqrt(sum(b**2 for b in before))
        elif isinstance(node.op, Operator):
            bounds[i] = node.op.factor * before[0]
        elif isinstance(node.op, Weighted):
            bounds[i] = layer(i, before[0])
        else:
            bounds[i] = before[0]
        other = closer(i, bounds) if closer is not None and isinstance(node.op, Sum | Operator) else None
        if other is not None:
            bounds[i] = _smaller(bounds[i], other)
    return bounds


@dataclass(frozen=True, eq=False)
class Worst:
    """Bounds for every image of norm at most `radius`, by node."""

    radius: float
    changes: Floats
    sizes_first: Floats
    sizes_second: Floats


def worst_case(pair: Pair, differences: Norms, radius: float) -> Worst:
    """Bounds from norms alone: nothing is measured, any image in a ball is covered.

    Args:
        pair: The networks.
        differences: Norms of the differences of their layers (`difference_norms`).
        radius: The largest norm of an image.
    """
    nodes = pair.network.nodes
    first = _sizes(pair.network, pair.first, pair.first_norms, radius)
    second = _sizes(pair.network, pair.second, pair.second_norms, radius)

    def layer(i: int, before: Floats) -> Floats:
        read = nodes[i].inputs[0]
        shift = _spread(pair, i, _difference(pair.first[i], pair.second[i]))
        ways = (
            differences[i] * first[read] + shift + pair.second_norms[i] * before,
            differences[i] * second[read] + shift + pair.first_norms[i] * before,
            np.array([first[i] + second[i]]),
        )
        found: Floats = np.minimum.reduce(ways)
        return found

    return Worst(radius, propagate(pair.network, layer, np.zeros(1))[:, 0], first, second)


def largest_image(preprocessing: Preprocessing) -> float:
    """The largest norm of an image after preprocessing, over all pixel values in [0, 1]."""
    furthest = [max(abs(0 - m), abs(1 - m)) / s for m, s in zip(preprocessing.mean, preprocessing.std, strict=True)]
    return float(np.sqrt(preprocessing.height * preprocessing.width * sum(f**2 for f in furthest)))


def cuts(network: Network) -> tuple[int, ...]:
    """Nodes that all paths from the images to the logits lead through, in order."""
    found, reach = [], 0
    for i, last in enumerate(network.last_uses):
        # Nothing before i is read after i.
        if reach <= i:
            found.append(i)
        reach = max(reach, last)
    return tuple(found)


def _together(
    node: Node, pair: Pair, moved: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What the layers that a sum reads add to it."""
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
    """Of each image's values."""
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
    """The norm of a bias over all positions that it is added at."""
    positions = int(np.prod(pair.network.nodes[i].shape)) // len(affine.bias)
    return float(affine.bias.norm()) * math.sqrt(positions)


def _sizes(network: Network, maps: Maps, norms: Norms, radius: float) -> Floats:
    """Bounds of the norms of all nodes' values."""
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
            sizes[i] = node.op.factor * before[0] + node.op.at_zero * root
        else:
            sizes[i] = before[0]
    return sizes
