"""The formulation of Danhofer (2024): its gates, its groups, and how its masks are recorded."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maskplan.pipeline.cli.app import main
from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.digits import PREPROCESSING, load_digits
from maskplan.pipeline.learning.danhofer2024 import (
    DanhoferNet,
    DanhoferOptions,
    FlatGates,
    conv_by_unfolding,
    correct_predictions,
    learn_danhofer,
)
from maskplan.pipeline.learning.options import LearnOptions
from maskplan.pipeline.masking.maskset import load_masks
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.pruning.mask import MaskOptions, choose_masks, masks_from_file

TWO_FOUR = Pattern(2, 4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (5, 1, 2), (2, 2, 0)])
def test_the_matrix_form_is_a_convolution(kernel: int, stride: int, padding: int) -> None:
    """Equation 4 against equation 3."""
    x, weight = torch.randn(2, 3, 9, 8, generator=generator()), torch.randn(5, 3, kernel, kernel, generator=generator())
    expected = F.conv2d(x, weight, stride=stride, padding=padding)
    assert torch.allclose(conv_by_unfolding(x, weight, stride, padding), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (4, 3, 3, 3), (6, 1, 3, 3), (5, 3)])
def test_a_likeliest_mask_keeps_two_of_four_in_storage_order(shape: tuple[int, ...]) -> None:
    mask = FlatGates(torch.zeros(shape), TWO_FOUR, generator()).argmax().flatten(1).numpy()
    assert set(np.unique(mask)) <= {0, 1}
    columns = mask.shape[1] // 4 * 4
    assert (mask[:, :columns].reshape(-1, 4).sum(axis=1) == 2).all()
    assert (mask[:, columns:].sum(axis=1) <= 2).all()


def test_a_sample_sums_to_two_in_every_group_and_hardens_as_the_temperature_falls() -> None:
    gates = FlatGates(torch.zeros(8, 8), TWO_FOUR, generator())
    for tau, gap in ((5.0, 0.2), (1e-4, 1e-3)):
        sample = gates.sample(tau, generator(1)).detach().reshape(-1, 4)
        assert torch.allclose(sample.sum(1), torch.full((16,), 2.0), atol=1e-5)
        away = torch.minimum(sample, 1 - sample).max()
        assert (float(away) > gap) == (tau > 1)


def test_the_pattern_1_1_keeps_everything() -> None:
    gates = FlatGates(torch.zeros(3, 5), Pattern(1, 1), generator())
    assert torch.equal(gates.argmax(), torch.ones(3, 5))
    assert torch.allclose(gates.sample(0.1, generator()), torch.ones(3, 5))


def test_gates_have_glorot_initialization() -> None:
    gates = FlatGates(torch.zeros(64, 64, 3, 3), TWO_FOUR, generator())
    bound = math.sqrt(6 / (gates.weight.shape[0] + 6))
    assert gates.weight.shape == (64 * 64 * 9 // 4, 6)
    weight = gates.weight.detach()
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert 0 < float(gates.bias.detach().abs().max()) < 1e-5


class AllOnes(FlatGates):
    """Gates that keep everything, by way of padding and reshaping."""

    def argmax(self) -> torch.Tensor:
        return self._expand(torch.ones(len(self.weight), len(self.table))) / self.table.sum(0)[0]


class Odd(nn.Module):
    """Convolutions whose weights are no multiple of four: 27 elements, and 9 of a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.depthwise(self.stem(x))).mean((2, 3))


def test_with_masks_of_ones_and_padding_the_logits_are_the_dense_networks() -> None:
    torch.manual_seed(0)
    dense = Odd().eval()
    net = DanhoferNet(dense, DanhoferOptions(), TWO_FOUR).eval()
    net.gates = nn.ModuleList(AllOnes(w, TWO_FOUR, generator()) for w in net._weights.values())
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(net(x, None), dense(x), atol=1e-6)


def test_every_convolution_is_masked_and_no_weight_is_a_parameter() -> None:
    net = DanhoferNet(Odd(), DanhoferOptions(), TWO_FOUR)
    assert list(net._weights) == ["stem.weight", "depthwise.weight"]
    assert {name.rpartition(".")[2] for name, _ in net.named_parameters()} == {"weight", "bias"}
    assert sum(p.numel() for p in net.parameters()) == (3 * 7 + 3 * 3) * 6 + 2 * 6


def test_learning_changes_gates_and_statistics_but_no_weight() -> None:
    dense, _ = open_checkpoint(ModelOptions("digits_resnet"))
    before = copy.deepcopy(dense.state_dict())
    options = DanhoferOptions(epochs=1, batch=256)
    net = learn_danhofer(dense, PREPROCESSING, load_digits(), options, TWO_FOUR)
    untouched = DanhoferNet(dense, options, TWO_FOUR)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    student = net._student[0].state_dict()
    assert all(torch.equal(student[k], v) for k, v in before.items() if k.endswith("conv1.weight"))
    assert any(not torch.equal(student[k], v) for k, v in before.items() if k.endswith("running_mean"))
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), untouched.parameters(), strict=True))
    # Still nearly undecided: SGD on such a flat softmax hardly changes it.
    assert net.entropy() > 0.9
    x = torch.randn(8, 1, 8, 8, generator=generator())
    with torch.no_grad():
        first, again, other = (net(x, generator(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)
        assert torch.equal(net(x, None), net(x, None))
    val = load_digits().val
    assert len(correct_predictions(net, val, PREPROCESSING, sampled=True)) == len(val)


def test_the_mask_file_records_method_and_layout(tmp_path: Path) -> None:
    module, provenance = open_checkpoint(ModelOptions("digits_resnet"))
    learn = LearnOptions(epochs=1, batch=256, seed=3)
    options = MaskOptions("danhofer2024", include_linear=True, layers=("nothing.*",), learn=learn)
    found = choose_masks(module, provenance, options, tmp_path / "m.safetensors", load_digits())
    assert found.method == "danhofer2024"
    assert found.layout == "flat"
    assert found.learning is not None
    assert found.learning.recipe == "danhofer2024"
    assert found.learning.steps == len(load_digits().train) // 256
    masks = load_masks(tmp_path / "m.safetensors")
    convolutions = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(masks) == convolutions
    expected = learn_danhofer(module, PREPROCESSING, load_digits(), DanhoferOptions(1, 256, seed=3), TWO_FOUR).masks()
    assert all(np.array_equal(masks[name], expected[name]) for name in masks)
    again = masks_from_file(module, provenance, tmp_path / "m.safetensors", deployable=False)
    assert again.layout == "flat"
    with pytest.raises(InputError, match="cannot be deployed"):
        masks_from_file(module, provenance, tmp_path / "m.safetensors")


def test_a_rate_that_is_asked_for_replaces_the_reports(tmp_path: Path) -> None:
    """Even if it is the default of the other method."""
    module, provenance = open_checkpoint(ModelOptions("digits_resnet"))
    learn = LearnOptions(epochs=1, batch=256, seed=3)
    options = MaskOptions("danhofer2024", learn=learn, set_in_recipe=("lr",))
    choose_masks(module, provenance, options, tmp_path / "m.safetensors", load_digits())
    masks, wanted = load_masks(tmp_path / "m.safetensors"), DanhoferOptions(1, 256, learn.lr, seed=3)
    expected = learn_danhofer(module, PREPROCESSING, load_digits(), wanted, TWO_FOUR).masks()
    assert all(np.array_equal(masks[name], expected[name]) for name in masks)


@pytest.mark.parametrize("given", [["--masks", "danhofer2024"], ["--recipe", "r.toml"]])
def test_the_engine_command_refuses_it_before_learning(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text('[mask]\nmethod = "danhofer2024"\n')
    assert main(["engine", "digits_resnet", "--out", "out", *given]) == 3
    assert "do not run along C" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_needs_images(tmp_path: Path) -> None:
    module, provenance = open_checkpoint(ModelOptions("digits_resnet"))
    with pytest.raises(InputError, match="masks need images"):
        choose_masks(module, provenance, MaskOptions("danhofer2024"), tmp_path / "m.safetensors")
