"""Small graphs for Q/DQ placement, one node a line, and what was placed in them as plain values."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import numpy_helper, parser

from maskplan.calibration.placement import Placement, PlaceOptions, place

# What the graphs below may use.
SHAPES = {
    **{f"w{i}": (8, 8, 3, 3) for i in range(6)},
    **dict.fromkeys(("b0", "gamma", "beta", "mean", "var"), (8,)),
    "depthwise": (8, 1, 3, 3),
    "wide": (8, 16, 3, 3),
    "flat": (8, 5),
    "flat_t": (5, 8),
    "cube": (2, 8, 5),
}
NUMBERS = {"three": 3.0, "six": 6.0, "zero": 0.0}
INTEGERS = {"rows": (-1, 8), "halves": (8, 8), "one": (1,)}
PAD = "<pads = [1, 1, 1, 1]>"


def graph(body: str, outputs: Iterable[str] = ("y",), opset: int = 20) -> onnx.ModelProto:
    """A model of `x` (n, 8, 8, 8) from one node a line, written `name | node`; `Conv` is padded."""
    declared = ", ".join(f"float {name}" for name in outputs)
    lines = [line.strip().partition(" | ") for line in body.strip().splitlines()]
    nodes = "\n".join(f"[{name}] {text.replace('Conv(', f'Conv {PAD}(')}" for name, _, text in lines)
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> test (float[n, 8, 8, 8] x) => ({declared}) {{ {nodes} }}'
    )
    generator = np.random.default_rng(0)
    read = {name for node in model.graph.node for name in node.input}
    for name, shape in SHAPES.items():
        if name in read:
            values = np.abs(generator.normal(size=shape)).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(values, name))
    for name, number in NUMBERS.items():
        if name in read:
            model.graph.initializer.append(numpy_helper.from_array(np.float32(number), name))
    for name, numbers in INTEGERS.items():
        if name in read:
            model.graph.initializer.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
    return model


def uses(placement: Placement) -> dict[str, list[tuple[str, int]]]:
    return {activation.tensor: list(activation.uses) for activation in placement.activations}


def weights(placement: Placement) -> list[tuple[str, str, int, int]]:
    return [(w.tensor, w.node, w.input, w.axis) for w in placement.weights]


def placed(body: str, options: PlaceOptions | None = None, outputs: Iterable[str] = ("y",)) -> Placement:
    return place(graph(body, outputs), options)
