"""Placement on small graphs, each rule by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from placement_graphs import graph, placed, uses, weights

from maskplan.calibration.placement import PlaceOptions, place
from maskplan.pipeline.core.errors import InputError

OUTPUTS = PlaceOptions(quantize_outputs=True)


def test_layers_are_quantized_along_their_output_channels() -> None:
    found = placed(
        """
        plain | a = Conv(x, w0, b0)
        relu | b = Relu(a)
        depthwise | c = Conv<group = 8>(b, depthwise)
        pool | d = GlobalAveragePool(c)
        flatten | e = Flatten(d)
        gemm | f = Gemm(e, flat)
        back | g = Gemm<transB = 1>(f, flat)
        matmul | y = MatMul(g, flat)
    """.replace("Conv<group = 8>", "Conv <group = 8, pads = [1, 1, 1, 1]>")
    )
    assert uses(found) == {
        "x": [("plain", 0)],
        "b": [("depthwise", 0)],
        "d": [("flatten", 0)],
        "e": [("gemm", 0)],
        "g": [("matmul", 0)],
    }
    assert weights(found) == [
        ("w0", "plain", 1, 0),
        ("depthwise", "depthwise", 1, 0),
        ("flat", "gemm", 1, 1),
        ("flat", "matmul", 1, 1),
    ]
    # One weight cannot be quantized along two axes.
    assert found.in_float == (("back", "its weight is quantized along another axis for another layer"),)


def test_what_cannot_be_quantized_stays_in_float_and_says_why() -> None:
    found = placed("""
        plain | a = Conv(x, w0)
        made | w = Relu(w1)
        computed | b = Conv(a, w)
        batched | c = MatMul(b, cube)
        pair | d = MatMul(c, c)
        deconv | y = ConvTranspose(a, w2)
    """)
    assert [w.node for w in found.weights] == ["plain"]
    assert dict(found.in_float) == {"computed": "its weight is not constant", "batched": "its weight has 3 dimensions"}
    assert uses(found) == {"x": [("plain", 0)]}


def test_weights_of_another_type_stay_and_a_graph_of_only_such_is_refused() -> None:
    model = graph("""
        first | a = Conv(x, w0)
        second | y = Conv(a, w1)
    """)
    half = numpy_helper.from_array(numpy_helper.to_array(model.graph.initializer[0]).astype(np.float16), "w0")
    model.graph.initializer[0].CopyFrom(half)
    assert place(model).in_float == (("first", "its weight is float16, not float32"),)
    model.graph.initializer[1].CopyFrom(half)
    model.graph.initializer[1].name = "w1"
    with pytest.raises(InputError, match=r"(?s)no layer can be quantized.*second: its weight is float16") as error:
        place(model)
    assert "FP32" in str(error.value)


RESIDUAL = """
    stem | a = Conv(x, w0)
    relu0 | b = Relu(a)
    conv1 | c = Conv(b, w1)
    relu1 | d = Relu(c)
    conv2 | e = Conv(d, w2)
    add | f = Add(e, b)
    relu2 | g = Relu(f)
    conv3 | y = Conv(g, w3)
"""


@pytest.mark.parametrize("operands", ["e, b", "b, e"])
def test_of_a_residual_addition_only_the_skip_is_quantized(operands: str) -> None:
    found = placed(RESIDUAL.replace("Add(e, b)", f"Add({operands})"))
    skip = operands.split(", ").index("b")
    assert uses(found) == {
        "x": [("stem", 0)],
        "b": [("conv1", 0), ("add", skip)],
        "d": [("conv2", 0)],
        "g": [("conv3", 0)],
    }
    assert found.tied == ()


def test_a_convolution_with_batchnorm_or_scale_behind_it_fuses_too() -> None:
    found = placed(
        RESIDUAL.replace(
            "add | f = Add(e, b)",
            """bn | e1 = BatchNormalization(e, gamma, beta, mean, var)
            scale | e2 = Mul(three, e1)
            add | f = Add(b, e2)""",
        )
    )
    assert uses(found)["b"] == [("conv1", 0), ("add", 0)]
    assert not {"e", "e1", "e2"} & set(uses(found))


def test_of_two_convolutions_the_deeper_one_fuses_with_the_addition() -> None:
    body = RESIDUAL.replace("Add(e, b)", "Add(e, h)")
    # First or last in the file: the branch of one convolution is the skip.
    early = body.replace("conv1 |", "down | h = Conv(b, w4)\nconv1 |")
    late = body.replace("add |", "down | h = Conv(b, w4)\nadd |")
    for text in (early, late):
        found = uses(placed(text))
        assert found["h"] == [("add", 1)]
        assert "e" not in found
        assert sorted(found["b"]) == [("conv1", 0), ("down", 0)]


def test_an_addition_behind_an_activation_or_without_a_convolution_stays_float() -> None:
    found = placed(RESIDUAL.replace("conv2 | e = Conv(d, w2)", "conv2 | e0 = Conv(d, w2)\nact | e = Relu(e0)"))
    assert uses(found)["b"] == [("conv1", 0)]
    found = placed(RESIDUAL.replace("conv2 | e = Conv(d, w2)", "pool | e = GlobalAveragePool(d)"))
    assert uses(found)["b"] == [("conv1", 0)]
    # Somebody else wants the convolution's own output, so it cannot fuse.
    found = placed(RESIDUAL, outputs=("y", "e"))
    assert uses(found)["b"] == [("conv1", 0)]


def test_the_skip_stays_float_when_the_convolution_before_the_addition_does() -> None:
    found = placed(RESIDUAL, PlaceOptions(exclude=("conv2",)))
    assert uses(found) == {"x": [("stem", 0)], "b": [("conv1", 0)], "g": [("conv3", 0)]}


def test_a_linear_bottleneck_is_quantized_once_for_its_convolution_and_its_skip() -> None:
    found = placed("""
        project0 | a = Conv(x, w0)
        expand | b = Conv(a, w1)
        act | c = HardSwish(b)
        project1 | d = Conv(c, w2)
        add | e = Add(a, d)
        last | y = Conv(e, w3)
    """)
    assert uses(found)["a"] == [("expand", 0), ("add", 0)]
    assert not {"b", "d"} & set(uses(found))
    assert len(found.activations) == len({a.tensor for a in found.activations}) == 4


POOLED = """
    stem | a = Conv(x, w0)
    relu | b = Relu(a)
    pool | c = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(b)
    turn | d = Transpose<perm = [0, 1, 3, 2]>(c)
    conv1 | e = Conv(d, w1)
    conv2 | f = Conv(d, w2)
    add | y = Add(e, f)
"""


def test_values_that_only_move_have_one_scale_before_and_after() -> None:
    found = placed(POOLED)
    assert uses(found) == {
        "x": [("stem", 0)],
        "b": [("pool", 0)],
        "d": [("conv1", 0), ("conv2", 0)],
        # Equally deep: the later one fuses.
        "e": [("add", 0)],
    }
    assert found.tied == (("b", "d"),)


@pytest.mark.parametrize(
    ("body", "options", "outputs"),
    [
        (POOLED, PlaceOptions(exclude=("conv2",)), ("y",)),
        (POOLED, PlaceOptions(exclude=("conv2",), quantize_outputs=True), ("y",)),
        (POOLED, None, ("y", "d")),
        (POOLED.replace("add |", "mean | m = GlobalAveragePool(d)\nadd |"), None, ("y", "m")),
    ],
)
def test_values_that_a_float_reader_wants_too_are_moved_in_float(
    body: str, options: PlaceOptions | None, outputs: tuple[str, ...]
) -> None:
    found = placed(body, options, outputs)
    assert "b" not in uses(found)
    assert ("conv1", 0) in uses(found)["d"]
    assert ("conv2", 0) not in uses(found)["d"] or options is None
    assert found.tied == ()


def test_a_path_begins_where_the_last_float_reader_is() -> None:
    found = placed(POOLED, outputs=("y", "c"))
    assert uses(found)["c"] == [("turn", 0)]
    assert "b" not in uses(found)
    assert found.tied == (("c", "d"),)


def test_averages_are_quantized_after_and_not_before() -> None:
    found = placed("""
        stem | a = Conv(x, w0)
        relu | b = Relu(a)
        pool | c = AveragePool<kernel_shape = [2, 2]>(b)
        conv1 | y = Conv(c, w1)
    """)
    assert uses(found) == {"x": [("stem", 0)], "c": [("conv1", 0)]}


SHUFFLED = """
    stem | a = Conv(x, w0)
    relu0 | b = Relu(a)
    side | c = Conv(b, w1)
    relu1 | d = Relu(c)
    join | e = Concat<axis = 1>(b, d)
    turn | f = Transpose<perm = [0, 1, 3, 2]>(e)
    split | g, h = Split<axis = 1>(f, halves)
    conv1 | i = Conv(h, w2)
    relu2 | j = Relu(i)
    join2 | k = Concat<axis = 1>(g, j)
    last | y = Conv(k, wide)
"""


def test_all_inputs_of_concatenations_on_the_way_have_one_scale() -> None:
    found = placed(SHUFFLED)
    assert uses(found) == {
        "x": [("stem", 0)],
        "b": [("side", 0), ("join", 0)],
        "d": [("join", 1)],
        "g": [("join2", 0)],
        "h": [("conv1", 0)],
        "j": [("join2", 1)],
        "k": [("last", 0)],
    }
    # The half that passes by joins both groups.
    assert found.tied == (("b", "d", "g", "h", "j", "k"),)


def test_a_concatenation_of_which_a_part_is_constant_is_quantized_after() -> None:
    found = placed("""
        stem | a = Conv(x, w0)
        join | b = Concat<axis = 0>(a, w1)
        last | y = Conv(b, w2)
    """)
    assert uses(found) == {"x": [("stem", 0)], "b": [("last", 0)]}


def test_a_concatenation_before_arithmetic_stays_float_unless_outputs_are_quantized() -> None:
    body = """
        stem | a = Conv(x, w0)
        pool | b = GlobalAveragePool(x)
        up | p = Expand(b, like)
        join | c = Concat<axis = 1>(a, p)
        tanh | d = Tanh(c)
        last | y = Conv(d, wide)
    """
    model = graph(body)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 8, 8, 8], np.int64), "like"))
    assert uses(place(model)) == {"x": [("stem", 0)], "d": [("last", 0)]}
    found = place(model, OUTPUTS)
    assert (uses(found)["a"], uses(found)["p"]) == ([("join", 0)], [("join", 1)])
    assert found.tied == (("a", "b", "p"),)


def test_outputs_are_quantized_after_all_that_fuses() -> None:
    found = placed(RESIDUAL.replace("conv3 | y = Conv(g, w3)", "mean | y = GlobalAveragePool(g)"), OUTPUTS)
    assert uses(found)["g"] == [("mean", 0)]
    assert not {"a", "c", "e", "f", "y"} & set(uses(found))
    assert "g" not in uses(placed(RESIDUAL.replace("conv3 | y = Conv(g, w3)", "mean | y = GlobalAveragePool(g)")))


@pytest.mark.parametrize(
    "gate",
    [
        "g | b = Sigmoid(a)\nm | c = Mul(a, b)",
        "g | b = HardSigmoid(a)\nm | c = Mul(b, a)",
        "g1 | p = Add(a, three)\ng2 | q = Clip(p, zero, six)\nm1 | r = Mul(a, q)\nm2 | c = Div(r, six)",
        "g1 | p = Add(a, three)\ng2 | q = Clip(p, zero, six)\ng3 | r = Div(q, six)\nm | c = Mul(a, r)",
        "bn | p = BatchNormalization(a, gamma, beta, mean, var)\nact | c = HardSwish(p)",
    ],
)
def test_activations_in_parts_are_not_cut(gate: str) -> None:
    body = f"stem | a = Conv(x, w0)\n{gate}\nmean | y = GlobalAveragePool(c)"
    assert uses(placed(body, OUTPUTS)) == {"x": [("stem", 0)], "c": [("mean", 0)]}


def test_an_activation_reads_float_even_with_other_readers() -> None:
    body = """
        stem | a = Conv(x, w0)
        mean | b = GlobalAveragePool(a)
        relu | c = Relu(a)
        add | y = Add(b, c)
    """
    assert uses(placed(body, OUTPUTS)) == {"x": [("stem", 0)], "a": [("mean", 0)]}


def test_what_the_graph_returns_and_what_reads_it_through_moves_stays_float() -> None:
    body = """
        stem | a = Conv(x, w0)
        mean | b = GlobalAveragePool(a)
        rows | c = Reshape(b, rows)
        head | d = Gemm(c, flat)
        out | y = Squeeze(d, one)
    """
    found = placed(body, OUTPUTS)
    assert uses(found) == {"x": [("stem", 0)], "a": [("mean", 0)], "b": [("rows", 0)], "c": [("head", 0)]}


def test_an_excluded_layer_reads_and_weighs_in_float() -> None:
    body = """
        first | a = Conv(x, w0)
        relu | b = Relu(a)
        middle | c = Conv(b, w1)
        other | d = Conv(b, w2)
        last | e = Conv(c, w3)
        mean | y = GlobalAveragePool(e)
    """
    for options in (PlaceOptions(("mid*",)), PlaceOptions(("w1",), quantize_outputs=True)):
        found = placed(body, options, ("y", "d"))
        assert uses(found)["b"] == [("other", 0)]
        assert uses(found)["c"] == [("last", 0)]
        assert [w.node for w in found.weights] == ["first", "other", "last"]
        assert found.in_float == (("middle", f"excluded by {options.exclude[0]!r}"),)


def test_a_pattern_that_matches_nothing_is_an_error_that_lists_the_layers() -> None:
    with pytest.raises(InputError) as error:
        placed(RESIDUAL, PlaceOptions(("conv1", "layer9.*", "fc")))
    assert error.value.found == "layer9.*, fc"
    assert "stem, conv1, conv2, conv3" in (error.value.fix or "")


def test_nothing_left_to_quantize_is_an_error() -> None:
    with pytest.raises(InputError, match=r"(?s)no layer can be quantized.*excluded by '\*'"):
        placed(RESIDUAL, PlaceOptions(("*",)))
    with pytest.raises(InputError, match="no Conv, Gemm or MatMul"):
        placed("relu | y = Relu(x)")


@pytest.mark.parametrize(
    "node",
    [
        "q | a = QuantizeLinear(x, three)\nd | b = DequantizeLinear(a, three)",
        "q | a, s, z = DynamicQuantizeLinear(x)\nd | b = Relu(x)",
    ],
)
def test_a_quantized_model_is_refused(node: str) -> None:
    with pytest.raises(InputError, match=r"already quantized(?s:.)*QuantizeLinear q"):
        placed(f"{node}\nlast | y = Conv(b, w0)")


def test_an_opset_too_old_is_refused_with_both_numbers() -> None:
    body = "only | y = Conv(x, w0)"
    with pytest.raises(InputError, match="too old") as error:
        place(graph(body, opset=12))
    assert error.value.found == "opset 12"
    assert "opset 13" in (error.value.fix or "")
    assert place(graph(body, opset=13)).weights


def test_nodes_without_names_of_their_own_go_by_what_they_make() -> None:
    model = graph("same | a = Conv(x, w0)\nsame | b = Relu(a)\nleft | y = Conv(b, w1)")
    model.graph.node[2].name = ""
    found = place(model)
    assert uses(found) == {"x": [("a", 0)], "b": [("y", 0)]}
    assert [w.node for w in found.weights] == ["a", "y"]


def test_weights_and_values_that_a_subgraph_reads_stay_float() -> None:
    model = graph(POOLED + "branch | z = Identity(x)", ("y", "z"))
    inner = parser.parse_graph("inner () => (float z1) { z0 = Relu(c) z1 = Conv(z0, w1) }")
    condition = onnx.helper.make_tensor("yes", onnx.TensorProto.BOOL, [], [True])
    model.graph.initializer.append(condition)
    del model.graph.node[-1]
    model.graph.node.append(onnx.helper.make_node("If", ["yes"], ["z"], "branch", then_branch=inner, else_branch=inner))
    found = place(model)
    assert found.in_float == (("conv1", "its weight is also an output or read by a subgraph"),)
    assert "b" not in uses(found)
