"""The layer-wise mask: the mask that changes a layer's outputs least while the kept weights stay unchanged.

A row w of a weight (one output channel) computes w.u from an unfolded input u. A mask that drops e = w - mask*w changes
the output by e.u, in mean square by e H e, where H is the mean of u u^T over training images; over all rows the error is
tr(E H E^T). Rows are independent. Groups of a row are coupled by the off-diagonal blocks of H, so keeping the N largest of
each group is not optimal. Labels are not used.

The minimum is searched row by row (`layerwise_descent`): one group at a time takes its best pattern given all others, then
two strongly coupled groups at once, until neither gains; then some groups get random patterns and the search restarts from
there. No step raises the error. It starts from the magnitude mask and from that of |w| * sqrt(H_ii); each row keeps its
best result. The minimum is local; its distance to the best of all masks is tested on small layers, not proven.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from maskplan.pipeline.core.artifacts import Pattern
from maskplan.pipeline.core.errors import HostError, InputError
from maskplan.pipeline.masking.magnitude import keep_largest
from maskplan.pipeline.masking.patterns import Scalar, group, pattern_table, ungroup

Floats = npt.NDArray[np.floating]

# Every pattern's cost sums over all pairs that it drops: 8:16 is slow but feasible (823,680 terms), 16:32 is not.
_MAX_WORK = 1_000_000
# Number of groups that each group is tried together with: those that H couples it to most strongly.
_NEAR = 8
# Pairs of patterns are compared only if there are few patterns; 70 patterns (4:8) would have 4,900 pairs.
_MAX_PAIRED = 20
# Restarts of a row: at most `_MAX_RESTARTS`, fewer for rows with many groups, where a restart costs more and gains less.
_MAX_RESTARTS, _RESTART_PATTERNS = 64, 1536
_ROWS_PER_TASK = 16


def layerwise_mask(
    weight: Floats,
    moment: Floats,
    pattern: Pattern,
    *,
    start: npt.NDArray[np.bool_] | None = None,
    name: str = "the weight",
    threads: int | None = None,
) -> npt.NDArray[np.bool_]:
    """Keep N of M along C so that the layer's outputs change least.

    Args:
        weight: (K, C, R, S) or (K, C); finite, C a multiple of M.
        moment: (D, D) with D = R*S*C, the second moments of the unfolded inputs: symmetric and positive semidefinite up to
            rounding. Columns are in the order of `unfold_weight`: kernel positions outermost, channels innermost.
        pattern: N:M.
        start: Bool mask to start from, shaped like `weight`; by default the two starts above are tried.
        name: Of the weight, for error messages.
        threads: Number of threads, all cores by default. The mask does not depend on it.

    Returns:
        Bool mask shaped like `weight`, exactly N True in each group. Of weights that cost the same, such as zeros, those
        that the start drops stay dropped.

    Raises:
        InputError: C is not a multiple of M, N > M, there are too many patterns to compare, values are not finite, or the
            moments have another layer's shape.
        HostError: numba is not installed.
    """
    _require_fit(weight, moment, pattern, name)
    try:
        from maskplan.pipeline.masking.layerwise_descent import descend
    except ModuleNotFoundError as error:
        raise HostError(
            "numba is not installed; layer-wise masks need it",
            found=error,
            fix="pip install 'maskplan[learn]', or choose magnitude masks",
        ) from error
    table = pattern_table(pattern)
    rows = unfold_weight(weight).astype(np.float64)
    # Scale each row by a power of two so that its largest weight is below one: no product overflows or underflows.
    _, exponents = np.frexp(np.abs(rows).max(axis=1, initial=0, keepdims=True))
    rows = np.ldexp(rows, -exponents)
    # The two triangles differ by rounding, and on an asymmetric matrix the search could cycle.
    moment = (moment + moment.T) / 2
    input_rms = np.sqrt(np.maximum(np.diagonal(moment), 0, dtype=np.float64))
    starts = [np.abs(rows), np.abs(rows) * input_rms] if start is None else [unfold_weight(start)]
    near = _coupled(moment, input_rms, pattern.m, _NEAR if len(table) <= _MAX_PAIRED else 0)
    groups = rows.shape[1] // pattern.m
    restarts = min(_MAX_RESTARTS, _RESTART_PATTERNS // max(groups * len(table), 1))
    kept = [keep_largest(scores, 1, pattern) for scores in starts] if start is None else starts
    choices = np.stack([_choice(mask, table) for mask in kept])
    dropped = np.nonzero(~table)[1].reshape(len(table), -1)
    chosen = np.empty_like(choices[0])

    def work(first: int) -> None:
        part = slice(first, first + _ROWS_PER_TASK)
        descend(rows[part], moment, choices[:, part], table, dropped, near, restarts, first, chosen[part])

    with ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="rows") as pool:
        for _ in pool.map(work, range(0, len(rows), _ROWS_PER_TASK)):
            pass
    return ungroup(table[chosen].reshape(weight.shape[0], *weight.shape[2:], -1, pattern.m), weight.shape)


def unfold_weight(weight: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """(K, C, R, S) to (K, R*S*C): kernel positions outermost, so that the members of a group along C are adjacent."""
    return np.ascontiguousarray(group(weight, 1)).reshape(len(weight), -1)


def fold_weight(rows: npt.NDArray[Scalar], shape: tuple[int, ...]) -> npt.NDArray[Scalar]:
    """The inverse of `unfold_weight`: back to the weight's `shape`."""
    return ungroup(rows.reshape(shape[0], *shape[2:], shape[1], 1), shape)


def output_error(difference: Floats, moment: Floats) -> npt.NDArray[np.float64]:
    """Mean squared change of each output channel for a change E of the weights: the diagonal of E H E^T.

    Args:
        difference: E, (K, C, R, S) or (K, C).
        moment: H, (D, D), as for `layerwise_mask`.

    Returns:
        float64 (K,), non-negative up to rounding.
    """
    rows = unfold_weight(difference).astype(np.float64)
    errors: npt.NDArray[np.float64] = np.einsum("kd,kd->k", rows @ moment.astype(np.float64), rows)
    return errors


def _require_fit(weight: Floats, moment: Floats, pattern: Pattern, name: str) -> None:
    n, m = pattern.n, pattern.m
    if not 1 <= n <= m:
        raise InputError(
            "invalid pattern of layer-wise masks", found=str(pattern), fix="N must be at least 1 and at most M"
        )
    if math.comb(m, n) * (m - n) ** 2 > _MAX_WORK:
        raise InputError(
            f"layer-wise masks compare all patterns of a group, and {pattern} has too many",
            found=f"{math.comb(m, n):,} patterns that drop {m - n} weights each",
            fix="choose a smaller pattern, such as 2:4 or 4:8, or magnitude masks",
        )
    if weight.ndim < 2 or weight.shape[1] % m:
        raise InputError(
            f"{name} has no groups of {m} along C",
            found=f"shape {weight.shape}",
            fix=f"{pattern} masks need input channels in multiples of {m}: leave this layer dense",
        )
    columns = math.prod(weight.shape[1:])
    if moment.shape != (columns, columns):
        raise InputError(
            f"the second moments do not fit {name}", found=f"shape {moment.shape}, expected {(columns, columns)}"
        )
    for kind, values in (("weights", weight), ("inputs on these images", moment)):
        if not (math.isfinite(float(values.max(initial=0))) and math.isfinite(float(values.min(initial=0)))):
            raise InputError(
                f"the {kind} of {name} contain NaN or infinity",
                fix="use a checkpoint from before training diverged, and check the images' normalization",
            )


def _choice(mask: npt.NDArray[np.generic], table: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """For each group of a mask (K, D), the index of the pattern that shares most with it: (K, G)."""
    grouped = mask.reshape(len(mask), -1, table.shape[1]).astype(np.float32)
    choices: npt.NDArray[np.int64] = (grouped @ table.T.astype(np.float32)).argmax(axis=-1)
    return choices


def _coupled(moment: Floats, input_rms: npt.NDArray[np.float64], m: int, count: int) -> npt.NDArray[np.int64]:
    """For each group, the (at most `count`) other groups whose inputs correlate with its own most: (G, count)."""
    groups = len(moment) // m
    count = min(count, groups - 1)
    neighbors = np.empty((groups, max(count, 0)), np.int64)
    if count < 1:
        return neighbors
    inverse = np.divide(1, input_rms, out=np.zeros_like(input_rms), where=input_rms > 0).astype(np.float32)
    for g in range(groups):
        part = slice(g * m, (g + 1) * m)
        correlation = moment[part] * inverse[part, None] * inverse
        strength = np.square(correlation, out=correlation).reshape(m, groups, m).sum(axis=(0, 2))
        strength[g] = -1
        neighbors[g] = np.argsort(-strength, kind="stable")[:count]
    return neighbors
