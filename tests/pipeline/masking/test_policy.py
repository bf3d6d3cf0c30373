"""Which layers get a mask, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
import torchvision

from maskplan.pipeline.core.artifacts import Layer, Pattern
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.data.preprocessing import IMAGENET
from maskplan.pipeline.masking.policy import LayerPolicy, select_layers
from maskplan.pipeline.models.layers import trace_layers
from maskplan.pipeline.models.registry import build_model

TWO_FOUR = Pattern(2, 4)


def conv(name: str, channels: int, position: int | None, groups: int = 1, op: str = "Conv") -> Layer:
    return Layer(name, op, (8, channels // groups, 3, 3), groups, position, 100)


def reasons(*layers: Layer, pattern: Pattern = TWO_FOUR) -> dict[str, str]:
    return {layer.name: layer.reason for layer in select_layers(layers, pattern).dense}


def test_every_layer_is_either_masked_or_dense_for_a_reason() -> None:
    layers = [
        conv("stem", 4, 0),
        conv("plain", 8, 1),
        conv("depthwise", 8, 2, groups=8),
        conv("grouped", 32, 3, groups=2),
        conv("odd", 6, 4),
        conv("up", 8, 5, op="ConvTranspose"),
        conv("aux", 8, None),
        Layer("head", "Gemm", (10, 64), 1, 6, 640),
        Layer("short_head", "Gemm", (10, 6), 1, 7, 60),
        Layer("aux_head", "Gemm", (10, 64), 1, None, 0),
    ]
    selection = select_layers(layers, TWO_FOUR)
    assert [layer.name for layer in selection.masked] == ["plain"]
    assert {layer.name: layer.reason for layer in selection.dense} == {
        "stem": "stem",
        "depthwise": "grouped",
        "grouped": "grouped",
        "odd": "channels_not_multiple_of_4",
        "up": "unsupported_op",
        "aux": "not_used_in_inference",
        "head": "linear",
        "short_head": "channels_not_multiple_of_4",
        "aux_head": "not_used_in_inference",
    }


def test_a_dense_layer_keeps_its_shape_and_cost() -> None:
    (stem,) = select_layers([conv("stem", 4, 0), conv("plain", 8, 1)], TWO_FOUR).dense
    assert (stem.shape, stem.macs) == ((8, 4, 3, 3), 100)


def test_the_stem_is_the_first_convolution_used_not_the_first_defined() -> None:
    assert reasons(conv("late", 8, 2), conv("early", 8, 0), conv("middle", 8, 1)) == {"early": "stem"}


def test_an_ineligible_stem_is_the_only_stem() -> None:
    assert reasons(conv("rgb", 3, 0), conv("second", 8, 1)) == {"rgb": "channels_not_multiple_of_4"}


def test_the_order_is_that_of_the_forward_pass() -> None:
    layers = [conv("d", 8, 4), conv("a", 3, 0), conv("c", 8, 2), conv("b", 6, 1), conv("unused", 8, None)]
    selection = select_layers(layers, TWO_FOUR)
    assert [layer.name for layer in selection.masked] == ["c", "d"]
    assert [layer.name for layer in selection.dense] == ["a", "b", "unused"]


def test_the_group_length_decides_which_channels_divide() -> None:
    layers = [conv("stem", 3, 0), conv("twelve", 12, 1), conv("eight", 8, 2)]
    assert set(reasons(*layers, pattern=Pattern(2, 6))) == {"stem", "eight"}
    assert set(reasons(*layers, pattern=Pattern(1, 8))) == {"stem", "twelve"}


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ([], "no convolution"),
        ([conv("stem", 8, 0)], "stem (8, 8, 3, 3) (stem)"),
        ([conv("rgb", 3, 0), Layer("head", "Gemm", (10, 64), 1, 1, 1)], "head (10, 64) (linear)"),
    ],
)
def test_a_model_without_maskable_layers_is_an_error_with_reasons(layers: list[Layer], named: str) -> None:
    with pytest.raises(InputError, match="no layer of the model can be masked 2:4") as raised:
        select_layers(layers, TWO_FOUR)
    assert named in str(raised.value)
    assert "multiples of 4" in str(raised.value.fix)


def test_all_convolutions_of_resnet18_except_the_stem_are_masked() -> None:
    module = torchvision.models.resnet18(weights=None)
    layers, _ = trace_layers(module, IMAGENET)
    selection = select_layers(layers, TWO_FOUR)
    convolutions = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert {layer.name for layer in selection.masked} == convolutions - {"conv1.weight"}
    assert {layer.name: layer.reason for layer in selection.dense} == {
        "conv1.weight": "channels_not_multiple_of_4",
        "fc.weight": "linear",
    }


def test_the_tiny_model_has_one_eligible_convolution_of_each_kind(tiny_spec: str) -> None:
    built = build_model(tiny_spec, seed=0)
    layers, _ = trace_layers(built.module, built.preprocessing)
    selection = select_layers(layers, TWO_FOUR)
    assert [layer.name for layer in selection.masked] == ["wide.weight", "narrow.weight"]
    assert {layer.name: layer.reason for layer in selection.dense} == {
        "stem.weight": "channels_not_multiple_of_4",
        "depthwise.weight": "grouped",
        "odd.weight": "channels_not_multiple_of_4",
        "head.weight": "linear",
    }


def test_transposable_masks_need_output_channels_in_multiples_too() -> None:
    layers = [conv("stem", 4, 0), conv("whole", 8, 1), Layer("cut", "Conv", (6, 8, 3, 3), 1, 2, 100)]
    assert [layer.name for layer in select_layers(layers, TWO_FOUR).masked] == ["whole", "cut"]
    selection = select_layers(layers, TWO_FOUR, LayerPolicy(transposable=True))
    assert [layer.name for layer in selection.masked] == ["whole"]
    assert {layer.name: layer.reason for layer in selection.dense} == {
        "stem": "stem",
        "cut": "output_channels_not_in_tiles",
    }
    with pytest.raises(InputError, match="input and output channels in multiples of 4"):
        select_layers([layers[0], layers[2]], TWO_FOUR, LayerPolicy(transposable=True))


def test_patterns_match_weights_and_modules_and_one_without_a_match_is_an_error() -> None:
    layers = [conv("stem.weight", 4, 0), conv("a.weight", 8, 1), conv("b.weight", 8, 2)]
    for pattern in ("a", "a.*"):
        chosen = select_layers(layers, TWO_FOUR, LayerPolicy(names=(pattern,)))
        assert [layer.name for layer in chosen.masked] == ["a.weight"]
    with pytest.raises(InputError, match=r"(?s)no layer has such a name.*found: c\.\*\n"):
        select_layers(layers, TWO_FOUR, LayerPolicy(names=("a", "c.*")))


def test_convolutions_with_few_outputs_and_tables_stay_dense() -> None:
    layers = [conv("stem", 4, 0), conv("body", 8, 1), Layer("bins", "Conv", (1, 16, 1, 1), 1, 2, 16)]
    layers += [Layer("three", "Conv", (3, 8, 1, 1), 1, 3, 24), Layer("blur", "Conv", (8, 8, 3, 3), 1, 4, 9, fixed=True)]
    selection = select_layers(layers, TWO_FOUR)
    assert [layer.name for layer in selection.masked] == ["body"]
    assert {d.name: d.reason for d in selection.dense} == {
        "stem": "stem",
        "bins": "fewer_than_4_outputs",
        "three": "fewer_than_4_outputs",
        "blur": "fixed_table",
    }
