"""Run masked weights on this GPU's sparse tensor cores through PyTorch's cuSPARSELt, without TensorRT.

A convolution is a product of its weight, as a matrix (K, R*S*C), and the columns of its input. With columns ordered r, s, c
each group of four along C is contiguous, as sparse tensor cores require.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskplan.engines.cusparselt import SparseHost, find_cusparselt_host
from maskplan.exporters.counting import count_groups
from maskplan.exporters.layer_shapes import LayerShape
from maskplan.pipeline.core.choices import FAIL, PASS
from maskplan.pipeline.core.errors import InputError
from maskplan.pipeline.core.progress import track
from maskplan.pipeline.core.validation import at_least
from maskplan.pipeline.masking.eligibility import ineligible_reason

if TYPE_CHECKING:
    import torch

LEFT_OUT = "left_out"
NOTE = (
    "GPU time, p50; weights of both products are zero-padded to the sizes that cuSPARSELt supports; im2col is not timed;"
    " layers of the same shape share one measurement; cuSPARSELt's default algorithm"
)
# Sizes that cuSPARSELt supports (from PyTorch's SparseSemiStructuredTensorCUSPARSELT): multiples for the rows and columns of
# the sparse matrix, and for the columns of the dense one.
MULTIPLES = {"fp16": (16, 16, 8), "bf16": (16, 16, 8), "int8": (32, 32, 16)}
_CONV, _DENSE, _SPARSE = "conv", "dense", "sparse"
_INT8_MAX = 127
# Scale of normally distributed inputs: 4 standard deviations are 128.
_INT8_STEPS = 32.0


@dataclass(frozen=True)
class ProbeOptions:
    """Options of the probe.

    Attributes:
        batches: Batch sizes to time.
        dtype: Type of weights and inputs.
        warm_up: Untimed runs of each product.
        repeats: Timed runs of each.
        seed: Seed of the random input.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    dtype: str = "fp16"
    warm_up: int = 5
    repeats: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in MULTIPLES:
            raise InputError(f"unknown dtype {self.dtype!r}", fix=f"choose one of {', '.join(MULTIPLES)}")
        for batch in self.batches:
            at_least(1, batches=batch)
        at_least(1, warm_up=self.warm_up, repeats=self.repeats)
        at_least(0, seed=self.seed)


@dataclass(frozen=True)
class ProbeBatch:
    """Times of one layer shape at one batch size, ms; None if not measured, with the reason in `reason`."""

    batch: int
    conv_ms: float | None
    dense_gemm_ms: float | None
    sparse_gemm_ms: float | None
    reason: str | None = None


@dataclass(frozen=True)
class ProbeLayer:
    """One weight.

    Attributes:
        name: Name of the weight.
        shape: Shape of the layer.
        gemm: Rows and columns of the multiplied matrix: (K, R*S*C), zero-padded to the sizes that cuSPARSELt supports.
        verdict: `pass`, `fail` or `left_out`.
        reason: Why it failed or was left out.
        error: Largest difference between the sparse and the dense product, relative to |W| |X|.
        tolerance: Largest allowed `error`.
        batches: Times per batch size.
    """

    name: str
    shape: LayerShape
    gemm: tuple[int, int]
    verdict: str
    reason: str | None = None
    error: float | None = None
    tolerance: float | None = None
    batches: tuple[ProbeBatch, ...] = ()


@dataclass(frozen=True)
class ProbeReport:
    """Results per weight; `verdict` is `pass` if at least one weight was probed and none failed."""

    verdict: str
    reason: str | None
    device: str
    compute_capability: str
    torch_version: str
    cuda_version: str
    cusparselt_version: str
    dtype: str
    note: str
    layers: tuple[ProbeLayer, ...]


def probe(
    weights: Mapping[str, npt.NDArray[Any]],
    shapes: Mapping[str, LayerShape],
    options: ProbeOptions,
    host: SparseHost | None = None,
) -> ProbeReport:
    """Pack each weight, compare its values and products with the dense ones, and time both products.

    Args:
        weights: (K, C, R, S), or (K, C) for a linear layer, any floats; for `int8` each output channel is scaled by its
            largest magnitude and rounded, which keeps zeros.
        shapes: Layer shapes by the same names.
        options: The dtype, batch sizes and repeats.
        host: The device; this machine's GPU by default.

    Raises:
        HostError: There is no GPU with sparse tensor cores, or PyTorch has no cuSPARSELt.
    """
    host = host or find_cusparselt_host()
    timed: dict[LayerShape, tuple[ProbeBatch, ...]] = {}
    layers = []
    for name in track(list(weights), "probe", len(weights)):
        weight = weights[name].reshape(*weights[name].shape, *(1,) * (4 - weights[name].ndim))
        layers.append(_probe_layer(name, weight, shapes[name], options, host, timed))
    failed = [layer.name for layer in layers if layer.verdict == FAIL]
    reason = None
    if failed:
        reason = f"{len(failed)} of {len(layers)} weights failed, first {failed[0]}"
    elif not any(layer.verdict == PASS for layer in layers):
        reason = "no weight could be probed"
    return ProbeReport(
        verdict=PASS if reason is None else FAIL,
        reason=reason,
        device=host.device,
        compute_capability=host.compute_capability,
        torch_version=host.torch_version,
        cuda_version=host.cuda_version,
        cusparselt_version=host.cusparselt_version,
        dtype=options.dtype,
        note=NOTE,
        layers=tuple(layers),
    )


def weight_matrix(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(K, C, R, S) to (K, R*S*C), columns ordered r, s, c: the groups of four along C become neighbors."""
    return np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).reshape(len(weight), -1)


def columns_of(images: torch.Tensor, shape: LayerShape) -> torch.Tensor:
    """Images (N, C, H, W) of floats to (N*P*Q, R*S*C): the inputs of each output pixel, in the order of `weight_matrix`."""
    from torch.nn import functional

    top, left, bottom, right = shape.pads
    padded = functional.pad(images, (left, right, top, bottom))
    # (N, C*R*S, P*Q), ordered c, r, s.
    seen = functional.unfold(padded, (shape.r, shape.s), shape.dilations, 0, shape.strides)
    n, _, pixels = seen.shape
    ordered = seen.reshape(n, shape.c, shape.r * shape.s, pixels).permute(0, 3, 2, 1)
    return ordered.reshape(n * pixels, shape.r * shape.s * shape.c)


def _probe_layer(
    name: str,
    weight: npt.NDArray[Any],
    shape: LayerShape,
    options: ProbeOptions,
    host: SparseHost,
    timed: dict[LayerShape, tuple[ProbeBatch, ...]],
) -> ProbeLayer:
    rows, columns, _ = MULTIPLES[options.dtype]
    gemm = _round_up(shape.k, rows), _round_up(shape.r * shape.s * shape.c, columns)
    if weight.shape != (shape.k, shape.c, shape.r, shape.s):
        return ProbeLayer(name, shape, gemm, FAIL, f"the weight {weight.shape} does not match the layer's shape")
    ineligible = ineligible_reason("Conv", shape.c, 1)
    if ineligible is not None:
        return ProbeLayer(name, shape, gemm, LEFT_OUT, ineligible)
    matrix = weight_matrix(weight)
    violation = _violation(matrix, shape)
    if violation is not None:
        return ProbeLayer(name, shape, gemm, FAIL, violation)
    try:
        dense = _padded(_as_dtype(matrix, options.dtype), gemm).to(host.torch_device)
        packed = host.compress(dense)
        reason = _changed(dense, packed, options.dtype, host)
        error, tolerance = _error(dense, packed, shape, options, host)
        if reason is None and not error <= tolerance:
            reason = f"the sparse product differs by {error:.2g} of |W| |X|, {tolerance:.2g} is allowed"
    except RuntimeError as refused:  # PyTorch raises the library's errors as RuntimeError
        return ProbeLayer(name, shape, gemm, FAIL, _error_text(refused))
    if shape not in timed:
        timed[shape] = tuple(_time(weight, dense, packed, shape, batch, options, host) for batch in options.batches)
    return ProbeLayer(name, shape, gemm, PASS if reason is None else FAIL, reason, error, tolerance, timed[shape])


def _violation(matrix: npt.NDArray[Any], shape: LayerShape) -> str | None:
    counts = count_groups(matrix, 1, 2, 4)
    if counts.first is None:
        return None
    k, column = counts.first
    place, c = divmod(column, shape.c)
    r, s = divmod(place, shape.s)
    first = f"[{k}, {c // 4 * 4}:{c // 4 * 4 + 4}, {r}, {s}]"
    return f"not 2:4: {counts.violating} of {counts.groups} groups have more than two non-zeros, first at {first}"


def _changed(dense: torch.Tensor, packed: Any, dtype: str, host: SparseHost) -> str | None:
    """Compare the packed values with the original ones, by an exact product with the identity."""
    import torch

    identity = torch.eye(dense.shape[1], dtype=dense.dtype, device=dense.device)
    back = host.multiply(packed, identity.t()).to(torch.float32)
    wrong = int((back != dense.to(torch.float32)).sum())
    return f"{wrong} {dtype} values are changed by packing" if wrong else None


def _error(
    dense: torch.Tensor, packed: Any, shape: LayerShape, options: ProbeOptions, host: SparseHost
) -> tuple[float, float]:
    """The largest difference between sparse and dense product for one image, relative to |W| |X|, and the tolerance.

    Sums of whole numbers are exact. Of floats, both products round each result once and each sum of parts, in their own
    order.
    """
    import torch

    seen = _columns(shape, 1, dense.shape[1], options, host)
    found, wanted = host.multiply(packed, seen.t()), _product(dense, seen)
    if found.dtype == torch.int32:
        return float((found != wanted).any()), 0.0
    largest = dense.float().abs() @ seen.float().abs().t()
    share = (found.float() - wanted.float()).abs() / largest.clamp_min(torch.finfo(torch.float32).tiny)
    return float(share.max()), 2 * torch.finfo(dense.dtype).eps


def _product(dense: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    import torch

    return torch._int_mm(dense, seen.t()) if dense.dtype == torch.int8 else dense @ seen.t()


def _time(
    weight: npt.NDArray[Any],
    dense: torch.Tensor,
    packed: Any,
    shape: LayerShape,
    batch: int,
    options: ProbeOptions,
    host: SparseHost,
) -> ProbeBatch:
    import torch

    try:
        seen = _columns(shape, batch, dense.shape[1], options, host)
        runs: dict[str, Callable[[], object]] = {
            _DENSE: lambda: _product(dense, seen),
            _SPARSE: lambda: host.multiply(packed, seen.t()),
        }
        if dense.dtype != torch.int8:
            runs[_CONV] = _convolution(weight, shape, batch, options, host)
        with _best_algorithms():
            p50_ms = host.time_ms(runs, options.warm_up, options.repeats)
    except RuntimeError as refused:  # includes out of memory
        return ProbeBatch(batch, None, None, None, _error_text(refused))
    reason = None if _CONV in p50_ms else "PyTorch has no int8 convolution on GPUs"
    return ProbeBatch(batch, p50_ms.get(_CONV), p50_ms[_DENSE], p50_ms[_SPARSE], reason)


def _convolution(
    weight: npt.NDArray[Any], shape: LayerShape, batch: int, options: ProbeOptions, host: SparseHost
) -> Callable[[], object]:
    """The dense convolution in channels-last layout, which tensor cores prefer; its input is padded in advance."""
    import torch
    from torch.nn import functional

    top, left, bottom, right = shape.pads
    kind, like = _torch_dtype(options.dtype), torch.channels_last
    images = functional.pad(_images(shape, batch, options, host), (left, right, top, bottom)).to(kind)
    images = images.contiguous(memory_format=like)
    filters = torch.from_numpy(np.ascontiguousarray(weight, np.float32)).to(host.torch_device, kind)
    filters = filters.contiguous(memory_format=like)
    return lambda: functional.conv2d(images, filters, None, shape.strides, 0, shape.dilations)


@contextmanager
def _best_algorithms() -> Iterator[None]:
    import torch

    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _images(shape: LayerShape, batch: int, options: ProbeOptions, host: SparseHost) -> torch.Tensor:
    import torch

    generator = torch.Generator(host.torch_device).manual_seed(options.seed)
    size = (batch, shape.c, shape.height, shape.width)
    return torch.randn(size, generator=generator, device=host.torch_device)


def _columns(shape: LayerShape, batch: int, width: int, options: ProbeOptions, host: SparseHost) -> torch.Tensor:
    """Columns of random images in the probe's dtype, (n, width); padding rows and columns are zero."""
    import torch

    images = _images(shape, batch, options, host)
    if options.dtype == "int8":
        images = (images * _INT8_STEPS).round().clamp(-_INT8_MAX, _INT8_MAX)
    # Converted before im2col multiplies them. `unfold` has no int8 kernel; float16 represents these integers exactly.
    halves = images.to(torch.float16 if options.dtype == "int8" else _torch_dtype(options.dtype))
    seen = columns_of(halves, shape).to(_torch_dtype(options.dtype))
    return _padded(seen, (_round_up(len(seen), MULTIPLES[options.dtype][2]), width))


def _as_dtype(matrix: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    import torch

    values = torch.from_numpy(np.ascontiguousarray(matrix, np.float32))
    if dtype == "int8":
        largest = values.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return (values / largest * _INT8_MAX).round().to(torch.int8)
    made = values.to(_torch_dtype(dtype))
    if not bool(made.isfinite().all()):
        raise RuntimeError(f"some values are not finite numbers of {dtype}")
    return made


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}[name]


def _padded(matrix: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Zero-pad below and to the right; products do not change, and groups of zeros are 2:4."""
    from torch.nn import functional

    rows, columns = matrix.shape
    return functional.pad(matrix, (0, size[1] - columns, 0, size[0] - rows)).contiguous()


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _error_text(error: RuntimeError) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
