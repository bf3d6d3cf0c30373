"""The stability stage on small networks: which images it uses, and that its bounds have all their parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import PipelineError
from maskplan.pipeline.data.dataset import batches
from maskplan.pipeline.data.digits import load_digits
from maskplan.pipeline.data.image_sets import identify
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.stability import analyze as stage
from maskplan.pipeline.stability import rules
from maskplan.pipeline.stability.analyze import StabilityOptions, Weights, analyze
from maskplan.pipeline.stability.bounds import difference_norms, pair_of, worst_case
from maskplan.pipeline.stability.network import Sum, affine_maps
from maskplan.pipeline.stability.reader import read_network
from maskplan.pipeline.stability.record import StabilityReport

State = dict[str, torch.Tensor]
VAL = load_digits().val


class Small(nn.Module):
    """A network on the digits that exports fast."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 4, 3), nn.Linear(144, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(torch.rsub(torch.relu(self.body(x)), 1), 1))


@pytest.fixture(scope="module")
def weights() -> Weights:
    torch.manual_seed(0)
    dense = {name: value.clone() for name, value in Small().state_dict().items()}
    mask = torch.rand(dense["head.weight"].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return Weights(dense, dense | {"head.weight": dense["head.weight"] * mask})


def report(weights: Weights, **options: Any) -> StabilityReport:
    _, provenance = open_checkpoint(ModelOptions("digits_resnet"))
    return analyze(Small(), provenance, weights, "magnitude", VAL, identify(VAL), StabilityOptions(**options))


def changes(weights: Weights, images: int, seed: int) -> tuple[int, float]:
    """Flips and median change of the logits, computed by the module itself."""
    _, provenance = open_checkpoint(ModelOptions("digits_resnet"))
    module, logits = Small().double(), []
    x = np.concatenate([x for x, _ in batches(VAL.sample(images, seed), provenance.preprocessing, 64)])
    for state in (weights.dense, weights.masked):
        module.load_state_dict(dict(state))
        with torch.no_grad():
            logits.append(module(torch.from_numpy(x).double()))
    flips = int((logits[0].argmax(1) != logits[1].argmax(1)).sum())
    return flips, float((logits[0] - logits[1]).norm(dim=1).median())


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_images_are_drawn_with_the_seed(seed: int, weights: Weights) -> None:
    found = report(weights, images=31, seed=seed)
    flips, median = changes(weights, 31, seed)
    assert (found.masking.images, found.flip_rate.flips) == (31, flips)
    assert found.masking.logits_change.p50 == pytest.approx(median, rel=1e-9)


def test_draws_differ_from_each_other_and_from_the_first_images(weights: Weights) -> None:
    first = replace(VAL, indices=VAL.indices[:31])
    drawn = {tuple(VAL.sample(31, seed).indices) for seed in (0, 1, 7)}
    assert len(drawn) == 3
    assert tuple(first.indices) not in drawn
    assert len({changes(weights, 31, seed)[1] for seed in (0, 1, 7)}) == 3


def test_an_update_by_nothing_leaves_the_measured_change_between_dense_and_masked(weights: Weights) -> None:
    """The sum of three parts is then the middle one, which is measured."""
    found = report(replace(weights, updated=weights.dense, updated_masked=weights.masked), images=60)
    assert found.update is not None
    assert found.masking.flips > 0
    assert found.update.in_parts_tightness is not None
    assert found.update.in_parts_tightness.p10 == pytest.approx(0, abs=1e-9)
    assert found.update.in_parts_tightness.max == pytest.approx(0, abs=1e-9)
    assert found.update.in_parts_certified < 100 * (1 - found.masking.flips / 60)


def test_the_worst_case_includes_differences_of_biases() -> None:
    preprocessing = Preprocessing(1, 3, 3, 0, "bilinear", (0.0,), (1.0,))
    module = nn.Sequential(nn.Conv2d(1, 2, 2, bias=True), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2, bias=False))
    network = read_network(module, preprocessing)
    state = {"0.weight": torch.ones(2, 1, 2, 2), "0.bias": torch.zeros(2), "3.weight": torch.ones(2, 8)}
    moved = state | {"0.bias": torch.tensor([0.5, 0.25])}
    pair = pair_of(network, affine_maps(network, state), affine_maps(network, moved))
    # At the four positions of each filter.
    layer = network.layers[0]
    worst = worst_case(pair, difference_norms(network, pair.first, pair.second), 100.0)
    assert worst.changes[layer] == pytest.approx(2 * (0.5**2 + 0.25**2) ** 0.5)
    assert worst.changes[-1] >= 4 * (0.5 + 0.25) * 2**0.5


def test_a_network_that_is_read_wrongly_certifies_nothing(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.RULES, "rsub", lambda tensors, call: (Sum((1.0,), -1.0), (call.args["self"],)))
    with pytest.raises(PipelineError, match="differs from the model, so nothing can be certified"):
        report(weights, images=20)
    assert report(weights, images=20, check_reading=False).reading_difference is None


def test_all_images_and_the_masked_network_are_checked(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[tuple[bool, int]] = []

    class Recording(stage.ReadingCheck):
        def __init__(self, module: nn.Module, state: State, **options: Any) -> None:
            super().__init__(module, state, **options)
            self.is_masked = state is weights.masked

        def require_equal(self, images: torch.Tensor, logits: Any, sizes: Any) -> None:
            super().require_equal(images, logits, sizes)
            checked.append((self.is_masked, len(images)))

    monkeypatch.setattr(stage, "ReadingCheck", Recording)
    found = report(weights, images=50, batch=20)
    assert checked == [(False, 20), (True, 20), (False, 20), (False, 10)]
    assert found.reading_difference is not None
    assert 0 <= found.reading_difference < 1e-12
