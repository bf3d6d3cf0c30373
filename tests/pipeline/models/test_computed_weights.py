"""Standardized convolutions and fusable blocks become plain convolutions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import odd_modules
import pytest
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Pattern, Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.checkpoint import ModelOptions, load_checkpoint, load_module, open_checkpoint
from maskplan.pipeline.models.computed_weights import fold_computed_weights
from maskplan.pipeline.models.fusing import fusable_blocks, fuse_blocks
from maskplan.pipeline.models.layers import sample_input, trace_layers

HOW = Preprocessing(3, 16, 16, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)
RAN: dict[str, Any] = {}
exec(odd_modules.SOURCE, RAN)
X = sample_input(HOW, 2, seed=5)


@pytest.mark.parametrize("name", ["standardized", "standardized_same", "gained", "own_hook"])
def test_a_convolution_that_computes_its_weight_becomes_plain_and_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    net = RAN[name]().eval()
    wanted = net(X)
    names = fold_computed_weights(net, HOW)
    assert names == (("last.weight",) if name == "own_hook" else ("wide.weight", "last.weight"))
    assert type(net.last) is nn.Conv2d
    assert torch.allclose(net(X), wanted, atol=1e-6)
    layers, _ = trace_layers(net, HOW)
    assert not any(layer.computed for layer in layers)
    assert {"wide.weight", "last.weight"} == {layer.name for layer in select_layers(layers, Pattern(2, 4)).masked}


@pytest.mark.parametrize(
    "name", ["plain", "modulated", "functional", "functional_standardized", "reused", "transposed"]
)
def test_other_networks_are_not_changed(name: str) -> None:
    net = RAN[name]().eval()
    before = {path: type(m) for path, m in net.named_modules()}
    assert fold_computed_weights(net, HOW) == ()
    assert {path: type(m) for path, m in net.named_modules()} == before


def test_a_shared_parameter_is_not_folded() -> None:
    net = RAN["standardized"]().eval()
    net.wide = nn.Sequential(RAN["StdConv"](8, 12, 3, padding=1), RAN["StdConv"](12, 12, 1))
    net.last = RAN["StdConv"](12, 16, 1)
    net.wide[1] = nn.Conv2d(12, 16, 1)
    net.wide[1].weight = net.last.weight
    net.wide.append(nn.Conv2d(16, 12, 1))
    assert fold_computed_weights(net, HOW) == ("wide.0.weight",)


@pytest.fixture
def spec(tmp_path: Path) -> Callable[[str], str]:
    (tmp_path / "odd.py").write_text(odd_modules.SOURCE)
    return lambda name: f"{tmp_path / 'odd.py'}:{name}"


@pytest.mark.parametrize("name", ["standardized", "standardized_same", "gained", "weight_norm_parametrized", "pruned"])
@pytest.mark.parametrize("read", ["as weights", "as its own"])
def test_a_dense_file_with_folded_weights_is_read_back(
    spec: Callable[[str], str], tmp_path: Path, name: str, read: str
) -> None:
    torch.manual_seed(3)
    source = RAN[name]().eval()
    torch.save(source.state_dict(), tmp_path / "raw.pth")
    options = ModelOptions(spec(name), str(tmp_path / "raw.pth"))
    dense = load_checkpoint(options, tmp_path / "dense.safetensors")
    if read == "as weights":
        again, provenance = open_checkpoint(ModelOptions(spec(name), str(dense.path)))
        assert provenance == dense.provenance
    else:
        again = load_module(options, dense)
    assert torch.allclose(again(X), source(X), atol=1e-6)


def test_a_folded_file_for_a_model_that_does_not_compute_weights_is_an_error(
    spec: Callable[[str], str], tmp_path: Path
) -> None:
    dense = load_checkpoint(ModelOptions(spec("standardized"), "random"), tmp_path / "dense.safetensors")
    with pytest.raises(InputError, match="does not compute") as raised:
        open_checkpoint(ModelOptions(spec("plain"), str(dense.path)))
    assert raised.value.found == "2: wide.weight, last.weight"


def test_files_without_folded_weights_do_not_name_any(spec: Callable[[str], str], tmp_path: Path) -> None:
    """Their bytes are those of earlier versions."""
    for name, named in (("plain", False), ("standardized", True)):
        load_checkpoint(ModelOptions(spec(name), "random"), tmp_path / "dense.safetensors")
        assert (b"folded" in (tmp_path / "dense.safetensors").read_bytes()) == named


class Block(nn.Module):
    """Two branches, which are one convolution once fused, as in RepVGG."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point, self.fused = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x) + self.point(x) if self.fused is None else self.fused(x)

    def reparameterize(self) -> None:
        if self.fused is None:
            fused = nn.Conv2d(8, 8, 3, padding=1)
            with torch.no_grad():
                fused.weight.copy_(self.wide.weight + nn.functional.pad(self.point.weight, (1, 1, 1, 1)))
                fused.bias.copy_(self.wide.bias + self.point.bias)
            self.fused = fused
            del self.wide, self.point


REP = """
import sys, torch
from torch import nn
from test_computed_weights import Block
PREPROCESSING = {"height": 16, "width": 16, "resize": 0}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 8, 3, 2), nn.Sequential(Block(), Block()), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
"""


def rep_spec(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (folder / "rep.py").write_text(REP)
    return f"{folder / 'rep.py'}:Net"


def test_fusing_computes_the_same_and_happens_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    wanted = net(X)
    assert fusable_blocks(net) == ["1", "2"]
    assert fuse_blocks(net, HOW, "net") == 2
    assert torch.allclose(net(X), wanted, atol=1e-6)
    assert fusable_blocks(net) == []
    with pytest.raises(InputError, match="no blocks to fuse"):
        fuse_blocks(net, HOW, "net")


def test_training_branches_are_fused_on_request_and_the_dense_file_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = rep_spec(tmp_path, monkeypatch)
    with caplog.at_level(logging.INFO, "maskplan"):
        raw, _ = open_checkpoint(ModelOptions(spec, "random"))
    assert "2 blocks have training branches (blocks.0, blocks.1)" in caplog.text
    assert "--fuse" in caplog.text
    options = ModelOptions(spec, "random", fuse=True)
    dense = load_checkpoint(options, tmp_path / "dense.safetensors")
    caplog.clear()
    for again in (load_module(options, dense), open_checkpoint(ModelOptions(spec, str(dense.path)))[0]):
        assert torch.allclose(again(X), raw(X), atol=1e-6)
        assert [n for n, m in again.named_modules() if isinstance(m, nn.Conv2d)] == [
            *("stem", "blocks.0.fused", "blocks.1.fused"),
        ]
    assert "--fuse" not in caplog.text
