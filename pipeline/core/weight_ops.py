"""The ONNX operators that have weights: the one table that export, check, prune, calibrate and the eligibility rule read.

Imports nothing, so that every other module may import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

LIKELY_SPEEDUP_CHANNELS: Final = 256
"""Fewer input or output channels than this seldom run faster as 2:4: a rule of thumb, not a rule of TensorRT's."""


@dataclass(frozen=True)
class Operand:
    """An input of a node that may be a weight.

    Attributes:
        index: Of the node's input.
        reduction_axis: The axis that is summed over: input channels, or the inner dimension of a product.
        output_axis: The axis of output channels, along which INT8 weights have a scale each.
        transposed_by: The attribute that, if it is not 0, swaps these two axes.
    """

    index: int
    reduction_axis: int
    output_axis: int
    transposed_by: str | None = None

    def axes(self, attributes: Mapping[str, Any]) -> tuple[int, int]:
        """Reduction axis and output axis of a node with these attributes; negative axes count from the end."""
        if self.transposed_by is not None and attributes.get(self.transposed_by):
            return self.output_axis, self.reduction_axis
        return self.reduction_axis, self.output_axis


@dataclass(frozen=True)
class WeightOp:
    """An operator with weights.

    Attributes:
        operands: Where the weight may be, the usual place first.
        is_convolution: It has groups, and its weight is always an operand, constant or not.
        has_sparse_kernels: TensorRT has kernels for 2:4 weights.
        is_quantizable: `calibrate` stores its weight as INT8.
    """

    operands: tuple[Operand, ...]
    is_convolution: bool = False
    has_sparse_kernels: bool = True
    is_quantizable: bool = True


WEIGHT_OPS: Final[Mapping[str, WeightOp]] = {
    # (K, C, R, S)
    "Conv": WeightOp((Operand(1, 1, 0),), is_convolution=True),
    # (C, K, R, S). Never eligible, so the axes are not used; they are those of Conv.
    "ConvTranspose": WeightOp((Operand(1, 1, 0),), is_convolution=True, has_sparse_kernels=False, is_quantizable=False),
    # Y = A B: B is (inner, outputs) unless transB, A is (outputs, inner) unless transA.
    "Gemm": WeightOp((Operand(1, 0, 1, "transB"), Operand(0, 1, 0, "transA"))),
    # The last two axes; those before them are a batch of matrices.
    "MatMul": WeightOp((Operand(1, -2, -1), Operand(0, -1, -2))),
}
"""By `op_type`, of ONNX's own domain."""

SPARSE_OPS: Final = frozenset(name for name, op in WEIGHT_OPS.items() if op.has_sparse_kernels)
QUANTIZABLE_OPS: Final = frozenset(name for name, op in WEIGHT_OPS.items() if op.is_quantizable)

INTEGER_OPS: Final[Mapping[str, tuple[int, ...]]] = {
    "QLinearConv": (3,),
    "QLinearMatMul": (3, 0),
    "ConvInteger": (1,),
    "MatMulInteger": (1, 0),
}
"""ONNX's operators on integers, with the inputs that may be a weight; what they hold cannot run 2:4 as it is."""

DENSE_OPS: Final[Mapping[str, tuple[int, ...]]] = {
    "LSTM": (1,),
    "GRU": (1,),
    "RNN": (1,),
    "DeformConv": (1,),
    "Einsum": (0, 1),
}
"""ONNX's other operators with weights, likewise: there are no sparse kernels for them."""
