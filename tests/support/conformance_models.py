"""ONNX files of a few weights for tests of the 2:4 check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from maskplan.exporters.metadata import write_provenance
from maskplan.pipeline.core.artifacts import Preprocessing, Provenance

Array = npt.NDArray[Any]


def model_of(
    nodes: Sequence[onnx.NodeProto], tensors: dict[str, Array], x: Sequence[int] = (1, 8, 4, 4)
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def convolutions(**weights: Array) -> onnx.ModelProto:
    """Convolutions in a row, each named after its weight."""
    names = list(weights)
    tensors = ["x", *(f"after_{n}" for n in names[:-1]), "y"]
    nodes = [
        helper.make_node("Conv", [tensors[i], name], [tensors[i + 1]], f"node_{name}") for i, name in enumerate(names)
    ]
    return model_of(nodes, weights)


def two_of_four(dtype: Any, zero: float = 0.0) -> Array:
    """(4, 8, 1, 1): exactly two numbers other than `zero` in each group."""
    weight = np.full((4, 8, 1, 1), zero, dtype)
    weight[:, [0, 3, 5, 6]] = 2
    return weight


DENSE = np.ones((8, 8, 1, 1), np.float32)
SPARSE = np.tile(two_of_four(np.float32), (2, 1, 1, 1))


def provenance(masked: tuple[str, ...]) -> Provenance:
    how = Preprocessing(8, 4, 4, 0, "bilinear", (0.0,) * 8, (1.0,) * 8)
    return Provenance("net", True, "test", "0" * 64, 8, (), how, masked, "2:4", "channel", "magnitude")


def three(masked: tuple[str, ...] | None = None, **changed: Array) -> onnx.ModelProto:
    """Two sparse weights and a dense one between them, with the list of masked weights in the metadata."""
    model = convolutions(**{"a": SPARSE, "b": DENSE, "c": SPARSE, **changed})
    if masked is not None:
        write_provenance(model, provenance(masked))
    return model


def saved(folder: Path, model: onnx.ModelProto, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path
