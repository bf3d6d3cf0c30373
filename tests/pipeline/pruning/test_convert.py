"""Conversion of unstructured sparse checkpoints: what is written, kept and reported."""

from __future__ import annotations

import copy
import dataclasses
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
    """The digits network with the smaller half of each maskable weight set to zero."""
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


@dataclasses.dataclass(frozen=True)
class Converted:
    """A conversion that tests share; do not change it."""

    state: dict[str, torch.Tensor]
    report: ConversionReport
    provenance: Provenance
    source_unchanged: bool


def shared(source: tuple[nn.Module, Provenance], data: Dataset, out: Path, **options: Any) -> Converted:
    before = tensors_sha256(source[0].state_dict())
    state, report = converted(source, data, out, **options)
    unchanged = tensors_sha256(source[0].state_dict()) == before
    return Converted(state, report, read_checkpoint(out).provenance, unchanged)


@pytest.fixture(scope="module")
def updated(source: tuple[nn.Module, Provenance], data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return shared(source, data, tmp_path_factory.mktemp("updated") / "c.safetensors")


@pytest.fixture(scope="module")
def not_updated(
    source: tuple[nn.Module, Provenance], data: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    return shared(source, data, tmp_path_factory.mktemp("not_updated") / "c.safetensors", update=False)


def test_without_update_kept_weights_are_bit_identical(
    source: tuple[nn.Module, Provenance], not_updated: Converted
) -> None:
    state, report = not_updated.state, not_updated.report
    assert not_updated.source_unchanged
    own = source[0].state_dict()
    names = {layer.name for layer in report.layers}
    assert len(names) == 8
    for layer in report.layers:
        old, new = own[layer.name].numpy(), state[layer.name].numpy()
        assert count_violations(new != 0, TWO_FOUR) == 0
        assert np.array_equal(new[new != 0], old[new != 0])
        assert layer.zeros == pytest.approx(50, abs=0.5)
        assert layer.dropped == pytest.approx(100 * ((old != 0) & (new == 0)).sum() / (old != 0).sum())
        # With independent zeros, a group of four has 3/8 of a non-zero too many on average: 18.75% of the non-zeros.
        assert 10 < layer.dropped < 30
        assert layer.updated_error is None
    same = [name for name in own if name not in names and "running" not in name and "num_batches" not in name]
    assert all(torch.equal(own[name], state[name]) for name in same)
    changed = {name for name in own if "running" in name and not torch.equal(own[name], state[name])}
    # The BatchNorm of the stem, which is not converted, sees what it saw before.
    assert not changed & {"bn.running_mean", "bn.running_var"}
    assert len(changed) > len(names)


def test_the_update_reduces_the_change_of_outputs(
    source: tuple[nn.Module, Provenance], data: Dataset, updated: Converted
) -> None:
    state, report = updated.state, updated.report
    assert updated.source_unchanged
    module, provenance = source
    layers = [x for x in trace_layers(module, provenance.preprocessing)[0] if x.name in {y.name for y in report.layers}]
    reported = {layer.name: layer for layer in report.layers}
    # On images that nothing was fitted to.
    for layer, moment in second_moments(module, layers, provenance.preprocessing, data.select, MomentOptions()):
        old, new = module.state_dict()[layer.name].numpy(), state[layer.name].numpy()
        assert count_violations(new != 0, TWO_FOUR) == 0
        fitted = output_error(old - new, moment.effective).sum()
        pruned = output_error(np.where(new != 0, 0, old), moment.effective).sum()
        assert fitted < pruned, layer.name
        updated_error = reported[layer.name].updated_error
        assert updated_error is not None
        assert updated_error < reported[layer.name].error
    assert report.select_top1_converted > 80
    assert report.select_top1_source > 80


def test_a_checkpoint_that_is_2to4_already_is_not_changed(
    source: tuple[nn.Module, Provenance], data: Dataset, not_updated: Converted, tmp_path: Path
) -> None:
    once = not_updated.state
    module = copy.deepcopy(source[0])
    module.load_state_dict(once)
    twice, report = converted((module, source[1]), data, tmp_path / "twice.safetensors")
    for layer in report.layers:
        # A zero may be dropped, or kept and then fitted; no non-zero may be dropped.
        assert layer.dropped == 0
        assert layer.error == 0
        assert torch.allclose(once[layer.name], twice[layer.name], atol=1e-5)


def test_provenance_and_report_record_the_conversion(
    source: tuple[nn.Module, Provenance], data: Dataset, updated: Converted, tmp_path: Path
) -> None:
    record, report = updated.provenance, updated.report
    assert (record.pattern, record.layout, record.method) == ("2:4", "channel", "converted, updated")
    assert set(record.masked) == {layer.name for layer in report.layers}
    assert record.recalibrated_images == report.recalibrated_images > 0
    assert report.select_images == len(data.select)
    converted(source, data, tmp_path / "b.safetensors", update=False, pattern="1:4", layers=("blocks.2.*",))
    record = read_checkpoint(tmp_path / "b.safetensors").provenance
    assert (record.pattern, record.method, len(record.masked)) == ("1:4", "converted", 3)


def test_both_accuracies_are_those_on_select(
    source: tuple[nn.Module, Provenance], data: Dataset, updated: Converted
) -> None:
    module, provenance = source
    other = copy.deepcopy(module)
    other.load_state_dict(updated.state)
    ((x, labels),) = batches(data.select, provenance.preprocessing, len(data.select))
    with torch.no_grad():
        right = [(net(torch.from_numpy(x)).argmax(1).numpy() == labels).mean() for net in (module.eval(), other.eval())]
    assert [updated.report.select_top1_source, updated.report.select_top1_converted] == pytest.approx(
        [100 * share for share in right]
    )


def test_without_batchnorm_a_bias_absorbs_the_mean_error(data: Dataset, tmp_path: Path) -> None:
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
    # The images of the conversion.
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


def test_nothing_is_written_if_weights_are_not_finite(
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
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConvertOptions(**options)


def test_the_command_writes_a_conforming_checkpoint(
    source: tuple[nn.Module, Provenance], cli: Callable[..., Any], tmp_path: Path
) -> None:
    torch.save(source[0].state_dict(), tmp_path / "half.pth")
    out, report, model = (tmp_path / name for name in ("c.safetensors", "r.json", "c.onnx"))
    ran = cli("convert", "digits_resnet", "--weights", tmp_path / "half.pth", "-o", out, "--report", report)
    assert ran.code == 0, ran.err
    assert "2:4 on 8 layers" in ran.out
    assert "after the update" in ran.out
    values = json.loads(report.read_text())
    assert values["updated"]
    assert len(values["layers"]) == 8
    assert cli("export", "digits_resnet", "--weights", out, "-o", model).code == 0
    verdict = check_2to4(model, CheckOptions())
    assert verdict.passed
    assert verdict.conforming == 8
    bare = cli(
        "convert",
        "digits_resnet",
        "--weights",
        tmp_path / "half.pth",
        "--no-update",
        "--layers",
        "head*",
        "--include-linear",
        "-o",
        out,
    )
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
