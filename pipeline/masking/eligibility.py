"""Which weights can run 2:4: the one rule that learner, search and check share."""

from __future__ import annotations

GROUPED, CHANNELS, NOT_CONSTANT, UNSUPPORTED, DTYPE = (
    "grouped",
    "channels_not_multiple_of_4",
    "not_constant",
    "unsupported_op",
    "dtype",
)

_OPS = ("Conv", "Gemm", "MatMul")


def ineligible_reason(op: str, channels: int, groups: int, m: int = 4) -> str | None:
    """Why a weight can never be N:M for TensorRT, or None if it can.

    Args:
        op: `Conv`, `ConvTranspose`, `Gemm` or `MatMul`; others are unsupported.
        channels: Length of the reduction axis: C of a convolution, the inner dimension of a product.
        groups: Of the convolution; 1 otherwise.
        m: Group length. The reason's name speaks of 4 for any M, as the report's schema does.
    """
    if op not in _OPS:
        return UNSUPPORTED
    if groups != 1:
        return GROUPED
    if channels % m:
        return CHANNELS
    return None
