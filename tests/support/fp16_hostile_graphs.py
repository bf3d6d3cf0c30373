"""Graphs that a plain conversion to FP16 breaks: types, sizes, subgraphs; and all graphs by name, on (n, 8, 4, 4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from fp16_constant_graphs import (
    WEIGHTS,
    batchnorm,
    clip_by_attributes,
    clip_to_the_largest_float,
    epsilon_behind_an_identity,
    f32,
    features,
    i64,
    layer_norm_in_parts,
    logarithm_of_epsilon,
    mask_by_where,
    mask_of_integers,
    masked_softmax,
    normalized_by_clip_and_expand,
    normalized_by_max,
    pad_before_pool,
    reciprocal_of_epsilon,
)
from fp16_graphs import FLOAT, constant, model_of, node, noise
from onnx import TensorProto, helper, numpy_helper

INT64 = TensorProto.INT64


def nms() -> onnx.ModelProto:
    nodes = [
        node("Reshape", ["x", "flat"], "f"),
        node("Slice", ["f", "zero", "four", "two"], "boxes"),
        node("Transpose", ["f"], "t", perm=[0, 2, 1]),
        node("Slice", ["t", "zero", "one", "one"], "scores"),
        constant("most", i64(5)),
        constant("iou", f32(0.3)),
        constant("threshold", f32(0.1)),
        node("NonMaxSuppression", ["boxes", "scores", "most", "iou", "threshold"], "selected"),
        node("Cast", ["selected"], "y", to=FLOAT),
    ]
    tensors = {"flat": i64(1, 16, 8), "zero": i64(0), "one": i64(1), "two": i64(2), "four": i64(4)}
    return model_of(nodes, tensors, shape=(1, 8, 4, 4))


def resize_by_computed_scales() -> onnx.ModelProto:
    """Scales from a division of sizes: 10 / 3 is not an FP16 number, and floor(4 * 10 / 3) depends on it."""
    nodes = [
        node("Shape", ["x"], "s", start=2, end=4),
        node("Cast", ["s"], "sf", to=FLOAT),
        node("Div", ["target", "sf"], "ratio"),
        node("Concat", ["ones", "ratio"], "scales", axis=0),
        node("Resize", ["x", "", "scales"], "z", mode="nearest"),
        node("Conv", ["z", "w"]),
    ]
    tensors = {"w": noise(8, 8, 1, 1), "target": f32(13.4, 13.4), "ones": f32(1, 1)}
    return model_of(nodes, tensors)


def windows_counted_in_floats() -> onnx.ModelProto:
    """(n, 8, 4, 4) as 16n windows, whose number is divided in floats to get the batch back."""
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("Transpose", ["c"], "t", perm=[0, 2, 3, 1]),
        node("Reshape", ["t", "rows"], "windows"),
        node("Shape", ["windows"], "s", start=0, end=1),
        node("Cast", ["s"], "sf", to=FLOAT),
        node("Mul", ["sf", "k"], "m"),
        node("Div", ["m", "l"], "q"),
        node("Floor", ["q"], "fl"),
        node("Cast", ["fl"], "n", to=INT64),
        node("Concat", ["n", "rest"], "shape", axis=0),
        node("Reshape", ["windows", "shape"]),
    ]
    tensors = {"w": noise(8, 8, 1, 1), "rows": i64(-1, 8), "rest": i64(4, 4, 8), "k": f32(49), "l": f32(784)}
    return model_of(nodes, tensors)


def mean_by_a_large_size() -> onnx.ModelProto:
    """The size exceeds FP16: 128 * 65536."""
    nodes = [
        node("Size", ["x"], "s"),
        node("Mul", ["s", "many"], "l"),
        node("Cast", ["l"], "sf", to=FLOAT),
        node("Mul", ["x", "big"], "b"),
        node("Div", ["b", "sf"]),
    ]
    return model_of(nodes, {"many": np.int64(65536), "big": f32(60000)})


def float_range() -> onnx.ModelProto:
    nodes = [
        node("Shape", ["x"], "s", start=3, end=4),
        node("Squeeze", ["s"], "q"),
        node("Cast", ["q"], "stop", to=FLOAT),
        node("Range", ["start", "stop", "step"], "r"),
        node("Add", ["x", "r"]),
    ]
    return model_of(nodes, {"start": np.float32(0), "step": np.float32(1)})


def top_k() -> onnx.ModelProto:
    nodes = [
        *features(),
        helper.make_node("TopK", ["f", "k"], ["values", "indices"]),
        node("Cast", ["indices"], "i", to=FLOAT),
        node("Mul", ["values", "i"]),
    ]
    return model_of(nodes, {"w": WEIGHTS["w"], "k": i64(3)})


def layer_norm_with_its_mean() -> onnx.ModelProto:
    """The second and third outputs are FP32 for every type of data."""
    nodes = [
        *features(),
        helper.make_node("LayerNormalization", ["f", "scale"], ["n", "mean", "inverse"], "norm"),
        node("Add", ["n", "mean"], "a"),
        node("MatMul", ["a", "h"]),
    ]
    return model_of(nodes, {**WEIGHTS, "scale": noise(8)})


def integer_convolution() -> onnx.ModelProto:
    """The sums exceed FP16 before they are scaled."""
    weight = np.random.default_rng(0).integers(-128, 127, (8, 8, 3, 3)).astype(np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        node("ConvInteger", ["q", "w", "zero"], "i"),
        node("Cast", ["i"], "c", to=FLOAT),
        node("Mul", ["c", "scale"], "m"),
        node("Mul", ["m", "ws"], "y"),
    ]
    return model_of(nodes, {"w": weight, "ws": f32(0.01)})


def sequence() -> onnx.ModelProto:
    nodes = [
        node("Mul", ["x", "w"], "m"),
        node("SplitToSequence", ["m"], "s", axis=1),
        node("ConcatFromSequence", ["s"], "c", axis=1),
        node("Mul", ["c", "w"]),
    ]
    return model_of(nodes, {"w": noise(8, 1, 1)})


def random_numbers_times_zero() -> onnx.ModelProto:
    nodes = [
        node("RandomNormalLike", ["x"], "r", dtype=FLOAT),
        node("Mul", ["r", "zero"], "z"),
        node("Add", ["x", "z"]),
    ]
    return model_of(nodes, {"zero": f32(0)})


def zeros_of_a_shape() -> onnx.ModelProto:
    nodes = [node("Shape", ["x"], "s"), node("ConstantOfShape", ["s"], "z"), node("Add", ["x", "z"])]
    return model_of(nodes)


def operator_of_another_domain() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        helper.make_node("Gelu", ["c"], ["e"], domain="com.microsoft"),
        node("Conv", ["e", "w"]),
    ]
    model = model_of(nodes, {"w": noise(8, 8, 1, 1)})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def local_functions() -> onnx.ModelProto:
    """A function with constants of its own, called twice, once with an epsilon that vanishes; and one inside it."""
    inner = helper.make_function(
        "local",
        "Inner",
        ["a"],
        ["b"],
        [constant("k", f32(0.5)), node("Mul", ["a", "k"], "b")],
        [helper.make_opsetid("", 20)],
    )
    outer = helper.make_function(
        "local",
        "Outer",
        ["a", "eps"],
        ["b"],
        [
            helper.make_node("Inner", ["a"], ["i"], domain="local"),
            node("Abs", ["i"], "p"),
            node("Add", ["p", "eps"], "q"),
            node("Div", ["i", "q"], "b"),
        ],
        [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)],
    )
    nodes = [
        node("Conv", ["x", "w"], "c"),
        helper.make_node("Outer", ["c", "tiny"], ["d"], domain="local"),
        helper.make_node("Outer", ["d", "one"], ["y"], domain="local"),
    ]
    model = model_of(nodes, {"w": noise(8, 8, 1, 1), "tiny": f32(1e-12), "one": f32(1)})
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.functions.extend([inner, outer])
    return model


def outputs_that_nothing_computes() -> onnx.ModelProto:
    """One output is a stored tensor that a node reads too, one is the input."""
    nodes = [node("Mul", ["x", "anchors"], "y"), node("Relu", ["y"], "z")]
    return model_of(nodes, {"anchors": noise(8, 1, 1)}, ["y", "z", "anchors", "x"])


def weights_among_the_inputs() -> onnx.ModelProto:
    """As exporters wrote them up to IR version 3."""
    model = model_of([node("Conv", ["x", "w"])], {"w": noise(4, 8, 1, 1)})
    model.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [4, 8, 1, 1]))
    return model


def _graph(nodes: list[onnx.NodeProto], output: str, tensors: dict[str, np.ndarray] | None = None) -> onnx.GraphProto:
    stored = [numpy_helper.from_array(value, name) for name, value in (tensors or {}).items()]
    return helper.make_graph(nodes, output, [], [helper.make_tensor_value_info(output, FLOAT, None)], stored)


def branches_with_an_epsilon() -> onnx.ModelProto:
    """One branch divides by a clamped value, the other returns a stored tensor."""
    then = [node("Abs", ["c"], "a"), node("Max", ["a", "eps"], "m"), node("Div", ["c", "m"], "t")]
    branches = {
        "then_branch": _graph(then, "t", {"eps": f32(1e-12)}),
        "else_branch": _graph([node("Identity", ["own"], "e")], "e", {"own": noise(1, 8, 4, 4)}),
    }
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("ReduceMax", ["c"], "largest", keepdims=0),
        node("Less", ["largest", "high"], "flag"),
        helper.make_node("If", ["flag"], ["i"], **branches),
        node("Conv", ["i", "w"]),
    ]
    return model_of(nodes, {"w": noise(8, 8, 1, 1), "high": np.float32(1e5)})


def branch_with_a_resize() -> onnx.ModelProto:
    """The branch stays FP32 for its scales; it shares a weight with a layer in FP16, and reads the graph's input."""
    resized = [
        node("Conv", ["x", "w"], "b"),
        node("Resize", ["b", "", "scales"], "t", mode="linear"),
    ]
    branches = {
        "then_branch": _graph(resized, "t", {"scales": f32(1, 1, 10 / 3, 10 / 3)}),
        "else_branch": _graph([node("Identity", ["c"], "e")], "e"),
    }
    nodes = [
        node("Conv", ["x", "w"], "c"),
        helper.make_node("If", ["flag"], ["i"], **branches),
        node("Conv", ["i", "w"]),
    ]
    return model_of(nodes, {"w": noise(8, 8, 1, 1), "flag": np.array(True)})


def convergence_loop() -> onnx.ModelProto:
    """Halves the largest value until it is at most 1.0002: 8.002 / 8 is more, but in FP16 it is 1, a turn less."""
    number = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            node("Mul", ["state", "half"], "next"),
            node("ReduceMax", ["next"], "top", keepdims=0),
            node("Greater", ["top", "limit"], "again"),
        ],
        "body",
        [number("i", INT64, []), number("go", TensorProto.BOOL, []), number("state", FLOAT, None)],
        [number("again", TensorProto.BOOL, []), number("next", FLOAT, None)],
        [numpy_helper.from_array(np.float32(0.5), "half"), numpy_helper.from_array(np.float32(1.0002), "limit")],
    )
    nodes = [
        node("Mul", ["x", "zero"], "z"),
        node("Add", ["z", "start"], "s"),
        helper.make_node("Loop", ["", "true", "s"], ["y"], body=body),
    ]
    return model_of(nodes, {"zero": f32(0), "start": f32(8.002), "true": np.array(True)})


def loop_counted_in_floats() -> onnx.ModelProto:
    """As many iterations as 0.1 * 30, rounded down: 3 in FP32; and a body that stays half."""
    body = helper.make_graph(
        [node("Identity", ["go"], "again"), node("Mul", ["state", "gain"], "next")],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, None),
        ],
        [numpy_helper.from_array(f32(1.5), "gain")],
    )
    nodes = [
        node("Mul", ["tenth", "thirty"], "t"),
        node("Floor", ["t"], "tf"),
        node("Cast", ["tf"], "trips", to=INT64),
        helper.make_node("Loop", ["trips", "", "x"], ["y"], body=body),
    ]
    # In FP16, 0.1 is below a tenth and 0.1 * 30 below 3.
    return model_of(nodes, {"tenth": np.float32(0.1), "thirty": np.float32(30)})


GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {
    build.__name__: build
    for build in (
        normalized_by_max,
        normalized_by_clip_and_expand,
        layer_norm_in_parts,
        reciprocal_of_epsilon,
        logarithm_of_epsilon,
        epsilon_behind_an_identity,
        clip_to_the_largest_float,
        clip_by_attributes,
        masked_softmax,
        mask_of_integers,
        mask_by_where,
        pad_before_pool,
        nms,
        resize_by_computed_scales,
        windows_counted_in_floats,
        mean_by_a_large_size,
        float_range,
        top_k,
        layer_norm_with_its_mean,
        integer_convolution,
        sequence,
        random_numbers_times_zero,
        zeros_of_a_shape,
        operator_of_another_domain,
        local_functions,
        outputs_that_nothing_computes,
        weights_among_the_inputs,
        branches_with_an_epsilon,
        loop_counted_in_floats,
        branch_with_a_resize,
        convergence_loop,
    )
}
GRAPHS |= {
    "a variance beyond FP16": lambda: batchnorm(1e6),
    "a variance that vanishes": lambda: batchnorm(1e-9, epsilon=1e-12),
    "a variance beyond FP16, with a bias": lambda: batchnorm(1e6, bias=True),
}
