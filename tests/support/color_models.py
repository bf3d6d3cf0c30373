"""Classifiers whose logits are the mean colors of a picture, so that every prediction is known beforehand."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from maskplan.engines.base import Classifier
from maskplan.engines.ort import OrtEngine
from maskplan.exporters.metadata import write_provenance
from maskplan.pipeline.core.artifacts import Preprocessing, Provenance
from maskplan.pipeline.core.reports import ParityReport
from maskplan.pipeline.data.dataset import Split
from maskplan.pipeline.parity.compare import compare
from maskplan.pipeline.parity.options import CompareOptions

Array = npt.NDArray[Any]

HOW = Preprocessing(3, 4, 4, 0, "nearest", (0.0,) * 3, (1.0,) * 3)
MADE = Provenance("colors", True, "test", "0" * 64, 3, (), HOW)


@dataclass(frozen=True)
class Pictures:
    """Pictures of one color each, kept as PNG files in memory."""

    files: tuple[bytes, ...]
    labels: npt.NDArray[np.int64]

    def name(self, index: int) -> str:
        return f"picture {index}"

    def read(self, index: int) -> bytes:
        return self.files[index]


def split_of(colors: Array, labels: Array) -> Split:
    files = []
    for color in colors:
        buffer = io.BytesIO()
        Image.fromarray(np.full((4, 4, 3), color, np.uint8)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return Split("val", Pictures(tuple(files), labels.astype(np.int64)), np.arange(len(files)))


def graph_of(
    path: Path, bias: Array, *, nodes: list[onnx.NodeProto] | None = None, classes: int = 3, batch: int | str = "n"
) -> Path:
    """Logits are the mean colors, cut or filled up to `classes`, plus a bias; or what `nodes` make of `means`."""
    head = np.eye(3, classes, dtype=np.float32)
    if nodes is None:
        nodes = [helper.make_node("Gemm", ["means", "head", "bias"], ["logits"])]
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["input", "axes"], ["means"], keepdims=0), *nodes],
        "means",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        [
            numpy_helper.from_array(np.array([2, 3], np.int64), "axes"),
            numpy_helper.from_array(head, "head"),
            numpy_helper.from_array(np.asarray(bias, np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def opened(path: Path) -> Classifier:
    return Classifier(OrtEngine(path), path.name)


# In tenths of full brightness: far apart, so that rounding plays no part.
COLORS = np.array(
    [[9, 1, 1]] * 10 + [[6, 5, 1]] * 7 + [[1, 8, 2]] * 9 + [[2, 5, 6]] * 5 + [[3, 1, 9]] * 11 + [[4, 1, 5]] * 4
)
LABELS = np.array([0] * 10 + [0] * 5 + [1] * 2 + [1] * 9 + [2] * 3 + [1] * 2 + [2] * 11 + [0] * 4)
BIAS = np.array([0.0, 0.15, 0.0])


def pictures() -> Split:
    return split_of(COLORS * 25, LABELS)


def scores(bias: Array) -> Array:
    return COLORS * 25 / 255 + bias


def compared(dense: Path, sparse: Path, val: Split | None, **options: Any) -> ParityReport:
    with opened(dense) as first, opened(sparse) as second:
        return compare(first, second, HOW, [None, None], val, CompareOptions(**options))


def spoilt(path: Path, number: float, only_above: float = -1.0) -> Path:
    """As the plain graph, but with `number` in the second score of pictures whose red is above a limit."""
    nodes = [
        helper.make_node("Gather", ["means", "zero"], ["red"], axis=1),
        helper.make_node("Greater", ["red", "limit"], ["hot"]),
        helper.make_node("Where", ["hot", "fill", "means"], ["logits"]),
    ]
    graph_of(path, np.zeros(3), nodes=nodes)
    model = onnx.load(path)
    fill = np.array([0, number, 0], np.float32)
    for name, value in (("zero", np.array([0])), ("limit", np.array(only_above, np.float32)), ("fill", fill)):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    path.write_bytes(model.SerializeToString())
    return path


def with_record(path: Path, made: Provenance) -> Path:
    model = onnx.load(path)
    write_provenance(model, made)
    path.write_bytes(model.SerializeToString())
    return path


def color_models(folder: Path, made: Provenance | None = None) -> tuple[Path, Path]:
    """Classes in the order blue, green, red; the second says green where it is close."""
    pair = []
    for name, bias in (("dense", np.zeros(3)), ("sparse", np.array([0, 1e-4, 0]))):
        path = folder / f"{name}.onnx"
        nodes = [
            helper.make_node("Gather", ["means", "order"], ["turned"], axis=1),
            helper.make_node("Add", ["turned", "bias"], ["logits"]),
        ]
        graph_of(path, bias, nodes=nodes)
        model = onnx.load(path)
        model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "order"))
        path.write_bytes(model.SerializeToString())
        pair.append(path if made is None else with_record(path, made))
    return pair[0], pair[1]
