"""What factories return is made usable, or refused for its true reason."""

from __future__ import annotations

import logging
from typing import Any

import odd_modules
import pytest
import torch
from torch import nn

from maskplan.pipeline.core.artifacts import Preprocessing
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.models.factory_modules import prepare_module
from maskplan.pipeline.models.layers import sample_input, trace_layers

# TorchScript and eager quantization are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

HOW = Preprocessing(3, 16, 16, 0, "bilinear", (0.5,) * 3, (0.25,) * 3)
RAN: dict[str, Any] = {}
exec(odd_modules.SOURCE, RAN)
X = sample_input(HOW, 2)


def prepared(name: str) -> nn.Module:
    torch.manual_seed(0)
    return prepare_module(RAN[name](), HOW, name)


@pytest.mark.parametrize("name", ["data_parallel", "data_parallel_part", "compiled", "averaged"])
def test_wrappers_are_removed(name: str) -> None:
    module = prepared(name)
    assert list(module.state_dict()) == list(RAN["plain"]().state_dict())
    assert torch.equal(module(X), prepared("plain")(X))


def test_a_network_held_as_an_attribute_called_module_keeps_its_keys() -> None:
    assert all(key.startswith("module.") for key in prepared("held_as_module").state_dict())


@pytest.mark.parametrize(("name", "dtype"), [("half", "float16"), ("bfloat16", "bfloat16"), ("double", "float64")])
def test_other_float_types_become_float32_with_a_note(name: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "maskplan"):
        module = prepared(name)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert f"torch.{dtype}" in caplog.text
    torch.manual_seed(0)
    before = RAN[name]().state_dict()
    assert all(torch.equal(v, before[k].to(v.dtype)) for k, v in module.state_dict().items())
    trace_layers(module, HOW)


def test_lazy_layers_are_initialized_by_the_size_of_the_images() -> None:
    module = prepared("lazy")
    assert type(module.body[0]) is nn.Conv2d
    assert {k: tuple(v.shape) for k, v in module.state_dict().items() if k.endswith("weight")} == {
        "body.0.weight": (8, 3, 3, 3),
        "body.1.weight": (8,),
        "body.3.weight": (8, 8, 3, 3),
        "body.5.weight": (3, 1152),
    }
    assert torch.equal(prepared("lazy")(X), module(X))


def test_channels_last_parameters_become_contiguous() -> None:
    module = prepared("tied_channels_last")
    assert all(p.is_contiguous() for p in module.parameters())
    assert module.again.weight is module.wide.weight


@pytest.mark.parametrize(
    "name", ["meta", "quantized", "lazy_unused", "scripted", "scripted_inside_wrapper", "scripted_part"]
)
def test_a_module_that_cannot_be_used_is_refused(name: str) -> None:
    with pytest.raises(InputError) as raised:
        prepared(name)
    assert odd_modules.REFUSED[name] in str(raised.value)


@pytest.mark.parametrize("name", ["two_inputs", "keyword_only", "no_forward", "halving"])
def test_a_forward_pass_that_cannot_run_is_refused_for_its_reason(name: str) -> None:
    with pytest.raises(InputError) as raised:
        trace_layers(prepared(name), HOW)
    assert odd_modules.REFUSED[name] in str(raised.value)
    assert "PREPROCESSING" not in str(raised.value)


def test_a_supported_module_is_not_changed() -> None:
    torch.manual_seed(0)
    module = RAN["plain"]().eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert prepare_module(module, HOW, "plain") is module
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
