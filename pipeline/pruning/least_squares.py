"""Weights under a mask that give a layer's outputs back as far as they can: exact least squares, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.masking.layerwise import fold_weight, unfold_weight

if TYPE_CHECKING:
    import torch

# Of the normal equations solved at once.
_MOST_BYTES = 256 * 2**20


def fit_under_mask(
    weight: npt.NDArray[np.floating],
    mask: npt.NDArray[np.bool_],
    moment: npt.NDArray[np.floating],
    damping: float = 0.01,
) -> npt.NDArray[np.float32]:
    """The weights that minimize the mean of |W u - (mask*W') u|^2 + damping * h * |kept W - W'|^2, h the mean of H_ii.

    With H the second moments of u and S what a row w keeps, w' solves (H_SS + damping * h) w' = H_S: w + damping * h * w_S.
    (AdaPrune, Hubara et al. 2021, goes down the same objective by Adam, from the pruned weights.)

    Args:
        weight: (K, C, R, S) or (K, C), the weights whose outputs are to be met.
        mask: Shaped like it; rows may keep different numbers.
        moment: (D, D) in the order of `unfold_weight`.
        damping: How far new weights are held to the old; it makes a solution unique where inputs are not independent.

    Returns:
        Shaped like `weight`, +0.0 where the mask drops.
    """
    import torch

    rows = torch.from_numpy(unfold_weight(weight)).double()
    kept = torch.from_numpy(unfold_weight(mask))
    products = torch.from_numpy(np.ascontiguousarray(moment)).double()
    hold = damping * float(products.diagonal().mean())
    if hold > 0:
        products.diagonal().add_(hold)
    found = torch.zeros_like(rows)
    # Damped moments on both sides: the second term of the right side is in them already.
    targets = rows @ products
    for count in torch.unique(kept.sum(dim=1)).tolist():
        if count == 0:
            continue
        alike = (kept.sum(dim=1) == count).nonzero().flatten()
        columns = kept[alike].nonzero()[:, 1].reshape(len(alike), count)
        step = max(_MOST_BYTES // (8 * count * count), 1)
        for first in range(0, len(alike), step):
            at, some = alike[first : first + step], columns[first : first + step]
            fitted = _solved(products[some.unsqueeze(2), some.unsqueeze(1)], targets[at].gather(1, some))
            found[at] = found[at].scatter(1, some, fitted)
    solved: npt.NDArray[np.float32] = fold_weight(found.float().numpy(), weight.shape)
    return np.where(mask, solved, np.float32(0))


def _solved(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(B, S, S) and (B, S) to (B, S); where rounding leaves a matrix indefinite, by its pseudo-inverse."""
    import torch

    factors, failed = torch.linalg.cholesky_ex(matrices)
    found = torch.cholesky_solve(right.unsqueeze(2), factors).squeeze(2)
    bad = failed.nonzero().flatten()
    if len(bad):
        inverse = torch.linalg.pinv(matrices[bad], hermitian=True, rtol=1e-9)
        found[bad] = (inverse @ right[bad].unsqueeze(2)).squeeze(2)
    return found
