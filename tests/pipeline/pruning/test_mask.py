"""The mask stage, by the command and by the function: layers, methods, start masks and interruptions."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.choices import LAYERWISE, LEARNED, MAGNITUDE, TRANSPOSABLE
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.digits import load_digits
from maskplan.pipeline.learning.options import LearnerFiles, LearnOptions
from maskplan.pipeline.masking.layerwise import output_error
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.transposable import transposed_violations
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.pruning import mask as mask_module
from maskplan.pipeline.pruning.mask import MaskOptions, choose_masks
from maskplan.pipeline.pruning.second_moments import MomentOptions, second_moments

TWO_FOUR = Pattern(2, 4)
QUICK = LearnOptions(epochs=1, batch=256)


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, Any]:
    return open_checkpoint(ModelOptions("digits_resnet"))


def masked(net: tuple[nn.Module, Any], out: Path, **options: Any) -> dict[str, np.ndarray[Any, Any]]:
    chosen = MaskOptions(method=MAGNITUDE, learn=QUICK)
    choose_masks(*net, dataclasses.replace(chosen, **options), out, load_digits())
    return dict(safetensors.numpy.load_file(out))


def test_magnitude_masks_are_those_of_every_eligible_convolution(net: tuple[nn.Module, Any], tmp_path: Path) -> None:
    found = masked(net, tmp_path / "m.safetensors")
    assert len(found) == 8
    for name, mask in found.items():
        assert np.array_equal(mask, magnitude_mask(net[0].state_dict()[name].numpy(), TWO_FOUR))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include_linear": True}, 9),
        ({"layers": ("blocks.2.*",)}, 3),
        ({"layers": ("blocks.2.conv1.weight", "blocks.0.*")}, 3),
        ({"min_channels": 32}, 4),
    ],
)
def test_options_select_the_layers(
    options: dict[str, Any], expected: int, net: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    found = masked(net, tmp_path / "m.safetensors", **options)
    assert len(found) == expected
    assert ("head.weight" in found) == ("include_linear" in options)


def test_layer_patterns_without_a_match_are_an_error(net: tuple[nn.Module, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no layer has such a name") as raised:
        masked(net, tmp_path / "m.safetensors", layers=("nothing*",))
    assert "nothing*" in str(raised.value)
    assert not (tmp_path / "m.safetensors").exists()


def test_a_budget_leaves_the_costliest_layers_dense(net: tuple[nn.Module, Any], tmp_path: Path) -> None:
    chosen = MaskOptions(method=MAGNITUDE, keep_dense_budget=20.0)
    found = choose_masks(*net, chosen, tmp_path / "m.safetensors", load_digits())
    dense = [d for d in found.dense if d.reason == "costs_too_much_accuracy"]
    macs = sum(m.macs for m in found.masked) + sum(d.macs for d in dense)
    assert dense
    assert 0 < sum(d.macs for d in dense) <= 0.2 * macs
    assert len(dense) + len(found.masked) == 8
    with pytest.raises(InputError, match="needs images"):
        choose_masks(*net, chosen, tmp_path / "n.safetensors")


def test_learning_starts_from_given_masks(net: tuple[nn.Module, Any], tmp_path: Path) -> None:
    """At a learning rate near zero, the result is the given masks, for the given layers only."""
    weights = net[0].state_dict()
    given = {}
    for name in ("blocks.1.conv1.weight", "blocks.2.conv2.weight"):
        given[name] = magnitude_mask(weights[name].numpy()[:, ::-1].copy(), TWO_FOUR)[:, ::-1].copy()
    given["blocks.1.conv1.weight"] = np.roll(given["blocks.1.conv1.weight"], 1, axis=0)
    safetensors.numpy.save_file(given, tmp_path / "init.safetensors")
    learn = dataclasses.replace(QUICK, lr=1e-12, noise_start=0.0, init_margin=1000.0)
    options = MaskOptions(method=LEARNED, learn=learn)
    choose_masks(*net, options, tmp_path / "m.safetensors", load_digits(), init=tmp_path / "init.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    assert found.keys() == given.keys()
    assert all(np.array_equal(found[name], given[name]) for name in given)


def test_given_masks_of_another_model_are_refused(net: tuple[nn.Module, Any], tmp_path: Path) -> None:
    safetensors.numpy.save_file({"unknown.weight": np.ones((4, 4), np.bool_)}, tmp_path / "init.safetensors")
    with pytest.raises(InputError, match="another model"):
        choose_masks(
            *net,
            MaskOptions(method=LEARNED, learn=QUICK),
            tmp_path / "m.safetensors",
            load_digits(),
            init=tmp_path / "init.safetensors",
        )


def test_the_learners_checkpoint_is_deleted_once_the_masks_are_written(
    net: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    files = LearnerFiles(tmp_path / "state", log_dir=tmp_path / "log")
    choose_masks(*net, MaskOptions(method=LEARNED, learn=QUICK), tmp_path / "m.safetensors", load_digits(), files=files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "m.safetensors"]
    assert (tmp_path / "log" / "learning.csv").is_file()


@pytest.mark.parametrize("device", ["tpu", "cuda:7"])
def test_an_unknown_device_is_refused(device: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    ran = cli("mask", "digits_resnet", "--device", device, "-o", tmp_path / "m.safetensors")
    assert ran.code == 3
    assert f"unknown device {device!r}" in ran.err


def test_a_missing_gpu_is_an_error(cli: Callable[..., Any], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = cli("mask", "digits_resnet", "--device", "cuda", "-o", tmp_path / "m.safetensors")
    assert ran.code == 3
    assert "error: PyTorch finds no GPU" in ran.err


@pytest.fixture(scope="module")
def layerwise(net: tuple[nn.Module, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray[Any, Any]]:
    return masked(net, tmp_path_factory.mktemp("masks") / "m.safetensors", method=LAYERWISE, images=200)


def test_layerwise_masks_change_every_layers_outputs_less_than_magnitude_masks(
    net: tuple[nn.Module, Any], layerwise: dict[str, np.ndarray[Any, Any]]
) -> None:
    module, provenance = net
    layers = [layer for layer in trace_layers(module, provenance.preprocessing)[0] if layer.name in layerwise]
    assert len(layers) == 8
    # On images that were not used to choose the masks.
    select = load_digits().select
    for layer, moment in second_moments(module, layers, provenance.preprocessing, select, MomentOptions()):
        weight = module.state_dict()[layer.name].numpy()
        layerwise_error, magnitude_error = (
            output_error(np.where(mask, 0, weight), moment.effective).sum()
            for mask in (layerwise[layer.name], magnitude_mask(weight, TWO_FOUR))
        )
        assert layerwise_error < magnitude_error, layer.name


def test_learned_masks_may_start_from_layerwise_ones(
    net: tuple[nn.Module, Any], layerwise: dict[str, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    """At a learning rate near zero, the result is the start masks, and the gates prefer them from the first step."""
    learn = dataclasses.replace(QUICK, lr=1e-12, noise_start=0.0, init_margin=1000.0)
    options = MaskOptions(method=LEARNED, init_method=LAYERWISE, images=200, few_images=False, learn=learn)
    out = tmp_path / "m.safetensors"
    choose_masks(*net, options, out, load_digits(), files=LearnerFiles(log_dir=tmp_path / "log"))
    found = safetensors.numpy.load_file(out)
    assert found.keys() == layerwise.keys()
    assert all(np.array_equal(found[name], layerwise[name]) for name in layerwise)
    rows = list(csv.DictReader((tmp_path / "log" / "learning.csv").read_text().splitlines()))
    assert [float(row["moved"]) for row in rows] == [0.0] * len(rows)
    assert rows


class Functional(nn.Module):
    """Uses the weight of a layer that it does not call, and calls another one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.used, self.called = (nn.Conv2d(c, 8, 3, padding=1) for c in (1, 8, 8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(nn.functional.conv2d(torch.relu(self.stem(x)), self.used.weight, padding=1))
        return self.head(self.called(x).mean((2, 3)))


def test_layers_whose_inputs_cannot_be_observed_start_from_magnitude_masks(
    net: tuple[nn.Module, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    module, out = Functional().eval(), tmp_path / "m.safetensors"
    learn = dataclasses.replace(QUICK, lr=1e-12, noise_start=0.0, init_margin=1000.0)
    options = MaskOptions(method=LEARNED, init_method=LAYERWISE, images=200, learn=learn)
    with caplog.at_level("INFO", logger="maskplan"):
        choose_masks(module, net[1], options, out, load_digits())
    assert "1 layers start from magnitude masks: used.weight" in caplog.text
    found = safetensors.numpy.load_file(out)
    magnitude = {name: magnitude_mask(module.state_dict()[name].numpy(), TWO_FOUR) for name in found}
    assert [name for name in sorted(found) if not np.array_equal(found[name], magnitude[name])] == ["called.weight"]


def test_learning_starts_from_magnitude_masks_where_there_are_no_layerwise_ones(
    net: tuple[nn.Module, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise InputError("the inputs of 1 layers cannot be used", found="a layer")

    monkeypatch.setattr(mask_module, "layerwise_masks", refuse)
    learn = dataclasses.replace(QUICK, lr=1e-12, noise_start=0.0, init_margin=1000.0)
    options, out = MaskOptions(method=LEARNED, init_method=LAYERWISE, learn=learn), tmp_path / "m.safetensors"
    choose_masks(*net, options, out, load_digits())
    assert "learning starts from magnitude masks" in caplog.text
    found, state = safetensors.numpy.load_file(out), net[0].state_dict()
    assert all(np.array_equal(mask, magnitude_mask(state[name].numpy(), TWO_FOUR)) for name, mask in found.items())


def test_transposable_masks_hold_along_both_axes(net: tuple[nn.Module, Any], tmp_path: Path) -> None:
    found = masked(net, tmp_path / "m.safetensors", method=TRANSPOSABLE, include_linear=True)
    assert "head.weight" not in found, "ten outputs are not a multiple of four"
    assert len(found) == 8
    assert all(transposed_violations(mask, TWO_FOUR) == (0, 0) for mask in found.values())


@pytest.mark.parametrize("method", ["layerwise", "transposable"])
def test_masks_of_every_method_conform_after_bake_and_export(
    method: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    masks, sparse, model = (tmp_path / name for name in ("m.safetensors", "s.safetensors", "s.onnx"))
    assert cli("mask", "digits_resnet", "--method", method, "-o", masks).code == 0
    assert cli("bake", "digits_resnet", "--masks", masks, "-o", sparse).code == 0
    assert cli("export", "digits_resnet", "--weights", sparse, "-o", model).code == 0
    checked = cli("check", model, "--masks", masks)
    assert checked.code == 0, checked.err
    transposed = {
        name: np.ascontiguousarray(np.swapaxes(weight, 0, 1))
        for name, weight in safetensors.numpy.load_file(sparse).items()
        if name in safetensors.numpy.load_file(masks)
    }
    wrong = [name for name, weight in transposed.items() if transposed_violations(weight != 0, TWO_FOUR)[0]]
    assert bool(wrong) == (method == "layerwise")


def test_images_are_recorded_if_the_method_used_them(cli: Callable[..., Any], tmp_path: Path) -> None:
    for method, roles in (("layerwise", ["train", "select"]), ("transposable", []), ("magnitude", [])):
        out, report = tmp_path / f"{method}.safetensors", tmp_path / f"{method}.json"
        assert cli("mask", "digits_resnet", "--method", method, "-o", out, "--report", report).code == 0
        values = json.loads(report.read_text())
        assert values["method"] == method
        assert [images["role"] for images in values["image_sets"]] == roles


@pytest.mark.parametrize("options", [{"method": LAYERWISE}, {"method": LEARNED, "init_method": LAYERWISE}])
def test_methods_that_need_images_are_refused_without(
    options: dict[str, Any], net: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="masks need images"):
        choose_masks(*net, MaskOptions(**options), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [LAYERWISE, TRANSPOSABLE])
def test_masks_along_c_refuse_the_flat_layout(method: str, net: tuple[nn.Module, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chosen along C only"):
        masked(net, tmp_path / "m.safetensors", method=method, layout="flat")
    assert not list(tmp_path.iterdir())


def test_invalid_options_are_refused() -> None:
    with pytest.raises(InputError, match="unknown init_method"):
        MaskOptions(init_method="random")
    with pytest.raises(InputError, match="images is 0"):
        MaskOptions(images=0)


def test_an_interrupted_command_continues_with_resume(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.toml").write_text("[learn]\nepochs = 4\nbatch = 256\n")
    command = ("mask", "digits_resnet", "--recipe", tmp_path / "r.toml", "-o")
    assert cli(*command, tmp_path / "whole.safetensors").code == 0
    from maskplan.pipeline.learning import learner
    from maskplan.pipeline.learning.schedule import training_batches

    def interrupted(*arguments: Any, **named: Any) -> Any:
        for i, batch in enumerate(training_batches(*arguments, **named)):
            if i == 7:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    out = tmp_path / "m.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(learner, "training_batches", interrupted)
        ran = cli(*command, out)
    assert ran.code == 130
    assert not out.exists()
    assert (tmp_path / "m.safetensors.learning").is_file()
    ran = cli(*command, out, "--resume")
    assert ran.code == 0
    assert "resuming from step 8" in ran.err
    a, b = (safetensors.numpy.load_file(p) for p in (out, tmp_path / "whole.safetensors"))
    assert all(np.array_equal(a[name], b[name]) for name in b)
    assert not (tmp_path / "m.safetensors.learning").exists()


@pytest.mark.slow
def test_processes_of_torchrun_write_one_mask_file_and_one_of_them_logs(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[learn]\nepochs = 1\nbatch = 128\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        "-m",
        "maskplan.pipeline",
        "mask",
        "digits_resnet",
        "--device",
        "cpu",
        "--recipe",
        "r.toml",
        "-o",
        "m.safetensors",
    ]
    done = subprocess.run([*launcher, *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("masks (learned) for 8 layers") == 1
    assert done.stderr.count("epoch 1/1:") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "r.toml"]
