"""How far a difference of logits moves probabilities. D (..., classes) holds the differences, one row an image.

All limits look at D less a constant, since adding the same to every logit changes no probability.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def spread(differences: npt.ArrayLike) -> Floats:
    """Omega = max D - min D, shape (...): no |log p_k| moves by more, nor does the cross-entropy.

    log p_k moves by D_k - log sum_j p_j e^(D_j), and that logarithm lies between min D and max D.
    """
    array = np.asarray(differences, dtype=np.float64)
    return np.asarray(array.max(axis=-1) - array.min(axis=-1))


def spread_limit(l2: npt.ArrayLike) -> Floats:
    """What omega can be at most where only |D|_2 is known: sqrt(2) |D|_2, as for D = (1, -1, 0, ...)."""
    return np.asarray(np.sqrt(2.0) * np.asarray(l2, dtype=np.float64))


def total_variation_limit(omega: npt.ArrayLike) -> Floats:
    """tanh(omega / 4): no event's probability moves by more. Attained by two classes at odds of e^(-omega/2); below 1.

    The odds of an event change by a factor between e^-omega and e^omega.
    """
    return np.tanh(np.asarray(omega, dtype=np.float64) / 4)


def l1_limit(omega: npt.ArrayLike) -> Floats:
    """|p - p'|_1, twice the total variation; at most omega / 2 and so at most |D|_inf."""
    return 2 * total_variation_limit(omega)


def l2_limit(differences: npt.ArrayLike) -> Floats:
    """|p - p'|_2 <= 1/2 |D - mean D|_2, shape (...).

    Softmax has the Jacobian diag(p) - p p^T. It is the covariance of a one-hot draw, whose variance in a direction of
    length 1 is at most a quarter of its squared range, so at most 1/2.
    """
    array = np.asarray(differences, dtype=np.float64)
    centered = array - array.mean(axis=-1, keepdims=True)
    return np.asarray(np.linalg.norm(centered, axis=-1) / 2)


def l2_limit_of_norm(l2: npt.ArrayLike) -> Floats:
    """The same where only |D|_2 is known."""
    return np.asarray(l2, dtype=np.float64) / 2
