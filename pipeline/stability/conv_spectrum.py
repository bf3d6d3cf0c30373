"""The spectrum of a circular convolution: one small matrix per frequency."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.stability.axis import Axis

if TYPE_CHECKING:
    import torch

# Of the matrices yielded at a time; computations on them need several times as much.
_MAX_BYTES = 64 * 2**20


def symbols(weight: torch.Tensor, rows: Axis, columns: Axis) -> Iterator[torch.Tensor]:
    """Matrices whose largest spectral norm is the norm of the smallest circular convolution that contains this one.

    At stride 1 the Fourier transform decomposes a circular convolution into a K x C matrix H(f) for every frequency f
    (Sedghi et al. 2019). Keeping every s-th output adds up frequencies that differ by multiples of N/s: output frequency f
    depends on input frequencies f + a N/s, a = 0..s-1, through [H(f), ..., H(f + (s-1) N/s)] / sqrt(s), along each axis. The
    zero-padded operator is a part of the circular one (`Axis.circular_size`), so its norm is no larger. Weights are real,
    so -f has the conjugate matrix of f, and only one of the two is computed.

    Args:
        weight: (G, K, C, R, S), float64: G groups of K output and C input channels each, only the taps that read the input.
        rows: Along R.
        columns: Along S.

    Yields:
        (B, K, C * aliases), complex128, a few at a time.
    """
    import torch

    groups, outputs, inputs, *_ = weight.shape
    aliases = rows.stride * columns.stride
    taps = weight.flatten(3).permute(3, 0, 1, 2).flatten(1)
    frequencies = _frequencies(rows, columns)
    step = max(_MAX_BYTES // (16 * weight.shape[0] * outputs * inputs * aliases), 1)
    for first in range(0, len(frequencies), step):
        some = frequencies[first : first + step]
        phases = torch.from_numpy(_phases(some, rows, columns).reshape(-1, len(taps)))
        both = torch.complex(phases.cos() @ taps, phases.sin() @ taps)
        matrices = both.view(len(some), aliases, groups, outputs, inputs).permute(0, 2, 3, 1, 4)
        yield matrices.reshape(len(some) * groups, outputs, aliases * inputs) / math.sqrt(aliases)


def _frequencies(rows: Axis, columns: Axis) -> npt.NDArray[np.int64]:
    """Output frequencies, one of each pair f and -f, shape (F, 2)."""
    high, wide = rows.circular_size // rows.stride, columns.circular_size // columns.stride
    grid = np.stack(np.meshgrid(np.arange(high), np.arange(wide), indexing="ij"), axis=-1).reshape(-1, 2)
    mirrored = -grid % (high, wide)
    found: npt.NDArray[np.int64] = grid[grid @ (wide, 1) <= mirrored @ (wide, 1)]
    return found


def _phases(frequencies: npt.NDArray[np.int64], rows: Axis, columns: Axis) -> npt.NDArray[np.float64]:
    """Angle of every tap at the input frequencies of each output frequency, shape (F, aliases, R * S)."""
    down = _angles(frequencies[:, 0], rows)
    along = _angles(frequencies[:, 1], columns)
    both = down[:, :, None, :, None] + along[:, None, :, None, :]
    return both.reshape(len(frequencies), rows.stride * columns.stride, -1)


def _angles(frequencies: npt.NDArray[np.int64], axis: Axis) -> npt.NDArray[np.float64]:
    """The same along one axis, (F, stride, taps). Full turns are removed in integers, so that angles stay accurate."""
    aliased = frequencies[:, None] + np.arange(axis.stride) * (axis.circular_size // axis.stride)
    turns = aliased[..., None] * (axis.dilation * axis.taps) % axis.circular_size
    return 2 * np.pi * turns / axis.circular_size
