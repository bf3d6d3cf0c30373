"""Refit the kept weights of a masked layer to reproduce its outputs: exact least squares, row by row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.masking.layerwise import fold_weight, unfold_weight

_Floats = npt.NDArray[np.float64]

# Memory limit of the normal equations that are solved at once.
_MAX_BYTES = 256 * 2**20
# Rows of a block of triangular systems.
_BLOCK = 64


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
    rows = unfold_weight(weight).astype(np.float64)
    kept = unfold_weight(mask)
    products = moment.astype(np.float64)
    diagonal = np.einsum("ii->i", products)
    diagonal += max(damping * float(diagonal.mean()), 0)
    fitted = np.zeros_like(rows)
    # `products` includes the damping on its diagonal, so w @ products is already the whole right-hand side.
    targets = rows @ products
    counts = kept.sum(axis=1)
    for count in np.unique(counts[counts > 0]):
        same_count = np.flatnonzero(counts == count)
        columns = np.nonzero(kept[same_count])[1].reshape(len(same_count), count)
        step = max(_MAX_BYTES // (8 * int(count) ** 2), 1)
        for first in range(0, len(same_count), step):
            batch, positions = same_count[first : first + step, None], columns[first : first + step]
            matrices = products[positions[:, :, None], positions[:, None, :]]
            fitted[batch, positions] = _solve(matrices, targets[batch, positions])
    solved: npt.NDArray[np.float32] = fold_weight(fitted.astype(np.float32), weight.shape)
    return np.where(mask, solved, np.float32(0))


def _solve(matrices: _Floats, right: _Floats) -> _Floats:
    """Solve (B, S, S) systems for (B, S); by pseudo-inverse where rounding leaves a matrix indefinite."""
    try:
        factors = np.linalg.cholesky(matrices)
    except np.linalg.LinAlgError:
        if len(matrices) > 1:
            return np.concatenate([_solve(matrices[i : i + 1], right[i : i + 1]) for i in range(len(matrices))])
        inverse: _Floats = np.linalg.pinv(matrices, rcond=1e-9, hermitian=True)
        return np.matmul(inverse, right[..., None])[..., 0]
    return _substituted(factors, _substituted(factors, right, is_transposed=False), is_transposed=True)


def _substituted(factors: _Floats, right: _Floats, *, is_transposed: bool) -> _Floats:
    """Solve L x = b, or L^T x = b, with lower triangular matrices (B, S, S), in blocks: NumPy has no triangular solver."""
    size = right.shape[1]
    solution = right.copy()
    starts = range(0, size, _BLOCK)
    for start in reversed(starts) if is_transposed else starts:
        stop = min(start + _BLOCK, size)
        block = factors[:, start:stop, start:stop]
        if is_transposed:
            block = block.swapaxes(1, 2)
        solution[:, start:stop] = np.linalg.solve(block, solution[:, start:stop, None])[..., 0]
        solved = solution[:, start:stop, None]
        if is_transposed:
            solution[:, :start] -= np.matmul(factors[:, start:stop, :start].swapaxes(1, 2), solved)[..., 0]
        else:
            solution[:, stop:] -= np.matmul(factors[:, stop:, start:stop], solved)[..., 0]
    return solution
