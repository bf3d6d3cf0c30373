"""The permute stage and its command: the same function, more kept, done again to newer weights; and what is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.masking.magnitude import magnitude_mask
from maskplan.pipeline.masking.patterns import parse_pattern
from maskplan.pipeline.masking.policy import LayerPolicy, select_layers
from maskplan.pipeline.models.checkpoint import read_checkpoint
from maskplan.pipeline.models.layers import sample_input, trace_layers
from maskplan.pipeline.models.registry import build_model
from maskplan.pipeline.models.state_dict import read_weights, tensors_sha256
from maskplan.pipeline.permutation.groups import UnexportableError
from maskplan.pipeline.permutation.permute import PermuteOptions, repermute
from maskplan.pipeline.permutation.record import AS_GIVEN, FIXED, MOVED, UNREAD, Permuted, read_permutation
from tests.support.permuted_nets import PREPROCESSING, PROVENANCE, Net, Shared, loaded, run, trained


def outputs(module: nn.Module, preprocessing: Preprocessing = PREPROCESSING) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(module).double().eval()(sample_input(preprocessing, 3, seed=9).double())  # type: ignore[no-any-return]


def kept(module: nn.Module, pattern: str = "2:4", preprocessing: Preprocessing = PREPROCESSING) -> float:
    """What magnitude masks of the usual layers keep, by the mask stage's own function."""
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    masked = select_layers(trace_layers(module, preprocessing)[0], parse_pattern(pattern)).masked
    masks = {layer.name: magnitude_mask(state[layer.name], parse_pattern(pattern)) for layer in masked}
    return float(sum(np.abs(state[name]).sum(where=mask, dtype=np.float64) for name, mask in masks.items()))


def gained(done: Permuted) -> float:
    return sum(group.kept_after - group.kept_before for group in done.permutation.groups)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2"])
def test_outputs_are_unchanged_and_masks_keep_more(pattern: str, tmp_path: Path) -> None:
    module = trained()
    before = copy.deepcopy(module.state_dict())
    done = run(module, tmp_path, pattern)
    after = loaded(module, done)
    torch.testing.assert_close(outputs(after), outputs(module), rtol=1e-9, atol=1e-9)
    assert done.kept_before == pytest.approx(kept(module, pattern))
    assert done.kept_after == pytest.approx(kept(after, pattern))
    assert done.kept_before < done.kept_after < done.kept_bound
    # Gains of groups and of the whole are the same ones.
    assert gained(done) == pytest.approx(done.kept_after - done.kept_before, rel=1e-3)
    assert 0 < done.efficacy < 100
    # The given module is as it was.
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_every_tensor_keeps_its_values(tmp_path: Path) -> None:
    module = trained()
    after = loaded(module, run(module, tmp_path)).state_dict()
    for name, tensor in module.state_dict().items():
        assert torch.equal(after[name].flatten().sort()[0], tensor.flatten().sort()[0]), name


def test_each_group_records_its_state(tmp_path: Path) -> None:
    done = run(trained(), tmp_path)
    groups = {group.name: group for group in done.permutation.groups if group.state != FIXED}
    fixed = {(group.name, group.channels): group.reason for group in done.permutation.groups if group.state == FIXED}
    assert groups["one"].state == groups["stem"].state == MOVED
    assert groups["one"].readers == ("two.weight",)
    assert groups["one"].efficacy is not None
    # The stream, which `wide` reads from its sixth column on; what a grouped convolution makes moves within its groups.
    assert set(groups["stem"].readers) == {"one.weight", "few.weight", "wide.weight"}
    assert groups["grouped"].channels == groups["grouped#2"].channels == 3
    assert fixed == {
        ("stem", 3): "it is an input of the network",
        ("few", 6): "a grouped convolution reads it",
        ("grouped", 3): "a grouped convolution reads it",
        ("head", 5): "it is an output of the network",
    }
    assert groups["wide"] == replace(groups["wide"], channels=8, state=UNREAD, readers=(), kept_before=0, kept_after=0)
    states = {group.state for group in done.permutation.groups}
    assert states <= {MOVED, AS_GIVEN, UNREAD, FIXED}
    assert all((group.reason is None) == (group.state == MOVED) for group in done.permutation.groups)
    assert all(g.kept_after > g.kept_before > 0 for g in done.permutation.groups if g.state == MOVED)


def test_groups_that_share_quadruples_gain_too(tmp_path: Path) -> None:
    module = trained(build=Shared)
    done = run(module, tmp_path)
    found = {g.name: g for g in done.permutation.groups if g.readers == ("three.weight",)}
    assert set(found) == {"one", "two"}
    assert all(g.state == MOVED and g.efficacy is None for g in found.values())
    assert gained(done) == pytest.approx(done.kept_after - done.kept_before, rel=1e-4)
    torch.testing.assert_close(outputs(loaded(module, done)), outputs(module), rtol=1e-9, atol=1e-9)


class Turned(nn.Module):
    """What `one` makes is read in three orders, whose quadruples differ, and flattened by the head."""

    def __init__(self, orders: int) -> None:
        super().__init__()
        self.one, self.orders = nn.Conv2d(3, 16, 1), orders
        self.readers = nn.ModuleList([nn.Conv2d(16, 8, 1) for _ in range(3)])
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.one(nn.functional.adaptive_avg_pool2d(x, 4)))
        turned = (x.flip(1), x, x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2))[: self.orders]
        found = sum(reader(each) for reader, each in zip(self.readers, turned, strict=False))
        return self.head(torch.relu(found).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("orders", [1, 2, 3])
def test_channels_read_in_different_orders_gain(orders: int, tmp_path: Path) -> None:
    """Turned round they fill the same quadruples; shuffled they do not."""
    module = trained(build=lambda: Turned(orders))
    done = run(module, tmp_path)
    (one,) = (group for group in done.permutation.groups if group.name == "one" and group.state != FIXED)
    assert len(one.readers) == orders
    assert one.state == MOVED
    assert (one.efficacy is None) == (orders == 3)
    assert gained(done) == pytest.approx(done.kept_after - done.kept_before, rel=1e-4)
    torch.testing.assert_close(outputs(loaded(module, done)), outputs(module), rtol=1e-9, atol=1e-9)


def test_a_layer_that_reads_channels_flattened_is_no_reader(tmp_path: Path) -> None:
    done = run(trained(build=lambda: Turned(3)), tmp_path, linear=True)
    found = {g.name: g for g in done.permutation.groups if g.state != FIXED}
    assert found["readers.0"].state == UNREAD


def test_without_a_gain_no_permutation_is_recorded(tmp_path: Path) -> None:
    module = trained()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.1)
    module.head.weight.data += torch.randn(module.head.weight.shape)  # type: ignore[operator, union-attr]
    done = run(module, tmp_path)
    assert {group.state for group in done.permutation.groups} <= {AS_GIVEN, UNREAD, FIXED}
    assert done.checkpoint.provenance.permutation is None
    assert done.kept_after == done.kept_before


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    first, second = (run(trained(), tmp_path / name) for name in ("a", "b"))
    assert first.checkpoint.sha256 == second.checkpoint.sha256
    assert first.permutation.sha256 == second.permutation.sha256


def test_a_permutation_is_applied_to_newer_weights(tmp_path: Path) -> None:
    old, new = trained(), trained(seed=1)
    first = run(old, tmp_path)
    again = repermute(new, PROVENANCE, first.permutation.path, LayerPolicy(), tmp_path / "again.safetensors")
    assert again.permutation == first.permutation
    torch.testing.assert_close(outputs(loaded(new, again)), outputs(new), rtol=1e-9, atol=1e-9)
    assert again.kept_before == pytest.approx(kept(new))
    # The very same weights become the very same file.
    same = repermute(old, PROVENANCE, first.permutation.path, LayerPolicy(), tmp_path / "same.safetensors")
    assert same.checkpoint.sha256 == first.checkpoint.sha256


def test_the_file_contains_the_record(tmp_path: Path) -> None:
    done = run(trained(), tmp_path)
    found, moves = read_permutation(done.permutation.path)
    assert found == done.permutation
    assert [m.group.name for m in moves] == [g.name for g in found.groups if g.state == MOVED]
    assert found.weights_sha256 == tensors_sha256(trained().state_dict())
    assert read_checkpoint(done.checkpoint.path).provenance == replace(PROVENANCE, permutation=done.permutation.sha256)


def written(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_an_unexportable_model_writes_nothing(tmp_path: Path) -> None:
    class Choosing(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if float(x.mean()) > -100 else -x)

    with pytest.raises(UnexportableError, match="cannot be permuted"):
        run(trained(build=Choosing), tmp_path)
    assert not written(tmp_path)


def test_weights_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    module = trained()
    with torch.no_grad():
        module.get_parameter("one.weight")[0, 0, 0, 0] = torch.nan
        module.get_parameter("head.bias")[1] = torch.inf
    with pytest.raises(InputError, match=r"2 tensors hold NaN or infinity\n  found: one\.weight, head\.bias"):
        run(module, tmp_path)
    pruned = replace(PROVENANCE, masked=("one.weight",), pattern="2:4")
    with pytest.raises(InputError, match="pruned already"):
        run(trained(), tmp_path, made=pruned)
    assert not written(tmp_path)


def test_a_model_without_a_layer_to_mask_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 10, 1), nn.Linear(10, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.one(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(InputError, match=r"one\.weight \(10, 6, 1, 1\) \(channels_not_multiple_of_4\)"):
        run(trained(build=Odd), tmp_path)
    assert not written(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"effort": 0.0}, "effort"), ({"restarts": 0}, "restarts"), ({"seed": -1}, "seed")],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PermuteOptions(**options)  # type: ignore[arg-type]


def test_a_model_with_another_name_is_reported(cli: Callable[..., Any], tiny_spec: str, tmp_path: Path) -> None:
    order, again = tmp_path / "p.permutation.safetensors", tmp_path / "again.safetensors"
    made = cli("permute", tiny_spec, "-o", tmp_path / "p.safetensors", "--effort", "0.01")
    assert made.code == 0, made.err
    source, _, factory = tiny_spec.rpartition(":")
    other = tmp_path / "other.py"
    other.write_text(Path(source).read_text())
    same = cli("permute", tiny_spec, "--permutation", order, "-o", again)
    assert "the permutation was made for" not in same.err
    ran = cli("permute", f"{other}:{factory}", "--permutation", order, "-o", again)
    assert ran.code == 0, ran.err
    assert re.search(rf"the permutation was made for \w+ and is applied to other_{factory}", ran.err)


class Half(nn.Module):
    """Deep and of another type than its input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 64, 3, padding=1), nn.Linear(64, 5)
        self.layers = nn.ModuleList([nn.Conv2d(64, 64, 3, padding=1) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.to(self.head.weight))
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(x.mean((2, 3))).to(torch.promote_types(torch.float32, x.dtype))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "seed"), [(torch.float16, 0), (torch.bfloat16, 4)])
def test_half_precision_weights_move(kind: torch.dtype, seed: int, tmp_path: Path) -> None:
    """Other orders of summation round otherwise: the second by 2.5e-3 of the largest output."""
    torch.manual_seed(seed)
    module = Half().to(kind).eval()
    done = run(module, tmp_path)
    after = loaded(module, done)
    assert done.kept_after > done.kept_before
    assert after.get_parameter("stem.weight").dtype == kind
    torch.testing.assert_close(outputs(after), outputs(module), rtol=1e-9, atol=1e-9)


def test_channels_last_and_tied_weights_move(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.two
            self.gain = nn.Parameter(torch.rand(16, 1, 1))
            self.same_gain = self.gain

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.stem(x))
            for layer in (self.two, self.again):
                x = x * self.gain + layer(torch.relu(self.bn(self.one(x)))) * self.same_gain
            return self.head(self.wide(torch.cat([self.few(x), x, self.few(x)], 1)).mean((2, 3)))  # type: ignore[no-any-return]

    module = trained(build=Tied).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = copy.deepcopy(module.state_dict())
    done = run(module, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert any(group.state == MOVED for group in done.permutation.groups)
    written = read_weights(done.checkpoint.path)
    assert torch.equal(written["two.weight"], written["again.weight"])
    torch.testing.assert_close(outputs(loaded(module, done)), outputs(module), rtol=1e-9, atol=1e-9)


def test_the_command_permutes_masks_and_applies_again(cli: Callable[..., object], tmp_path: Path) -> None:
    out, report = tmp_path / "p.safetensors", tmp_path / "r.json"
    ran = cli("permute", "digits_resnet", "-o", out, "--effort", "0.01", "--report", report)
    assert ran.code == 0, ran.err
    assert "kept magnitude under 2:4" in ran.out
    assert "10 channels) cannot move: it is an output of the network" in ran.out
    written = json.loads(report.read_text())
    assert written["kept_after"] > written["kept_before"]
    assert {"name", "state", "reason", "efficacy"} <= set(written["permutation"]["groups"][0])
    order = tmp_path / "p.permutation.safetensors"
    again = tmp_path / "again.safetensors"
    ran = cli("permute", "digits_resnet", "--permutation", order, "-o", again)
    assert ran.code == 0, ran.err
    assert again.read_bytes() == out.read_bytes()
    masks = tmp_path / "m.safetensors"
    for command in (
        ("mask", "digits_resnet", "--method", "magnitude", "--weights", out, "-o", masks),
        ("bake", "digits_resnet", "--masks", masks, "--weights", out, "-o", tmp_path / "s.safetensors"),
        ("export", "digits_resnet", "--weights", tmp_path / "s.safetensors", "-o", tmp_path / "s.onnx"),
        ("check", tmp_path / "s.onnx"),
    ):
        ran = cli(*command)
        assert ran.code == 0, ran.err
    ran = cli("permute", "digits_resnet", "--weights", tmp_path / "s.safetensors", "-o", tmp_path / "no.safetensors")
    assert (ran.code, "pruned already" in ran.err) == (3, True)
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "linear"),
    [
        ("resnet18", False),
        ("resnet50", False),
        ("vgg16_bn", False),
        ("shufflenet_v2_x1_0", False),
        ("densenet121", False),
        ("convnext_tiny", False),
        ("convnext_tiny", True),
        ("efficientnet_b0", False),
        ("timm/efficientnet_b0", False),
    ],
)
def test_nine_in_ten_groups_of_each_family_gain(model: str, linear: bool, tmp_path: Path) -> None:
    built = build_model(model, seed=0)
    preprocessing = replace(built.preprocessing, height=64, width=64)
    module = trained(build=lambda: built.module)
    for norm in module.modules():
        # Statistics of noise, so that what an image says reaches the outputs.
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
    with torch.no_grad():
        module(sample_input(preprocessing, 4, seed=3))
    done = run(module, tmp_path, made=replace(PROVENANCE, preprocessing=preprocessing), linear=linear)
    can_gain = [g for g in done.permutation.groups if g.readers]
    assert len(can_gain) >= 3
    assert sum(g.state == MOVED for g in can_gain) >= 0.9 * len(can_gain)
    assert done.kept_after > done.kept_before
    before, after = outputs(module, preprocessing), outputs(loaded(module, done), preprocessing)
    assert (before - after).abs().max() < 1e-6 * (before[0] - before[1]).abs().max()
