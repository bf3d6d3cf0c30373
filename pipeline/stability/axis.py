"""One spatial axis of a convolution with zero padding: which outputs read which positions of the input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Axis:
    """Output o reads, through tap j, position o * stride - padding + dilation * j, or zero outside the input.

    Attributes:
        size: Of the input, at least 1.
        kernel: Number of taps.
        stride: At least 1.
        padding: On either side.
        dilation: At least 1.
    """

    size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def __post_init__(self) -> None:
        if min(self.size, self.kernel, self.stride, self.dilation) < 1 or self.padding < 0:
            raise ValueError(f"no such convolution: {self}")
        if self.size + 2 * self.padding < self.span:
            raise ValueError(f"the kernel is wider than the padded input: {self}")

    @property
    def span(self) -> int:
        """Positions from the first tap to the last."""
        return self.dilation * (self.kernel - 1) + 1

    @cached_property
    def taps(self) -> npt.NDArray[np.intp]:
        """Indices of the taps that read the input at some output; the others only ever read padding."""
        return np.flatnonzero(self._places.any(axis=(1, 2)))

    @cached_property
    def incidence(self) -> npt.NDArray[np.bool_]:
        """(taps, outputs, size), True where a tap of an output reads a position. Outputs that read none are omitted."""
        outputs = self._places.any(axis=(0, 2))
        return self._places[self.taps][:, outputs]

    @property
    def has_whole_patch(self) -> bool:
        """Whether some output reads the input through all of `taps`."""
        return bool(np.any(np.all(self.incidence.any(axis=2), axis=0)))

    @property
    def max_overlap(self) -> int:
        """The largest number of outputs that read one position: the squared norm of the unfolding along this axis."""
        return int(self.incidence.sum(axis=(0, 1)).max(initial=0))

    @property
    def max_overlap_any_size(self) -> int:
        """The same, maximized over input sizes."""
        return max_patch_overlap(self.kernel, self.stride, self.dilation)

    @property
    def circular_size(self) -> int:
        """The smallest N, a multiple of the stride, for which a circular operator on N positions contains this operator.

        Place the input at positions 0..n-1 of the circle and output o at o * stride. Among the outputs that read the input,
        let the taps reach `before` positions to its left and `after` to its right. On the circle, a tap at -i reads position
        N - i, which is outside the input if N >= n + before; a tap at n - 1 + i does not wrap around to the start of the
        input if N >= n + after. Both reaches may share the gap, where both read zeros. Outputs are at most
        n - span + before + after apart, which is less than N because no reach is longer than span - 1, so no two outputs
        coincide. Hence every entry of the zero-padded operator is an entry of the circular operator, whose norm is at least
        as large. Taps that coincide where the circle is shorter than the span do not affect this argument.
        """
        first = self._first[self._places.any(axis=(0, 2))]
        before = max(-int(first.min(initial=0)), 0)
        after = max(int(first.max(initial=0)) + self.span - self.size, 0)
        return -(-(self.size + max(before, after)) // self.stride) * self.stride

    @property
    def _first(self) -> npt.NDArray[np.intp]:
        """Position of the first tap of every output."""
        outputs = (self.size + 2 * self.padding - self.span) // self.stride + 1
        return np.arange(outputs) * self.stride - self.padding

    @cached_property
    def _places(self) -> npt.NDArray[np.bool_]:
        """As `incidence`, for all taps and outputs: (kernel, outputs, size)."""
        places = self._first + self.dilation * np.arange(self.kernel)[:, None]
        found: npt.NDArray[np.bool_] = places[..., None] == np.arange(self.size)
        return found


def max_patch_overlap(kernel: int, stride: int, dilation: int = 1) -> int:
    """The largest number of outputs that can read one position along an axis.

    Tap j of an output reads position t if t + padding - dilation * j is a multiple of the stride. With g the greatest common
    divisor of stride and dilation, such j are stride / g apart, so there are at most ceil(kernel / (stride / g)) of them.
    """
    return -(-kernel // (stride // math.gcd(stride, dilation)))
