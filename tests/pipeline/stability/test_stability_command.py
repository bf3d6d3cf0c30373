"""`maskplan stability`: its report on the digits model, checked against the two networks, and its refusals."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from maskplan.pipeline.cli.app import main
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.serialization import decode, encode
from maskplan.pipeline.data.dataset import batches, open_val
from maskplan.pipeline.data.digits import load_digits
from maskplan.pipeline.data.image_sets import identify
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.models.registry import BUNDLED_WEIGHTS
from maskplan.pipeline.stability.analyze import StabilityOptions, Weights, analyze, under_masks
from maskplan.pipeline.stability.record import StabilityReport

Cli = Callable[..., Any]
IMAGES = 100


def run(*args: object) -> str:
    """Run a command in this process; its standard output."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(list(map(str, args))) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def digits_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of the last block, the checkpoint baked with them, and slightly newer weights."""
    folder = tmp_path_factory.mktemp("stability")
    masks = folder / "masks.safetensors"
    run("mask", "digits_resnet", "--method", "magnitude", "--layers", "blocks.2.conv2.*", "-o", masks)
    run("bake", "digits_resnet", "--masks", masks, "-o", folder / "sparse.safetensors")
    newer = safetensors.torch.load_file(BUNDLED_WEIGHTS)
    newer["head.weight"] = newer["head.weight"] * 1.001
    newer["blocks.2.conv2.weight"] = newer["blocks.2.conv2.weight"] + 1e-5
    safetensors.torch.save_file(newer, folder / "newer.safetensors")
    return folder


@pytest.fixture(scope="module")
def result(digits_files: Path) -> dict[str, Any]:
    """Output and report of a run with an update."""
    masks, report = digits_files / "masks.safetensors", digits_files / "report.json"
    command = ("stability", "digits_resnet", "--masks", masks, "--updated", digits_files / "newer.safetensors")
    out = run(*command, "--images", IMAGES, "--report", report)
    return {"out": out, "report": json.loads(report.read_text())}


def test_the_report_is_a_record(result: dict[str, Any]) -> None:
    found = decode(StabilityReport, result["report"])
    assert encode(found) == result["report"]
    assert (found.model, found.method, found.trained) == ("digits_resnet", "magnitude", True)
    assert found.arithmetic == "float64"
    assert [layer.name for layer in found.layers if layer.difference > 0] == ["blocks.2.conv2"]


def test_flips_and_changes_are_those_of_the_two_networks(result: dict[str, Any], digits_files: Path) -> None:
    dense, provenance = open_checkpoint(ModelOptions("digits_resnet"))
    sparse, _ = open_checkpoint(ModelOptions("digits_resnet", str(digits_files / "sparse.safetensors")))
    flips, changes = 0, []
    with torch.no_grad():
        for x, _ in batches(load_digits().val.sample(IMAGES, 0), provenance.preprocessing, 32):
            one, other = (m.double()(torch.from_numpy(x).double()) for m in (dense, sparse))
            flips += int((one.argmax(1) != other.argmax(1)).sum())
            changes += (one - other).norm(dim=1).tolist()
    masking = result["report"]["masking"]
    assert masking["images"] == IMAGES == result["report"]["flip_rate"]["images"]
    assert masking["flips"] == flips == result["report"]["flip_rate"]["flips"]
    assert masking["logits_change"]["p50"] == pytest.approx(float(np.median(changes)), rel=1e-9)


def test_masks_of_the_last_block_leave_images_certified(result: dict[str, Any]) -> None:
    report = result["report"]
    for pair in (report["masking"], report["update"]["masked"], report["update"]["dense_and_masked"]):
        assert pair["certified_flips"] == 0
        for regime in pair["regimes"]:
            assert regime["vacuous"] == (regime["certified"] == 0)
            assert regime["certified"] >= max(regime[k] for k in ("by_norm", "by_largest", "by_pairs"))
            assert regime["tightness"] is None or regime["tightness"]["p10"] > -1e-6
    names = [regime["name"] for regime in report["masking"]["regimes"]]
    assert names == ["head", "last 4 layers", "last 7 layers", "last 9 layers", "whole network"]
    certified = [regime["certified"] for regime in report["masking"]["regimes"]]
    assert certified[-1] > 50
    # Nothing before the last block changes, so the start of the bounds makes no difference.
    assert certified[1:] == [certified[-1]] * 4
    assert report["worst_case"]["vacuous"] is True
    assert "any image: logits change" in result["out"]


def test_a_small_update_is_certified_and_larger_balls_have_smaller_radii(result: dict[str, Any]) -> None:
    report = result["report"]
    assert report["update"]["masked"]["regimes"][-1]["certified"] > 90
    head, block, whole = report["balls"]
    assert [ball["name"] for ball in (head, block, whole)] == ["head", "last 4 layers", "whole network"]
    assert head["radius"]["p50"] > block["radius"]["p50"] > whole["radius"]["p50"] > 0
    for ball in (head, block, whole):
        shares = [share["certified"] for share in ball["shares"]]
        assert shares == sorted(shares, reverse=True)
        assert ball["vacuous"] == (shares[0] == 0)


def test_the_sparse_checkpoint_gives_the_same_report_as_masks_times_weights(
    cli: Cli, result: dict[str, Any], digits_files: Path, tmp_path: Path
) -> None:
    command = ("stability", "digits_resnet", "--masks", digits_files / "masks.safetensors", "--images", IMAGES)
    ran = cli("-q", *command, "--sparse", digits_files / "sparse.safetensors", "--report", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["masking"] == result["report"]["masking"]
    assert found["update"] is None


def test_vacuous_bounds_are_reported_as_such(cli: Cli, tmp_path: Path) -> None:
    masks = tmp_path / "masks.safetensors"
    assert cli("-q", "mask", "digits_resnet", "--method", "magnitude", "-o", masks).code == 0
    ran = cli("-q", "stability", "digits_resnet", "--masks", masks, "--images", 20, "--confidence", "0.99")
    assert ran.code == 0, ran.err
    (whole,) = (line for line in ran.out.splitlines() if line.strip().startswith("whole network"))
    assert "vacuous" in whole
    assert "the bound is 10^" in whole
    assert "99% confidence" in ran.out


def test_an_update_keeps_the_masks_and_the_given_statistics() -> None:
    module, _ = open_checkpoint(ModelOptions("digits_resnet"))
    name = "blocks.2.conv2.weight"
    mask = np.random.default_rng(0).random(module.state_dict()[name].shape) < 0.5
    other = {key: value + 1 for key, value in module.state_dict().items()}
    found = under_masks(module, {name: mask}, other)
    assert (found[name] == 0).sum() == (~mask).sum()
    torch.testing.assert_close(found["bn.running_mean"], other["bn.running_mean"])
    torch.testing.assert_close(found["bn.weight"], module.state_dict()["bn.weight"])
    torch.testing.assert_close(under_masks(module, {}, None)["bn.running_mean"], module.state_dict()["bn.running_mean"])


@pytest.fixture
def tiny(cli: Cli, tiny_spec: str, tmp_path: Path) -> tuple[str, Path]:
    """A user's model and its masks."""
    masks = tmp_path / "tiny.safetensors"
    ran = cli("-q", "mask", tiny_spec, "--method", "magnitude", "--weights", "random", "-o", masks)
    assert ran.code == 0, ran.err
    return tiny_spec, masks


def test_a_users_model_and_images(cli: Cli, tiny: tuple[str, Path], toy_data: Path) -> None:
    model, masks = tiny
    ran = cli("-q", "stability", model, "--masks", masks, "--weights", "random", "--data", toy_data)
    assert ran.code == 0, ran.err
    assert "24 images" in ran.out
    assert "the weights are random" in ran.out


def refused(ran: Any, *texts: str) -> None:
    assert ran.code == 3
    assert "Traceback" not in ran.err
    for each in texts:
        assert each in ran.err, ran.err


def test_missing_images_are_refused(cli: Cli, tiny: tuple[str, Path], tmp_path: Path) -> None:
    model, masks = tiny
    command = ("-q", "stability", model, "--weights", "random", "--masks", masks)
    refused(cli(*command), "stability is measured on images", "--data")
    refused(cli(*command, "--data", tmp_path / "none"), "data folder not found")
    (tmp_path / "loose" / "val").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "loose" / "val" / "a.png")
    refused(cli(*command, "--data", tmp_path / "loose"), "val/ contains no images in class folders", "1 loose images")


def test_images_that_shaped_the_masks_are_refused(cli: Cli, tiny_spec: str, toy_data: Path, tmp_path: Path) -> None:
    masks, mixed = tmp_path / "layerwise.safetensors", tmp_path / "mixed"
    command = ("--weights", "random", "--data")
    ran = cli("-q", "mask", tiny_spec, "--method", "layerwise", *command, toy_data, "-o", masks)
    assert ran.code == 0, ran.err
    shutil.copytree(toy_data / "train", mixed / "val")
    refused(
        cli("-q", "stability", tiny_spec, "--masks", masks, *command, mixed),
        "val images were also used to make the model",
        "60",
    )
    assert cli("-q", "stability", tiny_spec, "--masks", masks, *command, toy_data).code == 0


def test_images_that_recalibrated_the_checkpoint_are_refused(
    cli: Cli, tiny: tuple[str, Path], toy_data: Path, tmp_path: Path
) -> None:
    (model, masks), mixed, sparse = tiny, tmp_path / "mixed", tmp_path / "sparse.safetensors"
    ran = cli("-q", "bake", model, "--weights", "random", "--masks", masks, "--recalibrate", toy_data, "-o", sparse)
    assert ran.code == 0, ran.err
    shutil.copytree(toy_data / "train", mixed / "val")
    command = ("-q", "stability", model, "--weights", "random", "--masks", masks, "--sparse", sparse)
    refused(cli(*command, "--data", mixed), "val images were also used to make the model")
    ran = cli(*command, "--data", toy_data)
    assert ran.code == 0, ran.err


def test_images_that_shaped_newer_weights_are_refused(
    cli: Cli, tiny: tuple[str, Path], toy_data: Path, tmp_path: Path
) -> None:
    (model, masks), mixed, newer = tiny, tmp_path / "mixed", tmp_path / "newer.safetensors"
    ran = cli("-q", "bake", model, "--weights", "random", "--masks", masks, "--recalibrate", toy_data, "-o", newer)
    assert ran.code == 0, ran.err
    shutil.copytree(toy_data / "train", mixed / "val")
    command = ("-q", "stability", model, "--weights", "random", "--masks", masks, "--data", mixed)
    refused(cli(*command, "--updated", newer), "val images were also used to make the model")


def test_the_seed_draws_the_images(cli: Cli, digits_files: Path, tmp_path: Path) -> None:
    medians = []
    for seed in (0, 1):
        report = tmp_path / f"{seed}.json"
        command = ("stability", "digits_resnet", "--masks", digits_files / "masks.safetensors", "--images", 9)
        assert cli("-q", *command, "--seed", seed, "--report", report).code == 0
        medians.append(json.loads(report.read_text())["masking"]["logits_change"]["p50"])
    assert medians[0] != medians[1]


def test_masks_of_another_model_are_refused(cli: Cli, tiny: tuple[str, Path]) -> None:
    refused(cli("-q", "stability", "digits_resnet", "--masks", tiny[1]), "the masks are for another model")


def test_a_checkpoint_with_other_masks_is_refused(cli: Cli, digits_files: Path) -> None:
    masks = digits_files / "masks.safetensors"
    refused(
        cli("-q", "stability", "digits_resnet", "--masks", masks, "--sparse", digits_files / "newer.safetensors"),
        "was not pruned with these masks",
        "blocks.2.conv2.weight",
    )


def test_masks_for_another_order_of_channels_are_refused(cli: Cli, digits_files: Path, tmp_path: Path) -> None:
    moved, masks = tmp_path / "p.safetensors", tmp_path / "m.safetensors"
    assert cli("permute", "digits_resnet", "-o", moved, "--effort", "0.01").code == 0
    assert cli("mask", "digits_resnet", "--method", "magnitude", "--weights", moved, "-o", masks).code == 0
    refused(cli("stability", "digits_resnet", "--masks", masks), "in different orders", "permuted.safetensors")
    ran = cli("stability", "digits_resnet", "--masks", masks, "--weights", moved, "--images", "20")
    assert ran.code == 0, ran.err


def test_newer_weights_of_another_model_are_refused(cli: Cli, digits_files: Path, tmp_path: Path) -> None:
    torch.save({"head.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    masks = digits_files / "masks.safetensors"
    refused(
        cli("-q", "stability", "digits_resnet", "--masks", masks, "--updated", tmp_path / "other.pth"),
        "the checkpoint does not fit the model",
    )


def test_a_model_without_bounds_is_refused_by_the_operators_name(cli: Cli, tmp_path: Path, toy_data: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n"
        "PREPROCESSING = {'height': 16, 'width': 16, 'resize': 0}\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem, self.mix, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)\n"
        "        self.head = nn.Linear(8, 3)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.norm(self.mix(self.stem(x))).mean((2, 3)))\n"
    )
    masks, command = tmp_path / "m.safetensors", (f"{file}:Net", "--weights", "random")
    assert cli("-q", "mask", *command, "--method", "magnitude", "-o", masks).code == 0
    ran = cli("-q", "stability", *command, "--masks", masks, "--data", toy_data)
    refused(ran, "the bounds do not cover the model", "group_norm at norm")


@pytest.mark.parametrize("confidence", ["0", "1", "95", "nan"])
def test_a_confidence_out_of_range_is_refused(confidence: str, cli: Cli, digits_files: Path) -> None:
    masks = digits_files / "masks.safetensors"
    refused(cli("-q", "stability", "digits_resnet", "--masks", masks, "--confidence", confidence), "confidence is")


def test_a_split_without_images_is_refused(toy_data: Path) -> None:
    module, provenance = open_checkpoint(ModelOptions("digits_resnet"))
    val = load_digits().val
    empty = type(val)("val", val.images, val.indices[:0])
    states = Weights(module.state_dict(), module.state_dict())
    with pytest.raises(InputError, match="no held-out images"):
        analyze(module, provenance, states, "", empty, identify(open_val(toy_data, (), 3)), StabilityOptions())


def test_masks_that_prune_nothing_flip_nothing() -> None:
    module, provenance = open_checkpoint(ModelOptions("digits_resnet"))
    val = load_digits().val
    states = Weights(module.state_dict(), module.state_dict())
    found = analyze(module, provenance, states, "", val, identify(val), StabilityOptions(images=50))
    assert found.masking.flips == 0
    assert [regime.certified for regime in found.masking.regimes] == [100.0] * 5
    assert all(regime.tightness is None for regime in found.masking.regimes)
    assert found.worst_case.log10_over_largest_measured is None
