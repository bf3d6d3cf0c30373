"""A small model's run of the whole line, and how tests read one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report_schema import validate_values

MODEL = """
import torch
from torch import nn

PREPROCESSING = {"height": 16, "width": 16, "resize": 0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
LABELS = ("blue", "green", "red")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.bn2 = nn.Conv2d(8, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, 1, 1, groups=12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(self.bn2(self.wide(x)))
        return self.head(self.depthwise(x).mean((2, 3)))


def net():
    return Small()
"""

RECIPE = """
[learn]
epochs = 2
[time]
seconds = 0.1
batches = [1]
[compare]
fixed_images = 2
max_top1_drop = 100.0
[compile]
mode = "off"
"""

VISIBLE = (
    "dense.fp16.onnx",
    "dense.onnx",
    "dense.safetensors",
    "dense_engine.onnx",
    "dense_engine.onnx.json",
    "engine.onnx",
    "engine.onnx.json",
    "masks.safetensors",
    "report.html",
    "report.json",
    "sparse.fp16.onnx",
    "sparse.onnx",
    "sparse.safetensors",
)
# What a build or a clock writes holds times; everything else is the same to the byte.
TIMED = ("report.html", "report.json", "dense_engine.onnx.json", "engine.onnx.json")
STAGES = (
    "load",
    "images",
    "export-dense",
    "mask",
    "bake-sparse",
    "recalibrate-sparse",
    "export-sparse",
    "check",
    "baseline-mask",
    "bake-magnitude",
    "export-magnitude",
    "recalibrate-magnitude-recalibrated",
    "export-magnitude-recalibrated",
    "build-sparse",
    "build-dense",
    "compare",
    "time",
    "depth",
    "statistics",
    "report",
)

# Runs the command line where importing any of the named packages fails.
WITHOUT = """
import sys

blocked = sys.argv.pop(1).split(",")


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is not here", name=name)


sys.meta_path.insert(0, Blocker())
from maskplan.pipeline.cli.app import main

sys.exit(main(sys.argv[1:]))
"""
NO_TORCH = "torch,torchvision,timm,tensorrt,pycuda"


@dataclass(frozen=True)
class Line:
    """A finished run of the small model, and what it was made from. `options` is everything but `--out`."""

    out: Path
    options: tuple[str, ...]


@dataclass(frozen=True)
class Stages:
    """Which stages a run did, and which it took as they were, by its narration."""

    made: tuple[str, ...]
    reused: tuple[str, ...]


def stages_of(narration: str) -> Stages:
    return Stages(
        tuple(re.findall(r"^([a-z0-9-]+) …$", narration, re.MULTILINE)),
        tuple(re.findall(r"^([a-z0-9-]+): unchanged$", narration, re.MULTILINE)),
    )


def digests(folder: Path, names: Sequence[str] = VISIBLE) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def read_json(path: Path) -> Any:
    """A file's JSON values; the report of a run must conform to its published schema."""
    values = json.loads(path.read_text())
    if path.name == "report.json" and "schema" in values:
        validate_values(values)
    return values
