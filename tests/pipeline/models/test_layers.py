"""What one forward pass tells of a module's layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from maskplan.pipeline.core.artifacts import Layer, Preprocessing, TensorSpec
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.layers import sample_input, trace_layers
from maskplan.pipeline.models.registry import build_model

HOW = Preprocessing(3, 8, 10, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)


class Chain(nn.Module):
    """A module around a function of itself."""

    def __init__(self, forward: Callable[[Chain, torch.Tensor], object], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x: torch.Tensor) -> object:
        return self.run(self, x)


def counted(module: nn.Module, preprocessing: Preprocessing = HOW) -> int:
    """Multiply-accumulates of one image, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(sample_input(preprocessing, 1))
    return counter.get_total_flops() // 2


def test_the_tiny_model_is_described_layer_by_layer(tiny_spec: str) -> None:
    built = build_model(tiny_spec, seed=0)
    layers, outputs = trace_layers(built.module, built.preprocessing)
    assert outputs == (TensorSpec("logits", "float32", (None, 3)),)
    assert layers == (
        Layer("stem.weight", "Conv", (8, 3, 3, 3), 1, 0, 64 * 8 * 27),
        Layer("wide.weight", "Conv", (12, 8, 3, 3), 1, 1, 64 * 12 * 72),
        Layer("depthwise.weight", "Conv", (12, 1, 3, 3), 12, 2, 64 * 12 * 9),
        Layer("narrow.weight", "Conv", (6, 12, 1, 1), 1, 3, 64 * 6 * 12),
        Layer("odd.weight", "Conv", (8, 6, 1, 1), 1, 4, 64 * 8 * 6),
        Layer("head.weight", "Gemm", (3, 8), 1, 5, 3 * 8),
    )


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_the_cost_of_a_torchvision_model_is_what_torch_counts(name: str) -> None:
    built = build_model(name, seed=0)
    layers, outputs = trace_layers(built.module, built.preprocessing)
    assert sum(layer.macs for layer in layers) == counted(built.module, built.preprocessing)
    assert outputs[0].shape == (None, 1000)
    names = {f"{n}.weight" for n, m in built.module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {layer.name for layer in layers} == names


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (3, 2)])
def test_the_cost_of_a_transposed_convolution_is_what_torch_counts(stride: int, groups: int) -> None:
    module = Chain(
        lambda m, x: m.up(m.stem(x)).mean((2, 3)),
        stem=nn.Conv2d(3, 8, 1),
        up=nn.ConvTranspose2d(8, 4, 3, stride, groups=groups),
    )
    (_, up), outputs = trace_layers(module, HOW)
    assert (up.op, up.shape, up.groups) == ("ConvTranspose", (8, 4 // groups, 3, 3), groups)
    assert outputs[0].shape == (None, 4)
    assert up.macs == counted(module) - 80 * 8 * 3


def test_positions_follow_use_not_definition() -> None:
    module = Chain(lambda m, x: m.first(m.second(x)).mean((2, 3)), first=nn.Conv2d(4, 5, 1), second=nn.Conv2d(3, 4, 1))
    layers, _ = trace_layers(module, HOW)
    assert [(layer.name, layer.position) for layer in layers] == [("first.weight", 1), ("second.weight", 0)]


def test_a_layer_that_is_not_used_has_no_position_and_no_cost() -> None:
    module = Chain(lambda m, x: m.used(x).mean((2, 3)), used=nn.Conv2d(3, 4, 1), spare=nn.Linear(4, 4))
    layers, _ = trace_layers(module, HOW)
    assert layers[1] == Layer("spare.weight", "Gemm", (4, 4), 1, None, 0)


def test_a_layer_used_twice_keeps_its_first_position_and_costs_twice() -> None:
    module = Chain(lambda m, x: m.again(m.again(x)).mean((2, 3)), again=nn.Conv2d(3, 3, 1))
    (again,), _ = trace_layers(module, HOW)
    assert (again.position, again.macs) == (0, 2 * 80 * 9)


def test_a_bare_layer_is_named_weight() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(240, 2))
    assert trace_layers(flat, HOW)[0] == (Layer("1.weight", "Gemm", (2, 240), 1, 0, 480),)

    class Bare(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(1))

    assert trace_layers(Bare(240, 2), HOW)[0] == (Layer("weight", "Gemm", (2, 240), 1, 0, 480),)


def test_the_survey_leaves_no_trace() -> None:
    module = Chain(lambda m, x: m.bn(m.conv(x)).mean((2, 3)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    trace_layers(module.train(), HOW)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert not any(m._forward_hooks for m in module.modules())
    assert not module.training


def not_on_this_size(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    assert x.shape[-1] == 224, "wrong input size"
    return x


@pytest.mark.parametrize(
    ("forward", "told"),
    [
        (lambda m, x: m.conv(x[:, :2]), "RuntimeError: "),
        (lambda m, x: x.mean((2, 3))[5], "IndexError: "),
        (lambda m, x: m.conv(x, 1, 2, 3), "TypeError: "),
        (not_on_this_size, "AssertionError: wrong input size"),
    ],
    ids=["channels", "index", "arguments", "assertion"],
)
def test_a_model_that_cannot_run_on_its_own_input_is_an_error(
    forward: Callable[[Chain, torch.Tensor], object], told: str
) -> None:
    module = Chain(forward, conv=nn.Conv2d(3, 4, 1))
    with pytest.raises(InputError, match="cannot run on its own input") as raised:
        trace_layers(module, HOW)
    assert raised.value.where == "input (1, 3, 8, 10)"
    assert str(raised.value.found).startswith(told)
    assert "\n" not in str(raised.value.found)
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: x, [("output", "float32", (None, 3, 8, 10))]),
        (lambda m, x: x.mean(), [("output", "float32", ())]),
        (lambda m, x: {"out": x, "none": None}, [("out", "float32", (None, 3, 8, 10))]),
        (
            lambda m, x: (x.flatten(1), x.argmax(1), x[0, 0]),
            [("output0", "float32", (None, 240)), ("output1", "int64", (None, 8, 10)), ("output2", "float32", (8, 10))],
        ),
        (lambda m, x: x.reshape(-1, 3), [("logits", "float32", (None, 3))]),
    ],
    ids=["image", "scalar", "dict", "tuple", "rows of all images"],
)
def test_outputs_of_any_kind_are_recorded_with_the_axes_that_grow_with_the_batch(
    forward: Callable[[Chain, torch.Tensor], object], expected: list[tuple[str, str, tuple[int | None, ...]]]
) -> None:
    _, outputs = trace_layers(Chain(forward), HOW)
    assert [(o.name, o.dtype, o.shape) for o in outputs] == expected


@pytest.mark.parametrize(
    ("forward", "found"), [(lambda m, x: None, "NoneType"), (lambda m, x: {"a": x.device}, "device")]
)
def test_what_returns_no_tensors_is_an_error(forward: Callable[[Chain, torch.Tensor], object], found: str) -> None:
    with pytest.raises(InputError, match="does not return tensors") as raised:
        trace_layers(Chain(forward), HOW)
    assert found in str(raised.value.found)


def test_sample_input_is_seeded_noise_of_the_inputs_shape() -> None:
    first, again, other = sample_input(HOW, 4), sample_input(HOW, 4), sample_input(HOW, 4, seed=1)
    assert first.shape == (4, 3, 8, 10)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(float(first.mean())) < 0.2
    assert 0.8 < float(first.std()) < 1.2


def test_sample_input_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample_input(HOW, 2)
    assert torch.equal(torch.rand(3), expected)
