"""Refit the kept weights of a masked layer to reproduce its outputs: exact least squares, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.masking.layerwise import fold_weight, unfold_weight

if TYPE_CHECKING:
    import torch

# Memory limit of the normal equations that are solved at once.
_MAX_BYTES = 256 * 2**20


def fit_under_mask(
    weight: npt.NDArray[np.floating],
    mask: npt.NDArray[np.bool_],
    moment: npt.NDArray[np.floating],
    damping: float = 0.01,
) -> npt.NDArray[np.float32]:
    """The weights W' that minimize the mean of |W u - (mask*W') u|^2 + damping * h * |mask*(W - W')|^2, h the mean of H_ii.

    With H the second moments of u and S the positions that a row w keeps, w' solves
    (H_SS + damping * h I) w' = H_S: w + damping * h w_S. (AdaPrune, Hubara et al. 2021, minimizes the same first term with
    Adam, starting from the pruned weights.)

    Args:
        weight: W, (K, C, R, S) or (K, C): the weights whose outputs are reproduced.
        mask: Bool, shaped like `weight`; rows may keep different numbers.
        moment: H, (D, D), in the order of `unfold_weight`.
        damping: Regularization towards the old weights; it makes the solution unique if inputs are linearly dependent.

    Returns:
        float32, shaped like `weight`, +0.0 where the mask drops.
    """
    import torch

    rows = torch.from_numpy(unfold_weight(weight)).double()
    kept = torch.from_numpy(unfold_weight(mask))
    products = torch.from_numpy(np.ascontiguousarray(moment)).double()
    ridge = damping * float(products.diagonal().mean())
    if ridge > 0:
        products.diagonal().add_(ridge)
    fitted = torch.zeros_like(rows)
    # `products` includes the damping on its diagonal, so w @ products is already the whole right-hand side.
    targets = rows @ products
    for count in torch.unique(kept.sum(dim=1)).tolist():
        if count == 0:
            continue
        same_count = (kept.sum(dim=1) == count).nonzero().flatten()
        columns = kept[same_count].nonzero()[:, 1].reshape(len(same_count), count)
        step = max(_MAX_BYTES // (8 * count * count), 1)
        for first in range(0, len(same_count), step):
            batch, positions = same_count[first : first + step], columns[first : first + step]
            matrices = products[positions.unsqueeze(2), positions.unsqueeze(1)]
            solution = _solve(matrices, targets[batch].gather(1, positions))
            fitted[batch] = fitted[batch].scatter(1, positions, solution)
    solved: npt.NDArray[np.float32] = fold_weight(fitted.float().numpy(), weight.shape)
    return np.where(mask, solved, np.float32(0))


def _solve(matrices: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve (B, S, S) systems for (B, S); by pseudo-inverse where rounding leaves a matrix indefinite."""
    import torch

    factors, failed = torch.linalg.cholesky_ex(matrices)
    solutions = torch.cholesky_solve(right.unsqueeze(2), factors).squeeze(2)
    bad = failed.nonzero().flatten()
    if len(bad):
        inverse = torch.linalg.pinv(matrices[bad], hermitian=True, rtol=1e-9)
        solutions[bad] = (inverse @ right[bad].unsqueeze(2)).squeeze(2)
    return solutions
