"""The layer-wise mask: the one that changes a layer's outputs least, its weights as they are.

A row w of a weight (one output channel) makes w.u of an unfolded input u. A mask that drops the error e = w - mask*w
changes that by e.u, in the mean of squares by e H e, with H the mean of u u^T over training images; over all rows that is
tr(E H E^T). Rows have nothing to do with each other; groups of a row do, by the blocks of H between them, so that the N
largest of each group are not the best. No label is looked at.

The minimum is searched row by row (`layerwise_descent`): one group at a time takes its best pattern, given all others, then
two strongly coupled groups at once, until neither gains; then some groups are thrown over and it starts again from there. No
step ever raises the error. Starts are the magnitude mask and that of |w| * sqrt(H_ii); each row keeps its better end. The
minimum found is a local one; how near it comes to the least of all masks is tested on small layers, not proven.
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

# All patterns of a group are compared, and all pairs that one drops: 8:16 is possible (823,680), if slow; 16:32 is not.
_MOST_WORK = 1_000_000
# Groups that one is tried together with: those that H couples it to most.
_NEAR = 8
# Pairs of patterns are compared too where these are few; of 70 patterns 4,900 pairs would be.
_MOST_PAIRED = 20
# How often a row starts again: at most, and until so many patterns of groups have been looked at once. A start of a row with
# many groups costs more and gains less.
_MOST_KICKS, _KICKED_PATTERNS = 64, 1536
_ROWS_A_TASK = 16


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
        moment: (D, D) with D = R*S*C, the second moments of the unfolded inputs, symmetric, no negative eigenvalues but by
            rounding. Columns are in the order of `unfold_weight`: kernel positions outermost, channels innermost.
        pattern: N:M.
        start: The mask to start from; by default two are tried (above), and each row keeps the better.
        name: Of the weight, for messages.
        threads: How many share the work; all cores by default. The mask does not depend on it.

    Returns:
        Bool mask shaped like `weight`, exactly N true in each group. Of weights that cost the same, such as zeros, those
        that the starts drop stay dropped.

    Raises:
        InputError: C is not a multiple of M, N > M, too many patterns to compare, numbers that are not finite, or moments of
            another layer.
        HostError: numba is not installed.
    """
    _require_fit(weight, moment, pattern, name)
    try:
        from maskplan.pipeline.masking.layerwise_descent import descend
    except ModuleNotFoundError as error:
        raise HostError(
            "numba is not installed, and layer-wise masks need it",
            found=error,
            fix="pip install 'maskplan[learn]', or choose magnitude masks",
        ) from error
    table = pattern_table(pattern)
    rows = unfold_weight(weight).astype(np.float64)
    # A power of two for each row brings its largest below one, so that no product overflows and no small scale is lost.
    _, exponents = np.frexp(np.abs(rows).max(axis=1, initial=0, keepdims=True))
    rows = np.ldexp(rows, -exponents)
    # Sums in another order leave halves that differ by rounding, on which the search could go in circles.
    moment = (moment + moment.T) / 2
    reach = np.sqrt(np.maximum(np.diagonal(moment), 0, dtype=np.float64))
    starts = [np.abs(rows), np.abs(rows) * reach] if start is None else [unfold_weight(start)]
    near = _coupled(moment, reach, pattern.m, _NEAR if len(table) <= _MOST_PAIRED else 0)
    groups = rows.shape[1] // pattern.m
    kicks = min(_MOST_KICKS, _KICKED_PATTERNS // max(groups * len(table), 1))
    kept = [keep_largest(scores, 1, pattern) for scores in starts] if start is None else starts
    choices = np.stack([_choice(mask, table) for mask in kept])
    dropped = np.nonzero(~table)[1].reshape(len(table), -1)
    chosen = np.empty_like(choices[0])

    def work(first: int) -> None:
        part = slice(first, first + _ROWS_A_TASK)
        descend(rows[part], moment, choices[:, part], table, dropped, near, kicks, first, chosen[part])

    with ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="rows") as pool:
        for _ in pool.map(work, range(0, len(rows), _ROWS_A_TASK)):
            pass
    return ungroup(table[chosen].reshape(weight.shape[0], *weight.shape[2:], -1, pattern.m), weight.shape)


def unfold_weight(weight: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """(K, C, R, S) to (K, R*S*C): kernel positions outermost, so that groups along C lie side by side."""
    return np.ascontiguousarray(group(weight, 1)).reshape(len(weight), -1)


def fold_weight(rows: npt.NDArray[Scalar], shape: tuple[int, ...]) -> npt.NDArray[Scalar]:
    """The inverse of `unfold_weight`: back to the weight's `shape`."""
    return ungroup(rows.reshape(shape[0], *shape[2:], shape[1], 1), shape)


def output_error(difference: Floats, moment: Floats) -> npt.NDArray[np.float64]:
    """The mean square of what a difference of weights does to each output channel: the diagonal of E H E^T.

    Args:
        difference: (K, C, R, S) or (K, C).
        moment: (D, D), as of `layerwise_mask`.

    Returns:
        (K,), not negative but by rounding.
    """
    rows = unfold_weight(difference).astype(np.float64)
    found: npt.NDArray[np.float64] = np.einsum("kd,kd->k", rows @ moment.astype(np.float64), rows)
    return found


def _require_fit(weight: Floats, moment: Floats, pattern: Pattern, name: str) -> None:
    n, m = pattern.n, pattern.m
    if not 1 <= n <= m:
        raise InputError("no mask keeps that", found=f"the pattern {pattern}", fix="N is at least 1 and at most M")
    if math.comb(m, n) * (m - n) ** 2 > _MOST_WORK:
        raise InputError(
            f"layer-wise masks compare all patterns of a group, and {pattern} has too many",
            found=f"{math.comb(m, n):,} that drop {m - n} weights each",
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
            f"the second moments are not of {name}", found=f"{moment.shape} where {(columns, columns)} is needed"
        )
    for what, values in (("weights", weight), ("inputs on these images", moment)):
        if not (math.isfinite(float(values.max(initial=0))) and math.isfinite(float(values.min(initial=0)))):
            raise InputError(
                f"the {what} of {name} hold NaN or infinity",
                fix="use a checkpoint from before training diverged, and check the images' normalization",
            )


def _choice(mask: npt.NDArray[np.generic], table: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The pattern of each group that shares most with a mask (K, D); (K, G)."""
    grouped = mask.reshape(len(mask), -1, table.shape[1]).astype(np.float32)
    found: npt.NDArray[np.int64] = (grouped @ table.T.astype(np.float32)).argmax(axis=-1)
    return found


def _coupled(moment: Floats, reach: npt.NDArray[np.float64], m: int, most: int) -> npt.NDArray[np.int64]:
    """For each group the others that it is correlated with most, (G, at most `most`)."""
    groups = len(moment) // m
    most = min(most, groups - 1)
    found = np.empty((groups, max(most, 0)), np.int64)
    if most < 1:
        return found
    inverse = np.divide(1, reach, out=np.zeros_like(reach), where=reach > 0).astype(np.float32)
    for g in range(groups):
        part = slice(g * m, (g + 1) * m)
        correlation = moment[part] * inverse[part, None] * inverse
        strength = np.square(correlation, out=correlation).reshape(m, groups, m).sum(axis=(0, 2))
        strength[g] = -1
        found[g] = np.argsort(-strength, kind="stable")[:most]
    return found
