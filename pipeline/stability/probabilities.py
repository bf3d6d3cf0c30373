"""Bounds on the change of probabilities, given the change D of the logits, shape (..., classes) (lemma L2).

No bound depends on a constant added to all of D, because such a constant changes no probability.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def spread(differences: npt.ArrayLike) -> Floats:
    """Omega = max D - min D, shape (...): no |log p_k| moves by more, nor does the cross-entropy.

    log p_k moves by D_k - log sum_j p_j e^(D_j), and that logarithm is between min D and max D.
    """
    array = np.asarray(differences, dtype=np.float64)
    return np.asarray(array.max(axis=-1) - array.min(axis=-1))


def spread_limit(l2: npt.ArrayLike) -> Floats:
    """Upper bound of omega given only |D|_2: sqrt(2) |D|_2, attained by D = (1, -1, 0, ...)."""
    return np.asarray(np.sqrt(2.0) * np.asarray(l2, dtype=np.float64))


def total_variation_limit(omega: npt.ArrayLike) -> Floats:
    """tanh(omega / 4): bound of the total variation, always below 1.

    The odds of an event change by a factor between e^-omega and e^omega. Attained by two classes at odds e^(-omega/2).
    """
    return np.tanh(np.asarray(omega, dtype=np.float64) / 4)
