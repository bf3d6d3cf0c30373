"""Balls of updates: random updates stay within the bounds, and the largest radius is where certificates end."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
import torch
from random_nets import ALL_CASES, Case, case, exceeds, update_within
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.stability import updates
from maskplan.pipeline.stability.bounds import ForwardObservation, observe, pair_of, spectral_norms
from maskplan.pipeline.stability.network import affine_maps
from maskplan.pipeline.stability.reader import read_network
from maskplan.pipeline.stability.updates import Ball, ball_changes, ball_of, keeps_class, largest_radius

ARCHITECTURES = ALL_CASES


def ball_around(drawn: Case, layers: Collection[int]) -> Ball:
    masked, dense = affine_maps(drawn.network, drawn.masked), affine_maps(drawn.network, drawn.dense)
    norms = spectral_norms(drawn.network, masked)
    return ball_of(drawn.network, masked, norms, {i: a.frobenius for i, a in dense.items()}, layers)


def updated(drawn: Case, rho: float, layers: Collection[int], rng: np.random.Generator) -> ForwardObservation:
    """The effect of an update on the boundary of the ball on the masked network."""
    new = affine_maps(drawn.network, update_within(drawn, rho, list(layers), rng))
    return observe(pair_of(drawn.network, affine_maps(drawn.network, drawn.masked), new), drawn.images)


def some_layers(drawn: Case, rng: np.random.Generator) -> list[int]:
    return [i for i in drawn.network.layers if rng.random() < 0.6]


@pytest.mark.parametrize("rho", [1e-4, 1e-2, 0.3, 1.0])
@pytest.mark.parametrize("network", range(ARCHITECTURES))
def test_no_update_in_a_ball_exceeds_its_bounds_or_flips_a_certified_image(network: int, rho: float) -> None:
    for seed in (1, 2):
        check_random_update(case(network, seed), rho, np.random.default_rng(seed))


def check_random_update(drawn: Case, rho: float, rng: np.random.Generator) -> None:
    layers = some_layers(drawn, rng)
    ball, observed = ball_around(drawn, layers), updated(drawn, rho, layers, rng)
    radii = np.full(len(drawn.images), rho)
    assert not exceeds(observed, ball_changes(ball, observed.sizes_first, radii))
    kept = keeps_class(ball, observed.sizes_first, observed.logits_first, radii)
    flips = observed.logits_first.argmax(axis=1) != observed.logits_second.argmax(axis=1)
    assert not (kept & flips).any()


def violations(count: int) -> int:
    found = 0
    for seed in range(count):
        drawn, rng = case(seed % ARCHITECTURES, seed), np.random.default_rng(seed)
        layers = some_layers(drawn, rng)
        observed = updated(drawn, 0.01, layers, rng)
        found += exceeds(observed, ball_changes(ball_around(drawn, layers), observed.sizes_first, np.full(3, 0.01)))
    return found


def test_random_updates_catch_the_frobenius_norm_without_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert violations(60) == 0
    monkeypatch.setattr(updates, "conv_update_factor", lambda *kernel: 1.0)
    assert violations(60) > 0


@pytest.mark.parametrize("network", range(ARCHITECTURES))
def test_the_largest_radius_is_where_certificates_end(network: int) -> None:
    drawn, rng = case(network, 3), np.random.default_rng(network)
    ball = ball_around(drawn, some_layers(drawn, rng) or drawn.network.layers)
    masked = affine_maps(drawn.network, drawn.masked)
    observed = observe(pair_of(drawn.network, masked, masked), drawn.images)
    radius = largest_radius(ball, observed.sizes_second, observed.logits_second)
    inside = keeps_class(ball, observed.sizes_second, observed.logits_second, radius * 0.999)
    outside = keeps_class(ball, observed.sizes_second, observed.logits_second, radius * 1.001)
    assert inside[radius > 0].all()
    assert not outside[(radius > 0) & (radius < 900)].any()
    assert ((radius > 0) | ~keeps_class(ball, observed.sizes_second, observed.logits_second, np.full(3, 1e-11))).all()


def head_only() -> tuple[Ball, ForwardObservation, torch.Tensor]:
    preprocessing = Preprocessing(1, 1, 4, 0, "bilinear", (0.0,), (1.0,))
    network = read_network(nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)), preprocessing)
    weight = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0]], dtype=torch.float64)
    maps = affine_maps(network, {"1.weight": weight})
    observed = observe(pair_of(network, maps, maps), torch.tensor([[[[2.0, 1.0, 0.0, 0.0]]]], dtype=torch.float64))
    norms = spectral_norms(network, maps)
    return ball_of(network, maps, norms, {i: a.frobenius for i, a in maps.items()}, network.layers), observed, weight


def test_the_radius_of_a_head_is_exact() -> None:
    """The worst update moves two rows in opposite directions along the input: the class flips just beyond the radius."""
    ball, observed, weight = head_only()
    (radius,) = largest_radius(ball, observed.sizes_first, observed.logits_first)
    size, margin = 5**0.5, 1.0
    assert radius * float(weight.norm()) == pytest.approx(margin / (2**0.5 * size), rel=1e-6)
    direction = torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64) / size
    update = torch.stack([-direction, direction, torch.zeros(4, dtype=torch.float64)]) / 2**0.5 * float(weight.norm())
    x = torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert int(((weight + 0.999 * radius * update) @ x).argmax()) == 0
    assert int(((weight + 1.001 * radius * update) @ x).argmax()) == 1


def test_layers_outside_the_ball_are_not_updated() -> None:
    drawn = case(3, 0)
    last = drawn.network.layers[-1]
    ball = ball_around(drawn, [last])
    masked = affine_maps(drawn.network, drawn.masked)
    sizes = observe(pair_of(drawn.network, masked, masked), drawn.images).sizes_first
    changes = ball_changes(ball, sizes, np.full(3, 0.1))
    assert not changes[:last].any()
    np.testing.assert_allclose(
        changes[last], 0.1 * ball.max_update_norms[last] * sizes[drawn.network.nodes[last].inputs[0]]
    )
