"""Exports that are refused without leaving a file, and layers that stay FP32 in an FP16 file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported_nets import PROVENANCE, Net, export, images, pooled, run
from onnx import TensorProto
from torch import nn

from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.pipeline.core.errors import InputError


def nothing(folder: Path) -> bool:
    return not [p for p in folder.iterdir() if "onnx" in p.name]


def data_dependent() -> nn.Module:
    return Net(lambda s, x: s.head(pooled(x if x.sum() > 0 else -x)), head=nn.Linear(3, 4))


def unsupported() -> nn.Module:
    return Net(lambda s, x: s.head(torch.linalg.svdvals(x).mean(2)), head=nn.Linear(3, 4))


def in_double() -> nn.Module:
    """ONNX Runtime has no convolution in double precision."""
    return Net(lambda s, x: pooled(s.conv(x.double())).float(), conv=nn.Conv2d(3, 4, 3, bias=False).to(torch.float64))


@pytest.mark.parametrize("make", [data_dependent, unsupported, in_double])
def test_a_model_that_cannot_be_exported_is_an_input_error_without_files(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        export(make(), tmp_path, ["fp32", "fp16"])
    assert len(str(caught.value).splitlines()) <= 4
    assert nothing(tmp_path)


@pytest.mark.slow
def test_the_command_prints_one_message_and_nothing_of_the_exporters_reports(
    maskplan: Callable[..., Any], tmp_path: Path
) -> None:
    """In its own process, because pytest captures warnings and logs that would reach a terminal."""
    (tmp_path / "picky.py").write_text(
        "import torch\nfrom torch import nn\n"
        'PREPROCESSING = {"height": 16, "width": 16, "resize": 0}\n'
        "class Picky(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)\n"
        "    def forward(self, x):\n        x = x if x.sum() > 0 else -x\n"
        "        return self.head(self.conv(self.stem(x)).mean((2, 3)))\n"
        "def build():\n    return Picky()\n"
    )
    ran = maskplan("export", "picky.py:build", "--weights", "random", "-o", "out/picky.onnx", cwd=tmp_path)
    assert ran.code == 3
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert lines[0] == "error: PyTorch cannot export the model to ONNX"
    assert [line.strip().partition(":")[0] for line in lines[1:]] == ["where", "found", "fix"]
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {"picky.py"}


class Counting(nn.Module):
    """Gives another answer at every call, which no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.calls = nn.Linear(3, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(pooled(x)) * self.calls


class Undefined(nn.Module):
    """Infinity from everything."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(pooled(x)) / torch.zeros(4)


@pytest.mark.parametrize("kind", [Counting, Undefined])
def test_a_file_that_differs_from_eager_is_refused(kind: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="outputs of the exported model differ"):
        export(kind(), tmp_path)
    assert nothing(tmp_path)


def test_a_tighter_tolerance_refuses_a_file_that_the_default_accepts(tmp_path: Path) -> None:
    # Files of networks like this pass with the default tolerance in test_onnx_export.py.
    module = Net(lambda s, x: s.head(pooled(s.stem(x))), stem=nn.Conv2d(3, 8, 3), head=nn.Linear(8, 4)).eval()
    outs = {"fp16": tmp_path / "net.onnx"}
    with pytest.raises(InputError, match="outputs of the exported model differ"):
        export_onnx(module, PROVENANCE, ExportOptions(tolerance_fp16=1e-7), outs)
    assert nothing(tmp_path)


@pytest.mark.parametrize(("up", "down"), [(6e4, 1e-4), (1e-7, 1e6)], ids=["overflow", "vanish"])
def test_layers_whose_activations_overflow_or_vanish_in_half_stay_fp32_and_are_named(
    up: float, down: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Net(
        lambda s, x: s.head(s.down(pooled(s.up(x)))),
        up=nn.Conv2d(3, 4, 1, bias=False),
        down=nn.Linear(4, 4),
        head=nn.Linear(4, 4),
    )
    with torch.no_grad():
        module.up.weight.copy_(torch.full((4, 3, 1, 1), up) * torch.tensor([1, -1, 1, -1]).reshape(4, 1, 1, 1))
        module.down.weight.mul_(down)
    full, half = export(module, tmp_path, ["fp32", "fp16"])
    assert half.path.name in caplog.text
    assert "up (Conv), whose output" in caplog.text
    assert "head (" not in caplog.text
    kinds = {t.name: t.data_type for t in onnx.load(half.path).graph.initializer}
    assert kinds["up.weight"] == TensorProto.FLOAT
    assert kinds["head.weight"] == TensorProto.FLOAT16
    x = images(2)
    assert np.allclose(run(half.path, x), run(full.path, x), atol=1e-2 * np.abs(run(full.path, x)).max())
