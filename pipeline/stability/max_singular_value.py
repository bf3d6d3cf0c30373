"""A certified upper bound of the largest singular value among many matrices, decomposing only a few of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Relative, of a singular value. Rounding in a product M M^* moves its eigenvalues by at most the number of M's entries
# times 2.2e-16 or so, times the largest; decompositions add far less. This is above it for up to 4e8 entries.
ROUNDING = 1e-7
# Relative, of an eigenvalue: the test shows that no other eigenvalue exceeds the largest known one by more than this.
_CLEAR = 1e-9
_POWER_STEPS = 16


def largest_singular(stacks: Iterable[torch.Tensor]) -> float:
    """An upper bound of the spectral norms of matrices, at most 1e-7 relative above the largest of them.

    For each matrix M the smaller of M M^* and M^* M is used. A Cholesky factorization of a I - M M^* costs a fraction of
    the product and exists only if no eigenvalue exceeds a, so it rules out most matrices of a stack once a good candidate
    is known. Only candidates are decomposed.

    Args:
        stacks: Each (B, P, Q), float64 or complex128, with entries up to 1e100; only one is in memory at a time.
    """
    best = 0.0
    for stack in stacks:
        best = _raised(best, _products(stack))
    return float(best**0.5 * (1 + ROUNDING))


def _products(stack: torch.Tensor) -> torch.Tensor:
    other = stack.mH
    return stack @ other if stack.shape[1] <= stack.shape[2] else other @ stack


def _raised(best: float, products: torch.Tensor) -> float:
    """The larger of `best` and the largest eigenvalue of the products."""
    import torch

    if products.shape[-1] == 1:
        return max(best, float(products.real.max()))
    left = products
    while len(left):
        if best > 0:
            shifted = -left
            shifted.diagonal(dim1=-2, dim2=-1).add_(best * (1 + _CLEAR))
            left = left[torch.linalg.cholesky_ex(shifted).info != 0]
        if len(left):
            candidate = int(_rayleigh(left).argmax())
            largest = float(torch.linalg.eigvalsh(left[candidate])[-1])
            if largest <= 0 and best == 0:
                # All products are zero up to rounding, since the candidate has the largest Rayleigh quotient.
                return best
            best = max(best, largest)
            left = left[torch.arange(len(left)) != candidate]
    return best


def _rayleigh(products: torch.Tensor) -> torch.Tensor:
    """Lower estimates of the largest eigenvalues, (B,)."""
    import torch

    start = torch.randn(products.shape[-1], 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors = start.to(products.dtype).expand(len(products), -1, -1)
    values = vectors
    for _ in range(_POWER_STEPS):
        lengths = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        vectors = values / torch.where(lengths > 0, lengths, 1.0)
        values = products @ vectors
    return (vectors.conj() * values).sum(dim=(1, 2)).real
