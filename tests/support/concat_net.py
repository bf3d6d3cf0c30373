"""A network that joins two branches, as an ONNX file with Q/DQ whose scales are FP16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from fp16_graphs import model_of, node, noise

from maskplan.calibration.placement import PlaceOptions, place
from maskplan.calibration.qdq import insert_qdq
from maskplan.exporters.precision import to_fp16


def concat_qdq_fp16(path: Path) -> Path:
    """Write it: squeeze, two branches, Concat along the channels, and a head, on (n, 8, 4, 4)."""
    nodes = [
        node("Conv", ["x", "left"], "l"),
        node("Relu", ["l"], "lr"),
        node("Conv", ["x", "right"], "r", pads=[1, 1, 1, 1]),
        node("Relu", ["r"], "rr"),
        node("Concat", ["lr", "rr"], "joined", axis=1),
        node("Conv", ["joined", "last"], "c"),
        node("GlobalAveragePool", ["c"], "g"),
        node("Flatten", ["g"]),
    ]
    tensors = {"left": noise(8, 8, 1, 1), "right": noise(8, 8, 3, 3), "last": noise(4, 16, 1, 1)}
    return _quantized(nodes, tensors, path)


def detector_qdq_fp16(path: Path) -> Path:
    """The concatenations of a YOLOX: slices of the image, branches of a stage, boxes with scores, and two levels of them."""
    nodes, slices = [], []
    for row in (0, 1):
        for column in (0, 1):
            slices.append(f"slice{row}{column}")
            nodes.append(node("Slice", ["x", f"from{row}{column}", "size", "axes", "step"], slices[-1]))
    nodes += [
        node("Concat", slices, "focus", axis=1),
        node("Conv", ["focus", "stem"], "s"),
        node("Relu", ["s"], "sr"),
        node("Conv", ["sr", "left"], "l"),
        node("Sigmoid", ["l"], "lg"),
        node("Mul", ["l", "lg"], "ls"),
        node("Concat", ["ls", "sr"], "stage", axis=1),
        node("Conv", ["stage", "down"], "d", strides=[2, 2]),
        node("Resize", ["d", "", "twice"], "up", mode="nearest"),
        node("Concat", ["up", "stage"], "neck", axis=1),
    ]
    levels = []
    for source, name in (("neck", "p3"), ("d", "p4")):
        nodes += [
            node("Conv", [source, f"{name}_box"], f"{name}_b"),
            node("Conv", [source, f"{name}_object"], f"{name}_o"),
            node("Sigmoid", [f"{name}_o"], f"{name}_os"),
            node("Concat", [f"{name}_b", f"{name}_os"], f"{name}_head", axis=1),
            node("Reshape", [f"{name}_head", "flat"], f"{name}_flat"),
        ]
        levels.append(f"{name}_flat")
    nodes += [node("Concat", levels, "anchors", axis=2), node("Transpose", ["anchors"], perm=[0, 2, 1])]
    tensors = {
        **{f"from{row}{column}": np.array([row, column]) for row in (0, 1) for column in (0, 1)},
        "size": np.array([4, 4]),
        "axes": np.array([2, 3]),
        "step": np.array([2, 2]),
        "flat": np.array([0, 8, -1]),
        "twice": np.array([1, 1, 2, 2], np.float32),
        "stem": noise(8, 32, 1, 1),
        "left": noise(8, 8, 1, 1),
        "down": noise(8, 16, 1, 1),
        **{f"p3_{kind}": noise(4, 24, 1, 1) for kind in ("box", "object")},
        **{f"p4_{kind}": noise(4, 8, 1, 1) for kind in ("box", "object")},
    }
    return _quantized(nodes, tensors, path)


def _quantized(nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray], path: Path) -> Path:
    for each in nodes:
        each.name = each.output[0]
    model = model_of(nodes, tensors)
    ranges = {name: 3.0 for n in nodes for name in n.output} | {"x": 4.0}
    quantized = insert_qdq(model, place(model, PlaceOptions()), ranges)
    path.write_bytes(to_fp16(quantized).SerializeToString())
    return path


def concat_input() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 8, 4, 4)).astype(np.float32)
