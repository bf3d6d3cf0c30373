"""Which layers run sparse, read from what TensorRT says of an engine.

No TensorRT ran for these tests. The JSON and the log lines are written by hand after the documented formats of TensorRT
8.5, 10 and 11. Kernel names are those that users and NVIDIA's documentation quote; `test_kernel_names.py` has more of them.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inspector_json import (
    AVDT,
    FLOAT_OUT,
    GEMM,
    IMPLICIT,
    INT8_OUT,
    KNOWN,
    QUANTIZED,
    SIMT,
    SPARSE_CONV,
    STRANGE_KERNELS,
    conv,
    tensor,
    text,
)

from maskplan.engines.evidence import (
    FEW_CHANNELS,
    FLOAT_OUTPUT,
    GROUPED,
    LOW_OPTIMIZATION,
    NO_FP32_KERNELS,
    NOT_2TO4,
    Totals,
    parse_layers,
    totals,
    with_reasons,
)
from maskplan.pipeline.core.artifacts import LayerSparsity
from maskplan.pipeline.core.choices import DENSE, SPARSE, UNKNOWN
from maskplan.pipeline.core.errors import InputError


def only(*layers: Any, **options: Any) -> LayerSparsity:
    (layer,) = parse_layers(text(*layers), **options)
    return layer


@pytest.mark.parametrize(("kernel", "state"), [*KNOWN.items(), *((kernel, UNKNOWN) for kernel in STRANGE_KERNELS)])
def test_the_kernels_name_decides(kernel: str, state: str) -> None:
    assert only(conv("a", kernel)).state == state


def test_no_kernel_is_unknown() -> None:
    assert [only(conv("a", kernel)).kernel for kernel in (None, "", AVDT)] == [None, None, AVDT]  # type: ignore[list-item]
    assert only(conv("a", None)).state == UNKNOWN


@pytest.mark.parametrize("key", ["HasSparseWeights", "AllowSparse"])
@pytest.mark.parametrize("value", [0, 1, None, "1"])
def test_what_is_said_of_weights_is_no_evidence(key: str, value: Any) -> None:
    """Issue 4020: 1 beside a dense kernel and beside a sparse one."""
    states = [only(conv("a", kernel) | {key: value}).state for kernel in (SIMT, AVDT, None)]
    assert states == [DENSE, SPARSE, UNKNOWN]


def test_tensorrt_8_json() -> None:
    layer = conv("Conv_3 + Relu_4", INT8_OUT, 512, 256, AllowSparse=0, HasSparseWeights=None, Metadata=None)
    layer |= {"Kernel": [1, 1], "Weights": {"Type": "Int8", "Count": 131072}}
    layer["Inputs"][0]["Format/Datatype"] = "Thirty-two wide channel vectorized row major Int8 format."
    layer["Outputs"][0]["Format/Datatype"] = "Thirty-two wide channel vectorized row major Int8 format."
    assert only(layer) == LayerSparsity("Conv_3 + Relu_4", INT8_OUT, DENSE, 512, 256, ("Conv_3", "Relu_4"), None)


def test_tensorrt_10_json_with_control_characters_in_the_metadata() -> None:
    layer = conv("/c/Conv + /r/Relu", SPARSE_CONV, Metadata="[ONNX Layer: /c/Conv]\x1e[ONNX Layer: /r/Relu]")
    expected = LayerSparsity("/c/Conv + /r/Relu", SPARSE_CONV, SPARSE, 256, 256, ("/c/Conv", "/r/Relu"))
    assert only(layer) == expected
    raw = text(layer).replace("\\u001e", "\x1e")
    assert "\x1e" in raw
    assert parse_layers(raw) == parse_layers(raw.encode()) == parse_layers("\ufeff" + raw) == (expected,)


def test_tensorrt_11_json() -> None:
    layer = conv("/c/Conv", FLOAT_OUT)
    for side, kind in (("Inputs", "Int8"), ("Outputs", "Half")):
        del layer[side][0]["Format/Datatype"]
        layer[side][0] |= {"Format": "Row major linear FP16 format (kLINEAR)", "DataType": kind}
    io = [{"Name": "input", "IOMode": "Input", "DataType": "Half", "Dimensions": [8, 3, 224, 224]}]
    found = parse_layers(json.dumps({"Layers": [layer], "I/O Tensors": io, "Engine Metadata": {}}))
    assert found == (LayerSparsity("/c/Conv", FLOAT_OUT, DENSE, 256, 256, ("/c/Conv",), FLOAT_OUTPUT),)


def test_names_alone_tell_nothing_of_kernels() -> None:
    """Verbosity below detailed gives strings, and `sparse` in a layer's own name is no kernel."""
    names = ["Reformatting CopyNode for Input Tensor 0 to a", "a + b", "sparse_conv", AVDT, IMPLICIT]
    found = parse_layers(text(*names))
    assert [(layer.name, layer.kernel, layer.state) for layer in found] == [(n, None, UNKNOWN) for n in names[1:]]
    assert found[0].nodes == ("a", "b")


def test_layers_that_cannot_hold_weights_are_left_out() -> None:
    types = [
        "Reformat", "NoOp", "Shuffle", "CaskPooling", "PointWiseV2", "SoftMax", "CaskSoftMaxV2", "Constant", "Quantize"
    ]  # fmt: skip
    layers = [{"Name": t, "LayerType": t, "TacticValue": "0x0"} for t in types]
    layers += [{"Name": "p", "LayerType": "Pooling", "TacticName": "sm50_xmma_pooling_fw_4d_FP16FP32NHWC_Average"}]
    assert [layer.name for layer in parse_layers(text(*layers, conv("a", IMPLICIT)))] == ["a"]


@pytest.mark.parametrize(
    "layer",
    [
        {"Name": "{ForeignNode[/a/MatMul.../b/Add]}", "LayerType": "Myelin"},
        {"Name": "{ForeignNode[/a/MatMul.../b/Add]}", "LayerType": "Myelin", "TacticName": IMPLICIT},
        {"Name": "__myl_MulAdd_myl0_3", "LayerType": "kgen", "TacticName": "__myl_MulAdd_0xabcdef"},
        {"Name": "p", "LayerType": "PluginV2", "TacticValue": "0x0"},
        {"Name": "r", "LayerType": "Reformat", "TacticName": AVDT},
        {"Name": "r", "LayerType": "Reformat", "TacticName": IMPLICIT},
        {"Name": "r", "LayerType": "Shuffle", "Weights": {"Type": "Half", "Count": 4}},
        {"Name": "r", "LayerType": "Reformat", "ParameterType": "Convolution", "TacticName": IMPLICIT},
        {"Name": "p", "LayerType": "PluginV2", "TacticName": AVDT},
        {"Name": "p", "LayerType": "PluginV2", "ParameterType": "Convolution", "TacticName": AVDT},
        {"Name": "k", "LayerType": "kgen", "TacticName": AVDT},
        {"Name": "c", "TacticName": AVDT},
        {"Name": "c", "ParameterType": "Convolution", "TacticName": AVDT},
        {"Name": "c", "ParameterType": "Convolution", "TacticName": IMPLICIT},
        {"Name": "d", "LayerType": "CaskDeconvolutionV2", "TacticName": AVDT},
        {"Name": "g", "LayerType": "CudaGroupConvolution", "TacticName": SPARSE_CONV},
        conv("c", SPARSE_CONV, groups=32),
        conv("c", SPARSE_CONV) | {"Groups": "1"},
        conv("c", SPARSE_CONV) | {"Groups": None},
        conv("c", SPARSE_CONV) | {"Groups": True},
        conv("c", SPARSE_CONV) | {"Groups": -1},
        {"Name": "c", "TacticName": IMPLICIT},
        {"Name": "c", "LayerType": "NonConvolution", "TacticName": IMPLICIT},
        {"Name": "c", "LayerType": ["CaskConvolution"], "TacticName": IMPLICIT},
        {"Name": "c", "LayerType": "CaskConvolution", "TacticName": [AVDT]},
        {"Name": "c", "LayerType": "CaskConvolution", "TacticName": 7},
        {},
        None,
        7,
        ["a"],
    ],
)
def test_opaque_and_contradictory_layers_are_unknown(layer: Any) -> None:
    found = only(layer)
    assert (found.state, found.reason) == (UNKNOWN, None)
    assert found.name


@pytest.mark.parametrize(
    "layer_type", ["CaskConvolution", "CaskGemmConvolution", "CaskConvActPool", "correlation", "gemm", "fusion"]
)
def test_layers_that_convolve_or_multiply_can_be_dense_and_sparse(layer_type: str) -> None:
    assert only({"Name": "a", "LayerType": layer_type, "TacticName": GEMM}).state == DENSE
    assert only({"Name": "a", "LayerType": layer_type, "TacticName": AVDT}).state == SPARSE


def test_transposed_convolutions_can_be_dense() -> None:
    kernel = IMPLICIT.replace("fprop", "dgrad")
    assert only({"Name": "a", "LayerType": "CaskDeconvolutionV2", "TacticName": kernel}).state == DENSE


@pytest.mark.parametrize(
    ("change", "c", "k"),
    [
        ({}, 64, 128),
        ({"Groups": 2, "Weights": {"Type": "Half", "Count": 64 * 128 * 9 // 2}}, 64, 128),
        ({"Weights": None}, 64, 128),
        ({"Weights": {"Type": "Half", "Count": 12345}}, 64, 128),
        ({"Kernel": None}, 64, 128),
        ({"Kernel": [3, "3"]}, 64, 128),
        ({"Inputs": []}, 64, 128),
        ({"Inputs": None, "Weights": None}, None, 128),
        ({"Inputs": [tensor("x", [8, -1, 4, 4])], "Weights": None}, None, 128),
        ({"Inputs": [tensor("x", [8, 64])], "Weights": None}, None, 128),
        ({"Inputs": [tensor("x", [8, 64, 4, 4]), tensor("r", [8, 64, 4, 4])], "Weights": None}, 64, 128),
        ({"Inputs": [tensor("x", [8, 64, 4, 4]), tensor("r", [8, 128, 4, 4])], "Weights": None}, None, 128),
        ({"OutMaps": None}, 64, None),
        ({"OutMaps": True}, 64, None),
        ({"OutMaps": 0}, 64, None),
    ],
)
def test_channels_come_from_the_weights_or_the_inputs(change: dict[str, Any], c: int | None, k: int | None) -> None:
    found = only(conv("a", IMPLICIT, 64, 128, **change))
    assert (found.c, found.k) == (c, k)


def test_channels_that_the_json_leaves_out_come_from_the_masks() -> None:
    gemm = {"Name": "fc_myl0_2", "LayerType": "gemm", "TacticName": GEMM, "Metadata": "[ONNX Layer: fc]"}
    assert [(f.c, f.k) for f in [only(gemm), only(gemm, masked={"fc.weight": (512, 1000)})]] == [
        (None, None),
        (512, 1000),
    ]
    assert only(gemm, masked={"fc": (512, 1000), "fc.weight": (512, 1000), "other": (1, 2)}).k == 1000
    assert only(conv("fc", GEMM, 64, 128), masked={"fc": (512, 1000)}).c == 64
    merged = gemm | {"Metadata": "[ONNX Layer: a][ONNX Layer: b]"}
    assert only(merged, masked={"a": (64, 8), "b": (64, 8)}).k is None


@pytest.mark.parametrize(
    ("name", "metadata", "nodes"),
    [
        ("Conv_3 + Relu_4", None, ("Conv_3", "Relu_4")),
        ("Conv_3 + Relu_4 [profile 1]", None, ("Conv_3", "Relu_4")),
        ("a [profile 1]", "[ONNX Layer: a]", ("a",)),
        ("a [profile 12]", "[ONNX Layer: a [profile 12]]\x1e[ONNX Layer: b [profile 12]]", ("a", "b")),
        ("/m_2+/m_1+/m_myl0_2 [profile 1]", None, ("/m_2", "/m_1", "/m")),
        ("/a/Conv || /b/Conv", None, ("/a/Conv", "/b/Conv")),
        ("/a/Conv + PWN(PWN(/s/Sigmoid), PWN(/m/Mul))", None, ("/a/Conv", "/s/Sigmoid", "/m/Mul")),
        ("/a/Conv", "[ONNX Layer: /a/Conv]\x1e[ONNX Layer: /r/Relu]", ("/a/Conv", "/r/Relu")),
        ("x", "[ONNX Layer: a]\x1f[ONNX Layer: b]\x1e[ONNX Layer: c[0]]", ("a", "b", "c[0]", "x")),
        ("a", "[ONNX Layer: a][ONNX Layer: b]", ("a", "b")),
        ("a.weight + QuantizeLinear_7 + a", "[ONNX Layer: a]", ("a", "a.weight", "QuantizeLinear_7")),
        ("/m_2+/m_1+/m_myl0_2", None, ("/m_2", "/m_1", "/m")),
        ("__myl_MulAdd_myl0_3", "[ONNX Layer: /m/Mul]", ("/m/Mul",)),
        ("{ForeignNode[a...b]}", None, ()),
        ("(Unnamed Layer* 1) [Convolution]", "some words", ()),
        ("a", 7, ("a",)),
    ],
)
def test_fused_nodes_are_named(name: str, metadata: Any, nodes: tuple[str, ...]) -> None:
    assert only(conv(name, IMPLICIT, Metadata=metadata)).nodes == nodes


@pytest.mark.parametrize(
    "wrong", ["", "{", "[", "Layers", "{'Layers': []}", b"\xff\xfe\xfa", "[" * 100000, text()[:-1]]
)
def test_what_is_no_json_is_refused(wrong: str | bytes) -> None:
    with pytest.raises(InputError, match=r"expected a JSON object with a list of Layers(.|\n)*not JSON"):
        parse_layers(wrong)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ("[]", "a list, not an object"),
        ("7", "a int, not an object"),
        ("{}", "its keys are none"),
        ('{"layers": [], "Bindings": []}', "its keys are 'layers', 'Bindings'"),
        ('{"Layers": {}}', "Layers is a dict"),
        ('{"Layers": "a"}', "Layers is a str"),
    ],
)
def test_json_of_another_kind_is_refused_and_says_what_was_found(wrong: str, found: str) -> None:
    with pytest.raises(InputError, match="expected a JSON object with a list of Layers") as error:
        parse_layers(wrong)
    assert found in str(error.value)


def test_an_engine_that_tells_no_layers_has_none() -> None:
    assert parse_layers('{"Layers": []}') == ()
    assert totals(()) == Totals(0, 0, 0)


def test_layers_are_counted_by_state() -> None:
    kernels = [AVDT, SIMT, SIMT, None, None, None]
    assert totals(parse_layers(text(*(conv("a", kernel) for kernel in kernels)))) == Totals(1, 2, 3)


FOR_TWO_PROFILES = [
    conv("a + relu", SPARSE_CONV),
    conv("b", SPARSE_CONV),
    conv("c", IMPLICIT),
    conv("d", IMPLICIT),
    conv("e", SPARSE_CONV),
    conv("f", None),
    conv("a + relu [profile 1]", SPARSE_CONV),
    conv("b [profile 1]", IMPLICIT),
    conv("c [profile 1]", IMPLICIT),
    conv("d [profile 1]", None),
    conv("e [profile 1]", None),
    conv("f [profile 1]", None),
]


def test_a_layer_listed_for_every_profile_is_kept_for_each_and_counted_once() -> None:
    """Sparse in any profile, dense in all."""
    layers = parse_layers(text(*FOR_TWO_PROFILES))
    assert len(layers) == 12
    assert all("profile" not in node for layer in layers for node in layer.nodes)
    assert totals(layers) == Totals(sparse=3, dense=1, unknown=2)
    assert totals(layers[:6]) == Totals(sparse=3, dense=2, unknown=1)
    assert totals(layers[6:]) == Totals(sparse=1, dense=2, unknown=3)


def test_layers_of_one_name_in_one_profile_are_different_ones() -> None:
    names = ["a", "a", "a [profile 1]", "a [profile 1]"]
    assert totals(parse_layers(text(*(conv(name, AVDT) for name in names)))) == Totals(2, 0, 0)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from([AVDT, SIMT, None])), max_size=6))
@settings(max_examples=100, deadline=None)
def test_as_many_profiles_as_one_likes_do_not_change_the_totals(engine: list[tuple[str, str | None]]) -> None:
    profiles = [
        conv(name + suffix, kernel) for suffix in ("", " [profile 1]", " [profile 2]") for name, kernel in engine
    ]
    assert totals(parse_layers(text(*profiles))) == totals(parse_layers(text(*profiles[: len(engine)])))


def reason_of(
    layer: dict[str, Any], conforming: tuple[str, ...] = ("a",), precision: str = "fp16", level: int = 3
) -> str | None:
    found = with_reasons(
        parse_layers(text(layer)), conforming=conforming, precision=precision, optimization_level=level
    )
    again = with_reasons(found, conforming=conforming, precision=precision, optimization_level=level)
    assert again == found
    return found[0].reason


UNTOLD = [tensor("x", [-1, 256, 14, 14], "N/A due to dynamic shapes")]


@pytest.mark.parametrize(
    ("layer", "options", "reason"),
    [
        (conv("a", IMPLICIT), {}, None),
        (conv("a", IMPLICIT, groups=2), {}, GROUPED),
        (conv("a", IMPLICIT), {"conforming": ()}, NOT_2TO4),
        (conv("a", IMPLICIT), {"precision": "fp32"}, NO_FP32_KERNELS),
        (conv("a", IMPLICIT), {"level": 2}, LOW_OPTIMIZATION),
        (conv("a", IMPLICIT), {"level": 5}, None),
        (conv("a", IMPLICIT, Inputs=QUANTIZED), {"precision": "int8"}, FLOAT_OUTPUT),
        (conv("a", IMPLICIT, Inputs=QUANTIZED, Outputs=QUANTIZED), {"precision": "int8"}, None),
        (conv("a", FLOAT_OUT, Inputs=UNTOLD, Outputs=UNTOLD), {"precision": "int8"}, FLOAT_OUTPUT),
        (conv("a", INT8_OUT, Inputs=UNTOLD, Outputs=UNTOLD), {"precision": "int8"}, None),
        (conv("a", IMPLICIT, 255, 256), {}, FEW_CHANNELS),
        (conv("a", IMPLICIT, 256, 64), {}, FEW_CHANNELS),
        (conv("a", IMPLICIT, 256, 64, OutMaps=None), {}, None),
        # The earlier reason in the table wins.
        (conv("a", IMPLICIT, 64, groups=2), {"conforming": (), "precision": "fp32", "level": 0}, GROUPED),
        (conv("a", IMPLICIT, 64), {"conforming": (), "precision": "fp32", "level": 0}, NOT_2TO4),
        (conv("a", IMPLICIT, 64), {"precision": "fp32", "level": 0}, NO_FP32_KERNELS),
        (conv("a", IMPLICIT, 64, Inputs=QUANTIZED), {"level": 0}, LOW_OPTIMIZATION),
        (conv("a", IMPLICIT, 64, Inputs=QUANTIZED), {}, FLOAT_OUTPUT),
        # Only dense layers have one.
        (conv("a", SPARSE_CONV, 64, groups=2), {"conforming": (), "level": 0}, None),
        (conv("a", None, 64, groups=2), {"conforming": (), "level": 0}, None),
    ],
)
def test_dense_layers_say_why(layer: dict[str, Any], options: dict[str, Any], reason: str | None) -> None:
    assert reason_of(layer, **options) == reason


def test_conforming_weights_are_found_by_any_fused_node_or_by_the_weights_name() -> None:
    layers = parse_layers(text(*(conv(f"relu{n} + conv{n}", IMPLICIT, Metadata=None) for n in range(3)), "b"))

    def reasons(*conforming: str) -> list[str | None]:
        found = with_reasons(layers, conforming=conforming, precision="fp16", optimization_level=3)
        return [layer.reason for layer in found]

    assert reasons("conv0", "conv1.weight") == [None, None, NOT_2TO4, None]
    assert reasons() == [NOT_2TO4, NOT_2TO4, NOT_2TO4, None]
    # Names that no layer knows are of another graph.
    assert reasons("onnx::Conv_193") == [None] * 4


def test_a_layer_whose_nodes_are_not_told_is_not_called_unpruned() -> None:
    layers = parse_layers(text(conv("(Unnamed Layer* 1) [Convolution]", IMPLICIT, Metadata=None), conv("a", IMPLICIT)))
    found = with_reasons(layers, conforming=["a"], precision="fp16", optimization_level=3)
    assert [layer.reason for layer in found] == [None, None]


characters = st.sampled_from("abcdefghijklmnopqrstuvwxyz0123456789_ -")

ENGINE = [
    conv("conv1 + relu1", SPARSE_CONV, 64, 128),
    conv("conv2", IMPLICIT, groups=32),
    conv("conv3", AVDT, Inputs=QUANTIZED),
    {"Name": "pool", "LayerType": "CaskPooling", "ParameterType": "Pooling"},
    {"Name": "fc_myl0_2", "LayerType": "gemm", "TacticName": GEMM, "Metadata": "[ONNX Layer: fc]"},
    {"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin", "Metadata": "[ONNX Layer: a]\x1e[ONNX Layer: b]"},
    "conv4",
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(STRANGE_KERNELS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=600, deadline=None)
def test_whatever_happens_to_the_json_no_state_is_made_up(data: st.DataObject) -> None:
    """Keys are deleted, renamed or given other values, anywhere in the engine; kernels move to other layers."""
    layers = copy.deepcopy(ENGINE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(layers) - 1))
        layer = layers[at]
        if not isinstance(layer, dict) or data.draw(st.integers(0, 9)) == 0:
            layers[at] = data.draw(json_values)
            continue
        if not layer:
            continue
        inner = [v[0] for v in layer.values() if isinstance(v, list) and v and isinstance(v[0], dict) and v[0]]
        target = data.draw(st.sampled_from([layer, *inner]))
        key = data.draw(st.sampled_from(sorted(target)))
        what = data.draw(st.sampled_from(["delete", "rename", "replace"]))
        value = target.pop(key)
        if what == "rename":
            target[key + data.draw(characters)] = value
        elif what == "replace":
            target[key] = data.draw(json_values | st.sampled_from([AVDT, IMPLICIT]))
    found = parse_layers(json.dumps({"Layers": layers}))
    said = [layer.get("TacticName") if isinstance(layer, dict) else None for layer in layers]
    assert len(found) <= len(layers)
    for layer in found:
        assert layer.state in (KNOWN.get(layer.kernel or "", UNKNOWN), UNKNOWN)
        assert layer.kernel is None or layer.kernel in said
        assert layer.reason is None or layer.state == DENSE
        assert all(count is None or count > 0 for count in (layer.c, layer.k))
    for reasoned in with_reasons(found, conforming=["conv1"], precision="int8", optimization_level=3):
        assert reasoned.reason is None or reasoned.state == DENSE
    counted = totals(found)
    assert counted.sparse <= sum(KNOWN.get(k, UNKNOWN) == SPARSE for k in said if isinstance(k, str))
    assert counted.sparse + counted.dense + counted.unknown == len(found)


@given(st.integers(0, 5000))
@settings(max_examples=200, deadline=None)
def test_cut_json_is_refused(at: int) -> None:
    whole = text(*ENGINE)
    with pytest.raises(InputError):
        parse_layers(whole[: at % len(whole)])
