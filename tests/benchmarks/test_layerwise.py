"""The benchmark of layer-wise masks and conversion runs to the end on tiny data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

Bench = Callable[..., None]


@pytest.mark.slow
def test_rows_of_masks_and_conversions(bench: Bench, toy_cifar: Path, tmp_path: Path) -> None:
    import models

    torch.manual_seed(0)
    weights, results = tmp_path / "dense.safetensors", tmp_path / "layerwise.json"
    safetensors.torch.save_file(models.resnet20().state_dict(), weights)
    bench("layerwise.py", "accuracy", "--weights", weights, "--data", toy_cifar, "--results", results)
    found = json.loads(results.read_text())["accuracy"]
    assert found["command"] == "python benchmarks/accuracy/layerwise.py accuracy"
    assert found["masked_layers"] == 18
    assert found["val_images"] == 50
    assert all(ours < theirs for theirs, ours in found["output_error_by_magnitude_and_layerwise"].values())
    assert len(found["rows"]) == 7
    for report in found["conversions"].values():
        for layer in report["layers"]:
            assert layer["updated_error"] is None or layer["updated_error"] < layer["error"]
