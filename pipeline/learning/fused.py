"""Fused CPU kernels of the Gumbel-softmax sample of a weight and its gradient: noise, choice and mask in one pass each.

Noise is a function of seed, pattern and group, so it is not stored between the passes, and any number of threads gives
the same bits. Loops are written to be vectorized: floats and their bit patterns are read and written through separate
arrays, because LLVM does not vectorize loops over arrays that may alias.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from numba import float32, int32, uint32

from maskplan.pipeline.masking.compiled import compiled

Floats = npt.NDArray[np.float32]
_F = TypeVar("_F", bound=Callable[..., Any])

# Groups per block: the noisy logits of six patterns fit the L1 cache.
_BLOCK = 1024
# Logits per thread below which another thread costs more than it saves.
_MIN_LOGITS_PER_THREAD = 1 << 15
# (log(1 + f) - f + f**2 / 2) / f**3 on [sqrt(1/2) - 1, sqrt(2) - 1], Chebyshev fit of degree 8; error below 4e-9.
_LOG = (
    0.07149753719568253,
    -0.115712009370327,
    0.11661510914564133,
    -0.12411050498485565,
    0.14249937236309052,
    -0.1666848063468933,
    0.20000708103179932,
    -0.24999989569187164,
    0.3333333134651184,
)


def _compiled(function: _F) -> _F:
    return compiled(function, fastmath=frozenset({"contract"}))


def sample(
    logits: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, tau: float, seed: int, noise: float, *, hard: bool
) -> torch.Tensor:
    """The weight masked by one sample.

    Args:
        logits: (P, K, C/M, R*S), float32, contiguous.
        weight: (K, C, ...), float32, contiguous.
        table: (P, M), bool.
        tau: Temperature of a soft sample.
        seed: Of the noise.
        noise: Scale of the noise.
        hard: A mask of zeros and ones; otherwise the soft sample.

    Returns:
        Mask times weight, shaped like the weight, float32.
    """
    out = torch.empty_like(weight)
    views = _views(logits, table, seed), _slabs(weight, table), _slabs(out, table)
    _in_threads(lambda start, stop: _sample(*views, start, stop, tau, noise, hard), logits)
    return out


def sample_backward(
    logits: torch.Tensor,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    table: torch.Tensor,
    tau: float,
    seed: int,
    noise: float,
) -> torch.Tensor:
    """The gradient of the logits, through the soft sample (straight-through).

    Args:
        logits: As for `sample`.
        weight: As for `sample`.
        gradient: Gradient of the masked weight, shaped like the weight, float32, contiguous.
        table: As for `sample`.
        tau: As for `sample`.
        seed: As for `sample`.
        noise: As for `sample`.

    Returns:
        Shaped like `logits`, float32.
    """
    out = torch.empty_like(logits)
    views = _views(logits, table, seed), _slabs(weight, table), _slabs(gradient, table), _flat(out)
    _in_threads(lambda start, stop: _sample_backward(*views, start, stop, tau, noise), logits)
    return out


def gumbel_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The noise of a sample whose logits have this shape, float32."""
    out = np.empty((shape[0], int(np.prod(shape[1:]))), np.float32)
    _fill(out, _keys(seed, len(out)))
    return torch.from_numpy(out.reshape(shape))


def _views(
    logits: torch.Tensor, table: torch.Tensor, seed: int
) -> tuple[Floats, npt.NDArray[np.bool_], npt.NDArray[np.uint32]]:
    return _flat(logits), table.numpy(), _keys(seed, len(logits))


def _flat(logits: torch.Tensor) -> Floats:
    flat: Floats = logits.detach().view(len(logits), -1).numpy()
    return flat


def _slabs(weight: torch.Tensor, table: torch.Tensor) -> Floats:
    """(K, C, ...) as (K * C/M, M, R*S)."""
    m = table.shape[1]
    slabs: Floats = weight.detach().view(weight.shape[0] * weight.shape[1] // m, m, -1).numpy()
    return slabs


def _keys(seed: int, count: int) -> npt.NDArray[np.uint32]:
    return np.random.SeedSequence(seed).generate_state(2 * count).astype(np.uint32, copy=False).reshape(count, 2)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="gates")


def _in_threads(work: Callable[[int, int], object], logits: torch.Tensor) -> None:
    """Divide the weight's slabs among at most as many threads as torch uses."""
    slabs = logits.shape[1] * logits.shape[2]
    threads = min(torch.get_num_threads(), logits.numel() // _MIN_LOGITS_PER_THREAD + 1, slabs)
    bounds = [slabs * i // threads for i in range(threads + 1)]
    first, *rest = pairwise(bounds)
    futures = [_pool().submit(work, *span) for span in rest]
    work(*first)
    for future in futures:
        future.result()


@_compiled
def _fill(out: Floats, keys: npt.NDArray[np.uint32]) -> None:
    room = np.empty((4, _BLOCK), np.float32)
    for p in range(out.shape[0]):
        for start in range(0, out.shape[1], _BLOCK):
            n = min(_BLOCK, out.shape[1] - start)
            _gumbels(room, n, start, keys[p, 0], keys[p, 1])
            out[p, start : start + n] = room[0, :n]


@_compiled
def _sample(
    views: Any, weight: Floats, out: Floats, start: int, stop: int, tau: float, scale: float, hard: bool
) -> None:
    logits, table, keys = views
    patterns, m = table.shape
    taps = weight.shape[2]
    step = max(_BLOCK // taps, 1)
    noisy, room = np.empty((patterns, step * taps), np.float32), np.empty((4, step * taps), np.float32)
    kept = np.empty((m, step * taps), np.float32)
    for first in range(start, stop, step):
        slabs = min(step, stop - first)
        n = slabs * taps
        _add_noise(noisy, room, logits, keys, scale, first * taps, n)
        if hard:
            _choose(noisy, table, room, kept, n)
        else:
            _soften(noisy, room, tau, n)
            kept[:] = 0
            for p in range(patterns):
                for j in range(m):
                    if table[p, j]:
                        for i in range(n):
                            kept[j, i] += noisy[p, i]
        for q in range(slabs):
            for j in range(m):
                for t in range(taps):
                    out[first + q, j, t] = weight[first + q, j, t] * kept[j, q * taps + t]


@_compiled
def _sample_backward(
    views: Any, weight: Floats, gradient: Floats, out: Floats, start: int, stop: int, tau: float, scale: float
) -> None:
    logits, table, keys = views
    patterns, m = table.shape
    taps = weight.shape[2]
    step = max(_BLOCK // taps, 1)
    soft, room = np.empty((patterns, step * taps), np.float32), np.empty((4, step * taps), np.float32)
    elements, gains, mean = np.empty((m, step * taps), np.float32), np.empty_like(soft), room[0]
    inverse = float32(1 / tau)
    for first in range(start, stop, step):
        slabs = min(step, stop - first)
        n = slabs * taps
        at = first * taps
        _add_noise(soft, room, logits, keys, scale, at, n)
        _soften(soft, room, tau, n)
        # How the loss changes if an element is kept, summed to how it changes if a pattern is chosen.
        for q in range(slabs):
            for j in range(m):
                for t in range(taps):
                    elements[j, q * taps + t] = gradient[first + q, j, t] * weight[first + q, j, t]
        mean[:n] = 0
        for p in range(patterns):
            gains[p, :n] = 0
            for j in range(m):
                if table[p, j]:
                    for i in range(n):
                        gains[p, i] += elements[j, i]
            for i in range(n):
                mean[i] += soft[p, i] * gains[p, i]
        for p in range(patterns):
            for i in range(n):
                out[p, at + i] = soft[p, i] * (gains[p, i] - mean[i]) * inverse


@_compiled
def _add_noise(
    noisy: Floats, room: Floats, logits: Floats, keys: npt.NDArray[np.uint32], scale: float, at: int, n: int
) -> None:
    by = float32(scale)
    for p in range(logits.shape[0]):
        if by == 0:
            noisy[p, :n] = logits[p, at : at + n]
        else:
            _gumbels(room, n, at, keys[p, 0], keys[p, 1])
            for i in range(n):
                noisy[p, i] = logits[p, at + i] + by * room[0, i]


@_compiled
def _choose(noisy: Floats, table: npt.NDArray[np.bool_], room: Floats, kept: Floats, n: int) -> None:
    """Fill `kept` with ones where the likeliest pattern keeps; ties take the first pattern."""
    # A pattern is represented by its members, one bit each.
    best, chosen = room[0], room[1].view(np.int32)
    for p in range(noisy.shape[0]):
        members = int32(0)
        for j in range(kept.shape[0]):
            members |= int32(int32(table[p, j]) << int32(j))
        if p == 0:
            best[:n] = noisy[0, :n]
            chosen[:n] = members
        for i in range(n):
            # All values are read before the comparison: a select between two values is vectorized, a branch is not.
            value, top, before = noisy[p, i], best[i], chosen[i]
            best[i] = value if value > top else top
            chosen[i] = members if value > top else before
    for j in range(kept.shape[0]):
        for i in range(n):
            kept[j, i] = float32(int32(chosen[i] >> int32(j)) & int32(1))


@_compiled
def _soften(noisy: Floats, room: Floats, tau: float, n: int) -> None:
    """The softmax over the patterns, in place."""
    largest, total = room[0], room[1]
    patterns = noisy.shape[0]
    for i in range(n):
        largest[i] = noisy[0, i]
        total[i] = 0
    for p in range(1, patterns):
        for i in range(n):
            value, top = noisy[p, i], largest[i]
            largest[i] = value if value > top else top
    # exp(x) = 2 ** (x / log 2): the integer part goes into the exponent bits, the fraction through a polynomial.
    by = float32(1.4426950408889634 / tau)
    power, power_bits = room[2], room[2].view(np.int32)
    for p in range(patterns):
        for i in range(n):
            x = (noisy[p, i] - largest[i]) * by
            x = x if x > float32(-126) else float32(-126)
            whole = np.floor(x + float32(0.5))
            noisy[p, i] = x - whole
            power_bits[i] = int32(int32(int32(whole) + int32(127)) << int32(23))
        for i in range(n):
            f = noisy[p, i]
            # Taylor series of 2 ** f, |f| <= 1/2.
            e = float32(1.5403530e-4)
            e = e * f + float32(1.3333558e-3)
            e = e * f + float32(9.6181291e-3)
            e = e * f + float32(5.5504109e-2)
            e = e * f + float32(2.4022651e-1)
            e = e * f + float32(6.9314718e-1)
            e = (e * f + float32(1)) * power[i]
            noisy[p, i] = e
            total[i] += e
    for i in range(n):
        total[i] = float32(1) / total[i]
    for p in range(patterns):
        for i in range(n):
            noisy[p, i] *= total[i]


@_compiled
def _gumbels(room: Floats, n: int, at: int, key: int, second: int) -> None:
    """Fill `room[0]` with -log(-log(u)), u uniform in (0, 1), for the groups from `at` on; the other rows are scratch."""
    values = room[0]
    for i in range(n):
        # 23 random bits plus one half: u is never 0 and never 1.
        values[i] = (float32(int32(_hash(at + i, key, second) >> uint32(9))) + float32(0.5)) * float32(2**-23)
    _minus_log(room, n)
    _minus_log(room, n)


@_compiled
def _hash(counter: int, key: int, second: int) -> Any:
    """A 32-bit hash: rounds of xor-shift and multiplication by odd constants, with a key in between."""
    x = uint32(uint32(counter) + uint32(key))
    x = uint32(x ^ (x >> uint32(16)))
    x = uint32(x * uint32(0x21F0AAAD))
    x = uint32(x ^ (x >> uint32(15)))
    x = uint32(x + uint32(second))
    x = uint32(x * uint32(0xD35A2D97))
    x = uint32(x ^ (x >> uint32(15)))
    x = uint32(x * uint32(0x2C1B3C6D))
    return uint32(x ^ (x >> uint32(16)))


@_compiled
def _minus_log(room: Floats, n: int) -> None:
    """Replace `room[0]` (positive normal numbers) by its negated logarithm, to a few units in the last place."""
    values, bits = room[0], room[0].view(np.int32)
    mantissas, mantissa_bits, exponents = room[1], room[1].view(np.int32), room[2]
    for i in range(n):
        # Mantissas from sqrt(1/2) to sqrt(2), so that logarithms near 0 keep their relative accuracy.
        exponent = int32(int32(bits[i] - int32(0x3F3504F3)) >> int32(23))
        mantissa_bits[i] = int32(bits[i] - int32(exponent << int32(23)))
        exponents[i] = float32(exponent)
    for i in range(n):
        f = mantissas[i] - float32(1)
        # log(1 + f) = f - f**2 / 2 + f**3 * p(f), with p fitted to the interval.
        p = float32(_LOG[0])
        p = p * f + float32(_LOG[1])
        p = p * f + float32(_LOG[2])
        p = p * f + float32(_LOG[3])
        p = p * f + float32(_LOG[4])
        p = p * f + float32(_LOG[5])
        p = p * f + float32(_LOG[6])
        p = p * f + float32(_LOG[7])
        p = p * f + float32(_LOG[8])
        square = f * f
        values[i] = -(f + square * (f * p - float32(0.5)) + exponents[i] * float32(0.6931471805599453))
