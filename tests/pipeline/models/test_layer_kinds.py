"""Convolutions of one and three axes, and weights that are tables, from the module to the 2:4 check of its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.exporters.onnx_export import ExportOptions, export_onnx
from maskplan.pipeline.core.artifacts import Preprocessing, Provenance
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.state_dict import fit_weights, read_weights
from maskplan.pipeline.pruning.bake import bake
from maskplan.pipeline.pruning.mask import MaskOptions, choose_masks

HOW = Preprocessing(3, 8, 8, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)
PROVENANCE = Provenance("net", True, "test", "0" * 64, 0, (), HOW)


class Lines(nn.Module):
    """Rows of pixels as sequences, then volumes of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.line, self.grouped, self.few = (
            nn.Conv1d(8, 8, 3, padding=1),
            nn.Conv1d(8, 8, 3, 1, 1, groups=2),
            nn.Conv1d(8, 3, 1),
        )
        self.volume, self.up = nn.Conv3d(8, 12, 3, padding=1), nn.ConvTranspose1d(8, 8, 2, 2)

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.relu(self.stem(x))
        line = torch.relu(self.grouped(torch.relu(self.line(x.flatten(2)))))
        return {
            "volume": self.volume(x[:, :, None].expand(-1, -1, 2, -1, -1)),
            "line": self.few(line),
            "up": self.up(line),
        }


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The masks of `Lines`, and the file of the masked network."""
    folder = tmp_path_factory.mktemp("lines")
    torch.manual_seed(0)
    module = Lines().eval()
    masks = choose_masks(module, PROVENANCE, MaskOptions(method="magnitude"), folder / "m.safetensors")
    baked = bake(module, PROVENANCE, masks, folder / "s.safetensors")
    fit_weights(module, read_weights(baked.path), where=baked.path)
    export_onnx(module, baked.provenance, ExportOptions(), {"fp32": folder / "s.onnx"})
    return masks, folder / "s.onnx"


def test_convolutions_of_one_and_three_axes_are_masked_and_others_named_with_their_reason(
    masked: tuple[Any, Path],
) -> None:
    masks, _ = masked
    assert [layer.name for layer in masks.masked] == ["line.weight", "volume.weight"]
    assert {d.name: d.reason for d in masks.dense} == {
        "stem.weight": "channels_not_multiple_of_4",
        "grouped.weight": "grouped",
        "few.weight": "fewer_than_4_outputs",
        "up.weight": "unsupported_op",
    }


def test_their_groups_run_along_c_in_the_file_too(masked: tuple[Any, Path]) -> None:
    _, file = masked
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}
    for name in ("line.weight", "volume.weight"):
        groups = np.moveaxis(weights[name], 1, -1).reshape(-1, 4)
        assert ((groups != 0).sum(1) == 2).all()
    report = check_2to4(file, CheckOptions())
    assert report.verdict == "pass"


def tables() -> dict[str, npt.NDArray[np.float32]]:
    side = np.linspace(-1, 1, 8, dtype=np.float32)
    blur = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]).astype(np.float32) / 256
    return {
        "bins": np.repeat(np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1), 4, 0),
        "line": np.repeat(side.reshape(1, 8, 1), 4, 0),
        "blur": np.eye(8, dtype=np.float32)[:, :, None, None] * blur,
    }


@pytest.mark.parametrize("name", tables())
@pytest.mark.parametrize("trained", [True, False])
def test_a_weight_that_is_a_table_is_known_and_a_trained_one_is_not(name: str, trained: bool) -> None:
    table = tables()[name]
    generator = np.random.default_rng(0)
    values = generator.normal(size=table.shape).astype(np.float32) if trained else table
    kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d}
    layer = kinds[table.ndim](table.shape[1], table.shape[0], table.shape[2:], padding="same", bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(values))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer = nn.Conv2d(3, table.shape[1], 1), layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            y: torch.Tensor = self.layer(x if table.ndim == 4 else x.flatten(2))
            return y

    layers, _ = trace_layers(Net(), HOW)
    assert {found.name: found.fixed for found in layers} == {"stem.weight": False, "layer.weight": not trained}
