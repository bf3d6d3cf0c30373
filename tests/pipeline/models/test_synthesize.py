"""Images from BatchNorm statistics: how near they come to them, and what they are good for."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import batches
from maskplan.pipeline.data.digits import PREPROCESSING, load_digits
from maskplan.pipeline.data.synthetic import synthetic_dataset
from maskplan.pipeline.masking.maskset import load_masks
from maskplan.pipeline.models.batchnorm import RecalibrateOptions, update_statistics
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.models.state_dict import read_weights
from maskplan.pipeline.models.synthesize import SynthesizeOptions, synthesize_images

HOW = Preprocessing(3, 8, 12, 0, "bilinear", (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
TRAINED = Provenance("net", True, "w.pth", "ab" * 32, 4, (), HOW)
QUICK = SynthesizeOptions(images=32, steps=60, batch=32)


@pytest.fixture
def net() -> nn.Module:
    """Statistics of images that are dark on the left, which noise has not."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, (6, 3)), nn.BatchNorm2d(8)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (200, 8, 12, 3)) * np.linspace(0.1, 1, 12)[:, None]
    data = synthetic_dataset(pixels.astype(np.uint8), HOW, ())
    update_statistics(made, data.train, HOW, RecalibrateOptions(batch=len(data.train)))
    return made


@torch.no_grad()
def difference(net: nn.Module, pixels: np.ndarray) -> float:
    """Mean squared error of means and logarithms of deviations, by PyTorch's own statistics."""
    data = synthetic_dataset(pixels, HOW, ())
    ((x, _),) = batches(dataclasses.replace(data.train, indices=np.arange(len(pixels))), HOW, len(pixels))
    found, images = 0.0, torch.from_numpy(x)
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            own = copy.deepcopy(layer).train()
            own.momentum = 1.0
            own(images)
            stored = layer.running_var + layer.eps  # type: ignore[operator]
            found += float(((own.running_mean - layer.running_mean) ** 2 / stored).mean())  # type: ignore[operator]
            found += float((0.5 * torch.log((own.running_var + layer.eps) / stored)).square().mean())  # type: ignore[operator]
        images = layer.eval()(images)
    return found / 2


def test_the_images_have_the_stored_statistics(net: nn.Module) -> None:
    made = difference(net, synthesize_images(net, TRAINED, QUICK))
    noise = difference(net, synthesize_images(net, TRAINED, dataclasses.replace(QUICK, steps=1)))
    assert made < 0.02
    assert noise > 20 * made


def test_each_batch_has_them(net: nn.Module) -> None:
    pixels = synthesize_images(net, TRAINED, dataclasses.replace(QUICK, images=40, batch=32))
    assert pixels.shape == (40, 8, 12, 3)
    assert pixels.dtype == np.uint8
    assert len(np.unique(pixels.reshape(40, -1), axis=0)) == 40
    assert max(difference(net, part) for part in (pixels[:20], pixels[20:])) < 0.05


def test_the_seed_decides_and_the_network_does_not_change(net: nn.Module) -> None:
    before = copy.deepcopy(net.state_dict())
    first, again = (synthesize_images(net, TRAINED, QUICK) for _ in range(2))
    other = synthesize_images(net, TRAINED, dataclasses.replace(QUICK, seed=1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_smoothness_brings_neighbors_together(net: nn.Module) -> None:
    rough, smooth = (
        np.abs(
            np.diff(synthesize_images(net, TRAINED, dataclasses.replace(QUICK, smoothness=s)).astype(int), axis=1)
        ).mean()
        for s in (0.0, 0.3)
    )
    assert smooth < 0.9 * rough


@pytest.mark.parametrize(
    ("module", "provenance", "message"),
    [
        (nn.Conv2d(3, 4, 1), TRAINED, "only be synthesized for a network with BatchNorm"),
        (nn.BatchNorm2d(3), dataclasses.replace(TRAINED, trained=False), "from random weights"),
        (
            nn.BatchNorm2d(4),
            dataclasses.replace(TRAINED, preprocessing=dataclasses.replace(HOW, channels=4)),
            "one or three channels",
        ),
    ],
)
def test_networks_that_know_nothing_of_their_images_are_refused(
    module: nn.Module, provenance: Provenance, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        synthesize_images(module, provenance, QUICK)


def test_statistics_that_are_not_numbers_are_refused() -> None:
    broken = nn.BatchNorm2d(3)
    broken.running_mean[1] = float("nan")  # type: ignore[index]
    with pytest.raises(InputError, match="not finite"):
        synthesize_images(broken, TRAINED, QUICK)


@pytest.mark.parametrize(("command", "option"), [("mask", "--data"), ("bake", "--recalibrate")])
def test_images_of_the_user_and_synthetic_ones_exclude_each_other(
    command: str, option: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    masks = ("--masks", tmp_path / "m.safetensors") if command == "bake" else ()
    ran = cli(command, "digits_resnet", *masks, "--synthetic-images", 32, option, tmp_path, "-o", tmp_path / "out")
    assert ran.code == 3
    assert "for runs without data" in ran.err
    assert not (tmp_path / "out").exists()


def top1(path: Path) -> float:
    """Percent of the digits' `val` that a checkpoint of the bundled network has right."""
    module, _ = open_checkpoint(ModelOptions("digits_resnet"))
    module.load_state_dict(read_weights(path))
    ((x, labels),) = batches(load_digits().val, PREPROCESSING, 1000)
    with torch.no_grad():
        return 100 * float((module.eval()(torch.from_numpy(x)).argmax(1).numpy() == labels).mean())


def test_without_data_the_digits_lose_less_than_by_magnitude(cli: Callable[..., Any], tmp_path: Path) -> None:
    """`mask` and `bake` make the same images from the same seed."""
    masks, sparse, magnitude = (tmp_path / f"{name}.safetensors" for name in ("masks", "sparse", "magnitude"))
    ran = cli("mask", "digits_resnet", "--synthetic-images", 64, "-o", masks)
    assert ran.code == 0
    assert "(layerwise)" in ran.out
    assert cli("bake", "digits_resnet", "--masks", masks, "--synthetic-images", 64, "-o", sparse).code == 0
    cli("mask", "digits_resnet", "--method", "magnitude", "-o", tmp_path / "m.safetensors")
    cli("bake", "digits_resnet", "--masks", tmp_path / "m.safetensors", "-o", magnitude)
    assert len(load_masks(masks)) == 8
    assert top1(sparse) > 97
    assert top1(sparse) > top1(magnitude) + 10
