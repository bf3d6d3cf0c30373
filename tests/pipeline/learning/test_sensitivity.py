"""Which layers stay dense under a budget: those whose masks cost most, as far as the budget reaches."""

from __future__ import annotations

import pytest
import torch
from gray_images import PREPROCESSING, dataset, random_images
from torch import nn

from maskplan.pipeline.core.artifacts import Layer, Pattern
from maskplan.pipeline.learning.evaluate import MaskEvaluator, MaskScore
from maskplan.pipeline.learning.masked_net import Masks
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.learning.sensitivity import costliest_layers
from maskplan.pipeline.masking.magnitude import magnitude_mask

# Three layers of equal MACs: masking the first costs nothing, the second little, the third most.
NAMES = ("2.weight", "4.weight", "6.weight")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    with torch.no_grad():
        module[2].weight[:, [0, 1, 4, 5]] = 0
        module[4].weight[:, [0, 1, 4, 5]] *= 1e-2
        module[6].weight.copy_(module[6].weight.sign())
    return module.eval()


@pytest.mark.parametrize(
    ("budget", "dense"), [(30, set()), (34, {"6.weight"}), (67, {"4.weight", "6.weight"}), (100, set(NAMES))]
)
def test_the_costliest_layers_stay_dense(net: nn.Module, budget: float, dense: set[str]) -> None:
    layers = [Layer(name, "Conv", (8, 8, 1, 1), 1, i + 1, 512) for i, name in enumerate(NAMES)]
    masks = {name: magnitude_mask(net.state_dict()[name].numpy(), Pattern(2, 4)) for name in NAMES}
    data = dataset(random_images(36), 24)
    assert costliest_layers(net, masks, layers, PREPROCESSING, data, budget, LearnOptions()) == dense


def test_masks_cost_what_they_are_learned_by(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """With labels, the layer that costs most need not be the one of the largest divergence."""
    layers = [Layer(name, "Conv", (8, 8, 1, 1), 1, i + 1, 512) for i, name in enumerate(NAMES[:2])]
    masks = {name: magnitude_mask(net.state_dict()[name].numpy(), Pattern(2, 4)) for name in NAMES[:2]}
    scores = {(): (0.0, 0.0), NAMES[:1]: (0.1, 0.2), NAMES[1:2]: (0.2, 0.1)}

    def score(_: MaskEvaluator, masks: Masks) -> MaskScore:
        divergence, loss = scores[tuple(masks)]
        return MaskScore(divergence, None, loss)

    monkeypatch.setattr(MaskEvaluator, "__call__", score)
    data = dataset(random_images(36), 24)
    assert costliest_layers(net, masks, layers, PREPROCESSING, data, 50, LearnOptions(distill=0.5)) == {NAMES[0]}
