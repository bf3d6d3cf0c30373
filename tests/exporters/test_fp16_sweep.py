"""Outputs of FP16 files on 64 random and 3 constant images, over the families and small networks: near FP32, and no NaN."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from families import FAMILIES, traced_family
from residual_net import residual_net, weights
from small_net import small_net

from maskplan.exporters.convert_precision import ConvertOptions, convert_precision

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
    onnx.save(traced_family(name), tmp_path / "net.onnx")
    convert(tmp_path / "net.onnx")
