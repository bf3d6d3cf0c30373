"""Which weights can run 2:4: the single rule that the learner, the permutation search and the check use."""

from __future__ import annotations

from maskplan.pipeline.core.weight_ops import SPARSE_OPS

GROUPED, CHANNELS, NOT_CONSTANT, UNSUPPORTED, DTYPE = (
    "grouped",
    "channels_not_multiple_of_4",
    "not_constant",
    "unsupported_op",
    "dtype",
)

UNSEEN, FEW_OUTPUTS, FIXED = "operator_not_known", "fewer_than_4_outputs", "fixed_table"

MIN_OUTPUTS = 4
"""A convolution with fewer outputs computes coordinates, a mask or a score; it costs little and stays dense."""


def ineligible_reason(op: str, channels: int, groups: int, m: int = 4) -> str | None:
    """Reason why TensorRT can never run a weight as N:M, or None if it can.

    Args:
        op: `Conv`, `ConvTranspose`, `Gemm` or `MatMul`; others are unsupported.
        channels: Length of the reduction axis: C of a convolution, the inner dimension of a product.
        groups: Of the convolution; 1 otherwise.
        m: Group length. The reason is named `channels_not_multiple_of_4` for any M, as in the report's schema.
    """
    if op not in SPARSE_OPS:
        return UNSUPPORTED
    if groups != 1:
        return GROUPED
    if channels % m:
        return CHANNELS
    return None
