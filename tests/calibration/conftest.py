"""Five families with random 2:4 weights, exported once at 64x64, with the ranges of their tensors on a few images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import nn

from maskplan.exporters.onnx_export import trace
from maskplan.pipeline.core.artifacts import Preprocessing, Provenance

Array = npt.NDArray[Any]
FAMILIES = ("resnet18", "vgg", "shufflenet_v2", "mobilenet_v3_small", "densenet")
QUICK = ("resnet18", "shufflenet_v2")


@dataclass(frozen=True)
class Family:
    """A model of the family in FP32; do not change it. `amax` has every float tensor but the constants."""

    name: str
    model: onnx.ModelProto
    images: Array
    amax: dict[str, float]


Run = Callable[..., dict[str, Array]]


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES],
)
def family(request: pytest.FixtureRequest) -> Family:
    return build_family(request.param)


@pytest.fixture(scope="session")
def families() -> Callable[[str], Family]:
    """One family by its name."""
    return build_family


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a model on `x`; `tensors` names what to return besides its outputs."""
    return infer


@functools.cache
def build_family(name: str) -> Family:
    torch.manual_seed(FAMILIES.index(name))
    module = SMALL[name]() if name in SMALL else getattr(torchvision.models, name)(weights=None, num_classes=10)
    masked = prune(module)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        # Statistics of BatchNorm that fit, so that ranges are those of a network and not of one that fades out.
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None
        module.train()(torch.randn(16, 3, 64, 64))
    preprocessing = Preprocessing(3, 64, 64, 0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    provenance = Provenance(name, False, "test", "0" * 64, 10, (), preprocessing, masked, "2:4", "channel", "magnitude")
    model = trace(module.eval(), provenance)
    tensors = [name for node in model.graph.node for name in node.output]
    values = infer(model, images.numpy(), tensors)
    amax = {name: float(np.abs(v).max()) for name, v in values.items() if v.dtype == np.float32}
    return Family(name, model, images.numpy(), {"input": float(images.abs().max()), **amax})


def small_vgg() -> nn.Module:
    """VGG-11 with BatchNorm; its three linear layers are small."""
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
    module = torchvision.models.VGG(layers, num_classes=10)
    module.avgpool = nn.AdaptiveAvgPool2d(1)
    module.classifier[0], module.classifier[3], module.classifier[6] = (
        nn.Linear(512, 64),
        nn.Linear(64, 64),
        nn.Linear(64, 10),
    )
    return module


def small_shufflenet() -> nn.Module:
    """ShuffleNetV2 with two units in each stage, of which the first has two branches that compute."""
    return torchvision.models.ShuffleNetV2([2, 2, 2], [24, 48, 96, 192, 256], num_classes=10)


def small_densenet() -> nn.Module:
    """DenseNet with three layers in each block."""
    return torchvision.models.DenseNet(8, (3, 3, 3, 3), num_init_features=16, bn_size=2, num_classes=10)


SMALL = {"vgg": small_vgg, "shufflenet_v2": small_shufflenet, "densenet": small_densenet}


def prune(module: nn.Module) -> tuple[str, ...]:
    """Zero the two smallest of each four channels, where TensorRT can make use of it; the names of these weights."""
    masked = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels % 4 == 0:
            weight = layer.weight.data
            k, c, r, s = weight.shape
            groups = weight.reshape(k, c // 4, 4, r, s)
            smallest = groups.abs().argsort(dim=2)[:, :, :2]
            layer.weight.data = groups.scatter(2, smallest, 0.0).reshape(k, c, r, s)
            masked.append(f"{name}.weight")
    return tuple(masked)


def infer(model: onnx.ModelProto, x: Array, tensors: Sequence[str] = (), *, optimize: bool = True) -> dict[str, Array]:
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # As in `pipeline/core/ort_session.py`: otherwise INT8 saturates on CPUs without VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: x}), strict=True))
