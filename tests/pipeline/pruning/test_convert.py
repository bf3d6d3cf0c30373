"""Conversion of checkpoints with zeros anywhere: what is written, what is kept, what is told."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.pipeline.core.artifacts import Pattern, Preprocessing, Provenance
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.dataset import Dataset, batches
from maskplan.pipeline.data.digits import load_digits
from maskplan.pipeline.masking.layerwise import output_error
from maskplan.pipeline.masking.patterns import count_violations
from maskplan.pipeline.masking.policy import select_layers
from maskplan.pipeline.models.batchnorm import RecalibrateOptions
from maskplan.pipeline.models.checkpoint import ModelOptions, open_checkpoint, read_checkpoint
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.state_dict import tensors_sha256
from maskplan.pipeline.pruning.convert import ConversionReport, ConvertOptions, convert
from maskplan.pipeline.pruning.second_moments import MomentOptions, second_moments

TWO_FOUR = Pattern(2, 4)
STATISTICS = RecalibrateOptions(images=500)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_digits()


@pytest.fixture(scope="module")
def source() -> tuple[nn.Module, Provenance]:
    """The digits network without the smaller half of its weights."""
    module, provenance = open_checkpoint(ModelOptions("digits_resnet"))
    with torch.no_grad():
        for layer in select_layers(trace_layers(module, provenance.preprocessing)[0], TWO_FOUR).masked:
            weight = dict(module.named_parameters())[layer.name]
            weight.masked_fill_(weight.abs() <= weight.abs().median(), 0.0)
    return module, provenance


def converted(
    source: tuple[nn.Module, Provenance], data: Dataset, out: Path, **options: Any
) -> tuple[dict[str, torch.Tensor], ConversionReport]:
    checkpoint, report = convert(*source, data, ConvertOptions(images=300, **options), STATISTICS, out)
    assert read_checkpoint(out) == checkpoint
    return safetensors.torch.load_file(out), report


def test_without_update_what_is_not_dropped_stays_to_the_bit(
    source: tuple[nn.Module, Provenance], data: Dataset, tmp_path: Path
) -> None:
    before = tensors_sha256(source[0].state_dict())
    state, report = converted(source, data, tmp_path / "c.safetensors", update=False)
    assert tensors_sha256(source[0].state_dict()) == before
    own = source[0].state_dict()
    names = {layer.name for layer in report.layers}
    assert len(names) == 8
    for layer in report.layers:
        old, new = own[layer.name].numpy(), state[layer.name].numpy()
        assert count_violations(new != 0, TWO_FOUR) == 0
        assert np.array_equal(new[new != 0], old[new != 0])
        assert layer.zeros == pytest.approx(50, abs=0.5)
        assert layer.dropped == pytest.approx(100 * ((old != 0) & (new == 0)).sum() / (old != 0).sum())
        # Of independent zeros, groups of four have 3/8 of a weight too many: 18.75% of those that are left.
        assert 10 < layer.dropped < 30
        assert layer.updated_error is None
    same = [name for name in own if name not in names and "running" not in name and "num_batches" not in name]
    assert all(torch.equal(own[name], state[name]) for name in same)
    assert not torch.equal(own["bn.running_mean"], state["bn.running_mean"])


def test_the_update_gives_outputs_back(source: tuple[nn.Module, Provenance], data: Dataset, tmp_path: Path) -> None:
    state, report = converted(source, data, tmp_path / "c.safetensors")
    module, provenance = source
    layers = [x for x in trace_layers(module, provenance.preprocessing)[0] if x.name in {y.name for y in report.layers}]
    told = {layer.name: layer for layer in report.layers}
    # On images that nothing was fitted to.
    for layer, found in second_moments(module, layers, provenance.preprocessing, data.select, MomentOptions()):
        old, new = module.state_dict()[layer.name].numpy(), state[layer.name].numpy()
        assert count_violations(new != 0, TWO_FOUR) == 0
        fitted = output_error(old - new, found.effective).sum()
        pruned = output_error(np.where(new != 0, 0, old), found.effective).sum()
        assert fitted < pruned, layer.name
        updated = told[layer.name].updated_error
        assert updated is not None
        assert updated < told[layer.name].error
    assert report.select_top1_converted > 80
    assert report.select_top1_source > 80


def test_a_checkpoint_that_is_2to4_already_is_not_changed(
    source: tuple[nn.Module, Provenance], data: Dataset, tmp_path: Path
) -> None:
    once, _ = converted(source, data, tmp_path / "once.safetensors", update=False)
    module = copy.deepcopy(source[0])
    module.load_state_dict(once)
    twice, report = converted((module, source[1]), data, tmp_path / "twice.safetensors")
    for layer in report.layers:
        # A zero may be dropped, or kept and then fitted; nothing that is there may go.
        assert layer.dropped == 0
        assert layer.error == 0
        assert torch.allclose(once[layer.name], twice[layer.name], atol=1e-5)


def test_the_record_says_what_was_done(source: tuple[nn.Module, Provenance], data: Dataset, tmp_path: Path) -> None:
    _, report = converted(source, data, tmp_path / "a.safetensors")
    made = read_checkpoint(tmp_path / "a.safetensors").provenance
    assert (made.pattern, made.layout, made.method) == ("2:4", "channel", "converted, updated")
    assert set(made.masked) == {layer.name for layer in report.layers}
    assert made.recalibrated_images == report.recalibrated_images > 0
    assert report.select_images == len(data.select)
    converted(source, data, tmp_path / "b.safetensors", update=False, pattern="1:4", layers=("blocks.2.*",))
    made = read_checkpoint(tmp_path / "b.safetensors").provenance
    assert (made.pattern, made.method, len(made.masked)) == ("1:4", "converted", 3)


def test_without_a_norm_a_bias_takes_the_mean_error_up(data: Dataset, tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.relu(self.conv(F.relu(self.stem(x)))).mean((2, 3)))

    torch.manual_seed(0)
    module = Plain().eval()
    with torch.no_grad():
        module.stem.bias += 0.5
    how = Preprocessing(1, 8, 8, 0, "bilinear", (0.5,), (0.5,))
    provenance = Provenance("plain", True, "w", "ab", 10, (), how)
    outputs = []
    # Those that it is converted on.
    ((x, _),) = batches(data.train.sample(300, 0), how, 300)
    images = torch.from_numpy(x)
    for update in (False, True):
        state, report = converted((module, provenance), data, tmp_path / "c.safetensors", update=update)
        assert report.recalibrated_images == 0
        other = copy.deepcopy(module)
        other.load_state_dict(state)
        assert torch.equal(other.conv.bias, module.conv.bias) == (not update)
        with torch.no_grad():
            seen = F.relu(module.stem(images))
            outputs.append((other.conv(seen) - module.conv(seen)).mean((0, 2, 3)).abs().max())
    assert outputs[1] < 1e-3 * outputs[0]


def test_nothing_is_written_for_weights_that_are_not_numbers(
    source: tuple[nn.Module, Provenance], data: Dataset, tmp_path: Path
) -> None:
    module = copy.deepcopy(source[0])
    with torch.no_grad():
        dict(module.named_parameters())["blocks.1.conv1.weight"][0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or infinity"):
        convert(module, source[1], data, ConvertOptions(), STATISTICS, tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pattern": "5:4"}, "not an N:M pattern"), ({"images": 0}, "images is 0"), ({"damping": -1.0}, "damping is -1")],
)
def test_options_that_mean_nothing_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConvertOptions(**options)


def test_the_command_converts_and_what_it_writes_conforms(
    source: tuple[nn.Module, Provenance], cli: Callable[..., Any], tmp_path: Path
) -> None:
    torch.save(source[0].state_dict(), tmp_path / "half.pth")
    out, report, model = (tmp_path / name for name in ("c.safetensors", "r.json", "c.onnx"))
    ran = cli("convert", "digits_resnet", "--weights", tmp_path / "half.pth", "-o", out, "--report", report)
    assert ran.code == 0, ran.err
    assert "2:4 on 8 layers" in ran.out
    assert "after the update" in ran.out
    told = json.loads(report.read_text())
    assert told["updated"]
    assert len(told["layers"]) == 8
    assert cli("export", "digits_resnet", "--weights", out, "-o", model).code == 0
    verdict = check_2to4(model, CheckOptions())
    assert verdict.passed
    assert verdict.conforming == 8
    bare = cli("convert", "digits_resnet", "--weights", tmp_path / "half.pth", "--no-update", "-o", out)
    assert bare.code == 0
    assert "after the update" not in bare.out


def test_the_command_needs_images_and_layers_that_fit(cli: Callable[..., Any], tmp_path: Path, tiny_spec: str) -> None:
    out = tmp_path / "c.safetensors"
    ran = cli("convert", tiny_spec, "--weights", "random", "-o", out)
    assert ran.code == 3
    assert "conversion needs images" in ran.err
    ran = cli("convert", "digits_resnet", "--pattern", "2:63", "-o", out)
    assert ran.code == 3
    assert "no layer of the model can be masked 2:63" in ran.err
    assert not out.exists()
