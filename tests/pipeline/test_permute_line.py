"""The line with `--permute`: the untouched model beside one whose channels lie in another order."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from small_line import MODEL, Line, read_json, stages_of

from maskplan.pipeline.cli.app import main
from maskplan.pipeline.models.state_dict import read_weights
from maskplan.pipeline.permutation.record import read_permutation


@pytest.fixture(scope="module")
def permuted(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with magnitude masks; do not write to it."""
    out = tmp_path_factory.mktemp("permuted") / "out"
    assert main(["engine", *line.options, "--masks", "magnitude", "--permute", "--out", str(out)]) == 0
    return out


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input": images})[0])


def test_the_permuted_checkpoint_computes_what_the_dense_one_does_and_keeps_more(permuted: Path) -> None:
    dense, moved = (read_weights(permuted / f"{name}.safetensors") for name in ("dense", "permuted"))
    _, moves = read_permutation(permuted / "permutation.safetensors")
    assert [move.group.name for move in moves] == ["stem"]
    order = moves[0].order
    assert sorted(order) == list(range(8))
    assert list(order) != list(range(8))
    # By hand: the stem makes the channels, its norm scales them, `wide` reads them; nothing else moves.
    for name in ("stem.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        np.testing.assert_array_equal(moved[name].numpy(), dense[name].numpy()[order])
    np.testing.assert_array_equal(moved["wide.weight"].numpy(), dense["wide.weight"].numpy()[:, order])
    for name in ("bn2.running_mean", "depthwise.weight", "head.weight"):
        np.testing.assert_array_equal(moved[name].numpy(), dense[name].numpy())
    found = read_json(permuted / "report.json")["permutation"]
    assert found["kept_before"] < found["kept_after"]
    assert found["reason"] is None
    assert {"name", "state", "efficacy"} <= set(found["groups"][0])


def test_the_gate_compares_with_the_untouched_model(permuted: Path, line: Line) -> None:
    images = np.random.default_rng(0).standard_normal((4, 3, 16, 16), dtype=np.float32)
    np.testing.assert_array_equal(logits(permuted / "dense.onnx", images), logits(line.out / "dense.onnx", images))
    rows = [row["name"] for row in read_json(permuted / "report.json")["parity"]["methods"]]
    assert rows == ["dense", "magnitude", "magnitude, recalibrated", "magnitude, permuted, recalibrated"]


def test_masks_engine_and_report_say_that_channels_were_moved(permuted: Path, cli: Callable[..., Any]) -> None:
    report = read_json(permuted / "report.json")
    digest = report["permutation"]["sha256"]
    assert report["masks"]["permutation"] == report["model"]["permutation"] == digest
    assert "weights w.pth, permuted" in cli("inspect", permuted / "engine.onnx").out


def test_the_same_again_does_nothing_and_another_effort_searches_again(
    permuted: Path, line: Line, cli: Callable[..., Any], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(permuted, tmp_path / "out"))
    command = ("engine", *line.options, "--masks", "magnitude", "--permute", "--out", out)
    assert stages_of(cli(*command).err).made == ()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(Path(line.options[-1]).read_text() + "[permute]\neffort = 0.5\n")
    again = stages_of(cli(*command, "--recipe", recipe).err)
    assert again.made[0] == "permute"
    assert not {"load", "images", "export-dense"} & set(again.made)


def test_masks_of_a_file_are_refused(line: Line, cli: Callable[..., Any], tmp_path: Path) -> None:
    masks = line.out / "masks.safetensors"
    ran = cli("engine", *line.options, "--masks", masks, "--permute", "--out", tmp_path / "out")
    assert ran.code == 3
    assert "masks from a file cannot be combined with a permutation" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_read_off_goes_on_unpermuted(
    line: Line, cli: Callable[..., Any], tmp_path: Path
) -> None:
    # A branch on values, which `torch.export` refuses, where the batch is a number; to the ONNX exporter it is a symbol.
    forward = "    def forward(self, x):\n"
    branch = "        if torch.compiler.is_compiling() and isinstance(x.shape[0], int) and float(x.mean()) > 1e6:\n"
    branch += "            return self.head(x)\n"
    assert forward in MODEL
    (tmp_path / "choosing.py").write_text(MODEL.replace(forward, forward + branch))
    options = (f"{tmp_path}/choosing.py:net", *line.options[1:])
    ran = cli("engine", *options, "--masks", "magnitude", "--permute", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "the channels keep their order" in ran.err
    assert re.search(r"^permutation  none: .+", ran.out, re.MULTILINE)
    report = read_json(tmp_path / "out" / "report.json")
    assert set(report["permutation"]) == {"reason"}
    assert report["model"]["permutation"] is None


def test_baking_masks_of_another_order_is_warned_of(
    permuted: Path, line: Line, cli: Callable[..., Any], tmp_path: Path
) -> None:
    model, masks = line.options[0], permuted / "masks.safetensors"
    ran = cli(
        "bake",
        model,
        "--masks",
        masks,
        "--weights",
        permuted / "permuted.safetensors",
        "-o",
        tmp_path / "a.safetensors",
    )
    assert (ran.code, "permut" in ran.err) == (0, False)
    ran = cli(
        "bake", model, "--masks", masks, "--weights", permuted / "dense.safetensors", "-o", tmp_path / "b.safetensors"
    )
    assert "the masks are for permuted channels" in ran.err
    own = tmp_path / "own.safetensors"
    cli("mask", model, "--method", "magnitude", "--weights", permuted / "dense.safetensors", "-o", own)
    ran = cli(
        "bake", model, "--masks", own, "--weights", permuted / "permuted.safetensors", "-o", tmp_path / "c.safetensors"
    )
    assert "the masks are not for that order" in ran.err
