"""Segmentation networks, feature backbones and a detector's backbone through masks, checkpoint, file, check and learning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import field_nets
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from maskplan.exporters.metadata import describe_onnx
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.models.module_outputs import named_tensors

Cli = Callable[..., Any]
# Layer-wise masks, from which few images start, take ten minutes for the heads of FCN and DeepLab: 18,432 inputs each.
FROM_MAGNITUDE = "[mask]\nfew_images = false\n"
RECIPE = "[learn]\nepochs = 1\nbatch = 4\n[recalibrate]\nimages = 8\nbatch = 4\n"


@pytest.fixture(scope="session")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen loose images."""
    folder = tmp_path_factory.mktemp("loose")
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def go_through_the_line(cli: Cli, loose: Path, folder: Path, factory: str, recipe_text: str = RECIPE) -> None:
    """Masks by magnitude, baked, recalibrated, exported, checked; then masks learned for an epoch."""
    (folder / "nets.py").write_text(field_nets.SOURCE)
    (folder / "recipe.toml").write_text(recipe_text)
    net, masks, sparse = f"{folder / 'nets.py'}:{factory}", folder / "m.safetensors", folder / "s.safetensors"
    recipe, random = ("--recipe", folder / "recipe.toml"), ("--weights", "random")
    learned, report = folder / "l.safetensors", folder / "l.json"
    for command in (
        ("mask", net, *random, "--method", "magnitude", "-o", masks),
        ("bake", net, *random, "--masks", masks, "--recalibrate", loose, *recipe, "-o", sparse),
        ("export", net, "--weights", sparse, "-o", folder / "s.onnx"),
        ("check", folder / "s.onnx", "--report", folder / "check.json"),
        ("mask", net, *random, "--method", "learned", "--data", loose, *recipe, "-o", learned, "--report", report),
    ):
        ran = cli(*command)
        assert ran.code == 0, ran.err
    learning = json.loads(report.read_text())["learning"]
    assert (learning["steps"], learning["select_top1_end"]) == (2, None)
    assert 0 <= learning["select_divergence_end"] <= learning["select_divergence_start"]
    checked = json.loads((folder / "check.json").read_text())
    assert checked["verdict"] == "pass"

    module, provenance = open_checkpoint(ModelOptions(net, str(sparse)))
    assert [str(kind) for kind in provenance.outputs] == field_nets.KINDS[factory]
    has_statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
    assert (provenance.classes, provenance.recalibrated_images) == (0, 8 if has_statistics else 0)
    model = describe_onnx(folder / "s.onnx")
    assert [f"{o.name}" for o in model.outputs] == [kind.name for kind in provenance.outputs]
    assert all(o.shape[0] is None for o in model.outputs)
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = named_tensors(module(x))
    session = onnxruntime.InferenceSession(folder / "s.onnx", providers=["CPUExecutionProvider"])
    for name, found in zip(expected, session.run(None, {"input": x.numpy()}), strict=True):
        values = expected[name].numpy()
        assert np.abs(found - values).max() <= 1e-3 * np.abs(values).max()


def test_a_unet_goes_through_the_line(cli: Cli, loose: Path, tmp_path: Path) -> None:
    go_through_the_line(cli, loose, tmp_path, "unet")


@pytest.mark.slow
@pytest.mark.parametrize("factory", [name for name in field_nets.KINDS if name != "unet"])
def test_networks_of_torchvision_and_timm_go_through_the_line(
    cli: Cli, loose: Path, tmp_path: Path, factory: str
) -> None:
    if "features" in factory:
        pytest.importorskip("timm", reason="timm is not installed")
    go_through_the_line(cli, loose, tmp_path, factory, FROM_MAGNITUDE + RECIPE)


@pytest.mark.slow
def test_a_unet_is_masked_layer_wise_converted_and_spared_by_budget(cli: Cli, loose: Path, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(field_nets.SOURCE)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    net = (f"{tmp_path / 'nets.py'}:unet", "--weights", "random", "--data", loose, "--recipe", tmp_path / "recipe.toml")
    for options in (("--method", "layerwise"), ("--method", "magnitude", "--keep-dense-budget", "60")):
        ran = cli("mask", *net, *options, "-o", tmp_path / "m.safetensors", "--report", tmp_path / "m.json")
        assert ran.code == 0, ran.err
    reasons = {layer["reason"] for layer in json.loads((tmp_path / "m.json").read_text())["dense"]}
    assert "costs_too_much_accuracy" in reasons
    ran = cli("convert", *net, "-o", tmp_path / "c.safetensors", "--report", tmp_path / "c.json")
    assert ran.code == 0, ran.err
    assert "divergence of the outputs" in ran.out
    converted = json.loads((tmp_path / "c.json").read_text())
    assert (converted["select_top1_source"], converted["select_top1_converted"]) == (None, None)
    assert 0 < converted["select_divergence"] < 10
