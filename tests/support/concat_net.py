"""A network that joins two branches, as an ONNX file with Q/DQ whose scales are FP16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
    for each in nodes:
        each.name = each.output[0]
    tensors = {"left": noise(8, 8, 1, 1), "right": noise(8, 8, 3, 3), "last": noise(4, 16, 1, 1)}
    model = model_of(nodes, tensors)
    ranges = {name: 3.0 for n in nodes for name in n.output} | {"x": 4.0}
    quantized = insert_qdq(model, place(model, PlaceOptions()), ranges)
    path.write_bytes(to_fp16(quantized).SerializeToString())
    return path


def concat_input() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 8, 4, 4)).astype(np.float32)
