"""Spectral norms of linear layers and of convolutions with zero padding on an input of known size, never too low."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.stability.axis import Axis, most_times_seen
from maskplan.pipeline.stability.conv_spectrum import symbols
from maskplan.pipeline.stability.max_singular_value import ROUNDING, largest_singular

# Of an explicit matrix.
_MOST_ENTRIES = 2**24
# Columns of a matrix that are squared at once.
_MOST_COLUMNS = 2**13


@dataclass(frozen=True)
class Norm:
    """A spectral norm, or an upper bound of it.

    Attributes:
        value: Never below the norm.
        exact: Whether it is the norm itself, but for at most 1e-6 of it above.
        method: `matrix` (decomposed), `torus` (of a circular convolution that contains this one), `depthwise` (the same with
            one channel a group) or `unfolded` (the kernel as a matrix, times how often a place is seen).
    """

    value: float
    exact: bool
    method: str


def linear_norm(weight: npt.NDArray[np.floating]) -> Norm:
    """The norm of a linear layer's weight (K, C).

    Raises:
        InputError: The weights are not all finite.
        ValueError: There is no such layer.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"no weight of a linear layer: shape {weight.shape}")
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
    effort: int = 512,
) -> Norm:
    """The norm of a convolution with zero padding, as a map of inputs of one size; the least of the bounds at hand.

    - Taps that only ever fall on padding are left out; where none is left, the operator is zero.
    - A 1x1 kernel is its matrix.
    - Patches that do not overlap are maps of their own, the largest that of a whole patch: the kernel as a (K, C*R*S)
      matrix. For patches that do, its norm times the square root of how many of them hold one place is a bound.
    - A small operator is written out and decomposed.
    - Else the operator is a part of a circular one on a torus a little larger than the input, whose norm is exact
      (`pipeline/stability/conv_spectrum.py`). That is never above the unfolded bound for inputs of any size.

    Groups are independent, so the largest counts.

    Args:
        weight: (K, C / groups, R, S).
        size: Height and width of the input.
        stride: Along height and width, as all that follow.
        padding: Zeros on either side.
        dilation: Distance of taps.
        groups: Of channels.
        effort: The most rows or columns, whichever are fewer, of an operator that is written out; several groups together
            may take as long as one such.

    Raises:
        InputError: The weights are not all finite.
        ValueError: There is no such convolution.
    """
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    rows, columns = _axes(weight, size, stride, padding, dilation, groups)
    kernels = weight[:, :, rows.taps][..., columns.taps]
    kernels = kernels.reshape(groups, outputs, *kernels.shape[1:])
    if not kernels.size:
        return Norm(0.0, exact=True, method="matrix")
    if kernels.shape[3:] == (1, 1):
        return Norm(max(_matrix_norm(kernel[:, :, 0, 0]) for kernel in kernels), exact=True, method="matrix")
    if _is_small(groups, outputs, inputs, rows, columns, effort):
        return Norm(
            max(_matrix_norm(_written_out(each, rows, columns)) for each in kernels), exact=True, method="matrix"
        )
    times = rows.times_seen * columns.times_seen
    found = []
    if times < rows.times_seen_at_most * columns.times_seen_at_most or times == 1:
        unfolded = max(_matrix_norm(kernel.reshape(outputs, -1)) for kernel in kernels) * math.sqrt(times)
        found.append(Norm(unfolded, exact=times == 1 and rows.sees_whole and columns.sees_whole, method="unfolded"))
    if not any(norm.exact for norm in found):
        found.append(
            Norm(_torus_norm(kernels, rows, columns), exact=False, method="depthwise" if inputs == 1 else "torus")
        )
    return min(found, key=lambda norm: norm.value)


def conv_update_factor(
    kernel: tuple[int, int], stride: tuple[int, int] = (1, 1), dilation: tuple[int, int] = (1, 1)
) -> float:
    """The factor c of |conv_U| <= c |U|_F for any update U (K, C, R, S), zero padding and input size.

    A convolution is U as a (K, C*R*S) matrix times the unfolding, which copies every place of the input into all patches
    that hold it and so has the square root of the most copies of one place as its norm. Along an axis there are at most
    ceil(k / (s/g)) of them, g the greatest common divisor of stride and dilation (`most_times_seen`): ceil(k/s) where the
    two share no factor, and more where they do, as every tap of stride 2, dilation 2 falls on the same places. The factor is
    the square root of the product over both axes; ceil(k/s) for a square kernel and stride. It cannot be improved for
    kernels that the stride divides: equal weights on equal inputs come up to it as the input grows. |U|_F may be replaced by
    the spectral norm of the matrix.
    """
    return math.sqrt(math.prod(map(most_times_seen, kernel, stride, dilation)))


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
    """A LOWER bound of a convolution's norm, rising to it with more steps: no certificate, but it shows how tight one is.

    Args:
        weight: As for `conv_norm`, and so all that follows.
        size: Height and width of the input.
        stride: Along height and width.
        padding: Zeros on either side.
        dilation: Distance of taps.
        groups: Of channels.
        steps: Applications of the operator and its transpose.
        seed: Of the first input.
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
        raise ValueError(f"no weight of a convolution with {groups} groups: shape {weight.shape}")
    _require_finite(weight)
    rows, columns = map(Axis, size, weight.shape[2:], stride, padding, dilation)
    return rows, columns


def _require_finite(weight: npt.NDArray[np.floating]) -> None:
    if not np.isfinite(weight).all():
        raise InputError(
            "weights are not all finite",
            found=f"{np.count_nonzero(~np.isfinite(weight))} of {weight.size} are NaN or infinite",
            fix="use a checkpoint whose training did not diverge",
        )


def _largest_magnitude(weight: npt.NDArray[np.floating]) -> float:
    """What weights are divided by first, so that squares neither overflow nor vanish; 1 if all are zero."""
    return float(np.abs(weight).max()) or 1.0


def _matrix_norm(matrix: npt.NDArray[np.floating]) -> float:
    """From the product with the transpose on the smaller side, summed over parts of the larger."""
    import torch

    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    scale = _largest_magnitude(wide)
    product = torch.zeros(len(wide), len(wide), dtype=torch.float64)
    for first in range(0, wide.shape[1], _MOST_COLUMNS):
        part = torch.from_numpy(wide[:, first : first + _MOST_COLUMNS].astype(np.float64) / scale)
        product.addmm_(part, part.mT)
    return math.sqrt(max(float(torch.linalg.eigvalsh(product)[-1]), 0.0)) * (1 + ROUNDING) * scale


def _torus_norm(kernels: npt.NDArray[np.floating], rows: Axis, columns: Axis) -> float:
    import torch

    scale = _largest_magnitude(kernels)
    return largest_singular(symbols(torch.from_numpy(kernels.astype(np.float64) / scale), rows, columns)) * scale


def _is_small(groups: int, outputs: int, inputs: int, rows: Axis, columns: Axis, effort: int) -> bool:
    """Whether the operator of all groups is written out and decomposed in the time of one matrix with `effort` rows."""
    high = outputs * rows.seen.shape[1] * columns.seen.shape[1]
    wide = inputs * rows.size * columns.size
    work: int = groups * min(high, wide) ** 3
    return work <= effort**3 and high * wide <= _MOST_ENTRIES


def _written_out(kernel: npt.NDArray[np.floating], rows: Axis, columns: Axis) -> npt.NDArray[np.float64]:
    """(K * outputs, C * places) of one group (K, C, R, S)."""
    down = np.einsum("kcrs,roy->kcsoy", kernel.astype(np.float64), rows.seen.astype(np.float64))
    both: npt.NDArray[np.float64] = np.einsum("kcsoy,spx->kopcyx", down, columns.seen.astype(np.float64))
    high = kernel.shape[0] * rows.seen.shape[1] * columns.seen.shape[1]
    return both.reshape(high, -1)
