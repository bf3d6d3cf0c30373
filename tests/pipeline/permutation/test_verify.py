"""The check that a permuted network computes the same function: misread operators are refused early, rounding is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.permutation.groups import Axes, find_groups
from maskplan.pipeline.permutation.record import MOVED
from maskplan.pipeline.permutation.verify import OutputChange, output_change, shuffled_change
from tests.support.moving_nets import Net as Layers
from tests.support.moving_nets import conv, drawn, head, pooled
from tests.support.permuted_nets import PREPROCESSING, Net, loaded, run, trained


def cancelling(self: Any, x: torch.Tensor) -> torch.Tensor:
    return pooled(self, self.bn(self.two(self.one(x) + 1e5)))


def ill_conditioned() -> nn.Module:
    """Sums of large numbers of which nearly everything cancels, as in EfficientNetV2 with wide statistics."""
    torch.manual_seed(0)
    net = drawn(Layers(cancelling, one=conv(3, 64), two=conv(64, 16), bn=nn.BatchNorm2d(16), head=head(16)))
    sums = net.get_parameter("two.weight").detach().double().sum((1, 2, 3)) * 1e5
    net.get_buffer("bn.running_mean").copy_(sums)
    net.get_buffer("bn.running_var").fill_(1e-3)
    return net


def test_an_exact_permutation_of_an_ill_conditioned_network_is_accepted(tmp_path: Path) -> None:
    """In float32, its outputs depend on the order of summation by more than the largest that is allowed there."""
    module = ill_conditioned()
    done = run(module, tmp_path)
    assert any(group.state == MOVED for group in done.permutation.groups)
    sample = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before, after = module(sample), loaded(module, done)(sample)
    assert (before - after).abs().max() > 1e-3 * before.abs().max()
    change = output_change(module, loaded(module, done).state_dict(), PREPROCESSING)
    assert change.is_rounding
    assert change.difference < 1e-9


def misread(monkeypatch: pytest.MonkeyPatch, tensor: str) -> None:
    """Groups without their place in one tensor, as of an operator that is understood wrongly; a search fails."""

    def find(module: nn.Module, preprocessing: Preprocessing) -> Axes:
        axes = find_groups(module, preprocessing)
        kept = [replace(g, places=tuple(p for p in g.places if p.tensor != tensor)) for g in axes.movable]
        return replace(axes, movable=tuple(kept))

    def search(*_: object) -> None:
        pytest.fail("the search ran before the check")

    monkeypatch.setattr("maskplan.pipeline.permutation.permute.find_groups", find)
    monkeypatch.setattr("maskplan.pipeline.permutation.permute.search", search)


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_a_misread_operator_is_refused_before_the_search(
    size: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it moves the outputs by less than float32 could show."""
    misread(monkeypatch, "bn.bias")
    module = trained()
    with torch.no_grad():
        module.get_parameter("bn.bias").normal_().mul_(size)
    with pytest.raises(InputError, match="computes another function") as refused:
        run(module, tmp_path)
    assert "an operator was misread" in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("difference", "accepted"),
    [(0.0, True), (1e-6, True), (1.1e-6, False), (float("inf"), False), (float("nan"), False)],
)
def test_a_change_is_rounding_up_to_its_tolerance(difference: float, accepted: bool) -> None:
    assert OutputChange(difference, 1e-6).is_rounding is accepted


@pytest.mark.parametrize("wrong", [1e-4, 0.3])
def test_a_small_change_of_the_weights_is_no_rounding(wrong: float) -> None:
    module = trained()
    state = dict(module.state_dict())
    assert output_change(module, state, PREPROCESSING).is_rounding
    state["head.bias"] = state["head.bias"] + wrong * torch.eye(5)[0]
    assert not output_change(module, state, PREPROCESSING).is_rounding


def in_float32(self: Any, x: torch.Tensor) -> torch.Tensor:
    return pooled(self, self.two(F.relu(self.one(x)).float().to(x.dtype)))


def fixed_kernel(self: Any, x: torch.Tensor) -> torch.Tensor:
    return pooled(self, self.two(F.conv2d(self.one(x), torch.ones(8, 1, 3, 3), groups=8)))


@pytest.mark.parametrize("forward", [in_float32, fixed_kernel])
def test_a_network_that_insists_on_float32_is_judged_by_its_rounding(forward: Callable[..., torch.Tensor]) -> None:
    module = drawn(Layers(forward, one=conv(3, 8), two=conv(8, 12), head=head(12)))
    groups = find_groups(module, PREPROCESSING).movable
    assert groups
    change = shuffled_change(module, groups, PREPROCESSING)
    assert change.is_rounding
    assert change.tolerance == 1e-3
    state = dict(module.state_dict())
    state["two.weight"] = state["two.weight"] * 1.02
    assert not output_change(module, state, PREPROCESSING).is_rounding


def test_the_module_keeps_its_weights_and_types() -> None:
    module = Net().half()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert shuffled_change(module, find_groups(module, PREPROCESSING).movable, PREPROCESSING).is_rounding
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.get_parameter("one.weight").dtype == torch.float16


class Volumes(nn.Module):
    """Conv1d and Conv3d layers, and a parameter with five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1)
        self.volume, self.line = nn.Conv3d(16, 32, (1, 3, 3)), nn.Conv1d(32, 16, 3)
        self.gain = nn.Parameter(torch.rand(1, 16, 1, 1, 1) + 0.5)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.one(torch.relu(self.stem(x))))
        x = torch.relu(self.volume(x.unsqueeze(2) * self.gain)).flatten(2)
        return self.head(torch.relu(self.line(x)).mean(2))  # type: ignore[no-any-return]


def test_layers_of_one_and_three_dimensions_move(tmp_path: Path) -> None:
    module = trained(build=Volumes)
    done = run(module, tmp_path)
    groups = {group.name: group for group in done.permutation.groups if group.reason is None}
    assert groups
    assert {g.name for g in find_groups(module, PREPROCESSING).movable} == {"stem", "one", "volume", "line"}
    assert output_change(module, loaded(module, done).state_dict(), PREPROCESSING).is_rounding


def branching(out: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], nn.Module]:
    return lambda: Layers(
        lambda self, x: out(pooled(self, self.two(self.one(x)))), one=conv(3, 8), two=conv(8, 8), head=head(8)
    )


ODD: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "weight norm": (lambda: with_two(parametrizations.weight_norm), "no layer of the model can be masked"),
    "lazy": (
        lambda: with_two(lambda _: nn.LazyConv2d(8, 1)),
        r"no channels .*\n  found: two\.weight \(not initialized\)",
    ),
    "meta": (lambda: branching(torch.neg)().to("meta"), r"one\.weight \(without values\)"),
    "sparse": (lambda: with_sparse_head(), r"head\.weight \(sparse\)"),
    "quantized": (
        lambda: torch.ao.quantization.quantize_dynamic(branching(torch.neg)(), {nn.Linear}),
        "no channels that can be reordered",
    ),
    "data parallel": (lambda: nn.DataParallel(branching(torch.neg)()), None),
    "channels last": (lambda: branching(torch.neg)().to(memory_format=torch.channels_last), None),  # type: ignore[call-overload]
    "boolean outputs": (branching(lambda x: x > 0), None),
    "complex outputs": (branching(lambda x: torch.complex(x, x * x)), None),
}


def with_two(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    net = branching(torch.neg)()
    net.two = change(net.get_submodule("two"))
    return net


def with_sparse_head() -> nn.Module:
    net = branching(torch.neg)()
    net.get_submodule("head").weight = nn.Parameter(net.get_parameter("head.weight").detach().to_sparse())
    return net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_odd_modules_are_permuted_or_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    build, message = ODD[name]
    torch.manual_seed(0)
    module = build().eval()
    if message is None:
        run(module, tmp_path)
        return
    with pytest.raises(InputError, match=message):
        run(module, tmp_path)
    assert not list(tmp_path.iterdir())
