"""No random network violates a bound, and bounds with a mistake are violated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from random_nets import ALL_CASES, Case, architecture, case, exceeds, observe_case, violated
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.stability.bounds import (
    ForwardObservation,
    Pair,
    change_bounds,
    cut_nodes,
    difference_norms,
    max_image_norm,
    observe,
    pair_of,
    worst_case,
)
from maskplan.pipeline.stability.certify import certify, tails
from maskplan.pipeline.stability.network import Network, Node, Operator, Sum, affine_maps
from maskplan.pipeline.stability.reader import read_network

ARCHITECTURES = ALL_CASES
DRAWS = 14
Example = tuple[Case, Pair, ForwardObservation]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Random networks, observed on three images each."""
    drawn = [case(network, seed) for network in range(ARCHITECTURES) for seed in range(DRAWS)]
    return [(each, *observe_case(each)) for each in drawn]


def test_no_bound_is_violated_and_no_certified_image_flips(examples: list[Example]) -> None:
    assert len(examples) >= 300
    certified_images = 0
    for drawn, pair, observed in examples:
        # The true change is that of the module itself.
        first, second = drawn.logits(drawn.first), drawn.logits(drawn.second)
        rounding = 1e-11 * (first.norm(dim=1) + second.norm(dim=1)).numpy()
        true_change = (first - second).norm(dim=1).numpy()
        flips = (first.argmax(1) != second.argmax(1)).numpy()
        for end in tails(pair.network):
            bounds = change_bounds(pair, observed, end.start)
            assert (true_change <= bounds[-1] * (1 + 1e-9) + rounding).all(), drawn
            assert not exceeds(observed, bounds, end.start), drawn
            certified = certify(pair, observed, end.start).certified
            assert not (certified & flips).any(), drawn
            certified_images += int(certified.sum())
    assert certified_images > 200


def test_the_worst_case_covers_every_image_of_its_norm(examples: list[Example]) -> None:
    for drawn, pair, observed in examples[::3]:
        radius = float(observed.sizes_first[0].max())
        worst = worst_case(pair, difference_norms(pair.network, pair.first, pair.second), radius)
        assert not exceeds(observed, worst.changes[:, None]), drawn
        assert (observed.sizes_first <= worst.sizes_first[:, None] * (1 + 1e-9)).all(), drawn
        assert (observed.sizes_second <= worst.sizes_second[:, None] * (1 + 1e-9)).all(), drawn
        # Measurements never loosen a bound.
        assert (change_bounds(pair, observed)[-1] <= worst.changes[-1] * (1 + 1e-6)).all(), drawn


def test_a_later_start_never_loosens_a_bound(examples: list[Example]) -> None:
    """Except at a layer that a sum reads directly, where the measured change hides what the layer itself adds."""
    compared = 0
    for drawn, pair, observed in examples:
        nodes = pair.network.nodes
        read_by_sums = {j for node in nodes if isinstance(node.op, Sum) for j in node.inputs if j in pair.first}
        bounds = [(end.start, change_bounds(pair, observed, end.start)[-1]) for end in tails(pair.network)]
        for (start, shorter), (_, longer) in pairwise(bounds):
            if start not in read_by_sums:
                assert (shorter <= longer * (1 + 1e-9) + 1e-11 * (1 + observed.sizes_first.max())).all(), drawn
                compared += 1
    assert compared > 500


def of_operators(network: Network, change: Callable[[Operator], Operator]) -> Network:
    def changed(node: Node) -> Node:
        return replace(node, op=change(node.op)) if isinstance(node.op, Operator) else node

    return replace(network, nodes=tuple(map(changed, network.nodes)))


def masked_norms_dropped(pair: Pair) -> Pair:
    return replace(pair, second_norms=dict.fromkeys(pair.second_norms, 1.0))


def dense_norms_for_masked(pair: Pair) -> Pair:
    return replace(pair, second_norms=pair.first_norms)


def pooling_constant_one(pair: Pair) -> Pair:
    return replace(
        pair,
        network=of_operators(
            pair.network, lambda op: replace(op, lipschitz=min(op.lipschitz, 1)) if op.is_pooling else op
        ),
    )


def average_pooling_constant_squared(pair: Pair) -> Pair:
    return replace(
        pair,
        network=of_operators(
            pair.network,
            lambda op: replace(op, lipschitz=op.lipschitz**2) if op.is_pooling and op.lipschitz < 1 else op,
        ),
    )


def activation_constant_dropped(pair: Pair) -> Pair:
    return replace(
        pair, network=of_operators(pair.network, lambda op: op if op.is_pooling else replace(op, lipschitz=1.0))
    )


MUTANTS = (
    masked_norms_dropped,
    dense_norms_for_masked,
    pooling_constant_one,
    average_pooling_constant_squared,
    activation_constant_dropped,
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_random_networks_catch_a_wrong_bound(mutant: Callable[[Pair], Pair], examples: list[Example]) -> None:
    assert not any(violated(pair, observed) for _, pair, observed in examples)
    assert any(violated(mutant(pair), observed) for _, pair, observed in examples)


def test_the_random_networks_cover_all_kinds_of_layers(examples: list[Example]) -> None:
    modules = [type(m) for seed in range(ARCHITECTURES) for m in architecture(seed)[0].modules()]
    for kind in (nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Linear):
        assert kind in modules
    convs = [m for seed in range(ARCHITECTURES) for m in architecture(seed)[0].modules() if isinstance(m, nn.Conv2d)]
    assert {m.stride[0] for m in convs} == {1, 2} == {m.dilation[0] for m in convs}
    assert {m.padding[0] for m in convs} >= {0, 1, 2}
    assert any(m.groups > 1 for m in convs)
    layers = {len(pair.network.layers) for _, pair, _ in examples}
    assert {3, 4, 5, 6, 7, 8} <= layers
    grown = [pair.second_norms[i] > 1.001 * pair.first_norms[i] for _, pair, _ in examples for i in pair.network.layers]
    # Masking increases some spectral norms.
    assert sum(grown) > 20


def linear_pair(first: torch.Tensor, second: torch.Tensor) -> tuple[Pair, torch.nn.Module]:
    preprocessing = Preprocessing(1, 1, first.shape[1], 0, "bilinear", (0.0,), (1.0,))
    module = nn.Sequential(nn.Flatten(), nn.Linear(first.shape[1], first.shape[0], bias=False))
    network = read_network(module, preprocessing)
    maps = [affine_maps(network, {"1.weight": weight}) for weight in (first, second)]
    return pair_of(network, *maps), module


def test_masking_can_increase_a_spectral_norm() -> None:
    dense = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    pair, _ = linear_pair(dense, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    (node,) = pair.network.layers
    assert pair.first_norms[node] == pytest.approx(2**0.5, rel=1e-5)
    assert pair.second_norms[node] == pytest.approx((1 + 5**0.5) / 2, rel=1e-5)


def test_one_layer_is_bounded_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    masked = dense * (torch.rand(4, 8, generator=generator) < 0.5)
    pair, _ = linear_pair(dense, masked)
    x = torch.randn(5, 1, 1, 8, generator=generator, dtype=torch.float64)
    expected = (x.flatten(1) @ (dense - masked).T).norm(dim=1)
    np.testing.assert_allclose(change_bounds(pair, observe(pair, x))[-1], expected, rtol=1e-12)


def test_masks_that_prune_nothing_bound_all_changes_by_zero() -> None:
    drawn = case(3, 0)
    maps = affine_maps(drawn.network, drawn.dense)
    pair = pair_of(drawn.network, maps, affine_maps(drawn.network, drawn.dense))
    observed = observe(pair, drawn.images)
    assert not change_bounds(pair, observed).any()
    assert not observed.changes.any()
    radius = float(observed.sizes_first[0].max())
    assert worst_case(pair, difference_norms(drawn.network, maps, maps), radius).changes[-1] == 0


def test_layers_before_the_first_change_add_nothing() -> None:
    drawn = case(3, 0)
    last = drawn.network.nodes[drawn.network.layers[-1]].op
    name = last.weight
    changed = drawn.dense | {name: drawn.dense[name] * 1.01}
    pair = pair_of(drawn.network, affine_maps(drawn.network, drawn.dense), affine_maps(drawn.network, changed))
    bounds = change_bounds(pair, observe(pair, drawn.images))
    assert not bounds[: drawn.network.layers[-1]].any()
    assert bounds[-1].any()


def test_all_paths_pass_through_cut_nodes_only() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.one(x))
            return self.head(torch.flatten(torch.relu(x + self.two(x)), 1))

    network = read_network(Residual(), Preprocessing(1, 4, 4, 0, "bilinear", (0.0,), (1.0,)))
    names = [network.nodes[i].name for i in cut_nodes(network)]
    assert "two" not in names
    assert names[:2] == ["input", "one"]
    assert names[-1] == "head"
    assert len(network.nodes) - len(names) == 1


def test_the_largest_image_has_the_most_extreme_pixel_values() -> None:
    preprocessing = Preprocessing(2, 3, 5, 0, "bilinear", (0.25, 0.9), (0.5, 0.3))
    # 0.75 / 0.5 = 1.5 and 0.9 / 0.3 = 3 at each of 15 positions.
    assert max_image_norm(preprocessing) == pytest.approx((15 * (1.5**2 + 3**2)) ** 0.5)
