"""The layers of an engine, read from the builder's log.

`digits_int8_layers.txt` is the list that TensorRT-RTX 1.7.1 printed for the digits in INT8 beside FP16, profile 1:8:8; `OLD`
is from 1.4; other texts are written after them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from maskplan.engines.trt.layers import EngineLayers, count_layers, is_layer_list, parse_engine_layers
from maskplan.pipeline.core.compilation import TensorFormat

LOG = Path(__file__).with_name("digits_int8_layers.txt").read_text()
LINES = LOG.partition("\n\n")[0].splitlines()[1:]
OLD = (
    "Layers:\nName: stem_myl0_1, LayerType: correlation,"
    " Inputs: [ { Name: relu.1_2_myl0, Dimensions: [1,2,8,8], Format/Datatype: Half }],"
    " Outputs: [ { Name: relu_1.1_3_myl0, Dimensions: [1,16,8,8], Format/Datatype: Half }],"
    " TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: stem][ONNX Layer: node_relu]\n"
)
HALF = "Strides: [1,1], StrideOrder: [1,0], Datatype: Half, Format: (NHWC) Channel major format"
LINE = (
    "Name: {name}, LayerType: {kind}, Inputs: [ {{ Name: {input}, Dimensions: [-1,8], " + HALF + " }}], Constants: [], "
    "Outputs: [ {{ Name: b, Dimensions: [-1,8], " + HALF + " }}], TacticName: t, StreamId: 0, Metadata: {metadata}"
)


def line(name: str = "a_myl0_1", kind: str = "correlation", input: str = "x", metadata: str = "[ONNX Layer: a]") -> str:
    return LINE.format(name=name, kind=kind, input=input, metadata=metadata)


def parse(*lines: str, profiles: int = 1) -> EngineLayers:
    return parse_engine_layers("Layers:\n" + "\n".join(lines) + "\n\nI/O Tensors:\n Name: x", profiles)


def test_every_line_of_a_real_log_is_a_layer_with_its_kind_types_and_nodes() -> None:
    assert is_layer_list(LOG)
    found = parse_engine_layers(LOG)
    assert found.unread == ()
    (layers,) = found.profiles
    assert len(layers) == len(LINES) == 20
    for text, layer in zip(LINES, layers, strict=True):
        assert text.startswith(f"Name: {layer.name}, LayerType: {layer.kind}, ")
        inputs = text[text.index("Inputs: [") : text.index("Constants: [")]
        outputs = text[text.index("Outputs: [") :]
        assert [tensor.dtype for tensor in layer.inputs] == re.findall(r"Datatype: (\w+)", inputs)
        assert [tensor.dtype for tensor in layer.outputs] == re.findall(r"Datatype: (\w+)", outputs)
        assert [f"({tensor.layout})" for tensor in layer.outputs] == re.findall(r"Format: (\(\w+\))", outputs)
        assert list(layer.nodes) == re.findall(r"\[ONNX Layer: ([^\]]+)\]", text)


def test_the_counts_of_a_real_log() -> None:
    counted = count_layers("1:8:8", parse_engine_layers(LOG).profiles[0])
    assert counted.kinds == {"correlation": 9, "kgen": 9, "gemm": 1, "shape_call": 1}
    assert counted.products == {"Int8": 10}
    assert counted.roles == {"product": 10, "quantize": 8, "no_kernel": 1, "other": 1}
    assert counted.conversions[0].name == "__myl_CastMulMinMaxRounCastReplConc_myl0_1"
    assert counted.conversions[0].operations == ("Cast", "Mul", "Min", "Max", "Roun", "Cast", "Repl", "Conc")


def test_the_form_of_version_1_4() -> None:
    ((layer,),) = parse_engine_layers(OLD).profiles
    assert layer.inputs == layer.outputs == (TensorFormat("Half", None),)
    assert (layer.kind, layer.role, layer.nodes) == ("correlation", "product", ("stem", "node_relu"))


@pytest.mark.parametrize(
    ("name", "kind", "role"),
    [
        ("conv_myl0_1", "correlation", "product"),
        ("up_myl0_1", "deconv", "product"),
        ("fc_myl0_1", "gemm", "product"),
        ("__myl_FcAddCast_myl0_1", "runtime_fusion", "product"),
        ("__myl_CorrSilu_myl0_2", "runtime_fusion", "product"),
        ("__myl_CastMulMinMaxRounCast_myl0_1", "kgen", "quantize"),
        ("__myl_CastReplConc_myl0_1", "kgen", "cast"),
        ("__myl_Tran_myl0_1", "kgen", "reformat"),
        ("__myl_TranMean_myl0_1", "kgen", "other"),
        ("pool_myl0_1", "maxpool", "other"),
        ("__mye507_0_myl0_0", "shape_call", "no_kernel"),
        ("__mye1_myl0_0", "signal", "no_kernel"),
        ("novel_myl0_1", "a_kind_of_next_year", "other"),
    ],
)
def test_what_a_layer_is(name: str, kind: str, role: str) -> None:
    ((layer,),) = parse(line(name, kind)).profiles
    assert (layer.kind, layer.role) == (kind, role)


def test_integers_that_become_floats_in_a_kernel_of_its_own_are_dequantized() -> None:
    text = line("__myl_CastMul_myl0_1", "kgen").replace("Datatype: Half", "Datatype: Int8", 1)
    assert parse(text).profiles[0][0].role == "dequantize"


def test_lines_of_another_form_are_returned_and_not_counted() -> None:
    cut = line()[:-60]
    found = parse(line(), cut, "Name: only a name", line(input="y").replace("Datatype", "Kind"))
    assert len(found.profiles[0]) == 1
    assert len(found.unread) == 3
    assert cut in found.unread


@pytest.mark.parametrize(
    "name",
    ["a, LayerType: gemm, Inputs: [ { Name: x", "b\nwith a second line", "c [brackets], Metadata: [ONNX Layer: d]"],
)
def test_names_that_look_like_labels_change_no_layer(name: str) -> None:
    found = parse(line(f"{name}_myl0_1"))
    assert [(layer.kind, layer.role) for layer in found.profiles[0]] in ([("correlation", "product")], [])
    assert len(found.profiles[0]) + len(found.unread) == 1


def test_remarks_of_the_compiler_are_no_nodes() -> None:
    metadata = "[ONNX Layer: layer3.0.conv1][ONNX Layer: node_relu_22]__gemm_from_conv1x1"
    assert parse(line(metadata=metadata)).profiles[0][0].nodes == ("layer3.0.conv1", "node_relu_22")


def test_layers_belong_to_the_profile_that_their_graph_names() -> None:
    unmarked = line("__myl_Tran_myl1_3", "kgen")
    found = parse(
        line("a_myl0_1"), line("a [profile 1]_myl1_2", input="x [profile 1]"), unmarked, line("b_myl0_4"), profiles=2
    )
    assert [[layer.name for layer in layers] for layers in found.profiles] == [
        ["a_myl0_1", "b_myl0_4"],
        ["a_myl1_2", "__myl_Tran_myl1_3"],
    ]


def test_a_message_without_layers_has_none() -> None:
    assert not is_layer_list("Total Host Persistent Memory: 80 bytes")
    assert parse_engine_layers("Layers:\n\n\nI/O Tensors:\n") == EngineLayers(((),), ())
