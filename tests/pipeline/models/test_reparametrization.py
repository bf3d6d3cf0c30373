"""Weight and spectral normalization, pruning and ASP, in modules and in files, are folded into plain weights."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.reparametrization import fold_module, fold_state
from maskplan.pipeline.models.state_dict import fit_weights

Change = Callable[[nn.Module], object]

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PLAIN_KEYS = {f"{i}.{name}" for i in (0, 1, 2, 5) for name in ("weight", "bias")}


def network(change: Change | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    if change is not None:
        for i in (1, 2, 5):
            change(net[i])
    return net.eval()


def trained(change: Change) -> nn.Sequential:
    """With other weights than a new network, and converged singular vectors."""
    net = network(change)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        net.train()
        for _ in range(20):
            net(X)
    return net.eval()


def twice(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "weight", 0.3)
    prune.l1_unstructured(layer, "bias", 0.2)


def pruned_and_normalized(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer)
    prune.l1_unstructured(layer, "weight_v", 0.5)


CHANGES: dict[str, Change] = {
    "weight_norm": nn.utils.weight_norm,
    "weight_norm of all": lambda m: nn.utils.weight_norm(m, dim=None),
    "weight_norm along C": lambda m: nn.utils.weight_norm(m, dim=1),
    "weight_norm, parametrized": parametrizations.weight_norm,
    "weight_norm along C, parametrized": lambda m: parametrizations.weight_norm(m, dim=1),
    "spectral_norm": nn.utils.spectral_norm,
    "spectral_norm, parametrized": parametrizations.spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "prune filters": lambda m: prune.ln_structured(m, "weight", 0.3, 2, 0),
    "prune twice, and the bias": twice,
    "prune what is normalized": pruned_and_normalized,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("into", ["the same", "a plain"])
def test_a_reparametrized_checkpoint_computes_the_same_in_a_network(change: Change, into: str) -> None:
    source = trained(change)
    wanted = source(X)
    net = network(change if into == "the same" else None)
    fit_weights(net, dict(source.state_dict()), where="f")
    assert dict(net.named_parameters()).keys() == PLAIN_KEYS
    assert torch.allclose(net(X), wanted, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_reparametrized_network_reads_plain_weights_as_its_own_dense_file_has_them(change: Change) -> None:
    source = trained(change)
    wanted = source(X)
    fold_module(source)
    assert torch.allclose(source(X), wanted, atol=1e-6)
    source.load_state_dict(source.state_dict())
    net = network(change)
    fit_weights(net, dict(source.state_dict()), where="f")
    assert torch.equal(net(X), source(X))


def test_a_checkpoint_of_one_kind_is_read_by_a_network_of_the_other() -> None:
    source = trained(parametrizations.weight_norm)
    net = network(lambda m: prune.l1_unstructured(m, "weight", 0.5))
    fit_weights(net, dict(source.state_dict()), where="f")
    assert torch.allclose(net(X), source(X), atol=1e-6)


def test_a_parametrization_of_ones_own_is_folded_where_the_network_has_it() -> None:
    class Squared(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * weight.abs()

    def change(layer: nn.Module) -> None:
        parametrize.register_parametrization(layer, "weight", Squared())

    source = trained(change)
    wanted = source(X)
    net = network(change)
    fit_weights(net, dict(source.state_dict()), where="f")
    assert torch.equal(net(X), wanted)
    with pytest.raises(InputError, match="does not fit the model") as raised:
        fit_weights(network(), dict(source.state_dict()), where="f")
    assert "parametrizations" in str(raised.value.fix)


def test_masks_of_pruning_are_found_and_the_pruned_weights_are_plus_zero(caplog: pytest.LogCaptureFixture) -> None:
    source = trained(CHANGES["prune"])
    net = network()
    with caplog.at_level(logging.INFO, "maskplan"):
        fit_weights(net, dict(source.state_dict()), where="f")
    masks = fold_state(source.state_dict()).masks
    assert masks.keys() == {"1.weight", "2.weight", "5.weight"}
    for name, mask in masks.items():
        weight = dict(net.named_parameters())[name]
        assert torch.equal(mask, source.get_submodule(name[0]).weight_mask.bool())
        assert torch.equal(weight[mask], source.get_submodule(name[0]).weight_orig[mask])
        assert not np.signbit(weight.detach().numpy()[~mask.numpy()]).any()
    assert "the pruning masks of 3 weights are applied; `maskplan mask --init` takes them" in caplog.text


def test_masks_of_asp_are_applied_and_its_buffers_dropped() -> None:
    source = network()
    mask = torch.arange(8) % 2 == 0
    mask = mask[None, :, None, None].expand(8, 8, 3, 3)
    state = dict(source.state_dict())
    state |= {"1.__weight_mma_mask": mask, "1.__weight_mma_pruned_p": torch.zeros(8, 8, 3, 3)}
    net = network()
    fit_weights(net, state, where="f")
    assert torch.equal(net[1].weight, torch.where(mask, source[1].weight, torch.zeros(())))
    assert torch.equal(net[0].weight, source[0].weight)
    source[1].register_buffer("__weight_mma_mask", mask)
    assert fold_module(source) == {"ASP": 1}
    assert torch.equal(source[1].weight, net[1].weight)
    assert not dict(source.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_normalized_checkpoint_in_another_type_is_folded(dtype: torch.dtype) -> None:
    source = trained(parametrizations.weight_norm)
    net = network()
    fit_weights(net, {k: v.to(dtype) for k, v in source.state_dict().items()}, where="f")
    assert torch.allclose(net(X), source(X), atol=0.05)


def test_tensors_that_only_look_reparametrized_are_kept() -> None:
    state = {"a_g": torch.ones(3), "a_v": torch.ones(2, 2), "b_orig": torch.ones(2), "c_mask": torch.ones(2)}
    folded = fold_state(state)
    assert folded.tensors.keys() == state.keys()
    assert not folded.folded


def test_a_plain_network_is_not_changed() -> None:
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert not fold_module(net)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
