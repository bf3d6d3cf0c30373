"""Shapes of a layer's operands, read from an ONNX graph: its weight as (K, C, R, S), and the size of its input."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, shape_inference

from maskplan.exporters.tensors import TensorError, read_values
from maskplan.exporters.weights import WeightUse, weight_uses

_NO_PADDING = ("", "NOTSET", "VALID")


@dataclass(frozen=True)
class LayerShape:
    """A convolution without groups, for one image; a product of matrices counts as one with a 1 x 1 kernel.

    Attributes:
        k: Output channels.
        c: Input channels.
        r: Height of the kernel.
        s: Width of the kernel.
        height: Of the input; the number of rows of a product.
        width: Of the input; 1 for a product.
        strides: Vertical and horizontal.
        pads: Top, left, bottom, right.
        dilations: Vertical and horizontal.
    """

    k: int
    c: int
    r: int
    s: int
    height: int
    width: int
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the output."""
        top, left, bottom, right = self.pads
        height = (self.height + top + bottom - self.dilations[0] * (self.r - 1) - 1) // self.strides[0] + 1
        width = (self.width + left + right - self.dilations[1] * (self.s - 1) - 1) // self.strides[1] + 1
        return height, width


@dataclass(frozen=True)
class ShapedWeights:
    """Weights with the shapes of their layers.

    Attributes:
        weights: By name, float32 (K, C, R, S).
        shapes: Of their layers, by the same names.
        skipped: Of the other weights, the reasons.
    """

    weights: Mapping[str, npt.NDArray[np.float32]]
    shapes: Mapping[str, LayerShape]
    skipped: Mapping[str, str]


class _UnknownError(ValueError):
    """The shape is not known; the message says why."""


def shaped_weights(model: onnx.ModelProto, names: Collection[str], folder: Path | None = None) -> ShapedWeights:
    """The named weights of a graph with their layers' shapes; for a weight that is used twice, the first use counts.

    Args:
        model: Parsed; its weights may be external data inside `folder`.
        names: Of weights, as in the report of `check_2to4`.
        folder: Of the ONNX file.
    """
    inferred = shape_inference.infer_shapes(model)
    known = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    sizes = {v.name: [max(d.dim_value, 0) for d in v.type.tensor_type.shape.dim] for v in known}
    nodes = {node.name or node.output[0]: node for node in model.graph.node if node.output}
    weights: dict[str, npt.NDArray[np.float32]] = {}
    shapes: dict[str, LayerShape] = {}
    skipped: dict[str, str] = {}
    for use in weight_uses(model):
        if use.name not in names or use.name in shapes:
            continue
        try:
            weights[use.name] = weight = _weight(use, folder)
            shapes[use.name] = _shape(use, weight.shape, nodes.get(use.node), sizes)
            skipped.pop(use.name, None)
        except (_UnknownError, TensorError) as error:
            weights.pop(use.name, None)
            skipped[use.name] = str(error)
    return ShapedWeights(weights, shapes, skipped)


def _weight(use: WeightUse, folder: Path | None) -> npt.NDArray[np.float32]:
    if use.tensor is None:
        raise _UnknownError("not constant")
    if use.zero_point is not None and read_values(use.zero_point.tensor, folder).array.any():
        raise _UnknownError("quantized around a zero point that is not 0")
    stored = read_values(use.tensor, folder)
    # Exact: float32 represents every value of the stored type.
    values = stored.to_floats(stored.array).astype(np.float32)
    if use.op == "Conv":
        if values.ndim != 4 or use.axis != 1:
            raise _UnknownError(f"not a 2-D convolution's weight (K, C, R, S): {values.shape}, along axis {use.axis}")
        return values
    if values.ndim != 2:
        raise _UnknownError(f"not one matrix: {values.shape}")
    return np.moveaxis(values, use.axis, 1)[:, :, None, None]


def _shape(
    use: WeightUse, weight: Sequence[int], node: onnx.NodeProto | None, sizes: Mapping[str, list[int]]
) -> LayerShape:
    if node is None or node.op_type != use.op:
        raise _UnknownError("inside a subgraph or function")
    k, c, r, s = weight
    size = sizes.get(node.input[0], [])
    if use.op != "Conv":
        # The first dimension is the batch, which may be dynamic.
        if len(size) < 2 or size[-1] != c or not all(size[1:]):
            raise _UnknownError("the shape of its input is not known")
        return LayerShape(k, c, r, s, math.prod(size[1:-1]), 1)
    if len(size) != 4 or not all(size[1:]):
        raise _UnknownError("the shape of its input is not known")
    attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    automatic = attributes.get("auto_pad", b"").decode()
    if automatic not in _NO_PADDING:
        raise _UnknownError(f"auto_pad {automatic}")
    vertical, horizontal = attributes.get("strides", (1, 1))
    top, left, bottom, right = (0, 0, 0, 0) if automatic == "VALID" else attributes.get("pads", (0, 0, 0, 0))
    dilations = attributes.get("dilations", (1, 1))
    return LayerShape(
        k, c, r, s, size[2], size[3], (vertical, horizontal), (top, left, bottom, right), (dilations[0], dilations[1])
    )
