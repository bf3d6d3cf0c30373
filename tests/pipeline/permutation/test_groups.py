"""Groups of channels: any order of all of them at once leaves the outputs as they are, in float64; wrong ones do not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.models.layers import sample_input
from maskplan.pipeline.models.registry import build_model
from maskplan.pipeline.permutation.groups import Axes, Group, UnexportableError, find_groups
from tests.support.moving_nets import (
    PREPROCESSING,
    Net,
    conv,
    difference,
    drawn,
    head,
    moved,
    pooled,
    reasons,
    sizes,
    stays,
)


def shuffled(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.stem(x)
    for block in (self.one, self.two):
        left, right = x.chunk(2, 1)
        x = torch.cat([left, functional.relu(block(right))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)
    return pooled(self, x)


def padded(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.one(x)
    return pooled(self, self.two(x) + functional.pad(x, (0, 0, 0, 0, 2, 2)))


def bn(k: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(k)


def settled(module: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    """BatchNorm statistics of noise, so that what an image says reaches the outputs of a deep random network."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        module(sample_input(preprocessing, 4, seed=3))
    return module.eval()


def chain(self: Any, x: torch.Tensor) -> torch.Tensor:
    return pooled(self, functional.relu(self.bn(self.two(functional.relu(self.one(x))))))


def residual(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.stem(x)
    return pooled(self, x + self.two(functional.relu(self.one(x))))


def squeezed(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = functional.silu(self.stem(x))
    scale = torch.sigmoid(self.up(functional.silu(self.down(x.mean((2, 3), keepdim=True)))))
    return pooled(self, x * scale)


def dense(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.stem(x)
    x = torch.cat([x, self.one(functional.relu(self.bn(x)))], 1)
    return pooled(self, torch.cat([x, self.two(x)], 1))


def flattened(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = functional.adaptive_avg_pool2d(functional.relu(self.one(x)), 3)
    return self.head(functional.relu(self.fc(torch.flatten(x, 1))))  # type: ignore[no-any-return]


def channels_last(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.stem(x)
    y = self.depthwise(x).permute(0, 2, 3, 1)
    y = self.down(functional.gelu(self.up(self.norm(y)))).permute(0, 3, 1, 2)
    return pooled(self, x + y * self.scale.weight.view(-1, 1, 1))


def pooled_twice(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.one(x)
    return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))  # type: ignore[no-any-return]


def attended(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.one(x)
    where = torch.sigmoid(self.two(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)))
    return pooled(self, functional.interpolate(x * where, scale_factor=2.0, mode="bilinear"))


def gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = self.one(x).split(8, 1)
    return pooled(self, a * torch.sigmoid(b))


def thrice_gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    a, b, c = self.one(x).chunk(3, 1)
    return pooled(self, self.two(b * torch.sigmoid(a)) + c * b)


def mirrored(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.one(x)
    return pooled(self, x + functional.relu(x.flip(1)))


def attention(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.stem(x).flatten(2).transpose(1, 2)
    q, k, v = self.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    found = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return self.head((x + self.out(found)).mean(1))  # type: ignore[no-any-return]


NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "a chain": (
        lambda: Net(chain, one=conv(3, 8, 3), two=conv(8, 12, 3), bn=bn(12), head=head(12)),
        {"one": 8, "two": 12},
    ),
    "a residual": (
        lambda: Net(residual, stem=conv(3, 8), one=conv(8, 12), two=conv(12, 8), head=head(8)),
        {"stem": 8, "one": 12},
    ),
    "squeeze and excite": (
        lambda: Net(squeezed, stem=conv(3, 8), down=conv(8, 4), up=conv(4, 8), head=head(8)),
        {"stem": 8, "down": 4},
    ),
    "dense concatenation": (
        lambda: Net(dense, stem=conv(3, 8), bn=bn(8), one=conv(8, 4), two=conv(12, 4), head=head(16)),
        {"stem": 8, "one": 4, "two": 4},
    ),
    # The first split parts the stem; the shuffles part it, and what the blocks make, further.
    "a channel shuffle": (lambda: Net(shuffled, stem=conv(3, 16), one=conv(8, 8), two=conv(8, 8), head=head(16)), {}),
    "a flattened head": (
        lambda: Net(flattened, one=conv(3, 6), fc=nn.Linear(54, 10), head=head(10)),
        {"one": 6, "fc": 10},
    ),
    "channels last": (
        lambda: Net(
            channels_last,
            stem=conv(3, 8, 3),
            depthwise=conv(8, 8, 3, groups=8),
            norm=nn.LayerNorm(8),
            up=nn.Linear(8, 16),
            down=nn.Linear(16, 8),
            scale=nn.PReLU(8),
            head=head(8),
        ),
        {"stem": 8, "up": 16},
    ),
    "two poolings of one tensor": (lambda: Net(pooled_twice, one=conv(3, 8), head=head(16)), {"one": 8}),
    "attention over positions": (lambda: Net(attended, one=conv(3, 8), two=conv(2, 1, 3), head=head(8)), {"one": 8}),
    "a gate": (lambda: Net(gated, one=conv(3, 16), head=head(8)), {"one": 8}),
    "three parts that meet": (
        lambda: Net(thrice_gated, one=conv(3, 24), two=conv(8, 8), head=head(8)),
        {"one": 8},
    ),
    # Channels move with their mirror images.
    "a mirror": (lambda: Net(mirrored, one=conv(3, 8), head=head(8)), {"one": 4}),
    # A group of the norm, or of the convolution, keeps its channels.
    "group norm": (
        lambda: Net(chain, one=conv(3, 8), two=conv(8, 12), bn=nn.GroupNorm(3, 12), head=head(12)),
        {"one": 8, "two": 4, "two#2": 4, "two#3": 4},
    ),
    "instance norm": (
        lambda: Net(chain, one=conv(3, 8), two=conv(8, 12), bn=nn.InstanceNorm2d(12, affine=True), head=head(12)),
        {"one": 8, "two": 12},
    ),
    "a grouped convolution": (
        lambda: Net(chain, one=conv(3, 8), two=conv(8, 12, groups=2), bn=bn(12), head=head(12)),
        {"two": 6, "two#2": 6},
    ),
    "a depthwise multiplier": (
        lambda: Net(chain, one=conv(3, 8), two=conv(8, 16, 3, groups=8), bn=bn(16), head=head(16)),
        {"one": 8},
    ),
    "a transposed convolution": (
        lambda: Net(chain, one=conv(3, 8), two=nn.ConvTranspose2d(8, 12, 2, 2), bn=bn(12), head=head(12)),
        {"one": 8, "two": 12},
    ),
    # Padding moves nowhere, and holds what it is added to.
    "padded channels": (lambda: Net(padded, one=conv(3, 8), two=conv(8, 12), head=head(12)), {"one": 8}),
}


@cache
def read(name: str) -> tuple[nn.Module, Axes]:
    """A network of `NETS` and its channels; read-only."""
    torch.manual_seed(0)
    module = drawn(NETS[name][0]())
    return module, find_groups(module, PREPROCESSING)


@pytest.mark.parametrize("name", NETS)
def test_shuffled_groups_leave_the_outputs_unchanged(name: str) -> None:
    module, axes = read(name)
    expected = NETS[name][1]
    assert axes.movable
    assert moved(module, axes.movable, PREPROCESSING) < 1e-9
    if expected:
        assert sizes(axes) == expected
    assert all(name in ("two", "one") for name in reasons(axes))


@pytest.mark.parametrize(
    "name", ["a residual", "dense concatenation", "squeeze and excite", "a flattened head", "a gate"]
)
def test_leaving_out_one_place_of_a_group_changes_the_outputs(name: str) -> None:
    module, axes = read(name)
    for group in axes.movable:
        for left_out in group.places:
            places = tuple(p for p in group.places if p is not left_out)
            assert moved(module, (Group(group.name, places),), PREPROCESSING) > 1e-3, (group.name, left_out.tensor)


def test_swapping_channels_of_two_groups_changes_the_outputs() -> None:
    """A shuffle's groups are as fine as they have to be."""
    module, axes = read("a channel shuffle")
    one, other, *_ = [g for g in axes.movable if g.name.startswith("stem")]
    swapped = dict(module.state_dict())
    for name in ("stem.weight", "stem.bias"):
        a, b = (next(p.positions[0, 0] for p in g.places if p.tensor == name) for g in (one, other))
        index = torch.arange(16)
        index[[a, b]] = index[[b, a]]
        swapped[name] = swapped[name][index]
    assert difference(module, swapped, PREPROCESSING) > 1e-3


def test_what_the_network_reads_and_writes_is_fixed_and_named() -> None:
    _, axes = read("a chain")
    assert [(f.name, f.channels, f.reason) for f in axes.fixed] == [
        ("one", 3, "it is an input of the network"),
        ("head", 5, "it is an output of the network"),
    ]


def test_values_of_attention_move_within_their_heads() -> None:
    net = Net(attention, stem=conv(3, 8), qkv=nn.Linear(8, 36), out=nn.Linear(12, 8), head=head(8))
    axes = stays(drawn(net))
    assert list(sizes(axes).values()) == [8, 4, 4, 4]
    for group in axes.movable[1:]:
        (read,) = (place.positions for place in group.places if place.tensor == "out.weight")
        assert np.ptp(read // 4) == 0
    assert set(reasons(axes)) == {"qkv"}


def test_what_a_grouped_convolution_reads_is_fixed_and_named() -> None:
    assert reasons(read("a grouped convolution")[1]) == {
        "one": "a grouped convolution reads it",
        "two": "a grouped convolution reads it",
    }


def test_a_module_that_cannot_be_exported_gives_one_message(capfd: pytest.CaptureFixture[str]) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return pooled(self, x if float(x.sum()) > 0 else -x)

    before = logging.root.manager.disable
    with pytest.raises(
        UnexportableError, match=r"torch\.export cannot read its operators\n  found: .*\n  fix:   continue without"
    ):
        find_groups(Net(forward, one=conv(3, 8), head=head(8)), PREPROCESSING)
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == before


def test_data_dependent_sizes_give_one_message() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return pooled(self, x * x[x > 0].mean())

    with pytest.raises(UnexportableError, match="depends on values of the input"):
        find_groups(Net(forward, one=conv(3, 8), head=head(8)), PREPROCESSING)


@pytest.mark.parametrize(
    "seed", [0, 1, 2, 3, pytest.param(4, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_random_networks_keep_their_outputs(seed: int) -> None:
    """Blocks of many kinds one after another, in orders that nobody thought of."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    layers: dict[str, nn.Module] = {"stem": conv(3, 16)}
    steps: list[tuple[str, str]] = []
    for i in range(6):
        kind = str(
            rng.choice(["conv", "residual", "cat", "shuffle", "depthwise", "norm", "grouped", "split", "squeeze"])
        )
        steps.append((kind, f"l{i}"))
        layers[f"l{i}"] = {
            "conv": lambda: conv(16, 16, 3),
            "residual": lambda: conv(16, 16),
            "cat": lambda: conv(16, 8),
            "shuffle": nn.Identity,
            "depthwise": lambda: conv(16, 16, 3, groups=16),
            "norm": lambda: nn.GroupNorm(int(rng.choice([1, 2, 4])), 16),
            "grouped": lambda: conv(16, 16, groups=2),
            "split": lambda: conv(8, 8),
            "squeeze": lambda: conv(16, 16),
        }[kind]()

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for kind, name in steps:
            layer = getattr(self, name)
            if kind == "residual":
                x = x + functional.relu(layer(x))
            elif kind == "cat":
                x = torch.cat([layer(x), x[:, 4:12]], 1)
            elif kind == "shuffle":
                x = x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
            elif kind == "split":
                a, b = x.split(8, 1)
                x = torch.cat([b, layer(a)], 1)
            elif kind == "squeeze":
                x = x * torch.sigmoid(layer(x.mean((2, 3), keepdim=True)))
            else:
                x = functional.relu(layer(x))
        return pooled(self, x)

    module = drawn(Net(forward, **layers, head=head(16)), seed)
    axes = find_groups(module, PREPROCESSING)
    assert moved(module, axes.movable, PREPROCESSING, seed) < 1e-9
    covered = sum(g.size for g in axes.movable) + sum(f.channels for f in axes.fixed)
    assert covered >= 3 + 16 + 5


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_byobnet",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("test_efficientnet", "test_convnext", "test_nfnet")),
    ],
)
def test_classes_of_timm_move(name: str) -> None:
    """`BatchNormAct2d` and its like are no classes of torch's."""
    built = build_model(f"timm/{name}", seed=0)
    preprocessing = replace(built.preprocessing, height=64, width=64)
    stays(settled(drawn(built.module), preprocessing), preprocessing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "min_groups"),
    [
        ("resnet18", 12),
        ("resnet50", 37),
        ("vgg16_bn", 15),
        ("shufflenet_v2_x1_0", 80),
        ("densenet121", 120),
        ("convnext_tiny", 22),
        ("efficientnet_b0", 40),
        ("timm/efficientnet_b0", 40),
        ("regnet_y_400mf", 500),
        ("googlenet", 69),
    ],
)
def test_families_move(name: str, min_groups: int) -> None:
    built = build_model(name, seed=0)
    preprocessing = replace(built.preprocessing, height=64, width=64)
    axes = stays(settled(drawn(built.module), preprocessing), preprocessing)
    assert len(axes.movable) >= min_groups
