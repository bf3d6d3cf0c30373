"""Exports of modules that return anything: names, shapes, values at any batch size, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported_nets import PROVENANCE, Net, images
from torch import nn

from maskplan.exporters.metadata import read_provenance
from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.pipeline.core.artifacts import OnnxModel, OutputKind
from maskplan.pipeline.core.errors import InputError

KINDS = (OutputKind("main.out", "logits"), OutputKind("boxes", "values"))


def export(make: Callable[[Any, torch.Tensor], Any], folder: Path) -> tuple[nn.Module, OnnxModel, OnnxModel]:
    """The module, and its files in FP32 and FP16."""
    torch.manual_seed(0)
    module = Net(make, conv=nn.Conv2d(3, 8, 3, padding=1)).eval()
    outs = {"fp32": folder / "net.onnx", "fp16": folder / "net.fp16.onnx"}
    full, half = export_onnx(module, replace(PROVENANCE, outputs=KINDS), ExportOptions(), outs)
    return module, full, half


def everything(net: Any, x: torch.Tensor) -> Any:
    """Nested values, numbers, one tensor twice, an integer, the input, a weight and a constant."""
    y = net.conv(x)
    levels = [y[:, :, ::2, ::2], (y.mean((2, 3)), None)]
    return {"main": {"out": y, "size": 3}, "boxes": y, "levels": levels, "class": y.argmax(1), "input": x} | {
        "weight": net.conv.weight,
        "bins": torch.arange(5) * 2,
    }


def test_all_outputs_are_in_the_file_and_are_the_modules_at_any_batch(tmp_path: Path) -> None:
    module, *files = export(everything, tmp_path)
    for model, atol in zip(files, (1e-5, 2e-2), strict=True):
        shapes = {o.name: (o.dtype, o.shape) for o in model.outputs}
        assert shapes == {
            "main.out": ("float32", (None, 8, 16, 16)),
            "boxes": ("float32", (None, 8, 16, 16)),
            "levels.0": ("float32", (None, 8, 8, 8)),
            "levels.1.0": ("float32", (None, 8)),
            "class": ("int64", (None, 16, 16)),
            "input.out": ("float32", (None, 3, 16, 16)),
            "weight": ("float32", (8, 3, 3, 3)),
            "bins": ("int64", (5,)),
        }
        session = onnxruntime.InferenceSession(model.path, providers=["CPUExecutionProvider"])
        for batch in (1, 4):
            x = images(batch)
            with torch.no_grad():
                expected = module(torch.from_numpy(x))
            found = dict(zip(shapes, session.run(None, {"input": x}), strict=True))
            assert np.allclose(found["main.out"], expected["main"]["out"], atol=atol)
            assert np.allclose(found["levels.1.0"], expected["levels"][1][0], atol=atol)
            assert np.allclose(found["input.out"], x, atol=atol)
            assert np.allclose(found["weight"], expected["weight"].detach(), atol=atol)
            assert (found["class"] == expected["class"].numpy()).mean() > 0.98
            assert found["bins"].tolist() == [0, 2, 4, 6, 8]
        proto = onnx.load(model.path)
        onnx.checker.check_model(proto, full_check=True)
        assert "conv.weight" in {t.name for t in proto.graph.initializer}
        provenance = read_provenance(proto, model.path)
        assert provenance is not None
        assert provenance.outputs == KINDS


class Counting(nn.Module):
    """One of its outputs differs at every call, by little compared with the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 8, 1), 0

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return {
            "great": 1e4 * self.conv(x),
            "small": 1e-3 * self.calls * self.conv(x),
            "levels": x.argmax(1) * self.calls,
        }


def test_each_output_is_compared_on_its_own_scale(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="outputs of the exported model differ") as caught:
        export_onnx(Counting().eval(), PROVENANCE, ExportOptions(), {"fp32": tmp_path / "net.onnx"})
    assert "small differs by" in str(caught.value.found)
    assert "levels differs in" in str(caught.value.found)
    assert "great" not in str(caught.value.found)
    assert not list(tmp_path.iterdir())


def test_masked_places_of_minus_infinity_are_equal(tmp_path: Path) -> None:
    def masked(net: Any, x: torch.Tensor) -> Any:
        y = net.conv(x)
        return torch.cat([y, torch.full_like(y, -torch.inf)], 1)

    for model in export(masked, tmp_path)[1:]:
        assert [o.shape for o in model.outputs] == [(None, 16, 16, 16)]


def test_a_model_without_tensors_is_refused_by_what_it_returns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not return tensors"):
        export(lambda net, x: {"name": "net"}, tmp_path)
