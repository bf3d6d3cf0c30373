"""Sparse matrix products on this GPU through PyTorch's cuSPARSELt: packing, multiplication and timing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from maskplan.pipeline.core.errors import HostError

if TYPE_CHECKING:
    import torch

_CHUNK = 10
# Higher than any GPU's clock rate: a sleep that is too long only costs time.
_CYCLES_PER_S = 2.5e9
_LONGEST_SLEEP_S = 1.0


@dataclass(frozen=True)
class SparseHost:
    """The device and its functions for sparse products.

    Attributes:
        device: Name of the GPU.
        compute_capability: Such as 9.0.
        torch_version: Version of PyTorch.
        cuda_version: CUDA version of the PyTorch build.
        cusparselt_version: Version of cuSPARSELt.
        torch_device: PyTorch's name of the device.
        compress: Packs a 2:4 matrix (rows, columns).
        multiply: Multiplies a packed matrix by a dense one (columns, n) in column-major order; returns (rows, n).
        time_ms: Times callables by name, given the numbers of warm-up runs and repeats; returns the p50 of each in ms.
    """

    device: str
    compute_capability: str
    torch_version: str
    cuda_version: str
    cusparselt_version: str
    torch_device: str
    compress: Callable[[torch.Tensor], Any]
    multiply: Callable[[Any, torch.Tensor], torch.Tensor]
    time_ms: Callable[[Mapping[str, Callable[[], object]], int, int], dict[str, float]]


def find_cusparselt_host() -> SparseHost:
    """Describe this machine's GPU.

    Raises:
        HostError: PyTorch, a GPU of compute capability 8.0 or more, or cuSPARSELt is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise HostError("PyTorch is not installed", found=error, fix="pip install 'maskplan[learn]'") from error
    built = (
        f"PyTorch {torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}"
    )
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise HostError(
            "the probe needs an NVIDIA GPU, and PyTorch finds none",
            found=built,
            fix="run it on a host with an Ampere GPU or newer, with a CUDA build of PyTorch",
        )
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    if major < 8:
        raise HostError(
            "this GPU has no sparse tensor cores",
            found=f"{name}, compute capability {major}.{minor}",
            fix="run it on Ampere (8.0) or newer",
        )
    if not torch.backends.cusparselt.is_available():
        raise HostError(
            "this PyTorch has no cuSPARSELt",
            found=built,
            fix="install PyTorch's CUDA wheel for Linux, which includes the library: pip install 'maskplan[learn]'",
        )
    return SparseHost(
        device=name,
        compute_capability=f"{major}.{minor}",
        torch_version=torch.__version__,
        cuda_version=torch.version.cuda,
        cusparselt_version=str(torch.backends.cusparselt.version()),
        torch_device="cuda",
        compress=_compress,
        multiply=_multiply,
        time_ms=_time_on_gpu,
    )


def _compress(matrix: torch.Tensor) -> Any:
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, to_sparse_semi_structured

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that the interface is a prototype
        packed = to_sparse_semi_structured(matrix)
    if not isinstance(packed, SparseSemiStructuredTensorCUSPARSELT):
        raise RuntimeError(f"packed for {packed.BACKEND}, not for cuSPARSELt")
    return packed


def _multiply(packed: Any, dense: torch.Tensor) -> torch.Tensor:
    import torch

    if packed.dtype == torch.int8:
        # The operator `@` would convert the int32 sums to int8.
        return torch._cslt_sparse_mm(packed.packed, dense, out_dtype=torch.int32)
    product: torch.Tensor = packed @ dense
    return product


def _time_on_gpu(runs: Mapping[str, Callable[[], object]], warm_up: int, repeats: int) -> dict[str, float]:
    """Time interleaved runs with CUDA events. The GPU sleeps while runs are queued, so that it never waits for Python."""
    import torch

    pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}

    def one_round(i: int) -> None:
        order = list(runs)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            pair: tuple[Any, Any] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            pair[0].record()
            runs[name]()
            pair[1].record()
            pairs[name].append(pair)

    queueing_s = 0.0
    for i in range(warm_up):
        torch.cuda.synchronize()
        started = time.perf_counter()
        one_round(i)
        # Only the last round counts: the first ones load kernels and select algorithms.
        queueing_s = time.perf_counter() - started
    torch.cuda.synchronize()
    for found in pairs.values():
        found.clear()

    for first in range(0, repeats, _CHUNK):
        torch.cuda._sleep(int(min(2 * _CHUNK * queueing_s, _LONGEST_SLEEP_S) * _CYCLES_PER_S))  # type: ignore[no-untyped-call, unused-ignore]
        for i in range(first, min(first + _CHUNK, repeats)):
            one_round(i)
        torch.cuda.synchronize()
    return {name: float(np.median([a.elapsed_time(b) for a, b in found])) for name, found in pairs.items()}
