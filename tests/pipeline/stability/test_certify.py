"""Certificates: computed by hand on a head, and the ends of a network that they are reported for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_nets import case, observe_case
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.models.registry import build_model
from maskplan.pipeline.stability.bounds import ForwardObservation, observe, pair_of, pairwise_distances
from maskplan.pipeline.stability.certify import Certificates, certify, tails
from maskplan.pipeline.stability.network import affine_maps
from maskplan.pipeline.stability.reader import read_network


class Two(nn.Module):
    """A layer that masks change and a head of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(torch.flatten(x, 1)))


def certificates(
    body: list[list[float]], masked: list[list[float]], head: list[list[float]], image: list[float]
) -> tuple[ForwardObservation, Certificates]:
    network = read_network(Two(), Preprocessing(1, 1, 2, 0, "bilinear", (0.0,), (1.0,)))
    maps = [
        affine_maps(network, {"body.weight": torch.tensor(weight), "head.weight": torch.tensor(head)})
        for weight in (body, masked)
    ]
    pair = pair_of(network, *maps)
    observed = observe(pair, torch.tensor(image, dtype=torch.float64).view(1, 1, 1, 2))
    return observed, certify(pair, observed)


UNIT = [[1.0, 0.0], [0.0, 1.0]]


def test_a_margin_above_sqrt_2_times_the_change_certifies() -> None:
    # The masked body changes the head's input by 1, and the norm of the head is 2.
    _, found = certificates(UNIT, [[1.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]], [3.0, 1.0])
    assert found.change[0] == pytest.approx(2.0, rel=1e-5)
    # The margin is 4.
    assert found.by_norm[0]
    _, closer = certificates(UNIT, [[1.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]], [2.4, 1.0])
    # Here the margin is 2.8, below 2 sqrt(2).
    assert not closer.by_norm[0]


def test_similar_rows_of_the_head_certify_images_that_norms_do_not() -> None:
    # Both logits depend on the second value alike, so losing it cannot exchange them.
    head = [[1.0, 5.0], [0.5, 5.0], [0.0, 5.0]]
    observed, found = certificates(UNIT, [[1.0, 0.0], [0.0, 0.0]], head, [4.0, 1.0])
    assert not found.by_norm[0]
    assert not found.by_largest[0]
    assert found.by_pairs[0]
    assert observed.logits_first.argmax() == observed.logits_second.argmax() == 0
    # The bound of probabilities is tighter than that of the norm as well.
    assert found.logit_spread[0] < 2 < found.change[0]


def test_a_flipped_image_is_not_certified() -> None:
    observed, found = certificates(UNIT, [[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [1.0, 3.0])
    assert observed.logits_first.argmax() != observed.logits_second.argmax()
    assert not found.certified[0]


def test_unchanged_images_are_certified_except_for_ties() -> None:
    _, found = certificates(UNIT, UNIT, [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [1.0, 0.5])
    assert found.certified[0]
    _, tied = certificates(UNIT, UNIT, [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [1.0, 1.0])
    assert not tied.certified[0]


@pytest.mark.parametrize(("network", "seed"), [(2, 7), (3, 9)])
def test_ties_decided_by_rounding_are_not_certified(network: int, seed: int) -> None:
    """Biases cancel the products of the first network, so that its logits are rounding errors."""
    drawn = case(network, seed)
    pair, observed = observe_case(drawn)
    margins = np.sort(observed.logits_first)[:, -1] - np.sort(observed.logits_first)[:, -2]
    tied = margins < 1e-14
    assert tied.any()
    for end in tails(pair.network):
        assert not certify(pair, observed, end.start).certified[tied].any()


def test_many_logits_with_similar_changes_are_certified_by_the_largest_change() -> None:
    # All three change by about 5, which is 8.7 in the Euclidean norm; the margin is 11.
    head = [[1.0, 5.0], [0.5, 5.0], [0.0, 5.0]]
    _, found = certificates(UNIT, [[1.0, 0.0], [0.0, 0.0]], head, [22.0, 1.0])
    assert not found.by_norm[0]
    assert found.by_largest[0]


def test_the_ends_of_a_network_grow_from_the_head_to_the_whole() -> None:
    built = build_model("digits_resnet", seed=0)
    found = tails(read_network(built.module, built.preprocessing))
    assert [len(end.layers) for end in found] == [1, 4, 7, 9, 10]
    assert found[0].layers == ("head",)
    assert found[1].layers == ("blocks.2.conv1", "blocks.2.conv2", "blocks.2.shortcut.0", "head")
    assert (found[1].after, found[-1].after, found[-1].start) == ("blocks.1", "input", 0)


def test_distances_of_rows_are_never_too_small() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 8))
    rows[1] = rows[0]
    true = np.linalg.norm(rows[:, None] - rows, axis=2)
    found = pairwise_distances(rows)
    assert (found >= true).all()
    np.testing.assert_allclose(found, true, atol=1e-5)
