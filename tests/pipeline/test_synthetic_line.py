"""`engine` without data, on images that are made from the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Cli = Callable[..., Any]


def test_the_run_says_what_chose_its_masks_and_takes_known_images(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("engine", "digits_resnet", "--synthetic-images", 32, "--no-compile", "--out", out)
    ran = cli(*command)
    assert ran.code == 0
    assert "layerwise, recalibrated, synthetic images" in ran.out
    assert "32 synthetic images, made from the dense network, used for: masks, statistics\n" in ran.out
    report = json.loads((out / "report.json").read_text())
    assert report["masks"]["method"] == "layerwise"
    assert report["parity"]["verdict"] == "not_applicable"
    assert report["model"]["recalibrated_images"] == 28
    assert [s["role"] for s in report["masks"]["image_sets"]] == ["synthetic train", "synthetic select"]
    page = (out / "report.html").read_text()
    assert "layerwise masks on 8 layers, by 32 synthetic images made from the dense network" in page
    assert "BatchNorm recalibrated on 28 synthetic images" in page
    # `bake` makes the same images, and the same statistics of them.
    baked = tmp_path / "baked.safetensors"
    masks = out / "masks.safetensors"
    cli("bake", "digits_resnet", "--masks", masks, "--synthetic-images", 32, "-o", baked)
    ours, theirs = (load_file(path) for path in (out / "sparse.safetensors", baked))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    made = (out / ".maskplan" / "synthetic.npy").stat().st_mtime_ns
    again = cli("-v", *command)
    assert "synthesize: unchanged" in again.err
    assert "recalibrate-sparse: unchanged" in again.err
    assert (out / ".maskplan" / "synthetic.npy").stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["digits_resnet", "--synthetic-images", "32", "--data", "photos"], "for runs without data"),
        (["net.onnx", "--synthetic-images", "32"], "--synthetic-images: for a module"),
    ],
)
def test_runs_that_cannot_use_such_images_are_refused(
    options: list[str], message: str, cli: Cli, tmp_path: Path
) -> None:
    ran = cli("engine", *options, "--out", tmp_path / "out")
    assert ran.code == 3
    assert message in ran.err
    assert not (tmp_path / "out").exists()
