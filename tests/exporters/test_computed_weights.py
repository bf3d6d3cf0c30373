"""Weights that are not stored as their operator reads them: what `check` sees, what `prune` stores, what stays equal.

Values are held against ONNX Runtime, which computes the same graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.computed_weights import inline_functions, store_weights
from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.exporters.prune import prune_model, prune_onnx
from maskplan.pipeline.core.artifacts import Pattern

Array = npt.NDArray[Any]
STRICT = CheckOptions(strict=True)
PATTERN = Pattern(2, 4)
X = np.random.default_rng(5).standard_normal((2, 8, 5, 5)).astype(np.float32)


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_of(nodes: list[onnx.NodeProto], tensors: dict[str, Array], x: tuple[Any, ...] = ("n", 8, 5, 5)) -> Any:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, x: Array = X) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"x": x})[0]
    return found


def node(op: str, inputs: list[str], outputs: list[str], name: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name, **attributes)


CONV = node("Conv", ["x", "k"], ["y"], "conv", pads=[1] * 4)
AXES = np.array([1, 2, 3], np.int64)
COMPUTED: dict[str, tuple[list[onnx.NodeProto], dict[str, Array]]] = {
    "gain times direction": ([node("Mul", ["v", "g"], ["k"])], {"v": noise(6, 8, 3, 3), "g": noise(6, 1, 1, 1)}),
    "normalized": (
        [
            node("ReduceL2", ["v", "axes"], ["n"], keepdims=1),
            node("Div", ["v", "n"], ["u"]),
            node("Mul", ["u", "g"], ["k"]),
        ],
        {"v": noise(6, 8, 3, 3), "axes": AXES, "g": noise(6, 1, 1, 1)},
    ),
    "standardized": (
        [
            node("ReduceMean", ["v", "axes"], ["m"], keepdims=1),
            node("Sub", ["v", "m"], ["c"]),
            node("Mul", ["c", "c"], ["s"]),
            node("ReduceMean", ["s", "axes"], ["d"], keepdims=1),
            node("Add", ["d", "eps"], ["e"]),
            node("Sqrt", ["e"], ["r"]),
            node("Div", ["c", "r"], ["k"]),
        ],
        {"v": noise(6, 8, 3, 3), "axes": AXES, "eps": np.array(1e-5, np.float32)},
    ),
    "joined from parts": (
        [node("Concat", ["a", "b"], ["k"], axis=1)],
        {"a": noise(6, 4, 3, 3), "b": noise(6, 4, 3, 3, seed=1)},
    ),
    "split off": (
        [node("Split", ["all", "sizes"], ["other", "k"], axis=0)],
        {"all": noise(10, 8, 3, 3), "sizes": np.array([4, 6], np.int64)},
    ),
    "split in equal parts, in FP16": (
        [node("Split", ["all"], ["k16", "other"], axis=0, num_outputs=2), node("Cast", ["k16"], ["k"], to=1)],
        {"all": noise(12, 8, 3, 3).astype(np.float16)},
    ),
    "cut out and turned": (
        [
            node("Slice", ["all", "from", "to", "axis"], ["cut"]),
            node("Transpose", ["cut"], ["k"], perm=[3, 2, 0, 1]),
        ],
        {
            "all": noise(3, 3, 12, 6),
            "from": np.array([2], np.int64),
            "to": np.array([10], np.int64),
            "axis": np.array([2], np.int64),
        },
    ),
    "of low rank": (
        [node("MatMul", ["a", "b"], ["m"]), node("Reshape", ["m", "to"], ["k"])],
        {"a": noise(6, 3), "b": noise(3, 72), "to": np.array([6, 8, 3, 3], np.int64)},
    ),
    "axes merged in storage": (
        [node("Reshape", ["v", "to"], ["k"])],
        {"v": noise(6, 72), "to": np.array([6, 8, 3, 3], np.int64)},
    ),
    "quantized after it was computed": (
        [
            node("Mul", ["v", "g"], ["w"]),
            node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=0),
            node("DequantizeLinear", ["q", "s", "z"], ["k"], axis=0),
        ],
        {
            "v": noise(6, 8, 3, 3),
            "g": noise(6, 1, 1, 1),
            "s": np.full(6, 0.05, np.float32),
            "z": np.zeros(6, np.int8),
        },
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_checked_and_pruned_as_its_operator_reads_it(name: str) -> None:
    nodes, tensors = COMPUTED[name]
    dense = model_of([*nodes, CONV], tensors)
    expected = run(dense)
    (found,) = check_2to4(dense).weights
    assert (found.verdict, found.op, found.shape) == ("violating", "Conv", (6, 8, 3, 3))
    assert "mask" not in str(found.hint)

    same = onnx.ModelProto()
    same.CopyFrom(dense)
    store_weights(same, None)
    assert [n.op_type for n in same.graph.node] == ["Conv"]
    assert np.allclose(run(same), expected, atol=1e-5)

    weights, changed, zeroed = prune_model(dense, PATTERN)
    assert (weights, changed, zeroed) == (1, 1, pytest.approx(6 * 72 / 2, abs=60))
    assert check_2to4(dense, STRICT).passed
    assert not np.allclose(run(dense), expected, atol=1e-2)
    (kernel,) = (numpy_helper.to_array(t) for t in dense.graph.initializer if list(t.dims) == [6, 8, 3, 3])
    reference = model_of([CONV], {"k": kernel})
    assert np.allclose(run(dense), run(reference), atol=1e-6)


def test_a_computed_weight_that_is_2_4_conforms_without_talk_of_masks() -> None:
    sparse = noise(6, 8, 3, 3) * np.tile(np.array([1, 0, 1, 0], np.float32), 2).reshape(1, 8, 1, 1)
    nodes = [node("Mul", ["v", "g"], ["k"]), CONV]
    report = check_2to4(model_of(nodes, {"v": sparse, "g": noise(6, 1, 1, 1)}), STRICT)
    assert (report.verdict, report.weights[0].verdict) == ("pass", "conforming")
    assert report.weights[0].hint == "computed in the graph by Mul"


def test_a_mask_in_the_graph_is_told_and_prune_bakes_it() -> None:
    mask = np.tile(np.array([True, False, True, False]), 2).reshape(1, 8, 1, 1)
    nodes = [node("Cast", ["m"], ["f"], to=TensorProto.FLOAT), node("Mul", ["v", "f"], ["k"]), CONV]
    model = model_of(nodes, {"v": noise(6, 8, 3, 3), "m": mask})
    report = check_2to4(model)
    assert (report.verdict, report.weights[0].verdict) == ("fail", "ineligible")
    assert "bake the mask" in str(report.weights[0].hint)
    expected = run(model)
    assert prune_model(model, PATTERN) == (1, 0, 0)
    assert check_2to4(model, STRICT).passed
    assert np.allclose(run(model), expected, atol=1e-5)


def test_what_depends_on_the_input_is_not_constant_and_what_cannot_be_computed_is_unknown() -> None:
    dynamic = [node("ReduceMean", ["x"], ["m"], keepdims=0), node("Mul", ["v", "m"], ["k"]), CONV]
    report = check_2to4(model_of(dynamic, {"v": noise(6, 8, 3, 3)}))
    assert [(w.verdict, w.reason) for w in report.weights] == [("ineligible", "not_constant")]
    odd = [node("CumSum", ["v", "axis"], ["k"]), CONV]
    report = check_2to4(model_of(odd, {"v": noise(6, 8, 3, 3), "axis": np.array(0, np.int64)}))
    assert (report.verdict, report.unknown) == ("unknown", 1)
    assert report.weights[0].hint == "cannot be computed: CumSum is not computed here"


def test_a_hostile_size_is_unknown_and_not_computed() -> None:
    huge = np.array([1 << 20, 1 << 20, 3, 3], np.int64)
    for maker in (node("ConstantOfShape", ["huge"], ["k"]), node("Expand", ["v", "huge"], ["k"])):
        report = check_2to4(model_of([maker, CONV], {"v": noise(1, 1, 1, 1), "huge": huge}))
        assert report.verdict == "unknown"


def behind_nodes() -> onnx.ModelProto:
    """One weight behind each kind of node, as converters and exporters leave them; two layers share a copied one."""
    nodes = [
        node("Identity", ["w2"], ["w2i"]),
        node("Conv", ["x", "w2i"], ["a"], "copied", pads=[1] * 4),
        node("Conv", ["a", "w2"], ["b"], "again", pads=[1] * 4),
        node("Unsqueeze", ["w3", "two"], ["w3u"]),
        node("Conv", ["b", "w3u"], ["c"], "widened"),
        node("Transpose", ["w4"], ["w4t"], perm=[3, 2, 0, 1]),
        node("Conv", ["c", "w4t"], ["d"], "turned", pads=[1] * 4),
        node("GlobalAveragePool", ["d"], ["e"]),
        node("Flatten", ["e"], ["f"]),
        node("Constant", [], ["w5"], value=numpy_helper.from_array(noise(16, 8, seed=5))),
        node("Transpose", ["w5"], ["w5t"]),
        node("MatMul", ["f", "w5t"], ["g"], "product"),
        node("Cast", ["w6"], ["w6f"], to=TensorProto.FLOAT),
        node("Gemm", ["g", "w6f"], ["y"], "head", transB=1),
    ]
    tensors = {
        "w2": noise(8, 8, 3, 3),
        "w3": noise(8, 8, seed=1),
        "two": np.array([2, 3], np.int64),
        "w4": noise(3, 3, 8, 8, seed=2),
        "w6": noise(4, 16, seed=3).astype(np.float16),
    }
    return model_of(nodes, tensors)


def test_stored_weights_keep_their_names_and_the_outputs() -> None:
    model = behind_nodes()
    expected = run(model)
    store_weights(model, None)
    assert np.allclose(run(model), expected, atol=1e-5)
    stored = {t.name: t for t in model.graph.initializer}
    reads = {n.name: n.input[1] for n in model.graph.node if n.op_type in ("Conv", "MatMul", "Gemm")}
    assert reads == {"copied": "w2", "again": "w2", "widened": "w3", "turned": "w4", "product": "w5", "head": "w6"}
    assert {stored[name].data_type for name in reads.values() if name in stored} == {TensorProto.FLOAT}
    assert not {"Identity", "Transpose", "Cast", "Unsqueeze"} & {n.op_type for n in model.graph.node}


def test_a_weight_that_is_also_an_output_keeps_its_producer() -> None:
    model = model_of([node("Mul", ["v", "g"], ["k"]), CONV], {"v": noise(6, 8, 3, 3), "g": noise(6, 1, 1, 1)})
    model.graph.output.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, (6, 8, 3, 3)))
    expected = run(model)
    store_weights(model, None)
    assert np.allclose(run(model), expected, atol=1e-5)
    assert [n.op_type for n in model.graph.node] == ["Mul", "Conv"]


def with_function(recursive: bool = False) -> onnx.ModelProto:
    """A convolution in a local function, whose weight the function computes from what it is given."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    inside = [node("Mul", ["v", "g"], ["k"]), node("Conv", ["a", "k"], ["b"], "inside", pads=[1] * 4)]
    if recursive:
        inside[1] = node("Layer", ["a", "v", "k"], ["b"], domain="local")
    model = model_of(
        [node("Layer", ["x", "w", "gain"], ["y"], domain="local")], {"w": noise(6, 8, 3, 3), "gain": noise(6, 1, 1, 1)}
    )
    model.opset_import.append(opsets[1])
    model.functions.append(helper.make_function("local", "Layer", ["a", "v", "g"], ["b"], inside, opsets))
    return model


def test_a_weight_computed_in_a_local_function_is_pruned(tmp_path: Path) -> None:
    path = tmp_path / "f.onnx"
    path.write_bytes(with_function().SerializeToString())
    assert check_2to4(path).violating == 1
    assert prune_onnx(path, tmp_path / "s.onnx", PATTERN).weights == 1
    assert check_2to4(tmp_path / "s.onnx", STRICT).passed
    assert run(onnx.load(tmp_path / "s.onnx")).shape == (2, 6, 5, 5)


def test_recursive_functions_are_left_alone() -> None:
    model = with_function(recursive=True)
    inline_functions(model)
    assert len(model.functions) == 1
