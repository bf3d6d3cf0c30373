"""A stand-in for cuSPARSELt on the CPU: real 2:4 packing, and PyTorch's own limits on what it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from maskplan.engines.cusparselt import SparseHost


@dataclass(frozen=True)
class Packed:
    """Half of the values, and where in its four each one belongs."""

    values: torch.Tensor
    places: torch.Tensor

    @staticmethod
    def of(matrix: torch.Tensor) -> Packed:
        rows, columns = matrix.shape
        groups = matrix.reshape(rows, columns // 4, 4)
        # Non-zeros first; of what does not fit into two places nothing remains.
        places = (groups == 0).to(torch.uint8).argsort(dim=2, stable=True)[..., :2]
        return Packed(groups.gather(2, places).reshape(rows, columns // 2), places.to(torch.uint8))

    def unpacked(self) -> torch.Tensor:
        rows, groups, _ = self.places.shape
        matrix = torch.zeros(rows, groups, 4, dtype=self.values.dtype)
        matrix.scatter_(2, self.places.long(), self.values.reshape(rows, groups, 2))
        return matrix.reshape(rows, groups * 4)


def multiply(packed: Packed, dense: torch.Tensor) -> torch.Tensor:
    matrix = packed.unpacked()
    assert dense.t().is_contiguous()
    if matrix.dtype == torch.int8:
        return (matrix.to(torch.int64) @ dense.to(torch.int64)).to(torch.int32)
    return matrix @ dense


def compress(matrix: torch.Tensor) -> Packed:
    """Takes what cuSPARSELt takes, as PyTorch's own class checks it."""
    rows, columns = matrix.shape
    least = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[matrix.dtype]
    if rows % least.sparse_min_rows or columns % least.sparse_min_cols or not matrix.is_contiguous():
        raise RuntimeError(f"Error original_tensor.shape {matrix.shape} is not supported!")
    return Packed.of(matrix)


def time_on_cpu(runs: Mapping[str, Callable[[], object]], warm_up: int, repeats: int) -> dict[str, float]:
    found = {}
    for name, run in runs.items():
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        found[name] = 1000 * (time.perf_counter() - started) / repeats
    return found


HOST = SparseHost("a CPU", "0.0", torch.__version__, "none", "none", "cpu", compress, multiply, time_on_cpu)
