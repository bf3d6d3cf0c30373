"""Layer-wise masks of one network by its module (`mask`) and by its ONNX file (`prune`), on the same images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.data.dataset import open_folder
from maskplan.pipeline.masking.layerwise import layerwise_mask
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.pruning.second_moments import MomentOptions, second_moments

Cli = Callable[..., Any]

SOURCE = """
import torch
from torch import nn

PREPROCESSING = {"height": 16, "width": 16, "resize": 0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.wide, self.norm2 = nn.Conv2d(16, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, 1, 1, groups=24)
        self.plain = nn.Conv2d(24, 16, 1, bias=False)
        self.biased = nn.Conv2d(16, 16, 3, 1, 1)
        self.hidden, self.head = nn.Linear(16, 12, bias=False), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.norm2(self.wide(torch.relu(self.norm1(self.stem(x))))))
        x = torch.relu(self.plain(torch.relu(self.depthwise(x))))
        x = torch.relu(self.biased(x)).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


def build():
    return Net()
"""
# Where a BatchNorm or a bias follows, the file's masks need not keep the mean of the outputs: `prune` corrects the bias.
# `mask` changes no bias, and has that freedom before a BatchNorm only, which is recalibrated later.
SAME, BIASED = ("wide.weight", "plain.weight", "hidden.weight"), ("biased.weight", "head.weight")


@pytest.fixture
def net(tmp_path: Path) -> tuple[str, Path]:
    """A factory and its trained weights."""
    (tmp_path / "net.py").write_text(SOURCE)
    namespace: dict[str, Any] = {}
    exec(SOURCE, namespace)
    torch.manual_seed(0)
    module = namespace["build"]().train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(8, 3, 16, 16))
    torch.save(module.state_dict(), tmp_path / "w.pth")
    return f"{tmp_path}/net.py:build", tmp_path / "w.pth"


@pytest.mark.slow
def test_the_masks_are_the_same(net: tuple[str, Path], toy_data: Path, cli: Cli, tmp_path: Path) -> None:
    spec, weights = net
    model = (spec, "--weights", weights)
    masks, dense, sparse = (tmp_path / name for name in ("m.safetensors", "dense.onnx", "sparse.onnx"))
    train = open_folder(toy_data, (), 3, 0).train
    # `mask` sets the images of `select` aside, which `prune` does not know.
    for index in train.indices:
        name = train.images.name(int(index))
        (tmp_path / "same" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(toy_data / "train" / name, tmp_path / "same" / name)
    for command in (
        ("mask", *model, "--method", "layerwise", "--include-linear", "--data", toy_data, "-o", masks),
        ("export", *model, "-o", dense),
        ("prune", dense, "--method", "layerwise", "--data", tmp_path / "same", "-o", sparse),
    ):
        ran = cli(*command)
        assert ran.code == 0, ran.err
    chosen = load_file(masks)
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load(sparse).graph.initializer}
    assert set(chosen) == {*SAME, *BIASED}
    found = {name: values[name] != 0 for name in chosen}
    for name in SAME:
        np.testing.assert_array_equal(found[name], chosen[name].astype(bool), err_msg=name)
    module, provenance = open_checkpoint(ModelOptions(spec, str(weights)))
    layers = [layer for layer in trace_layers(module, provenance.preprocessing)[0] if layer.name in BIASED]
    options = MomentOptions(images=len(train))
    for layer, moments in second_moments(module, layers, provenance.preprocessing, train, options):
        weight = module.state_dict()[layer.name].numpy()
        assert not moments.before_norm
        expected = layerwise_mask(weight, moments.about_mean, Pattern(2, 4))
        np.testing.assert_array_equal(found[layer.name], expected)
        assert not np.array_equal(found[layer.name], chosen[layer.name].astype(bool))
