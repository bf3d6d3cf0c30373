"""The accuracy benchmarks run to the end on tiny data, and agree with a count by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

NET = "vgg16_bn_quarter"
Bench = Callable[..., None]


def written(folder: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())
    return found


@pytest.fixture
def weights(bench: Bench, toy_cifar: Path, tmp_path: Path) -> Path:
    out = tmp_path / "dense.safetensors"
    bench("dense.py", NET, "--data", toy_cifar, "--out", out, "--epochs", 1)
    return out


def test_dense_training_continues_while_it_gains(bench: Bench, toy_cifar: Path, tmp_path: Path, weights: Path) -> None:
    out = tmp_path / "longer.safetensors"
    bench("dense.py", NET, "--data", toy_cifar, "--weights", weights, "--out", out, "--more", 1, "--rounds", 1)
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["epochs"] in (1, 2)
    same = all(
        torch.equal(v, safetensors.torch.load_file(out)[k]) for k, v in safetensors.torch.load_file(weights).items()
    )
    (gain,) = found["gains"]
    assert same == (found["epochs"] == 1) == (gain < 0.2)
    assert "/" not in found["command"].removeprefix("python benchmarks/accuracy/dense.py")


@pytest.mark.slow
def test_accuracy_and_ablation(bench: Bench, toy_cifar: Path, tmp_path: Path, weights: Path) -> None:
    common = (NET, "--data", toy_cifar, "--weights", weights, "--results", tmp_path, "--epochs", 1)
    bench("accuracy.py", *common)
    (run,) = written(tmp_path, "accuracy")
    assert run["masked_layers"] == 12
    assert run["val_images"] == 50
    assert set(run["rows"]) >= {"dense", "magnitude", "maskplan, recalibrated", "magnitude, ASP's layers, recalibrated"}
    reference = run["rows"][run["reference"]]["top1"]
    for row in run["rows"].values():
        assert row["drop"] == pytest.approx(reference - row["top1"], abs=2e-3)
        assert row["drop_ci95"][0] <= row["drop"] <= row["drop_ci95"][1]
    bench("ablation.py", *common, "--rows", "maskplan", "no noise")
    assert [row["row"] for row in written(tmp_path, "ablation")] == ["maskplan", "no noise"]
    before = (tmp_path / "ablation.json").stat().st_mtime_ns
    bench("ablation.py", *common, "--rows", "no noise")
    assert (tmp_path / "ablation.json").stat().st_mtime_ns == before, "an existing row is not run again"
    page = (tmp_path / "results.md").read_text()
    assert "| magnitude, recalibrated |" in page
    assert "| no noise |" in page


@pytest.mark.slow
def test_the_recipe_of_danhofer2024(bench: Bench, toy_cifar: Path, tmp_path: Path, weights: Path) -> None:
    bench("reported.py", NET, "--data", toy_cifar, "--weights", weights, "--results", tmp_path, "--epochs", 1)
    (run,) = written(tmp_path, "reported")
    assert run["layers"] == {"all convolutions": 13, "our layers": 12}
    assert set(run["select_top1_by_rate"]) == {"0.1", "1", "10", "100"}
    assert set(run["rows"]) >= {"report, sampled", "report, argmax", "report, untrained, argmax"}
    assert "report's recipe" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_old_masks_on_new_weights(bench: Bench, toy_cifar: Path, tmp_path: Path, weights: Path) -> None:
    bench("exchange.py", NET, "--data", toy_cifar, "--weights", weights, "--results", tmp_path, "--epochs", 1)
    (run,) = written(tmp_path, "exchange")
    assert [row["rate"] for row in run["rows"]] == [0.001, 0.01, 0.1]
    for row in run["rows"]:
        assert 0 <= row["equal_groups_percent"] <= 100
    assert "Old masks on new weights" in (tmp_path / "results.md").read_text()


def by_hand(module: nn.Module, folder: Path, k: int) -> float:
    """Top-k of the toy images, decoded and normalized by torchvision."""
    how = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(256),
            torchvision.transforms.CenterCrop(224),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = torchvision.datasets.ImageFolder(str(folder / "val"), how)
    right = []
    with torch.no_grad():
        for image, label in images:
            right.append(label in module(image[None])[0].topk(k).indices.tolist())
    return 100 * float(np.mean(right))


@pytest.mark.slow
def test_the_imagenet_tables(bench: Bench, toy_imagenet: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torchvision.models.shufflenet_v2_x0_5(num_classes=6).eval()
    torch.save(module.state_dict(), tmp_path / "shufflenet_v2_x0_5.pth")
    common = ("--data", toy_imagenet, "--weights", tmp_path, "--results", tmp_path, "--models", "shufflenet_v2_x0_5")
    for table in (1, 2, 3):
        bench("imagenet.py", "--table", table, *common, "--epochs", 1)
    first, second, third = written(tmp_path, "imagenet")
    assert set(first["rows"]) == {"dense", "dense, recalibrated"}
    assert set(second["rows"]) >= {"maskplan", "maskplan, recalibrated", "magnitude, recalibrated"}
    assert "magnitude, ASP's layers" in third["rows"]
    for k in (1, 5):
        expected = by_hand(module, toy_imagenet, k)
        # A prediction may change with the way of resizing; more than one in thirty would be another count.
        assert first["rows"]["dense"][f"top{k}"] == pytest.approx(expected, abs=3.4)
        assert first["rows"]["dense"]["top5"] >= first["rows"]["dense"]["top1"]
    assert first["rows"]["dense"] == second["rows"]["dense"] | {}
    assert "## Table 3" in (tmp_path / "imagenet.md").read_text()
    before = (tmp_path / "imagenet.json").read_text()
    bench("imagenet.py", "--table", 1, *common)
    assert (tmp_path / "imagenet.json").read_text() == before
