"""Networks read off exported models: whole models, folding of BatchNorm, and models that cannot be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.layers import sample_input
from maskplan.pipeline.models.registry import build_model
from maskplan.pipeline.stability.bounds import Pair, observe
from maskplan.pipeline.stability.network import Conv, Reshape, Scale, affine_maps
from maskplan.pipeline.stability.reader import read_network
from tests.support.moving_nets import Net

HOW = Preprocessing(3, 9, 9, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)


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


@pytest.mark.parametrize("model", ["digits_resnet", "shufflenet_v2_x0_5"])
def test_real_models_are_read_whole(model: str) -> None:
    built = build_model(model, seed=0, classes=7)
    module = settled(built.module)
    network = read_network(module, built.preprocessing)
    x = sample_input(built.preprocessing, 3, seed=1).double()
    with torch.no_grad():
        expected = module(x)
    maps = affine_maps(network, module.state_dict())
    observed = observe(Pair(network, maps, maps, {}, {}), x)
    np.testing.assert_allclose(observed.logits_first, expected, rtol=1e-10, atol=1e-10)


def test_batch_norm_is_folded_into_a_layer_that_nothing_else_reads() -> None:
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


def test_identities_and_unused_layers_leave_no_node() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        return self.head(torch.flatten(self.drop(x)[:, :, :, :], 1))

    network = read_network(Net(forward, unused=nn.Conv2d(3, 4, 1), drop=nn.Dropout(), head=nn.Linear(243, 2)), HOW)
    assert [type(node.op) for node in network.nodes[1:-1]] == [Reshape]


def test_all_refused_operators_are_named_at_once() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(F.softmax(F.layer_norm(x, x.shape[1:]), 1) * x, 1)

    with pytest.raises(InputError) as raised:
        read_network(Net(forward), HOW)
    assert all(name in str(raised.value) for name in ("softmax", "layer_norm", "mul"))


def test_a_model_with_control_flow_on_values_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(x if x.sum() > 0 else -x, 1)

    with pytest.raises(InputError, match=r"torch\.export cannot read"):
        read_network(Net(forward), HOW)


def test_folding_keeps_the_norm_of_the_weight_and_the_largest_factor() -> None:
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
