"""Networks read off ATen operators: they compute what torch does, their constants are right, and what has none is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_nets import architecture, case
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.layers import sample_input
from maskplan.pipeline.models.registry import build_model
from maskplan.pipeline.stability.network import Conv, Network, Operator, Reshape, Scale, affine_maps, apply_node
from maskplan.pipeline.stability.reader import read_network
from tests.support.moving_nets import Net

HOW = Preprocessing(3, 9, 9, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)


def computed(network: Network, state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    maps = affine_maps(network, state)
    values: list[torch.Tensor] = []
    with torch.no_grad():
        for i, node in enumerate(network.nodes):
            values.append(x if node.op is None else apply_node(node, maps.get(i), [values[j] for j in node.inputs]))
            assert tuple(values[-1].shape[1:]) == node.shape
    return values[-1]


def settled(module: nn.Module) -> nn.Module:
    """Statistics and scales that differ from channel to channel, in float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.5, 2, generator=generator)
            elif name.endswith("running_mean"):
                tensor.normal_(0, 0.3, generator=generator)
    return module.double().eval()


@pytest.mark.parametrize("model", ["digits_resnet", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_real_models_are_read_whole(model: str) -> None:
    built = build_model(model, seed=0, classes=7)
    module = settled(built.module)
    network = read_network(module, built.preprocessing)
    x = sample_input(built.preprocessing, 3, seed=1).double()
    with torch.no_grad():
        expected = module(x)
    torch.testing.assert_close(computed(network, module.state_dict(), x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_compute_what_torch_does(seed: int) -> None:
    _, network = architecture(seed)
    drawn = case(seed, 0)
    for state in (drawn.first, drawn.second):
        torch.testing.assert_close(computed(network, state, drawn.images), drawn.logits(state), rtol=1e-9, atol=1e-9)


def test_batch_norm_is_folded_into_the_layer_before_it_and_stands_alone_elsewhere() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        return self.head(torch.flatten(F.relu(self.bn1(self.two(F.relu(self.bn2(y))))) + y, 1))

    layers = {
        "one": nn.Conv2d(3, 4, 1),
        "two": nn.Conv2d(4, 4, 1),
        "bn1": nn.BatchNorm2d(4),
        "bn2": nn.BatchNorm2d(4),
        "head": nn.Linear(4 * 81, 2),
    }
    network = read_network(Net(forward, **layers), HOW)
    norms = {node.name: node.op.norm for node in network.nodes if isinstance(node.op, Conv)}
    assert norms["two"] is not None
    # Its output is used without the norm, too.
    assert norms["one"] is None
    assert [node.name for node in network.nodes if isinstance(node.op, Scale)] == ["bn2"]


def test_what_changes_nothing_or_is_not_used_leaves_no_node() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        return self.head(torch.flatten(self.drop(x)[:, :, :, :], 1))

    network = read_network(Net(forward, unused=nn.Conv2d(3, 4, 1), drop=nn.Dropout(), head=nn.Linear(243, 2)), HOW)
    assert [type(node.op) for node in network.nodes[1:-1]] == [Reshape]


def factor(module: nn.Module, size: int = 9) -> float:
    """Of a single operator."""
    how = Preprocessing(1, size, size, 0, "bilinear", (0.0,), (1.0,))
    (node,) = (
        n for n in read_network(Net(lambda self, x: self.op(x), op=module), how).nodes if isinstance(n.op, Operator)
    )
    assert isinstance(node.op, Operator)
    return node.op.lipschitz


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (nn.MaxPool2d(2), 1.0),
        (nn.MaxPool2d(3, 2), 2.0),
        (nn.MaxPool2d(3, 2, 1), 2.0),
        (nn.MaxPool2d(3, 1), 3.0),
        (nn.MaxPool2d(3, 2, dilation=2), 3.0),
        (nn.MaxPool2d((1, 3), (1, 1)), 3**0.5),
        (nn.MaxPool2d(9), 1.0),
    ],
)
def test_max_pooling_copies_a_value_into_as_many_windows_as_hold_it(pool: nn.MaxPool2d, expected: float) -> None:
    found = factor(pool)
    assert found == pytest.approx(expected)
    # Attained: of two images, one has a spike where most windows meet.
    spikes = torch.eye(81, dtype=torch.float64).view(81, 1, 9, 9)
    assert float(pool(spikes).flatten(1).norm(dim=1).max()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("pool", "tight"),
    [
        (nn.AvgPool2d(2), True),
        (nn.AvgPool2d(3), True),
        (nn.AvgPool2d(3, 2, 1), False),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), False),
        (nn.AvgPool2d(2, 2, 1, ceil_mode=True), False),
        (nn.AvgPool2d(3, 1), False),
        (nn.AvgPool2d(2, divisor_override=3), True),
        (nn.AdaptiveAvgPool2d(1), True),
        (nn.AdaptiveAvgPool2d(4), False),
        (nn.AdaptiveAvgPool2d(9), True),
    ],
)
def test_average_pooling_is_bounded_by_its_matrix_norm(pool: nn.Module, tight: bool) -> None:
    matrix = pool(torch.eye(81, dtype=torch.float64).view(81, 1, 9, 9)).flatten(1)
    norm, found = float(torch.linalg.matrix_norm(matrix, 2)), factor(pool)
    assert norm <= found * (1 + 1e-12)
    assert found <= norm * (1 + 1e-9 if tight else 2.0)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.ReLU6(),
        nn.Hardtanh(),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        nn.LeakyReLU(1.5),
    ],
)
def test_activations_are_never_steeper_than_their_constant(activation: nn.Module) -> None:
    x = torch.linspace(-12, 12, 480_001, dtype=torch.float64)
    y = activation(x)
    steepest = float(((y[1:] - y[:-1]) / (x[1:] - x[:-1])).abs().max())
    assert steepest <= factor(activation) * (1 + 1e-6) <= 1.01 * steepest
    network = read_network(Net(lambda self, x: self.op(x), op=activation), HOW)
    (op,) = (n.op for n in network.nodes if isinstance(n.op, Operator))
    assert op.at_zero == float(activation(torch.zeros(())))


@pytest.mark.parametrize(
    ("forward", "told"),
    [
        (lambda self, x: x * torch.sigmoid(x), "mul"),
        (lambda self, x: self.one(x) @ x.transpose(2, 3), "matmul"),
        (lambda self, x: F.layer_norm(x, x.shape[1:]), "layer_norm"),
        (lambda self, x: F.softmax(x, 1), "softmax"),
        (lambda self, x: F.interpolate(x, scale_factor=2), "upsample"),
        (lambda self, x: F.conv2d(x, self.one.weight * 2), "its weight is computed"),
        (lambda self, x: self.batch(x), "batch"),
        (lambda self, x: x + x.mean(1, keepdim=True), "spreads"),
        (lambda self, x: x - x.mean(0, keepdim=True), "images do not stay apart"),
        (lambda self, x: F.pad(x, (1, 1, 1, 1), "reflect"), "pad"),
        (lambda self, x: self.transposed(x), "conv_transpose2d at transposed"),
    ],
)
def test_operators_without_a_bound_are_named(forward: Callable[..., torch.Tensor], told: str) -> None:
    layers = {
        "one": nn.Conv2d(3, 3, 1),
        "batch": nn.BatchNorm2d(3, track_running_stats=False),
        "transposed": nn.ConvTranspose2d(3, 3, 2),
    }
    with pytest.raises(InputError, match=told) as raised:
        read_network(Net(lambda self, x: torch.flatten(forward(self, x), 1), **layers), HOW)
    assert raised.value.what == "the bounds do not cover the model"


def test_all_of_them_are_named_at_once() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(F.softmax(F.layer_norm(x, x.shape[1:]), 1) * x, 1)

    with pytest.raises(InputError) as raised:
        read_network(Net(forward), HOW)
    assert all(name in str(raised.value) for name in ("softmax", "layer_norm", "mul"))


def test_a_model_that_looks_at_values_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(x if x.sum() > 0 else -x, 1)

    with pytest.raises(InputError, match=r"torch\.export cannot read"):
        read_network(Net(forward), HOW)


def test_folding_tells_the_weight_before_it_and_the_largest_factor() -> None:
    module = settled(
        Net(lambda self, x: torch.flatten(self.bn(self.one(x)), 1), one=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    )
    network = read_network(module, HOW)
    (affine,) = affine_maps(network, module.state_dict()).values()
    weight, bn = module.one.weight.detach(), module.bn
    scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach()
    assert affine.frobenius == pytest.approx(float(weight.norm()))
    assert affine.gain == pytest.approx(float(scale.abs().max()))
    np.testing.assert_allclose(affine.weight, scale.view(-1, 1, 1, 1) * weight, rtol=1e-12)
