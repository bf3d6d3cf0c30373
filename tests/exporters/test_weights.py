"""The walk from an op to its weight: which tensor, by what name, and along which stored axis the op reduces.

The axis is held against what ONNX Runtime computes: zeroing one slice of the weight along its reduction axis does what
zeroing the same channel of the activation does. Along any other axis it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.weights import WeightUse, weight_uses
from maskplan.pipeline.masking.eligibility import CHANNELS, GROUPED, NOT_CONSTANT, UNSUPPORTED

Array = npt.NDArray[np.generic]


def model_of(
    nodes: Sequence[onnx.NodeProto],
    tensors: dict[str, Array],
    inputs: dict[str, Sequence[int | str | None]],
    outputs: Sequence[str] = ("y",),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def noise(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def steps(*shape: int) -> npt.NDArray[np.int8]:
    return np.random.default_rng(1).integers(-50, 50, shape).astype(np.int8)


def node(op: str, inputs: Sequence[str], output: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"the {op}" if output == "y" else "", **attributes)


@dataclass(frozen=True)
class Case:
    """A model with one weight `w`: the axis of `x` that is reduced, and what means zero in the stored tensor."""

    nodes: tuple[onnx.NodeProto, ...]
    weight: Array
    x: tuple[int, ...]
    reduced: int
    extra: tuple[tuple[str, Array], ...] = ()
    zero: int = 0


SCALE = np.array(0.125, np.float32)
QUANTISED = (("s", SCALE), ("z", np.array(7, np.int8)))
CASES = {
    "conv": Case((node("Conv", ["x", "w"]),), noise(6, 8, 3, 3), (2, 8, 5, 5), 1),
    "conv over a line": Case((node("Conv", ["x", "w"]),), noise(6, 8, 3), (2, 8, 5), 1),
    "conv over a volume": Case((node("Conv", ["x", "w"]),), noise(6, 8, 2, 2, 2), (2, 8, 3, 3, 3), 1),
    "gemm": Case((node("Gemm", ["x", "w"]),), noise(8, 12), (2, 8), 1),
    "gemm, transB": Case((node("Gemm", ["x", "w"], transB=1),), noise(12, 8), (2, 8), 1),
    "gemm, transA of the activation": Case((node("Gemm", ["x", "w"], transA=1),), noise(8, 12), (8, 2), 0),
    "gemm, both transposed": Case((node("Gemm", ["x", "w"], transA=1, transB=1),), noise(12, 8), (8, 2), 0),
    "gemm, the weight first": Case((node("Gemm", ["w", "x"]),), noise(12, 8), (8, 2), 0),
    "gemm, the weight first, transA": Case((node("Gemm", ["w", "x"], transA=1),), noise(8, 12), (8, 2), 0),
    "matmul": Case((node("MatMul", ["x", "w"]),), noise(8, 12), (2, 8), 1),
    "matmul of pixels": Case((node("MatMul", ["x", "w"]),), noise(8, 12), (2, 5, 5, 8), 3),
    "matmul, batched weight": Case((node("MatMul", ["x", "w"]),), noise(3, 8, 12), (3, 2, 8), 2),
    "matmul, the weight first": Case((node("MatMul", ["w", "x"]),), noise(12, 8), (8, 2), 0),
    "matmul, batched weight first": Case((node("MatMul", ["w", "x"]),), noise(3, 12, 8), (3, 8, 2), 1),
    "identity": Case((node("Identity", ["w"], "i"), node("Conv", ["x", "i"])), noise(6, 8, 3, 3), (2, 8, 5, 5), 1),
    "cast": Case(
        (node("Cast", ["w"], "i", to=TensorProto.FLOAT), node("Conv", ["x", "i"])),
        noise(6, 8, 3, 3).astype(np.float16),
        (2, 8, 5, 5),
        1,
    ),
    "transpose without perm": Case(
        (node("Transpose", ["w"], "i"), node("MatMul", ["x", "i"])), noise(12, 8), (2, 8), 1
    ),
    "transpose with perm": Case(
        # Stored (R, S, C, K), as TensorFlow does.
        (node("Transpose", ["w"], "i", perm=[3, 2, 0, 1]), node("Conv", ["x", "i"])),
        noise(3, 5, 8, 6),
        (2, 8, 6, 6),
        1,
    ),
    "two transposes": Case(
        (
            node("Transpose", ["w"], "i", perm=[1, 2, 3, 0]),
            node("Transpose", ["i"], "j", perm=[3, 0, 2, 1]),
            node("Conv", ["x", "j"]),
        ),
        noise(6, 8, 3, 5),
        (2, 8, 6, 6),
        1,
    ),
    "transpose, then transB": Case(
        (node("Transpose", ["w"], "i", perm=[1, 0]), node("Gemm", ["x", "i"], transB=1)), noise(8, 12), (2, 8), 1
    ),
    "transpose of a batched weight": Case(
        (node("Transpose", ["w"], "i", perm=[2, 0, 1]), node("MatMul", ["x", "i"])), noise(8, 12, 3), (3, 2, 8), 2
    ),
    "reshape": Case(
        (node("Reshape", ["w", "shape"], "i"), node("Conv", ["x", "i"])),
        noise(6, 8, 9),
        (2, 8, 5, 5),
        1,
        (("shape", np.array([6, 8, 3, -1], np.int64)),),
    ),
    "linear weight as a 1x1 convolution": Case(
        (node("Unsqueeze", ["w", "axes"], "i"), node("Conv", ["x", "i"])),
        noise(6, 8),
        (2, 8, 5, 5),
        1,
        (("axes", np.array([2, 3], np.int64)),),
    ),
    "1x1 convolution as a linear weight": Case(
        (node("Squeeze", ["w", "axes"], "i"), node("Gemm", ["x", "i"], transB=1)),
        noise(6, 8, 1, 1),
        (2, 8),
        1,
        (("axes", np.array([-1, -2], np.int64)),),
    ),
    "dequantized": Case(
        (node("DequantizeLinear", ["w", "s", "z"], "i"), node("Conv", ["x", "i"])),
        steps(6, 8, 3, 3),
        (2, 8, 5, 5),
        1,
        QUANTISED,
        7,
    ),
    "dequantized, no zero point": Case(
        (node("DequantizeLinear", ["w", "s"], "i"), node("Conv", ["x", "i"])),
        steps(6, 8, 3, 3),
        (2, 8, 5, 5),
        1,
        QUANTISED[:1],
    ),
    "dequantized, then transposed": Case(
        (
            node("DequantizeLinear", ["w", "s", "z"], "i"),
            node("Transpose", ["i"], "j", perm=[1, 0]),
            node("MatMul", ["x", "j"]),
        ),
        steps(12, 8),
        (2, 8),
        1,
        QUANTISED,
        7,
    ),
    "quantized and dequantized": Case(
        (
            node("QuantizeLinear", ["w", "s"], "i"),
            node("DequantizeLinear", ["i", "s"], "j"),
            node("Conv", ["x", "j"]),
        ),
        noise(6, 8, 3, 3),
        (2, 8, 5, 5),
        1,
        QUANTISED[:1],
    ),
}


def single(model: onnx.ModelProto, m: int = 4) -> WeightUse:
    (use,) = weight_uses(model, m)
    return use


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_axis_is_the_one_that_the_op_reduces(case: Case) -> None:
    def build(weight: Array) -> onnx.ModelProto:
        return model_of(case.nodes, {"w": weight, **dict(case.extra)}, {"x": case.x})

    use = single(build(case.weight))
    assert use.name == "w"
    assert use.node == f"the {case.nodes[-1].op_type}"
    assert use.op == case.nodes[-1].op_type
    assert use.reason is None
    assert use.tensor is not None
    assert np.array_equal(numpy_helper.to_array(use.tensor), case.weight)
    x = noise(*case.x, seed=2)
    assert case.weight.shape[use.axis] == x.shape[case.reduced]
    for channel in range(x.shape[case.reduced]):
        without, pruned = x.copy(), case.weight.copy()
        np.moveaxis(without, case.reduced, 0)[channel] = 0
        np.moveaxis(pruned, use.axis, 0)[channel] = case.zero
        expected, found = run(build(case.weight), without), run(build(pruned), x)
        assert np.allclose(found, expected, atol=1e-5)
        assert not np.allclose(found, run(build(case.weight), x), atol=1e-3)


def test_a_square_weight_has_one_right_axis() -> None:
    """Both axes have the same length, so only the op says which one is reduced."""
    for op, attributes, axis in (("Gemm", {"transB": 1}, 1), ("Gemm", {}, 0), ("MatMul", {}, 0)):
        found = single(model_of([node(op, ["x", "w"], **attributes)], {"w": noise(8, 8)}, {"x": (2, 8)}))
        assert found.axis == axis


@pytest.mark.parametrize("kind", ["value", "sparse"])
def test_a_constant_node_is_a_weight_under_its_outputs_name(kind: str) -> None:
    weight = noise(6, 8, 1, 1)
    if kind == "value":
        constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(weight, "inner"))
        use = single(model_of([constant, node("Conv", ["x", "k"])], {}, {"x": (2, 8, 4, 4)}))
        assert (use.name, use.axis, use.reason) == ("k", 1, None)
        assert use.tensor is not None
        assert np.array_equal(numpy_helper.to_array(use.tensor), weight)
    else:
        values = numpy_helper.from_array(np.ones(2, np.float32), "k")
        indices = numpy_helper.from_array(np.array([1, 5], np.int64), "i")
        sparse = helper.make_sparse_tensor(values, indices, [6, 8, 1, 1])
        constant = helper.make_node("Constant", [], ["k"], sparse_value=sparse)
        use = single(model_of([constant, node("Conv", ["x", "k"])], {}, {"x": (2, 8, 4, 4)}))
        assert (use.name, use.reason) == ("k", NOT_CONSTANT)


@pytest.mark.parametrize(
    ("op", "weight", "x", "attributes", "reason"),
    [
        ("Conv", (8, 4, 3, 3), (2, 8, 5, 5), {"group": 2}, GROUPED),
        ("Conv", (8, 1, 3, 3), (2, 8, 5, 5), {"group": 8}, GROUPED),
        ("Conv", (8, 3, 3, 3), (2, 3, 5, 5), {}, CHANNELS),
        ("Conv", (8, 58, 1, 1), (2, 58, 5, 5), {}, CHANNELS),
        ("Gemm", (10, 8), (2, 10), {}, CHANNELS),
        ("MatMul", (6, 8), (2, 6), {}, CHANNELS),
        ("ConvTranspose", (8, 8, 3, 3), (2, 8, 5, 5), {}, UNSUPPORTED),
        ("ConvTranspose", (8, 4, 3, 3), (2, 8, 5, 5), {"group": 2}, UNSUPPORTED),
    ],
)
def test_what_can_never_be_2_4_says_why(
    op: str, weight: tuple[int, ...], x: tuple[int, ...], attributes: dict[str, int], reason: str
) -> None:
    use = single(model_of([node(op, ["x", "w"], **attributes)], {"w": noise(*weight)}, {"x": x}))
    assert (use.name, use.reason, use.groups) == ("w", reason, attributes.get("group", 1))


def test_eligibility_follows_the_group_length() -> None:
    model = model_of([node("Conv", ["x", "w"])], {"w": noise(8, 6, 1, 1)}, {"x": (2, 6, 5, 5)})
    assert single(model, 4).reason == CHANNELS
    assert single(model, 2).reason is None


def test_a_computed_convolution_weight_is_not_constant() -> None:
    for maker in (node("Mul", ["w", "x2"], "k"), node("Reshape", ["x2", "shape"], "k")):
        tensors = {"w": noise(6, 8, 1, 1), "shape": np.array([6, 8, 1, 1], np.int64)}
        model = model_of([maker, node("Conv", ["x", "k"])], tensors, {"x": (2, 8, 5, 5), "x2": (6, 8, 1, 1)})
        use = single(model)
        assert (use.name, use.tensor, use.reason) == ("k", None, NOT_CONSTANT)


def test_a_weight_given_at_run_time_is_not_constant() -> None:
    model = model_of([node("Conv", ["x", "w"])], {}, {"x": (2, 8, 5, 5), "w": (6, 8, 1, 1)})
    assert single(model).reason == NOT_CONSTANT


def test_an_overridable_initializer_is_a_weight() -> None:
    """Older exporters list initializers among the inputs as well."""
    model = model_of([node("Conv", ["x", "w"])], {"w": noise(6, 8, 1, 1)}, {"x": (2, 8, 5, 5), "w": (6, 8, 1, 1)})
    assert single(model).reason is None


def test_products_of_activations_and_vectors_are_no_weights() -> None:
    nodes = [
        node("MatMul", ["x", "x2"], "a"),
        node("Gemm", ["a", "x2"], "b"),
        node("MatMul", ["b", "v"], "c"),
        node("Add", ["c", "m"]),
    ]
    tensors = {"v": noise(8), "m": noise(8, 8)}
    assert not list(weight_uses(model_of(nodes, tensors, {"x": (8, 8), "x2": (8, 8)})))


def test_a_bias_is_no_weight() -> None:
    model = model_of([node("Gemm", ["x", "w", "b"])], {"w": noise(8, 4), "b": noise(4, 4)}, {"x": (4, 8)})
    assert single(model).name == "w"


def test_a_weight_used_twice_is_listed_twice_each_time_with_its_own_axis() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "up"),
        helper.make_node("Gemm", ["a", "w"], ["y"], "down", transB=1),
    ]
    uses = list(weight_uses(model_of(nodes, {"w": noise(8, 12)}, {"x": (2, 8)})))
    assert [(u.name, u.node, u.axis) for u in uses] == [("w", "up", 0), ("w", "down", 1)]


def test_a_nameless_node_goes_by_its_output() -> None:
    model = model_of([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": noise(6, 8, 1, 1)}, {"x": (2, 8, 5, 5)})
    assert single(model).node == "y"


def test_uses_come_in_the_order_of_the_graph() -> None:
    names = [f"w{i}" for i in (3, 0, 2, 1)]
    nodes = [helper.make_node("MatMul", [f"a{i}", name], [f"a{i + 1}"]) for i, name in enumerate(names)]
    model = model_of(nodes, {n: noise(8, 8) for n in sorted(names)}, {"a0": (2, 8)}, ["a4"])
    assert [u.name for u in weight_uses(model)] == names


def subgraph(name: str, nodes: Sequence[onnx.NodeProto], tensors: dict[str, Array], output: str) -> onnx.GraphProto:
    return helper.make_graph(
        nodes,
        name,
        [],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, key) for key, value in tensors.items()],
    )


def test_branches_are_walked_with_the_outer_weights_in_sight() -> None:
    """One branch uses an outer weight through an outer Transpose, the other has a nested branch with its own weight."""
    inner = subgraph("inner", [helper.make_node("MatMul", ["x", "own"], ["p"], "nested")], {"own": noise(8, 8)}, "p")
    other = subgraph("other", [helper.make_node("MatMul", ["x", "outer"], ["q"], "plain")], {}, "q")
    nested = helper.make_node("If", ["flag"], ["e"], then_branch=inner, else_branch=other)
    then = subgraph("then", [helper.make_node("MatMul", ["x", "turned"], ["t"], "branch")], {}, "t")
    otherwise = subgraph("else", [nested], {}, "e")
    nodes = [
        helper.make_node("Transpose", ["outer"], ["turned"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=otherwise),
    ]
    model = model_of(nodes, {"outer": noise(8, 8), "flag": np.array(True)}, {"x": (2, 8)})
    assert run(model, noise(2, 8)).shape == (2, 8)
    found = {u.node: (u.name, u.axis) for u in weight_uses(model)}
    assert found == {"branch": ("outer", 1), "nested": ("own", 0), "plain": ("outer", 0)}


def zero_point_of(model: onnx.ModelProto) -> int | None:
    point = single(model).zero_point
    return None if point is None else int(numpy_helper.to_array(point.tensor))


def as_constant_node(value: Array) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["z"], value=numpy_helper.from_array(value))


@pytest.mark.parametrize("stored", ["initializer", "constant node"])
def test_the_zero_point_of_a_quantized_tensor_is_found(stored: str) -> None:
    nodes = [node("DequantizeLinear", ["w", "s", "z"], "i"), node("Conv", ["x", "i"])]
    point = np.array(7, np.int8)
    tensors: dict[str, Array] = {"w": steps(6, 8, 1, 1), "s": SCALE}
    if stored == "initializer":
        model = model_of(nodes, {**tensors, "z": point}, {"x": (2, 8, 4, 4)})
    else:
        model = model_of([as_constant_node(point), *nodes], tensors, {"x": (2, 8, 4, 4)})
    assert zero_point_of(model) == 7


def test_the_zero_of_a_float_tensor_that_is_quantized_later_is_zero() -> None:
    """The zero point tells zero in the quantized tensor; what is stored before QuantizeLinear is a plain float."""
    nodes = [
        node("QuantizeLinear", ["w", "s", "z"], "i"),
        node("DequantizeLinear", ["i", "s", "z"], "j"),
        node("Conv", ["x", "j"]),
    ]
    model = model_of(nodes, {"w": noise(6, 8, 1, 1), "s": SCALE, "z": np.array(7, np.int8)}, {"x": (2, 8, 4, 4)})
    assert zero_point_of(model) is None


def test_a_convolution_inside_a_local_function_is_seen() -> None:
    """Older exports of PyTorch's new exporter keep modules as functions."""
    opset = helper.make_opsetid("", 20)
    inside = helper.make_node("Conv", ["a", "k"], ["b"], "inside")
    model = model_of(
        [helper.make_node("Layer", ["x", "w"], ["y"], domain="local")], {"w": noise(6, 8, 1, 1)}, {"x": (2, 8, 4, 4)}
    )
    model.functions.append(helper.make_function("local", "Layer", ["a", "k"], ["b"], [inside], [opset]))
    model.opset_import.append(helper.make_opsetid("local", 1))
    assert run(model, noise(2, 8, 4, 4)).shape == (2, 6, 4, 4)
    assert [u.name for u in weight_uses(model)] == ["w"]
