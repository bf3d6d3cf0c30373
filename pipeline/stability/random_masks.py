"""One layer under random masks: every group of M weights draws its pattern by itself, from its own probabilities.

Arrays end in groups and their patterns: weights or terms (..., G, M), probabilities (..., G, P), and `table` (P, M), the
patterns as `pipeline/masking/patterns.py` lists them. They may broadcast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Table = npt.NDArray[np.bool_]


def inclusion(probabilities: npt.ArrayLike, table: Table) -> Floats:
    """q, shape (..., G, M): how likely each weight is kept. The expected weights are q * w."""
    return np.asarray(probabilities, dtype=np.float64) @ table


def output_moments(terms: npt.ArrayLike, probabilities: npt.ArrayLike, table: Table) -> tuple[Floats, Floats]:
    """Mean and variance of sum_j m_j a_j over masks m, both of shape (...), exactly.

    A pattern p contributes v_p = sum of its a_j. Groups are independent, so their variances add up. For a uniform choice
    among the six patterns of 2:4 the mean is half the sum, and the variance a third of sum_j (a_j - mean of its group)^2.

    Args:
        terms: a (..., G, M), for instance w_j h_j of one output at one input h.
        probabilities: (..., G, P), each summing to 1.
        table: (P, M).
    """
    chances = np.asarray(probabilities, dtype=np.float64)
    sums = _sums(terms, table)
    means = (chances * sums).sum(axis=-1)
    variances = (chances * (sums - means[..., None]) ** 2).sum(axis=-1)
    return means.sum(axis=-1), variances.sum(axis=-1)


def output_limit(terms: npt.ArrayLike, table: Table, confidence: float = 0.95) -> Floats:
    """|sum_j m_j a_j - its mean| is no larger, with this confidence; shape (...), for each output by itself.

    Hoeffding's inequality with the range of every group, whatever the probabilities:
    P(|y - E y| >= t) <= 2 exp(-2 t^2 / sum of squared ranges).

    Args:
        terms: (..., G, M).
        table: (P, M).
        confidence: Between 0 and 1.
    """
    sums = _sums(terms, table)
    squares = ((sums.max(axis=-1) - sums.min(axis=-1)) ** 2).sum(axis=-1)
    return np.asarray(np.sqrt(squares * math.log(2 / (1 - confidence)) / 2))


@dataclass(frozen=True)
class NormDeviation:
    """Limits of the spectral norm of W~ - E W~, by the matrix Bernstein inequality (Tropp 2012).

    Attributes:
        variance: V, the larger norm of sum_b E Z_b Z_b^T and sum_b E Z_b^T Z_b, with Z_b the deviation of one group.
        largest: No Z_b has a larger norm.
        sides: Rows plus columns of the matrix.
    """

    variance: float
    largest: float
    sides: int

    @property
    def expected(self) -> float:
        """The mean of the norm is no larger: sqrt(2 V log d) + L/3 log d, d the sum of both sides."""
        logarithm = math.log(self.sides)
        return math.sqrt(2 * self.variance * logarithm) + self.largest * logarithm / 3

    def limit(self, confidence: float = 0.95) -> float:
        """The norm is no larger, with this confidence: where d exp(-t^2 / 2 / (V + L t / 3)) has come down to the rest."""
        logarithm = math.log(self.sides / (1 - confidence))
        half = self.largest * logarithm / 3
        return half + math.sqrt(half**2 + 2 * self.variance * logarithm)


def norm_deviation(weight: npt.ArrayLike, probabilities: npt.ArrayLike, table: Table) -> NormDeviation:
    """How far the spectral norm of a masked matrix lies from that of its mean.

    A group's deviation is one row of a matrix, z = (m - q) * w on M columns. So sum E Z Z^T is diagonal, and sum E Z^T Z
    has an M x M block for every group of columns. For a convolution this is of the kernel as a (K, C*R*S) matrix; times
    `conv_update_factor` it limits the operator.

    Args:
        weight: (K, G, M), rows of groups.
        probabilities: (K, G, P), or what broadcasts to it.
        table: (P, M).
    """
    array = np.asarray(weight, dtype=np.float64)
    rows, groups, m = array.shape
    chances = np.broadcast_to(np.asarray(probabilities, dtype=np.float64), (rows, groups, len(table)))
    kept = inclusion(chances, table)
    length = np.zeros((rows, groups))
    squares = np.zeros((rows, groups))
    blocks = np.zeros((groups, m, m))
    # One pattern at a time: all at once would be P times the weight.
    for pattern, chance in zip(table, np.moveaxis(chances, -1, 0), strict=True):
        deviation = (pattern - kept) * array
        square = (deviation**2).sum(axis=-1)
        # A pattern that is never drawn deviates nowhere.
        length = np.maximum(length, np.where(chance > 0, square, 0.0))
        squares += chance * square
        blocks += np.einsum("kg,kgi,kgj->gij", chance, deviation, deviation, optimize=True)
    variance = max(float(squares.sum(axis=1).max()), float(np.linalg.eigvalsh(blocks)[:, -1].max()))
    return NormDeviation(variance, math.sqrt(float(length.max())), rows + groups * m)


def soft_gap_limit(soft: npt.ArrayLike, table: Table) -> Floats:
    """|m_soft - m_hard|_1 of every group is no larger, shape (..., G), where m_hard is the likeliest pattern.

    m_soft - m_hard = sum_p y_p (m_p - m_hard), and two patterns differ in at most some places: 4 of a 2:4 group, which gives
    4 (1 - y_max).

    Args:
        soft: y (..., G, P), each summing to 1.
        table: (P, M).
    """
    apart = int((table[:, None] != table[None]).sum(axis=-1).max())
    return np.asarray(apart * (1 - np.asarray(soft, dtype=np.float64).max(axis=-1)))


def soft_error_limit(weight: npt.ArrayLike, soft: npt.ArrayLike, table: Table) -> float:
    """|(m_soft - m_hard) * W|_F is no larger: what it costs at most to deploy the likeliest pattern for the soft one.

    Args:
        weight: (..., G, M).
        soft: (..., G, P).
        table: (P, M).
    """
    gaps = soft_gap_limit(soft, table) * np.abs(np.asarray(weight, dtype=np.float64)).max(axis=-1)
    return float(np.sqrt((gaps**2).sum()))


def _sums(terms: npt.ArrayLike, table: Table) -> Floats:
    """(..., G, P): what every pattern lets through."""
    return np.asarray(terms, dtype=np.float64) @ table.T
