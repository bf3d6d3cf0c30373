"""Nothing is certified of a network that was read wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError, PipelineError
from maskplan.pipeline.stability import rules
from maskplan.pipeline.stability.bounds import Pair, observe
from maskplan.pipeline.stability.calls import Call
from maskplan.pipeline.stability.network import Sum, affine_maps
from maskplan.pipeline.stability.reader import read_network
from maskplan.pipeline.stability.reading_check import ReadingCheck
from tests.support.moving_nets import Net

PREPROCESSING = Preprocessing(1, 2, 2, 0, "bilinear", (0.0,), (1.0,))
IMAGES = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def subtracting() -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(torch.rsub(x, self.branch(x)), 1))

    torch.manual_seed(0)
    return Net(forward, branch=nn.Conv2d(1, 1, 1), head=nn.Linear(4, 3))


def check(module: nn.Module, images: torch.Tensor = IMAGES) -> float:
    """Check one batch; the largest difference."""
    network = read_network(module, PREPROCESSING)
    maps = affine_maps(network, module.state_dict())
    observed = observe(Pair(network, maps, maps, {}, {}), images)
    reading = ReadingCheck(module, module.state_dict(), where="a model")
    reading.require_equal(images, observed.logits_first, observed.sizes_first)
    return reading.largest_difference


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_a_network_read_rightly_differs_by_rounding(count: int) -> None:
    assert check(subtracting(), IMAGES[:count]) < 1e-13


@pytest.mark.parametrize(
    "returned", [lambda y: {"scores": y}, lambda y: (y,), lambda y: {"scores": [y, None], "loss": 0.5}]
)
def test_an_output_in_a_container_is_compared(returned: Callable[[torch.Tensor], object]) -> None:
    def forward(self: Any, x: torch.Tensor) -> object:
        return returned(self.head(torch.flatten(torch.rsub(x, self.branch(x)), 1)))

    torch.manual_seed(0)
    assert check(Net(forward, branch=nn.Conv2d(1, 1, 1), head=nn.Linear(4, 3))) < 1e-13


def test_swapped_operands_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rsub` once was read as `sub`: of 2,233 images certified, 53 changed their class."""

    def swapped(tensors: rules.Tensors, call: Call) -> rules.Reading:
        return Sum((1.0, -1.0)), (call.args["self"], call.args["other"])

    monkeypatch.setitem(rules.RULES, "rsub", swapped)
    with pytest.raises(PipelineError, match="differs from the model") as raised:
        check(subtracting())
    assert raised.value.where == "a model"
    assert "logits of 6 of 6 images differ, by up to" in str(raised.value.found)


def test_an_error_on_one_image_is_found() -> None:
    module = subtracting()
    network = read_network(module, PREPROCESSING)
    maps = affine_maps(network, module.state_dict())
    observed = observe(Pair(network, maps, maps, {}, {}), IMAGES)
    logits = observed.logits_first.copy()
    logits[4, 1] += 1e-7
    with pytest.raises(PipelineError, match="logits of 1 of 6 images"):
        ReadingCheck(module, module.state_dict()).require_equal(IMAGES, logits, observed.sizes_first)
    logits[4, 1] = float("nan")
    with pytest.raises(PipelineError, match="not finite"):
        ReadingCheck(module, module.state_dict()).require_equal(IMAGES, logits, observed.sizes_first)


def test_the_given_weights_are_used() -> None:
    module = subtracting()
    state = {name: value + 1 for name, value in module.state_dict().items()}
    network = read_network(module, PREPROCESSING)
    maps = affine_maps(network, state)
    observed = observe(Pair(network, maps, maps, {}, {}), IMAGES)
    ReadingCheck(module, state).require_equal(IMAGES, observed.logits_first, observed.sizes_first)
    with pytest.raises(PipelineError, match="differs from the model"):
        ReadingCheck(module, module.state_dict()).require_equal(IMAGES, observed.logits_first, observed.sizes_first)


def test_a_module_that_fails_on_other_batches_is_refused() -> None:
    module = Net(lambda self, x: self.head(x.view(2, 4)), head=nn.Linear(4, 3))
    with pytest.raises(InputError, match="cannot run on batches of 2 and 4 images"):
        check(module)


def test_a_module_that_drops_images_is_found() -> None:
    """With the two images of the exporter's sample, `x[:2]` is everything."""
    module = Net(lambda self, x: self.head(torch.flatten(x[:2], 1)), head=nn.Linear(4, 3))
    with pytest.raises(PipelineError, match=r"logits of shape \(6, 3\) instead of \(4, 3\)"):
        check(module)
