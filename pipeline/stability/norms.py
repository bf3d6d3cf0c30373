"""Upper bounds of the spectral norms of linear layers, and of zero-padded convolutions on inputs of known size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.stability.axis import Axis, max_patch_overlap
from maskplan.pipeline.stability.conv_spectrum import symbols
from maskplan.pipeline.stability.max_singular_value import ROUNDING, largest_singular

# Of a dense operator matrix.
_MAX_ENTRIES = 2**24
# Columns multiplied at a time.
_CHUNK_COLUMNS = 2**13


NormMethod = Literal["matrix", "circulant", "depthwise", "unfolded"]


@dataclass(frozen=True)
class Norm:
    """A spectral norm, or an upper bound of it.

    Attributes:
        value: Never below the norm.
        exact: Whether it is the norm itself, up to 1e-6 relative.
        method: `matrix` (decomposition), `circulant` (norm of a circular convolution that contains this one), `depthwise`
            (the same with one channel per group) or `unfolded` (norm of the kernel as a matrix, times the overlap).
    """

    value: float
    exact: bool
    method: NormMethod


def linear_norm(weight: npt.NDArray[np.floating]) -> Norm:
    """Spectral norm of a linear layer's weight (K, C).

    Raises:
        InputError: The weights are not all finite.
        ValueError: The weight is not a non-empty matrix.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"not the weight of a linear layer: shape {weight.shape}")
    _require_finite(weight)
    return Norm(_matrix_norm(weight), exact=True, method="matrix")


def conv_norm(
    weight: npt.NDArray[np.floating],
    *,
    size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    dense_limit: int = 512,
) -> Norm:
    """Spectral norm of a zero-padded convolution on inputs of one size, or the smallest of several upper bounds.

    - Taps that only ever read padding are removed; if none remains, the operator is zero.
    - The norm of a 1x1 convolution is that of its matrix.
    - A small operator is written as a dense matrix and decomposed.
    - Without overlapping patches, the norm is that of the kernel as a (K, C*R*S) matrix. With overlap, that norm times the
      square root of the largest number of patches that contain one position is an upper bound.
    - Otherwise the operator is a part of a circular convolution on a slightly larger input, whose norm is computed exactly
      (`pipeline/stability/conv_spectrum.py`). It never exceeds the unfolded bound for inputs of any size.

    Groups are independent, so the norm is the largest norm of a group.

    Args:
        weight: (K, C / groups, R, S).
        size: Height and width of the input.
        stride: Along height and width, like padding and dilation.
        padding: Zeros on each side.
        dilation: Distance between taps.
        groups: Channel groups.
        dense_limit: Largest number of rows or columns, whichever is smaller, of an operator that is written as a dense
            matrix; several groups together may cost as much as one such operator.

    Raises:
        InputError: The weights are not all finite.
        ValueError: The arguments do not describe a convolution.
    """
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    rows, columns = _axes(weight, size, stride, padding, dilation, groups)
    kernels = weight[:, :, rows.taps][..., columns.taps]
    kernels = kernels.reshape(groups, outputs, *kernels.shape[1:])
    if not kernels.size:
        return Norm(0.0, exact=True, method="matrix")
    if kernels.shape[3:] == (1, 1):
        return Norm(max(_matrix_norm(kernel[:, :, 0, 0]) for kernel in kernels), exact=True, method="matrix")
    if _is_small(groups, outputs, inputs, rows, columns, dense_limit):
        return Norm(
            max(_matrix_norm(_dense_matrix(each, rows, columns)) for each in kernels), exact=True, method="matrix"
        )
    times = rows.max_overlap * columns.max_overlap
    candidates = []
    if times < rows.max_overlap_any_size * columns.max_overlap_any_size or times == 1:
        unfolded = max(_matrix_norm(kernel.reshape(outputs, -1)) for kernel in kernels) * math.sqrt(times)
        candidates.append(
            Norm(unfolded, exact=times == 1 and rows.has_whole_patch and columns.has_whole_patch, method="unfolded")
        )
    if not any(norm.exact for norm in candidates):
        candidates.append(
            Norm(
                _circulant_norm(kernels, rows, columns), exact=False, method="depthwise" if inputs == 1 else "circulant"
            )
        )
    return min(candidates, key=lambda norm: norm.value)


def conv_update_factor(
    kernel: tuple[int, int], stride: tuple[int, int] = (1, 1), dilation: tuple[int, int] = (1, 1)
) -> float:
    """The factor c in |conv_U| <= c |U|_F, valid for any update U (K, C, R, S), zero padding and input size.

    A convolution is U as a (K, C*R*S) matrix times the unfolding, which copies every position of the input into all patches
    that contain it; its norm is the square root of the largest number of copies of one position. Along an axis there are at
    most ceil(k / (s/g)) copies, with g the greatest common divisor of stride and dilation (`max_patch_overlap`): ceil(k/s)
    if the two are coprime, more otherwise, since for instance all taps of stride 2, dilation 2 read the same positions. The
    factor is the square root of the product over both axes. It is tight for kernels divisible by the stride: equal weights
    on equal inputs approach it as the input grows. The spectral norm of the matrix may replace |U|_F.
    """
    return math.sqrt(math.prod(map(max_patch_overlap, kernel, stride, dilation)))


def power_iteration(
    weight: npt.NDArray[np.floating],
    *,
    size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    steps: int = 100,
    seed: int = 0,
) -> float:
    """A lower bound of a convolution's norm that converges to it; not a certificate, but it shows how tight one is.

    Args:
        weight: As for `conv_norm`, like the arguments that follow.
        size: Height and width of the input.
        stride: Along height and width.
        padding: Zeros on each side.
        dilation: Distance between taps.
        groups: Channel groups.
        steps: Applications of the operator and its transpose.
        seed: Seed of the initial input.
    """
    import torch
    from torch.nn.functional import conv2d

    _axes(weight, size, stride, padding, dilation, groups)
    kernel = torch.from_numpy(np.array(weight, dtype=np.float64))
    shape = (1, weight.shape[1] * groups, *size)
    vector = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = 0.0
    for _ in range(steps):
        vector = (vector / vector.norm()).requires_grad_()
        image = conv2d(vector, kernel, None, stride, padding, dilation, groups)
        best = max(best, float(image.detach().norm()))
        (vector,) = torch.autograd.grad(image, vector, image.detach())
        if not vector.any():
            break
    return best


def _axes(
    weight: npt.NDArray[np.floating],
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> tuple[Axis, Axis]:
    if weight.ndim != 4 or weight.shape[0] % groups or 0 in weight.shape:
        raise ValueError(f"not the weight of a convolution with {groups} groups: shape {weight.shape}")
    _require_finite(weight)
    rows, columns = map(Axis, size, weight.shape[2:], stride, padding, dilation)
    return rows, columns


def _require_finite(weight: npt.NDArray[np.floating]) -> None:
    if not np.isfinite(weight).all():
        raise InputError(
            "weights are not all finite",
            found=f"{np.count_nonzero(~np.isfinite(weight))} of {weight.size} are NaN or infinite",
            fix="use a checkpoint with finite weights",
        )


def _largest_magnitude(weight: npt.NDArray[np.floating]) -> float:
    """Scale for dividing weights, so that squares neither overflow nor underflow; 1 if all are zero."""
    return float(np.abs(weight).max()) or 1.0


def _matrix_norm(matrix: npt.NDArray[np.floating]) -> float:
    """Norm from the Gram matrix of the smaller side, accumulated over chunks of the larger side."""
    import torch

    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    scale = _largest_magnitude(wide)
    product = torch.zeros(len(wide), len(wide), dtype=torch.float64)
    for first in range(0, wide.shape[1], _CHUNK_COLUMNS):
        part = torch.from_numpy(wide[:, first : first + _CHUNK_COLUMNS].astype(np.float64) / scale)
        product.addmm_(part, part.mT)
    return math.sqrt(max(float(torch.linalg.eigvalsh(product)[-1]), 0.0)) * (1 + ROUNDING) * scale


def _circulant_norm(kernels: npt.NDArray[np.floating], rows: Axis, columns: Axis) -> float:
    import torch

    scale = _largest_magnitude(kernels)
    return largest_singular(symbols(torch.from_numpy(kernels.astype(np.float64) / scale), rows, columns)) * scale


def _is_small(groups: int, outputs: int, inputs: int, rows: Axis, columns: Axis, dense_limit: int) -> bool:
    """Whether decomposing the operators of all groups costs at most as much as one matrix with `dense_limit` rows."""
    high = outputs * rows.incidence.shape[1] * columns.incidence.shape[1]
    wide = inputs * rows.size * columns.size
    work: int = groups * min(high, wide) ** 3
    return work <= dense_limit**3 and high * wide <= _MAX_ENTRIES


def _dense_matrix(kernel: npt.NDArray[np.floating], rows: Axis, columns: Axis) -> npt.NDArray[np.float64]:
    """The operator of one group (K, C, R, S) as a matrix (K * outputs, C * positions)."""
    down = np.einsum("kcrs,roy->kcsoy", kernel.astype(np.float64), rows.incidence.astype(np.float64))
    both: npt.NDArray[np.float64] = np.einsum("kcsoy,spx->kopcyx", down, columns.incidence.astype(np.float64))
    high = kernel.shape[0] * rows.incidence.shape[1] * columns.incidence.shape[1]
    return both.reshape(high, -1)
