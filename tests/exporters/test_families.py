"""The families of the papers, and others, through mask, bake, export, check and build with random weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from maskplan.engines.build import BuildOptions, build_engine, open_engine
from maskplan.exporters.conformance import check_2to4
from maskplan.pipeline.core.artifacts import MaskSet
from maskplan.pipeline.core.choices import CONFORMING, DENSE_BY_CHOICE, INELIGIBLE, MAGNITUDE, PASS
from maskplan.pipeline.core.reports import ConformanceReport
from maskplan.pipeline.models.checkpoint import ModelOptions, load_module
from maskplan.pipeline.recipe import Recipe
from maskplan.pipeline.stages import model as stages
from maskplan.pipeline.stages import onnx_files
from maskplan.pipeline.stages.job import Job
from maskplan.pipeline.stages.workspace import Workspace

QUICK = ("shufflenet_v2_x0_5",)
SLOW = (
    "resnet18",
    "resnet34",
    "resnet50",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "shufflenet_v2_x2_0",
    "convnext_tiny",
    "convnext_small",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "densenet121",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "inception_v3",
    "googlenet",
)
WITH_AUXILIARY_HEADS = {"inception_v3", "googlenet"}
# Layers that cannot be 2:4, or that the policy spares; what is not listed has none of that kind.
DEPTHWISE_OR_GROUPED = {
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x2_0",
    "convnext_tiny",
    "convnext_small",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_400mf",
    "resnext50_32x4d",
}


def expected_reasons(module: nn.Module, x: torch.Tensor) -> tuple[dict[str, str], set[str]]:
    """What should be dense and why, and what should be masked, told from the torch modules alone."""
    order: list[nn.Module] = []
    layers = {n: m for n, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    hooks = [m.register_forward_hook(lambda m, _, __: order.append(m)) for m in layers.values()]
    with torch.no_grad():
        module.eval()(x)
    for hook in hooks:
        hook.remove()
    stem = next(m for m in order if isinstance(m, nn.Conv2d))
    dense, masked = {}, set()
    for name, layer in layers.items():
        channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            reason = "grouped"
        elif channels % 4:
            reason = "channels_not_multiple_of_4"
        elif not any(layer is used for used in order):
            reason = "not_used_in_inference"
        elif isinstance(layer, nn.Linear):
            reason = "linear"
        elif layer is stem:
            reason = "stem"
        else:
            masked.add(f"{name}.weight")
            continue
        dense[f"{name}.weight"] = reason
    return dense, masked


def most_non_zeros(weight: npt.NDArray[Any]) -> int:
    """The most non-zeros in any aligned group of four along the second axis."""
    counts = [
        sum((weight[:, start + i] != 0).astype(int) for i in range(4)).max() for start in range(0, weight.shape[1], 4)
    ]
    return int(max(counts))


def assert_masks(name: str, masks: MaskSet, dense: dict[str, str], masked: set[str]) -> None:
    assert {layer.name: layer.reason for layer in masks.dense} == dense
    assert {layer.name for layer in masks.masked} == masked
    reasons = Counter(dense.values())
    assert masked
    # Every stem of these takes three channels.
    assert reasons["channels_not_multiple_of_4"] >= 1
    assert (reasons["grouped"] > 0) == (name in DEPTHWISE_OR_GROUPED)
    assert (reasons["not_used_in_inference"] > 0) == (name in WITH_AUXILIARY_HEADS)
    assert reasons["linear"] >= 1 or name.startswith("squeeze")


def assert_conforms(report: ConformanceReport, path: Path, dense: dict[str, str], masked: set[str]) -> None:
    assert (report.verdict, report.reason, report.violating) == (PASS, None, 0)
    verdicts = {w.name: w for w in report.weights}
    assert {name for name, w in verdicts.items() if w.verdict == CONFORMING} == masked
    for name, reason in dense.items():
        if reason == "not_used_in_inference":
            assert name not in verdicts
        elif reason in ("linear", "stem"):
            assert (verdicts[name].verdict, verdicts[name].reason) == (DENSE_BY_CHOICE, None)
        else:
            # The unused layers of auxiliary heads that cannot be 2:4 either are not in the file.
            assert name not in verdicts or (verdicts[name].verdict, verdicts[name].reason) == (INELIGIBLE, reason)
    used = {n for n, r in dense.items() if r != "not_used_in_inference"} | masked
    assert set(verdicts) <= used
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for name in masked:
        assert most_non_zeros(tensors[name]) <= 2
        assert 0.4 < np.mean(tensors[name] == 0) < 0.75


def go_through(name: str, folder: Path) -> None:
    """One model from mask to engine."""
    with Workspace(folder / name) as ws:
        job = Job(ws, ModelOptions(name, "random"), Recipe())
        checkpoint, job = stages.load(job)
        how = checkpoint.provenance.preprocessing
        x = torch.randn(2, how.channels, how.height, how.width, generator=torch.Generator().manual_seed(1))
        dense, masked = expected_reasons(load_module(job.model, checkpoint), x[:1])
        masks = stages.mask(job, checkpoint, MAGNITUDE, None)
        assert_masks(name, masks, dense, masked)
        sparse = stages.bake_masks(job, checkpoint, masks, "sparse", ws.path("sparse.safetensors"))
        assert set(sparse.provenance.masked) == masked
        network = onnx_files.export(job, sparse, "sparse")
        assert onnx_files.check(job, network, "2:4").of("fp16").passed
        exported = network.floats
        for model in (exported.fp32, exported.fp16):
            assert_conforms(check_2to4(model.path), model.path, dense, masked)
        record = build_engine(exported.fp32, BuildOptions("onnxruntime"), ws.path("engine.onnx"))
        assert record.provenance is not None
        assert not record.provenance.trained
        engine, module = open_engine(record), load_module(job.model, sparse)
        for batch in (1, 2):
            with torch.no_grad():
                expected = module(x[:batch]).numpy()
            found = engine.infer({"input": x[:batch].numpy()})["logits"]
            assert found.shape == expected.shape == (batch, 1000)
            assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
        engine.close()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*QUICK, *SLOW)]
)
def test_a_family_goes_through_the_line(name: str, tmp_path: Path) -> None:
    go_through(name, tmp_path)
    # The larger ones leave two gigabytes each.
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.unlink()
