"""One spatial axis of a convolution with zero padding: which outputs see the input, and how often they see a place of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Axis:
    """Output o sees, through tap j, the place o * stride - padding + dilation * j, and zero where there is no such place.

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
        """Places from the first tap to the last."""
        return self.dilation * (self.kernel - 1) + 1

    @cached_property
    def taps(self) -> npt.NDArray[np.intp]:
        """Which taps ever see the input: the operator is that of these alone."""
        return np.flatnonzero(self._places.any(axis=(1, 2)))

    @cached_property
    def seen(self) -> npt.NDArray[np.bool_]:
        """Shape (taps, outputs, size): which tap of which output sees which place. Outputs that see none are left out."""
        outputs = self._places.any(axis=(0, 2))
        return self._places[self.taps][:, outputs]

    @property
    def sees_whole(self) -> bool:
        """Some output has all its taps within the input, those aside that never are."""
        return bool(np.any(np.all(self.seen.any(axis=2), axis=0)))

    @property
    def times_seen(self) -> int:
        """The most outputs that see one place: the squared norm of the unfolding along this axis."""
        return int(self.seen.sum(axis=(0, 1)).max(initial=0))

    @property
    def times_seen_at_most(self) -> int:
        """The same for an input of any size."""
        return most_times_seen(self.kernel, self.stride, self.dilation)

    @property
    def torus(self) -> int:
        """The smallest N, a multiple of the stride, for which the operator is a part of that on a circle of N places.

        Put the input at places 0..n-1 of the circle and let output o stand at o * stride. Of the outputs that see the
        input at all, let the taps reach `before` places to the left of it and `after` to the right. On the circle a tap at
        -i meets place N - i, none of the input's if N >= n + before, and a tap at n - 1 + i does not come round to its start
        if N >= n + after. Both may meet in the gap, where both find zeros. Outputs are at most n - span + before + after
        apart, less than N as no reach is longer than span - 1, so no two fall together. Hence every entry of the zero-padded
        operator is one of the circular operator, whose norm is no smaller. Taps that fall together, where the circle is
        shorter than the span, change nothing in this.
        """
        first = self._first[self._places.any(axis=(0, 2))]
        before = max(-int(first.min(initial=0)), 0)
        after = max(int(first.max(initial=0)) + self.span - self.size, 0)
        return -(-(self.size + max(before, after)) // self.stride) * self.stride

    @property
    def _first(self) -> npt.NDArray[np.intp]:
        """Where the first tap of every output falls."""
        outputs = (self.size + 2 * self.padding - self.span) // self.stride + 1
        return np.arange(outputs) * self.stride - self.padding

    @cached_property
    def _places(self) -> npt.NDArray[np.bool_]:
        """(kernel, outputs, size), all of them."""
        places = self._first + self.dilation * np.arange(self.kernel)[:, None]
        found: npt.NDArray[np.bool_] = places[..., None] == np.arange(self.size)
        return found


def most_times_seen(kernel: int, stride: int, dilation: int = 1) -> int:
    """How many outputs can see one place along an axis.

    Place t is seen by tap j of an output if t + padding - dilation * j is a multiple of the stride. With g the greatest
    common divisor of stride and dilation, such j are stride / g apart, so at most ceil(kernel / (stride / g)) of them fit.
    """
    return -(-kernel // (stride // math.gcd(stride, dilation)))
