"""What convolutions do to channels: computed, depthwise, grouped and transposed filters, and biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.moving_nets import (
    Net,
    conv,
    drawn,
    head,
    pooled,
    reasons,
    sizes,
    stays,
)


class Computed(nn.Module):
    """A convolution whose filters are made from parameters on the way."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], weight: Callable[[Any], torch.Tensor], groups: int) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.bias = nn.Parameter(torch.randn(8))
        self._weight, self._groups = weight, groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self._weight(self), self.bias, padding=1, groups=self._groups)


COMPUTED: dict[str, tuple[dict[str, tuple[int, ...]], Callable[[Any], torch.Tensor], int, dict[str, int]]] = {
    "one filter for each channel": ({"w": (1, 1, 3, 3)}, lambda m: m.w.expand(8, 1, 3, 3), 8, {"one": 8, "three": 4}),
    "an even filter": ({}, lambda m: torch.ones(8, 1, 3, 3).to(m.bias), 8, {"one": 8, "three": 4}),
    "unknown filters": ({"w": (8, 1, 3, 3)}, lambda m: m.w.cumsum(0), 8, {"three": 4}),
    "filters that are less their mean": (
        {"w": (8, 1, 3, 3)},
        lambda m: m.w - m.w.mean(0, keepdim=True),
        8,
        {"one": 8, "three": 4},
    ),
    "filters of rows of a matrix": ({"w": (64, 9)}, lambda m: m.w.view(8, 8, 3, 3), 1, {"three": 4}),
    "filters with weighted columns": (
        {"w": (8, 8, 3, 3), "rows": (1, 3)},
        lambda m: m.w * m.rows,
        1,
        {"one": 8, "two.w": 8, "three": 4},
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_filters_pin_what_does_not_follow(name: str) -> None:
    torch.manual_seed(0)
    shapes, weight, groups, found = COMPUTED[name]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.three(functional.relu(self.two(functional.relu(self.one(x))))))

    two = Computed(shapes, weight, groups)
    assert sizes(stays(drawn(Net(forward, one=conv(3, 8), two=two, three=conv(8, 4), head=head(4))))) == found


def test_a_blur_filter_outside_the_checkpoint_lets_channels_move() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, functional.conv2d(self.one(x), self.blur, groups=8))

    net = Net(forward, one=conv(3, 8), head=head(8))
    net.register_buffer("blur", torch.tensor([1.0, 2, 1]).expand(8, 1, 3, 3).clone(), persistent=False)
    assert sizes(stays(drawn(net))) == {"one": 8}


def test_untracked_channels_pin_their_depthwise_filters() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.two(self.one(x).cumsum(1)))

    axes = stays(drawn(Net(forward, one=conv(3, 8), two=conv(8, 8, 3, groups=8), three=conv(8, 4), head=head(8))))
    assert "two" not in sizes(axes)
    assert reasons(axes)["two"] == "it is combined with values that cannot move"


@pytest.mark.parametrize(("groups", "made"), [(8, 8), (2, 2)])
def test_a_transposed_depthwise_convolution_lets_channels_move(groups: int, made: int) -> None:
    """Filters of one channel each do so, if they also read one each."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.three(self.two(self.one(x))))

    two = nn.ConvTranspose2d(8, made, 2, 2, groups=groups)
    axes = stays(drawn(Net(forward, one=conv(3, 8), two=two, three=conv(made, 4), head=head(4))))
    assert sizes(axes) == ({"one": 8, "three": 4} if groups == 8 else {"three": 4})


def test_weights_that_are_standardized_before_use_move() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = self.weight.view(1, self.out_channels, -1)
            weight = functional.batch_norm(flat, None, None, training=True).view_as(self.weight)
            return functional.conv2d(x, weight, self.bias, padding=1)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.two(functional.relu(self.one(x))))

    net = Net(forward, one=Standardized(3, 8, 3), two=Standardized(8, 12, 3), head=head(12))
    assert sizes(stays(drawn(net))) == {"one": 8, "two": 12}


def test_a_transposed_grouped_convolution_pins_inputs_and_outputs() -> None:
    """Its weight is (C, K / groups), and its bias K long."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pooled(self, self.three(self.two(self.one(x))))

    two = nn.ConvTranspose2d(8, 12, 2, 2, groups=2)
    axes = stays(drawn(Net(forward, one=conv(3, 8), two=two, three=conv(12, 4), head=head(4))))
    assert sizes(axes) == {"three": 4}
    assert reasons(axes)["one"] == "a grouped convolution reads it"
    assert reasons(axes)["two"] in ("a grouped convolution reads it", "a transposed grouped convolution produces it")
    assert reasons(axes)["three"] == "it is combined with values that cannot move"


def test_a_bias_added_to_pinned_channels_is_pinned() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        other = functional.conv2d(x, self.one.weight.cumsum(0), self.two.bias)
        return pooled(self, self.three(self.two(x)) * self.four(other))

    net = Net(forward, one=conv(3, 8), two=conv(3, 8), three=conv(8, 4), four=conv(8, 4), head=head(4))
    axes = stays(drawn(net))
    assert sizes(axes) == {"three": 4}
    assert reasons(axes)["two"] == "it is combined with values that cannot move"
