"""Outputs of FP16 files on 64 random and 3 constant images, over the families and small networks: near FP32, and no NaN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from residual_net import residual_net, weights
from small_net import small_net

from maskplan.exporters.convert_precision import ConvertOptions, convert_precision
from maskplan.exporters.onnx_export import trace
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint

FAMILIES = (
    "resnet18",
    "resnet50",
    "vgg11_bn",
    "shufflenet_v2_x0_5",
    "convnext_tiny",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "densenet121",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "squeezenet1_1",
    "mnasnet0_5",
    "googlenet",
    "inception_v3",
    "swin_t",
    "vit_b_32",
    "maxvit_t",
)
# Differences of random weights, relative to the largest output; trained networks differ less.
BOUND = 2e-2


def convert(path: Path) -> None:
    report = convert_precision(path, path.with_suffix(".half"), ConvertOptions(images=64, tolerance=BOUND))
    assert report.problems == []
    assert report.samples >= 67


def test_a_small_network_stays_near_fp32(tmp_path: Path) -> None:
    convert(small_net(tmp_path / "net.onnx"))


@pytest.mark.parametrize("norm", [False, True])
def test_a_residual_network_stays_near_fp32(norm: bool, tmp_path: Path) -> None:
    convert(residual_net(tmp_path / "net.onnx", weights(), norm=norm))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_stays_near_fp32(name: str, tmp_path: Path) -> None:
    module, provenance = open_checkpoint(ModelOptions(name, "random", None, 0))
    # The sizes that swin, vit and maxvit take are fixed.
    if name not in ("swin_t", "vit_b_32", "maxvit_t"):
        size = 96 if name == "inception_v3" else 64
        preprocessing = replace(provenance.preprocessing, height=size, width=size)
        provenance = replace(provenance, preprocessing=preprocessing)
    onnx.save(trace(module, provenance), tmp_path / "net.onnx")
    convert(tmp_path / "net.onnx")
