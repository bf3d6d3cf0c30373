"""Graphs whose constants a plain conversion to FP16 breaks, on (n, 8, 4, 4)."""

from __future__ import annotations

import numpy as np
import onnx
from fp16_graphs import FLOAT, constant, model_of, node, noise

FLT_MAX = float(np.finfo(np.float32).max)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def features() -> list[onnx.NodeProto]:
    """Features (n, 8) that are zero on a black image."""
    return [
        node("Conv", ["x", "w"], "c"),
        node("Relu", ["c"], "r"),
        node("GlobalAveragePool", ["r"], "g"),
        node("Flatten", ["g"], "f"),
    ]


WEIGHTS = {"w": noise(8, 8, 1, 1), "h": noise(8, 3)}


def normalized_by_max() -> onnx.ModelProto:
    nodes = [
        *features(),
        node("ReduceL2", ["f", "axes"], "norm"),
        node("Max", ["norm", "eps"], "m"),
        node("Div", ["f", "m"], "d"),
        node("MatMul", ["d", "h"]),
    ]
    return model_of(nodes, {**WEIGHTS, "axes": i64(1), "eps": f32(1e-12)})


def normalized_by_clip_and_expand() -> onnx.ModelProto:
    """As torch.nn.functional.normalize is exported: Clip, Shape, Expand, Div."""
    nodes = [
        *features(),
        node("ReduceL2", ["f", "axes"], "norm"),
        constant("eps", np.array(1e-12, np.float32)),
        node("Clip", ["norm", "eps"], "m"),
        node("Shape", ["f"], "s"),
        node("Expand", ["m", "s"], "e"),
        node("Div", ["f", "e"], "d"),
        node("MatMul", ["d", "h"]),
    ]
    return model_of(nodes, {**WEIGHTS, "axes": i64(1)})


def layer_norm_in_parts() -> onnx.ModelProto:
    """Small features: their squares vanish in FP16 before the epsilon does."""
    nodes = [
        *features(),
        node("Mul", ["f", "small"], "t"),
        node("ReduceMean", ["t", "axes"], "mean"),
        node("Sub", ["t", "mean"], "d"),
        node("Pow", ["d", "two"], "p"),
        node("ReduceMean", ["p", "axes"], "var"),
        node("Add", ["var", "eps"], "v"),
        node("Sqrt", ["v"], "s"),
        node("Div", ["d", "s"], "q"),
        node("MatMul", ["q", "h"]),
    ]
    return model_of(nodes, {**WEIGHTS, "axes": i64(1), "eps": f32(1e-12), "two": f32(2), "small": f32(1e-3)})


def reciprocal_of_epsilon() -> onnx.ModelProto:
    nodes = [
        *features(),
        node("ReduceMean", ["f", "axes"], "mean"),
        node("Add", ["mean", "eps"], "a"),
        node("Reciprocal", ["a"], "inverse"),
        node("Mul", ["f", "inverse"], "q"),
        node("MatMul", ["q", "h"]),
    ]
    return model_of(nodes, {**WEIGHTS, "axes": i64(1), "eps": f32(1e-8)})


def logarithm_of_epsilon() -> onnx.ModelProto:
    nodes = [*features(), node("Add", ["f", "eps"], "a"), node("Log", ["a"], "l"), node("MatMul", ["l", "h"])]
    return model_of(nodes, {**WEIGHTS, "eps": f32(1e-9)})


def epsilon_behind_an_identity() -> onnx.ModelProto:
    nodes = [
        node("Unsqueeze", ["eps", "axes"], "e"),
        *features(),
        node("Abs", ["f"], "b"),
        node("Max", ["b", "e"], "m"),
        node("Div", ["f", "m"], "d"),
        node("MatMul", ["d", "h"]),
    ]
    return model_of(nodes, {**WEIGHTS, "axes": i64(0), "eps": f32(1e-10)})


def clip_to_the_largest_float() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("Clip", ["c", "zero", "high"], "k"),
        node("Max", ["k", "low"], "m"),
        node("Min", ["m", "high"]),
    ]
    return model_of(
        nodes, {"w": noise(8, 8, 1, 1), "zero": np.float32(0), "high": np.float32(FLT_MAX), "low": f32(-1e9)}
    )


def clip_by_attributes() -> onnx.ModelProto:
    nodes = [node("Conv", ["x", "w"], "c"), node("Clip", ["c"], min=0.0, max=FLT_MAX)]
    model = model_of(nodes, {"w": noise(8, 8, 1, 1)})
    model.opset_import[0].version = 10
    return model


def masked_softmax() -> onnx.ModelProto:
    mask = np.where(np.tri(4) > 0, 0, -FLT_MAX).astype(np.float32)
    nodes = [node("Conv", ["x", "w"], "c"), node("Add", ["c", "mask"], "a"), node("Softmax", ["a"], axis=-1)]
    return model_of(nodes, {"w": noise(8, 8, 1, 1), "mask": mask})


def mask_of_integers() -> onnx.ModelProto:
    """(1 - mask) * -1e9, from a mask in INT64, and a row that is masked completely."""
    mask = np.tri(4, dtype=np.int64)
    mask[2] = 0
    nodes = [
        node("Cast", ["mask"], "m", to=FLOAT),
        node("Sub", ["one", "m"], "n"),
        node("Mul", ["n", "large"], "b"),
        node("Conv", ["x", "w"], "c"),
        node("Add", ["c", "b"], "a"),
        node("Softmax", ["a"], axis=-1),
    ]
    return model_of(nodes, {"w": noise(8, 8, 1, 1), "mask": mask, "one": f32(1), "large": f32(-1e9)})


def mask_by_where() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("Where", ["keep", "c", "low"], "a"),
        node("Softmax", ["a"], axis=-1),
    ]
    return model_of(nodes, {"w": noise(8, 8, 1, 1), "keep": np.tri(4) > 0, "low": f32(-1e9)})


def pad_before_pool() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w"], "c"),
        node("Pad", ["c", "pads", "low"], "p"),
        node("MaxPool", ["p"], kernel_shape=[3, 3]),
    ]
    return model_of(nodes, {"w": noise(8, 8, 1, 1), "pads": i64(0, 0, 1, 1, 0, 0, 1, 1), "low": np.float32(-FLT_MAX)})


def batchnorm(variance: float, *, gamma: float = 1.0, bias: bool = False, epsilon: float = 1e-5) -> onnx.ModelProto:
    convolution = node("Conv", ["x", "w", "b"] if bias else ["x", "w"], "c")
    nodes = [
        convolution,
        node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], "n", epsilon=epsilon),
        node("Relu", ["n"], "r"),
        node("Conv", ["r", "w2"]),
    ]
    size = float(np.sqrt(variance + epsilon))
    tensors = {
        "w": noise(8, 8, 1, 1) * np.float32(size),
        "b": noise(8) * np.float32(size),
        "gamma": np.full(8, gamma, np.float32),
        "beta": noise(8),
        "mean": noise(8) * np.float32(size),
        "var": np.full(8, variance, np.float32),
        "w2": noise(4, 8, 1, 1),
    }
    return model_of(nodes, tensors if bias else {name: value for name, value in tensors.items() if name != "b"})
