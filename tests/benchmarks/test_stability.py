"""The benchmark of bounds and certificates runs to the end on tiny data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

Bench = Callable[..., None]


@pytest.mark.slow
def test_random_networks_are_counted(bench: Bench, tmp_path: Path) -> None:
    results, size = tmp_path / "stability.json", ("--examples", 20, "--architectures", 4, "--images-per-example", 3)
    bench("stability.py", "random", *size, "--workers", 1, "--results", results)
    found = json.loads(results.read_text())["random"]
    assert found["command"] == f"python benchmarks/accuracy/stability.py random {' '.join(map(str, size))}"
    assert (found["examples"], found["images"], found["architectures"]) == (20, 60, 4)
    assert [value for name, value in found.items() if "violations" in name or "certified_flips" in name] == [0] * 5
    assert found["reading_mismatches"] == 0
    assert found["certificates"] > 0
    assert found["ball_certificates"] > 0


@pytest.mark.slow
def test_regimes_of_resnet20(bench: Bench, toy_cifar: Path, tmp_path: Path) -> None:
    import models

    torch.manual_seed(0)
    weights, results = tmp_path / "dense.safetensors", tmp_path / "stability.json"
    safetensors.torch.save_file(models.resnet20().state_dict(), weights)
    bench("stability.py", "cifar", "--weights", weights, "--data", toy_cifar, "--images", 20, "--results", results)
    found = json.loads(results.read_text())["cifar"]
    assert found["masked_layers"] == 18
    for method in ("magnitude", "layerwise"):
        report = found[method]
        assert report["masking"]["images"] == 20
        assert report["recalibrated_images"] > 0
        assert [regime["name"] for regime in report["masking"]["regimes"]][:2] == ["head", "last 3 layers"]
        assert [ball["name"] for ball in report["balls"]] == ["head", "last 3 layers", "whole network"]
        assert report["masking"]["certified_flips"] == 0
    assert found["magnitude"]["update"] is not None
    assert found["layerwise"]["update"] is None
