"""Small PyTorch networks for tests of the export, and ways to run them and their files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import nn

from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.pipeline.core.artifacts import OnnxModel, Preprocessing, Provenance

Array = npt.NDArray[Any]

PREPROCESSING = Preprocessing(3, 16, 16, 0, "bilinear", (0.0,) * 3, (1.0,) * 3)
PROVENANCE = Provenance("net", True, "test", "0" * 64, 4, (), PREPROCESSING)


def export(
    module: nn.Module, folder: Path, precisions: Iterable[str] = ("fp32",), name: str = "net"
) -> list[OnnxModel]:
    outs = {precision: folder / f"{name}.{precision}.onnx" for precision in precisions}
    return list(export_onnx(module.eval(), PROVENANCE, ExportOptions(), outs))


def run(path: Path, x: Array) -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": x})
    return logits


def eager(module: nn.Module, x: Array) -> Array:
    with torch.no_grad():
        return module.eval()(torch.from_numpy(x)).numpy()


def images(batch: int, channels: int = 3, size: int = 16) -> npt.NDArray[np.float32]:
    return np.random.default_rng(batch).normal(size=(batch, channels, size, size)).astype(np.float32)


def tensors_of(path: Path) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


class Net(nn.Module):
    """A forward pass given as a function, with layers by name."""

    def __init__(self, function: Callable[[Any, torch.Tensor], torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def pooled(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))
