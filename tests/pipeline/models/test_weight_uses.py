"""Uses of weights are read off the operators of a forward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import Layer, Pattern, Preprocessing
from maskplan.pipeline.masking.policy import LayerPolicy, select_layers
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.weight_uses import run_recorded

aten = torch.ops.aten
# Stride, padding, dilation, transposed, output padding, groups.
PLAIN = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
HOW = Preprocessing(3, 8, 8, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)
Forward = Callable[["Net", torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """A stem, two convolutions and a head, used by a function of the module."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.stem, self.conv, self.point = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
        self.head, self.run = nn.Linear(8, 3), forward
        self.gain, self.factor = nn.Parameter(torch.ones(8, 1, 1, 1)), torch.full((1,), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def layers_of(forward: Forward) -> dict[str, Layer]:
    return {layer.name: layer for layer in trace_layers(Net(forward).eval(), HOW)[0]}


def through(use: Callable[[Net, torch.Tensor], torch.Tensor]) -> Forward:
    """`use` between the stem and the head."""
    return lambda m, x: m.head(use(m, m.stem(x)).mean((2, 3)))


def in_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.conv2d(x, part) for part in weight.chunk(2)], 1)


MODULE = layers_of(through(lambda m, x: m.point(m.conv(x))))


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: F.conv2d(F.conv2d(x, m.conv.weight, m.conv.bias), m.point.weight),
        lambda m, x: torch.conv2d(
            torch.convolution(x, m.conv.weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), m.point.weight
        ),
        lambda m, x: F.conv2d(m.conv(x), m.point.weight.clone()),
        lambda m, x: F.conv2d(m.conv(x), m.point.weight.detach().contiguous().to(torch.float32)),
        lambda m, x: in_parts(m.conv(x), m.point.weight),
        lambda m, x: F.linear(m.conv(x).movedim(1, -1), m.point.weight[:, :, 0, 0]).movedim(-1, 1),
        lambda m, x: torch.einsum("nchw,kc->nkhw", m.conv(x), m.point.weight.flatten(1)),
    ],
    ids=["functional", "operators", "clone", "copies", "parts", "product", "einsum"],
)
def test_weights_that_are_used_by_functions_are_layers_like_those_that_are_called(use: Forward) -> None:
    assert layers_of(through(use)) == MODULE


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: F.conv2d(x, m.conv.weight * m.gain),
        lambda m, x: F.conv2d(x, m.conv.weight * m.factor),
        lambda m, x: F.conv2d(x, m.conv.weight - m.conv.weight.mean((1, 2, 3), keepdim=True)),
        lambda m, x: F.conv2d(x, F.normalize(m.conv.weight, dim=1)),
        lambda m, x: F.conv2d(x, m.conv.weight.transpose(0, 1)),
        lambda m, x: F.conv2d(x, m.conv.weight * torch.sigmoid(x.mean())),
        lambda m, x: F.conv2d(x[:, :4], m.conv.weight[:, :4]),
        lambda m, x: x * m.conv.weight.mean() + m.conv.weight.sum((2, 3)).mean(1)[:, None, None],
        lambda m, x: F.conv2d(x, torch.cat([m.conv.weight, m.conv.weight.flip(0)]))[:, :8],
    ],
    ids=["gain", "constant", "centered", "normalized", "transposed", "of the image", "half", "no convolution", "cat"],
)
def test_a_weight_that_is_computed_before_its_operator_is_dense_with_a_reason(use: Forward) -> None:
    layers, _ = trace_layers(Net(through(lambda m, x: m.point(F.pad(use(m, x), (0, 8, 0, 8))))).eval(), HOW)
    selection = select_layers(layers, Pattern(2, 4))
    assert [layer.name for layer in selection.masked] == ["point.weight"]
    assert [d.reason for d in selection.dense if d.name == "conv.weight"] == ["weight_is_computed"]


def test_an_unused_weight_is_unused() -> None:
    layers = layers_of(through(lambda m, x: m.conv(x)))
    assert layers["point.weight"] == Layer("point.weight", "Conv", (8, 8, 1, 1), 1, None, 0)


def test_a_weight_that_only_makes_other_weights_is_unused() -> None:
    def use(m: Net, x: torch.Tensor) -> torch.Tensor:
        m.made = m.point.weight * 2
        return m.conv(x)

    assert layers_of(through(use))["point.weight"].position is None


def test_attention_uses_its_projections() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))

    layers = {layer.name: layer for layer in trace_layers(Attention().eval(), HOW)[0]}
    projection = layers["encoder.self_attn.out_proj.weight"]
    assert projection.position is not None
    assert projection.macs == 4 * 8 * 8
    assert not any(layer.computed for layer in layers.values())


def test_layers_that_share_a_weight_have_their_own_positions_and_costs() -> None:
    net = Net(through(lambda m, x: m.second(m.conv(x))))
    net.second = nn.Conv2d(8, 8, 3)
    net.second.weight = net.conv.weight
    layers = {layer.name: layer for layer in trace_layers(net.eval(), HOW)[0]}
    assert (layers["conv.weight"].position, layers["second.weight"].position) == (1, 2)
    assert (layers["conv.weight"].macs, layers["second.weight"].macs) == (16 * 8 * 72, 4 * 8 * 72)


def test_a_bare_parameter_that_a_convolution_reads_is_a_layer() -> None:
    net = Net(through(lambda m, x: F.conv2d(x, m.kernel, groups=2)))
    net.kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
    layers = {layer.name: layer for layer in trace_layers(net.eval(), HOW)[0]}
    assert layers["kernel"] == Layer("kernel", "Conv", (8, 4, 3, 3), 2, 1, 16 * 8 * 36)


def test_every_layer_of_a_transformer_of_torchvision_is_used() -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    swin = torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [7, 7], num_classes=3).eval()
    layers, _ = trace_layers(swin, Preprocessing(3, 64, 64, 0, "bilinear", (0.5,) * 3, (0.25,) * 3))
    assert all(layer.position is not None and layer.macs > 0 and not layer.computed for layer in layers)
    assert len(layers) == 4 * 4 + 3


def test_recording_changes_nothing() -> None:
    net = Net(through(lambda m, x: m.point(m.conv(x)))).eval()
    x = torch.rand(1, 3, 8, 8)
    fast = torch.backends.mha.get_fastpath_enabled()
    output, uses = run_recorded(net, x)
    assert torch.equal(output, net(x))
    assert [next(iter(u.names)) for u in uses] == ["stem.weight", "conv.weight", "point.weight", "head.weight"]
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_mask_of_a_computed_weight_is_refused_by_name() -> None:
    layers, _ = trace_layers(Net(through(lambda m, x: m.point(F.conv2d(x, m.conv.weight * m.gain)))).eval(), HOW)
    policy = LayerPolicy(include_linear=True)
    assert {layer.name for layer in select_layers(layers, Pattern(2, 4), policy).masked} == {
        "point.weight",
        "head.weight",
    }
