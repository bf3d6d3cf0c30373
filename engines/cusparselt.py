"""This GPU's sparse tensor cores by PyTorch's cuSPARSELt: what packs, what multiplies, and a clock for both."""

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
# More than GPUs have: a sleep that is too long costs nothing but time.
_CYCLES_PER_S = 2.5e9
_LONGEST_SLEEP_S = 1.0


@dataclass(frozen=True)
class SparseHost:
    """What multiplies, and how it is timed.

    Attributes:
        device: The GPU's name.
        compute_capability: As in 9.0.
        torch_version: PyTorch's.
        cuda_version: What PyTorch was built for.
        cusparselt_version: The library's.
        place: PyTorch's name of the device.
        compress: A 2:4 matrix (rows, columns) to its packed form.
        multiply: A packed matrix times a dense one (columns, n), the latter stored by columns: (rows, n).
        clock: Callables by name, warm-up runs and repeats, to the p50 of each, ms.
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
    """This machine's GPU.

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
            "the probe needs an NVIDIA GPU, and PyTorch sees none",
            found=built,
            fix="run it on a host where nvidia-smi sees an Ampere GPU or a newer one, with a PyTorch built for CUDA",
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
            fix="install PyTorch's CUDA wheel for Linux, which brings the library: pip install 'maskplan[learn]'",
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
        warnings.simplefilter("ignore")  # that the interface is a prototype
        packed = to_sparse_semi_structured(matrix)
    if not isinstance(packed, SparseSemiStructuredTensorCUSPARSELT):
        raise RuntimeError(f"packed for {packed.BACKEND}, not for cuSPARSELt")
    return packed


def _multiply(packed: Any, dense: torch.Tensor) -> torch.Tensor:
    import torch

    if packed.dtype == torch.int8:
        # The operator `@` would round the sums to int8.
        return torch._cslt_sparse_mm(packed.packed, dense, out_dtype=torch.int32)
    product: torch.Tensor = packed @ dense
    return product


def _time_on_gpu(runs: Mapping[str, Callable[[], object]], warm_up: int, repeats: int) -> dict[str, float]:
    """Events on the GPU, runs in turn. The GPU sleeps while they are queued, so that it never waits for Python."""
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
        # The last one counts: the first ones load kernels and choose among them.
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
