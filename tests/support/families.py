"""The families of CNNs and vision transformers that sweeps go over, with random weights."""

from __future__ import annotations

from dataclasses import replace

import onnx

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
# Their sizes are fixed.
_LARGE = ("swin_t", "vit_b_32", "maxvit_t")


def traced_family(name: str) -> onnx.ModelProto:
    """The FP32 graph of a family, for small images where it takes them."""
    module, provenance = open_checkpoint(ModelOptions(name, "random", None, 0))
    if name not in _LARGE:
        size = 96 if name == "inception_v3" else 64
        provenance = replace(provenance, preprocessing=replace(provenance.preprocessing, height=size, width=size))
    return trace(module, provenance)
